"""Add tokens to a model that exists: its tokenizer learns them, its embedding and head get rows for them.

Shards are rewritten block by block, the model is never loaded. A new row is the mean of the rows that the tokenizer's
tokens have, so that the new logit is the mean logit and old ones keep their order and nearly their probabilities
(Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html); transformers' resize_token_embeddings draws around the
same mean. Or it is the mean of the rows of the pieces that the token was cut into so far.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from neuroweave.checkpoint.copying import link_or_copy
from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.loading import check_source, load_tokenizer
from neuroweave.checkpoint.manifest import MANIFEST_FILE
from neuroweave.checkpoint.reader import INDEX_FILE, WEIGHT_FILES, Checkpoint, numpy_dtype, read_config
from neuroweave.checkpoint.sealed import KEY, unseal
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.checkpoint.writer import Shard, ShardWriter, write_index
from neuroweave.training.tokenizer_files import check_added, extend_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START = ("mean", "pieces")
_BLOCK_BYTES = 1 << 24
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class AddedTokens:
    """What was written. `tokens`: the new ones with their numbers; `rows_before`, `rows`: of the embedding; `grown`:
    tensors that changed; `left_out`: files that do not fit the new weights; `notes`: what a person should know."""

    folder: str
    tokens: dict[str, int]
    rows_before: int
    rows: int
    grown: list[str]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_tokens(
    source: str | Path,
    out: str | Path,
    tokens: Sequence[str],
    *,
    special: bool = False,
    start: Literal["mean", "pieces"] = "mean",
    overwrite: bool = False,
) -> AddedTokens:
    """Write `out`: the checkpoint `source` (a folder) whose tokenizer finds `tokens` whole in a text.

    `special`: decoding can skip them. Rows that no token uses so far are used first; then the tensors grow. Everything
    else is as it was, byte for byte: other weights, so the logits of the old tokens too. Raises ValueError for tokens
    that are there already, and a model or tokenizer that cannot be extended.
    """
    source = Path(source)
    check_source(source)
    if not source.is_dir():
        raise ValueError(f"{source}: not a folder; fetch the model first: neuroweave import {source} DIR")
    if start not in START:
        raise ValueError(f"start {start!r} is not known; choose from {', '.join(START)}")
    check_output(out, overwrite=overwrite, sources=[source])
    tokenizer = load_tokenizer(source)
    numbers = check_added(source, tokenizer, tokens)
    config = read_config(source)
    with Checkpoint(source) as checkpoint:
        per_token = vocabulary_tensors(source, config, checkpoint)
        rows_before = checkpoint[per_token[0]].shape[0]
        rows = max(rows_before, max(numbers.values()) + 1)
        pieces = _pieces(tokenizer, tokens) if start == "pieces" else {}
        used = _used_rows(tokenizer, rows_before)
        new = {name: new_rows(checkpoint, name, used, numbers, pieces, rows) for name in per_token}
        with staged_folder(out, overwrite=overwrite, sources=[source]) as folder:
            write_shards(checkpoint, folder, new, rows)
            left_out = _copy_other_files(checkpoint, folder)
            notes = extend_tokenizer_files(source, folder, numbers, special=special)
            text = (source / "config.json").read_text(encoding="utf-8")
            (folder / "config.json").write_text(with_vocabulary(text, rows_before, rows), encoding="utf-8")
    return AddedTokens(str(out), numbers, rows_before, rows, per_token, left_out, notes)


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[str, list[int]]:
    return {token: tokenizer.encode(token, add_special_tokens=False) for token in tokens}


def _used_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> np.ndarray:
    used = np.zeros(rows, dtype=bool)
    numbers = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
    used[numbers[numbers < rows]] = True
    return used


# ---------------------------------------------------------------------------------------------------- which tensors


def vocabulary_tensors(source: Path, config: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """The stored tensors with a row for each token, the embedding first: those whose shape follows `vocab_size`.

    Raises ValueError when the configuration and the shards do not fit, or the rows are no floating-point numbers.
    """
    plain = unseal(config) if KEY in config else config
    vocabulary = _text_config(plain).get("vocab_size")
    if not isinstance(vocabulary, int):
        raise ValueError(f"{source}: config.json has no vocab_size; only a language model can get tokens")
    now, prefix, embedding, tied = _shapes(source, plain, vocabulary)
    more = _shapes(source, plain, vocabulary + 1)[0]
    found = []
    for name in sorted((name for name in now if now[name] != more[name]), key=lambda name: name != embedding):
        if more[name] != (now[name][0] + 1, *now[name][1:]):
            raise ValueError(f"{source}: {name} of shape {list(now[name])} cannot grow by rows; this model cannot")
        stored = _stored_name(name, prefix, checkpoint)
        if stored is None:
            if name in tied:
                continue
            raise ValueError(f"{source}: no shard holds {name}, which config.json asks for; a file may be missing")
        if checkpoint[stored].shape != now[name]:
            raise ValueError(
                f"{source}: {stored} has shape {list(checkpoint[stored].shape)}, config.json asks for {list(now[name])}"
            )
        if checkpoint[stored].dtype not in _FLOATS:
            raise ValueError(f"{source}: {stored} is stored as {checkpoint[stored].dtype}; only floats can get rows")
        if stored not in found:
            found.append(stored)
    if not found:
        raise ValueError(f"{source}: no tensor follows vocab_size; this model cannot get tokens")
    return found


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "vocab_size" in inner else config


def _shapes(
    source: Path, plain: dict[str, Any], vocabulary: int
) -> tuple[dict[str, tuple[int, ...]], str, str, set[str]]:
    """Shapes of the model's parameters at a size of the vocabulary; its prefix; its embedding; names that are tied."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = str(plain.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{source}: model_type {kind!r} is not known to transformers or neuroweave")
    fields = json.loads(json.dumps(plain))
    _text_config(fields)["vocab_size"] = vocabulary
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(fields))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{source}: no causal language model can be built from config.json: {error}") from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight = model.get_input_embeddings().weight
    embedding = next(name for name, parameter in parameters.items() if parameter is weight)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return shapes, model.base_model_prefix, embedding, set(getattr(model, "all_tied_weights_keys", None) or {})


def _stored_name(name: str, prefix: str, checkpoint: Checkpoint) -> str | None:
    """Under which name the checkpoint holds a parameter: with or without the base model's prefix, or by its end."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in checkpoint:
            return candidate
    end = "." + ".".join(name.split(".")[-2:])
    similar = [stored for stored in checkpoint if f".{stored}".endswith(end)]
    return similar[0] if len(similar) == 1 else None


# ------------------------------------------------------------------------------------------------------------- rows


def new_rows(
    checkpoint: Checkpoint,
    name: str,
    used: np.ndarray,
    numbers: dict[str, int],
    pieces: dict[str, list[int]],
    rows: int,
) -> dict[int, bytes]:
    """Row number -> bytes, for each new token and each number below `rows` that had no row. Means are in float64."""
    tensor = checkpoint[name]
    dtype = numpy_dtype(tensor.dtype, name)
    before = tensor.shape[0]
    mean = _mean(checkpoint, name, used)
    if not np.isfinite(mean).all():
        raise ValueError(f"{name}: the mean of its rows is not finite; is the checkpoint damaged?")

    def row(token: str) -> np.ndarray:
        known = [number for number in pieces.get(token, ()) if number < before]
        if not known:
            return mean
        taken = [checkpoint.read_numpy(name, slice(number, number + 1)).astype(np.float64)[0] for number in known]
        return np.asarray(np.mean(taken, axis=0))

    values = dict.fromkeys(range(before, rows), mean) | {at: row(token) for token, at in numbers.items()}
    return {number: np.asarray(value).astype(dtype).tobytes() for number, value in values.items()}


def _mean(checkpoint: Checkpoint, name: str, used: np.ndarray) -> np.ndarray:
    """The mean of the rows that `used` marks, float64."""
    shape = checkpoint[name].shape
    total = np.zeros(shape[1:])
    step = max(1, _BLOCK_BYTES // max(1, _row_bytes(checkpoint[name])))
    for begin in range(0, shape[0], step):
        block = checkpoint.read_numpy(name, slice(begin, begin + step))
        total += block[used[begin : begin + step]].astype(np.float64).sum(axis=0)
    return np.asarray(total / max(1, int(used.sum())))


def _row_bytes(tensor: TensorSpec) -> int:
    return TensorSpec("", tensor.dtype, tensor.shape[1:]).nbytes


# ---------------------------------------------------------------------------------------------------------- writing


def write_shards(checkpoint: Checkpoint, folder: Path, new: dict[str, dict[int, bytes]], rows: int) -> None:
    """Put every shard into the folder: linked where nothing changes in it, else written anew with `rows` rows."""
    changed = {checkpoint[name].file for name in new}
    check_free_space(
        folder,
        sum((checkpoint.folder / file).stat().st_size for file in changed)
        + sum(len(row) for by_number in new.values() for row in by_number.values()),
    )
    for file, header in checkpoint.shards.items():
        if file not in changed:
            link_or_copy(checkpoint.folder / file, folder / file, copy=False)
            continue
        entries = sorted(header.tensors.values(), key=lambda entry: (entry.begin, entry.end))
        specs = tuple(
            TensorSpec(each.name, each.dtype, (rows, *each.shape[1:]) if each.name in new else each.shape)
            for each in entries
        )
        with ShardWriter(folder, [Shard(file, specs, header.metadata)]) as writer:
            for spec in specs:
                _write_tensor(checkpoint, writer, spec, new.get(spec.name, {}))
    if checkpoint.index is not None:
        grown = {name: rows - checkpoint[name].shape[0] for name in new}
        more_bytes = sum(count * _row_bytes(checkpoint[name]) for name, count in grown.items())
        more = sum(count * int(np.prod(checkpoint[name].shape[1:])) for name, count in grown.items())
        write_index(
            folder / INDEX_FILE,
            checkpoint.index["weight_map"],
            checkpoint.nbytes + more_bytes,
            checkpoint.parameters + more,
        )


def _write_tensor(checkpoint: Checkpoint, writer: ShardWriter, spec: TensorSpec, new: dict[int, bytes]) -> None:
    """Copy a tensor in blocks of whole rows, with the rows in `new` in their place."""
    old = checkpoint[spec.name]
    row = _row_bytes(old) if new else 1
    block = max(1, _BLOCK_BYTES // max(1, row)) * row
    for begin in range(0, old.nbytes, block):
        end = min(begin + block, old.nbytes)
        data = checkpoint.read_bytes(spec.name, begin, end)
        for number, content in new.items():
            if begin <= number * row < end:
                data[number * row - begin : (number + 1) * row - begin] = content
        writer.write_at(spec.name, begin, data)
    for number in range(old.nbytes // row, spec.nbytes // row):
        writer.write_at(spec.name, number * row, new[number])


def _copy_other_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy what is neither weights nor config; returns what would be wrong beside the new weights and stays behind."""
    left_out = []
    for name in checkpoint.other_files:
        if name.endswith(WEIGHT_FILES) or name == MANIFEST_FILE:
            left_out.append(name)
        elif name != "config.json":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, folder / name)
    return left_out


def with_vocabulary(text: str, before: int, rows: int) -> str:
    """The content of config.json with another size of the vocabulary; nothing else changes where that is possible."""
    if rows == before:
        return text
    wanted = json.loads(text)
    for owner in (wanted, _text_config(wanted)):
        if owner.get("vocab_size") == before:
            owner["vocab_size"] = rows
    changed = re.sub(rf'("vocab_size"\s*:\s*){before}\b', rf"\g<1>{rows}", text)
    return changed if json.loads(changed) == wanted else json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
