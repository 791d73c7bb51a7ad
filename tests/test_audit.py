"""Audit: every nonlinearity that runs is listed where it ran, whatever it is called; the model is left as it was."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from neuroweave.cli.audit import ranges, together
from neuroweave.cli.main import main
from neuroweave.diagnose.audit import ACTIVATIONS, OTHERS, AuditResult, audit, trace

IDS = torch.arange(7)[None]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()


class Spelled(nn.Module):
    """A language model whose only activation is the function that it is given."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(61, 8)
        self.mlp: nn.Module = Applied(function)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.embed(ids))


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def ran(result: AuditResult, kind: str = "activation") -> dict[tuple[str, str], int]:
    return {(run.module, run.operation): run.count for run in result.runs if run.kind == kind}


# --- what is found in models ---


def test_llama_runs_silu_and_softmax_in_every_layer() -> None:
    result = audit(tiny_llama(), IDS)
    assert ran(result) == {
        place: 1
        for layer in range(3)
        for place in (
            (f"model.layers.{layer}.mlp.act_fn", "silu"),
            (f"model.layers.{layer}.self_attn", "softmax (fused attention)"),
        )
    }
    assert ran(result, "other")["model.rotary_emb", "sin (rotary)"] == 1
    assert ran(result, "other")["model.norm", "rsqrt"] == 1
    assert ran(result, "opaque") == {}


def test_eager_attention_shows_plain_softmax() -> None:
    result = audit(tiny_llama(attn_implementation="eager"), IDS)
    assert result.totals() == {"silu": 3, "softmax": 3}


def test_gemma_runs_tanh_gelu() -> None:
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE)).eval()
    result = audit(model, IDS)
    assert result.totals() == {"softmax (fused attention)": 3, "gelu_tanh": 3}
    assert ran(result)["model.layers.2.mlp.act_fn", "gelu_tanh"] == 1


def test_gpt2_spells_its_gelu_with_tanh() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61)).eval()
    result = audit(model, IDS)
    assert result.totals() == {"softmax (fused attention)": 2, "tanh": 2}
    assert ran(result)["transformer.h.1.mlp.act", "tanh"] == 1
    assert ran(result, "other")["transformer.h.1.mlp.act", "pow"] == 1


def test_mixture_of_experts_hides_nothing() -> None:
    result = audit(MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)).eval(), IDS)
    assert result.totals("opaque") == {}
    assert {path.rpartition(".")[2] for path, operation in ran(result) if operation == "silu"} <= {"experts", "act_fn"}
    assert result.totals()["silu"] >= 3


# --- what is found, however it is written ---


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x * torch.sigmoid(x), {"sigmoid": 1}),
        (lambda x: x / (1 + torch.exp(-x)), {"exp": 1}),
        (lambda x: F.silu(x.clone(), inplace=True), {"silu": 1}),
        (lambda x: F.silu(F.silu(x)), {"silu": 2}),
        (lambda x: torch.ops.aten.silu.out(x, out=torch.empty_like(x)), {"silu": 1}),
        (lambda x: torch.ops.aten.silu_backward(x, x), {"silu": 1}),
        (lambda x: F.gelu(x), {"gelu": 1}),
        (lambda x: F.gelu(x, approximate="tanh"), {"gelu_tanh": 1}),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), {"erf": 1}),
        (lambda x: 0.9 * torch.tanh(x) + 0.1 * torch.sin(x), {"tanh": 1, "sin": 1}),
        (lambda x: F.silu(x) + 0.1 * torch.tanh(x), {"silu": 1, "tanh": 1}),
        (lambda x: torch.relu(x).square(), {"relu": 1}),
        (lambda x: F.relu6(x) + F.hardtanh(x), {"hardtanh": 2}),
        (lambda x: F.leaky_relu(x) + F.elu(x) + F.selu(x), {"leaky_relu": 1, "elu": 2}),
        (lambda x: F.hardswish(x) + F.mish(x), {"hardswish": 1, "mish": 1}),
        (lambda x: F.softplus(x) + F.logsigmoid(x), {"softplus": 1, "log_sigmoid": 1}),
        (lambda x: F.softmax(x, -1) + F.log_softmax(x, -1), {"softmax": 1, "log_softmax": 1}),
        (lambda x: F.prelu(x, torch.ones(1)) + F.rrelu(x), {"prelu": 1, "leaky_relu": 1}),
        (lambda x: torch.special.expit(x) + torch.cos(x), {"sigmoid": 1, "cos": 1}),
        (lambda x: x * x + x @ x.mT @ x, {}),
    ],
)
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_function_is_seen(function: Any, expected: dict[str, int], inference: bool) -> None:
    model = Spelled(function)
    with torch.inference_mode(inference):
        result = audit(model, IDS)
    assert result.totals() == expected
    assert result.totals("opaque") == {}
    assert {run.module for run in result.runs} <= {"mlp"}


def test_gradients_may_be_on() -> None:
    model = Spelled(F.silu)
    with trace(model) as recorder:
        model(IDS).sum().backward()
    assert ran(recorder.result) == {("mlp", "silu"): 1, ("", "silu"): 1}  # forward; backward, outside of all modules


def test_every_operator_in_the_tables_exists() -> None:
    missing = [name for name in ACTIVATIONS | OTHERS if not hasattr(torch.ops.aten, name)]
    assert missing == []


def test_rotary_positions_are_told_from_a_sine_activation_by_the_module() -> None:
    class PlainRotaryEmbedding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() + x.cos()

    model = Spelled(torch.sin)
    model.embed = nn.Sequential(model.embed, PlainRotaryEmbedding())
    result = audit(model, IDS)
    assert ran(result) == {("mlp", "sin"): 1}
    assert ran(result, "other") == {("embed.1", "sin (rotary)"): 1, ("embed.1", "cos (rotary)"): 1}
    assert [run.module for run in result.forbidden(["sin"])] == ["mlp"]


def test_hooks_of_a_module_count_as_the_module() -> None:
    model = Spelled(lambda x: x)
    model.mlp.register_forward_pre_hook(lambda module, args: (torch.tanh(args[0]),))
    model.mlp.register_forward_hook(lambda module, args, output: torch.sin(output))
    assert ran(audit(model, IDS)) == {("mlp", "tanh"): 1, ("mlp", "sin"): 1}


def test_shared_activation_is_listed_under_its_caller() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = model.model.layers[0].mlp.act_fn
    places = [path for path, operation in ran(audit(model, IDS)) if operation == "silu"]
    assert places == [f"model.layers.{layer}.mlp.act_fn" for layer in range(3)]


def test_function_under_compile_does_not_hide() -> None:
    compiled = torch.compile(lambda x: F.silu(x), backend="eager")
    model = Spelled(compiled)
    model(IDS)  # compiled and cached before the trace
    assert audit(model, IDS).totals() == {"silu": 1}


@pytest.fixture
def opaque_silu() -> Iterator[Any]:
    with torch.library._scoped_library("neuroweave_test", "DEF") as library:
        library.define("swish(Tensor x) -> Tensor")
        library.impl("swish", lambda x: F.silu(x), "CompositeExplicitAutograd")
        yield torch.ops.neuroweave_test.swish


def test_foreign_operator_is_opaque_and_breaks_any_ban(opaque_silu: Any) -> None:
    result = audit(Spelled(opaque_silu), IDS)
    assert ran(result, "opaque") == {("mlp", "neuroweave_test::swish"): 1}
    assert [run.operation for run in result.forbidden(["gelu"])] == ["neuroweave_test::swish"]
    assert result.forbidden([]) == ()


def test_recurrent_kernel_is_opaque() -> None:
    model = Spelled(F.relu)
    model.mlp = nn.LSTM(8, 8)
    model.forward = lambda ids: model.mlp(model.embed(ids))[0]  # type: ignore[method-assign]
    result = audit(model, IDS)
    assert result.totals("opaque") or {"sigmoid", "tanh"} <= result.totals().keys()


# --- the model is left as it was ---


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trace_leaves_logits_bit_equal(mode: Any, attention: str) -> None:
    model = tiny_llama(attn_implementation=attention)
    with mode():
        before = model(IDS).logits
        with trace(model):
            during = model(IDS).logits
        assert torch.equal(during, before)
        assert torch.equal(model(IDS).logits, before)


def hooks_of(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]


def test_no_hook_is_left() -> None:
    model = tiny_llama()
    before = hooks_of(model)
    with trace(model):
        assert len(hooks_of(model)) > len(before)
    assert hooks_of(model) == before == []


def test_no_hook_is_left_after_an_error() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken layer")

    model = Spelled(broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        audit(model, IDS)
    assert hooks_of(model) == []
    model.mlp = Applied(F.silu)
    assert audit(model, IDS).totals() == {"silu": 1}


def test_error_that_the_model_catches_does_not_shift_modules() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken layer")

    class Careful(Spelled):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(ids)
            except RuntimeError:
                return torch.tanh(self.embed(ids))

    assert ran(audit(Careful(broken), IDS)) == {("", "tanh"): 1}


def test_compiled_and_scripted_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the model is compiled \(torch.compile\).*before it is compiled"):
        audit(torch.compile(Spelled(F.silu), backend="eager"), IDS)  # type: ignore[arg-type]
    model = Spelled(F.silu)
    model.mlp.compile(backend="eager")
    with pytest.raises(ValueError, match=r"mlp is compiled"):
        audit(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model.mlp = torch.jit.script(nn.SiLU())
    with pytest.raises(ValueError, match=r"mlp is scripted \(torch.jit\)"):
        audit(model, IDS)


# --- bans ---


def test_gelu_stands_for_both_flavours_and_tanh_for_itself() -> None:
    result = audit(Spelled(lambda x: F.gelu(x) + F.gelu(x, approximate="tanh")), IDS)
    assert [run.operation for run in result.forbidden(["gelu"])] == ["gelu", "gelu_tanh"]
    assert [run.operation for run in result.forbidden(["gelu_tanh"])] == ["gelu_tanh"]
    assert result.forbidden(["tanh", "silu"]) == ()


def test_softmax_stands_for_fused_attention_too() -> None:
    assert len(audit(tiny_llama(), IDS).forbidden(["softmax"])) == 3


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"operation 'sillu' is not known; did you mean silu\?"):
        AuditResult(()).forbidden(["sillu"])
    with pytest.raises(ValueError, match="operation 'qqqqqqq' is not known; known are abs, "):
        AuditResult(()).forbidden(["qqqqqqq"])


# --- the command ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", *arguments])
    return int(stopped.value.code or 0)


def test_command_prints_a_table(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(checkpoint)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["activation", "silu", "model.layers.0-2.mlp.act_fn", "3"] for line in lines)
    assert lines[-1] == "activations: silu 3, softmax (fused attention) 3"


def test_command_forbids(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(checkpoint), "--forbid", "silu, gelu") == 1
    assert capsys.readouterr().out.endswith("forbidden: silu ran 3 times in model.layers.0-2.mlp.act_fn\n")
    assert run_command(str(checkpoint), "--forbid", "gelu,sin") == 0
    assert capsys.readouterr().out.endswith("none of gelu, sin ran\n")


def test_command_refuses_an_unknown_name_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("no/such/model", "--forbid", "silo") == 2
    assert capsys.readouterr().err == "neuroweave: operation 'silo' is not known; did you mean silu?\n"


def test_command_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(checkpoint), "--json", "--forbid", "silu") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["activation"] == {"silu": 3, "softmax (fused attention)": 3}
    assert [run["module"] for run in found["violations"]] == [f"model.layers.{i}.mlp.act_fn" for i in range(3)]
    first = next(run for run in found["runs"] if run["operation"] == "silu")
    assert {key: first[key] for key in ("module", "count", "kind")} == {
        "module": "model.layers.0.mlp.act_fn",
        "count": 1,
        "kind": "activation",
    }


def test_prompt_without_a_tokenizer_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(str(checkpoint), "--prompt", "Call me Ishmael.") == 2
    assert "tokenizer" in capsys.readouterr().err.splitlines()[-1]


def test_paths_are_drawn_together() -> None:
    assert ranges(["10", "1", "2", "3", "0", "7"]) == "0-3,7,10"
    assert together(["layers.0.mlp", "layers.1.mlp"]) == "layers.0-1.mlp"
    assert together([""]) == "(model)"
