"""What a swap of the MLP activations does to a real model, nothing tuned: the table of docs/measurements.md.

    python benchmarks/activation_swaps.py [--model embedded:smollm2] [--recipes NAME ...] [--data TEXT ...]

Each recipe is patched in memory and measured against the original, on the shipped evaluation prose or a text of yours.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import neuroweave
from neuroweave.checkpoint import import_checkpoint
from neuroweave.checkpoint.loading import load_model, load_tokenizer
from neuroweave.diagnose import Subject, compare
from neuroweave.diagnose.report.numbers import bracketed
from neuroweave.diagnose.variants import variant_plan
from neuroweave.text import documents, read_documents

RECIPES = ("silu-tanh-mlp", "automixed-relu-silu", "automixed-relu-gelu-silu", "phantom-mlp", "learned-mixture")


def subjects(folder: Path, recipes: Sequence[str]) -> Iterator[Subject]:
    for recipe in recipes:
        model, _ = load_model(folder)
        neuroweave.patch(model, recipe)
        yield Subject(recipe, model, load_tokenizer(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2", help="what `neuroweave import` takes")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--data", nargs="+", type=Path, help="text files or folders in place of the shipped prose")
    arguments = parser.parse_args()
    text = read_documents(arguments.data) if arguments.data else documents("evaluation")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        import_checkpoint(arguments.model, folder)
        base = Subject(arguments.model, load_model(folder)[0], load_tokenizer(folder))
        plan = variant_plan(tokens=arguments.tokens, window=arguments.window)
        found = compare(base, subjects(folder, arguments.recipes), text, plan=plan)
    environment = found.environment
    print(
        f"{arguments.model}, {found.text.predictions} predictions, {found.text.units} passages, window {plan.window}; "
    )
    print(f"{environment.cpu}, {environment.threads} threads, {environment.date[:10]}, 95 % intervals over passages\n")
    print("| recipe | perplexity | ratio to the original | mean KL | cosine of logits | top-1 agreement |")
    print("|---|---|---|---|---|---|")
    print(f"| original | {bracketed(found.base.perplexity)} | | | | |")
    for other in found.others:
        difference = other.difference
        cells = (
            other.model.perplexity,
            difference.perplexity_ratio,
            difference.kl,
            difference.logit_cosine,
            difference.top1_agreement,
        )
        print(f"| {other.model.name} | " + " | ".join(bracketed(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
