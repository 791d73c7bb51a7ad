"""A stream of rows as the map-style dataset that the loop takes: asked in order, it gives one row after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from neuroweave.training.streaming import StreamedRows


class StreamDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """`count` samples of the run, of which this process takes its share from a stream of its own.

    The sampler gives each process growing numbers; the stream is already divided among the processes, so which number
    is asked for says only that the next row is due. Its place is kept beside each checkpoint.
    """

    def __init__(self, stream: StreamedRows, count: int, *, process: int = 0) -> None:
        self.stream, self.count, self.process = stream, count, process

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in next(self.stream).items()}

    def save_place(self, checkpoint: Path, rows: int) -> None:
        """Remember the place after the `rows` rows that this process has trained on; it has fetched some more."""
        self._file(checkpoint).write_text(json.dumps(self.stream.state_at(rows)), encoding="utf-8")

    def restore_place(self, checkpoint: Path) -> None:
        """Go on from there. Raises ValueError for a checkpoint of another number of processes."""
        file = self._file(checkpoint)
        if not file.is_file():
            raise ValueError(
                f"{checkpoint}: holds no place in the stream for process {self.process}; a streamed run goes on with "
                f"as many processes as it began with (data.streaming: false has no such limit)"
            )
        self.stream.restore(json.loads(file.read_text(encoding="utf-8")))

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / f"stream_{self.process}.json"
