"""What the hosts of a JAX run must have in common besides settings: the run's folder, and the model that they load."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from neuroweave.checkpoint.manifest import sha256_of
from neuroweave.checkpoint.reader import WEIGHT_FILES, list_files
from neuroweave.neuroblast.jax_weights import CONFIG_FILE, StoredModel
from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.jax_processes import A_DAY, check_together, from_all, is_first
from neuroweave.training.run_folder import LOCK_FILE, check_run_folder, held
from neuroweave.training.safe_checkpoints import one_line

PATIENCE = 10.0  # seconds until a network file system shows what another host has written


@contextlib.contextmanager
def held_by_all(configuration: TrainConfiguration, *, resume: bool | None) -> Iterator[None]:
    """The run's folder, checked, held by the first process for the length of the block, and seen by all others.

    Raises ValueError, on all hosts, for a folder that cannot be used, is in use, or is another one on another host.
    """
    folder = Path(configuration.output.folder)
    with contextlib.ExitStack() as stack:
        token, problem = "", None
        if is_first():
            try:
                check_run_folder(configuration, resume=resume, backend="jax")
                token = stack.enter_context(held(folder))
            except (OSError, ValueError) as error:
                problem = str(error)
        check_together(problem)
        token = from_all(token)[0]
        blind = [host for host, seen in enumerate(from_all(is_first() or sees(folder / LOCK_FILE, token))) if not seen]
        if blind:
            raise ValueError(
                f"output.folder {folder}: what host 0 writes there is not seen on host "
                f"{', '.join(map(str, blind))}; give a folder on a file system that all hosts share"
            )
        yield


def sees(path: Path, token: str) -> bool:
    """Whether the file says so, within some seconds."""
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8", errors="replace") == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def check_same_model(origin: StoredModel | Any) -> None:
    """Raise ValueError, on all hosts, unless they begin with the same model: a mean of two is none."""
    if jax.process_count() == 1:
        return
    mine, problem = {}, None
    try:
        mine = digests(origin)
    except (OSError, ValueError) as error:
        problem = one_line(error)
    ocp.multihost.sync_global_processes("same model", timeout=A_DAY)  # files are large, and disks may be slow
    check_together(problem)
    every = from_all(mine)
    other = sorted({name for each in every for name in {*each, *every[0]} if each.get(name) != every[0].get(name)})
    if other:
        hosts = [host for host, each in enumerate(every) if each.get(other[0]) != every[0].get(other[0])]
        where = origin.folder if isinstance(origin, StoredModel) else "a fresh model"
        raise ValueError(
            f"the hosts begin with different models ({where}: {other[0]} of host {', '.join(map(str, hosts))} is not "
            f"that of host 0); give all of them the same files"
        )


def digests(origin: StoredModel | Any) -> dict[str, str]:
    """Name -> SHA-256 of all that decides about a model: its files, or the configuration of a fresh one."""
    if not isinstance(origin, StoredModel):
        return {"its configuration": hashlib.sha256(origin.to_json_string().encode()).hexdigest()}
    names = [name for name in list_files(origin.folder) if name == CONFIG_FILE or name.endswith(WEIGHT_FILES)]
    return {name: sha256_of(origin.folder / name) for name in names}
