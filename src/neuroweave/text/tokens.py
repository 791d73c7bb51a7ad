"""What everything that turns text into windows of tokens shares. Nothing here needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class NamedText(Protocol):
    """Anything with a name and a text, such as a `Document`."""

    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str: ...


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The start token, or nothing where the tokenizer has none or does not put it before a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return (ids[0],) if len(ids) and ids[0] == tokenizer.bos_token_id else ()


def token_ids_sha256(windows: Iterable[Sequence[int]]) -> str:
    """Of the token ids of all windows in order, as little-endian int64."""
    digest = hashlib.sha256()
    for token_ids in windows:
        digest.update(np.asarray(token_ids, dtype="<i8").tobytes())
    return digest.hexdigest()
