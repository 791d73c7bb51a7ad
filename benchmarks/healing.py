"""What `neuroweave heal` brings on top of `neuroweave calibrate`: KL, cosine and perplexity on held-out prose.

    python benchmarks/healing.py MODEL --activations "relu|silu" --calibration-tokens 24576 --tokens 262144
    python benchmarks/healing.py MODEL --activations phantom --calibration-tokens 0 --blend 200
    python benchmarks/healing.py MODEL --text CORPUS       # of benchmarks/build_corpus.py --large CORPUS

Patches, calibrates and heals on the calibration and training text (the shipped one, or the larger corpus of the same
split), measures on the shipped evaluation text. Prints a Markdown table, three rows an activation, as it goes; with
`--tokens 0` it ends behind the calibration. What is not named here is as in `HealOptions`.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from calibration import distance
from transformers import AutoModelForCausalLM

from neuroweave.checkpoint.loading import load_tokenizer
from neuroweave.diagnose.environment import describe_environment
from neuroweave.diagnose.probes.head import find_head
from neuroweave.surgery.blending import Blending
from neuroweave.surgery.calibration.calibrate import CalibrationOptions
from neuroweave.surgery.calibration.on_disk import calibrate_checkpoint, draw_calibration_windows
from neuroweave.surgery.on_disk import patch_checkpoint
from neuroweave.text import documents
from neuroweave.training.heal import HealOptions, heal_checkpoint

FIELDS = {field.name: field for field in fields(HealOptions)}


def main() -> None:
    options = arguments()
    chosen: dict[str, Any] = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    settings = HealOptions(**chosen)
    held_out = draw_calibration_windows(
        documents("evaluation"),
        load_tokenizer(options.model),
        tokens=options.evaluation_tokens,
        window=settings.window,
        seed=0,
    )
    machine = describe_environment()
    print(f"{machine.cpu}, {machine.threads} threads, {machine.date}")
    print(f"{options.model.name}, {settings}, measured on {held_out.numel():,} tokens\n", flush=True)
    print("| activation | step | KL | cosine | perplexity (original) | seconds | tokens/s | peak memory, GB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.activations:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            heal_one(name, options, settings, held_out, options.keep or Path(scratch))
        gc.collect()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--activations", nargs="+", default=["relu|silu"])
    parser.add_argument("--calibrated", type=Path, help="begin with this calibrated folder of the one activation")
    parser.add_argument("--calibration-tokens", type=int, default=24_576, help="0: heal without calibrating before")
    parser.add_argument("--refine", type=int, default=0, help="of the calibration: passes that train each MLP")
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    parser.add_argument("--text", type=Path, help="a larger corpus, built by build_corpus.py --large")
    parser.add_argument("--scratch", type=Path, help="where the models in between are written")
    parser.add_argument("--keep", type=Path, help="leave the models in this folder")
    for name, field in FIELDS.items():
        kind = {"evaluate_every": int, "learning_rate": float}.get(name, type(field.default))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    return parser.parse_args()


def heal_one(name: str, options: Any, settings: HealOptions, held_out: torch.Tensor, scratch: Path) -> None:
    texts = [*documents("calibration", folder=options.text), *documents("training", folder=options.text)]
    activation = {"segments": name.split("|")} if "|" in name else name
    begin = options.calibrated
    if begin is None:
        begin = scratch / "patched"
        patch_checkpoint(options.model, begin, {"sites": [{"site": "mlp", "activation": activation}]})
        show(name, "patched", begin, options.model, held_out)
        if options.calibration_tokens:
            began = time.perf_counter()
            calibrate_checkpoint(
                begin,
                options.model,
                scratch / "calibrated",
                texts,
                tokens=options.calibration_tokens,
                options=CalibrationOptions(refine=options.refine),
            )
            begin = scratch / "calibrated"
            show(name, "calibrated", begin, options.model, held_out, time.perf_counter() - began)
    else:
        show(name, "calibrated", begin, options.model, held_out)
    if options.tokens == 0:
        return
    done = heal_checkpoint(
        begin,
        options.model,
        scratch / "healed",
        texts,
        options=settings,
        blend=Blending,
        find_head=find_head,
        report=lambda line: print(f"<!-- {line} -->", flush=True),
    )
    show(
        name, f"healed, {done.tokens:,} tokens", scratch / "healed", options.model, held_out, done.seconds, done.tokens
    )


def show(
    name: str, step: str, folder: Path, model: Path, held_out: torch.Tensor, seconds: float = 0.0, tokens: int = 0
) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval() for x in (folder, model))
    found = distance(student, teacher, held_out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"| {name} | {step} | {found['kl']:.4f} | {found['cosine']:.4f} | {found['perplexity']:.2f} "
        f"({found['original']:.2f}) | {seconds:.0f} | {tokens / seconds if tokens else 0:.0f} | {peak:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
