"""Gradient norms: equal to plain autograd, chunk by chunk or whole, tied or not; the model is as it was before."""

from __future__ import annotations

import copy
import math

import families
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from tiny_llama import changed, subject, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from neuroweave.diagnose.bootstrap import Bootstrap
from neuroweave.diagnose.probes import backward
from neuroweave.diagnose.probes.anatomy import find_anatomy
from neuroweave.diagnose.probes.backward import gradient_norm
from neuroweave.diagnose.probes.gradient import (
    GradientTally,
    gradient_difference,
    gradient_result,
    measure_gradients,
    spread,
)
from neuroweave.diagnose.probes.head import OutputHead
from neuroweave.diagnose.results.plan import GradientPlan
from neuroweave.surgery import patch
from neuroweave.text.sample import Window

PLAN = GradientPlan(windows=4, tokens=20)
SETTINGS = {"resamples": 200, "seed": 0}


def windows(lengths: tuple[int, ...] = (31, 7, 2, 23)) -> list[Window]:
    draw = np.random.default_rng(0)
    return [Window(unit, tuple(draw.integers(3, 99, size=length).tolist())) for unit, length in enumerate(lengths)]


def by_autograd(model: nn.Module, window: Window, limit: int) -> tuple[float, dict[str, float]]:
    """Loss and norm of the gradient of each parameter, from torch.autograd.grad; in the dtype of the model."""
    ids = torch.tensor([window.token_ids[:limit]])
    named = dict(model.named_parameters())
    log_p = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
    loss = -log_p[torch.arange(len(log_p)), ids[0, 1:]].mean()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    norms = (0.0 if each is None else np.linalg.norm(each.double().numpy()) for each in gradients)
    return loss.item(), dict(zip(named, norms, strict=True))


def few_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(backward, "head_rows", lambda vocabulary, itemsize: rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 7, 123])
def test_norms_are_those_of_autograd(tied: bool, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; without a head, and with one that takes 1, 7 or all positions at a time."""
    model = tiny_model(tie_word_embeddings=tied).double()
    if rows is not None:
        few_rows(monkeypatch, rows)
    tally = measure_gradients(subject("m", model), windows(), PLAN, head=model.lm_head if rows else None)
    result = gradient_result(tally, **SETTINGS)
    wanted = [by_autograd(model, window, PLAN.tokens) for window in windows()]

    assert result.windows == 4
    assert result.loss.value == pytest.approx(np.mean([loss for loss, _ in wanted]), rel=1e-12)
    totals = [math.sqrt(sum(norm**2 for norm in norms.values())) for _, norms in wanted]
    assert result.total.value == pytest.approx(np.mean(totals), rel=1e-12)
    found = {}
    for family in result.families:
        for layer, size, norm in zip(family.layers, family.parameters, family.norm, strict=True):
            name = family.family if layer is None else f"model.layers.{layer}.{family.family}"
            found[name] = norm.value
            assert size == model.get_parameter(name).numel()
    means = {name: np.mean([norms[name] for _, norms in wanted]) for name in wanted[0][1]}
    assert found == pytest.approx(means, rel=1e-11)
    assert ("lm_head.weight" in found) == (not tied)
    families_found = [family.family for family in result.families]
    assert families_found[:2] == ["mlp.down_proj.weight", "model.embed_tokens.weight"]
    assert result.families[0].layers == [0, 1, 2]
    assert result.families[1].layers == [None]


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "gpt_neox", "opt", "phi", "mixtral"])
def test_other_families(family: str) -> None:
    model = families.tiny_model(family)
    tally = measure_gradients(subject("m", model), windows((9,)), PLAN)
    loss, norms = by_autograd(model, windows((9,))[0], PLAN.tokens)
    assert tally.losses == pytest.approx([loss], rel=1e-5)
    assert sorted(tally.norms[0]) == pytest.approx(sorted(norms.values()), rel=1e-4, abs=1e-6)
    if family != "mixtral":
        assert tally.families[0] == find_anatomy(model).down_family


def test_a_learned_mixture_has_families_of_its_own() -> None:
    model = tiny_model()
    patch(model, "learned-mixture")
    families_found = {
        each.family: each.layers
        for each in gradient_result(measure_gradients(subject("m", model), windows(), PLAN), **SETTINGS).families
    }
    for name in ("gating_logits", "beta"):
        assert families_found[f"mlp.act_fn.{name}"] == [0, 1, 2]


def test_adapted_weights_keep_their_families_and_frozen_ones_count() -> None:
    plain = tiny_model()
    wanted = measure_gradients(subject("m", plain), windows(), PLAN)
    adapted = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["down_proj"])).eval()
    frozen = [parameter.requires_grad for parameter in adapted.parameters()]
    tally = measure_gradients(subject("m", adapted), windows(), PLAN)
    assert [parameter.requires_grad for parameter in adapted.parameters()] == frozen
    difference = gradient_difference(wanted, tally, **SETTINGS)
    assert difference.only_base == []
    assert difference.only_other == ["mlp.down_proj.lora_A.default.weight", "mlp.down_proj.lora_B.default.weight"]
    assert difference.families[0].family == "mlp.down_proj.weight"
    assert [each.value for each in difference.families[0].ratio] == pytest.approx([1] * 3, rel=1e-6)


def traces(model: nn.Module) -> list[object]:
    """What measuring must leave alone."""
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), module.training, sorted(vars(module)))
        for module in model.modules()
    ]
    return [
        hooks,
        *((p.requires_grad, id(p.grad), len(p._post_accumulate_grad_hooks or {})) for p in model.parameters()),
    ]


@pytest.mark.parametrize("with_head", [False, True])
def test_the_model_is_as_it_was(with_head: bool) -> None:
    model = tiny_model(tie_word_embeddings=True).train()
    model.model.layers[0].requires_grad_(False)
    model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, 3.0)
    before, weights = traces(model), copy.deepcopy(model.state_dict())
    head = model.lm_head if with_head else None
    with torch.inference_mode():
        measure_gradients(subject("m", model), windows(), PLAN, head=head)
    assert traces(model) == before
    assert torch.equal(model.model.norm.weight.grad, torch.full((32,), 3.0))
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())

    broken = iter([model.lm_head])
    with pytest.raises(StopIteration):  # in the second chunk or window, with gradients held
        measure_gradients(subject("m", model), windows(), PLAN, head=lambda states: next(broken)(states))
    assert traces(model) == before


@pytest.mark.parametrize("with_head", [False, True])
def test_about_one_gradient_is_held_at_a_time(with_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the head's until the end, where there is one."""
    model = tiny_model()
    held = []

    def norm(own: torch.Tensor) -> float:
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return gradient_norm(own)

    monkeypatch.setattr(backward, "gradient_norm", norm)
    measure_gradients(subject("m", model), windows((9,)), PLAN, head=model.lm_head if with_head else None)
    count = len(list(model.parameters()))
    assert held == ([2] * (count - 1) + [1] if with_head else [1] * count)


class Made(TorchDispatchMode):
    """Counts the matrices of one shape that operators make; views and results in place are no new ones."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.places, self.kept = like.shape, {like.data_ptr()}, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.layout == torch.strided
            and out.shape in (self.shape, self.shape[::-1])
        ) and out.data_ptr() not in self.places:
            self.places.add(out.data_ptr())
            self.kept.append(out)  # so that its place is not given to another
        return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_gradient_of_the_head_is_one_matrix(tied: bool, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks there are; and an embedding's is none at all, but the rows of its tokens."""
    few_rows(monkeypatch, 7)
    model = tiny_model(tie_word_embeddings=tied)
    head = OutputHead(model.lm_head, lambda logits: logits * 2) if wrapped else model.lm_head
    with Made(model.lm_head.weight.data) as made:
        if not tied:
            made.places.add(model.get_input_embeddings().weight.data_ptr())
        tally = measure_gradients(subject("m", model), windows((31,)), PLAN, head=head)
    assert len(made.kept) == 1
    assert len(tally.norms) == 1
    assert model.get_input_embeddings().sparse is False


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision(
    tied: bool, rows: int | None, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the norms of the same weights in float64, of all parameters and of the head and the embedding."""
    few_rows(monkeypatch, rows or 1)
    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    exact = copy.deepcopy(model).double()
    found = measure_gradients(subject("m", model), windows(), PLAN, head=model.lm_head if rows else None)
    wanted = measure_gradients(subject("m", exact), windows(), PLAN)
    assert np.array(found.norms) == pytest.approx(np.array(wanted.norms), rel=tolerance, abs=1e-5)


def test_dropout_is_off() -> None:
    model = tiny_model(attention_dropout=0.9)
    wanted = measure_gradients(subject("m", model), windows(), PLAN).losses
    assert measure_gradients(subject("m", model.train()), windows(), PLAN).losses == wanted


def test_an_interrupted_run_goes_on_to_an_equal_result() -> None:
    model = subject("m", tiny_model())
    whole = measure_gradients(model, windows(), PLAN)
    tally = GradientTally.empty(model.model)
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gradients(model, windows(), PLAN, tally=tally, after_window=stop)
    assert len(tally.losses) == 2
    stored = GradientTally.from_arrays(tally.arrays())
    resumed = measure_gradients(model, windows(), PLAN, tally=stored, after_window=lambda: stop())
    assert count == 4
    for name, values in whole.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], values)
    assert gradient_result(resumed, **SETTINGS) == gradient_result(whole, **SETTINGS)
    empty = GradientTally.from_arrays(GradientTally.empty(model.model).arrays())
    assert empty.arrays()["norms"].shape == (0, len(whole.families))
    with pytest.raises(ValueError, match="the stored gradients are not of m; measure again from the start"):
        measure_gradients(subject("m", tiny_model(num_hidden_layers=2)), windows(), PLAN, tally=tally)


def test_windows_are_spread_evenly() -> None:
    every = windows((2,) * 123)
    assert [window.unit for window in spread(every, 3)] == [20, 61, 102]
    assert len({window.unit for window in spread(every, 122)}) == 122
    assert spread(every[:7], 7) == spread(every[:7], 10) == every[:7]
    assert [window.unit for window in spread(every[:7], 1)] == [3]


def test_a_model_against_itself_is_exactly_one() -> None:
    tally = measure_gradients(subject("m", tiny_model()), windows((5,) * 7), GradientPlan(windows=7, tokens=20))
    difference = gradient_difference(tally, GradientTally.from_arrays(tally.arrays()), **SETTINGS)
    assert {(each.value, each.low, each.high) for family in difference.families for each in family.ratio} == {(1, 1, 1)}
    assert (difference.total.value, difference.total.low, difference.total.high) == (1, 1, 1)
    assert (difference.only_base, difference.only_other) == ([], [])


def test_ratio_and_interval_match_scipy() -> None:
    many = windows((11,) * 40)
    plan = GradientPlan(windows=40, tokens=11)
    model = tiny_model()
    base, other = (measure_gradients(subject("m", each), many, plan) for each in (model, changed(model, 0.2)))
    difference = gradient_difference(base, other, resamples=20000, seed=0)
    assert difference.families[0].family == "mlp.down_proj.weight"
    found = difference.families[0].ratio[1]
    ours, theirs = (np.array(tally.norms)[:, 1] for tally in (base, other))
    assert found.value == pytest.approx(theirs.mean() / ours.mean(), rel=1e-14)
    wanted = stats.bootstrap(
        (theirs, ours),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    width = wanted.high - wanted.low
    assert [found.low, found.high] == pytest.approx([wanted.low, wanted.high], abs=0.05 * width)


def test_families_with_other_layers_are_not_compared() -> None:
    models = [tiny_model(tie_word_embeddings=True), tiny_model(num_hidden_layers=2)]
    tallies = [measure_gradients(subject("m", model), windows(), PLAN) for model in models]
    difference = gradient_difference(*tallies, **SETTINGS)
    assert [family.family for family in difference.families] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert "mlp.down_proj.weight" in difference.only_base
    assert "lm_head.weight" not in difference.only_base
    assert {"mlp.down_proj.weight", "lm_head.weight"} <= set(difference.only_other)
    fewer = measure_gradients(subject("m", models[0]), windows((7,)), PLAN)
    with pytest.raises(ValueError, match="of 4 and 1 windows; measure both models on the same"):
        gradient_difference(tallies[0], fewer, **SETTINGS)


def test_a_single_window_has_no_interval() -> None:
    result = gradient_result(measure_gradients(subject("m", tiny_model()), windows((7,)), PLAN), **SETTINGS)
    assert result.loss.low is None
    assert result.families[0].norm[0].low is None


def test_parameters_that_take_no_part_have_a_norm_of_zero_and_a_ratio_of_one() -> None:
    model = tiny_model()
    model.unused = nn.Linear(3, 3)
    tally = measure_gradients(subject("m", model), windows(), PLAN)
    [unused] = [family for family in gradient_result(tally, **SETTINGS).families if family.family == "unused.weight"]
    assert unused.norm[0].value == 0
    ratios = {family.family: family.ratio for family in gradient_difference(tally, tally, **SETTINGS).families}
    assert ratios["unused.weight"][0].value == 1


def quantized_mark(model: nn.Module) -> None:
    model.is_quantized = True
    model.quantization_method = "bitsandbytes"


def packed_weight(model: nn.Module) -> None:
    packed = torch.zeros(48 * 16, 1, dtype=torch.uint8)
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(packed, requires_grad=False)


def inference_weight(model: nn.Module) -> None:
    with torch.inference_mode():
        model.lm_head.weight = nn.Parameter(torch.zeros(123, 32), requires_grad=False)


def offloaded_weight(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(torch.empty(123, 32, device="meta"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (quantized_mark, r"its weights are quantized \(bitsandbytes\)"),
        (packed_weight, "'model.layers.1.mlp.down_proj.weight' holds uint8, as quantized weights do"),
        (inference_weight, "'lm_head.weight' was made in inference mode"),
        (offloaded_weight, r"'lm_head.weight' is not in memory \(offloaded\)"),
    ],
)
def test_models_without_gradients_are_refused(spoil, reason: str) -> None:
    model = tiny_model()
    spoil(model)
    with pytest.raises(ValueError, match=f"^m cannot give gradients: {reason}; load it unquantized, whole, in float32"):
        measure_gradients(subject("m", model), windows(), PLAN)


def test_a_loss_that_autograd_does_not_see_is_refused() -> None:
    model = tiny_model()
    model.forward = torch.no_grad()(model.forward)
    for head in (None, model.lm_head):
        with pytest.raises(ValueError, match="its loss does not depend on its parameters in a way that autograd sees"):
            measure_gradients(subject("m", model), windows(), PLAN, head=head)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_loss_that_is_not_finite_is_refused_with_the_weight_to_blame(with_head: bool) -> None:
    model = tiny_model()
    head = model.lm_head if with_head else None
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    blame = (
        "the loss of window 0 of the gradients is nan; the first weight that is not is mlp.up_proj.weight of layer 1"
    )
    with pytest.raises(ValueError, match=f"^m: {blame}$"):
        measure_gradients(subject("m", model), windows(), PLAN, head=head)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_is_refused_with_its_family() -> None:
    """An identity whose backward pass divides by zero, between layer 1 and its down projection's weight."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 0

    model = tiny_model()
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: Broken.apply(out))
    with pytest.raises(ValueError, match=r"gradient of mlp\.down_proj\.weight of layer 1 is not finite in window 0"):
        measure_gradients(subject("m", model), windows(), PLAN)


def test_norm_of_half_precision_gradients() -> None:
    """The square of 300 is more than float16 holds."""
    for shape in ((7, 123), (123,), (3, 1, 7), ()):
        own = torch.full(shape, 300.0, dtype=torch.float16)
        assert gradient_norm(own) == pytest.approx(300 * math.sqrt(own.numel()), rel=1e-6)


def test_interval_of_the_loss_is_over_windows() -> None:
    many = windows((5, 9, 7, 3, 6, 8))
    tally = measure_gradients(subject("m", tiny_model()), many, GradientPlan(windows=6, tokens=20))
    found = gradient_result(tally, resamples=200, seed=5).loss
    assert found.low is not None
    assert found == Bootstrap(6, resamples=200, seed=5).estimate(np.array(tally.losses), np.ones(6))
