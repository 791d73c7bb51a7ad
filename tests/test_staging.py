"""Outputs appear whole or not at all: after errors, Ctrl-C, a kill, a full disk; old outputs survive."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neuroweave.checkpoint import check_free_space, staged_folder, staging


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with staged_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
        assert folder.parent == out.parent, "not a sibling: the rename could be a copy"
    assert names(out) == ["a"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_folder_mode_follows_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        with staged_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), SystemExit(1)])
@pytest.mark.parametrize("old", ["absent", "empty", "full"])
def test_any_exception_leaves_everything_as_it_was(tmp_path, error, old):
    base = tmp_path / "base"
    out = base / "parents" / "out"
    if old != "absent":
        out.mkdir(parents=True)
    if old == "full":
        (out / "config.json").write_text("old")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(type(error)), staged_folder(out, overwrite=True) as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise error
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    if old == "full":
        assert (out / "config.json").read_text() == "old"


def test_overwrite_replaces_all(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("old")
    with staged_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
        assert names(out) == ["stale.safetensors"]
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_restores_the_old_output(tmp_path, monkeypatch, failing):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    real, calls = os.rename, 0

    def rename(source, target):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), staged_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_files_that_appear_meanwhile_are_kept(tmp_path):
    out = tmp_path / "out"
    message = "files appeared in the output folder meanwhile"
    with pytest.raises(ValueError, match=message), staged_folder(out):  # noqa: PT012
        out.mkdir()
        (out / "theirs").write_text("x")
    assert names(out) == ["theirs"]
    assert names(tmp_path) == ["out"]


def make_file(out):
    out.write_text("x")


def make_full(out):
    out.mkdir()
    (out / "x").write_text("x")


def make_link(out):
    (out.parent / "real").mkdir()
    out.symlink_to(out.parent / "real")


def make_dangling_link(out):
    out.symlink_to(out.parent / "nowhere")


def make_repository(out):
    (out / ".git").mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "overwrite", "message"),
    [
        (make_file, True, "the output is a file; give a folder"),
        (make_full, False, "the output folder is not empty; choose another one, or add --overwrite"),
        (make_link, True, "the output is a symbolic link; give the real path of a folder"),
        (make_dangling_link, True, "the output is a symbolic link; give the real path of a folder"),
        (make_repository, True, "will not be replaced, because it is a git repository"),
    ],
)
def test_refuses_outputs(tmp_path, prepare, overwrite, message):
    out = tmp_path / "out"
    prepare(out)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(ValueError, match=re.escape(f"{out}: {message}")),
        staged_folder(out, overwrite=overwrite),
    ):
        raise AssertionError("the block ran")
    assert sorted(tmp_path.rglob("*")) == before


def test_refuses_the_current_and_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "x").write_text("x")
    monkeypatch.chdir(tmp_path / "work" / "here")
    with (
        pytest.raises(ValueError, match="because the current folder is, or lies in, it"),
        staged_folder(tmp_path, overwrite=True),
    ):
        pass
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    with (
        pytest.raises(ValueError, match="because the home folder is, or lies in, it"),
        staged_folder(tmp_path, overwrite=True),
    ):
        pass


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("source", "the output is the source itself"),
        ("source/../source", "the output is the source itself"),
        ("link", "the output is a symbolic link"),
        ("source/inside", "the output lies inside the source"),
        (".", "the output contains the source"),
    ],
)
def test_refuses_the_source(tmp_path, out, message):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("x")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match=message), staged_folder(tmp_path / out, overwrite=True, sources=[source]):
        pass
    assert names(source) == ["config.json"]


def test_refuses_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a folder that can be written"), staged_folder(tmp_path / "file" / "o"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_refuses_a_read_only_parent(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="is not a folder that can be written"), staged_folder(tmp_path / "locked/o"):
        pass


_JOB = """
import sys, time
from neuroweave.checkpoint import staged_folder
with staged_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_job(out):
    job = subprocess.Popen([sys.executable, "-c", _JOB, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert job.stdout is not None
    assert job.stdout.readline() == b"ready\n"
    return job


def stop_job(job, how):
    job.send_signal(how)
    job.wait(30)
    job.stdout.close()


def test_interrupt_of_a_real_process_leaves_nothing(tmp_path):
    stop_job(start_job(tmp_path / "out"), signal.SIGINT)
    assert names(tmp_path) == []


def test_a_kill_leaves_a_named_sibling_that_the_next_run_removes(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_full(out)
    stop_job(start_job(out), signal.SIGKILL)
    left = [name for name in names(tmp_path) if name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.neuroweave-partial-")
    assert names(out) == ["x"]
    monkeypatch.setattr(staging, "_GRACE_SECONDS", 0.0)
    with staged_folder(out, overwrite=True):
        pass
    assert names(tmp_path) == ["out"]


def test_a_running_job_keeps_its_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    job = start_job(out)
    monkeypatch.setattr(staging, "_GRACE_SECONDS", 0.0)
    try:
        with staged_folder(out):
            pass
        assert any("partial" in name for name in names(tmp_path)), "a running job lost its folder"
    finally:
        stop_job(job, signal.SIGINT)
    assert names(tmp_path) == ["out"]


def test_a_young_folder_is_not_taken_for_a_leftover(tmp_path):
    young = tmp_path / ".out.neuroweave-partial-00000000"
    young.mkdir()
    with staged_folder(tmp_path / "out"):
        pass
    assert young.exists(), "its owner may not hold the lock yet"


def test_an_output_moved_aside_by_a_killed_run_comes_back(tmp_path):
    aside = tmp_path / ".out.neuroweave-replaced-00000000"
    make_full(aside)
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert names(tmp_path / "out") == ["x"]


def test_names_with_wildcards(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_GRACE_SECONDS", 0.0)
    other = tmp_path / ".out1.neuroweave-partial-00000000"
    other.mkdir()
    time.sleep(0.01)
    with staged_folder(tmp_path / "out[1]"):
        pass
    assert other.exists()


def test_free_space(tmp_path, monkeypatch):
    check_free_space(tmp_path / "not" / "yet", 1)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10 - 5 * 10**8, 5 * 10**8)
    )
    with pytest.raises(ValueError, match=r"2\.00 GB are needed here, 0\.50 GB are free; make room"):
        check_free_space(Path(tmp_path), 2 * 10**9)
