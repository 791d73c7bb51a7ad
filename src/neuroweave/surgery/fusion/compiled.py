"""The block arithmetic compiled: `kernel.c`, built once by the system's C compiler into the user's cache folder.

An accelerator, never needed: where there is no compiler, or anything is not as it should be, `load` gives None and
NumPy does the same to the same bits. `NEUROWEAVE_COMPILED=0` does without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from neuroweave.surgery.fusion.arithmetic import (
    BFLOAT16,
    BLOCK,
    FORMULAS,
    LANES,
    Edit,
    Effect,
    Moments,
    Workspace,
    block_moments,
    edit_block,
    effect_of,
    is_sampled,
    moments_of,
)
from neuroweave.user_cache import user_cache

# Bytes of deltas. On 2 cores of an AMD EPYC the compiler takes 0.37 s, once, loading and checking what it made 3 ms;
# NumPy takes 0.34 s longer than the kernel for 0.4 GB.
WORTH_BYTES = 1 << 28
SWITCH = "NEUROWEAVE_COMPILED"
_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-fast-math", "-fPIC", "-shared")
_COMPILER_SECONDS = 60
_NUMBERS = {name: number for number, name in enumerate(FORMULAS)}  # the order of `edits` in kernel.c


class Kernel:
    """The compiled functions behind the signatures of their twins, which do what is not compiled: other dtypes than
    bfloat16, random rounding, exact moments, and errors. Raises OSError when the library cannot be loaded."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))  # it releases the lock of the interpreter while they run
        pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._edit = functions.edit_block
        self._edit.argtypes = [
            ctypes.c_int, pointer, integer, pointer, integer, integer, integer, number, number, *[pointer] * 3,
        ]  # fmt: skip
        self._edit.restype = integer
        self._add_to_lanes = functions.add_to_lanes
        self._add_to_lanes.argtypes = [pointer, integer, pointer, pointer]
        self._add_to_lanes.restype = None

    def edit_block(self, edit: Edit, w: np.ndarray, d: np.ndarray, place: int, space: Workspace) -> Effect:
        """`arithmetic.edit_block`, compiled for bfloat16."""
        if edit.seed is not None or not (_fits(w) and _fits(d) and w.flags.writeable and w.shape == d.shape):
            return edit_block(edit, w, d, place, space)
        wide, _, change = space.arithmetic(edit.dtype)
        sampled = is_sampled(place)
        rows, columns = w.shape
        if w.flags.c_contiguous and d.flags.c_contiguous:
            rows, columns = 1, w.size
        with np.errstate(over="ignore"):
            scale, gamma = float(np.float32(edit.scale)), float(np.float32(edit.gamma))
        changed = self._edit(
            _NUMBERS[edit.formula], w.ctypes.data, w.strides[0] // 2, d.ctypes.data, d.strides[0] // 2, rows, columns,
            scale, gamma, space.new(edit.dtype).ctypes.data,
            wide.ctypes.data if sampled else None, change.ctypes.data if sampled else None,
        )  # fmt: skip
        if changed < 0:
            return edit_block(edit, w, d, place, space)  # which says what is wrong
        return effect_of(changed, wide[: w.size], change[: w.size], sampled=sampled)

    def block_moments(self, values: np.ndarray, *, exact: bool, shift: float = 0.0) -> Moments:
        """`arithmetic.block_moments`, compiled for bfloat16."""
        if exact or shift or values.dtype != BFLOAT16 or not values.flags.c_contiguous:
            return block_moments(values, exact=exact, shift=shift)
        lanes = np.zeros((2, LANES), "f4")
        flat, parts = values.reshape(-1), []
        for begin in range(0, flat.size, BLOCK):
            part = flat[begin : begin + BLOCK]
            lanes[:] = 0
            self._add_to_lanes(part.ctypes.data, part.size, lanes[0].ctypes.data, lanes[1].ctypes.data)
            parts.append(lanes.sum(axis=1, dtype="f8"))
        return moments_of(values, parts)


def _fits(block: np.ndarray) -> bool:
    return block.dtype == BFLOAT16 and block.ndim == 2 and block.strides[1] == 2 and block.flags.aligned


def load(delta_bytes: int) -> Kernel | None:
    """The kernel where it is worth it, compiled if need be; None where NumPy is to do the work."""
    if delta_bytes < WORTH_BYTES or os.environ.get(SWITCH) == "0" or os.name != "posix":
        return None
    try:
        library = _folder() / f"fusion-{_key()}.so"
        return checked(library) if library.is_file() else compile_kernel(library)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return None


def _folder() -> Path:
    """Where compiled code is kept. Raises ValueError for a folder that somebody else can write to."""
    folder = user_cache() / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.geteuid() or state.st_mode & 0o022:
        raise ValueError(f"{folder}: others can write here; code from it is not run")
    return folder


def _key() -> str:
    """Sixteen digits that change with the source, the flags and the processor."""
    return hashlib.sha256(repr((_SOURCE.read_bytes(), _FLAGS, os.uname().machine, _features())).encode()).hexdigest()[
        :16
    ]


def _features() -> str:
    """What the processor can do, in the system's words; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return ""


def compile_kernel(library: Path) -> Kernel | None:
    """Compile `kernel.c` to `library`, which appears once it has proven itself; None without a compiler that can."""
    import subprocess

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    native = ("-march=native",) if _features() else ()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *_FLAGS, *native, "-o", str(made), str(_SOURCE)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_COMPILER_SECONDS
            )
        except subprocess.SubprocessError:
            return None
        kernel = checked(made)
        if kernel is not None:
            os.replace(made, library)
        return kernel


def checked(library: Path) -> Kernel | None:
    """The kernel of a library, if it does what NumPy does, with every small bfloat16 and with values of one size: the
    bits of the results, and of the changes before rounding, where a fused multiply-add would show."""
    kernel, spaces = Kernel(library), (Workspace(), Workspace())
    small = np.arange(1 << 16, dtype="u2")
    small = small[small & 0x7F80 < 0x7000].view(BFLOAT16)[None, 3:]
    even = np.linspace(-1, 1, 3 * LANES + 7).astype(BFLOAT16)[None]
    for weights, factor in ((small, 1e-30), (even, 0.07)):
        delta = weights[:, ::-1] * BFLOAT16.type(factor)
        for formula in FORMULAS:
            edit = Edit("", formula, "BF16", 0.0, 0.05, scale=math.pi)
            found = []
            for function, space in zip((kernel.edit_block, edit_block), spaces, strict=True):
                new = weights.copy()
                effect = function(edit, new, delta, 0, space)
                change = space.arithmetic("BF16")[-1][: new.size]
                found.append((effect, new.tobytes(), change.tobytes()))
            if found[0] != found[1]:
                return None
    return kernel if kernel.block_moments(even, exact=False) == block_moments(even, exact=False) else None
