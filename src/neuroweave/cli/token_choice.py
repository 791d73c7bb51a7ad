"""Which of transformers' generation settings a loop of our own follows, and which it refuses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

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
