"""Tiny random Llama models, a tokenizer of whole words, and texts made of those words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from neuroweave.diagnose import Plan, SpeedPlan, Subject

WORDS = [f"w{number}" for number in range(120)]
QUICK = Plan(
    tokens=400,
    window=32,
    resamples=200,
    prompts=("w1 w2 w3", "w50 w7"),
    new_tokens=5,
    speed=SpeedPlan(prompt_tokens=8, new_tokens=3, repeats=2),
)
WITHOUT_SPEED = QUICK.model_copy(update={"speed": None})


@dataclass(frozen=True)
class Text:
    name: str
    text: str


def tiny_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Three layers, float32; weights are large enough for the layers to matter."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 123,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | settings)).eval()


def changed(model: LlamaForCausalLM, amount: float, seed: int = 7) -> LlamaForCausalLM:
    """A copy of `model` with noise in its MLP weights."""
    copy = tiny_model(num_hidden_layers=model.config.num_hidden_layers)
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in copy.model.layers:
            layer.mlp.down_proj.weight += amount * torch.randn_like(layer.mlp.down_proj.weight)
    return copy


def tiny_tokenizer(*, words: list[str] | None = None, start: bool = False) -> PreTrainedTokenizerFast:
    """One token a word. `start`: put <s> before each text."""
    vocabulary = {token: at for at, token in enumerate(["<pad>", "<s>", "</s>", *(words or WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def texts(count: int = 12, words: int = 40, seed: int = 0) -> list[Text]:
    """`count` documents of `words` random words each."""
    draw = random.Random(seed)
    return [Text(f"text-{number}", " ".join(draw.choices(WORDS, k=words))) for number in range(count)]


def subject(name: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast | None = None) -> Subject:
    return Subject(name, model, tokenizer or tiny_tokenizer())
