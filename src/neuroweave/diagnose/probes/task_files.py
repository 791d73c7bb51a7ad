"""Which tasks are meant: those that come with the package, a user's YAML files, or names of lm-evaluation-harness.

Task files on this machine are read here first, so that what is wrong with one is said clearly: the harness skips files
that it cannot read. It also looks for data files in the working directory; here they lie beside the task file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskFile:
    """A task or a group of tasks that a YAML file defines.

    `config` has what its `include` names merged in; `data` are the entries that say where its data is, with absolute
    paths, empty when that is not on this machine.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """Task files to hand to the harness, and the names to run: theirs, or names that the harness must know."""

    files: tuple[TaskFile, ...]
    names: tuple[str, ...]

    @property
    def only_files(self) -> bool:
        return {file.name for file in self.files} >= set(self.names)


def shipped_tasks() -> dict[str, TaskFile]:
    """The tasks that come with the package, by name."""
    folder = Path(str(files("neuroweave.diagnose"))) / "tasks"
    return {file.name: file for file in read_folder(folder)}


def find_tasks(wanted: Sequence[str]) -> Wanted:
    """What `wanted` stands for: each is a shipped task, a path of a YAML file or of a folder of them, or a name.

    A path has a separator in it or ends like a YAML file; a folder stands for every task in it. Raises ValueError for a
    file that cannot be read as a task, a data file that is not there, and two files with a task of the same name.
    """
    if not wanted:
        raise ValueError("no task was given; name one, such as " + ", ".join(shipped_tasks()))
    shipped = shipped_tasks()
    found: list[TaskFile] = []
    names: list[str] = []
    for name in wanted:
        if name in shipped:
            found.append(shipped[name])
            names.append(name)
        elif "/" in name or "\\" in name or name.lower().endswith(SUFFIXES):
            given = read_path(Path(name).expanduser())
            found.extend(given)
            names.extend(top_names(given))
        else:
            names.append(name)
    by_name: dict[str, TaskFile] = {}
    for file in found:
        before = by_name.setdefault(file.name, file)
        if before.path.resolve() != file.path.resolve():
            raise ValueError(f"{file.path}: {before.path} defines {file.name!r} as well; rename one of the tasks")
    return Wanted(tuple(by_name.values()), tuple(dict.fromkeys(names)))


def top_names(given: Sequence[TaskFile]) -> list[str]:
    """The names to run of files that were given together: not a task that a group among them brings along."""
    brought = {
        member if isinstance(member, str) else member.get("task") or member.get("group")
        for file in given
        if isinstance(members := file.config.get("task"), list)
        for member in members
    }
    return [file.name for file in given if file.name not in brought]


def read_path(path: Path) -> list[TaskFile]:
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; give a task's YAML file, or a folder of them")
    file = read_task(path)
    if file is None:
        raise ValueError(f"{path}: no `task` (its name) in this file, so it defines none; see docs/tasks.md")
    return [file]


def read_folder(folder: Path) -> list[TaskFile]:
    """Every task below `folder`, in the order of the paths. Files without a name are what others include."""
    below = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = [file for path in below if (file := read_task(path)) is not None]
    if not found:
        raise ValueError(f"{folder}: no YAML file in this folder defines a task; see docs/tasks.md")
    return found


def read_task(path: Path) -> TaskFile | None:
    """The task or group that a file defines, or None where it names none. Raises ValueError for what is wrong in it."""
    config = read_config(path)
    name = config["group"] if "group" in config else config.get("task")
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(f"{path}: `task` is {name!r}; expected the task's name as text")
    if "group" in config or "class" in config:
        return TaskFile(name, path, config)
    if not isinstance(config.get("dataset_path"), str) and "custom_dataset" not in config:
        raise ValueError(f"{path}: no `dataset_path` in this task; give json, csv or another kind of local data")
    return TaskFile(name, path, config, local_data(path, config))


def local_data(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say where the task's data is, with absolute paths; empty when it is not on this machine."""
    settings = config.get("dataset_kwargs") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: `dataset_kwargs` is {settings!r}; expected entries such as data_files")
    if "data_files" in settings:
        if "://" in str(settings["data_files"]):
            return {}
        return {"dataset_kwargs": {**settings, "data_files": absolute(path, settings["data_files"])}}
    folder = path.resolve().parent / str(config.get("dataset_path"))
    return {"dataset_path": str(folder), "dataset_kwargs": settings} if folder.is_dir() else {}


def absolute(path: Path, data_files: Any) -> Any:
    """`data_files` of a task file with every path absolute; a relative one is sought beside it, then from here."""
    if isinstance(data_files, dict):
        return {split: absolute(path, part) for split, part in data_files.items()}
    if isinstance(data_files, list):
        return [absolute(path, part) for part in data_files]
    if not isinstance(data_files, str):
        raise ValueError(f"{path}: a data file is {data_files!r}; expected a path")
    for folder in (path.resolve().parent, Path.cwd()):
        if glob(str(folder / data_files), recursive=True):
            return str(folder / data_files)
    raise ValueError(f"{path}: its data file {data_files} is not there; expected it in {path.parent}")


class _Loader(yaml.SafeLoader):
    """YAML in which `!function module.name` is text: nothing of a task file is run to read it."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def read_config(path: Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The entries of a task file, over those of the files that it includes."""
    if path.resolve() in seen:
        raise ValueError(f"{path}: includes itself, through {', '.join(part.name for part in seen)}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}, not the entries of a task; see docs/tasks.md")
    merged: dict[str, Any] = {}
    for included in included_files(path, config.pop("include", [])):
        merged.update(read_config(included, seen=(*seen, path.resolve())))
    return merged | config


def included_files(path: Path, included: Any) -> Iterator[Path]:
    for name in included if isinstance(included, list) else [included]:
        file = path.resolve().parent / str(name)
        if not file.is_file():
            raise ValueError(f"{path}: includes {name}, which is not there")
        yield file


def write_for_harness(tasks: Sequence[TaskFile], folder: Path, *, cache: Path) -> None:
    """One file per task in `folder`, for the harness to find: the task's own, with its data's absolute paths.

    Data on this machine is prepared in `cache`, not in the cache of the user.
    """
    for number, task in enumerate(tasks):
        entries: dict[str, Any] = {"include": str(task.path.resolve()), **task.data}
        if task.data:
            entries["dataset_kwargs"] = {"cache_dir": str(cache), **task.data["dataset_kwargs"]}
        text = yaml.safe_dump(entries, allow_unicode=True)
        (folder / f"{number:04d}.yaml").write_text(text, encoding="utf-8")
