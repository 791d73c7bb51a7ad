"""What `neuroweave calibrate` brings back: KL, cosine of logits and perplexity on held-out prose, before and after.

    python benchmarks/calibration.py MODEL --tokens 49152 --activations silu_tanh "relu|silu" "relu|gelu|silu" phantom

Calibrates on the shipped calibration and training text, measures on the evaluation text. Prints a Markdown table, a row
an activation, as it goes.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import neuroweave
from neuroweave.checkpoint.loading import load_tokenizer
from neuroweave.diagnose.environment import describe_environment
from neuroweave.surgery.calibration.calibrate import CalibrationOptions, calibrate
from neuroweave.surgery.calibration.on_disk import draw_calibration_windows
from neuroweave.surgery.recipe import shipped_recipes
from neuroweave.text import documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--activations", nargs="+", default=["silu_tanh", "relu|silu", "relu|gelu|silu", "phantom"])
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    texts = [*documents("calibration"), *documents("training")]
    learned = draw_calibration_windows(texts, tokenizer, tokens=options.tokens, window=options.window, seed=0)
    held_out = draw_calibration_windows(
        documents("evaluation"), tokenizer, tokens=options.evaluation_tokens, window=options.window, seed=0
    )
    machine = describe_environment()
    print(f"{machine.cpu}, {machine.threads} threads, {machine.date}")
    print(f"{options.model.name}, {learned.numel():,} tokens, measured on {held_out.numel():,}\n", flush=True)
    print("| activation | KL before | KL after | cosine after | perplexity: original, before, after | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.activations:
        print(row(options.model, name, learned, held_out), flush=True)
        gc.collect()


def recipe_of(name: str) -> dict | str:
    """A site and its activation (`attention.v=phantom`), the name of a shipped recipe, or an activation of all MLPs."""
    site, equals, activation = name.rpartition("=")
    if name in shipped_recipes():
        return name
    return {"sites": [{"site": site if equals else "mlp", "activation": activation}]}


def row(folder: Path, name: str, learned: torch.Tensor, held_out: torch.Tensor) -> str:
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    neuroweave.patch(student, recipe_of(name))
    before = distance(student, teacher, held_out)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        calibrate(student, teacher, learned, folder=Path(scratch), options=CalibrationOptions())
    seconds = time.perf_counter() - began
    after = distance(student, teacher, held_out)
    return (
        f"| {name} | {before['kl']:.4f} | {after['kl']:.4f} | {after['cosine']:.4f} | "
        f"{after['original']:.2f}, {before['perplexity']:.2f}, {after['perplexity']:.2f} | {seconds:.0f} |"
    )


@torch.no_grad()
def distance(student: torch.nn.Module, teacher: torch.nn.Module, windows_NT: torch.Tensor) -> dict[str, float]:
    """Means over the windows' predictions: KL(teacher || student), cosine of logits, perplexities."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for window in windows_NT:
        theirs, ours = (model(window[None]).logits[0, :-1] for model in (teacher, student))
        log_theirs, log_ours = theirs.log_softmax(-1), ours.log_softmax(-1)
        following = window[1:, None]
        sums += torch.stack(
            [
                (log_theirs.exp() * (log_theirs - log_ours)).sum(),
                torch.cosine_similarity(theirs, ours, dim=-1).sum(),
                -log_theirs.gather(-1, following).sum(),
                -log_ours.gather(-1, following).sum(),
            ]
        ).double()
        count += len(following)
    kl, cosine, original, now = (sums / count).tolist()
    return {"kl": kl, "cosine": cosine, "original": math.exp(original), "perplexity": math.exp(now)}


if __name__ == "__main__":
    main()
