"""The fast runtime against transformers: the same logits and tokens, patched or not, compiled and in PyTorch."""

from __future__ import annotations

import sys

import pytest
import torch
from test_neuroblast import random_model
from transformers import AutoConfig, AutoModelForCausalLM

import neuroweave
from neuroweave.native import build
from neuroweave.runtime.engine import Engine
from neuroweave.runtime.lowering import UnsupportedModelError, lower
from neuroweave.runtime.weights import pack

TINY = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 123, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
                    "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0},
}  # fmt: skip
TOKENS = torch.randint(3, 97, (23,), generator=torch.Generator().manual_seed(0))
STAGES = {"num_sensory_layers": 2, "num_associative_layers": 2, "num_motor_layers": 1}


def tiny(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY | FAMILIES.get(family, {}) | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are not 1 and 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def every_logit(engine: Engine, prompt: int) -> torch.Tensor:
    """After a prompt of that many tokens, and after each token that follows."""
    found = [engine.read_prompt(TOKENS[:prompt].tolist()).clone()]
    found += [engine.step(int(token)).clone() for token in TOKENS[prompt:]]
    return torch.stack(found)


def needs_compiler() -> None:
    try:
        build.find_compiler()
    except build.NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["compiled", "PyTorch"])
def native(request, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "1" if request.param == "compiled" else "0")
    if request.param == "compiled":
        needs_compiler()
    return request.param == "compiled"


@torch.no_grad()
def assert_same_logits(model, native, prompt=9, threads=2, **how):
    engine = Engine(lower(model, **how), positions=32, threads=threads)
    assert engine.compiled == native, engine.why_not
    expected = model(TOKENS[None]).logits[0, prompt - 1 :]
    torch.testing.assert_close(every_logit(engine, prompt), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, native):
    assert_same_logits(tiny(family), native)


def test_texts_of_one_program_do_not_mix(native):
    """Two engines in turn: what one has read is not seen by the other."""
    model = random_model(**STAGES | {"vocab_size": 97}).eval()
    program = lower(model)
    alone = every_logit(Engine(program, positions=32), 9)
    one, other = (Engine(program, positions=32) for _ in range(2))
    found = [one.read_prompt(TOKENS[:9].tolist()).clone()]
    other.read_prompt(TOKENS.flip(0)[:12].tolist())
    for number, token in enumerate(TOKENS[9:].tolist()):
        found.append((one.read_prompt([token]) if number % 3 == 0 else one.step(token)).clone())
        other.step(5) if number < 5 else None
    torch.testing.assert_close(torch.stack(found), alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads, native):
    assert_same_logits(tiny("llama"), native, prompt=1, threads=threads)


@pytest.mark.parametrize(
    "changes", [{}, {"scale": 2.0}, {"scale": 0.5}, {"num_sensory_layers": 0, "kernel_size": 7}, {"bridges": False}]
)
def test_neuroblast_equals_its_model(changes, native):
    model = random_model(**STAGES | {"vocab_size": 97} | changes).eval()
    assert_same_logits(model, native, prompt=3)


@pytest.mark.parametrize(
    "sites",
    [
        {"mlp": "phantom"},
        {"mlp": {"segments": {"members": ["relu", "silu_tanh", "relu2"], "sizes": [7, 100, 16]}}},
        {"mlp": {"mixture": {"members": ["silu", "gelu", "swish_beta", "tanh"], "start_logit": 1.0}}},
        {"mlp": {"mixture": {"members": ["silu", "gelu_tanh"], "hard": True}}},
        {"attention.q": "tanh", "attention.o": "silu"},
        {"mlp.up": "gelu", "mlp.down": "silu_tanh"},
        {"embedding": "silu_tanh", "head": "tanh"},
    ],
    ids=str,
)  # fmt: skip
def test_patched_equals_its_model(sites, native):
    model = tiny("llama", attention_bias=False)
    neuroweave.patch(model, {"sites": [{"site": site, "activation": given} for site, given in sites.items()]})
    for module in model.modules():
        if hasattr(module, "gating_logits"):
            torch.nn.init.normal_(module.gating_logits)
    assert_same_logits(model, native)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rounded_weights_equal_the_numbers_they_stand_for(format, native):
    """Against a model whose weights are what the rounded ones stand for; compiled, inputs are rounded to 16 bits."""
    model = tiny("llama", hidden_size=100, num_attention_heads=5, num_key_value_heads=1, head_dim=20)
    engine = Engine(lower(model, format=format), positions=32, threads=2)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.copy_(pack(module.weight, format_of(name, format)).whole())
        expected = model(TOKENS[None]).logits[0, 8:]
    found = every_logit(engine, 9)
    spread = float(expected.std())
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4 * spread)
    worst = float((found - expected).abs().max()) / spread
    assert worst < (2e-3 if native else 1e-4), worst


def format_of(name: str, format: str) -> str:
    """The program's own format of a matrix: 4 bits are not for all."""
    return "int8" if name.endswith(("k_proj", "v_proj", "embed_tokens", "lm_head")) or "layers.1." in name else format


@pytest.mark.parametrize(("format", "most"), [("int8", 0.004), ("int4", 0.09)])
def test_rounding_error(format, most):
    weight = torch.randn(33, 100, generator=torch.Generator().manual_seed(1))
    off = float((pack(weight, format).whole() - weight).norm() / weight.norm())
    assert most / 2 < off < most * 1.8, off


def test_what_cannot_run_is_refused():
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        lower(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=12, n_head=1)))
    model = tiny("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Softsign()
    with pytest.raises(UnsupportedModelError, match=r"layer 1.*Softsign is no activation"):
        lower(model)
    model = tiny("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(UnsupportedModelError, match="logits are off by"):
        lower(model)
    model = tiny("llama")
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        lower(model, format="int8")
    engine = Engine(lower(tiny("llama")), positions=8)
    engine.read_prompt([3] * 8)
    with pytest.raises(ValueError, match="9 tokens, but there is room for 8"):
        engine.step(3)
    with pytest.raises(ValueError, match="65 positions"):
        Engine(lower(tiny("llama")), positions=65)


def test_a_broken_compiler_is_no_end(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROWEAVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    build.built.cache_clear()
    engine = Engine(lower(tiny("llama")), positions=32)
    build.built.cache_clear()
    assert not engine.compiled
    assert f"{sys.executable} failed" in engine.why_not
