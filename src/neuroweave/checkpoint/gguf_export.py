"""Write a checkpoint folder as one GGUF file, by the conventions of llama.cpp's convert_hf_to_gguf.py.

llama.cpp knows an architecture by name: its graph, its activation and its attention are fixed there. So what the file
cannot say, and llama.cpp would therefore compute otherwise, is refused. Tensors pass one at a time.
https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.gguf import import_gguf
from neuroweave.checkpoint.gguf_tokenizer import gguf_tokenizer
from neuroweave.checkpoint.reader import Checkpoint, read_config
from neuroweave.checkpoint.sealed import KEY, MODEL_TYPE, unseal
from neuroweave.checkpoint.staging import check_free_space

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
Progress = Callable[[int, int], None]  # bytes written, bytes in all
_CHUNK_ELEMENTS = 1 << 20  # quantizing needs several temporaries of this size
_HEADER_ROOM = 1 << 20
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # ggml token types
_GEMMA_PERIOD = 6  # llama.cpp: every sixth layer of gemma3 attends to everything
_GEMMA_27B_LAYERS = 62  # llama.cpp goes by this number of layers, and then scales attention by the model's width
_STORED = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of a model type: the architecture's name, its activation under the names that mean it, and
    what the file must change: `permuted` query and key rows, `shifted` norms. `biases`: projections that may have one.
    """

    architecture: str
    activations: tuple[str, ...] = ("silu", "swish")
    permuted: bool = False
    shifted: bool = False
    biases: tuple[str, ...] = ()


_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": Family("llama", permuted=True, biases=_ATTENTION + _MLP),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2", biases=_ATTENTION[:3]),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", ("gelu_pytorch_tanh", "gelu_tanh", "gelu_new"), shifted=True),
}

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


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote. `bytes` counts the file; `notes`: what llama.cpp does otherwise, and what that means."""

    output: str
    architecture: str
    type: str
    parameters: int
    tensors: int
    bytes: int
    pre: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: its shape in torch order, a ggml type, its size, and what gives its float32 values."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    nbytes: int
    values: Callable[[], np.ndarray]


def export_gguf(
    source: str | Path, out: str | Path, *, type: str = "q8_0", force: bool = False, progress: Progress | None = None
) -> ExportResult:
    """Write the checkpoint folder `source` as the file `out`, which appears whole or not at all.

    `type`: one of `TYPES`, of matrices; vectors are float32. Raises ValueError for what llama.cpp cannot run, for a
    folder that lacks something, for an `out` that exists (unless `force`), and when the disk fails.
    """
    if type not in TYPES:
        raise ValueError(f"type {type!r} is not known; choose from {', '.join(TYPES)}")
    folder, out = Path(source), Path(out)
    _check_file(out, force=force)
    with Checkpoint(folder) as checkpoint:
        config, family = open_config(folder)
        metadata, notes = model_metadata(folder, config, family)
        planned = _plan(checkpoint, config, family, type)
        rows = next(tensor.shape[0] for tensor in planned if tensor.name == "token_embd.weight")
        metadata |= tokenizer_metadata(folder, config, family, rows)
        metadata["general.file_type"] = int(import_gguf().LlamaFileType[TYPES[type]])
        check_free_space(out.parent, sum(tensor.nbytes for tensor in planned) + _HEADER_ROOM + len(str(metadata)))
        with _staged_file(out, force=force) as staged:
            _write(staged, family.architecture, metadata, planned, progress)
            size = staged.stat().st_size
    parameters = sum(prod(tensor.shape) for tensor in planned)
    pre = metadata.get("tokenizer.ggml.pre", "")
    return ExportResult(str(out), family.architecture, type, parameters, len(planned), size, pre, notes)


# What llama.cpp can run


def open_config(folder: Path) -> tuple[PreTrainedConfig, Family]:
    """The checkpoint's configuration and family. Raises ValueError when llama.cpp has no graph that computes it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = read_config(folder)
    is_patched = content.get("model_type") == MODEL_TYPE
    plain = unseal(content) if is_patched else content
    family = FAMILIES.get(str(plain.get("model_type")))
    if family is None:
        raise ValueError(
            f"{folder}: model type {plain.get('model_type')!r} cannot be exported; known are {', '.join(FAMILIES)}"
        )
    if "quantization_config" in plain:
        raise ValueError(f"{folder}: quantized weights cannot be exported; give the checkpoint before quantization")
    name = "hidden_activation" if family.shifted else "hidden_act"
    config = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
    if is_patched and _patched_away(folder, content[KEY], family, config.num_hidden_layers):
        setattr(config, name, family.activations[0])
    activation = getattr(config, name)
    if activation not in family.activations:
        raise ValueError(
            f"{folder}: {name} is {activation!r}; llama.cpp's graph for {family.architecture!r} always computes "
            f"{family.activations[0]}, so the model cannot run there; use transformers"
        )
    _refuse_unknown_settings(folder, config, family)
    return config, family


def _patched_away(folder: Path, entry: dict[str, Any], family: Family, layers: int) -> bool:
    """Whether the patch puts llama.cpp's own activation into every MLP. Raises ValueError when it puts in another."""
    foreign: dict[str, None] = {}
    changed: set[int] = set()
    for edit in entry.get("plan", []):
        activation = edit.get("activation")
        if edit.get("op") == "activation" and edit.get("site") == ["mlp"] and activation in family.activations:
            changed.update(edit.get("layers", []))
            continue
        where = ", ".join(edit.get("site", [])) or edit.get("path", "a module")
        found = [edit[key] for key in ("activation", "before") if edit.get(key)]
        found += [part["activation"] for part in edit.get("after", [])]
        foreign |= {f"{name if isinstance(name, str) else json.dumps(name)} ({where})": None for name in found}
    if foreign:
        raise ValueError(
            f"{folder}: patched with {', '.join(foreign)}; llama.cpp has no such activation there: its graph for "
            f"{family.architecture!r} always computes {family.activations[0]}; export the unpatched model, or run this "
            "one with transformers"
        )
    return changed == set(range(layers))


def _refuse_unknown_settings(folder: Path, config: PreTrainedConfig, family: Family) -> None:
    def refuse(what: str, reason: str) -> None:
        raise ValueError(f"{folder}: {what}; {reason}; llama.cpp would compute another model, so use transformers")

    for key in ("partial_rotary_factor", "attn_logit_softcapping", "use_bidirectional_attention"):
        value = getattr(config, key, None)
        if value not in (None, False, 1, 1.0):
            refuse(f"{key} is {value}", f"the graph for {family.architecture!r} has no place for it")
    if not family.shifted:
        return
    kinds = [
        "full_attention" if (i + 1) % _GEMMA_PERIOD == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if config.layer_types != kinds:
        refuse("layer_types differ", f"in 'gemma3' every {_GEMMA_PERIOD}th layer is full_attention, the others sliding")
    wide = config.num_hidden_layers == _GEMMA_27B_LAYERS
    scalar = config.hidden_size / config.num_attention_heads if wide else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        refuse(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}", f"this size of 'gemma3' has {scalar:g}")


# Metadata


def model_metadata(folder: Path, config: PreTrainedConfig, family: Family) -> tuple[dict[str, Any], list[str]]:
    """Key to value of all that is no tokenizer, and notes. Integers become uint32, floats float32."""
    gguf = import_gguf()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(full["rope_theta"]),
    } | _rope_scaling(folder, config, full)
    notes = []
    window = getattr(config, "sliding_window", None)
    if family.shifted:
        values["attention.sliding_window"] = window
        values["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    elif window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        notes.append(f"{family.architecture} in llama.cpp has no sliding window: texts beyond {window} tokens differ")
    general = {
        "general.type": "model",
        "general.name": folder.resolve().name,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return general | {f"{family.architecture}.{key}": value for key, value in values.items()}, notes


def _rope_scaling(folder: Path, config: PreTrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # llama3 is a tensor of factors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    odd = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    if kind != "yarn" or odd:
        detail = f" with {', '.join(odd)}" if odd else ""
        raise ValueError(
            f"{folder}: rope type {kind!r}{detail} cannot be exported; known are default, linear, llama3 and plain yarn"
        )
    extra = {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if rope.get(key)}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return extra | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": original,
    }


def _rope_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """By what llama3's rule divides each rotary frequency, or None for another rule."""
    import numpy as np

    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)


# Tokenizer


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


# Tensors


def _plan(checkpoint: Checkpoint, config: PreTrainedConfig, family: Family, type: str) -> list[_Planned]:
    """The file's tensors. Raises ValueError when the checkpoint's are not those of the configuration."""
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture.upper()], config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    expected = _expected_shapes(config)
    stored = [name for name in checkpoint if not name.endswith("rotary_emb.inv_freq")]
    own = [name for name in stored if not (tied and name == "lm_head.weight")]
    if missing := [name for name in expected if name not in checkpoint and not (tied and name == "lm_head.weight")]:
        raise ValueError(
            f"{checkpoint.folder}: tensor {missing[0]!r} is missing ({len(missing)} in all); fetch it again"
        )
    planned = []
    factors = _rope_factors(config)
    if factors is not None:
        planned.append(_planned("rope_freqs.weight", factors.shape, type, tied, lambda: factors))
    for name in own:
        tensor, target = checkpoint[name], names.get_name(name, (".weight", ".bias"))
        where = f"{checkpoint.folder}: tensor {name!r}"
        if target is None or name not in expected or _has_no_bias(name, family):
            raise ValueError(f"{where} has no place in llama.cpp's {family.architecture!r}; it cannot be exported")
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{where} has shape {list(tensor.shape)}, the configuration implies {list(expected[name])}"
            )
        if tensor.dtype not in _STORED:
            raise ValueError(f"{where} is stored as {tensor.dtype}; expected one of {', '.join(_STORED)}")
        planned.append(_planned(target, tensor.shape, type, tied, _reader(checkpoint, name, config, family)))
    return planned


def _expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _has_no_bias(name: str, family: Family) -> bool:
    return name.endswith(".bias") and name.split(".")[-2] not in family.biases


def _planned(name: str, shape: tuple[int, ...], type: str, tied: bool, values: Callable[[], np.ndarray]) -> _Planned:
    """With the type that is stored: vectors in float32; q4_0 keeps what gives the logits in q8_0; rows that do not fill
    blocks in f16."""
    gguf = import_gguf()
    if type == "q4_0" and name == ("token_embd.weight" if tied else "output.weight"):
        type = "q8_0"
    kind = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else type.upper()]
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return _Planned(name, tuple(shape), kind, prod(shape) // per_block * block_bytes, values)


def _reader(checkpoint: Checkpoint, name: str, config: PreTrainedConfig, family: Family) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        import numpy as np

        values = checkpoint.read_numpy(name).astype(np.float32, copy=False)
        projection = name.split(".")[-2]
        if family.permuted and projection in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
            return interleaved(values, heads)
        return values + np.float32(1) if family.shifted and name.endswith("norm.weight") else values

    return read


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered from (first half, second half) to pairs: llama.cpp rotates neighbours."""
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def encode(tensor: _Planned) -> np.ndarray:
    """The tensor's values as its type stores them. Raises ValueError for values that float16 cannot hold."""
    import numpy as np

    gguf = import_gguf()
    values = tensor.values()
    table = values.reshape(-1, values.shape[-1])
    step = max(1, _CHUNK_ELEMENTS // table.shape[1])
    parts = []
    for start in range(0, len(table), step):
        block = table[start : start + step]
        with np.errstate(over="ignore"):
            parts.append(gguf.quants.quantize(block, tensor.kind))
        if tensor.kind.name == "F16" and np.isinf(parts[-1]).any() and np.isfinite(block).all():
            raise ValueError(f"tensor {tensor.name!r} has values beyond what float16 holds; choose bf16 or f32")
    return np.concatenate(parts)


# Writing


def _check_file(out: Path, *, force: bool) -> None:
    if out.suffix != ".gguf":
        raise ValueError(f"{out}: expected a file name that ends in .gguf")
    if out.is_dir():
        raise ValueError(f"{out}: the output is a folder; give a file name that ends in .gguf")
    if (out.exists() or out.is_symlink()) and not force:
        raise ValueError(f"{out}: the output exists; choose another name, or add --force")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.absolute().parent}; make it first")


@contextmanager
def _staged_file(out: Path, *, force: bool) -> Iterator[Path]:
    """A hidden sibling to write, which becomes `out` when the block ends well and is removed when it does not."""
    staged = out.with_name(f".{out.name}.neuroweave-partial-{secrets.token_hex(4)}")
    try:
        yield staged
        if out.exists() and not force:
            raise ValueError(f"{out}: a file of this name appeared meanwhile; nothing was changed")
        os.replace(staged, out)
    except OSError as error:
        raise ValueError(
            f"{out}: could not be written ({error}); make room or choose another place, and run it again"
        ) from error
    finally:
        staged.unlink(missing_ok=True)


def _write(
    path: Path, architecture: str, metadata: dict[str, Any], planned: list[_Planned], progress: Progress | None
) -> None:
    import numpy as np

    writer = import_gguf().GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in planned:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.nbytes for tensor in planned)
        for tensor in planned:
            writer.write_tensor_data(encode(tensor))
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
