"""Where things are kept that can be made again: compiled code, assembled files, answers of searches."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`NEUROWEAVE_CACHE`, or `neuroweave` in the user's cache folder (`XDG_CACHE_HOME`, `~/.cache`)."""
    own = os.environ.get("NEUROWEAVE_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "neuroweave"))
