"""Configurations of training runs that take seconds; the fixture `corpus` has their text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def content(corpus: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration of seconds; `sections` are put over it."""
    base: dict[str, Any] = {
        "model": {
            "preset": "tiny",
            "settings": {
                "hidden_size": 32,
                "num_sensory_layers": 2,
                "num_associative_layers": 2,
                "num_motor_layers": 1,
            },
        },
        "tokenizer": {"path": str(corpus / "tokenizer")},
        "data": {"sources": [{"path": str(corpus / "texts")}], "sequence_length": 32, "held_out": 0.1},
        "training": {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "precision": "float32", "warmup_steps": 2},
        "metrics": {"log_every": 1},
        "output": {"folder": str(out), "save_every": 3},
    }
    for name, section in sections.items():
        base[name] = base[name] | section
    return base


def written(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path
