"""Turn a GGUF file, a checkpoint folder or a hub id into a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.embedded import embedded_gguf
from neuroweave.checkpoint.folder_source import open_folder
from neuroweave.checkpoint.gguf import GGUFHeader, read_gguf_header
from neuroweave.checkpoint.header import DTYPE_NAMES, TensorSpec
from neuroweave.checkpoint.hub import download, is_hub_id
from neuroweave.checkpoint.reader import list_files, read_config
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.checkpoint.writer import DEFAULT_MAX_SHARD_SIZE, ShardWriter, cast_to, parse_size, plan_shards

if TYPE_CHECKING:
    from neuroweave.checkpoint.gguf_model import GGUFModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED_PREFIX = "embedded:"
Progress = Callable[[int, int], None]  # bytes written, bytes in all
_HEADER_ROOM = 1 << 24  # for headers and the small files, in the check of free space


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote. `bytes` counts tensor data; `left_out` names the source's tensors without a place."""

    source: str
    output: str
    format: str
    model_type: str
    dtype: str
    parameters: int
    bytes: int
    shards: int
    files: list[str]
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportResult:
    """Write `source` as a checkpoint that transformers loads, into the folder `out`, which appears whole or not at all.

    `source`: a GGUF file, a folder with safetensors or `pytorch_model.bin`, a hub id, or `embedded:smollm2` and
    `embedded:gemma3`. `dtype`: one of `DTYPES`; `auto` keeps what is stored, and means float32 for a quantized GGUF
    file. Of a folder every other file comes along unchanged (config.json too, unless the dtype changes).
    Raises ValueError, before anything is written, for bad input; OSError when the disk fails.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; choose from {', '.join(DTYPES)}")
    parse_size(max_shard_size)
    path = _locate(str(source))
    check_output(out, overwrite=overwrite, sources=[path])
    if path.is_dir():
        return _import_folder(str(source), path, Path(out), dtype, max_shard_size, overwrite, progress)
    return _import_gguf(str(source), path, Path(out), dtype, max_shard_size, overwrite, progress)


def _locate(source: str) -> Path:
    if source.startswith(EMBEDDED_PREFIX):
        return embedded_gguf(source.removeprefix(EMBEDDED_PREFIX))
    if is_hub_id(source):
        return download(source)
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"{source}: no such file or folder, and not a hub id of the form owner/name; "
            "give a GGUF file, a checkpoint folder or a hub id"
        )
    return path


def _import_gguf(
    source: str,
    path: Path,
    out: Path,
    dtype: str,
    max_shard_size: int | str,
    overwrite: bool,
    progress: Progress | None,
) -> ImportResult:
    header = read_gguf_header(path)
    if dtype == "auto":
        dtype = "float32" if header.stored_dtype == "float64" else header.stored_dtype

    from neuroweave.checkpoint.gguf_model import open_gguf_model
    from neuroweave.checkpoint.gguf_tokenizer import gguf_tokenizer

    try:
        tokenizer = gguf_tokenizer(header.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model = open_gguf_model(header, dtype=dtype)
    check_free_space(out, sum(spec.nbytes for spec in model.specs) + _HEADER_ROOM)
    with staged_folder(out, overwrite=overwrite, sources=[path]) as folder:
        shards = plan_shards(model.specs, max_shard_size)
        count = _Count(progress, sum(spec.nbytes for spec in model.specs))
        with ShardWriter(folder, shards) as writer:
            for name, tensor in model.tensors():
                writer.write(name, cast_to(tensor, writer.spec(name)))
                count.add(writer.spec(name).nbytes)
        _write_configs(folder, model, header, dtype)
        tokenizer.save(folder)
        _settle(folder)
        files = list_files(folder)
    return _result(source, out, "gguf", model.config.model_type, model.specs, len(shards), files, model.left_out)


def _import_folder(
    source: str,
    path: Path,
    out: Path,
    dtype: str,
    max_shard_size: int | str,
    overwrite: bool,
    progress: Progress | None,
) -> ImportResult:
    config = read_config(path)
    if dtype != "auto" and _quantization(config):
        raise ValueError(
            f"{path}: quantized weights cannot be turned into {dtype}; keep them (--dtype auto), or dequantize first"
        )
    opened = open_folder(path, dtype=dtype)
    try:
        others = [name for name in list_files(path) if name not in opened.files]
        total = sum(spec.nbytes for spec in opened.specs)
        check_free_space(out, total + sum((path / name).stat().st_size for name in others) + _HEADER_ROOM)
        with staged_folder(out, overwrite=overwrite, sources=[path]) as folder:
            shards = plan_shards(opened.specs, max_shard_size)
            count = _Count(progress, total)
            with ShardWriter(folder, shards) as writer:
                for nbytes in opened.stream(writer):
                    count.add(nbytes)
            for name in others:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path / name, folder / name)
            if dtype != "auto":
                changed = _with_dtype(config, dtype)
                if not {"dtype", "torch_dtype"} & changed.keys():
                    changed["dtype"] = dtype
                if changed != config:
                    _write_json(folder / "config.json", changed)
            files = list_files(folder)
    finally:
        opened.close()
    kind = "pytorch" if type(opened).__name__ == "BinSource" else "safetensors"
    return _result(source, out, kind, str(config.get("model_type", "")), opened.specs, len(shards), files, [])


def _write_configs(folder: Path, model: GGUFModel, header: GGUFHeader, dtype: str) -> None:
    from transformers import GenerationConfig

    from neuroweave.checkpoint.gguf_tokenizer import token_ids

    content = json.loads(model.config.to_json_string(use_diff=True))
    for key in ("_model_name_or_path", "_name_or_path", "quantization_config", "unk_token_id"):
        content.pop(key, None)
    content["architectures"] = model.config.architectures
    content["dtype"] = dtype
    _write_json(folder / "config.json", shorten_floats(content))
    GenerationConfig(**token_ids(header.metadata)).save_pretrained(folder)


def shorten_floats(value: Any) -> Any:
    """Floats that are exactly a float32 as the shortest decimal of that float32: 9.999999747378752e-06 is 1e-05."""
    import numpy as np

    if isinstance(value, dict):
        return {key: shorten_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten_floats(item) for item in value]
    if isinstance(value, float) and abs(value) < 3e38 and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with its dtype changed, in its parts (`text_config`) too where they state one."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else (_with_dtype(value, dtype) if isinstance(value, dict) else value)
        for key, value in config.items()
    }


def _quantization(config: dict[str, Any]) -> bool:
    return any("quantization_config" in part for part in (config, *(v for v in config.values() if isinstance(v, dict))))


def _settle(folder: Path) -> None:
    """Give every file the mode of the umask: some libraries write through temporary files of mode 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for name in list_files(folder):
        (folder / name).chmod(mode)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _result(
    source: str, out: Path, kind: str, model_type: str, specs: list[TensorSpec], shards: int, files: list[str],
    left_out: list[str],
) -> ImportResult:  # fmt: skip
    by_dtype: dict[str, int] = {}
    for spec in specs:
        by_dtype[spec.dtype] = by_dtype.get(spec.dtype, 0) + spec.nbytes
    main = max(by_dtype, key=lambda code: by_dtype[code], default="")
    return ImportResult(
        source=source,
        output=str(out),
        format=kind,
        model_type=model_type,
        dtype=DTYPE_NAMES.get(main, main),
        parameters=sum(spec.parameters for spec in specs),
        bytes=sum(spec.nbytes for spec in specs),
        shards=shards,
        files=files,
        left_out=left_out,
    )


class _Count:
    """Adds up bytes and tells them on."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
