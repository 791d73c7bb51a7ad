"""Caches of transformers whose rows are texts of different lengths: rows join, leave, and end at the same column.

A shorter text is filled up on the left, where the attention mask is 0. A layer that keeps a window keeps the window's
last columns; the states of convolutions have no columns to fill. Letters: B rows, H heads, T columns, D head size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

AGREES, AGREES_IN_HALF = 1e-3, 5e-2  # of the spread of the logits: how far a text may be from the same one read alone


def join(cache: DynamicCache, new: DynamicCache) -> None:
    """Put the rows of `new` after those of `cache`. Raises ValueError for a kind of layer that is not known here."""
    check_layers(cache)
    columns = max(cache.get_seq_length(), new.get_seq_length())
    for ours, theirs in zip(cache.layers, new.layers, strict=True):
        mine: Any = ours
        other: Any = theirs
        if isinstance(mine, LinearAttentionCacheLayerMixin):
            for states in ("conv_states", "recurrent_states"):
                kept = getattr(mine, states)
                for index, state in getattr(other, states).items():
                    if state is not None:
                        kept[index] = torch.cat((kept[index], state))
        if isinstance(mine, DynamicLayer) and mine.is_initialized:
            held = columns
            if isinstance(mine, DynamicSlidingWindowLayer):
                mine.cumulative_length = columns
                held = min(columns, mine.sliding_window - 1)
            mine.keys, mine.values = (
                torch.cat((filled(a, held), filled(b, held)))
                for a, b in ((mine.keys, other.keys), (mine.values, other.values))
            )


def keep(cache: DynamicCache, rows: Sequence[int], *, drop: int) -> None:
    """Keep these rows alone, without the first `drop` columns, which are filling in all of them."""
    index = torch.tensor(list(rows), dtype=torch.long)
    for layer in cache.layers:
        each: Any = layer
        if isinstance(each, LinearAttentionCacheLayerMixin):
            for states in (each.conv_states, each.recurrent_states):
                for number, state in states.items():
                    if state is not None:
                        states[number] = state[index.to(state.device)]
        if isinstance(each, DynamicLayer) and each.is_initialized:
            keys: Any = each.keys
            held = keys.shape[-2] - drop
            if isinstance(each, DynamicSlidingWindowLayer):
                each.cumulative_length -= drop
                held = min(each.cumulative_length, each.sliding_window - 1)
            values: Any = each.values
            first, place = keys.shape[-2] - held, index.to(keys.device)
            each.keys, each.values = (kept[..., first:, :][place] for kept in (keys, values))


def row_of(cache: DynamicCache, row: int, *, drop: int) -> DynamicCache:
    """A cache of its own for one row, without the first `drop` columns, which are filling."""
    found = twin(cache)
    keep(found, [row], drop=drop)
    return found


def twin(cache: DynamicCache) -> DynamicCache:
    """Another cache, so far of the same tensors."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    return found


def size_in_tokens(cache: DynamicCache) -> float:
    """What a one-row cache takes in memory, in columns of its attention; states of convolutions count as well. Infinite
    where there is no attention."""
    column = held = 0
    for layer in cache.layers:
        each: Any = layer
        if isinstance(each, DynamicLayer) and each.is_initialized:
            keys_and_values: tuple[Any, ...] = (each.keys, each.values)
            column += sum(states[..., :1, :].numel() for states in keys_and_values)
            held += sum(states.numel() for states in keys_and_values)
        if isinstance(each, LinearAttentionCacheLayerMixin):
            all_states: tuple[Any, ...] = (*each.conv_states.values(), *each.recurrent_states.values())
            held += sum(state.numel() for state in all_states if state is not None)
    return held / column if column else math.inf


def can_go_back(cache: DynamicCache) -> bool:
    """Whether every layer still has all columns, so that the cache of any beginning is a part of it."""
    return all(
        isinstance(layer, DynamicLayer)
        and not isinstance(layer, LinearAttentionCacheLayerMixin)
        and layer.is_initialized
        and (layer.keys is not None and layer.keys.shape[-2] == layer.get_seq_length())
        for layer in cache.layers
    )


def beginning(cache: DynamicCache, columns: int) -> DynamicCache:
    """A copy of a one-row cache, of its first columns alone; see `can_go_back`."""
    if columns == cache.get_seq_length():
        return row_of(cache, 0, drop=0)
    found = twin(cache)
    for layer in found.layers:
        each: Any = layer
        each.keys, each.values = (kept[..., :columns, :].clone() for kept in (each.keys, each.values))
        if isinstance(each, DynamicSlidingWindowLayer):
            each.cumulative_length = columns
    return found


def disagreement(found: Tensor, wanted: Tensor) -> float:
    """How far logits are off, of their spread; 0 within what the model's precision explains."""
    limit = AGREES if wanted.dtype in (torch.float32, torch.float64) else AGREES_IN_HALF
    wanted = wanted.float()
    off = float((found.float() - wanted).abs().max() / wanted.std().clamp_min(1e-12))
    return 0.0 if off <= limit else off


def filled(states_BHTD: Any, columns: int) -> Tensor:
    return pad(states_BHTD, (0, 0, columns - states_BHTD.shape[-2], 0))


def check_layers(cache: DynamicCache) -> None:
    """Raise ValueError for a cache that holds more than is known here."""
    for layer in cache.layers:
        known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not known and not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(f"texts of different lengths cannot share a {type(layer).__name__}")
