"""The signal of a model: against float64 NumPy, without a trace in the model, resumed as if never interrupted."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import families
import numpy as np
import pytest
import torch
from scipy import stats
from tiny_llama import changed, tiny_model
from torch import nn
from transformers import LlamaForCausalLM

from neuroweave.diagnose.bootstrap import Bootstrap
from neuroweave.diagnose.probes.signal import SignalTally, activity, signal_difference
from neuroweave.surgery import patch

WINDOWS = [(0, 31), (0, 7), (2, 3), (3, 23), (4, 19), (1, 2)]  # (unit, tokens); unit 1 has nothing but a first position
UNITS = 5
CLOSE = {"rel": 2e-6}  # the model runs in float32


def tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 123, (1, length), generator=torch.Generator().manual_seed(seed))


def run(
    tally: SignalTally, model: nn.Module, windows: Sequence[tuple[int, int]] = WINDOWS, first_seed: int = 0
) -> None:
    with torch.inference_mode(), tally.attached():
        for seed, (unit, length) in enumerate(windows, start=first_seed):
            model(input_ids=tokens(length, seed), use_cache=False)
            tally.add(unit)


def sparse_model(**settings: object) -> LlamaForCausalLM:
    """ReLU; in layer 1, neurons 5 and 40 never fire, 7 and 9 hardly do, 8 does a little more."""
    model = tiny_model(**{"hidden_act": "relu"} | settings)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[[5, 40]] = 0
        model.model.layers[1].mlp.up_proj.weight[[7, 8, 9]] *= torch.tensor([[1e-5], [5e-3], [5e-4]])
    return model


@dataclass
class Twin:
    """What NumPy makes of transformers' hidden states: [tokens, width] each, all but the last position."""

    inputs: list[np.ndarray]  # of each layer, and the last output
    middles: list[np.ndarray]  # after attention
    activations: list[np.ndarray]  # what the down projections get


def twin(model: LlamaForCausalLM, ids: torch.Tensor) -> Twin:
    attended: list[np.ndarray] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out: attended.append(out[0][0, :-1].double().numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        states = [state[0, :-1].double().numpy() for state in model(ids, output_hidden_states=True).hidden_states]
    for hook in hooks:
        hook.remove()
    inputs, middles, activations = states[:-1], [], []
    for layer, state, attention in zip(model.model.layers, inputs, attended, strict=True):
        weights = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
        middle = state + attention
        scale = np.sqrt((middle**2).mean(-1, keepdims=True) + model.config.rms_norm_eps)
        normed = middle / scale * weights["post_attention_layernorm.weight"]
        gate = normed @ weights["mlp.gate_proj.weight"].T
        gate = gate / (1 + np.exp(-gate)) if model.config.hidden_act == "silu" else np.maximum(gate, 0)
        middles.append(middle)
        activations.append(gate * (normed @ weights["mlp.up_proj.weight"].T))
    last = middles[-1] + activations[-1] @ weights["mlp.down_proj.weight"].T
    return Twin([*inputs, last], middles, activations)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_numbers_match_numpy(act: str) -> None:
    model = sparse_model(hidden_act=act)
    tally = SignalTally(model, units=UNITS)
    run(tally, model)
    result = tally.result(Bootstrap(UNITS, resamples=200))
    twins = [twin(model, tokens(length, seed)) for seed, (_, length) in enumerate(WINDOWS)]

    norms = ["input_layernorm", "post_attention_layernorm"]
    assert [(found.place, found.layer) for found in result.inputs] == [("layer input", at) for at in (0, 1, 2, None)]
    assert [(found.place, found.layer) for found in result.norms] == [
        *((name, layer) for layer in range(3) for name in norms),
        ("final norm", None),
    ]
    mixed = [part for layer in range(3) for part in (f"inputs {layer}", f"middles {layer}")]
    for found, path in zip(
        [*result.inputs, *result.norms], [*(f"inputs {at}" for at in range(4)), *mixed, "inputs 3"], strict=True
    ):
        kind, at = path.split()
        lengths = [np.linalg.norm(getattr(each, kind)[int(at)], axis=-1) for each in twins]
        rest = np.concatenate([each[1:] for each in lengths])
        assert found.mean.value == pytest.approx(rest.mean(), **CLOSE), path
        assert found.deviation == pytest.approx(rest.std(), rel=1e-5), path
        assert found.first == pytest.approx(np.mean([each[0] for each in lengths]), **CLOSE), path
        assert found.mean.low < found.mean.value < found.mean.high
    means = [found.mean.value for found in result.inputs]
    assert [each.value for each in result.growth] == pytest.approx(
        [after / before for before, after in itertools.pairwise(means)], rel=1e-14
    )
    for layer, found in enumerate(result.activations):
        rows = np.concatenate([each.activations[layer] for each in twins])
        limits = 0.01 * np.sqrt((rows**2).mean(-1, keepdims=True))
        largest = np.abs(rows).max(0)
        assert (found.layer, found.neurons) == (layer, 48)
        assert found.zero.value == pytest.approx((rows == 0).mean(), abs=1e-12)
        assert found.near_zero.value == pytest.approx((np.abs(rows) < limits).mean(), abs=1e-12)
        assert found.dead == (largest == 0).sum() == (2 if layer == 1 else 0)
        assert found.nearly_dead == (largest < 0.01 * np.sqrt((rows**2).mean())).sum()
        if layer == 1:
            assert 0.01 < largest[8] / np.sqrt((rows**2).mean()) < 0.1
            assert 0.001 < largest[9] / np.sqrt((rows**2).mean()) < 0.01
    assert (result.activations[0].zero.value > 0.3) == (act == "relu")
    assert tally.notes == []


def test_intervals_match_scipy() -> None:
    """Growth is a ratio of means over units; the draws differ, so the ends agree up to the noise of drawing."""
    model = tiny_model()
    windows = [(unit, 5 + unit % 7) for unit in range(40)]
    tally = SignalTally(model, units=40)
    run(tally, model, windows)
    found = tally.result(Bootstrap(40, resamples=20000)).growth[0]
    before, after = tally.sums["norm_sums"][:, 0], tally.sums["norm_sums"][:, 1]
    wanted = stats.bootstrap(
        (after, before),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    width = wanted.high - wanted.low
    assert width > 0
    assert [found.low, found.high] == pytest.approx([wanted.low, wanted.high], abs=0.04 * width)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi", "mixtral"])
def test_logits_are_bit_equal_and_no_hook_is_left(family: str) -> None:
    model = families.tiny_model(family)
    inputs = families.tiny_inputs(family, batch=1)
    tally = SignalTally(model, units=2)
    with torch.inference_mode():
        wanted = model(**inputs).logits
        for unit in range(2):
            with tally.attached():
                assert torch.equal(model(**inputs).logits, wanted)
            tally.add(unit)
    assert no_hooks(model)
    result = tally.result(Bootstrap(2))
    assert len(result.inputs) == 3
    assert len(result.activations) == (0 if family == "mixtral" else 2)
    assert [found.mean.value for found in result.inputs] == pytest.approx(
        [found.mean.low for found in result.inputs], rel=1e-14
    )


def no_hooks(model: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_hook_is_left_after_an_error() -> None:
    model = tiny_model()
    tally = SignalTally(model, units=1)
    with pytest.raises(IndexError), tally.attached():
        model(input_ids=torch.tensor([[1, 2, 500]]))
    assert no_hooks(model)


def test_a_model_against_itself_is_exactly_one_and_zero() -> None:
    model = sparse_model()
    tallies = [SignalTally(model, units=UNITS) for _ in range(2)]
    for tally in tallies:
        run(tally, model)
    difference = signal_difference(*tallies, Bootstrap(UNITS, resamples=200))
    for found, number, length in (
        (difference.input_ratio, 1, 4),
        (difference.zero, 0, 3),
        (difference.near_zero, 0, 3),
    ):
        assert [(each.value, each.low, each.high) for each in found] == [(number, number, number)] * length


def test_difference_is_paired_over_units() -> None:
    model = sparse_model()
    other = changed(model, 0.3)
    other.config.hidden_act = "relu"
    for layer in other.model.layers:
        layer.mlp.act_fn = nn.ReLU()
        layer.mlp.down_proj.weight.data *= 1.5
    base_tally, other_tally = SignalTally(model, units=UNITS), SignalTally(other, units=UNITS)
    run(base_tally, model)
    run(other_tally, other)
    bootstrap = Bootstrap(UNITS, resamples=500)
    difference = signal_difference(base_tally, other_tally, bootstrap)
    base, changed_signal = base_tally.result(bootstrap), other_tally.result(bootstrap)
    assert [each.value for each in difference.input_ratio] == pytest.approx(
        [b.mean.value / a.mean.value for a, b in zip(base.inputs, changed_signal.inputs, strict=True)], rel=1e-14
    )
    assert difference.input_ratio[0].low == difference.input_ratio[0].high == 1  # the embedding is the same
    for name in ("zero", "near_zero"):
        assert [each.value for each in getattr(difference, name)] == pytest.approx(
            [
                getattr(b, name).value - getattr(a, name).value
                for a, b in zip(base.activations, changed_signal.activations, strict=True)
            ],
            abs=1e-15,
        )
    counts = base_tally.sums["tokens"]
    draws = [bootstrap.means(tally.sums["norm_sums"][:, [3]], counts) for tally in (other_tally, base_tally)]
    low, high = np.percentile(draws[0] / draws[1], [2.5, 97.5])  # the same draws of units for both
    assert low < difference.input_ratio[3].value < high
    assert [difference.input_ratio[3].low, difference.input_ratio[3].high] == pytest.approx([low, high], rel=1e-12)


def test_other_layers_give_empty_lists() -> None:
    models = [tiny_model(), tiny_model(num_hidden_layers=2)]
    tallies = [SignalTally(model, units=UNITS) for model in models]
    for tally, model in zip(tallies, models, strict=True):
        run(tally, model)
    difference = signal_difference(*tallies, Bootstrap(UNITS))
    assert (difference.input_ratio, difference.zero, difference.near_zero) == ([], [], [])


def test_other_texts_are_refused() -> None:
    model = tiny_model()
    tallies = [SignalTally(model, units=2) for _ in range(2)]
    run(tallies[0], model, [(0, 7), (1, 5)])
    run(tallies[1], model, [(0, 7), (1, 6)])
    with pytest.raises(ValueError, match="of different texts; measure both models on the same windows"):
        signal_difference(*tallies, Bootstrap(2))


def test_an_interrupted_run_goes_on_to_an_equal_result() -> None:
    model = sparse_model()
    whole, begun, resumed = (SignalTally(model, units=UNITS) for _ in range(3))
    run(whole, model)
    run(begun, model, WINDOWS[:3])
    with torch.inference_mode(), begun.attached():  # a pass that was never added
        model(input_ids=tokens(9, 99))
    state = begun.arrays()
    run(begun, model, WINDOWS[:1])  # the state is a copy
    resumed.restore(state)
    run(resumed, model, WINDOWS[3:], first_seed=3)
    assert resumed.arrays().keys() == whole.arrays().keys()
    for name, values in whole.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], values)
    assert resumed.result(Bootstrap(UNITS)) == whole.result(Bootstrap(UNITS))


def test_the_state_of_another_model_is_refused() -> None:
    other = SignalTally(tiny_model(num_hidden_layers=2), units=3)
    with pytest.raises(ValueError, match=r"another model or text: 'norm_sums' is \(3, 8\), expected \(3, 11\)"):
        SignalTally(tiny_model(), units=3).restore(other.arrays())
    with pytest.raises(ValueError, match="'tokens' is nothing"):
        SignalTally(tiny_model(), units=3).restore({})


def test_windows_of_one_prediction_have_no_norms_but_activations() -> None:
    model = tiny_model()
    tally = SignalTally(model, units=2)
    run(tally, model, [(0, 2), (1, 2)])
    result = tally.result(Bootstrap(2))
    assert (result.inputs, result.growth, result.norms) == ([], [], [])
    assert [found.neurons for found in result.activations] == [48] * 3
    assert tally.notes == ["norms are left out: no window is longer than its first prediction"]
    difference = signal_difference(tally, tally, Bootstrap(2))
    assert difference.input_ratio == []
    assert [each.value for each in difference.zero] == [0] * 3


@pytest.mark.parametrize("shape", [(2, 5), (1, 1)])
def test_what_is_no_window_is_refused(shape: tuple[int, int]) -> None:
    model = tiny_model()
    tally = SignalTally(model, units=1)
    with torch.inference_mode(), tally.attached():
        model(input_ids=torch.ones(shape, dtype=torch.long))
    with pytest.raises(
        ValueError, match=f"got a batch of {shape[0]} with {shape[1]} tokens; run the windows one by one"
    ):
        tally.add(0)
    with pytest.raises(ValueError, match="got a batch of 0 with 0 tokens"):
        tally.add(0)


def test_a_module_called_twice_in_a_pass_is_left_out_with_a_note() -> None:
    model = tiny_model()
    model.model.layers[2].input_layernorm = model.model.layers[0].input_layernorm
    tally = SignalTally(model, units=UNITS)
    run(tally, model)
    result = tally.result(Bootstrap(UNITS))
    assert [(found.place, found.layer) for found in result.norms if "input" in found.place] == [("input_layernorm", 1)]
    assert len(result.inputs) == 4
    assert tally.notes == ["norms that did not come as one vector per token and pass are left out: input_layernorm"]


def test_half_precision_norms_do_not_overflow() -> None:
    """The square of 300 is more than float16 holds."""
    rows = torch.full((3, 123), 300.0, dtype=torch.float16)
    rows[0] = 0
    rows[1, :7] = 2.9
    seen = activity(rows)
    wanted = np.linalg.norm(rows.double().numpy(), axis=-1)
    assert seen.norms.dtype == torch.float32
    np.testing.assert_allclose(seen.norms.numpy(), wanted, rtol=1e-6)
    assert (int(seen.zeros), int(seen.near_zeros)) == (123, 123 + 7)  # a token of zeros counts as both
    np.testing.assert_array_equal(seen.largest.float().numpy(), np.full(123, 300.0))


def test_a_patched_model_is_measured_after_its_patch() -> None:
    model = tiny_model()
    patch(model, {"sites": [{"site": "mlp", "activation": "relu"}]})
    tally = SignalTally(model, units=UNITS)
    run(tally, model)
    assert all(found.zero.value > 0.3 for found in tally.result(Bootstrap(UNITS)).activations)


def test_a_tally_does_not_keep_its_model_in_memory() -> None:
    model = tiny_model()
    tally = SignalTally(model, units=1)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert [weight() for weight in weights if weight() is not None] == []
    with pytest.raises(ValueError, match="the model of this signal was let go"), tally.attached():
        pass
