"""Patch a checkpoint on disk: the same shards beside a new config; weights are neither loaded nor rewritten."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.conversion_mapping import get_model_conversion_mapping

from neuroweave.activations.mixtures import NeuronMixture
from neuroweave.checkpoint.copying import link_or_copy
from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.loading import check_source
from neuroweave.checkpoint.manifest import fingerprints
from neuroweave.checkpoint.reader import INDEX_FILE, WEIGHT_FILES, Checkpoint
from neuroweave.checkpoint.sealed import KEY, MODELING_FILE, seal
from neuroweave.checkpoint.staging import check_free_space, staged_folder
from neuroweave.checkpoint.writer import Shard, ShardWriter, dtype_code, write_index
from neuroweave.neuroblast.bundle import MODEL_TYPE as NEUROBLAST
from neuroweave.surgery.apply import apply_plan
from neuroweave.surgery.modeling import modeling_source
from neuroweave.surgery.patching import RecipeLike, as_recipe, entry_for, refuse_unpatchable
from neuroweave.surgery.plan import Resolution, resolve


@dataclass(frozen=True)
class PatchedFolder:
    """What `patch_checkpoint` wrote. `linked`, `copied`: shards of the source. `added`: new parameters (mixtures).
    `left_out`: files of the source that hold its weights in another form."""

    folder: Path
    resolution: Resolution
    linked: int
    copied: int
    added: int
    left_out: list[str]


def patch_checkpoint(
    source: str | Path, out: str | Path, recipe: RecipeLike, *, copy: bool = False, overwrite: bool = False
) -> PatchedFolder:
    """Write `out`: the checkpoint `source` (a folder) with the recipe in its config.

    Shards are hard-linked where the file system allows it, else copied; `copy` always copies. Learned mixtures start
    neutral, in one small extra shard. `out` appears whole or not at all. Raises ValueError for a recipe that does not
    fit the model, a source that is not a sound safetensors checkpoint, or an `out` that holds files (`overwrite`).
    """
    source, recipe = Path(source), as_recipe(recipe)
    check_source(source)
    plain = json.loads((source / "config.json").read_text(encoding="utf-8"))
    refuse_config(source, plain)
    with staged_folder(out, overwrite=overwrite, sources=[source]) as folder, Checkpoint(source) as checkpoint:
        config = AutoConfig.from_pretrained(source)
        model_type = type(config).model_type
        model = skeleton(source, config)
        refuse_unpatchable(model)
        refuse_misfit(source, model, checkpoint)
        resolution = resolve(model, recipe)
        entry = entry_for(model, recipe, resolution)
        entry["base"] |= {
            "model_type": model_type,
            "architectures": plain.get("architectures") or [type(model).__name__],
        }
        entry["source"] = {"files": fingerprints(checkpoint)}
        apply_plan(model, resolution.plan)
        added = stored_names(mixture_tensors(model), model, checkpoint)
        if copy:
            check_free_space(folder, sum((source / shard).stat().st_size for shard in checkpoint.shards))
        linked = place_shards(checkpoint, folder, added, copy=copy)
        left_out = place_other_files(checkpoint, folder)
        (folder / "config.json").write_text(
            json.dumps(seal(plain | {KEY: entry}, ACT2CLS), indent=2) + "\n", encoding="utf-8"
        )
        (folder / MODELING_FILE).write_text(modeling_source(model_type), encoding="utf-8")
        total = len(checkpoint.shards)
    parameters = sum(tensor.numel() for tensor in added.values())
    return PatchedFolder(Path(out), resolution, linked, total - linked, parameters, left_out)


def refuse_config(source: Path, plain: dict[str, Any]) -> None:
    if KEY in plain:
        name = plain[KEY].get("recipe", {}).get("name", "?")
        raise ValueError(
            f"{source}: already patched (recipe {name!r}); patch the original, with all changes in one recipe"
        )
    if "auto_map" in plain and plain.get("model_type") != NEUROBLAST:
        raise ValueError(
            f"{source}: the model needs its own remote code; only families that transformers or neuroweave know "
            f"can be patched"
        )


def refuse_misfit(source: Path, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise ValueError when config.json describes another model than the shards hold."""
    wanted = dict(model.named_parameters())
    prefix = "" if has_prefix(model, checkpoint) else f"{model.base_model_prefix}."
    for name, tensor in wanted.items():
        stored = checkpoint.tensors.get(name.removeprefix(prefix))
        if stored is not None and stored.shape != tuple(tensor.shape):
            raise ValueError(
                f"{source}: {name} has shape {list(stored.shape)} in {stored.file}, but config.json asks for "
                f"{list(tensor.shape)}; the two do not belong together"
            )
    if get_model_conversion_mapping(model, add_legacy=False):
        return  # stored under other names, which transformers maps on loading
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in wanted if name not in tied and name.removeprefix(prefix) not in checkpoint]
    if missing:
        raise ValueError(
            f"{source}: config.json asks for {missing[0]} (and {len(missing) - 1} more), which no shard holds; "
            f"the two do not belong together, or a file is missing"
        )


def has_prefix(model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's names carry the base model's prefix (`model.`), as the model's own do."""
    return any(name.startswith(f"{model.base_model_prefix}.") for name in checkpoint)


def skeleton(source: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights (on the meta device): its structure is all that a recipe needs."""
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            named = getattr(transformers, (config.architectures or [""])[0], None)  # text models without an Auto entry
            if named is None or not issubclass(named, PreTrainedModel) or "CausalLM" not in named.__name__:
                raise ValueError(
                    f"{source}: no causal language model can be built from config.json: {error}"
                ) from error
            return named(config)


def mixture_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> start value of every parameter that learned mixtures add."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, NeuronMixture):
            start = torch.zeros(module.gating_logits.shape)
            start[:, module.neutral] = module.start_logit
            tensors[f"{path}.gating_logits"] = start
            if module.beta is not None:
                number: Any = module.members[module.swish].beta
                tensors[f"{path}.beta"] = torch.full(module.beta.shape, 1.0 if number is None else number)
    return tensors


def stored_names(tensors: dict[str, Tensor], model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors under the names of this checkpoint's own convention (with or without the base model's prefix)."""
    if has_prefix(model, checkpoint):
        return tensors
    return {name.removeprefix(f"{model.base_model_prefix}."): tensor for name, tensor in tensors.items()}


def place_shards(checkpoint: Checkpoint, folder: Path, added: dict[str, Tensor], *, copy: bool) -> int:
    """Put the source's shards into the folder, and added tensors in one shard more; returns how many were linked."""
    names = list(checkpoint.shards)
    targets = dict(zip(names, names, strict=True))
    if added:
        total = len(names) + 1
        targets = {name: f"model-{number:05d}-of-{total:05d}.safetensors" for number, name in enumerate(names, 1)}
        extra = f"model-{total:05d}-of-{total:05d}.safetensors"
        specs = tuple(TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in added.items())
        with ShardWriter(folder, [Shard(extra, specs)]) as writer:
            for name, tensor in added.items():
                writer.write(name, tensor)
        weight_map = {name: targets[stored.file] for name, stored in checkpoint.tensors.items()}
        size = checkpoint.nbytes + sum(tensor.nbytes for tensor in added.values())
        parameters = checkpoint.parameters + sum(tensor.numel() for tensor in added.values())
        write_index(folder / INDEX_FILE, weight_map | dict.fromkeys(added, extra), size, parameters)
    elif checkpoint.index is not None:
        shutil.copyfile(checkpoint.folder / INDEX_FILE, folder / INDEX_FILE)
    return sum(link_or_copy(checkpoint.folder / name, folder / target, copy=copy) for name, target in targets.items())


def place_other_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy what is neither weights nor config; returns the weights in other forms that stay behind."""
    left_out = []
    for name in checkpoint.other_files:
        if name in ("config.json", MODELING_FILE):
            continue
        if name.endswith(WEIGHT_FILES):  # they would be the unpatched model under a patched name
            left_out.append(name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, folder / name)
    return left_out
