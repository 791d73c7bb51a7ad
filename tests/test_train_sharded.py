"""Two processes (gloo, on the CPU) against one: unsharded (DDP), sharded (FSDP2), and checkpoints that change over."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import losses, make_trainer, tiny_neuroblast

TESTS = Path(__file__).parent
FSDP2 = TESTS.parent / "examples" / "accelerate" / "fsdp2_cpu.yaml"
SHARDED = ["accelerate.commands.launch", "--config_file", str(FSDP2), "--main_process_port"]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
SETTINGS: dict[str, Any] = {"micro": 1, "model": "neuroblast", "held_out": 3}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(launcher: list[str], *runs: dict[str, Any]) -> None:
    """`tests/tiny_training.py` in two processes, one run after the other."""
    place = [str(free_port()), str(TESTS / "tiny_training.py"), json.dumps(list(runs))]
    command = [sys.executable, "-m", *launcher, *place]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of one process."""
    folder = tmp_path_factory.mktemp("alone")
    make_trainer(folder, model=tiny_neuroblast(dropout=0.0), micro=1, held_out=3).train()
    return folder


def close(folder: Path, alone: Path) -> None:
    """Ten losses equal to 1e-5. A batch of other samples changes the second one by 0.01 and more."""
    assert list(losses(folder)) == list(range(1, 11))
    np.testing.assert_allclose(list(losses(folder).values()), list(losses(alone).values()), atol=1e-5, rtol=0)


def test_two_processes_unsharded(tmp_path: Path, alone: Path) -> None:
    launch(TORCHRUN, SETTINGS | {"folder": str(tmp_path)})
    close(tmp_path, alone)
    assert json.loads((tmp_path / "checkpoint-10" / "complete.json").read_text())["processes"] == 2


def test_two_processes_sharded_and_their_checkpoints(tmp_path: Path, alone: Path) -> None:
    """FSDP2: the losses; what two saved goes on in one; what one saved goes on in two."""
    from_one, from_two = tmp_path / "one", tmp_path / "two"
    from_one.mkdir()
    shutil.copytree(alone / "checkpoint-5", from_one / "checkpoint-5")
    shutil.copy(alone / "metrics.jsonl", from_one)
    launch(
        SHARDED,
        SETTINGS | {"folder": str(from_two), "keep": 1, "stop_at": 5},
        SETTINGS | {"folder": str(from_one), "resume": True},
    )
    close(from_one, alone)
    sharded = from_two / "checkpoint-5"
    assert len(list((sharded / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    assert (sharded / "config.json").is_file()
    assert "pytorch_model_fsdp_0/.metadata" in json.loads((sharded / "complete.json").read_text())["files"]
    rest = make_trainer(from_two, model=tiny_neuroblast(seed=1, dropout=0.0), micro=1, held_out=3)
    rest.train(resume_from_checkpoint=True)
    close(from_two, alone)
