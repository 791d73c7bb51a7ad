"""A base model that is no longer in memory: its hidden states on the disk, and its output head.

So models that do not fit together are measured one after the other, and every number is the same as if they did.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from neuroweave.checkpoint.staging import check_free_space
from neuroweave.diagnose.passages import Sample, Window
from neuroweave.diagnose.probes.prediction import LiveReader, Seen

_LOGITS = "logits"


class StoredReader:
    """What `store` wrote, read back window by window. Holds the model's head, if it has one, and no more of it."""

    def __init__(self, reader: LiveReader, folder: Path) -> None:
        self.name, self.vocabulary, self.head = reader.name, reader.vocabulary, reader.head
        self.folder, self.device = folder, reader.subject.device

    def read(self, window: Window, number: int) -> Seen:
        tensors = load_file(window_file(self.folder, number), device=str(self.device))
        logits = tensors.pop(_LOGITS, None)
        states = [tensors[str(depth)] for depth in range(len(tensors))]
        if logits is not None:
            return Seen(states, lambda rows: logits[rows])
        head, last = self.head, states[-1]
        assert head is not None
        return Seen(states, lambda rows: head(last[rows]))


def store(
    reader: LiveReader, sample: Sample, folder: Path, *, after_window: Callable[[], object] = lambda: None
) -> StoredReader:
    """Write what the model makes of every window to files in `folder` and give a reader of them that holds no more of
    the model than its head. Windows that are there already are kept, if the model's signal is not being counted.

    Raises ValueError when the disk has too little room.
    """
    folder.mkdir(exist_ok=True)
    checked = False
    for number, window in enumerate(sample.windows):
        file = window_file(folder, number)
        if reader.signal is not None or not file.is_file():
            seen = reader.read(window, number)
            tensors = {str(depth): state.contiguous() for depth, state in enumerate(seen.states)}
            if reader.head is None:
                tensors[_LOGITS] = seen.logits(slice(None)).contiguous()
            if not checked:
                size = sum(tensor.nbytes for tensor in tensors.values()) / window.predictions
                check_free_space(folder, int(size * sample.predictions))
                checked = True
            partial = file.with_suffix(".partial")
            save_file(tensors, partial)
            partial.rename(file)
        after_window()
    return StoredReader(reader, folder)


def window_file(folder: Path, number: int) -> Path:
    return folder / f"window-{number:06d}.safetensors"
