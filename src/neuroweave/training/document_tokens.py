"""Documents as token ids: those that the tokenizer gives, in batches through its Rust threads, without warnings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neuroweave.text.tokens import start_tokens
from neuroweave.training.document_reading import TextDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1 << 20  # characters that are tokenised at once; the ids of a batch take some 100 bytes a token meanwhile


class DocumentTokens:
    """Token ids of documents: a start token where the tokenizer puts one before a text, the text, an end token.

    A tokenizer's own truncation and padding are left out. Raises ValueError when there is no end token to add.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, end_of_document: bool = True) -> None:
        if end_of_document and tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {tokenizer_name(tokenizer)}: it has no end token to put between documents; "
                "give it one (eos_token), or set end_of_document: false"
            )
        self._tokenizer, self._backend = tokenizer, _plain_backend(tokenizer)
        self._start = list(start_tokens(tokenizer))
        self._end = [tokenizer.eos_token_id] if end_of_document else []

    def encode(self, documents: Sequence[TextDocument]) -> list[np.ndarray]:
        """The ids of each document, int64; of one that has none (spaces, to some tokenizers) an empty array."""
        texts = [document.text for document in documents]
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            found: Iterable[list[int]] = (encoding.ids for encoding in encodings)
        else:
            found = (self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
        arrays = []
        for document, ids in zip(documents, found, strict=True):
            start = self._start if document.starts else []
            end = self._end if document.ends else []
            arrays.append(np.array([*start, *ids, *end] if ids else [], dtype=np.int64))
        return arrays


def batches(documents: Iterable[TextDocument], *, size: int = BATCH) -> Iterator[list[TextDocument]]:
    """`documents` in lists of about `size` characters."""
    batch: list[TextDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id that the tokenizer can give."""
    return max(max(tokenizer.get_vocab().values(), default=0), len(tokenizer) - 1)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase, *, chats: bool = False) -> str:
    """Of all that decides which ids a text becomes; with `chats`, of the chat template too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    else:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    special = [list(start_tokens(tokenizer)), tokenizer.eos_token_id, tokenizer.bos_token, tokenizer.eos_token]
    template = tokenizer.chat_template if chats else None
    text = json.dumps([content, special, template], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where it was loaded from, or its class."""
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the fast tokenizer that neither truncates nor pads; None for a tokenizer in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy
