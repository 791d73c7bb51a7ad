"""The model and the tokenizer that a configuration names, and whether packed documents stay apart in the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from neuroweave.checkpoint.loading import check_source, check_weights, cpu_multiplies_bfloat16, load_tokenizer
from neuroweave.neuroblast.configuration import PRESETS, NeuroBlastConfig, build_configuration
from neuroweave.neuroblast.fresh import SPECIAL_TOKENS, check_settings, tokenizer_for
from neuroweave.neuroblast.modeling import NeuroBlastForCausalLM
from neuroweave.training.configuration import TrainConfiguration

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

# Largest difference of logits, relative to their spread, that rounding explains; a leak of one document into the next
# changes them by a tenth and more.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def load_training_tokenizer(configuration: TrainConfiguration) -> PreTrainedTokenizerBase:
    """The tokenizer of the configuration, else the one that comes with the model; with a padding token."""
    source = configuration.tokenizer.path or configuration.model.path
    assert source is not None  # the configuration has checked it
    tokenizer, _, _ = tokenizer_for(source)
    return tokenizer


def build_model(configuration: TrainConfiguration, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A fresh NeuroBLAST, the same for the same seed, or the model to go on with; float32 weights, on the CPU.

    Raises ValueError for bad settings, and for a tokenizer that does not match the model.
    """
    torch.manual_seed(configuration.training.seed)
    attention = configuration.training.attention
    if attention == "splash":
        raise ValueError(
            "training.attention: splash is of the JAX backend; the torch backend takes auto, sdpa or eager"
        )
    options = {} if attention == "auto" else {"attn_implementation": attention}
    if configuration.model.path is None:
        config = fresh_configuration(configuration, tokenizer)
        return NeuroBlastForCausalLM._from_config(config, dtype=torch.float32, **options)
    source = configuration.model.path
    check_source(source)
    folder = local(source)
    check_weights(folder)
    config = AutoConfig.from_pretrained(folder)
    check_match(tokenizer, config.get_text_config().vocab_size, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def fresh_configuration(configuration: TrainConfiguration, tokenizer: PreTrainedTokenizerBase) -> NeuroBlastConfig:
    """Of a NeuroBLAST that is to be trained from nothing. Raises ValueError for bad settings."""
    fields = PRESETS[configuration.model.preset][0] | check_settings(configuration.model.settings)
    ids = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    if given := sorted({"vocab_size", *ids} & set(configuration.model.settings)):
        raise ValueError(f"model.settings: {', '.join(given)}: the tokenizer decides; leave it out")
    return build_configuration(fields | {"vocab_size": len(tokenizer)} | ids)


def local(source: str) -> Path:
    from neuroweave.checkpoint.hub import local_folder

    return local_folder(source)


def check_match(tokenizer: PreTrainedTokenizerBase, rows: int, model: Path) -> None:
    """Raise ValueError when the tokenizer has more tokens than the embedding has rows, or is not the model's own."""
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model} an embedding of {rows} rows; give the "
            f"tokenizer that the model was trained with (leave out tokenizer.path)"
        )
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return
    own = load_tokenizer(model).get_vocab()
    given = tokenizer.get_vocab()
    others = [token for token, number in own.items() if given.get(token, number) != number or token not in given]
    if others:
        raise ValueError(
            f"the tokenizer does not match the model {model}: {len(others):,} of the {len(own):,} tokens of the "
            f"model's own tokenizer are others in it, such as {others[0]!r}; leave out tokenizer.path"
        )


def choose_precision(asked: str, device: str) -> torch.dtype:
    """What to multiply in. `auto`: bfloat16 where the hardware has it. Raises ValueError where it has not."""
    if device == "cpu":
        has = cpu_multiplies_bfloat16()
    else:
        has = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bfloat16" and not has:
        raise ValueError(
            f"training.precision is bfloat16, but this {device} has no bfloat16 products; say float32 or auto"
        )
    return torch.bfloat16 if has and asked != "float32" else torch.float32


@torch.no_grad()
def packing_leak(model: PreTrainedModel, *, rows: int = 2, dtype: torch.dtype = torch.float32) -> float:
    """How much a document's logits change when another one stands before it in a packed row, relative to their spread.

    `rows`: of the batch; some attention kernels only see boundaries in a batch of one. 0 but for rounding: no leak.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    vocabulary = embedding_rows(model)
    first, second = 9, 23
    ids = torch.randint(0, vocabulary, (rows, first + second), generator=draw).to(device)
    positions = torch.cat((torch.arange(first), torch.arange(second))).expand(rows, -1).to(device)
    was_training = model.training
    model.eval()

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out: Any = model(input_ids=ids, position_ids=positions.contiguous(), use_cache=False)
        return out.logits.float()

    try:
        packed = logits(ids, positions)
        alone = torch.cat(
            (logits(ids[:, :first], positions[:, :first]), logits(ids[:, first:], positions[:, first:])), 1
        )
    finally:
        model.train(was_training)
    return float((packed - alone).abs().max() / alone.std().clamp_min(1e-12))


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model knows."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def check_packing(model: PreTrainedModel, *, rows: int, dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError when documents that share a row see each other in this model."""
    leak = packing_leak(model, rows=min(rows, 2), dtype=dtype)
    if not leak < ROUNDING[dtype]:
        attention = getattr(model.config, "_attn_implementation", None)
        raise ValueError(
            f"documents in a packed row see each other in this model (logits change by {leak:.2g} of their spread; "
            f"{type(model).__name__}, attention {attention}); set data.packing: false, or training.attention: sdpa"
        )
