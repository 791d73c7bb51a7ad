"""A base model that is no longer in memory: its hidden states on the disk, and its output head.

So models that do not fit together are measured one after the other, and every number is the same as if they did.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neuroweave.checkpoint.staging import check_free_space
from neuroweave.diagnose.probes.head import Head, OutputHead, plain_projection
from neuroweave.diagnose.probes.prediction import LiveReader, Seen
from neuroweave.text.sample import Sample, Window

_LOGITS = "logits"
_HEAD = "head.safetensors"


class StoredReader:
    """What `store` wrote, read back window by window. Holds the model's head, if it has one, and no more of it."""

    def __init__(self, reader: LiveReader, folder: Path) -> None:
        self.name, self.vocabulary = reader.name, reader.vocabulary
        self.folder, self.device = folder, reader.subject.device
        self._head: OutputHead | None = reader.head
        self._scale: Callable[[Tensor], Tensor] | None = None  # of a head that is in the folder

    def read(self, window: Window, number: int) -> Seen:
        tensors = load_file(window_file(self.folder, number), device=str(self.device))
        logits = tensors.pop(_LOGITS, None)
        states = [tensors[str(depth)] for depth in range(len(tensors))]
        if logits is not None:
            return Seen(states, lambda rows: logits[rows])
        head, last = self._head or self._stored_head(), states[-1]
        return Seen(states, lambda rows: head(last[rows]))

    def release(self) -> None:
        """Hold nothing of the model any more: its head goes to a file, mapped while a window is worked on.

        A head that lies in a checkpoint's mapped file would keep all of that file mapped. On another device than the
        CPU, and where it is no plain linear layer, the head is held as before.
        Raises ValueError when the disk has too little room.
        """
        head, projection = self._head, plain_projection(self._head)
        if head is None or projection is None or self.device.type != "cpu":
            return
        parts = {name: part.contiguous() for name, part in projection.state_dict().items()}
        check_free_space(self.folder, sum(part.nbytes for part in parts.values()))
        save_file(parts, self.folder / _HEAD)
        self._head, self._scale = None, head.scale

    def _stored_head(self) -> Head:
        parts, scale = load_file(self.folder / _HEAD), self._scale
        assert scale is not None
        return lambda states: scale(nn.functional.linear(states, parts["weight"], parts.get("bias")))


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
