"""A tokenizer as the metadata of a GGUF file; what `gguf_tokenizer` reads, written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.gguf_families import Family
from neuroweave.checkpoint.gguf_tokenizer import gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # ggml token types

# `tokenizer.ggml.pre` to whether llama.cpp then takes a whole piece that is a token before it merges. One name for each
# way to cut text that the import knows; two where both ways exist.
PRE_CANDIDATES = {
    "gpt-2": False, "smollm": False, "llama-bpe": True, "dbrx": False, "qwen2": False, "qwen35": False, "tekken": True,
    "gpt-4o": False, "falcon": False, "deepseek-v3": False, "deepseek-coder": False, "bloom": False, "viking": False,
}  # fmt: skip
PROBE = (
    "Hello world, it's 1987! They'll SAY WE'VE 3 33 333 3333 33333 3.14 1,000,000 \n\n \n\t\ttab  two   three \r\n"
    "def f(x):\n    return x**2  # comment\n iPhone HTMLParser aBcD naïve ÜNÏ ЁЖ нещо 東京天気 カタカナ สวัสดี नमस्ते កាន់ "
    "🚀😶 ✅ ½ ²³ ٣٤ ①② ------==== ''''``` \"\"...!!!??? <a/b> $x+y| 'RE 'tis don\u2019t \u00a0\u2003end 12a 7th "
)


def tokenizer_metadata(folder: Path, config: PreTrainedConfig, family: Family, rows: int) -> dict[str, Any]:
    """The folder's tokenizer for an embedding of `rows` tokens; missing ones are filled up as unused.

    Raises ValueError unless the tokenizer that the import makes of it cuts `PROBE` into the same tokens.
    """
    tokenizer = _load_tokenizer(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{folder}: a tokenizer of type {model['type']} cannot be exported; known is BPE")
    tokens, types = _tokens(folder, tokenizer, backend, rows)
    values: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        values |= {"model": "llama", "pre": "default", "scores": _scores(folder, tokens, types, model["merges"])}
        pieces = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens
        values["add_space_prefix"] = pieces[0].startswith("▁")
        values["tokens"] = [
            token.replace("▁", " ") if kind == _USER_DEFINED else token
            for token, kind in zip(tokens, types, strict=True)
        ]
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        values |= {"model": "gpt2", "pre": choose_pre(folder, tokenizer, backend, types), "merges": merges}
    values |= _special_ids(folder, tokenizer, config)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        metadata["tokenizer.chat_template"] = template
    again = gguf_tokenizer(metadata | {"general.architecture": family.architecture}).backend
    if again.encode(PROBE).ids != tokenizer.backend_tokenizer.encode(PROBE).ids:
        raise ValueError(f"{folder}: the tokenizer cuts text in a way that a GGUF file cannot say; nothing was written")
    return metadata


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """`tokenizer.json` as it is; without it, what transformers makes of the folder."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        reader: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        tokenizer = reader.from_pretrained(folder)
    except Exception as error:  # whatever the libraries raise for missing and damaged files
        raise ValueError(
            f"{folder}: no tokenizer can be read here ({error}); add tokenizer.json and tokenizer_config.json"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{folder}: the tokenizer has no fast form; add tokenizer.json")
    return tokenizer


def _tokens(
    folder: Path, tokenizer: PreTrainedTokenizerBase, backend: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    if names and max(names) >= rows:
        raise ValueError(f"{folder}: the tokenizer has token {max(names)}, the embedding {rows} rows; they do not fit")
    added = {entry["id"]: _CONTROL if entry["special"] else _USER_DEFINED for entry in backend["added_tokens"]}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [added.get(index, _NORMAL if index in names else _UNUSED) for index in range(rows)]
    if backend["model"].get("byte_fallback"):
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[index] = _BYTE
        if (unknown := tokenizer.unk_token_id) is not None:
            types[unknown] = _UNKNOWN
    return tokens, types


def _scores(folder: Path, tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    """Scores by which llama.cpp, which joins the neighbours that make the best token, merges in the same order.

    Raises ValueError when there are none: merges that are not those of a sentencepiece vocabulary.
    """
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    made = ["".join(pair) for pair in pairs]
    order = list(dict.fromkeys(made))
    known, mergeable = set(pairs), set(order) | {token for token in tokens if len(token) == 1}
    contiguous = sum(left != right for left, right in itertools.pairwise(made)) == max(0, len(order) - 1)
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL]
    implied = (
        (token[:cut], token[cut:])
        for token in normal
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    )
    if not contiguous or any(pair not in known for pair in implied):
        raise ValueError(
            f"{folder}: the tokenizer's merges are not those of a sentencepiece vocabulary, and llama.cpp would merge "
            "otherwise; it cannot be exported"
        )
    ranks = {token: -float(rank) for rank, token in enumerate(order)}
    return [ranks.get(token, -float(len(order))) for token in tokens]


def choose_pre(folder: Path, tokenizer: PreTrainedTokenizerBase, backend: dict[str, Any], types: list[int]) -> str:
    """The `tokenizer.ggml.pre` whose rule cuts `PROBE` where the tokenizer does. Raises ValueError when none does."""
    if (backend["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # llama.cpp normalizes nothing; NFC text is usual
        raise ValueError(
            f"{folder}: the tokenizer normalizes text, which llama.cpp does not for byte-level vocabularies"
        )
    cutter = tokenizer.backend_tokenizer.pre_tokenizer
    wanted = cutter.pre_tokenize_str(PROBE) if cutter else None
    stub = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]}
    fitting = []
    for name in PRE_CANDIDATES:
        rule: Any = gguf_tokenizer(stub | {"tokenizer.ggml.pre": name}).backend.pre_tokenizer
        if rule.pre_tokenize_str(PROBE) == wanted:
            fitting.append(name)
    whole = bool(backend["model"].get("ignore_merges"))
    exact = [name for name in fitting if PRE_CANDIDATES[name] == whole]
    if exact or (fitting and _merges_reach_all(tokenizer, backend, types)):
        return (exact or fitting)[0]
    raise ValueError(
        f"{folder}: the tokenizer cuts text before merging in a way that no known tokenizer.ggml.pre stands for; "
        f"tried {', '.join(PRE_CANDIDATES)}"
    )


def _merges_reach_all(tokenizer: PreTrainedTokenizerBase, backend: dict[str, Any], types: list[int]) -> bool:
    """Whether merging makes every token, so that taking whole pieces first changes nothing."""
    from tokenizers import Tokenizer

    merging: Any = Tokenizer.from_str(json.dumps(backend | {"model": backend["model"] | {"ignore_merges": False}}))
    plain = (token for token, index in tokenizer.get_vocab().items() if types[index] == _NORMAL)
    return all(len(merging.model.tokenize(token)) == 1 for token in plain)


def _special_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
    ids = {written: getattr(tokenizer, f"{name}_token_id", None) for name, written in names.items()}
    for name in ("bos", "eos"):
        stated = getattr(config, f"{name}_token_id", None)
        if ids[name] is None and isinstance(stated, int):
            ids[name] = stated
    ids["eot"], ids["eom"] = [*_other_ends(folder, ids["eos"]), None, None][:2]
    encode = tokenizer.backend_tokenizer.encode
    bare, whole = encode("a", add_special_tokens=False).ids, encode("a").ids
    before, after = whole[: -len(bare) or None], []
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            before, after = whole[:start], whole[start + len(bare) :]
            break
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise ValueError(f"{folder}: the tokenizer puts {before} before and {after} after a text; only bos and eos fit")
    written = {f"{name}_token_id": index for name, index in ids.items() if index is not None}
    return written | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _other_ends(folder: Path, eos: int | None) -> list[int]:
    """Ids beside eos that end a text, of the generation config."""
    path = folder / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return [end for end in ends if end != eos] if isinstance(ends, list) else []
