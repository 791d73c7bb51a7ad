"""Does NeuroBLAST earn its place? It and its ablations against a plain Qwen3-style decoder of equal size, same tokens.

    python benchmarks/neuroblast_architecture.py OUT [--size cpu|gpu] [--data TEXT ...] [--seeds 3] [--figure FILE.png]
    python benchmarks/neuroblast_architecture.py OUT --size gpu --compile --data TEXT ... --variants qwen3 neuroblast
    python benchmarks/neuroblast_architecture.py OUT --one-step     try every variant on one step; nothing is written

Trained on the shipped training split unless `--data` names other text; learning rates are chosen on the shipped
calibration split, losses reported on the evaluation split (`--tuning`, `--held-out` for others). Equal for all
variants: depth, tied embedding, tokens and their order (by seed), optimizer, schedule, and live parameters within 0.5 %
by the intermediate size. Each variant gets the best of its own learning rates. Finished runs are lines of
OUT/runs.jsonl; the same command goes on after the last of them. For one core: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from neuroweave.diagnose.bootstrap import Bootstrap
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM
from neuroweave.text import Document, documents, read_documents

# --- sizes and variants -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Everything that a run depends on but its variant, seed and learning rate. `intermediate_size` is NeuroBLAST's."""

    hidden_size: int
    intermediate_size: int
    layers: tuple[int, int, int]  # sensory, associative, motor
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    context: int
    batch: int
    tokens: int
    sweep_tokens: int
    rates: tuple[float, ...]
    precision: str


SIZES = {
    "cpu": Size(64, 192, (4, 4, 2), 4, 2, 16, 2048, 128, 4, 262_144, 262_144, (1.5e-3, 3e-3, 6e-3), "float32"),
    "gpu": Size(512, 2048, (6, 8, 4), 8, 4, 64, 8192, 1024, 32, 2**25, 2**23, (5e-4, 1e-3, 2e-3), "bfloat16"),
}
REFERENCE = "qwen3"
VARIANTS: dict[str, dict[str, bool]] = {  # NeuroBLAST with these switches
    "neuroblast": {},
    "no-bridges": {"bridges": False},
    "all-rotary": {"alternating_rotary": False},
    "no-convolutions": {"convolutions": False},
}
NAMES = (REFERENCE, *VARIANTS)
MISMATCH = 0.005  # largest relative difference in live parameters
WARMUP, DECAY = 0.05, 0.3  # shares of the steps; published: warmup-stable-decay
BETAS, CLIP = (0.9, 0.95), 1.0
SWEEP_SEED = 1000  # none of the seeds that are reported
CURVE_POINTS, CURVE_WINDOWS = 8, 2  # held-out losses on the way, on so many windows of every document
TUNING_WINDOWS = 4  # windows of every document that choose the learning rate
END = "<|end|>"


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Documents cut into windows: inputs and targets [windows, context] (-100: none), and each window's document."""

    inputs: torch.Tensor
    targets: torch.Tensor
    owner: np.ndarray
    tokens: list[int]
    size: list[int]  # bytes

    def first_windows(self, count: int) -> HeldOut:
        places = [i for owner in np.unique(self.owner) for i in np.flatnonzero(self.owner == owner)[:count]]
        return replace(self, inputs=self.inputs[places], targets=self.targets[places], owner=self.owner[places])

    def predicted(self) -> int:
        return int((self.targets != -100).sum())


def train_tokenizer(text: Sequence[Document], vocabulary: int, file: Path) -> Tokenizer:
    """A byte-level BPE of the training text, kept in `file`."""
    if not file.is_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet)
        tokenizer.train_from_iterator((document.text for document in text), trainer)
        tokenizer.save(str(file))
    return Tokenizer.from_file(str(file))


def token_stream(tokenizer: Tokenizer, text: Sequence[Document]) -> torch.Tensor:
    encoded = tokenizer.encode_batch([END + document.text for document in text])
    return torch.tensor([token for one in encoded for token in one.ids])


def held_out(tokenizer: Tokenizer, text: Sequence[Document], context: int) -> HeldOut:
    """Every token of every document is predicted once, from the tokens before it in its window."""
    inputs, targets, owner, counts = [], [], [], []
    for number, document in enumerate(text):
        ids = tokenizer.encode(END + document.text).ids
        counts.append(len(ids) - 1)
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1]
            missing = context + 1 - len(window)
            inputs.append(window[:-1] + [0] * missing)
            targets.append(window[1:] + [-100] * missing)
            owner.append(number)
    sizes = [len(document.text.encode()) for document in text]
    return HeldOut(torch.tensor(inputs), torch.tensor(targets), np.array(owner), counts, sizes)


def batches(stream: torch.Tensor, size: Size, seed: int) -> Iterator[torch.Tensor]:
    """Windows [batch, context + 1] of the stream, each once before any comes again, in the order of the seed."""
    starts = np.arange(0, len(stream) - size.context - 1, size.context)
    if len(starts) < size.batch:
        raise ValueError(f"the training text has {len(stream):,} tokens, too few for one batch; give more with --data")
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(starts)
        for first in range(0, len(order) - size.batch + 1, size.batch):
            yield torch.stack([stream[s : s + size.context + 1] for s in order[first : first + size.batch]])


# --- models -----------------------------------------------------------------------------------------------------------


def build(variant: str, size: Size, intermediate_size: int, **options: Any) -> torch.nn.Module:
    shared = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "use_cache": False,
        **options,
    }
    if variant == REFERENCE:
        return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=sum(size.layers), **shared))
    stages = dict(zip(("num_sensory_layers", "num_associative_layers", "num_motor_layers"), size.layers, strict=True))
    return NeuroBlastForCausalLM(NeuroBlastConfig(**shared, **stages, **VARIANTS[variant]))


def parameters(variant: str, size: Size, intermediate_size: int) -> int:
    """Live parameters, the tied embedding once. (The dead rows of published convolutions are not in this model.)"""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(variant, size, intermediate_size).parameters())


def matched_intermediate_size(variant: str, size: Size) -> int:
    """The roundest intermediate size that gives the parameters of NeuroBLAST within `MISMATCH`."""
    target = parameters("neuroblast", size, size.intermediate_size)
    one, two = (parameters(variant, size, width) for width in (1, 2))
    exact = 1 + (target - one) / (two - one)
    for step in (64, 32, 16, 8, 4, 2, 1):
        found = round(exact / step) * step
        if found > 0 and abs(parameters(variant, size, found) - target) <= MISMATCH * target:
            return found
    raise ValueError(f"{variant}: no intermediate size comes within {MISMATCH:.1%} of {target:,} parameters")


def training_flops_per_token(variant: str, size: Size, device: str) -> float:
    """Matrix products and convolutions, forward and backward, two operations a multiply-add; attention not halved."""
    model = build(variant, size, matched_intermediate_size(variant, size), attn_implementation="eager").to(device)
    ids = torch.zeros(1, size.context, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids, ids).backward()
    return counter.get_total_flops() / size.context


# --- training ---------------------------------------------------------------------------------------------------------


def loss_of(model: Any, inputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits = model(input_ids=inputs).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


class Machine:
    """Where the runs take place: device, arithmetic, clock."""

    def __init__(self, device: str, precision: str, compiled: bool) -> None:
        self.device, self.precision, self.compiled = device, precision, compiled

    def arithmetic(self) -> Any:
        low = self.precision == "bfloat16"
        return torch.autocast(torch.device(self.device).type, torch.bfloat16) if low else nullcontext()

    def seconds(self) -> float:
        """Processor time on a CPU, so that other jobs do not count; else wall time with the device's work done."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def schedule(step: int, steps: int) -> float:
    """Linear warmup, stable, linear decay to 0."""
    return min(1.0, (step + 1) / max(1, round(WARMUP * steps)), (steps - step) / max(1, round(DECAY * steps)))


class Training:
    """A model, its optimizer and its batches; one `step` at a time."""

    def __init__(self, variant: str, size: Size, seed: int, stream: torch.Tensor, machine: Machine) -> None:
        torch.manual_seed(seed)
        self.model = build(variant, size, matched_intermediate_size(variant, size)).to(machine.device).train()
        self.compiled = torch.compile(self.model) if machine.compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=BETAS, weight_decay=0.0, fused=True)
        self.batches, self.machine = batches(stream, size, seed), machine

    def step(self, rate: float) -> torch.Tensor:
        batch = next(self.batches).to(self.machine.device)
        with self.machine.arithmetic():
            loss = loss_of(self.compiled, batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, text: HeldOut) -> list[float]:
        """Nats summed over each document."""
        self.model.eval()
        sums = np.zeros(len(text.tokens))
        for first in range(0, len(text.owner), 32):
            window = slice(first, first + 32)
            inputs, targets = text.inputs[window].to(self.machine.device), text.targets[window].to(self.machine.device)
            with self.machine.arithmetic():
                nats = loss_of(self.compiled, inputs, targets, "none").view(targets.shape).double().sum(1)
            np.add.at(sums, text.owner[window], nats.cpu().numpy())
        self.model.train()
        return sums.tolist()


def train(training: Training, steps: int, rate: float, text: HeldOut, *, curve: bool) -> dict[str, Any]:
    """One run to its end: nats of every held-out document, the losses on the way, and what it took."""
    points = {round(steps * point / CURVE_POINTS) for point in range(1, CURVE_POINTS)} if curve else set()
    few = text.first_windows(CURVE_WINDOWS)
    losses, way, spent, wall = [], [], 0.0, time.perf_counter()
    start = training.machine.seconds()
    for step in range(steps):
        losses.append(training.step(rate * schedule(step, steps)))
        if step + 1 in points or (curve and step + 1 == steps):
            spent += training.machine.seconds() - start
            way.append([step + 1, sum(training.evaluate(few)) / few.predicted()])
            start = training.machine.seconds()
    spent += 0 if curve else training.machine.seconds() - start
    return {
        "nats": training.evaluate(text),
        "curve": way,
        "training_loss": torch.stack(losses[-max(1, steps // 10) :]).mean().item(),
        "seconds": spent,
        "wall_seconds": time.perf_counter() - wall,
    }


# --- the experiment ---------------------------------------------------------------------------------------------------


class Experiment:
    """The runs of one folder. `done`: the lines of runs.jsonl; every missing run is made and written when it ends."""

    def __init__(self, out: Path, size: Size, machine: Machine, texts: dict[str, list[Document]]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.size, self.machine, self.file = size, machine, out / "runs.jsonl"
        digest = hashlib.sha256("\0".join(d.text for text in texts.values() for d in text).encode()).hexdigest()
        self.settings = json.loads(json.dumps({**asdict(size), "compiled": machine.compiled, "text": digest}))
        self.done = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []
        if self.done and self.done[0]["settings"] != self.settings:
            raise ValueError(f"{out} holds runs of other settings or other text; give a new folder")
        tokenizer = train_tokenizer(texts["training"], size.vocabulary, out / "tokenizer.json")
        self.stream = token_stream(tokenizer, texts["training"])
        self.tuning = held_out(tokenizer, texts["tuning"], size.context).first_windows(TUNING_WINDOWS)
        self.text = held_out(tokenizer, texts["held out"], size.context)
        tell(f"{len(self.stream):,} training tokens, {self.text.predicted():,} held out")

    def result(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for line in self.done:
            if all(line.get(name) == value for name, value in key.items()):
                return line
        line = {**key, **make(), "settings": self.settings}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.done.append(line)
        return line

    def run(self, kind: str, variant: str, seed: int, rate: float) -> dict[str, Any]:
        tokens = self.size.sweep_tokens if kind == "sweep" else self.size.tokens
        text = self.tuning if kind == "sweep" else self.text
        steps = max(1, tokens // (self.size.batch * self.size.context))

        def make() -> dict[str, Any]:
            training = Training(variant, self.size, seed, self.stream, self.machine)
            made = train(training, steps, rate, text, curve=kind == "run")
            made |= {
                "loss": sum(made["nats"]) / text.predicted(),
                "tokens": steps * self.size.batch * self.size.context,
            }
            pace = f"{made['seconds']:.0f} s, {made['wall_seconds']:.0f} s of wall time"
            tell(f"{time.strftime('%H:%M:%S')} {kind} {variant} seed {seed} rate {rate:g}: {made['loss']:.4f}, {pace}")
            return made

        return self.result({"kind": kind, "variant": variant, "seed": seed, "rate": rate}, make)

    def sweep(self, variant: str) -> dict[float, float]:
        """Losses by learning rate on the short budget; when the best is the last of them, the sweep goes on."""
        losses = {rate: self.run("sweep", variant, SWEEP_SEED, rate)["loss"] for rate in self.size.rates}
        for _ in range(2):
            best = best_rate(losses)
            if best not in (min(losses), max(losses)):
                break
            further = best * 2 if best == max(losses) else best / 2
            losses[further] = self.run("sweep", variant, SWEEP_SEED, further)["loss"]
        return dict(sorted(losses.items()))

    def speed(self, variants: Sequence[str], rounds: int = 9) -> dict[str, float]:
        """Tokens a second of whole training steps: medians over rounds in which every variant has its turn."""

        def make() -> dict[str, Any]:
            trainings = {name: Training(name, self.size, 0, self.stream, self.machine) for name in variants}
            seconds: dict[str, list[float]] = {name: [] for name in variants}
            for number in range(rounds + 2):
                for name, training in trainings.items():
                    start = self.machine.seconds()
                    for _ in range(4):
                        training.step(1e-4)
                    if number >= 2:
                        seconds[name].append((self.machine.seconds() - start) / 4)
            step = self.size.batch * self.size.context
            return {"tokens_per_second": {name: step / statistics.median(taken) for name, taken in seconds.items()}}

        return self.result({"kind": "speed", "variants": list(variants)}, make)["tokens_per_second"]


def best_rate(losses: dict[float, float]) -> float:
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    if not finite:
        raise ValueError(f"no learning rate of {', '.join(f'{rate:g}' for rate in losses)} trains")
    return min(finite, key=finite.__getitem__)


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- report -----------------------------------------------------------------------------------------------------------


def paired(runs: dict[str, list[dict[str, Any]]], variant: str, other: str, tokens: Sequence[int]) -> tuple[str, str]:
    """Loss minus the other's: with Student's 95 % interval over seeds, and the bootstrap's over documents."""
    nats = np.array([run["nats"] for run in runs[variant]]) - np.array([run["nats"] for run in runs[other]])
    by_seed = nats.sum(1) / sum(tokens)
    mean, seeds = by_seed.mean(), len(by_seed)
    half = student_t.ppf(0.975, seeds - 1) * by_seed.std(ddof=1) / seeds**0.5 if seeds > 1 else float("nan")
    over = Bootstrap(len(tokens)).estimate(nats.mean(0), np.array(tokens, dtype=np.float64))
    low, high = (float("nan") if bound is None else bound for bound in (over.low, over.high))
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]", f"[{low:+.4f}, {high:+.4f}]"


def print_report(experiment: Experiment, runs: dict[str, list[dict[str, Any]]], speed: dict[str, float]) -> None:
    size, text = experiment.size, experiment.text
    per_byte = sum(text.tokens) / sum(text.size)
    print(
        "| variant | intermediate | live parameters | training FLOPs | tokens/s | s per run | nats per token | "
        "nats per byte |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name, made in runs.items():
        width = matched_intermediate_size(name, size)
        flops = training_flops_per_token(name, size, experiment.machine.device) * made[0]["tokens"]
        losses = [run["loss"] for run in made]
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        print(
            f"| {name} | {width} | {parameters(name, size, width):,} | {flops:.3g} | {speed[name]:,.0f} | "
            f"{statistics.mean(run['seconds'] for run in made):.0f} | "
            f"{statistics.mean(losses):.4f} ± {spread:.4f} | {statistics.mean(losses) * per_byte:.4f} |"
        )
    for other in (REFERENCE, "neuroblast"):
        if other in runs:
            print(f"\n| variant | loss minus {other}'s, 95 % over seeds | 95 % over documents |\n|---|--:|--:|")
            for name in runs:
                if name != other and not (other == "neuroblast" and name == REFERENCE):
                    print("| {} | {} | {} |".format(name, *paired(runs, name, other, text.tokens)))
    sweeps = [line for line in experiment.done if line["kind"] == "sweep" and line["variant"] in runs]
    rates = sorted({line["rate"] for line in sweeps})
    print(f"\n| learning rate | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---|{'--:|' * len(rates)}")
    for name in runs:
        losses = {line["rate"]: f"{line['loss']:.4f}" for line in sweeps if line["variant"] == name}
        print(f"| {name} | {' | '.join(losses.get(rate, '') for rate in rates)} |")
    for kind in ("sweep", "run"):
        made = [line for line in experiment.done if line["kind"] == kind and line["variant"] in runs]
        minutes, wall = (sum(line[clock] for line in made) / 60 for clock in ("seconds", "wall_seconds"))
        print(f"\n{len(made)} times `{kind}`: {minutes:.1f} min of training, {wall:.1f} min of wall time in all.")


def draw(experiment: Experiment, runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Held-out loss by tokens (left), and the paired difference to the reference with every seed (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    losses, gaps = figure.subplots(1, 2)
    a_step = experiment.size.batch * experiment.size.context
    for number, (name, made) in enumerate(runs.items()):
        colour = "black" if name == REFERENCE else f"C{number - 1}"
        curves = np.array([run["curve"] for run in made])  # seeds, points, (step, loss)
        tokens, values = curves[0, :, 0] * a_step, curves[:, :, 1]
        losses.plot(tokens, values.mean(0), color=colour, marker="o", markersize=3, label=name)
        if REFERENCE in runs:
            gap = values - np.array([run["curve"] for run in runs[REFERENCE]])[:, :, 1]
            gaps.plot(tokens, gap.mean(0), color=colour, marker="o", markersize=3)
            gaps.fill_between(tokens, gap.min(0), gap.max(0), color=colour, alpha=0.15, linewidth=0)
    losses.set(xlabel="training tokens", ylabel="held-out loss, nats per token")
    gaps.set(xlabel="training tokens", ylabel=f"difference to {REFERENCE} (band: all seeds)")
    losses.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def try_one_step(names: Sequence[str], size: Size, machine: Machine) -> None:
    size = replace(size, batch=1, context=min(size.context, 128))
    stream = torch.randint(0, size.vocabulary, (2 * size.context + 2,))
    for name in names:
        training = Training(name, size, 0, stream, machine)
        width = matched_intermediate_size(name, size)
        start = machine.seconds()
        loss, count = training.step(1e-4).item(), parameters(name, size, width)
        print(f"{name}: intermediate {width}, {count:,} parameters, {loss:.3f}, {machine.seconds() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the tokenizer and the finished runs")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--data", nargs="+", help="training text; default: the shipped training split")
    parser.add_argument("--tuning", nargs="+", help="text that chooses the learning rate; default: calibration split")
    parser.add_argument("--held-out", nargs="+", help="text of the reported losses; default: evaluation split")
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="training tokens of a run")
    parser.add_argument("--batch", type=int, help="sequences in a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--figure", type=Path, help="draw the learning curves into this file")
    parser.add_argument("--one-step", action="store_true", help="try every variant on one step of one sequence")
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.tokens:
        share = size.sweep_tokens / size.tokens
        size = replace(size, tokens=options.tokens, sweep_tokens=int(options.tokens * share))
    size = replace(size, batch=options.batch or size.batch)
    machine = Machine(options.device, size.precision, options.compile)
    if options.one_step:
        return try_one_step(options.variants, size, machine)
    texts = {
        role: read_documents(given) if given else documents(split)
        for role, given, split in (
            ("training", options.data, "training"),
            ("tuning", options.tuning, "calibration"),
            ("held out", options.held_out, "evaluation"),
        )
    }
    experiment = Experiment(options.out, size, machine, texts)
    rates = {name: best_rate(experiment.sweep(name)) for name in options.variants}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for seed in range(options.seeds):
        for name in options.variants:
            runs[name].append(experiment.run("run", name, seed, rates[name]))
    print_report(experiment, runs, experiment.speed(options.variants))
    if options.figure:
        draw(experiment, runs, options.figure)


if __name__ == "__main__":
    main()
