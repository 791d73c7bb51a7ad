"""Sparse MLPs on GPUs: kernels against float64, rows of dead neurons unread, and models that equal the pruned ones."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench_cli import folder  # noqa: F401
from test_fused_glu import MEMBERS, MIXTURES, Clamped, Lying, made, run_python
from test_sparsity import pruned
from tiny_llama import tiny_model
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaMLP

from neuroweave.activations.fused_glu import fuse_glu, plan_of, read_plan
from neuroweave.activations.mixtures import SegmentMixture
from neuroweave.runtime import fast_writing, sparse_glu_triton
from neuroweave.runtime.engine import Engine
from neuroweave.runtime.fast_writing import FastWriter, skipped_neurons
from neuroweave.runtime.lowering import lower
from neuroweave.runtime.sparse_glu_triton import kernels_agree, sparse_glu, twin
from neuroweave.runtime.sparse_mlps import sparsify
from neuroweave.runtime.sparsity import find_thresholds

IDS = torch.arange(3, 14)
WINDOWS = [(each * IDS % 120 + 3).tolist() for each in (3, 7)]
CLOSE = 2e-5  # of the largest logit; a threshold of another neuron misses it by a factor of 1,000

# ----------------------------------------------------------------------------------------------------------- kernels

TRITON = """
import torch
from triton.runtime.interpreter import InterpreterBuilder
from neuroweave.activations.fused_glu import member_sum, member_weights, mixtures_of, plan_of, segments_of
from neuroweave.activations.mixtures import build_activation
from neuroweave.runtime import sparse_glu_triton as sparse

def prepared(spec, n, C, D, dtype):
    torch.manual_seed(n)
    activation = build_activation(spec, neurons=n)
    for parameter in activation.parameters():
        torch.nn.init.normal_(parameter)
    learned = list(mixtures_of(activation))
    weights = [member_weights(each, torch.float32).detach() for each in learned]
    beta = [each.beta.detach() for each in learned if each.beta is not None]
    plan = plan_of(activation, n)
    segments = segments_of(plan, weights, beta)
    wide = segments_of(plan, [each.double() for each in weights], [each.double() for each in beta])
    given = torch.randn(1, 1, C), 3 * torch.randn(n, C) / C**0.5, torch.randn(n, C), torch.randn(n, D).T
    return [each.to(dtype) for each in given], segments, wide

def acted(given, wide):
    made = given[0].double()[0, 0] @ given[1].double().T
    return torch.cat([member_sum(made[each.start : each.stop], each) for each in wide])

def check(given, wide, least, found, dtype, what):
    wanted = sparse.twin(*(each.double() for each in given), least.double(), wide)
    assert found.shape == wanted.shape and found.dtype == dtype
    limit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    error, size = float((found.double() - wanted).abs().max()), float(wanted.abs().max())
    assert error <= limit * (1e-3 + size), (what, error, size)

places = set()
load = InterpreterBuilder.create_masked_load

def watched(builder, pointers, mask, *rest):
    places.update(pointers.data[mask.data].tolist())
    return load(builder, pointers, mask, *rest)

InterpreterBuilder.create_masked_load = watched

def rows_read(given, least, segments):
    # Of gate, up and down by neuron; each row is read whole or not at all.
    places.clear()
    sparse.run_kernels(*given, least, segments)
    for each in (*given, least):
        first = each.data_ptr()
        assert not places & {first - each.element_size(), first + each.numel() * each.element_size()}
    found = []
    for each in (given[1], given[2], given[3].T):
        (n, width), size = each.shape, each.element_size()
        rows = [{each.data_ptr() + size * (row * width + at) for at in range(width)} for row in range(n)]
        assert all(row <= places or not row & places for row in rows)
        found.append({number for number, row in enumerate(rows) if row <= places})
    return found

# Tiles of the sizes that run, and small ones, so that each loop runs more than once.
as_they_are = sparse.ROWS, sparse.TILES, sparse.NEURONS, sparse.WIDE, sparse.SPLITS, sparse.NARROW
for tiles, cases in ((as_they_are, FEW), ((8, (32, 16), 16, 16, 4, 16), CASES)):
    sparse.ROWS, sparse.TILES, sparse.NEURONS, sparse.WIDE, sparse.SPLITS, sparse.NARROW = tiles
    for spec, n, C, D, dtype in cases:
        given, segments, wide = prepared(spec, n, C, D, dtype)
        what = (tiles, spec, n, C, D, dtype)
        size = acted(given, wide).abs()
        # Just above or below what each neuron acts to, and so far off that rounding decides nothing.
        least = (size + (1e-3 * size + 1e-6) * torch.where(torch.arange(n) % 3 == 0, -1, 1)).float()
        dead = size <= least.double()
        assert n == 1 or 0 < dead.sum() < n
        found = sparse.run_kernels(*given, least, segments)
        check(given, wide, least, found, dtype, what)
        adds = ~dead & (size > 0)
        numbers = [set(range(n)), *(set(each.nonzero().flatten().tolist()) for each in (~dead, adds))]
        assert rows_read(given, least, segments) == numbers, what
        everyone = sparse.run_kernels(*given, torch.full_like(least, -1), segments)
        check(given, wide, torch.full_like(least, -1), everyone, dtype, what)
        assert torch.equal(sparse.run_kernels(*given, torch.full_like(least, torch.inf), segments), 0 * found)
        assert sparse.run_kernels(given[0] * torch.nan, *given[1:], least, segments).isnan().all()

    # A threshold that is what a neuron acts to, exactly: it is skipped; one step below it lives.
    _, segments, wide = prepared("identity", 41, 23, 9, torch.float32)
    given = [torch.randint(-3, 4, shape).float() for shape in ((1, 23), (41, 23), (41, 23), (9, 41))]
    equal = (given[0] @ given[1].T)[0].abs()
    assert torch.equal(sparse.run_kernels(*given, equal, segments), torch.zeros(1, 9))
    assert torch.equal(sparse.twin(*given, equal, segments), torch.zeros(1, 9))
    endless = [torch.full((1, 23), torch.inf), given[1].abs() + 1, *given[2:], torch.full((41,), torch.inf)]
    assert torch.equal(sparse.run_kernels(*endless, segments), torch.zeros(1, 9))
    below = torch.nextafter(equal, torch.tensor(-1.0))
    assert torch.equal(sparse.run_kernels(*given, below, segments), sparse.twin(*given, 0 * equal, segments))

    # Read where they lie: other strides of each tensor.
    given, segments, wide = prepared(SEGMENTS, 29, 33, 19, torch.float32)
    least = (0.3 * torch.rand(58))[::2]
    spread = torch.zeros(1, 66)
    spread[:, ::2] = given[0][0]
    views = [spread[:, ::2], given[1].T.contiguous().T, torch.cat([given[2]] * 2, 1)[:, :33], given[3].contiguous()]
    found = sparse.run_kernels(*views, least, segments)
    assert torch.equal(found, sparse.run_kernels(*given, least, segments)[0])
    check(given, wide, least, found[None], torch.float32, "views")
print("all close")
"""
CASES = """[
    ("silu", 1, 1, 1, torch.float32), ("gelu", 7, 123, 7, torch.bfloat16), ("relu", 123, 7, 123, torch.float16),
    (EVERY, 24, 33, 17, torch.float32), (HARD, 40, 16, 64, torch.bfloat16), (EACH, 33, 32, 5, torch.float32),
]"""
FEW = """[("silu", 1, 1, 1, torch.float32), (HARD, 7, 123, 7, torch.bfloat16)]"""


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = TRITON.replace("CASES", CASES).replace("FEW", FEW)
    for name, kind in (("EVERY", "every formula"), ("HARD", "hard"), ("EACH", "each formula")):
        code = code.replace(name, repr(MIXTURES[kind]))
    code = code.replace("SEGMENTS", repr(MIXTURES["even segments"]))
    assert run_python(code, TRITON_INTERPRET="1") == "all close"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Every load is masked, weights are read 16 bytes at a time, and nothing is added atomically."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    C = 4096
    _, count = sparse_glu_triton.splits_for(14336)
    kernel = ((*((name, None) for name in MEMBERS), ("swish_beta", "beta")), True)
    sizes: dict[str, dict[str, int]] = {
        "hidden": {"C": C, "ROWS": 1, "COLUMNS": sparse_glu_triton.columns_for(C), "gate_stride": 1, "up_stride": 1},
        "part": {
            "COUNT": count,
            "NEURONS": sparse_glu_triton.NEURONS,
            "WIDE": sparse_glu_triton.WIDE,
            "down_stride": 1,
        },
        "total": {"SPLITS": sparse_glu_triton.SPLITS, "NARROW": sparse_glu_triton.NARROW},
    }
    for name, fixed in sizes.items():
        source = sparse_glu_triton.triton_source(kernel) if name == "hidden" else sparse_glu_triton.SUMS
        function = sparse_glu_triton.compiled(source)[name]
        kinds = dict.fromkeys(("thresholds", "weights", "beta_values", "parts", "hidden"), "*fp32")
        kinds |= dict.fromkeys(("x_row", "gate", "up", "down", "out"), f"*{dtype}")
        kinds |= ({"out": "*fp32"} if name == "hidden" else {}) | dict.fromkeys(fixed, "constexpr")
        signature = {argument: kinds.get(argument, "i32") for argument in function.arg_names}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, argument in enumerate(function.arg_names)
            if argument not in fixed and argument != "S"
        }
        source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"]
        loads = [line.strip() for line in made.asm["ptx"].splitlines() if "ld.global" in line]
        assert loads
        assert all(line.startswith("@%p") for line in loads)
        assert sum("ld.global.v4.b32" in line for line in loads) >= 8
        assert not any(word in made.asm["ptx"] for word in ("atom.", "red.global"))


def test_tiles() -> None:
    assert [sparse_glu_triton.columns_for(C) for C in (4096, 8192, 5120, 3584, 2048, 576, 1)] == [
        4096, 4096, 1024, 4096, 2048, 1024, 1024,
    ]  # fmt: skip
    for n in (1, 64, 65, 1536, 14336, 53249):
        S, count = sparse_glu_triton.splits_for(n)
        assert (S - 1) * count < n <= S * count
        assert S <= sparse_glu_triton.SPLITS
        assert count % sparse_glu_triton.NEURONS == 0


def test_kernels_that_are_wrong_or_fail_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, cpu = plan_of(made(MIXTURES["hard"], 24), 24), torch.device("cpu")
    kernels_agree.cache_clear()
    with pytest.warns(UserWarning, match="not used on cpu: there are none of torch.float64|none of torch.float64"):
        assert not kernels_agree(plan, torch.float64, cpu)

    def off_by(factor: float) -> Any:
        return lambda *inputs: factor * twin(*inputs)

    for dtype, wrong in ((torch.float32, 1.001), (torch.bfloat16, 1.1)):
        kernels_agree.cache_clear()
        monkeypatch.setattr(sparse_glu_triton, "run_kernels", off_by(1.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels_agree(plan, dtype, cpu)
        kernels_agree.cache_clear()
        monkeypatch.setattr(sparse_glu_triton, "run_kernels", off_by(wrong))
        with pytest.warns(UserWarning, match="of the largest value off"):
            assert not kernels_agree(plan, dtype, cpu)
    kernels_agree.cache_clear()


def operands(spec: Any, n: int = 7) -> tuple[Any, ...]:
    plan, (x, gate, up, down) = plan_of(made(spec, n), n), (torch.randn(*s) for s in ((1, 5), (n, 5), (n, 5), (3, n)))
    weights = [torch.rand(len(each.members), n) for each, w, _ in read_plan(plan) if w >= 0]
    beta = [torch.rand(n) for _, _, b in read_plan(plan) if b >= 0]
    return x, gate, up, down, torch.rand(n) / 2, weights, beta, plan


@pytest.mark.parametrize("kind", ["even segments", "hard"])
def test_operation_keeps_its_promises_to_torch(kind: str) -> None:
    given = operands(MIXTURES[kind])
    torch.library.opcheck(sparse_glu, given)
    torch.library.opcheck(
        sparse_glu, (torch.randn(2, 3, 5).bfloat16(), *(t.bfloat16() for t in given[1:4]), *given[4:])
    )
    graph = make_fx(lambda *tensors: sparse_glu(*tensors, *given[5:]), tracing_mode="real")(*given[:5])
    assert [each.target for each in graph.graph.nodes if each.op == "call_function"] == [
        torch.ops.neuroweave.sparse_glu.default
    ]
    assert torch.equal(graph(*given[:5]), sparse_glu(*given))


# ------------------------------------------------------------------------------------------------------------ models


def model_with(spec: Any, **settings: Any) -> Any:
    model: Any = tiny_model(**settings)
    for layer in model.model.layers:
        layer.mlp.act_fn = two_mixtures() if spec == "two mixtures" else made(spec, 48)
    return model


def two_mixtures() -> nn.Module:
    """Each with a beta of its own."""
    return SegmentMixture([made(MIXTURES["hard"], size) for size in (20, 28)], sizes=[20, 28])


@torch.no_grad()
def decoded(model: Any, prompt: int = 4) -> Tensor:
    """Logits after a prompt and after each token that follows, one at a time."""
    state = model(IDS[None, :prompt], use_cache=True)
    found = [state.logits[0, -1]]
    for token in IDS[prompt:]:
        state = model(token[None, None], past_key_values=state.past_key_values, use_cache=True)
        found.append(state.logits[0, -1])
    return torch.stack(found)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE * float(wanted.abs().max()))


def operations(function: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(each.count for each in profile.key_averages() if each.key == "neuroweave::sparse_glu")


@pytest.mark.parametrize("kind", ["silu", "even segments", "mixture", "two mixtures"])
def test_sparse_model_is_the_pruned_model(kind: str) -> None:
    model = model_with(MIXTURES.get(kind, kind))
    found = find_thresholds(model, WINDOWS, 0.6)
    whole, wanted = decoded(model), decoded(pruned(copy.deepcopy(model), found.thresholds))
    done = sparsify(model, found.thresholds)
    assert (done.sparse, done.left) == ([0, 1, 2], {})
    assert float((whole - wanted).abs().max()) > 0.03 * float(whole.abs().max())
    assert_close(decoded(model), wanted)
    assert operations(lambda: decoded(model)) == 3 * (len(IDS) - 4)
    assert_close(model(IDS[None]).logits[0, 3:].detach(), wanted)  # all at once, and while gradients are recorded


def test_exact_zeros_cost_nothing() -> None:
    model = model_with("relu")
    wanted = decoded(model)
    found = find_thresholds(model, WINDOWS, 0.0)
    engine = Engine(lower(model, thresholds=found.thresholds), positions=32)
    runtime = [engine.read_prompt(IDS[:4].tolist()).clone()] + [engine.step(int(token)).clone() for token in IDS[4:]]
    sparsify(model, found.thresholds)
    assert_close(decoded(model), wanted)
    assert_close(decoded(model), torch.stack(runtime))


def test_undone_it_is_as_it_was() -> None:
    model = model_with(MIXTURES["hard"])
    keys, wanted = list(model.state_dict()), decoded(model)
    undo = sparsify(model, {0: torch.full((48,), 0.1), 2: torch.full((48,), 0.1)})
    assert type(model.model.layers[1].mlp) is LlamaMLP
    assert not torch.equal(decoded(model), wanted)
    cut = model.model.layers[0].mlp.neuron_thresholds.cut
    assert torch.equal(cut(torch.tensor([0.1, -0.1] * 24)), torch.zeros(48))
    assert cut(torch.full((48,), torch.nan)).isnan().all()
    undo()
    undo()
    assert torch.equal(decoded(model), wanted)
    assert list(model.state_dict()) == keys
    for layer in model.model.layers:
        assert type(layer.mlp) is LlamaMLP
        assert layer.mlp.down_proj.weight.is_contiguous()
        assert not hasattr(layer.mlp, "neuron_thresholds")


def test_weights_lie_once_and_by_neuron() -> None:
    def held(model: Any) -> int:
        tensors = [*model.parameters(), *model.buffers()]
        return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())

    model = model_with("silu")
    before = held(model)
    sparsify(model, dict.fromkeys(range(3), torch.zeros(48)))
    assert held(model) == before + 3 * 48 * 4
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.mlp.down_proj.weight.T.is_contiguous() for layer in each.model.layers)


def test_sparse_models_are_copied_and_saved(tmp_path: Path) -> None:
    model = model_with("silu")
    model.save_pretrained(tmp_path / "dense")
    original = copy.deepcopy(model)
    sparsify(model, find_thresholds(model, WINDOWS, 0.5).thresholds)
    wanted = decoded(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(decoded(other), wanted)
        assert operations(lambda other=other: decoded(other)) == 3 * (len(IDS) - 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, original.state_dict()[name])
    model.save_pretrained(tmp_path / "sparse")
    assert (tmp_path / "sparse/model.safetensors").read_bytes() == (tmp_path / "dense/model.safetensors").read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(decoded(plain), decoded(original))
    model.load_state_dict(original.state_dict())
    assert torch.equal(decoded(model), wanted)


def test_low_precision() -> None:
    model = model_with(MIXTURES["mixture"]).bfloat16()
    thresholds = find_thresholds(model, WINDOWS, 0.4).thresholds
    wanted = decoded(pruned(copy.deepcopy(model), thresholds)).float()
    assert sparsify(model, thresholds).left == {}
    found = decoded(model)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.03


def test_who_watches_a_layer_sees_it_and_a_new_activation_runs() -> None:
    model = model_with("silu")
    thresholds = find_thresholds(model, WINDOWS, 0.5).thresholds
    sparsify(model, thresholds)
    wanted = decoded(model)
    for name in ("act_fn", "down_proj"):
        seen: list[Tensor] = []
        watched = getattr(model.model.layers[1].mlp, name)
        hook = watched.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        assert_close(decoded(model), wanted)
        hook.remove()
        decoded(model)
        assert len(seen) == 1 + len(IDS) - 4
    other = tiny_model()
    for layer, changed in zip(model.model.layers, other.model.layers, strict=True):
        layer.mlp.act_fn, changed.mlp.act_fn = made("tanh", 48), made("tanh", 48)
    assert_close(decoded(model), decoded(pruned(other, thresholds)))


def test_gradients_are_those_of_the_pruned_model() -> None:
    model = model_with("silu")
    thresholds = find_thresholds(model, WINDOWS, 0.5).thresholds
    other = pruned(copy.deepcopy(model), thresholds)
    sparsify(model, thresholds)
    one = IDS[None, :1]
    for each in (model, other):
        each(one, labels=one, shift_labels=one).loss.backward()
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


def test_other_mlps_are_left_alone() -> None:
    model: Any = tiny_model(num_hidden_layers=10)
    layers = model.model.layers
    layers[0].mlp.__class__ = Clamped
    layers[1].mlp.forward = layers[1].mlp.forward
    layers[2].mlp.act_fn = nn.Softplus()
    layers[3].mlp.act_fn = Lying()
    layers[4].mlp.up_proj = nn.Linear(32, 48)
    layers[5].mlp.down_proj.register_forward_hook(lambda module, args, out: 2 * out)
    layers[6].mlp = nn.Identity()
    layers[7].mlp.up_proj.double()
    layers[8].mlp.gate_proj.forward = layers[8].mlp.gate_proj.forward
    done = sparsify(model, dict.fromkeys(range(10), torch.zeros(48)))
    assert done.sparse == [9]
    assert "Clamped" in done.left[0]
    assert [done.left[number] for number in range(1, 9)] == [
        "its forward was wrapped",
        "Softplus is no activation that is known here",
        "the sparse form gave another output",
        "up_proj is no plain linear layer without bias",
        "down_proj is no plain linear layer without bias",
        "it has no gate, up and down projection",
        "its weights are of several dtypes or devices",
        "gate_proj is no plain linear layer without bias",
    ]
    assert type(layers[3].mlp) is LlamaMLP
    assert layers[3].mlp.down_proj.weight.is_contiguous()
    assert sparsify(model, {9: torch.zeros(48)}).left == {9: "it is sparse already"}
    fused = tiny_model()
    fuse_glu(fused)
    assert "the forward of LlamaMLP is not" in sparsify(fused, {0: torch.zeros(48)}).left[0]


def test_refusals() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="thresholds for layer 3, but the model has layers 0 to 2"):
        sparsify(model, {0: torch.zeros(48), 3: torch.zeros(48)})
    with pytest.raises(ValueError, match=r"layer 1 has 48 neurons, its thresholds are \[47\]: give \[48\]"):
        sparsify(model, {0: torch.zeros(48), 1: torch.zeros(47)})
    assert type(model.model.layers[0].mlp) is LlamaMLP


COMPILED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from neuroweave.activations.mixtures import build_activation
from neuroweave.runtime.sparse_mlps import sparsify
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=1, vocab_size=50,
                                     num_attention_heads=4)).eval()
mlp = model.model.layers[0].mlp
mlp.act_fn = build_activation(SPEC, neurons=24)
torch.nn.init.normal_(mlp.act_fn.gating_logits)
assert sparsify(model, {0: torch.full((24,), 0.01)}).sparse == [0]
graphs = []
def keep(graph, _):
    graphs.append([str(node.target) for node in graph.graph.nodes if "sparse_glu" in str(node.target)])
    return graph.forward
compiled = torch.compile(mlp, backend=keep, fullgraph=True)
with torch.no_grad():
    for x in (torch.randn(1, 1, 32), torch.randn(1, 5, 32)):
        assert torch.equal(compiled(x), mlp(x))
print(list(map(len, graphs)))
"""


def test_sparse_mlp_compiles_in_one_graph() -> None:
    """In a process of its own: torch.compile cannot see through the shape checks that tests run under."""
    assert run_python(COMPILED.replace("SPEC", repr(MIXTURES["hard"]))) == "[1, 0]"


# ------------------------------------------------------------------------------------------------------------ command


def test_fast_sparse_on_a_gpu_writes_what_the_pruned_model_writes(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CUDA branch of `--fast`, on a CPU."""
    load = fast_writing.load_causal
    monkeypatch.setattr(fast_writing, "check_device", lambda name: None)
    monkeypatch.setattr(fast_writing, "load_causal", lambda source, dtype, device: load(source, dtype, "cpu"))
    writer = FastWriter.load(str(folder), device="cuda", sparse=0.5)
    assert writer.how.endswith(", static cache, 50% of the neurons skipped, in 2 of 2 layers")
    model, tokenizer, _ = load(str(folder), "auto", "cpu")
    thresholds, _ = skipped_neurons(model, tokenizer, 0.5)
    ids, _ = writer.encode("It was the best")
    wanted = pruned(model, thresholds).generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0, len(ids) :]
    config = writer.settings({"do_sample": False}, 9, chat=False)
    assert operations(lambda: writer.write(ids, config, seed=0, show=lambda text: None)) == 2 * 8
    assert writer.write(ids, config, seed=0, show=lambda text: None).token_ids == wanted.tolist()
    with pytest.raises(ValueError, match="--weights is for CPUs; leave it out"):
        FastWriter.load(str(folder), device="cuda", weights="int8")
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, n_positions=9))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no decoder layers"):
        skipped_neurons(other, tokenizer, 0.5)
