"""A teacher's most likely tokens for rows of text, computed once, kept on disk and mapped when they are read.

The folder: `ids.npy` [R, T, K] int32, `log_probabilities.npy` [R, T, K] float16 or float32, `log_rest.npy` [R, T]
float32 (of the mass of all other tokens), and `teacher_logits.json` with the fingerprint of what they were made of.
Letters: R rows of text, T positions, K tokens kept of each, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from neuroweave.checkpoint.staging import check_free_space, staged_folder
from neuroweave.training.distillation import top_of

RECORD_FILE = "teacher_logits.json"
FILES = ("ids", "log_probabilities", "log_rest")
FORMAT_VERSION = 1
DTYPES = ("float16", "float32")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """The arrays of a cache, mapped from the disk."""

    ids: np.ndarray
    log_probabilities: np.ndarray
    log_rest: np.ndarray

    def at(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, T, K], their log probabilities [B, T, K] and log of the rest's mass [B, T] of these rows of text."""
        chosen = list(rows)
        arrays = (self.ids[chosen], self.log_probabilities[chosen], self.log_rest[chosen])
        ids, log_p, log_rest = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return ids, log_p, log_rest


def fingerprint_of(**parts: Any) -> str:
    """SHA-256 of plain values by name: of the teacher's files, the text's tokens, k and the temperature."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cache_teacher_logits(
    folder: str | Path,
    rows_RT: Int[Tensor, "R T"],
    logits_of: Callable[[Tensor], Tensor],
    *,
    k: int,
    fingerprint: str,
    temperature: float = 1.0,
    dtype: str = "float16",
    progress: Progress | None = None,
) -> TeacherLogits:
    """The teacher's `k` most likely tokens at every position of the rows; read from `folder` where they are there.

    `logits_of`: token ids [1, T] -> logits [1, T, V], without a gradient. A folder of another fingerprint, or a
    damaged one, is made anew; it appears whole or not at all. `progress`: told (rows done, rows).
    Raises ValueError for a k that the vocabulary does not have, or too little room on the disk.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} of cached logits; choose from {', '.join(DTYPES)}")
    if (found := open_teacher_logits(folder, fingerprint=fingerprint, shape=(*rows_RT.shape, k))) is not None:
        return found
    count, length = rows_RT.shape
    shapes = {"ids": (count, length, k), "log_probabilities": (count, length, k), "log_rest": (count, length)}
    kinds = {"ids": np.dtype(np.int32), "log_probabilities": np.dtype(dtype), "log_rest": np.dtype(np.float32)}
    check_free_space(folder, sum(int(np.prod(shapes[name])) * kinds[name].itemsize for name in FILES))
    with staged_folder(folder, overwrite=True) as staging:
        arrays = {
            name: np.lib.format.open_memmap(staging / f"{name}.npy", "w+", dtype=kinds[name], shape=shapes[name])
            for name in FILES
        }
        for row in range(count):
            logits_TV = logits_of(rows_RT[row : row + 1])[0]
            if k > logits_TV.shape[-1] or k < 1:
                raise ValueError(f"the {k} most likely tokens of a vocabulary of {logits_TV.shape[-1]}; give fewer")
            for name, value in zip(FILES, top_of(logits_TV, k, temperature=temperature), strict=True):
                arrays[name][row] = value.cpu().numpy()
            if progress is not None:
                progress(row + 1, count)
        for array in arrays.values():
            array.flush()
        del arrays
        record = {"format": FORMAT_VERSION, "fingerprint": fingerprint, "k": k, "temperature": temperature}
        (staging / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    found = open_teacher_logits(folder, fingerprint=fingerprint, shape=(count, length, k))
    if found is None:
        raise ValueError(f"{folder}: changed while it was written; run the same command again")
    return found


def open_teacher_logits(folder: Path, *, fingerprint: str, shape: tuple[int, int, int]) -> TeacherLogits | None:
    """The cache in `folder`, or None where there is none that was made of the same and has this shape [R, T, K]."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["format"] != FORMAT_VERSION or record["fingerprint"] != fingerprint:
            return None
        found = TeacherLogits(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in FILES))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    wanted = (shape, shape, shape[:2])
    whole = all(array.shape == size for array, size in zip(vars(found).values(), wanted, strict=True))
    return found if whole else None
