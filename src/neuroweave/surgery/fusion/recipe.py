"""Publish the patch, not the model: what was done, in a few kilobytes, and the same bytes again from it.

A recipe holds the options, what the deltas come from (a bank's hash and a seed, or files), the measured scales, and the
SHA-256 of what went in and what came out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.header import parse_json
from neuroweave.checkpoint.manifest import MANIFEST_FILE, read_manifest, sha256_of
from neuroweave.checkpoint.reader import list_files
from neuroweave.checkpoint.staging import check_output
from neuroweave.surgery.fusion.fuse import (
    DeltaInput,
    FusionResult,
    check_files,
    default_workers,
    fuse_checkpoint,
    stored_deltas,
)
from neuroweave.surgery.fusion.generated import generated_deltas
from neuroweave.surgery.fusion.plan import FuseOptions
from neuroweave.surgery.neurons.bank import default_bank_path
from neuroweave.surgery.neurons.delta_plan import check_parameters

FORMAT_VERSION = 1
_OTHER_MODEL = "this is not the model of the recipe"


def fusion_recipe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe of a fused checkpoint. Raises ValueError for a folder that `fuse` did not write, or not hashed."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("operation") != "fuse":
        raise ValueError(f"{folder}: no {MANIFEST_FILE} of a fuse in this folder: there is no recipe to show")
    try:
        return _recipe(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{Path(folder) / MANIFEST_FILE}: the manifest is damaged ({error!r})") from error


def _recipe(folder: str | os.PathLike[str], manifest: dict[str, Any]) -> dict[str, Any]:
    inputs, tensors = manifest["inputs"], manifest.get("tensors", {})
    return {
        "recipe": FORMAT_VERSION,
        "neuroweave": manifest["neuroweave"],
        "parameters": manifest["parameters"],
        "scales": {name: entry["scale"] for name, entry in tensors.items() if entry.get("scale") is not None},
        "model": _hashes(folder, inputs["model"]["files"]),
        "deltas": inputs["deltas"],
        "outputs": _hashes(folder, manifest["outputs"]),
    }


def load_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe file. Raises ValueError, naming the file, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `neuroweave recipe show OUT` prints a recipe")
    recipe = parse_json(path.read_bytes(), file=str(path), what="recipe")
    if recipe.get("recipe") != FORMAT_VERSION:
        raise ValueError(f"{path}: not a fusion recipe of format {FORMAT_VERSION}")
    for key in ("parameters", "scales", "model", "deltas", "outputs"):
        if not isinstance(recipe.get(key), dict):
            raise ValueError(f"{path}: the recipe has no {key}")
    for name, scale in recipe["scales"].items():
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise ValueError(f"{path}: the scale of {name} is {scale!r}, expected a number")
    generation = recipe["deltas"].get("generation")
    if generation is not None:
        parts = [generation.get(key) for key in ("parameters", "bank")] if isinstance(generation, dict) else [None]
        if not all(isinstance(part, dict) for part in parts) or not isinstance(generation["bank"].get("sha256"), str):
            raise ValueError(f"{path}: the recipe's generation needs parameters and a bank with its sha256")
    return recipe


def replay(
    recipe: dict[str, Any], model: str | Path, out: str | Path, *, file: str | Path | None = None,
    bank: str | Path | None = None, weights: str | Path | None = None,
    workers: int | None = None, overwrite: bool = False, progress: Callable[[int, int], None] | None = None,
) -> FusionResult:  # fmt: skip
    """Fuse as the recipe says; `out` appears only if every file has the recorded SHA-256.

    `bank`: the neuron bank, unless it is the one that comes with the package. `weights`: the deltas' folder, where no
    bank is recorded. `file`: where the recipe was read from, which the output may not replace.
    Raises ValueError for other inputs than the recorded ones, before anything is written, and for other outputs.
    """
    options = _options(recipe["parameters"])
    check_output(out, overwrite=overwrite, sources=[model])
    check_model(recipe["model"], Path(model))
    source = _deltas(recipe["deltas"], Path(model), bank, weights)
    if file is not None:
        source = replace(source, reads=(*source.reads, Path(file)))

    def check(manifest: Mapping[str, Any]) -> None:
        check_hashes(_OTHER_MODEL, model, recipe["model"], _hashes(model, manifest["inputs"]["model"]["files"]))
        check_hashes("this is not the recipe's output", out, recipe["outputs"], _hashes(out, manifest["outputs"]))

    return fuse_checkpoint(
        model, out, source, options, scales=recipe["scales"], workers=workers, overwrite=overwrite, check=check,
        progress=progress,
    )  # fmt: skip


def check_model(wanted: Mapping[str, str], model: Path) -> None:
    """Raise ValueError unless the folder's files are those of the recipe: their names first, then every SHA-256."""
    if not model.is_dir():
        return  # refused, with a reason, where it is opened
    check_files(model)
    names = [name for name in list_files(model) if name != MANIFEST_FILE]
    check_hashes(_OTHER_MODEL, model, dict.fromkeys(wanted, ""), dict.fromkeys(names, ""))
    check_hashes(_OTHER_MODEL, model, wanted, sha256_of_all(model, names))


def check_hashes(what: str, folder: str | Path, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise ValueError that says `what` is wrong and names the files whose SHA-256 are not those of the recipe."""
    parts = [
        (sorted(wanted.keys() - found.keys()), "is missing", "are missing"),
        (sorted(found.keys() - wanted.keys()), "is not in the recipe", "are not in the recipe"),
        (
            sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]),
            "has another SHA-256",
            "have another SHA-256",
        ),
    ]
    differences = [f"{', '.join(names)} {one if len(names) == 1 else more}" for names, one, more in parts if names]
    if differences:
        raise ValueError(f"{folder}: {what}: {'; '.join(differences)}; nothing was written")


def sha256_of_all(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of files, several at a time."""
    pool = ThreadPoolExecutor(default_workers())
    try:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _options(parameters: dict[str, Any]) -> FuseOptions:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()
    }
    try:
        return FuseOptions(**values)
    except TypeError as error:
        raise ValueError(f"the recipe's parameters are not those of a fuse: {error}") from error


def _deltas(recorded: dict[str, Any], model: Path, bank: str | Path | None, weights: str | Path | None) -> DeltaInput:
    generation = recorded.get("generation")
    if bank is not None and (weights is not None or generation is None):
        reason = "--weights is given" if weights is not None else "the recipe records deltas that no bank generated"
        raise ValueError(f"--bank would not be read: {reason}")
    if weights is not None:
        source = stored_deltas(weights)
        check_deltas(recorded.get("files", {}), Path(weights))
        return source
    if generation is None:
        raise ValueError("the recipe records a folder of deltas that no bank generated: give it with --weights")
    path = Path(bank) if bank is not None else default_bank_path()
    source = generated_deltas(model, path, **check_parameters(generation["parameters"]))
    found = source.description["generation"]["bank"]["sha256"]
    wanted = generation["bank"]["sha256"]
    if found != wanted:
        hint = "" if bank is not None else ": give the recorded one with --bank"
        raise ValueError(f"{path}: the bank's SHA-256 is {found}, the recipe says {wanted}{hint}")
    return source


def check_deltas(recorded: Any, folder: Path) -> None:
    """Raise ValueError unless the tensor files that the recipe records are in the folder."""
    if not isinstance(recorded, Mapping) or not all(isinstance(entry, Mapping) for entry in recorded.values()):
        raise ValueError("the recipe's files of deltas are damaged: expected names with a SHA-256 each")
    wanted = {
        name: str(entry["sha256"])
        for name, entry in recorded.items()
        if name.endswith(".safetensors") and "sha256" in entry
    }
    found = sha256_of_all(folder, [name for name in wanted if (folder / name).is_file()])
    check_hashes("these are not the deltas of the recipe", folder, wanted, found)


def _hashes(folder: str | os.PathLike[str], files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    missing = [name for name, entry in files.items() if "sha256" not in entry]
    if missing:
        raise ValueError(f"{folder}: fused with --no-hash: {missing[0]} has no recorded hash; fuse again with hashing")
    return {name: entry["sha256"] for name, entry in files.items()}
