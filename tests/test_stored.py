"""What is stored of a base model gives its logits back to the bit, and lets go of the model when told to."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from tiny_llama import WORDS, Text, subject, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from neuroweave.diagnose.probes import stored
from neuroweave.diagnose.probes.prediction import LiveReader
from neuroweave.diagnose.probes.stored import StoredReader, store
from neuroweave.diagnose.subject import at_rest
from neuroweave.text.sample import Sample, draw_sample

SMALL = {
    "vocab_size": 123, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.0625},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 7.0},
    "phi": {},  # its head has a bias
}


def sample() -> Sample:
    texts = [Text("a", " ".join(WORDS)), Text("b", " ".join(reversed(WORDS)))]
    return draw_sample(texts, tiny_tokenizer(), tokens=100, window=23, passage=46)


def logits_of(reader: LiveReader | StoredReader, text: Sample) -> torch.Tensor:
    return torch.cat([reader.read(window, at).logits(slice(None)) for at, window in enumerate(text.windows)])


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases begin with zero
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_head_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    text, model = sample(), made(family)
    weight = weakref.ref(model.get_output_embeddings().weight)
    with at_rest(model):
        reader = store(LiveReader(subject(family, model), text), text, tmp_path)
        wanted = logits_of(LiveReader(subject(family, model), text), text)
        assert torch.equal(logits_of(reader, text), wanted)
        reader.release()
        reader.release()  # a second time changes nothing
    del model
    gc.collect()
    assert weight() is None
    assert torch.equal(logits_of(reader, text), wanted)


def test_heads_that_are_more_than_a_matrix_are_held(tmp_path: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    text, model = sample(), tiny_model()
    model.lm_head.__class__ = Doubled
    with at_rest(model):
        reader = store(LiveReader(subject("m", model), text), text, tmp_path)
        wanted = logits_of(reader, text)
        reader.release()
        assert torch.equal(logits_of(reader, text), wanted)
    assert not list(tmp_path.glob("head*"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = sample(), tiny_model()
    with at_rest(model):
        reader = store(LiveReader(subject("m", model), text), text, tmp_path)
        asked = []
        monkeypatch.setattr(stored, "check_free_space", lambda folder, size: asked.append((folder, size)))
        reader.release()
    assert asked == [(tmp_path, 4 * 123 * 32)]
