"""What a JAX run refuses before it begins: hosts that do not belong together, folders that are damaged or in use."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from test_jax_train import EIGHT, SHAPE, start
from test_train_sharded import free_port
from training_runs import content, written

from neuroweave.checkpoint import staging
from neuroweave.cli.main import program
from neuroweave.neuroblast.fresh import write_fresh_model
from neuroweave.training import jax_processes, run_folder
from neuroweave.training.configuration import build_configuration
from neuroweave.training.jax_loop import prepare_with_jax, train_with_jax
from neuroweave.training.jax_processes import ADDRESS, BIND_ADDRESS, COUNT, INDEX, TIMEOUT, check_devices
from neuroweave.training.run_folder import held
from neuroweave.training.safe_checkpoints import (
    hash_files,
    last_sealed,
    remove_incomplete,
    room_for,
    seal_checkpoint,
    to_resume,
    what_is_wrong,
)

V6 = not any(jax_processes.errors_of_listening("::1", 0))

# ------------------------------------------------------------------------------------------------- the run's folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, checkpoints at 3 and 6. To be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_with_jax(build_configuration(content(corpus, folder, training=EIGHT)))
    assert not (folder / ".lock").exists()
    return folder


@pytest.fixture
def again(corpus: Path, finished: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs it again in a copy, `tmp_path / "run"`."""
    shutil.copytree(finished, tmp_path / "run")

    def run(*, notes: list[str] | None = None, resume: bool | None = None, **training: Any) -> Any:
        value = content(corpus, tmp_path / "run", training=EIGHT | training)
        return train_with_jax(build_configuration(value), resume=resume, note=None if notes is None else notes.append)

    return run


def cut(folder: Path) -> None:
    os.truncate(folder / "complete.json", 40)


def of_a_newer_version(folder: Path) -> None:
    entries = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps(entries | {"format": 2}))


@pytest.mark.parametrize(("damage", "reason"), [(cut, "cannot be read"), (of_a_newer_version, "is of format 2")])
def test_checkpoints_that_are_not_understood_are_never_removed(again, tmp_path: Path, damage, reason) -> None:
    run = tmp_path / "run"
    damage(run / "checkpoint-6")
    notes: list[str] = []
    again(notes=notes)
    assert any(f"checkpoint-6 is passed over: its complete.json {reason}" in note for note in notes)
    assert "checkpoint-6 is kept as checkpoint-6.aside" in notes
    assert f"its complete.json {reason}" in str(what_is_wrong(run / "checkpoint-6.aside"))
    assert what_is_wrong(run / "checkpoint-6") is None
    for name in ("checkpoint-3", "checkpoint-6"):
        damage(run / name)
    for resume in (None, True):
        with pytest.raises(ValueError, match=rf"no checkpoint can be resumed \(.*{reason}.*\); --fresh starts anew"):
            again(resume=resume)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6", "checkpoint-6.aside"}


def sealed(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "state").mkdir(parents=True)
    (made / "state" / "a").write_bytes(b"weights")
    seal_checkpoint(made, step=step, files=hash_files(made, ["state/a"]))
    return made


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"state/a": {}}, "its complete.json has no size and SHA-256 of state/a"),
        (["state/a"], "its complete.json names no files"),
        ({}, "its complete.json names no files"),
    ],
)
def test_entries_that_are_damaged_are_told(tmp_path: Path, files: Any, reason: str) -> None:
    made = sealed(tmp_path, 3)
    assert what_is_wrong(made) is None
    (made / "complete.json").write_text(json.dumps({"format": 1, "step": 3, "files": files}))
    assert what_is_wrong(made) == reason
    with pytest.raises(ValueError, match=reason):
        to_resume(tmp_path)
    remove_incomplete(tmp_path)
    assert (made / "state" / "a").is_file()
    assert last_sealed(tmp_path) is None


def test_a_file_that_is_not_listed_is_damage(tmp_path: Path) -> None:
    made = sealed(tmp_path, 3)
    (made / ".nfs0001").write_bytes(b"")
    assert what_is_wrong(made) is None
    (made / "state" / "b").write_bytes(b"weights")
    assert what_is_wrong(made) == "state/b is there, but not in its complete.json"


def test_room_is_asked_for_what_is_not_there_yet(corpus: Path, finished: Path, tmp_path: Path, monkeypatch) -> None:
    for there, more in ((0, 3), (1, 2), (2, 1), (3, 1)):
        if there:
            sealed(tmp_path / "few", there)
        assert room_for(tmp_path / "few", keep=2, nbytes=10) == 10 * more
    resumed, fresh = (build_configuration(content(corpus, out, training=EIGHT)) for out in (finished, tmp_path / "new"))
    room = int(1.5 * prepare_with_jax(resumed).plan.checkpoint_bytes)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    prepare_with_jax(resumed)
    with pytest.raises(ValueError, match="are needed here"):
        prepare_with_jax(fresh)


def test_a_run_does_not_go_back(again, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is at step 6 \(checkpoint-6\), and the settings say 3 steps; .*--fresh"):
        again(steps=3)
    assert again().plan.steps == 6
    assert again(steps=3, resume=False).plan.steps == 3


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("run.json", b'{"neurow', r"run\.json: cannot be read .*--fresh"),
        ("run.json", b"[]", r"run\.json: does not say what the run was begun with; .*--fresh"),
        ("run.json", b'{"configuration": 1}', r"run\.json: does not say what the run was begun with"),
        ("metrics.jsonl", bytes(range(256)), r"metrics\.jsonl: cannot be read .*; move it away"),
        ("metrics.jsonl", b'{"loss": 1}\n', r"metrics\.jsonl: cannot be read .*; move it away"),
        ("metrics.jsonl", b'{"step": "x"}\n', r"metrics\.jsonl: has a line whose step is no number; move it away"),
    ],
)
def test_damaged_files_of_a_run_are_named(again, tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / "run" / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        again()
    assert (tmp_path / "run" / name).read_bytes() == raw


# --------------------------------------------------------------------------------------------------------- the lock


def test_a_folder_is_of_one_run_at_a_time(corpus: Path, again, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = written(tmp_path / "c.yaml", content(corpus, run, training=EIGHT))
    message = rf"run is in use by another run \(process {os.getpid()}\); wait for it"
    with held(run):
        with pytest.raises(ValueError, match=message):
            again()
        for backend in ("jax", "torch"):
            done = CliRunner().invoke(program, ["train", str(config), "--fresh", "--backend", backend])
            with pytest.raises(ValueError, match=message):
                raise done.exception or AssertionError(done.output)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    again()


def test_a_killed_run_holds_nothing_and_a_refused_one_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ".lock").write_text("1 elsewhere 0")
    with held(tmp_path / "old"), held(tmp_path / "new") as text:
        assert (tmp_path / "new" / ".lock").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output\.folder is a file"), held(tmp_path / "file"):
        pass


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch) -> None:
    """Another run ends, and removes its lock, between our opening the file and our locking it."""
    path, real = tmp_path / ".lock", run_folder.fcntl.flock
    calls: list[int] = []

    def flock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with held(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is in use"), held(tmp_path):
            pass


# ------------------------------------------------------------------------------------------------- joining the hosts


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({INDEX: "²"}, "JAX_PROCESS_INDEX='²': a whole number was expected"),
        ({TIMEOUT: "0"}, "JAX_INITIALIZATION_TIMEOUT=0: give the seconds"),
        ({TIMEOUT: "99999999999"}, "JAX_INITIALIZATION_TIMEOUT=99999999999: a whole number up to 604800"),
        ({COUNT: "99999999999"}, "JAX_PROCESS_COUNT=99999999999: a whole number up to 1000000"),
        ({COUNT: "9" * 5000}, "a whole number up to 1000000"),
        ({ADDRESS: "127.0.0.1:65536"}, "JAX_COORDINATOR_ADDRESS='127.0.0.1:65536': ports are 1 to 65535"),
        ({ADDRESS: "127.0.0.1:0"}, "ports are 1 to 65535"),
        ({ADDRESS: "127.0.0.1:²"}, "HOST:PORT was expected"),
        ({ADDRESS: "192.0.2.7:1234"}, r"=0 cannot listen at 192.0.2.7, port 1234 .*give an address of this machine"),
        ({BIND_ADDRESS: "192.0.2.7:99"}, r"=0 cannot listen at 192.0.2.7, port 99 .*give an address of this machine"),
        ({BIND_ADDRESS: "99"}, "JAX_COORDINATOR_BIND_ADDRESS='99': HOST:PORT was expected"),
        ({ADDRESS: "no.such.host.invalid:1234"}, "cannot listen at no.such.host.invalid, port 1234"),
    ],
)
def test_variables_that_cannot_be(variables: dict[str, str], message: str) -> None:
    given = {ADDRESS: f"127.0.0.1:{free_port()}", COUNT: "2", INDEX: "0"}
    with pytest.raises(ValueError, match=message):
        jax_processes.join_processes(given | variables)


@pytest.mark.parametrize("where", ["127.0.0.1", "0.0.0.0", "127.0.0.2", *(["::1"] if V6 else [])])
def test_a_port_that_is_taken_is_refused(where: str) -> None:
    """JAX itself ends by a segmentation fault; it listens on every interface."""
    with socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET) as taken:
        taken.bind((where, 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"{ADDRESS}={address}: .*another process has this port; choose another"):
            jax_processes.join_processes({ADDRESS: address, COUNT: "2", INDEX: "0"})
    jax_processes.check_can_listen(address)


def test_hosts_have_equally_many_devices() -> None:
    check_devices([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"different numbers of devices \(2 on host 0, 1 on host 1\)"):
        check_devices([0, 0, 1])


def refused_by_both(
    message: str, *arguments: list[Any], devices: tuple[int, int] = (1, 1), homes: tuple[Path, Path] | None = None
) -> None:
    """Two hosts, each with its arguments, started in its folder of `homes`, both say so and end."""
    joined = {ADDRESS: f"127.0.0.1:{free_port()}", COUNT: "2"}
    hosts = []
    for index, mine in enumerate(arguments):
        with contextlib.chdir(homes[index] if homes else "."):
            hosts.append(start(*mine, devices=devices[index], **joined, **{INDEX: str(index)}))
    try:
        for host in hosts:
            _, error = host.communicate(timeout=120)
            assert host.returncode == 2, error
            assert message in error
    finally:
        for host in hosts:
            host.kill()


def test_hosts_that_begin_with_different_weights(corpus: Path, tmp_path: Path) -> None:
    """The path is the same on both, and lies in another folder."""
    homes = (tmp_path / "host0", tmp_path / "host1")
    for seed, home in enumerate(homes):
        write_fresh_model(home / "begin", preset="tiny", tokenizer=corpus / "tokenizer", settings=SHAPE, seed=seed)
    value = content(corpus, tmp_path / "run", training=EIGHT) | {"model": {"path": "begin"}}
    config = written(tmp_path / "c.yaml", value)
    message = "different models (begin: model.safetensors of host 1 is not that of host 0); give all of them the same"
    refused_by_both(message, [config], [config], homes=homes)
    assert not (tmp_path / "run").exists()


def test_hosts_that_do_not_share_the_folder(corpus: Path, tmp_path: Path) -> None:
    homes = (tmp_path / "host0", tmp_path / "host1")
    for home in homes:
        home.mkdir()
    config = written(tmp_path / "c.yaml", content(corpus, Path("run"), training=EIGHT))
    message = "output.folder run: what host 0 writes there is not seen on host 1; give a folder on a file system that"
    refused_by_both(message, [config], [config], homes=homes)
    assert not any(any(home.iterdir()) for home in homes)


def test_one_host_tries_and_the_other_trains(corpus: Path, tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", content(corpus, tmp_path / "run", training=EIGHT))
    refused_by_both("(--dry-run is True on host 0, False on host 1)", [config, "--dry-run"], [config])
    assert not (tmp_path / "run").exists()


def test_hosts_with_different_numbers_of_devices(corpus: Path, tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", content(corpus, tmp_path / "run", training=EIGHT))
    refused_by_both("(2 on host 0, 1 on host 1)", [config], [config], devices=(2, 1))
