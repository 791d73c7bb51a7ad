"""Two real models for every test: imported once per run, shared by the workers of pytest-xdist, removed at the end. A
browser, too."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from neuroweave.checkpoint import embedded_gguf, import_checkpoint

if TYPE_CHECKING:
    from chromium import Chromium

_MODELS = "models"
# Before anything imports JAX: its tests lay models over eight devices of one CPU. They compile more than they compute.
_XLA = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("XLA_FLAGS", " ".join(_XLA))
# What one test compiles, others and the processes that they start need not compile again.
_COMPILED = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="neuroweave-jax-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("NEUROWEAVE_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])


def _models_folder(factory: pytest.TempPathFactory, worker: str) -> Path:
    base = factory.getbasetemp()
    folder = (base if worker == "master" else base.parent) / _MODELS
    folder.mkdir(exist_ok=True)
    return folder


def _worker(request: pytest.FixtureRequest) -> str:
    return getattr(request.config, "workerinput", {}).get("workerid", "master")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1)."""
    return embedded_gguf("smollm2")


@pytest.fixture(scope="session")
def gemma3_gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of Gemma 3 270M (Q4_K_M), joined from its parts."""
    folder = _models_folder(tmp_path_factory, _worker(request))
    with FileLock(folder / "gemma3-gguf.lock"):
        return embedded_gguf("gemma3", cache=folder)


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder, float32. Do not write into it."""
    return _imported(_models_folder(tmp_path_factory, _worker(request)) / "smollm2", smollm2_gguf)


@pytest.fixture(scope="session")
def gemma3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, gemma3_gguf: Path) -> Path:
    """Gemma 3 270M as a checkpoint folder of two shards, float32. Do not write into it."""
    return _imported(_models_folder(tmp_path_factory, _worker(request)) / "gemma3", gemma3_gguf, max_shard_size="700MB")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words, and sixty documents of them."""
    from tiny_llama import texts, tiny_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "texts").mkdir()
    for text in texts(60, 70):
        (folder / "texts" / f"{text.name}.txt").write_text(text.text, encoding="utf-8")
    return folder


def _imported(folder: Path, gguf: Path, max_shard_size: str = "2GB") -> Path:
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            import_checkpoint(gguf, folder, max_shard_size=max_shard_size)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The process that started the run removes the 1.9 GB of models; the workers leave them to each other."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None and not hasattr(session.config, "workerinput"):
        shutil.rmtree(factory.getbasetemp() / _MODELS, ignore_errors=True)
        if _COMPILED is not None:
            shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    from chromium import Chromium

    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def reciting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes every model of a server say what it is told to."""
    from served_page import recite

    return functools.partial(recite, monkeypatch)


@pytest.fixture
def dawdling(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes every model of a server slow, in what it begins from then on."""
    from serving import dawdle

    return functools.partial(dawdle, monkeypatch)
