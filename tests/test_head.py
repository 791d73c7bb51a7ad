"""The output head by itself gives the model's own logits, in families that scale or cap them too."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from neuroweave.diagnose.probes.head import find_head, head_rows

SMALL = {
    "vocab_size": 123, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 7.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_logits(family: str) -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 123} if family == "gpt2" else SMALL
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # logits large enough for a cap to bend them
        head = find_head(model, model(torch.tensor([[3, 4, 5, 6]]), output_hidden_states=True))
        ids = torch.arange(7, 30)[None]
        out = model(ids, output_hidden_states=True)
        assert head is not None
        torch.testing.assert_close(head(out.hidden_states[-1][0, 2:9]), out.logits[0, 2:9], rtol=1e-4, atol=1e-5)


def test_no_head_where_logits_are_made_otherwise() -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    model = AutoModelForCausalLM.from_config(config).eval()
    forward = model.forward

    def shifted(*args, logits_to_keep=0, **settings):
        out = forward(*args, **settings)
        out.logits = out.logits + torch.arange(123)
        return out

    model.forward = shifted
    with torch.no_grad():
        assert find_head(model, model(torch.tensor([[3, 4, 5]]), output_hidden_states=True)) is None


def test_rows_of_a_large_vocabulary() -> None:
    assert head_rows(262_144) == 64
    assert head_rows(10**9) == 1
