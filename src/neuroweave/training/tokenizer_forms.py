"""One tokenizer in two forms, a sentencepiece model and a `tokenizer.json`, that cut every text into the same tokens.

transformers converts a sentencepiece model too; what it makes differs on literal `<0x41>` and `<unk>` in a text, on
equal unigram scores, and on combining characters under a normalisation. Here both forms are made to agree:

- BPE. sentencepiece merges the best piece first, the leftmost of equals. Let symbols p and q stand next to each other
  at some time while a text is encoded. Everything merged so far within them would have been merged in the same order
  if the text had been p + q alone. So a piece only ever comes about by its last merge when encoded alone, and a list of
  merges in the order of the pieces' scores does step by step the same, whatever else it holds.
- Unigram. sentencepiece adds scores in 32 bits, tokenizers in 64. Multiples of 1/8 make both sums exact up to 2^24
  eighths (some 500,000 tokens of one text), and then equal sums are equal in both.
- Special tokens are user-defined symbols: both forms find them in a text, the leftmost and longest first.
- `<unk>` and the byte tokens never match text that happens to be spelled like them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"  # what sentencepiece writes for a space
NORMAL, UNKNOWN, USER_DEFINED, BYTE = 1, 2, 4, 6  # ModelProto.SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
SEPARATOR = "\x01"  # a character that the normalisation removes, so that it can stand between any two
_NEVER = 100.0  # times the worst score: what a token gets that must not match


def read_model(content: bytes) -> Any:
    """The sentencepiece ModelProto in `content`."""
    from sentencepiece import sentencepiece_model_pb2

    made: Any = sentencepiece_model_pb2  # its classes are made at run time
    return made.ModelProto.FromString(content)


def fast_form(model: Any, *, special: Iterable[str]) -> Tokenizer:
    """The tokenizers form of the ModelProto `model`; user-defined symbols in `special` are left out when decoding.

    The model has no dummy prefix and keeps all spaces, has byte tokens, and knows each character of its pieces.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    core: Any = _unigram(model) if model.trainer_spec.model_type == UNIGRAM else _byte_pairs(model)
    tokenizer = Tokenizer(core)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        steps = [*_by_character(charsmap), *steps]
    tokenizer.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    chosen = set(special)
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    flags = symbol_flags(model)
    tokenizer.add_tokens([AddedToken(symbol, special=symbol in chosen, **flags) for symbol in symbols])
    return tokenizer


def symbol_flags(model: Any) -> dict[str, bool]:
    """How tokenizers finds a symbol in a text. sentencepiece looks after the normalisation, which leaves symbols as
    they are but can bring one about (from fullwidth letters): so the normalised text is looked at, where there is one.
    """
    normalized = bool(model.normalizer_spec.precompiled_charsmap)
    return {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def _byte_pairs(model: Any) -> Any:
    from tokenizers import models

    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    known = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    best_first = sorted((piece for piece in model.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    merges = [
        (word[:at], word[at:])
        for word in (piece.piece for piece in best_first)
        for at in range(1, len(word))
        if word[:at] in known and word[at:] in known
    ]
    unknown = model.trainer_spec.unk_piece
    return models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _unigram(model: Any) -> Any:
    from tokenizers import models

    never = _NEVER * min(piece.score for piece in model.pieces if piece.type == NORMAL)
    scored = [(piece.piece, piece.score if piece.type == NORMAL else never) for piece in model.pieces]
    return models.Unigram(scored, unk_id=model.trainer_spec.unk_id, byte_fallback=True)


def _by_character(charsmap: bytes) -> list[Any]:
    """Normalisers that map character by character, as sentencepiece does with rules for single characters.

    tokenizers' `Precompiled` looks at a character with its combining marks and replaces all of it by what the first
    alone becomes; a separator between all characters keeps them apart, and the rules remove it.
    """
    from tokenizers import Regex, normalizers

    between = Regex(r"(?<=[\s\S])(?=[\s\S])")
    return [normalizers.Replace(between, SEPARATOR), normalizers.Precompiled(charsmap)]


# ------------------------------------------------------------------------------------------------------ do they agree?

_RANGES = (
    (0x00, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xEFF), (0x1100, 0x11FF),
    (0x2000, 0x206F), (0x2070, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7FF), (0xE000, 0xF8FF),
    (0xF900, 0xFFFF), (0x10000, 0x10FFFF), (0x1F300, 0x1FAFF), (0xFE00, 0xFE0F),
)  # fmt: skip
_SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2000\u2003\u2009\u200b\u2028\u2029\u202f\u205f\u3000\ufeff\u2581"
_ODD = (
    "\0", "\x01", "\u200d", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e6\U0001f1e8", "e\u0301\u0323",
    "\u05e9\u05c1\u05dc\u05d5\u05dd", "\u202eabc\u202c", "\u0915\u094d\u0937", "\ufb01", "\uff21\u0301", "\ud55c",
    "\u1112\u1161\u11ab", "<unk>", "<0x41>", "<0xE2><0x96><0x81>", "<s", "s>", "\r\n", "\n\n\n", "   ", "0123456789",
)  # fmt: skip


def fuzz_texts(pieces: Sequence[str], symbols: Sequence[str], *, count: int, seed: int) -> Iterator[str]:
    """Texts that are hard on a tokenizer: pieces in a row and repeated, runs of a few characters, all of Unicode (no
    surrogates), spaces of all kinds, special tokens and their halves inside text."""
    draw = random.Random(seed)

    def character() -> str:
        return chr(draw.randint(*draw.choice(_RANGES)))

    def part() -> str:
        kind = draw.random()
        if kind < 0.3 and pieces:
            return draw.choice(pieces) * draw.choice((1, 1, 1, 2, 3, 7))
        if kind < 0.45:
            return draw.choice(_SPACES) * draw.choice((1, 1, 2, 5, 17))
        if kind < 0.6:
            few = [character() for _ in range(draw.randint(1, 3))]
            return "".join(draw.choice(few) for _ in range(draw.randint(1, 20)))
        if kind < 0.7 and symbols:
            symbol = draw.choice(symbols)
            return draw.choice((symbol, symbol, symbol[: len(symbol) // 2], symbol[1:], f"<{symbol}>"))
        if kind < 0.8:
            return draw.choice(_ODD)
        return "".join(character() for _ in range(draw.randint(1, 12)))

    for _ in range(count):
        yield "".join(part() for _ in range(draw.randint(1, 8)))


def disagreement(folder: Path, texts: Iterable[str], *, exact: bool) -> str | None:
    """What is wrong with the first text on which the two forms in `folder` differ, or None.

    The forms are the files, read by sentencepiece and by AutoTokenizer. `exact`: the tokens must also decode to the
    text (U+2581 to a space).
    """
    import sentencepiece
    from transformers import AutoTokenizer

    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(folder)
    backend = fast.backend_tokenizer
    for text in texts:
        tokens = slow.encode(text)
        if backend.encode(text).ids != tokens:
            problem = "the two forms give different tokens"
        elif backend.decode(tokens, skip_special_tokens=False) != (decoded := slow.decode(tokens)):
            problem = "the two forms decode to different texts"
        elif exact and decoded != text.replace(SPACE, " "):
            problem = "the tokens decode to another text"
        else:
            continue
        return f"{problem}: {json.dumps(text)}"
    return None
