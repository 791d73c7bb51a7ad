"""What has been measured so far, in a folder, so that an interrupted comparison goes on instead of beginning again."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LEDGER_FOLDER = "measured-so-far"


class Ledger:
    """Parts by name, each written whole or not at all. Without a folder nothing is kept.

    The caller names a folder after everything that the parts depend on; a part that cannot be read is measured again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = None if folder is None else folder / LEDGER_FOLDER
        self.taken_over: list[str] = []  # names of parts that were found
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)

    @property
    def holds_any(self) -> bool:
        """Whether there is anything to go on with."""
        return self.folder is not None and self.folder.is_dir() and any(self.folder.iterdir())

    def _file(self, name: str, suffix: str) -> Path | None:
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return None if self.folder is None else self.folder / f"{digest}{suffix}"

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays kept under `name`."""
        file = self._file(name, ".npz")
        if file is None or not file.is_file():
            return None
        try:
            with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as stored:
                found = {key: stored[key] for key in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            return None
        self.taken_over.append(name)
        return found

    def keep_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        file = self._file(name, ".npz")
        if file is not None:
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, **dict(arrays))  # type: ignore[arg-type]
            partial.replace(file)

    def record(self, name: str) -> Any | None:
        """The plain JSON value kept under `name`."""
        file = self._file(name, ".json")
        if file is None or not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        self.taken_over.append(name)
        return found

    def keep_record(self, name: str, value: Any) -> None:
        file = self._file(name, ".json")
        if file is not None:
            partial = file.with_suffix(".partial.json")
            partial.write_text(json.dumps(value), encoding="utf-8")
            partial.replace(file)

    def scratch(self, name: str) -> Path:
        """A folder for larger files of a part. Raises ValueError without a folder of the ledger."""
        if self.folder is None:
            raise ValueError("models that are measured one after the other need a folder; give the ledger one")
        return self.folder / name

    def remove(self) -> None:
        """Forget everything: the comparison is complete."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
