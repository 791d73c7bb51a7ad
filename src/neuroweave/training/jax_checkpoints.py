"""Checkpoints of a JAX run: written by orbax in the background, counted when complete, restored onto any mesh.

`checkpoint-N/` holds orbax's `state` and `data`, and `complete.json` with the SHA-256 of every file, written last (see
`safe_checkpoints`): orbax itself notices no byte that changed. A killed save leaves a folder that does not count.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from neuroweave.checkpoint.staging import check_free_space
from neuroweave.training import safe_checkpoints
from neuroweave.training.jax_processes import from_all, is_first

State = dict[str, Any]
Say = Callable[[str], None]


class JaxCheckpoints:
    """The checkpoints of one run's folder. Every call is a collective: all processes must make it.

    `keep`: how many stay. `note`: hears of checkpoints that are passed over.
    """

    def __init__(self, run: str | Path, *, keep: int, note: Say | None = None) -> None:
        self.run, self.keep, self.note = Path(run).absolute(), keep, note
        logging.set_verbosity(logging.ERROR)  # orbax tells every step of a save
        self.saving: tuple[int, Path] | None = None
        self.problem: BaseException | None = None
        self.sealing: threading.Thread | None = None
        self.checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("state", "data"))

    def remove_leftovers(self) -> None:
        """What a killed save left: orbax's temporary folders, and a folder that was not sealed."""
        if self.run.is_dir():
            for folder in self.run.glob("checkpoint-*.orbax-checkpoint-tmp*"):
                shutil.rmtree(folder, ignore_errors=True)
            safe_checkpoints.remove_incomplete(self.run)

    def save(self, step: int, state: State, data: dict[str, Any]) -> None:
        """Begin to write `checkpoint-STEP`; the one before is finished first. `data`: JSON values.

        Raises ValueError when the save before failed, or the disk has no room for this one.
        """
        self.finish()
        folder = self.run / f"checkpoint-{step}"
        problem = None
        if is_first():
            try:
                check_free_space(self.run, sum(array.nbytes for array in jax.tree.leaves(state)))
                if folder.exists():  # it does not count, or it would have been resumed
                    shutil.rmtree(folder)
            except (OSError, ValueError) as error:
                problem = str(error)
        problem = from_all(problem)[0]
        if problem is not None:
            raise ValueError(self.describe_failure(folder, problem))
        self.saving = (step, folder)
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        try:
            self.checkpointer.save(folder, ocp.args.Composite(**items))
        except (OSError, ValueError, RuntimeError) as error:
            self.give_up(error)
        if is_first():
            self.sealing = threading.Thread(target=self.seal, name="seal checkpoint")
            self.sealing.start()

    def seal(self) -> None:
        """Wait for orbax, hash the files, and let the checkpoint count. Runs in a thread of the first process."""
        assert self.saving is not None
        step, folder = self.saving
        try:
            self.checkpointer.wait_until_finished()
            files = safe_checkpoints.hash_files(folder, safe_checkpoints.files_of(folder))
            safe_checkpoints.seal_checkpoint(folder, step=step, files=files, processes=jax.process_count())
            safe_checkpoints.rotate(self.run, keep=self.keep)
        except BaseException as error:
            self.problem = error

    def finish(self) -> None:
        """Wait until the last save counts. Raises ValueError when it failed; what it wrote is removed then."""
        if self.saving is None:
            return
        try:
            if self.sealing is not None:
                self.sealing.join()
            else:
                self.checkpointer.wait_until_finished()
        except Exception as error:
            self.problem = error
        told = None if self.problem is None else safe_checkpoints.one_line(self.problem)
        problem = next((each for each in from_all(told) if each is not None), None)
        folder = self.saving[1]
        self.sealing = self.saving = self.problem = None
        if problem is not None:
            if is_first():
                shutil.rmtree(folder, ignore_errors=True)
                self.remove_leftovers()
            raise ValueError(self.describe_failure(folder, problem))

    def give_up(self, error: BaseException) -> None:
        assert self.saving is not None
        folder, self.saving = self.saving[1], None
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)
            self.remove_leftovers()
        raise ValueError(self.describe_failure(folder, safe_checkpoints.one_line(error))) from error

    def describe_failure(self, folder: Path, problem: str) -> str:
        return safe_checkpoints.describe_failed_save(self.run, folder, problem)

    def to_resume(self) -> Path | None:
        """The checkpoint to go on from, the same for all processes; what a killed save left is removed. Raises
        ValueError when all of them are damaged."""
        found: list[str | None] = [None, None]
        if is_first():
            try:
                newest = safe_checkpoints.to_resume(self.run, note=self.note)
                found[0] = None if newest is None else str(newest)
                self.remove_leftovers()
            except ValueError as error:
                found[1] = str(error)
        name, problem = from_all(found)[0]
        if problem is not None:
            raise ValueError(problem)
        return None if name is None else Path(name)

    def restore(self, folder: Path, like: State) -> tuple[State, dict[str, Any]]:
        """(state, data) of a checkpoint. `like`: the state's shapes, dtypes and shardings, which may be of another mesh
        than that it was saved on. Raises ValueError for a checkpoint of another model."""
        check_same_arrays(folder, ocp.StandardCheckpointer().metadata(folder / "state").item_metadata, like)
        found = self.checkpointer.restore(
            folder, ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        )
        return found["state"], found["data"]

    def close(self) -> None:
        self.finish()
        self.checkpointer.close()


def check_same_arrays(folder: Path, stored: Any, like: State) -> None:
    """Raise ValueError, naming the first array, where a checkpoint's are not those of the model."""
    tree = getattr(stored, "tree", stored)
    theirs = {path(each): tuple(leaf.shape) for each, leaf in jax.tree_util.tree_leaves_with_path(tree["params"])}
    ours = {path(each): tuple(leaf.shape) for each, leaf in jax.tree_util.tree_leaves_with_path(like["params"])}
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            came, wanted = (list(shapes[name]) if name in shapes else "not there" for shapes in (theirs, ours))
            raise ValueError(
                f"{folder}: of another configuration: {name} is {came} in it, and {wanted} in this model; give the "
                f"configuration that the run was begun with, or --fresh"
            )


def path(keys: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
