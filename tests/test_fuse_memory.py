"""Peak resident memory of `neuroweave fuse` on a tensor larger than it may hold: whole processes, read at their end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from neuroweave.checkpoint import Checkpoint, ShardWriter, TensorSpec, plan_shards

ROWS, COLUMNS = 1021, 146_933  # 300 MB in bfloat16
COVERED = 767, 97_943  # the delta's: 150 MB
LIMIT = 130_000_000  # bytes; the process takes 65 to 90 MB, so that either tensor held whole is too much
NAME = "model.embed_tokens.weight"
RUN = """
import sys
from pathlib import Path
from neuroweave.cli.main import main
from neuroweave.surgery.fusion import compiled
compiled.WORTH_BYTES = 1
try:
    main(sys.argv[1:])
finally:
    status = Path("/proc/self/status").read_text()
    print("torch" in sys.modules, status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with `model` and `deltas`; removed at the end of the module."""
    folder = tmp_path_factory.mktemp("large")
    write(folder / "model", [TensorSpec(NAME, "BF16", (ROWS, COLUMNS)), TensorSpec("model.norm.weight", "BF16", (7,))])
    write(folder / "deltas", [TensorSpec(NAME, "BF16", COVERED)])
    yield folder
    shutil.rmtree(folder)


def write(folder, specs):
    folder.mkdir()
    values = np.random.default_rng(len(specs)).standard_normal(999_983, np.float32) * np.float32(0.02)
    block = memoryview(values.astype(ml_dtypes.bfloat16).view("u1"))
    with ShardWriter(folder, plan_shards(specs, "1GB")) as writer:
        for spec in specs:
            for begin in range(0, spec.nbytes, len(block)):
                writer.write_at(spec.name, begin, block[: min(len(block), spec.nbytes - begin)])


@pytest.mark.parametrize("compiled", ["0", "1"], ids=["NumPy", "compiled"])
@pytest.mark.parametrize("options", [(), ("--no-hash", "--workers", "4")], ids=["hashed", "four workers"])
def test_a_tensor_of_any_size_costs_blocks(large, options, compiled):
    out = large / "out"
    words = ["fuse", "--model", large / "model", "--weights", large / "deltas", "--output", out, "--overwrite"]
    words += ["--mode", "additive", "--targets", "all", "--alpha", "1", *options]
    cache = {"NEUROWEAVE_COMPILED": compiled, "NEUROWEAVE_CACHE": str(large / "cache")}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | cache
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    torch_imported, peak = done.stderr.split()[-2:]
    assert torch_imported == "False"
    assert int(peak) * 1024 < LIMIT
    assert compiled == "0" or list((large / "cache").rglob("*.so"))
    with Checkpoint(large / "model") as before, Checkpoint(out) as after:
        for row, columns in ((0, COVERED[1]), (COVERED[0] - 1, COVERED[1]), (COVERED[0], 0), (ROWS - 1, 0)):
            rows = [each.read_numpy(NAME, slice(row, row + 1))[0].view("u2") for each in (before, after)]
            assert np.count_nonzero(rows[0][:columns] != rows[1][:columns]) >= 0.9 * columns
            assert np.array_equal(rows[0][columns:], rows[1][columns:])
