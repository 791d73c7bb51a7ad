"""NeuroBLAST in the ecosystem: Trainer, PEFT, accelerate, remote code, compile, export, attention, dtypes, caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import neuroweave
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM

VOCABULARY = 123
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_sensory_layers": 4,
    "num_associative_layers": 3,
    "num_motor_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kernel_size": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tiny(seed: int = 0, **settings: Any) -> NeuroBlastForCausalLM:
    """Nine layers of every kind, float32; norms off 1, so that a norm left out or swapped shows."""
    torch.manual_seed(seed)
    model = NeuroBlastForCausalLM(NeuroBlastConfig(**SHAPE | settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("conv.weight"):
                weight.normal_(0, 0.2)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **{"use_cache": False} | inputs).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a checkpoint. Do not write into it."""
    path = tmp_path_factory.mktemp("neuroblast")
    tiny().save_pretrained(path)
    return path


# -------------------------------------------------------------------------------------------------------- training


def test_trainer_lowers_the_loss(tmp_path: Path) -> None:
    model, row = tiny(), tokens(1, 23)[0]
    examples: Any = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}] * 4
    before = model(input_ids=row[None], labels=row[None]).loss.item()
    settings = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=examples).train()
    assert model(input_ids=row[None], labels=row[None]).loss.item() < 0.9 * before


def gradients(model: NeuroBlastForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_keeps_gradients(reentrant: bool) -> None:
    model, ids = tiny(), tokens(2, 17)
    calls: list[str] = []
    for name in ("sensory_layers.0.mlp", "sensory_layers.3.conv", "motor_layers.1.mlp"):
        model.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    plain = gradients(model, ids)
    assert len(calls) == 3
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls.clear()
    recomputed = gradients(model, ids)
    assert sorted(calls) == sorted(2 * ["sensory_layers.0.mlp", "sensory_layers.3.conv", "motor_layers.1.mlp"])
    assert {"model.sensory_to_associative.weight", "model.sensory_to_motor.weight"} <= set(plain) == set(recomputed)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_lora_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    ids, base = tokens(2, 11), tiny()
    untouched = logits(base, ids)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(model, ids), untouched)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    trained = logits(model.eval(), ids)
    assert (trained - untouched).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny(), str(tmp_path)).eval(), ids), trained)
    merged = model.merge_and_unload()
    assert type(merged) is NeuroBlastForCausalLM
    torch.testing.assert_close(logits(merged, ids), trained, rtol=1e-4, atol=1e-4)


def test_overfits_a_sentence_and_generates_it() -> None:
    model, row = tiny(initializer_range=0.02).train(), tokens(1, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(input_ids=row, labels=row).loss
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.05
    generated = model.eval().generate(row[:, :3], **GREEDY | {"max_new_tokens": 21})
    assert torch.equal(generated, row)


def test_labels_of_minus_100_do_not_count() -> None:
    model, ids = tiny(), tokens(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    found = logits(model, ids)[:, :-1]
    kept = labels[:, 1:] != -100
    expected = functional.cross_entropy(found[kept].double(), labels[:, 1:][kept])
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss.double(), expected, rtol=1e-5, atol=1e-6)


PARTS = (7, 1, 12)


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_equal_separate_sequences(attention: str, numbered: bool) -> None:
    """Whether `seq_idx` numbers them or the positions alone tell; `use_cache` as it is by default."""
    model, parts = tiny(attn_implementation=attention), [tokens(1, length, seed=length) for length in PARTS]
    positions = torch.cat([torch.arange(length) for length in PARTS])[None]
    number = torch.cat([torch.full((length,), index) for index, length in enumerate(PARTS)])[None]
    more = {"seq_idx": number.int()} if numbered else {}
    row = torch.cat(parts, dim=1)
    with torch.no_grad():
        packed = model(input_ids=row, position_ids=positions, **more).logits
    apart = torch.cat([logits(model, part) for part in parts], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    assert (logits(model, row) - apart).abs().max() > 0.1


def test_sequence_numbers_without_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_idx needs position_ids that start anew"):
        tiny()(input_ids=tokens(1, 5), seq_idx=torch.tensor([[0, 0, 1, 1, 1]]))


# ------------------------------------------------------------------------------------------------- folders, devices


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_round_trip(tmp_path: Path, tied: bool) -> None:
    model, ids = tiny(tie_word_embeddings=tied), tokens(2, 9)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in index) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied: bool) -> None:
    model, ids = tiny(tie_word_embeddings=tied), tokens(2, 9)
    before = logits(model, ids)
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.config.vocab_size == VOCABULARY + 7
    after = logits(model, ids)
    assert after.shape[-1] == VOCABULARY + 7
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    torch.testing.assert_close(after[..., :VOCABULARY], before)


def test_offload_to_disk(folder: Path, tmp_path: Path) -> None:
    """`device_map="auto"` with memory for half of the model; the rest stays on disk, bridges and convolutions alike."""
    memory = {"cpu": sum(weight.nbytes for weight in tiny().parameters()) // 2}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert {"cpu", "disk"} <= set(map(str, model.hf_device_map.values()))
    ids = tokens(2, 9)
    torch.testing.assert_close(logits(model, ids), logits(tiny(), ids))
    assert torch.equal(model.generate(ids, **GREEDY), tiny().generate(ids, **GREEDY))


REMOTE = """
import importlib.abc, json, sys
from pathlib import Path

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("neuroweave", "jaxtyping"):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForCausalLM

ids, out = torch.tensor(json.loads(sys.argv[1])), Path(sys.argv[2])
for number, folder in enumerate(sys.argv[3:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "neuroweave" not in sys.modules
    again = out / f"again{number}"
    model.save_pretrained(again)
    second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    with torch.no_grad():
        found = [m(input_ids=ids).logits for m in (model, second)]
    greedy = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    torch.save([*found, greedy], out / f"{number}.pt")
"""


def run_script(script: str, *arguments: str, cache: Path, **environment: str) -> None:
    """Run Python code in a process of its own; its own errors are the test's."""
    settings = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_remote_code_without_the_package(folder: Path, tmp_path: Path) -> None:
    """Plain and patched folders load where neither neuroweave nor jaxtyping is, save, and load again."""
    ids, patched = tokens(2, 9), tiny()
    neuroweave.patch(patched, "silu-tanh-mlp")
    patched.save_pretrained(tmp_path / "patched")
    run_script(
        REMOTE, json.dumps(ids.tolist()), str(tmp_path), str(folder), str(tmp_path / "patched"), cache=tmp_path / "home"
    )
    assert (logits(patched, ids) - logits(tiny(), ids)).abs().max() > 0.01
    for number, model in enumerate((tiny(), patched)):
        loaded, again, greedy = torch.load(tmp_path / f"{number}.pt")
        assert torch.equal(loaded, logits(model, ids))
        assert torch.equal(again, loaded)
        assert torch.equal(greedy, model.generate(ids, **GREEDY | {"max_new_tokens": 9}))
    for name in ("patched", "again1"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), ids), logits(patched, ids))


# ---------------------------------------------------------------------------------------------- compile and export

COMPILED = """
import sys
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
import neuroweave

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(3, 14)[None]
expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
static = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation="static")
assert torch.equal(static, expected), "generate with a static cache"

with torch.no_grad():
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    token, found = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1), []
    for _ in range(8):
        found.append(token)
        token = step(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert torch.equal(torch.cat([ids, *found], dim=1), expected), "compiled decode step"
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids).logits,
                          model(input_ids=ids).logits, atol=1e-5), "compiled prefill"

class Prefill(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits

class Step(torch.nn.Module):
    # the cache lies in buffers, which an exported program carries from call to call

    def __init__(self, cache):
        super().__init__()
        self.model, self.cache = model, cache
        for number, layer in enumerate(cache.layers):
            held = {"state": layer.conv_states[0]} if hasattr(layer, "conv_states") else {
                "keys": layer.keys, "values": layer.values, "length": layer.cumulative_length}
            for name, tensor in held.items():
                self.register_buffer(f"{name}{number}", tensor.clone(), persistent=False)

    def forward(self, input_ids):
        for number, layer in enumerate(self.cache.layers):
            if hasattr(layer, "conv_states"):
                layer.conv_states[0] = getattr(self, f"state{number}")
            else:
                layer.keys, layer.values = getattr(self, f"keys{number}"), getattr(self, f"values{number}")
                layer.cumulative_length = getattr(self, f"length{number}")
        return self.model(input_ids=input_ids, past_key_values=self.cache).logits

with torch.no_grad():
    length = torch.export.Dim("length", min=2, max=64)
    prefill = torch.export.export(Prefill(), (ids,), dynamic_shapes=({1: length},), strict=False).module()
    for stop in (5, 14, 40):
        some = torch.arange(3, stop)[None]
        error = (prefill(some) - model(input_ids=some, use_cache=False).logits).abs().max()
        assert error < 1e-5, f"exported prefill of {some.shape[1]} tokens: {error}"
    caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    for cache in caches:
        model(input_ids=ids, past_key_values=cache)
    exported = torch.export.export(Step(caches[0]), (ids[:, :1],), strict=False).module()
    for number in (7, 70, 9):
        token = torch.tensor([[number]])
        error = (exported(token) - model(input_ids=token, past_key_values=caches[1]).logits).abs().max()
        assert error < 1e-5, f"exported decode step: {error}"
"""


def test_compiled_and_exported(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the run-time checks of shapes that these tests switch on would break the graph."""
    run_script(COMPILED, str(folder), cache=tmp_path / "home")


# ------------------------------------------------------------------------------------------- attention and positions


@pytest.mark.parametrize("settings", [{}, SLIDING])
def test_attention_implementations_agree(settings: dict[str, Any]) -> None:
    ids = tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    eager = logits(tiny(**settings, attn_implementation="eager"), ids, attention_mask=mask)[mask.bool()]
    for name in ("sdpa", "flex_attention"):
        other = tiny(**settings, attn_implementation=name)
        assert other.config._attn_implementation == name
        found = logits(other, ids, attention_mask=mask)[mask.bool()]
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sliding_window_with_every_cache(attention: str) -> None:
    model, ids = tiny(**SLIDING, attn_implementation=attention), tokens(2, 23)
    assert model.config.layer_types[:4] == ["full_attention", "conv", "sliding_attention", "conv"]
    whole = logits(model, ids)
    assert (whole - logits(tiny(), ids))[:, 7:].abs().max() > 0.1
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        parts = [logits(model, part, past_key_values=cache, use_cache=True) for part in ids.split([1, 9, 4, 2, 7], 1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    for settings in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **GREEDY, **settings), expected)


ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_scalings_are_those_of_qwen3(kind: str) -> None:
    """Lengths go up past the trained positions and down again: dynamic frequencies must follow both ways."""
    shape = {name: SHAPE[name] for name in ("hidden_size", "num_attention_heads", "head_dim")}
    shape["max_position_embeddings"] = 32
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROTARY[kind]}
    reference = Qwen3RotaryEmbedding(Qwen3Config(**shape, rope_parameters=dict(rope)))
    model = tiny(**shape, rope_parameters=dict(rope))
    for length in (7, 123, 50, 7):
        x, positions = torch.zeros(1, length, 32), torch.arange(length)[None]
        for found, expected in zip(model.model.rotary_emb(x, positions), reference(x, positions), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if kind != "default":
        assert (logits(model, tokens(1, 60)) - logits(tiny(), tokens(1, 60))).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_by_loading_and_by_moving(folder: Path, dtype: torch.dtype) -> None:
    ids = tokens(2, 100)
    loaded, moved = NeuroBlastForCausalLM.from_pretrained(folder, dtype=dtype).eval(), tiny().to(dtype)
    for model in (loaded, moved):
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(model.model.rotary_emb.inv_freq, tiny().model.rotary_emb.inv_freq)
    assert torch.equal(logits(loaded, ids), logits(moved, ids))
    wide = logits(tiny(), ids)
    error = (logits(moved, ids).float() - wide).pow(2).mean().sqrt() / wide.pow(2).mean().sqrt()
    assert error < 40 * torch.finfo(dtype).eps / 8
    back = moved.float()
    assert torch.equal(back.model.rotary_emb.inv_freq, tiny().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_softmax_are_float32(dtype: torch.dtype) -> None:
    """Of inputs whose squares leave float16, and whose exponentials need more bits than bfloat16 has."""
    model = tiny(attn_implementation="eager", scale=2).to(dtype)
    norm, x = model.model.norm, (300 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    weight, values = norm.weight.double(), x.double()
    exact = weight * values / values.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x).double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    seen: list[tuple[torch.dtype, torch.dtype | None]] = []
    kept = functional.softmax

    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        seen.append((x.dtype, dtype))
        return kept(x, dim=dim, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "softmax", softmax)
        logits(model, tokens(1, 9))
    assert len(seen) == SHAPE["num_sensory_layers"] + SHAPE["num_associative_layers"] + SHAPE["num_motor_layers"]
    assert set(seen) == {(dtype, torch.float32)}


# ------------------------------------------------------------------------------------------------------- generation


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "beam search": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_equals_generation_without(mode: str) -> None:
    """A drafted token that is rejected must leave no trace in a convolution's state, a beam's state goes with it."""
    settings = dict(MODES[mode])
    model, alone = tiny(), mode in ("prompt lookup", "assisted")
    ids = torch.cat([tokens(1, 5), tokens(1, 5), tokens(1, 5)], dim=1) if alone else tokens(2, 11)
    expected = model.generate(ids, use_cache=False, num_beams=settings.get("num_beams", 1), **GREEDY)
    if settings.pop("assistant", False):
        assistant = tiny()
        with torch.no_grad():  # right about most tokens, wrong about some
            assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
        settings["assistant_model"] = assistant
    assert torch.equal(model.generate(ids, **GREEDY, **settings), expected)


def test_reordered_cache_follows_its_rows() -> None:
    model, ids, order = tiny(), tokens(3, 12), torch.tensor([2, 0, 0])
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :9], past_key_values=cache, use_cache=True)
    cache.reorder_cache(order)
    followed = torch.cat([ids[order, :9], ids[:, 9:]], dim=1)
    found = logits(model, ids[:, 9:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found, logits(model, followed)[:, 9:], rtol=1e-4, atol=1e-5)


def test_continuous_batching_is_refused() -> None:
    with pytest.raises(ValueError, match=r"continuous batching .* convolution layers"):
        tiny().generate_batch([[3, 4, 5], [6, 7]], generation_config=GenerationConfig(**GREEDY))


def test_recorded_states_and_attentions() -> None:
    model, ids = tiny(attn_implementation="eager"), tokens(2, 9)
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    kinds = model.config.layer_types
    assert len(output.hidden_states) == len(kinds) + 1
    assert len(output.attentions) == kinds.count("full_attention") == 6
    torch.testing.assert_close(output.hidden_states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    for weights in output.attentions:
        assert weights.shape == (2, 4, 9, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
        assert torch.equal(weights, weights.tril())


# -------------------------------------------------------------------------------------------------- tensor parallel

PARALLEL = """
import json, os, sys
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
import neuroweave

torch.set_num_threads(1)
try:
    from transformers.distributed import DistributedConfig
    settings = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")}
except (ImportError, TypeError):
    settings = {"tp_plan": "auto"}
distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **settings)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    found = model(input_ids=ids, use_cache=False).logits
local = model.model.sensory_layers[0].self_attn.q_proj.weight
local = getattr(local, "_local_tensor", local)
generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
if distributed.get_rank() == 0:
    torch.save([found, torch.tensor(local.shape), generated], sys.argv[3])
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_tensor_parallel_plan_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    """Two gloo processes, each with half of the heads; the convolutions are whole in both."""
    ids, ranks = tokens(2, 9), []
    for rank in range(2):
        settings = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29517",
        }
        arguments = [str(folder), json.dumps(ids.tolist()), str(tmp_path / "found.pt")]
        ranks.append(subprocess.Popen([sys.executable, "-c", PARALLEL, *arguments], env=settings))
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    found, shape, generated = torch.load(tmp_path / "found.pt")
    assert shape.tolist() == [16, 32]
    torch.testing.assert_close(found, logits(tiny(), ids), rtol=1e-4, atol=1e-5)
    assert torch.equal(generated, tiny().generate(ids, **GREEDY | {"max_new_tokens": 6}))
