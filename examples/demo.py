"""The main job on a real model, offline: import, patch three ways, save, reload, generate, compare, report.

    make demo        (or: python -m examples.demo --out demo)

Each step is a `neuroweave` command that you can run yourself; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import click

if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PATCHES = {"silu_tanh": "silu_tanh", "relu-silu": "relu|silu", "phantom": "phantom"}
TOKENS, WINDOW = 4096, 256


def run(*words: str | Path) -> None:
    """One neuroweave command, in this process (importing PyTorch once is enough)."""
    from neuroweave.cli.main import program

    arguments = [str(word) for word in words]
    print(f"\n$ neuroweave {shlex.join(arguments)}", flush=True)
    program.main(args=arguments, prog_name="neuroweave", standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of text to measure on (default: {TOKENS})")
    arguments = parser.parse_args()
    out, start = arguments.out, time.perf_counter()
    original, comparison = out / "smollm2", out / "comparison"

    run("import", "embedded:smollm2", original, "--overwrite")
    run("inspect", original)
    for name, activation in PATCHES.items():
        run("patch", original, out / name, "--mlp", activation, "--overwrite")
    run("compare", original, *(out / name for name in PATCHES), "--out", comparison, "--tokens", str(arguments.tokens),
        "--window", str(WINDOW), "--no-sampling", "--overwrite")  # fmt: skip

    show_texts(comparison / "comparison.json")
    for name in ("report.html", "comparison.json"):
        shutil.copyfile(comparison / name, out / name)
    print(f"\nThe report: {out / 'report.html'}   ({time.perf_counter() - start:.0f} s)")


def show_texts(file: Path) -> None:
    """What each reloaded model wrote after the first prompt."""
    generated = json.loads(file.read_text(encoding="utf-8"))["generated"][0]
    print(f"\nAfter {generated['prompt']!r}, greedily:")
    for continuation in generated["continuations"]:
        print(f"  {continuation['model']:10} {continuation['text'][:120]!r}")


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, click.Abort):
        sys.exit("\nstopped; what was finished is in place, nothing is half written")
    except click.ClickException as error:
        sys.exit(f"demo: {error.format_message()}")
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
