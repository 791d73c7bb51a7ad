"""Compile a C++ source once for this machine, and load it.

Built with ctypes in mind: no Python or PyTorch headers, so a build takes two seconds, not forty, and one library serves
every Python and PyTorch version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from neuroweave.user_cache import user_cache

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w", "-pthread")
HEADERS = Path(__file__).parent
SWITCH = "NEUROWEAVE_NATIVE"  # 0: as if there were no compiler
TIMEOUT = 300  # seconds


class NativeUnavailableError(RuntimeError):
    """There is no compiled code on this machine; the message says why."""


def library(source: str) -> ctypes.CDLL:
    """The library made from a C++ source, which may include the headers beside this file.

    Raises NativeUnavailableError without a compiler, when it fails, and when `NEUROWEAVE_NATIVE=0`.
    """
    if os.environ.get(SWITCH) == "0":
        raise NativeUnavailableError(f"{SWITCH} is 0")
    return built(source)


def available() -> bool:
    """Whether there is a compiler to try."""
    try:
        return os.environ.get(SWITCH) != "0" and bool(find_compiler())
    except NativeUnavailableError:
        return False


@functools.lru_cache(maxsize=64)
def built(source: str) -> ctypes.CDLL:
    compiler = find_compiler()
    flags = (*FLAGS, *machine_flags())
    digest = hashlib.sha256("\0".join([source, headers(), compiler, *flags, machine()]).encode()).hexdigest()
    path = user_cache() / "native" / f"{digest[:32]}.so"
    if not intact(path):  # half of a library ends the process that loads it
        compile_to(path, compiler, flags, source)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded ({error}); delete it and try again") from error


def intact(path: Path) -> bool:
    """Whether a library is there as it was made: its SHA-256 lies beside it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sum_of(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def sum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def compile_to(path: Path, compiler: str, flags: tuple[str, ...], source: str) -> None:
    """Compile beside `path` and put it there in one step, so that processes may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            code, made = Path(folder, "source.cpp"), Path(folder, "made.so")
            code.write_text(source)
            command = [compiler, *flags, f"-I{HEADERS}", str(code), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            if done.returncode:
                raise NativeUnavailableError(f"{compiler} failed: {done.stderr.strip()[:2000]}")
            if not made.is_file():
                raise NativeUnavailableError(f"{compiler} made no library, and said nothing of it")
            total = Path(folder, "sum")
            total.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            os.replace(made, path)
            os.replace(total, sum_of(path))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"nothing could be compiled into {path.parent} ({error})") from error


def find_compiler() -> str:
    """`CXX`, or the first of the usual names."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeUnavailableError("there is no C++ compiler (c++, g++, clang++); install one, or set CXX to it")


def machine_flags() -> tuple[str, ...]:
    if platform.machine() in ("arm64", "aarch64"):
        return ("-mcpu=native",)
    return "-march=native", "-mprefer-vector-width=512"


@functools.cache
def machine() -> str:
    """What the compiled code depends on: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join([platform.system(), platform.machine(), platform.processor(), flags])


@functools.cache
def headers() -> str:
    return "\0".join(path.read_text() for path in sorted(HEADERS.glob("*.h")))
