"""Convert a published NeuroBLAST checkpoint to this layout, or back, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.loading import check_source
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.staging import check_free_space, staged_folder
from neuroweave.checkpoint.writer import Shard, ShardWriter
from neuroweave.neuroblast.configuration import NEUROBLAST_FILE, WITHOUT_EFFECT, NeuroBlastConfig, build_configuration
from neuroweave.neuroblast.weight_map import (
    check_tied_head,
    dead_weights,
    from_published,
    layout_of,
    misfits,
    published_shape,
    tensor_shapes,
    to_published,
)

LAYOUTS = ("neuroweave", "published")
PUBLISHED_ARCHITECTURE = "NeuroBLASTForCausalLM"
# What the published model computes whatever its configuration says: (field, value).
FIXED_IN_PUBLISHED = (
    ("bridges", True),
    ("alternating_rotary", True),
    ("convolutions", True),
    ("max_dilation", 8),
    ("use_sliding_window", False),
)


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote. `dead`: weights of the published kernels that were not zero and met no data, now left
    out; `left_out`: files of the source that did not come along."""

    folder: Path
    layout: str
    tensors: int
    parameters: int
    dead: int
    left_out: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def convert(source: str | Path, out: str | Path, *, to: str = "neuroweave", overwrite: bool = False) -> Converted:
    """Write the checkpoint folder `source` into `out` in the layout `to`; dtypes and all other files stay.

    Raises ValueError, before anything is written, for a checkpoint that is not a NeuroBLAST model, has missing or
    extra tensors, is in that layout already, or (to the published layout) says what the published model ignores.
    """
    if to not in LAYOUTS:
        raise ValueError(f"layout {to!r} is not known; choose from {', '.join(LAYOUTS)}")
    source = Path(source)
    check_source(source)
    with Checkpoint(source) as checkpoint:
        stored_config = checkpoint.config()
        config = read_configuration(source, stored_config)
        shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
        layout = layout_of(shapes)
        if layout == to and any(name.endswith(".conv.weight") for name in shapes):
            raise ValueError(f"{source}: is in the {to} layout already")
        if wrong := misfits(shapes, config, layout):
            raise ValueError(f"{source}: {'; '.join(wrong)}")
        if to == "published":
            refuse_unpublishable(source, config)
        check_tied_head(checkpoint, config)
        shards = plan_conversion(checkpoint, config, to)
        with staged_folder(out, overwrite=overwrite, sources=[source]) as folder:
            check_free_space(folder, sum(tensor.nbytes for shard in shards for tensor in shard.tensors))
            left_out = place_files(checkpoint, folder, to)
            write_configuration(folder, config, stored_config, to)
            dead = write_tensors(checkpoint, folder, shards, to)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return Converted(Path(out), to, len(tensors), sum(tensor.parameters for tensor in tensors), dead, left_out)


def read_configuration(source: Path, stored: dict[str, Any]) -> NeuroBlastConfig:
    """The configuration in a folder. Raises ValueError for another kind of model."""
    if stored.get("model_type") != NeuroBlastConfig.model_type:
        raise ValueError(f"{source}: model_type is {stored.get('model_type')!r}, expected 'neuroblast'")
    plain = {key: value for key, value in stored.items() if key not in WITHOUT_EFFECT}
    try:
        return build_configuration(plain)
    except ValueError as error:
        raise ValueError(f"{source / 'config.json'}: {error}") from error


def refuse_unpublishable(source: Path, config: NeuroBlastConfig) -> None:
    for field, value in FIXED_IN_PUBLISHED:
        if getattr(config, field) != value:
            raise ValueError(
                f"{source}: {field} is {getattr(config, field)}, which the published model would ignore; "
                f"only {field} {value} can be published"
            )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{source}: rotary scaling {kind!r}, which the published model would ignore")


def plan_conversion(checkpoint: Checkpoint, config: NeuroBlastConfig, to: str) -> list[Shard]:
    """The files to write: the source's, with each tensor's shape in the new layout."""
    shapes = tensor_shapes(config)
    planned = []
    for file, header in checkpoint.shards.items():
        tensors = [
            TensorSpec(name, entry.dtype, published_shape(name, shapes[name]) if to == "published" else shapes[name])
            for name, entry in header.tensors.items()
            if name in shapes
        ]
        if tensors:
            planned.append(Shard(file, tuple(tensors), header.metadata or {"format": "pt"}))
    return planned


def write_tensors(checkpoint: Checkpoint, folder: Path, shards: list[Shard], to: str) -> int:
    """Write every tensor in its new layout; return how many dead weights were left out."""
    dead = 0
    with ShardWriter(folder, shards) as writer:
        for name in writer.weight_map:
            array = checkpoint.read_numpy(name)
            if to == "published":
                writer.write(name, to_published(name, from_published(name, array)))
            else:
                dead += dead_weights(name, array)
                writer.write(name, from_published(name, array))
    return dead


def place_files(checkpoint: Checkpoint, folder: Path, to: str) -> list[str]:
    """Copy the tokenizer and whatever else lies there; code for the other layout and other weight files stay behind."""
    left_out = []
    for name in checkpoint.other_files:
        if name == "config.json":
            continue
        if name.endswith((".py", ".bin", ".pt", ".pth", ".safetensors")):
            if not (to == "published" and name == NEUROBLAST_FILE):
                left_out.append(name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, folder / name)
    return left_out


def write_configuration(folder: Path, config: NeuroBlastConfig, stored: dict[str, Any], to: str) -> None:
    if to == "neuroweave":
        config.architectures = ["NeuroBlastForCausalLM"]
        config.save_pretrained(folder)
        return
    published = {key: value for key, value in stored.items() if key not in ("auto_map", "rope_parameters")}
    published |= {
        "architectures": [PUBLISHED_ARCHITECTURE],
        "layer_types": ["full_attention"] * len(config.layer_types or ()),
        "rope_theta": (config.rope_parameters or {}).get("rope_theta", NeuroBlastConfig.default_theta),
        "rope_scaling": None,
    }
    for field, _ in FIXED_IN_PUBLISHED[:4]:
        published.pop(field, None)
    if "dtype" in published:
        published["torch_dtype"] = published.pop("dtype")
    (folder / "config.json").write_text(json.dumps(published, indent=2, sort_keys=True) + "\n", encoding="utf-8")
