"""`neuroweave fuse` with its arithmetic taken out: it reads and writes all the same. What remains is the time that no
faster arithmetic can save; `fusion_throughput.py` times it. The output is a copy of the model.
"""

from __future__ import annotations

from neuroweave.cli.main import main
from neuroweave.surgery.fusion import tensor_edit
from neuroweave.surgery.fusion.arithmetic import Effect, Moments

if __name__ == "__main__":
    tensor_edit.edit_rows = lambda *_: Effect(1, 1, 1.0, 1.0)
    tensor_edit.block_moments = lambda *_, **__: Moments(1 << 20, 0.0, float(1 << 20))
    main()
