"""The next token, as transformers would choose it: which settings are followed here, and which are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LARGEST = torch.finfo(torch.float32).max

# transformers' other ways to change which tokens are chosen, and the value at which they do nothing
NOT_DONE = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "min_length": 0, "min_new_tokens": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "guidance_scale": None, "encoder_repetition_penalty": 1.0, "top_h": None,
    "exponential_decay_length_penalty": None,
}  # fmt: skip


def refuse_unknown(config: GenerationConfig, way_out: str) -> None:
    """Raise ValueError for a setting of the checkpoint that decides about tokens and that is not done here."""
    for name, neutral in NOT_DONE.items():
        if (value := getattr(config, name, neutral)) not in (None, neutral):
            raise ValueError(f"generation_config.json: {name} is {value}, which is not followed here; {way_out}")


# name: (numbers that float32 has and that mean something, in words)
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "repetition_penalty": (lambda x: x > 0, "a number above 0"),
    "temperature": (lambda x: x > 0, "a number above 0"),
    "top_k": (lambda x: x >= 0 and x == int(x), "a whole number, 0 or more"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
}


def check_sampling(config: GenerationConfig) -> None:
    """Raise ValueError, naming the setting, for one that transformers would refuse to choose tokens by."""
    if config.do_sample not in (None, True, False):
        raise ValueError(f"generation_config.json: do_sample is {config.do_sample!r}; true or false was expected")
    for name, (fits, words) in LIMITS.items():
        value = getattr(config, name, None)
        if value is None or (name != "repetition_penalty" and not config.do_sample):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= LARGEST or not fits(value):
            raise ValueError(
                f"{name} is {value!r}, and {words} was expected; mend generation_config.json, or give "
                f"--{name.replace('_', '-')}"
            )


def settings_with_defaults(config: GenerationConfig) -> dict[str, Any]:
    """repetition_penalty, and of a draw temperature, top_k, top_p and min_p: transformers' defaults where the settings
    are silent."""
    found: dict[str, Any] = {"repetition_penalty": config.repetition_penalty or 1.0}
    if not config.do_sample:
        return found
    defaults: Iterable[tuple[str, float]] = (("temperature", 1.0), ("top_k", 50), ("top_p", 1.0), ("min_p", 0.0))
    return found | {
        name: default if getattr(config, name) is None else getattr(config, name) for name, default in defaults
    }


def chooser(
    config: GenerationConfig, source: str, *, generator: torch.Generator | None = None
) -> Callable[[list[int], Tensor], int]:
    """The next token of (the text so far, logits [V]), chosen as transformers' `generate` chooses.

    Draws come from `generator`, or else from torch's own. Raises ValueError, naming `source`, for logits that are not
    numbers.
    """
    settings = settings_with_defaults(config)
    change: list[LogitsProcessor] = []
    if settings["repetition_penalty"] != 1.0:
        change.append(RepetitionPenaltyLogitsProcessor(penalty=settings["repetition_penalty"]))
    if config.do_sample:
        change += [TemperatureLogitsWarper(float(settings["temperature"]))] if settings["temperature"] != 1.0 else []
        change += [TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
        change += [TopPLogitsWarper(settings["top_p"])] if settings["top_p"] < 1.0 else []
        change += [MinPLogitsWarper(settings["min_p"])] if settings["min_p"] else []
    every = LogitsProcessorList(change)

    def choose(text: list[int], logits: Tensor) -> int:
        scores: Any = logits[None]
        if change:
            scores = every(torch.tensor([text]), scores.clone())  # type: ignore[arg-type]
        if not config.do_sample:
            token = int(scores.argmax())
            if torch.isfinite(scores[0, token]):
                return token
        elif torch.isfinite(scores.amax()):
            return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        raise ValueError(
            f"{source}: its logits are not numbers, so no token can be drawn; neuroweave verify looks at the weights"
        )

    return choose
