"""Train a tokenizer with sentencepiece and write it in every form that others read."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.staging import check_output, staged_folder
from neuroweave.training.sources import Source, source_files, source_kind
from neuroweave.training.text_sample import DEFAULT_SAMPLE_BYTES, TextSample, sample_text
from neuroweave.training.tokenizer_forms import (
    NORMAL,
    SPACE,
    UNIGRAM,
    disagreement,
    fast_form,
    fuzz_texts,
    read_model,
    symbol_flags,
)
from neuroweave.training.tokenizer_names import (
    CHATML_TOKENS,
    END,
    PADDING,
    START,
    UNKNOWN,
    check_names,
    read_template,
)

MODELS = ("bpe", "unigram")
NORMALIZATIONS = ("identity", "nfkc")
CHARACTER_COVERAGE = 0.9995  # of the text's characters that get a token of their own; the others become bytes
_ASCII = "".join(map(chr, range(0x21, 0x7F)))  # always in the alphabet
_THREADS = 16  # sentencepiece's default; unigram scores depend on it, so it does not follow the machine
_GRID = 8  # unigram scores are multiples of 1 / 8: see tokenizer_forms
_CONTROLS = (*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F)  # what nmt_nfkc removes too
_FUZZ = 3_000


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was written. `tokens`: its special and whole tokens with their numbers; `read`, `used`: bytes of text."""

    folder: str
    model: str
    vocab_size: int
    normalization: str
    tokens: dict[str, int]
    documents: int
    read: int
    used: int
    bytes_per_token: float
    checked: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_tokenizer(
    out: str | Path,
    sources: Sequence[Source],
    *,
    vocab_size: int,
    model: str = "bpe",
    normalization: str = "identity",
    special: Sequence[str] = (),
    tokens: Sequence[str] = (),
    chat_template: str | Path | None = None,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TrainedTokenizer:
    """Write a tokenizer of `vocab_size` tokens, all included, into the folder `out`, whole or not at all.

    `special`: tokens that decoding can skip; `tokens`: found whole in a text like these, but kept. `chat_template`:
    "chatml" (adds its two special tokens), a file with a Jinja template, or None. `sample_bytes`: of more text only so
    much is used. The same text and options give the same bytes. Raises ValueError for bad names, text that cannot be
    read, and a vocabulary that is too small or too large for the text.
    """
    _require_packages()
    if model not in MODELS or normalization not in NORMALIZATIONS:
        raise ValueError(f"model {model!r}, normalization {normalization!r}: choose from {MODELS}, {NORMALIZATIONS}")
    template = read_template(chat_template)
    if chat_template == "chatml":
        special = [*special, *(token for token in CHATML_TOKENS if token not in special)]
    check_names([*special, *tokens], normalization=normalization)
    files = [file for source in sources for file in source_files(source, source_kind(source))]
    check_output(out, overwrite=overwrite, sources=files)
    sample = sample_text(sources, limit=sample_bytes, progress=progress)
    symbols = [START, END, PADDING, *special, *tokens]
    proto = _finish(_train(sample.chunks, vocab_size, model, normalization, symbols), symbols)
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == NORMAL]
    with staged_folder(out, overwrite=overwrite, sources=files) as folder:
        write_forms(folder, proto, special=[START, END, PADDING, *special], symbols=symbols, template=template)
        texts = [
            *sample.chunks[:: max(1, len(sample.chunks) // 200)],
            *fuzz_texts(pieces, symbols, count=_FUZZ, seed=0),
        ]
        if problem := disagreement(folder, texts, exact=normalization == "identity"):
            raise ValueError(f"{out}: not written: {problem}; please report it with the options and the text")
        rate = _bytes_per_token(folder, sample)
    return TrainedTokenizer(
        folder=str(out),
        model=model,
        vocab_size=len(proto.pieces),
        normalization=normalization,
        tokens={UNKNOWN: 0, **{symbol: number for number, symbol in enumerate(symbols, start=1)}},
        documents=sample.documents,
        read=sample.read,
        used=sample.used,
        bytes_per_token=rate,
        checked=len(texts),
    )


# -------------------------------------------------------------------------------------------------------------- checks


def _require_packages() -> None:
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if missing:
        raise ValueError(f"training a tokenizer needs {', '.join(missing)}: pip install 'neuroweave[train]'")


def _is_installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------------------ training


def _train(chunks: Iterable[str], vocab_size: int, model: str, normalization: str, symbols: Sequence[str]) -> Any:
    """What sentencepiece makes of the text, as a ModelProto."""
    import sentencepiece

    content = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="ascii") as rules:
        given: dict[str, Any] = {"normalization_rule_name": "identity"}
        if normalization == "nfkc":
            rules.write(character_rules())
            rules.flush()
            given = {"normalization_rule_tsv": rules.name}
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(chunks), model_writer=content, model_type=model, vocab_size=vocab_size,
                character_coverage=CHARACTER_COVERAGE, required_chars=_ASCII, user_defined_symbols=list(symbols),
                unk_id=0, bos_id=1, eos_id=2, pad_id=3, unk_piece=UNKNOWN, bos_piece=START, eos_piece=END,
                pad_piece=PADDING, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
                add_dummy_prefix=False, remove_extra_whitespaces=False, max_sentence_length=1 << 20,
                num_threads=_THREADS, minloglevel=2, **given,
            )  # fmt: skip
        except RuntimeError as error:
            raise _explained(error, vocab_size, len(symbols)) from error
    return read_model(content.getvalue())


def _explained(error: RuntimeError, vocab_size: int, symbols: int) -> ValueError:
    """sentencepiece's complaint about the size, in our words."""
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        least = int(match[1])
        return ValueError(
            f"a vocabulary of {vocab_size} is too small: {symbols + 1} special tokens, 256 bytes and an alphabet of "
            f"{least - symbols - 257} characters are {least}; give more than that"
        )
    if match := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
        return ValueError(
            f"a vocabulary of {vocab_size} is more than this text can give; the largest possible is {match[1]}"
        )
    if "sentences_.empty()" in str(error):
        return ValueError("there is no text to train on; give text with words in it")
    return ValueError(f"sentencepiece could not train on this text: {error}")


def character_rules() -> str:
    """Rules for sentencepiece: each character becomes its NFKC form, control characters other than tab and newline go.

    nmt_nfkc itself also composes what several characters are, which tokenizers cannot do as sentencepiece does.
    """
    rules = {}
    for code in range(1, sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000 and (form := unicodedata.normalize("NFKC", chr(code))) != chr(code):
            rules[code] = form
    rules |= dict.fromkeys(_CONTROLS, "")
    lines = (f"{code:X}\t{' '.join(f'{ord(letter):X}' for letter in form)}\n" for code, form in sorted(rules.items()))
    return "".join(lines)


def _finish(proto: Any, symbols: Sequence[str]) -> Any:
    """The model with scores under which both forms agree, and without a trace of where it was trained."""
    normal = [piece for piece in proto.pieces if piece.type == NORMAL]
    if proto.trainer_spec.model_type == UNIGRAM:
        for piece in normal:  # well below the -0.1 that sentencepiece gives to a user-defined symbol
            piece.score = min(round(piece.score * _GRID) / _GRID, -2 / _GRID)
        _keep_symbols_whole(proto, symbols)
    else:
        for number, piece in enumerate(normal):
            piece.score = -float(number)
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    return proto


def _keep_symbols_whole(proto: Any, symbols: Sequence[str]) -> None:
    """Let no piece that runs over the edge of a symbol score as much as its part outside: then the symbol wins."""
    import sentencepiece

    crossing = [
        (piece, outside)
        for piece in proto.pieces
        if piece.type == NORMAL
        for symbol in symbols
        for count in range(1, min(len(symbol), len(piece.piece)))
        for outside in (
            *([piece.piece[:-count]] if piece.piece.endswith(symbol[:count]) else []),
            *([piece.piece[count:]] if piece.piece.startswith(symbol[-count:]) else []),
        )
    ]
    if not crossing:
        return
    scores = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for piece, outside in sorted(crossing, key=lambda pair: len(pair[1])):
        best = sum(scores.get_score(number) for number in scores.encode(outside.replace(SPACE, " ")))
        piece.score = min(piece.score, best - 1 / _GRID)


# ------------------------------------------------------------------------------------------------------------- writing


def write_forms(
    folder: Path, proto: Any, *, special: Sequence[str], symbols: Sequence[str], template: str | None
) -> None:
    """Write the files of a tokenizer: what sentencepiece, tokenizers and transformers (4 and 5) read.

    `<unk>` has a number but is not declared: with byte tokens nothing is unknown, and transformers would find it in
    texts, which sentencepiece does not.
    """
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    fast_form(proto, special=special).save(str(folder / "tokenizer.json"))
    named = {"bos_token": START, "eos_token": END, "pad_token": PADDING}
    more = [token for token in special if token not in named.values()]
    numbers = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    flags = symbol_flags(proto)
    entries = {symbol: {"content": symbol, **flags, "special": symbol in special} for symbol in symbols}
    whole = {symbol: {"__type": "AddedToken", **entry} for symbol, entry in entries.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: whole[token] for name, token in named.items()},
        "additional_special_tokens": [whole[token] for token in more],
        "added_tokens_decoder": {str(numbers[symbol]): entry for symbol, entry in entries.items()},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", named | ({"additional_special_tokens": more} if more else {}))
    write_json(folder / "added_tokens.json", {symbol: numbers[symbol] for symbol in symbols})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes_per_token(folder: Path, sample: TextSample) -> float:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    some = sample.chunks[:: max(1, len(sample.chunks) // 1000)]
    return sum(len(chunk.encode()) for chunk in some) / max(1, sum(len(processor.encode(chunk)) for chunk in some))
