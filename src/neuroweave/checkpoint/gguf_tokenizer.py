"""The tokenizer that a GGUF file describes, as a Hugging Face fast tokenizer.

transformers has a conversion of its own; it ignores `tokenizer.ggml.pre` values such as `smollm`, and before 5.20 it
loses Gemma's special tokens. So the vocabulary classes are taken from transformers and the rest is built here from
llama.cpp's rules (llama-vocab.cpp).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # ggml token types
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # spelled so in the format
    "cls_token": "tokenizer.ggml.cls_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}

# What cuts the text before byte-level merges, by `tokenizer.ggml.pre`
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"\p{N}" + _CASED_REST
_GPT4O = _CASED % ((r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",) * 2) + r"\p{N}{1,3}" + _CASED_REST
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_SPLITS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "modern-bert", "trillion",
     "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "a.x-4.0", "granite-docling", "roberta-bpe"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "minerva"): (_DIGIT, _GPT2),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "dbrx",
     "smaug-bpe", "chatglm-bpe", "glm4"): (_LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"): (_QWEN2,),
    ("qwen35",): (_QWEN35,),
    ("tekken",): (_TEKKEN,),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): (_GPT4O,),
    ("falcon",): _FALCON,
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): _DEEPSEEK3,
    ("deepseek-coder",): _DEEPSEEK_CODER,
    ("bloom", "poro-chat", "gpt3-finnish"): (_BLOOM,),
    ("viking",): (_BLOOM, _DIGIT),
}  # fmt: skip
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {name: splits for names, splits in _SPLITS.items() for name in names}


@dataclass(frozen=True)
class GGUFTokenizer:
    """A tokenizer and what belongs into `tokenizer_config.json` and `chat_template.jinja` beside it."""

    backend: Tokenizer
    config: dict[str, Any]
    chat_template: str | None

    def save(self, folder: Path) -> None:
        """Write the three files, so that AutoTokenizer of any transformers since 4.43 reads them."""
        self.backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if self.chat_template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def gguf_tokenizer(metadata: dict[str, Any]) -> GGUFTokenizer:
    """The file's vocabulary, merges, special tokens, chat template and length as a fast tokenizer.

    Raises ValueError for a vocabulary or a pre-tokenizer that is not known: a guess would cut text wrongly in silence.
    """
    kind, architecture = metadata.get("tokenizer.ggml.model"), metadata["general.architecture"]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("the GGUF file has no tokenizer (no tokenizer.ggml.tokens)")
    is_gemma = architecture.startswith("gemma")
    try:
        if kind == "gpt2":
            backend = _byte_level(metadata)
        elif kind in ("llama", "gemma4"):
            backend = _gemma(metadata, scored=kind == "gemma4") if is_gemma else _sentencepiece(metadata)
        elif kind == "t5":
            backend = _unigram(metadata)
        else:
            raise ValueError(f"tokenizer.ggml.model {kind!r} is not known; known are gpt2, llama, gemma4 and t5")
    except Exception as error:
        if type(error) is not Exception:  # what the tokenizers library raises for merges that do not fit
            raise
        raise ValueError(
            f"the GGUF file's vocabulary and merges do not fit together ({error}); is it damaged?"
        ) from error
    _add_marked_tokens(backend, metadata)
    special = {name: tokens[metadata[key]] for name, key in _SPECIAL_TOKENS.items() if _is_token(metadata, key)}
    _set_template(backend, metadata, special)
    length = metadata.get(f"{architecture}.context_length")
    config: dict[str, Any] = {
        **special,
        **({"model_max_length": length} if length else {}),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left" if is_gemma else "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return GGUFTokenizer(backend, config, metadata.get("tokenizer.chat_template"))


def token_ids(metadata: dict[str, Any]) -> dict[str, int | list[int]]:
    """The token ids of a generation config: bos, pad, and eos with the end of turn and of message where given."""
    ids: dict[str, int | list[int]] = {}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if _is_token(metadata, f"tokenizer.ggml.{key}_token_id"):
            ids[name] = metadata[f"tokenizer.ggml.{key}_token_id"]
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(metadata[key] for key in keys if _is_token(metadata, key)))
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return ids


def _is_token(metadata: dict[str, Any], key: str) -> bool:
    value = metadata.get(key)
    return isinstance(value, int) and 0 <= value < len(metadata.get("tokenizer.ggml.tokens", ()))


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre {pre!r} is not known, so text would be cut wrongly; known: {', '.join(PRE_TOKENIZERS)}"
        )
    spelling = bytes_to_unicode()
    alphabet = set(spelling.values())
    marked = _marked(metadata)
    vocabulary = {
        token
        if index in marked or set(token) <= alphabet
        else "".join(spelling[byte] for byte in token.encode()): index
        for index, token in enumerate(metadata["tokenizer.ggml.tokens"])
    }
    merges: Any = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    splits = PRE_TOKENIZERS[pre]
    cutters: list[Any]
    if splits == (_GPT2,):
        cutters = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif splits == (_DIGIT, _GPT2):  # the published tokenizers of this family are written so
        cutters = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        cutters = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
        cutters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = cutters[0] if len(cutters) == 1 else pre_tokenizers.Sequence(cutters)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    from tokenizers import normalizers
    from transformers import LlamaTokenizer

    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    merges = _merges(metadata, vocabulary, metadata.get("tokenizer.ggml.scores"))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=prefix, **_named(metadata))
    backend: Any = tokenizer.backend_tokenizer
    if metadata["general.architecture"] == "phi3":  # its prefix space comes from a normalizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return backend


def _gemma(metadata: dict[str, Any], *, scored: bool) -> Tokenizer:
    """Gemma's byte-pair vocabulary: runs of spaces are written with the mark, merges rank by position in the list."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = [
        "▁" * len(token) if " " in token and not token.strip() else token for token in metadata["tokenizer.ggml.tokens"]
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if scored or metadata.get("tokenizer.ggml.merges"):
        merges = _merges(
            metadata | {"tokenizer.ggml.tokens": tokens}, vocabulary, metadata.get("tokenizer.ggml.scores")
        )
    else:
        merges = [
            (token[:cut], token[cut:])
            for token in tokens
            for cut in range(len(token) - 1, 0, -1)
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
    unknown = _named(metadata).get("unk_token", "<unk>")
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, unk_token=unknown, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _unigram(metadata: dict[str, Any]) -> Tokenizer:
    from transformers import T5Tokenizer

    tokens = list(metadata["tokenizer.ggml.tokens"])
    blanks = [index for index, token in enumerate(tokens) if token.startswith("[PAD") and token.endswith("]")]
    for offset, index in enumerate(blanks[:100]):  # the file's name for T5's <extra_id_99> to <extra_id_0>
        tokens[index] = f"<extra_id_{99 - offset}>"
    tokenizer: Any = T5Tokenizer(vocab=list(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True)))
    return tokenizer.backend_tokenizer


def _named(metadata: dict[str, Any]) -> dict[str, str]:
    tokens = metadata["tokenizer.ggml.tokens"]
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {name: tokens[metadata[key]] for name in names if _is_token(metadata, key := _SPECIAL_TOKENS[name])}


def _merges(metadata: dict[str, Any], vocabulary: dict[str, int], ranks: list[float] | None) -> Any:
    """The file's merges, or those that its vocabulary implies, best rank first."""
    from transformers.tokenization_utils_base import generate_merges

    if metadata.get("tokenizer.ggml.merges"):
        return [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    if ranks is None:
        raise ValueError("the GGUF file has neither tokenizer.ggml.merges nor tokenizer.ggml.scores")
    return generate_merges(vocabulary, dict(zip(metadata["tokenizer.ggml.tokens"], ranks, strict=True)))


def _marked(metadata: dict[str, Any]) -> dict[int, bool]:
    """Token id to whether it is special, for tokens that are matched whole."""
    types = metadata.get("tokenizer.ggml.token_type") or []
    return {index: kind == _CONTROL for index, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}


def _add_marked_tokens(backend: Tokenizer, metadata: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    present = backend.get_vocab(with_added_tokens=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    added = [
        AddedToken(tokens[index], normalized=False, special=special)
        for index, special in _marked(metadata).items()
        if tokens[index] in present
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def _set_template(backend: Tokenizer, metadata: dict[str, Any], special: dict[str, str]) -> None:
    """Let encoding add bos and eos where the file says so; without a word, a sentencepiece vocabulary gets its bos."""
    from tokenizers import processors

    kind = metadata.get("tokenizer.ggml.model")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and kind != "gemma4"
    bos = special.get("bos_token") if add_bos else None
    eos = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", kind == "t5") else None
    if not (bos or eos) and kind == "gpt2":
        return  # its post-processor is already the right one
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    template = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, backend.token_to_id(name)) for name in (bos, eos) if name]
    )
    is_byte_level = kind == "gpt2"
    backend.post_processor = (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template]) if is_byte_level else template
    )
