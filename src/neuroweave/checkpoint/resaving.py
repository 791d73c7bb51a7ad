"""A model that was changed in memory, saved as a folder like the one that it came from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from neuroweave.checkpoint.reader import WEIGHT_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_stored(folder: Path) -> PreTrainedModel:
    """The model in the dtype that it is stored in, in eval mode, weights mapped from the disk where possible."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def save_like(model: PreTrainedModel, source: Path, folder: Path, *, leave: tuple[str, ...] = ()) -> None:
    """Write weights and config of `model` into `folder`, and every other file of `source` that is not weights.

    So tokenizer, chat template and licence come along. `leave`: names of files that do not.
    """
    model.save_pretrained(folder)
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or file.name.endswith(WEIGHT_FILES) or str(name) in leave:
            continue
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
