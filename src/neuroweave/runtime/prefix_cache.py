"""Prefix caching: what a model has read of a text is kept, and not read again for a text that begins alike.

A layer with full attention can go back to any token of a kept text. One with a window that is past, or with the state
of a convolution, can only go on where the text ended. Letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from neuroweave.runtime.batch_cache import beginning, can_go_back, check_layers, disagreement, row_of, size_in_tokens

WORTH = 8  # tokens; for fewer, nothing is copied


@dataclass(eq=False)
class Kept:
    """A text and the model's cache of exactly these tokens, one row. `size`: see `size_in_tokens`."""

    ids: list[int]
    salt: str
    cache: DynamicCache
    size: float


class PrefixCache:
    """Texts that `model` has read, the newest last, which take no more memory than one of `tokens`.

    `why_none`: why nothing is kept for this model; "" if it is. A `salt` keeps texts apart: one that was put with it is
    found with it alone. Not for several threads. Where there is no memory for a copy, nothing is kept.
    """

    def __init__(self, model: Any, *, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.why_none = "no token is to be kept" if tokens < 1 else why_not_reused(model)
        self.kept: list[Kept] = []

    def begin(self, ids: Sequence[int], *, salt: str = "") -> tuple[int, DynamicCache]:
        """(T, a cache of the first T of `ids`): as many as are known, and one less than all at most."""
        best, known = None, WORTH - 1
        for each in self.kept:
            common = shared(each.ids, ids[:-1]) if each.salt == salt else 0
            if common > known and (common == len(each.ids) or can_go_back(each.cache)):
                best, known = each, common
        if best is not None:
            self.kept.remove(best)
            self.kept.append(best)
            try:
                return known, beginning(best.cache, known)
            except RuntimeError:
                self.kept.clear()
        return 0, DynamicCache(config=self.model.config)

    def put(self, ids: Sequence[int], cache: DynamicCache, *, row: int = 0, salt: str = "") -> None:
        """Keep a copy of one row of a batch, which has the last len(`ids`) columns."""
        if self.why_none or not WORTH <= len(ids) <= self.tokens:
            return
        try:
            copied = row_of(cache, row, drop=cache.get_seq_length() - len(ids))
        except RuntimeError:
            self.kept.clear()
            return
        size = size_in_tokens(copied)
        if size > self.tokens:
            return
        self.kept = [each for each in self.kept if each.salt != salt or shared(each.ids, ids) < len(each.ids)]
        self.kept.append(Kept(list(ids), salt, copied, size))
        while sum(each.size for each in self.kept) > self.tokens:
            del self.kept[0]

    def clear(self) -> None:
        self.kept.clear()


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@torch.inference_mode()
def why_not_reused(model: Any) -> str:
    """Why a text that goes on from a kept one does not get this model's own logits; "" if it does."""
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rotary, *rotary.values()) if isinstance(each, dict)}
    if changing := kinds & {"dynamic", "longrope"}:
        return f"its positions ({changing.pop()}) change with the length of a text"
    text = [3, 5, 7, 4, 6, 8, 5]
    try:
        device = model.device
        cache = DynamicCache(config=model.config)
        check_layers(cache)
        model(input_ids=torch.tensor([text[:4]], device=device), past_key_values=cache, use_cache=True)
        cache = beginning(cache, 3 if can_go_back(cache) else 4)
        known = cache.get_seq_length()
        given = {"past_key_values": cache, "use_cache": True}
        rest = model(input_ids=torch.tensor([text[known:]], device=device), **given).logits[0, -1]
        wanted = model(input_ids=torch.tensor([text], device=device)).logits[0, -1]
    except Exception as error:  # whatever a model that is built otherwise says to this
        return f"{type(error).__name__}: {error}".splitlines()[0]
    off = disagreement(rest, wanted)
    return f"a text that goes on gets other logits than one that is read whole ({off:.2g})" if off else ""
