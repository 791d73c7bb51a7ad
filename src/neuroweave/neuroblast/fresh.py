"""A fresh NeuroBLAST model as a Hugging Face checkpoint, with a tokenizer where one is given."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neuroweave.checkpoint.staging import staged_folder
from neuroweave.neuroblast.configuration import PRESETS, NeuroBlastConfig, build_configuration
from neuroweave.neuroblast.modeling import NeuroBlastForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_TOKEN = "<|pad|>"
OTHER_FORMS = ("tokenizer.model", "special_tokens_map.json", "added_tokens.json")
DERIVED = ("num_hidden_layers", "layer_types")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class FreshModel:
    """What was written. `parameters`: of the model, a tied head once; `embedding`: of them the embedding's;
    `added_pad`: whether the tokenizer got a padding token."""

    folder: str
    preset: str
    parameters: int
    embedding: int
    vocabulary: int
    added_pad: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_fresh_model(
    out: str | Path,
    *,
    preset: str = "default",
    tokenizer: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    overwrite: bool = False,
) -> FreshModel:
    """Write a model with initial weights into the folder `out`, which appears whole or not at all.

    `preset`: a name in `configuration.PRESETS`; `settings`: configuration fields that differ from it. `tokenizer`: a
    folder or hub id whose files come along, and which decides vocabulary size and special tokens; one without a
    padding token gets `<|pad|>`. The same seed gives the same weights. Raises ValueError for bad settings.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not known; choose from {', '.join(PRESETS)}")
    chosen = PRESETS[preset][0] | check_settings(settings or {})
    words, added_pad = None, False
    if tokenizer is not None:
        words, added_pad, taken = tokenizer_for(tokenizer)
        if given := [name for name in taken if name in (settings or {})]:
            raise ValueError(f"{', '.join(given)}: the tokenizer decides; leave out the setting, or --tokenizer")
        chosen |= taken
    config = build_configuration(chosen)
    with staged_folder(out, overwrite=overwrite, sources=[] if tokenizer is None else [tokenizer]) as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = NeuroBlastForCausalLM(config).to(getattr(torch, dtype))
        model.save_pretrained(folder)
        if words is not None:
            words.save_pretrained(folder)
            if not added_pad:  # other forms of the same tokenizer
                copy_other_forms(Path(str(tokenizer)), folder)
    embedding = model.get_input_embeddings().weight.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return FreshModel(str(out), preset, total, embedding, config.vocab_size, added_pad)


def copy_other_forms(source: Path, folder: Path) -> None:
    """A tokenizer's files in forms that transformers does not write, from a local folder that has them."""
    for name in OTHER_FORMS:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings. Raises ValueError for names that are no field of the configuration, or follow from others."""
    fields = {field.name for field in dataclasses.fields(NeuroBlastConfig)}
    for name in settings:
        if name in DERIVED:
            raise ValueError(f"{name} follows from num_sensory_layers, num_associative_layers and num_motor_layers")
        if name not in fields:
            raise ValueError(f"{name!r} is no field of NeuroBlastConfig; docs/neuroblast.md lists them")
    return settings


def tokenizer_for(source: str | Path) -> tuple[PreTrainedTokenizerBase, bool, dict[str, Any]]:
    """(tokenizer, whether it got a padding token, the configuration's fields that it decides)."""
    from neuroweave.checkpoint.loading import load_tokenizer

    tokenizer = load_tokenizer(source)
    added = tokenizer.pad_token_id is None
    if added:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    fields = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    return tokenizer, added, {"vocab_size": len(tokenizer)} | fields
