"""What fusing does to real models: perplexity and KL against alpha and gamma-cap, rounding, and sign symmetry.

    python benchmarks/fusion_claims.py [--models embedded:smollm2 embedded:gemma3] [--parts alpha gamma symmetry]

The deltas are generated from the shipped bank (seed 42). Every variant is a checkpoint that `fuse` wrote, loaded in
float32 and measured against the original on the shipped evaluation prose. The tables of docs/fusion.md.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroweave.checkpoint import import_checkpoint
from neuroweave.checkpoint.loading import load_model, load_tokenizer
from neuroweave.diagnose import Plan, Subject, compare
from neuroweave.diagnose.environment import describe_environment
from neuroweave.diagnose.report.numbers import bracketed
from neuroweave.diagnose.variants import variant_plan
from neuroweave.surgery.fusion.fuse import fuse_checkpoint
from neuroweave.surgery.fusion.generated import generated_deltas
from neuroweave.surgery.fusion.plan import FuseOptions
from neuroweave.surgery.neurons.bank import default_bank_path
from neuroweave.text import documents

ALPHAS = (0.02, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64)
ROUNDED = (0.02, 0.1, 1, 8, 32)  # in bfloat16, where the question is what rounding does
GAMMAS = (0.05, 0.25, 1, 5, 25)
TOGETHER = 4  # variants in memory beside the original, so that it reads each window once for all of them


@dataclass(frozen=True)
class Variant:
    """One way to fuse: options of `FuseOptions` and of the generation."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


def fused(folder: Path, variant: Variant, scratch: Path) -> tuple[Subject, float]:
    """The variant as a model in memory, and the share of the targeted weights that changed."""
    out = scratch / "fused"
    deltas = generated_deltas(folder, default_bank_path(), seed=42, **variant.generation)
    result = fuse_checkpoint(folder, out, deltas, FuseOptions(**variant.options), hashed=False, overwrite=True)
    model, _ = load_model(out, dtype="float32")
    changed = sum(each.changed for each in result.tensors) / max(1, sum(each.count for each in result.tensors))
    return Subject(variant.label, model, load_tokenizer(folder)), changed


def measure(
    folder: Path, variants: list[Variant], plan: Plan, make: Callable[[Variant], tuple[Subject, float]]
) -> None:
    """Print one row a variant. `make` gives its model and the share of weights that changed."""
    base = Subject("original", load_model(folder, dtype="float32")[0], load_tokenizer(folder))
    text = documents("evaluation")
    print("\n| variant | weights changed | perplexity | ratio to the original | mean KL | top-1 agreement |")
    print("|---|---|---|---|---|---|")
    first = True
    for group in batches(variants):
        subjects = [make(variant) for variant in group]
        found = compare(base, [subject for subject, _ in subjects], text, plan=plan)
        if first:
            print(f"| original | | {bracketed(found.base.perplexity)} | | | |")
            first = False
        for other, (_, changed) in zip(found.others, subjects, strict=True):
            difference = other.difference
            cells = (other.model.perplexity, difference.perplexity_ratio, difference.kl, difference.top1_agreement)
            print(f"| {other.model.name} | {changed:.1%} | " + " | ".join(map(bracketed, cells)) + " |", flush=True)


def batches(variants: list[Variant]) -> Iterator[list[Variant]]:
    for start in range(0, len(variants), TOGETHER):
        yield variants[start : start + TOGETHER]


def alpha_variants(dtype: str, alphas: Sequence[float]) -> list[Variant]:
    if dtype == "float32":
        return [Variant(f"alpha {alpha:g}", {"alpha": alpha}) for alpha in alphas]
    random = {"rounding": "stochastic"}
    return [
        *(Variant(f"alpha {alpha:g}", {"alpha": alpha}) for alpha in ROUNDED),
        *(Variant(f"alpha {alpha:g}, stochastic rounding", {"alpha": alpha} | random) for alpha in ROUNDED[:2]),
    ]


def gamma_variants() -> list[Variant]:
    """With the default gate deltas (root mean square 0.02) a cap above 0.1 never binds; with larger ones it does."""
    plain = [Variant(f"cap {gamma:g}, gate deltas 0.02", {"gamma_cap": gamma}) for gamma in GAMMAS]
    scaled = [Variant(f"cap {g:g}, gate deltas {g:g}", {"gamma_cap": g}, {"gate_scale": g}) for g in GAMMAS]
    both = {"alpha": 32, "gamma_cap": 25}
    return [
        *plain,
        *scaled,
        Variant("alpha 32, cap 25, gate deltas 0.02", both),
        Variant("alpha 32, cap 25, gate deltas 25", both, {"gate_scale": 25.0}),
    ]


APPENDED = {"neurons": 64, "gate_scale": 0.1}
CENTRED = "append 64, signs, directions orthogonal to the mean input"


def symmetry_variants() -> list[Variant]:
    """Each case with pairs of opposite and of equal signs, at the same size of the change: a pair of equal signs adds
    up where opposite ones partly cancel, so appended neurons get the gain that makes up for it."""
    cases = [
        ("contour, alpha 0.2 relative", {"alpha": 0.2, "alpha_mode": "relative"}, {}, 1.0),
        ("additive, alpha 0.1", {"mode": "additive", "alpha": 0.1}, {}, 1.0),
        ("append 64", {"mode": "append", "gain": 1.0}, APPENDED, 0.6),
    ]
    variants = []
    for label, options, generation, weaker in cases:
        variants.append(Variant(f"{label}, signs", options, generation | {"symmetry": "signs"}))
        options = options | ({"gain": weaker} if "gain" in options else {})
        variants.append(Variant(f"{label}, one-sided", options, generation | {"symmetry": "one-sided"}))
    return [*variants, Variant(CENTRED, {"mode": "append", "gain": 1.0}, APPENDED)]


@torch.no_grad()
def centre(base: torch.nn.Module, other: torch.nn.Module, tokens: Tensor) -> None:
    """Turn the appended neurons' gate and up rows orthogonal to their layer's mean input, so that what they read has
    no mean: the condition under which a sign-symmetric pair adds none."""
    means: dict[int, Tensor] = {}
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, at=at: means.update({at: inputs[0].mean((0, 1))}))
        for at, layer in enumerate(base.model.layers)
    ]
    base(tokens)
    for handle in handles:
        handle.remove()
    for at, (mine, theirs) in enumerate(zip(base.model.layers, other.model.layers, strict=True)):
        first = mine.mlp.gate_proj.weight.shape[0]
        for weight in (theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight):
            rows = weight[first:]
            rows -= torch.outer(rows @ means[at], means[at]) / means[at].dot(means[at])


@torch.no_grad()
def mean_shift(base: torch.nn.Module, other: torch.nn.Module, tokens: Tensor) -> tuple[float, float]:
    """How far the MLPs' outputs move on the same inputs: size of the change over that of the output, and the share of
    the change that is one constant shift (norm of its mean over its root mean square), averaged over layers."""
    sizes, shares = [], []

    def look(layer: torch.nn.Module) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            change = (layer(inputs[0]) - output).double().reshape(-1, output.shape[-1])
            size = change.pow(2).sum(-1).mean().sqrt()
            sizes.append(float(size / output.double().reshape(change.shape).pow(2).sum(-1).mean().sqrt()))
            shares.append(float(change.mean(0).norm() / size))

        return hook

    pairs = zip(base.model.layers, other.model.layers, strict=True)
    handles = [mine.mlp.register_forward_hook(look(theirs.mlp)) for mine, theirs in pairs]
    base(tokens)
    for handle in handles:
        handle.remove()
    return sum(sizes) / len(sizes), sum(shares) / len(shares)


def measure_symmetry(folder: Path, plan: Plan, scratch: Path) -> None:
    base = load_model(folder, dtype="float32")[0]
    tokenizer = load_tokenizer(folder)
    ids = [token for document in documents("calibration")[:8] for token in tokenizer(document.text)["input_ids"][:512]]
    tokens = torch.tensor(ids[: len(ids) // 512 * 512]).reshape(-1, 512)
    print("\n| variant | size of the change | constant share of it |")
    print("|---|---|---|")

    def prepared(variant: Variant) -> tuple[Subject, float]:
        subject, changed = fused(folder, variant, scratch)
        if variant.label == CENTRED:
            centre(base, subject.model, tokens)
        return subject, changed

    for variant in symmetry_variants():
        size, share = mean_shift(base, prepared(variant)[0].model, tokens)
        print(f"| {variant.label} | {size:.4f} | {share:.4f} |", flush=True)
    measure(folder, symmetry_variants(), plan, prepared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded:smollm2", "embedded:gemma3"])
    parser.add_argument("--parts", nargs="+", default=["alpha", "gamma", "symmetry"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--alphas", nargs="+", type=float, default=ALPHAS)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    plan = variant_plan(tokens=arguments.tokens, window=512)
    machine = describe_environment()
    print(f"{machine.cpu}, {machine.threads} threads, {machine.date[:10]}, {arguments.tokens} tokens, window 512")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for model in arguments.models:
            for dtype in arguments.dtypes:
                folder = scratch / f"{model.partition(':')[2]}-{dtype}"
                import_checkpoint(model, folder, dtype=dtype)
                make = functools.partial(fused, folder, scratch=scratch)
                if "alpha" in arguments.parts:
                    print(f"\n## {model}, {dtype}: alpha (gamma-cap 0.05)")
                    measure(folder, alpha_variants(dtype, arguments.alphas), plan, make)
                if "gamma" in arguments.parts and dtype == "float32":
                    print(f"\n## {model}, {dtype}: gamma-cap (alpha 0.02 where not said)")
                    measure(folder, gamma_variants(), plan, make)
                if "symmetry" in arguments.parts and dtype == "float32":
                    print(f"\n## {model}, {dtype}: sign-symmetric against one-sided")
                    measure_symmetry(folder, plan, scratch)


if __name__ == "__main__":
    main()
