"""The files of a tokenizer that exists, with more tokens in all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.header import read_json
from neuroweave.checkpoint.loading import load_tokenizer
from neuroweave.training.tokenizer_forms import USER_DEFINED, fuzz_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
_TEXTS = 200  # on which the old and the new tokenizer are compared


def check_added(source: Path, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[str, int]:
    """The numbers that new tokens get: those after the last one. Raises ValueError for tokens that cannot be added."""
    if not (source / "tokenizer.json").is_file():
        raise ValueError(
            f"{source}: no tokenizer.json; save one first: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    if not tokens:
        raise ValueError("no tokens to add; name at least one")
    known = tokenizer.get_vocab()
    for token in tokens:
        if not token.strip() or not _is_unicode(token):
            raise ValueError(f"token {token!r}: blank, or not Unicode; give text")
        if token in known:
            raise ValueError(f"token {token!r}: the tokenizer has it already (number {known[token]})")
        if tokens.count(token) > 1:
            raise ValueError(f"token {token!r}: named twice")
    first = max(known.values()) + 1
    return {token: number for number, token in enumerate(tokens, start=first)}


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def extend_tokenizer_files(source: Path, folder: Path, numbers: dict[str, int], *, special: bool) -> list[str]:
    """Add tokens to the tokenizer's files, copies of those of `source`, in `folder`; returns notes for a person.

    Raises ValueError when the result, loaded, gives other numbers, or reads old text in another way.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken(token, special=special, **_FLAGS) for token in numbers])
    backend.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            content = read_json(folder / name, what="tokenizer's file")
            _EXTEND[name](content, numbers, special)
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    notes = _extend_sentencepiece(folder / "tokenizer.model", numbers)
    _compare(load_tokenizer(source), load_tokenizer(folder), numbers)
    return notes


def _extend_config(content: dict[str, Any], numbers: dict[str, int], special: bool) -> None:
    if isinstance(decoder := content.get("added_tokens_decoder"), dict):
        for token, number in numbers.items():
            decoder[str(number)] = {"content": token, **_FLAGS, "special": special}
    if special:
        names = ("extra_special_tokens", "additional_special_tokens")
        name = next((name for name in names if isinstance(content.get(name), list)), names[1])
        content[name] = [*(content.get(name) or []), *numbers]


def _extend_map(content: dict[str, Any], numbers: dict[str, int], special: bool) -> None:
    if special:
        content["additional_special_tokens"] = [*content.get("additional_special_tokens", []), *numbers]


def _extend_added(content: dict[str, Any], numbers: dict[str, int], special: bool) -> None:
    content.update(numbers)


_EXTEND = {
    "tokenizer_config.json": _extend_config,
    "special_tokens_map.json": _extend_map,
    "added_tokens.json": _extend_added,
}


def _extend_sentencepiece(path: Path, numbers: dict[str, int]) -> list[str]:
    """Append the tokens as user-defined symbols, where their numbers are the next ones there too."""
    if not path.is_file():
        return []
    try:
        from neuroweave.training.tokenizer_forms import read_model

        model = read_model(path.read_bytes())
    except ImportError:
        return ["tokenizer.model is as it was: adding to it needs sentencepiece (pip install 'neuroweave[train]')"]
    if len(model.pieces) != min(numbers.values()):
        return ["tokenizer.model is as it was: its numbers end before those of the new tokens"]
    for token in numbers:
        model.pieces.add(piece=token, score=0.0, type=USER_DEFINED)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return []


def _compare(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, numbers: dict[str, int]) -> None:
    for token, number in numbers.items():
        if number not in after.encode(f"a {token} b", add_special_tokens=False):
            raise ValueError(f"token {token!r}: the tokenizer does not find it in a text; choose another one")
    for text in fuzz_texts((), (), count=_TEXTS, seed=0):
        if not any(token in text for token in numbers) and before.encode(text) != after.encode(text):
            raise ValueError(f"with the new tokens the tokenizer reads {json.dumps(text)} in another way")
