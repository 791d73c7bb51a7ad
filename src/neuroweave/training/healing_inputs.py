"""What goes into a heal, checked before a model is loaded: two folders that belong together, and text in windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from neuroweave.checkpoint.loading import check_source, check_weights
from neuroweave.checkpoint.sealed import KEY
from neuroweave.text.tokens import NamedText, start_tokens

SHAPES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
HELD_OUT = 1 / 12  # of the documents


def check_pair(patched: Path, teacher: Path, *, window: int) -> None:
    """Raise ValueError when a folder is no sound checkpoint, or configs or tokenizers say that they are no pair."""
    for source in (patched, teacher):
        check_source(source)
        check_weights(source)
    configs = [AutoConfig.from_pretrained(source) for source in (patched, teacher)]
    if not hasattr(configs[0], KEY):
        raise ValueError(f"{patched}: not a patched model; heal brings a patched one back to what it was")
    ours, theirs = (config.get_text_config(decoder=True) for config in configs)
    for name in SHAPES:
        if getattr(ours, name, None) != getattr(theirs, name, None):
            raise ValueError(
                f"{patched}: {name} is {getattr(ours, name, None)}, the teacher's is {getattr(theirs, name, None)}; "
                f"the teacher is the model before the patch"
            )
    context = getattr(theirs, "max_position_embeddings", None)
    if isinstance(context, int) and window > context:
        raise ValueError(f"a window of {window} tokens; this model reads {context} at most")


def check_tokenizers(patched: Path, ours: PreTrainedTokenizerBase | None, theirs: PreTrainedTokenizerBase) -> None:
    """Raise ValueError when the patched folder's own tokenizer gives words other numbers than the teacher's."""
    if ours is not None and ours.get_vocab() != theirs.get_vocab():
        raise ValueError(f"{patched}: its tokenizer is not the teacher's; the same text would be other tokens to each")


@dataclass(frozen=True)
class Split:
    """Windows of token ids [R, T]: those to train on, and those of other documents, held out for the early stop."""

    training: Int[Tensor, "R T"]
    held_out: Int[Tensor, "H T"]
    documents: int
    held_out_documents: int


def split_windows(
    documents: Sequence[NamedText], tokenizer: PreTrainedTokenizerBase, *, window: int, held_out_tokens: int
) -> Split:
    """Every document that fills a window, cut into windows; some of the documents held out.

    The documents with the smallest SHA-256 of their text are held out, one in twelve and at least one; of them some
    `held_out_tokens`, evenly spread; a text that comes twice is on one side. Raises ValueError for fewer than two.
    """
    if window < 2:
        raise ValueError(f"a window of {window} tokens predicts nothing; give 2 or more")
    texts = {hashlib.sha256(each.text.encode("utf-8", "surrogatepass")).hexdigest(): each.text for each in documents}
    cut = {key: document_windows(texts[key], tokenizer, window=window) for key in sorted(texts)}
    whole = [windows for windows in cut.values() if len(windows)]
    if len(whole) < 2:
        raise ValueError(
            f"{len(whole)} of {len(texts)} different documents fill a window of {window} tokens; heal needs two, one "
            f"to train on and one to hold out; give more text, or a smaller --window"
        )
    aside = max(1, round(HELD_OUT * len(whole)))
    held_out = torch.cat(whole[:aside])
    count = max(1, min(len(held_out), held_out_tokens // window))
    spread = torch.linspace(0, len(held_out) - 1, count).round().long()
    return Split(torch.cat(whole[aside:]), held_out[spread], len(whole) - aside, aside)


def document_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, window: int) -> Int[Tensor, "R T"]:
    """The whole of a document in as few windows as hold it, evenly spaced, so that neighbours overlap a little.

    Each begins with the tokenizer's start token, where it puts one. None for a document that is shorter than a window.
    """
    start = list(start_tokens(tokenizer))
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    body = window - len(start)
    if body < 1 or len(ids) < body:
        return torch.empty((0, window), dtype=torch.int64)
    count = -(-len(ids) // body)
    spread = torch.linspace(0, len(ids) - body, count).round().long().tolist()
    return torch.tensor([start + ids[at : at + body] for at in spread])
