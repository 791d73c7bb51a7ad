"""What is compared: a model, its tokenizer and a name; and what two of them must share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neuroweave.activations.neuron_choices import NeuronChoices, neuron_choices
from neuroweave.text.sample import Sample, encode
from neuroweave.text.tokens import start_tokens

# Config entries that say where a checkpoint came from or how it is written, not what the model computes.
BOOKKEEPING = {"_name_or_path", "architectures", "auto_map", "model_type", "neuroweave", "transformers_version"}


@dataclass(frozen=True, eq=False)
class Subject:
    """A causal language model under measurement; `source` is the folder or hub id it came from, if any."""

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    source: str = ""

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """Of most of the parameters."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.model.parameters():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What neuroweave did to the model, as its config records it."""
        recipe = getattr(self.config, "neuroweave", None)
        return recipe if isinstance(recipe, dict) else None

    @property
    def longest(self) -> int | None:
        """The context length in tokens, where the config states one."""
        text_config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        length = getattr(text_config, "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None


@dataclass(frozen=True, eq=False)
class Profile:
    """What is kept of a subject when its model is let go."""

    name: str
    source: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    recipe: dict[str, Any] | None
    config: dict[str, Any]
    longest: int | None
    tokenizer: PreTrainedTokenizerBase
    choices: list[NeuronChoices]

    @classmethod
    def of(cls, subject: Subject) -> Profile:
        return cls(
            name=subject.name,
            source=subject.source,
            architecture=type(subject.model).__name__,
            parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
            dtype=subject.dtype,
            device=str(subject.device),
            recipe=subject.recipe,
            config=subject.config.to_dict() if hasattr(subject.config, "to_dict") else {},
            longest=subject.longest,
            tokenizer=subject.tokenizer,
            choices=neuron_choices(subject.model),
        )


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards each module's mode is as before and no hook is left."""
    with evaluating(model), torch.inference_mode():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's mode is as before and no hook is left.

    transformers answers `output_hidden_states` with hooks that it never takes off (`output_capturing.py`, 5.17 to
    5.23). They are taken off here, with the mark that would keep them from being put back when they are next needed.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks = [set(module._forward_hooks) for module in modules]
    marks = [vars(module).get("_output_capturing_hooks_installed") for module in modules]
    model.eval()
    try:
        yield
    finally:
        for module, mode, kept, mark in zip(modules, modes, hooks, marks, strict=True):
            module.training = mode
            for hook in set(module._forward_hooks) - kept:
                del module._forward_hooks[hook]
            if mark is None:
                vars(module).pop("_output_capturing_hooks_installed", None)


def check_comparable(base: Subject | Profile, other: Subject | Profile, sample: Sample, window: int) -> None:
    """Raise ValueError unless both models read the same tokens and can hold a window.

    The vocabularies must be equal, and so must the tokens of every passage that is measured.
    """
    for subject in (base, other):
        if subject.longest is not None and window > subject.longest:
            raise ValueError(
                f"a window of {window} tokens is more than {subject.name} can read ({subject.longest}); "
                f"give a window of {subject.longest} or less"
            )
    if base.tokenizer is other.tokenizer:
        return
    ours, theirs = base.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ours != theirs:
        different = sum(theirs.get(token) != number for token, number in ours.items())
        raise ValueError(
            f"{other.name} has another vocabulary than {base.name}: {len(theirs)} and {len(ours)} entries, {different} "
            "of the base's are missing or numbered otherwise. Their predictions are over different tokens and cannot "
            "be compared; compare models with the same tokenizer"
        )
    same_start = start_tokens(base.tokenizer) == start_tokens(other.tokenizer)
    if not same_start or any(
        encode(base.tokenizer, passage.text) != encode(other.tokenizer, passage.text) for passage in sample.passages
    ):
        raise ValueError(
            f"{other.name} cuts the same text into other tokens than {base.name}, although the vocabularies are equal "
            "(merges, normalisation or start token differ); compare models with the same tokenizer"
        )


def check_vocabulary(base: tuple[str, int | None], other: tuple[str, int | None]) -> None:
    """Raise ValueError unless both, each a name and a number of entries, predict over as many (None: not known)."""
    if None not in (base[1], other[1]) and other[1] != base[1]:
        raise ValueError(
            f"{other[0]} predicts over {other[1]} entries and {base[0]} over {base[1]}, although their tokenizers are "
            "equal (a padded or resized vocabulary?); give them the same size"
        )


def changed_settings(base: Profile, other: Profile) -> dict[str, list[str]]:
    """Config entries that differ, as [base, other] in words; where a model came from does not count."""
    names = sorted({*base.config, *other.config} - BOOKKEEPING)
    return {
        name: [shorten(base.config.get(name)), shorten(other.config.get(name))]
        for name in names
        if base.config.get(name) != other.config.get(name)
    }


def shorten(value: Any, length: int = 80) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
