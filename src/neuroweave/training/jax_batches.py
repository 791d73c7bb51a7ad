"""The rows of each step as arrays over the mesh; each host reads what its own devices work on, and no more.

Letters: A passes of a step, B rows of a pass over all devices, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from neuroweave.training.jax_mesh import place_rows, row_places
from neuroweave.training.jax_processes import from_all
from neuroweave.training.packing import IGNORED
from neuroweave.training.rows import RunRows

NAMES = ("input_ids", "position_ids", "labels")


class Batches:
    """Batches [A, B, T] of a run's steps. `rows`: of a step, over all hosts; `passes`: A.

    Read by index, a step has the same rows for any number of hosts. Of a stream each host has its own, and takes its
    share of each step from it in order. Raises ValueError for a stream whose rows several hosts would need.
    """

    def __init__(self, source: RunRows, mesh: Any, *, rows: int, passes: int) -> None:
        self.source, self.mesh, self.rows, self.passes = source, mesh, rows, passes
        self.sharding = place_rows(mesh)
        self.streamed = source.epoch is None
        if self.streamed and jax.process_count() > 1:
            self.check_rows_of_hosts()

    def check_rows_of_hosts(self) -> None:
        """Every row of a stream must be needed by one host alone."""
        per_host = self.rows // self.passes // jax.process_count()
        mine = self.local_rows(self.rows // self.passes)
        if max(from_all(len(mine))) != per_host or self.rows // self.passes % jax.process_count():
            raise ValueError(
                "data.streaming: with this mesh, several hosts work on the same rows, and each reads a stream of its "
                "own; make jax.tensor divide the devices of one host, or set data.streaming: false"
            )

    def local_rows(self, rows: int) -> list[int]:
        """Which rows of a pass this host's devices work on, ascending."""
        places = self.sharding.addressable_devices_indices_map((1, rows, 1)).values()
        return sorted({number for place in places if place for number in range(rows)[place[1]]})

    def of_step(self, step: int) -> dict[str, Array]:
        """The batch of step `step`, counted from 0."""
        size = self.rows // self.passes
        if self.streamed:
            mine = self.local_rows(size)
            taken = [[next(self.source.training) for _ in mine] for _ in range(self.passes)]
            found = {(a, number): row for a, rows in enumerate(taken) for number, row in zip(mine, rows, strict=True)}
        else:
            found = {}
        first = step * self.rows

        def row(a: int, number: int) -> dict[str, np.ndarray]:
            if (a, number) not in found:
                found[a, number] = arrays(self.source.training.row(first + a * size + number))
            return found[a, number]

        return self.placed(row, self.passes, size)

    def held_out(self, rows_of_a_place: int) -> Iterator[dict[str, Array]]:
        """The held-out rows [1, B, T], each once; the last batch is filled up with rows whose labels are ignored."""
        size = rows_of_a_place * row_places(self.mesh)
        count = self.source.held_out_count
        for first in range(0, count, size):

            def row(_: int, number: int, first: int = first) -> dict[str, np.ndarray]:
                there = first + number < count
                found = arrays(self.source.held_out.row(first + number if there else 0))
                return found if there else found | {"labels": np.full_like(found["labels"], IGNORED)}

            yield self.placed(row, 1, size)

    def placed(self, row: Any, passes: int, size: int) -> dict[str, Array]:
        """Rows as global arrays, each device's part put together on the host that has it."""
        length = len(row(0, self.local_rows(size)[0])["input_ids"])

        def array(name: str) -> Array:
            def part(index: Any) -> np.ndarray:
                numbers = range(size)[index[1]]
                stacked = [[row(a, number)[name] for number in numbers] for a in range(passes)[index[0]]]
                return np.asarray(stacked, dtype=np.int32)[:, :, index[2]]

            return jax.make_array_from_callback((passes, size, length), self.sharding, part)

        return {name: array(name) for name in NAMES}

    # ------------------------------------------------------------------------------------------------- their place

    def place(self) -> dict[str, Any]:
        """What a checkpoint after the last step's batch remembers; nothing of rows that are read by index."""
        if not self.streamed:
            return {}
        return {"streams": from_all(self.source.training.state_at(self.source.training.rows))}

    def restore(self, place: dict[str, Any], checkpoint: Path) -> None:
        """Go on from there. Raises ValueError for streams of another number of hosts."""
        if not self.streamed:
            return
        streams = place.get("streams") or []
        if len(streams) != jax.process_count():
            raise ValueError(
                f"{checkpoint}: holds places in {len(streams)} streams, but there are {jax.process_count()} hosts; a "
                f"streamed run goes on with as many hosts as it began with (data.streaming: false has no such limit)"
            )
        self.source.training.restore(streams[jax.process_index()])


def arrays(row: Any) -> dict[str, np.ndarray]:
    return row if isinstance(row, dict) else row.arrays()
