"""Peak resident memory of `neuroweave fuse` by the size of the model, and with one very large tensor.

    python benchmarks/fusion_memory.py [--gigabytes 1 6 12] [--tensor 3] [--no-hash]

The process is watched from outside: VmHWM of /proc/PID/status, which counts everything resident, mapped files such as
Python's own libraries included; RssAnon (the program's own memory) and RssFile (mapped files) are given apart. The
page cache, which the kernel takes back when it needs it, is not the process's. Models are synthetic bfloat16 Llamas
with real random values in one file; the one large tensor is the down_proj of a single layer. Everything is deleted on
the way; the largest size needs about 2.5 times itself on the disk, the one tensor 7 times.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from synthetic_checkpoints import write_deltas, write_llama, write_random
from whole_process import NEUROWEAVE, folder_bytes, machine, print_rows, run

from neuroweave.checkpoint import Checkpoint, TensorSpec

LIMIT = 200e6  # bytes, whatever the size
WIDE = 1 << 18  # intermediate size of the one large tensor: rows of 512 KiB


def one_tensor(gigabytes: float) -> list[TensorSpec]:
    """A decoder of one layer whose down_proj alone has about that size; gate and up are narrow."""
    hidden = max(1, round(gigabytes * 1e9 / 2 / WIDE))
    prefix = "model.layers.0.mlp"
    return [
        TensorSpec("model.embed_tokens.weight", "BF16", (64, hidden)),
        TensorSpec(f"{prefix}.gate_proj.weight", "BF16", (WIDE, hidden)),
        TensorSpec(f"{prefix}.up_proj.weight", "BF16", (WIDE, hidden)),
        TensorSpec(f"{prefix}.down_proj.weight", "BF16", (hidden, WIDE)),
    ]


def measure(label: str, model: Path, deltas: Path, scratch: Path, hashed: bool) -> tuple[str, ...]:
    """One row: the fuse of a model, its output removed."""
    out = scratch / "out"
    command = [NEUROWEAVE, "fuse", "--model", str(model), "--weights", str(deltas), "--output", str(out)]
    with Checkpoint(deltas) as checkpoint:
        roles = sorted({"gate" if "gate_proj" in name else "down" for name in checkpoint})
    command += ["--targets", ",".join(roles)]
    found = run([*command, *([] if hashed else ["--no-hash"])], bytecode=scratch / "bytecode", watched=True)
    size = folder_bytes(model)
    shutil.rmtree(out)
    met = "met" if found.peak <= LIMIT else "missed"
    sizes = (f"{value / 1e6:.0f} MB" for value in (found.peak, found.anonymous, found.mapped))
    return (label, f"{size / 1e9:.2f} GB", *sizes, f"{found.seconds:.1f} s", f"at most {LIMIT / 1e6:.0f} MB: {met}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes", type=float, nargs="*", default=[1, 6, 12], help="sizes of the models, 10^9 bytes"
    )
    parser.add_argument("--tensor", type=float, default=3, help="size of the one large tensor; 0 leaves it out")
    parser.add_argument("--no-hash", action="store_true", help="without the hashes that are the default of fuse")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to use; default: the system's own")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        model, deltas = scratch / "model", scratch / "deltas"
        print(f"{machine(scratch)}, {'without' if arguments.no_hash else 'with'} hashes", flush=True)
        for gigabytes in arguments.gigabytes:
            write_llama(model, deltas, gigabytes)
            rows.append(measure("Llama", model, deltas, scratch, not arguments.no_hash))
            remove(model, deltas)
        if arguments.tensor:
            specs = one_tensor(arguments.tensor)
            write_random(model, specs)
            write_deltas(deltas, specs[-1:])
            label = f"one tensor of {specs[-1].nbytes / 1e9:.2f} GB"
            rows.append(measure(label, model, deltas, scratch, not arguments.no_hash))
            remove(model, deltas)
    print_rows(("model", "size", "peak", "anonymous", "mapped files", "time", "limit"), rows)


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
