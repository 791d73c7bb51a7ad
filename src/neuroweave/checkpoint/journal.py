"""A journal of finished files in a folder that is still being written, so that an interrupted job can go on.

One JSON object a line, each with the checksum of the rest of its line. A finished file counts when its size is right
and, where the entry has a hash, its bytes still have it; without a hash, when the machine has not been restarted since
(what a crash of the system leaves in a file is unknown).
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from neuroweave.checkpoint.manifest import sha256_of

JOURNAL_FILE = ".neuroweave-journal.jsonl"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The journal of the folder `stage` for the job called `key`; what another job or a torn write left is dropped."""

    def __init__(self, stage: Path, key: str) -> None:
        self.path = stage / JOURNAL_FILE
        self.stage, self.key = stage, key
        self._entries = self._read()

    def completed(self, name: str) -> dict[str, Any] | None:
        """The entry of a file that is complete and unchanged, else None."""
        entry = self._entries.get(name)
        if entry is None or not (self.stage / name).is_file():
            return None
        output = entry["output"]
        if (self.stage / name).stat().st_size != output["bytes"]:
            return None
        if "sha256" in output:
            return entry if sha256_of(self.stage / name) == output["sha256"] else None
        return entry if entry["boot"] == boot() else None

    def complete(self, name: str, **entry: Any) -> None:
        """Record that a file is complete. `entry["output"]` holds its size and, if known, its hash."""
        line = json.dumps({"key": self.key, "file": name, "boot": boot(), **entry}, separators=(",", ":"))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{zlib.crc32(line.encode()):08x} {line}\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        entries = {}
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            checksum, _, text = line.partition(" ")
            if checksum != f"{zlib.crc32(text.encode()):08x}":
                continue
            entry = json.loads(text)
            if isinstance(entry, dict) and entry.get("key") == self.key and "output" in entry:
                entries[entry["file"]] = entry
        return entries


def boot() -> str:
    """What tells one start of the machine from the next, where the system says it."""
    return _BOOT.read_text().strip() if _BOOT.is_file() else ""
