"""The fused GLU: each kernel against its plain twin and float64, the same bits every time, nothing kept but its inputs,
and models that compute the same with it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runtime import needs_compiler
from tiny_llama import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import neuroweave
from neuroweave.activations import fused_glu_native
from neuroweave.activations.formulas import FORMULAS
from neuroweave.activations.fused_glu import fuse_glu, fused_glu, glu, plain_glu, plan_of
from neuroweave.activations.mixtures import NeuronMixture, build_activation
from neuroweave.native import build

MEMBERS = ["silu", "gelu", "relu", "tanh"]
MIXTURES: dict[str, Any] = {
    "fixed beta": {"swish_beta": {"beta": 1.7}},
    "even segments": {"segments": ["relu", "gelu", "silu"]},
    "mixture": {"mixture": {"members": MEMBERS, "neutral": 0, "start_logit": 0.5}},
    "hard": {"mixture": {"members": [*MEMBERS, "swish_beta"], "neutral": 0, "hard": True}},
    "each formula": {"segments": list(FORMULAS)},
    "every formula": {"mixture": {"members": list(FORMULAS), "neutral": 0, "start_logit": 0.5}},
}
KINDS: dict[str, Any] = {"silu": "silu"} | MIXTURES
CLOSE = 2e-6  # of the largest value; an exponential with one term less misses it by a factor of 10


def compiler() -> None:
    try:
        build.find_compiler()
    except build.NativeUnavailableError as error:
        pytest.skip(str(error))


def made(spec: Any, n: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    activation = build_activation(spec, neurons=n).to(dtype)
    for parameter in activation.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return activation


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """gate, up and the gradient of the result; gate goes where exponentials overflow."""
    torch.manual_seed(sum(shape))
    gate, up, dout = (torch.randn(shape, dtype=dtype) for _ in range(3))
    return [(2.5 * gate).requires_grad_(), up.requires_grad_(), dout]


def results(function: Any, gate: Tensor, up: Tensor, dout: Tensor, activation: nn.Module) -> list[Tensor]:
    """The output, and the gradients of gate, up and what the activation learned."""
    y = function(gate, up, activation)
    return [y, *torch.autograd.grad(y, (gate, up, *activation.parameters()), dout)]


def in_float64(gate: Tensor, up: Tensor, dout: Tensor, activation: nn.Module) -> list[Tensor]:
    wide = [each.detach().double().requires_grad_(each.requires_grad) for each in (gate, up, dout)]
    return results(plain_glu, *wide, copy.deepcopy(activation).double())


def assert_close(found: list[Tensor], wanted: list[Tensor], limit: float = CLOSE) -> None:
    assert len(found) == len(wanted)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, number
        if b.numel():
            error = float((a.double() - b.double()).detach().abs().max())
            assert error <= limit * (1e-3 + float(b.detach().abs().max())), (number, error)


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ----------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_against_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler()
    for twin in ("twin_forward", "twin_backward"):
        monkeypatch.delattr(f"neuroweave.activations.fused_glu.{twin}")
    for n in (7, 123):
        activation = made(KINDS[kind], n)
        given = inputs(5, n)
        assert_close(results(fused_glu, *given, activation), in_float64(*given, activation))


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_twin_against_autograd(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROWEAVE_NATIVE", "0")
    activation = made(KINDS[kind], 3, dtype)
    given = inputs(2, 2, 3, dtype=dtype)
    found, wanted = results(fused_glu, *given, activation), results(plain_glu, *given, activation)
    assert torch.equal(found[0], wanted[0]) or "mixture" in KINDS[kind]  # whose softmax is written out
    assert_close(found, wanted, {torch.float64: 1e-14, torch.float32: CLOSE}.get(dtype, 2e-2))
    if dtype == torch.float64 and kind != "hard":  # its gradient is that of another function
        parameters = tuple(activation.parameters())
        assert torch.autograd.gradcheck(lambda g, u, *_: fused_glu(g, u, activation), (*given[:2], *parameters))


@pytest.mark.parametrize("n", [1, 7, 16, 123, 1100])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 3), (300,)])
def test_shapes(rows: tuple[int, ...], n: int) -> None:
    activation = made(MIXTURES["hard"], n)
    given = inputs(*rows, n)
    assert_close(results(fused_glu, *given, activation), in_float64(*given, activation), 1e-5)


def test_uneven_segments_and_one_without_neurons() -> None:
    compiler()
    spec = {"segments": {"members": ["relu", "tanh", "identity"], "sizes": [1, 17, 5]}}
    given = inputs(4, 23)
    assert_close(results(fused_glu, *given, made(spec, 23)), in_float64(*given, made(spec, 23)))
    few = inputs(4, 2)
    even = made(MIXTURES["even segments"], 2)
    assert_close(results(fused_glu, *few, even), in_float64(*few, even))


def test_views_are_read_where_they_lie() -> None:
    activation = made(MIXTURES["mixture"], 33)
    both = torch.randn(5, 66, requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    for given in ([gate, up], [gate.T.contiguous().T, up], [gate[::2], up[::2]], [gate[:, None], up[:, None]]):
        for dout in (torch.ones(1).expand(given[0].shape), torch.randn(given[0].shape)):
            wanted = torch.autograd.grad(plain_glu(*given, activation), both, dout, retain_graph=True)
            found = torch.autograd.grad(fused_glu(*given, activation), both, dout, retain_graph=True)
            assert_close(list(found), list(wanted))


@pytest.mark.parametrize("kind", ["silu", "each formula", "mixture"])
def test_nan_and_infinity_stay_where_they_are(kind: str) -> None:
    activation = made(KINDS[kind], 64)
    gate, up, dout = (each.detach() for each in inputs(6, 64))
    clean = fused_glu(gate, up, activation)
    gate[1, 3], gate[2, 5], gate[3, 7], up[4, 9] = torch.nan, torch.inf, -torch.inf, torch.nan
    touched = torch.zeros(6, 64, dtype=torch.bool)
    for place in ((1, 3), (2, 5), (3, 7), (4, 9)):
        touched[place] = True
    given = [gate.requires_grad_(), up.requires_grad_(), dout]
    y, dgate, dup, *_ = results(fused_glu, *given, activation)
    for each in (y, dgate, dup):
        assert each[~touched].isfinite().all()
    assert torch.equal(y[~touched], clean[~touched])
    assert y[1, 3].isnan()
    assert y[4, 9].isnan()


def test_large_results_go_past_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    activation = made(MIXTURES["hard"], 64)
    given = inputs(9, 64)
    wanted = results(fused_glu, *given, activation)
    monkeypatch.setattr(fused_glu_native, "STREAMED", 0)
    assert fused_glu_native.streaming([given[0]], [], 64) == (given[0].data_ptr() % 64 == 0)
    assert_equal(results(fused_glu, *given, activation), wanted)


def test_the_same_bits_whoever_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    activation = made(MIXTURES["every formula"], 4097)
    given = inputs(700, 4097)
    before = torch.get_num_threads()
    wanted = results(fused_glu, *given, activation)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_equal(results(fused_glu, *given, activation), wanted)
        monkeypatch.setattr(fused_glu_native, "thread_team", lambda: None)
        assert_equal(results(fused_glu, *given, activation), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["silu", *MIXTURES])
def test_nothing_is_kept_but_gate_and_up(kind: str) -> None:
    R, n = 200, 64
    activation = made(KINDS[kind], n)
    gate, up, _ = inputs(R, n)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_glu(gate, up, activation)
    large = {each.data_ptr() for each in kept if each.numel() >= R * n}
    assert large == {gate.data_ptr(), up.data_ptr()}
    learned = sum(each.numel() for each in activation.parameters())
    small = {each.data_ptr(): each.numel() for each in kept if each.numel() < R * n}
    assert sum(small.values()) <= 8 * learned


def test_refusals() -> None:
    with pytest.raises(ValueError, match="they must be alike"):
        fused_glu(torch.ones(2, 3), torch.ones(2, 4), made("silu", 3))
    with pytest.raises(ValueError, match="a mixture of 7 neurons stands where 3 are"):
        fused_glu(torch.ones(2, 3), torch.ones(2, 3), made(MIXTURES["mixture"], 7))
    with pytest.raises(ValueError, match="Softplus is no activation that is known here"):
        fused_glu(torch.ones(2, 3), torch.ones(2, 3), nn.Softplus())


def test_operation_keeps_its_promises_to_torch() -> None:
    activation = made(MIXTURES["hard"], 7)
    gate, up, _ = inputs(3, 7)
    weights = torch.softmax(torch.randn(5, 7), 0).requires_grad_()
    beta = torch.rand(7, requires_grad=True)
    torch.library.opcheck(glu, (gate, up, [weights], [beta], plan_of(activation, 7)))


# ------------------------------------------------------------------------------------------------------------ Triton

TRITON = """
import torch
from neuroweave.activations import fused_glu_triton
from neuroweave.activations.fused_glu import mixtures_of, plan_of, segments_of, twin_backward, twin_forward
from neuroweave.activations.mixtures import build_activation

def flat(made):
    return [x for each in made for x in (each if isinstance(each, list) else [each]) if x is not None]

fused_glu_triton.ROWS_OF_A_SUM = 8
for spec, n, rows, dtype in CASES:
    torch.manual_seed(0)
    activation = build_activation(spec, neurons=n)
    for parameter in activation.parameters():
        torch.nn.init.normal_(parameter)
    gate, up, dout = (2 * torch.randn(*rows, n).to(dtype) for _ in range(3))
    learned = list(mixtures_of(activation))
    weights = [each.weights().detach().T.contiguous() for each in learned]
    beta = [each.beta.detach() for each in learned if each.beta is not None]
    plan = plan_of(activation, n)
    segments = segments_of(plan, weights, beta)
    wide = segments_of(plan, [each.double() for each in weights], [each.double() for each in beta])
    found = [fused_glu_triton.forward(gate, up, segments), *fused_glu_triton.backward(dout, gate, up, segments)]
    d, g, u = dout.double(), gate.double(), up.double()
    wanted = [twin_forward(g, u, wide), *twin_backward(d, g, u, wide)]
    limit = 2e-6 if dtype == torch.float32 else 8e-3
    for number, (a, b) in enumerate(zip(flat(found), flat(wanted), strict=True)):
        assert a.shape == b.shape
        error, size = float((a.double() - b).abs().max()), float(b.abs().max())
        assert error <= limit * (1e-3 + size), (spec, dtype, number, error, size)
print("all close")
"""
CASES = """[
    (EVERY, 7, (3,), torch.float32), (HARD, 123, (2, 11), torch.bfloat16), (EACH, 300, (5,), torch.float32),
    (EVERY, 1, (1,), torch.float16),
]"""


def test_triton_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    cases = CASES
    for name, kind in (("EVERY", "every formula"), ("HARD", "hard"), ("EACH", "each formula")):
        cases = cases.replace(name, repr(MIXTURES[kind]))
    assert run_python(TRITON.replace("CASES", cases), TRITON_INTERPRET="1") == "all close"


def test_triton_kernels_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from neuroweave.activations import fused_glu_triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel = ((*((name, None) for name in MEMBERS), ("swish_beta", "beta")), True)
    for name, sizes in (("forward", {}), ("backward", {"COUNT": fused_glu_triton.ROWS_OF_A_SUM})):
        function = fused_glu_triton.compiled(kernel)[name]
        sizes |= {"ROWS": fused_glu_triton.ROWS, "COLUMNS": fused_glu_triton.COLUMNS}
        kinds = {"weights": "*fp32", "beta_values": "*fp32", "partial": "*fp32"}
        kinds |= dict.fromkeys(("gate", "up", "out", "dout", "dgate", "dup"), "*bf16") | dict.fromkeys(
            sizes, "constexpr"
        )
        signature = {argument: kinds.get(argument, "i32") for argument in function.arg_names}
        source = ASTSource(fn=function, signature=signature, constexprs=sizes)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


# ------------------------------------------------------------------------------------------------------------ models


def patched(recipe: Any) -> Any:
    """A tiny Llama with a shipped recipe, or one of `MIXTURES` in each MLP."""
    model: Any = tiny_model()
    if recipe in MIXTURES:
        for layer in model.model.layers:
            layer.mlp.act_fn = made(MIXTURES[recipe], 48)
    elif recipe:
        neuroweave.patch(model, recipe)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, NeuronMixture):
            nn.init.normal_(module.gating_logits)
    return model


IDS = torch.arange(3, 37).reshape(2, 17)


def logits_and_gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    found = model(IDS, labels=IDS)
    found.loss.backward()
    return [found.logits, *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


@pytest.mark.parametrize(
    "recipe", [None, "silu-tanh-mlp", "phantom-everywhere", "automixed-relu-gelu-silu", "learned-mixture", *MIXTURES]
)
def test_models_are_the_same_fused(recipe: Any) -> None:
    model = patched(recipe)
    keys, wanted = list(model.state_dict()), logits_and_gradients(model)
    undo = fuse_glu(model)
    assert undo.fused == [f"model.layers.{number}.mlp" for number in range(3)]
    assert undo.left == {}
    found = logits_and_gradients(model)
    assert_close(found, wanted, 1e-4)
    assert list(model.state_dict()) == keys
    undo()
    assert_equal(logits_and_gradients(model), wanted)
    assert type(model.model.layers[0].mlp) is LlamaMLP


def test_fused_operation_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("learned-mixture")
    fuse_glu(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(IDS)
    assert sum(each.count for each in profile.key_averages() if each.key == "neuroweave::glu") == 3
    monkeypatch.setenv("NEUROWEAVE_FUSED", "0")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(IDS)
    assert not any(each.key == "neuroweave::glu" for each in profile.key_averages())
    assert fuse_glu(patched(None)).left["model.layers.0.mlp"] == "NEUROWEAVE_FUSED is 0"


def test_fused_models_are_copied_saved_and_checkpointed(tmp_path: Path) -> None:
    model = patched("learned-mixture")
    wanted = logits_and_gradients(model)
    fuse_glu(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = other.model.layers[1].mlp
        assert mlp.fused_plan[0] is mlp.act_fn
        assert mlp.act_fn is not model.model.layers[1].mlp.act_fn
        assert_close(logits_and_gradients(other), wanted, 1e-4)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.model.layers[0].mlp, "fused_plan")
    assert_close(logits_and_gradients(plain), wanted, 1e-6)
    model.train()
    model.gradient_checkpointing_enable()
    assert_close(logits_and_gradients(model), wanted, 1e-4)


COMPILED = """
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from neuroweave.activations.fused_glu import fuse_glu
from neuroweave.activations.mixtures import build_activation
torch.manual_seed(0)
mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24))
mlp.act_fn = build_activation(SPEC, neurons=24)
torch.nn.init.normal_(mlp.act_fn.gating_logits)
x = torch.randn(5, 32)
wanted = [mlp(x), *torch.autograd.grad(mlp(x).sum(), mlp.parameters())]
fuse_glu(mlp)
compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
found = [compiled(x), *torch.autograd.grad(compiled(x).sum(), mlp.parameters())]
assert type(mlp.fused_plan) is tuple
for a, b in zip(found, wanted, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print("equal")
"""


def test_fused_mlp_compiles_in_one_graph() -> None:
    """In a process of its own: torch.compile cannot see through the shape checks that tests run under."""
    assert run_python(COMPILED.replace("SPEC", repr(MIXTURES["hard"]))) == "equal"


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


class Clamped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))


class Lying(nn.SiLU):
    """Says that it is SiLU, and computes something else."""

    name = "silu"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


def test_other_mlps_are_left_alone() -> None:
    model: Any = tiny_model(num_hidden_layers=5)
    layers = model.model.layers
    layers[0].mlp.__class__ = Clamped
    layers[1].mlp.forward = layers[1].mlp.forward
    layers[2].mlp.act_fn = nn.Softplus()
    layers[3].mlp.act_fn = Lying()
    done = fuse_glu(model)
    assert done.fused == ["model.layers.4.mlp"]
    reasons = [done.left[f"model.layers.{number}.mlp"] for number in range(4)]
    assert "Clamped" in reasons[0]
    assert reasons[1:] == [
        "its forward was wrapped",
        "Softplus is no activation that is known here",
        "the fused form gave another output",
    ]
    assert type(layers[3].mlp) is LlamaMLP
    assert fuse_glu(model).left["model.layers.4.mlp"] == "it is fused already"


def test_who_watches_an_activation_sees_it() -> None:
    model: Any = patched(None)
    fuse_glu(model)
    seen: list[Tensor] = []
    hook = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: seen.append(out))
    model(IDS)
    hook.remove()
    model(IDS)
    assert len(seen) == 1
