"""Whole comparisons made of random numbers, as large or as odd as a test wants them, without measuring anything.

The numbers hang together as measured ones do: an amount of 0 is a model that equals the base exactly, intervals hold
their values, histograms add up to the predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from neuroweave.diagnose.results.comparison import (
    CalibrationBin,
    Comparison,
    Difference,
    Environment,
    Measured,
    Other,
    PositionBin,
    Rate,
    Speed,
    TextUsed,
)
from neuroweave.diagnose.results.generation import Continuation, Generated
from neuroweave.diagnose.results.gradient import FamilyGradient, FamilyRatio, Gradient, GradientDifference
from neuroweave.diagnose.results.plan import Plan, TaskPlan
from neuroweave.diagnose.results.records import Estimate, Histogram
from neuroweave.diagnose.results.signal import Activations, Norms, Signal, SignalDifference
from neuroweave.diagnose.results.tasks import TaskDifference, TaskScore
from neuroweave.diagnose.results.weights import TensorChange, Weights

FAMILIES = (
    "mlp.down_proj.weight",
    "mlp.up_proj.weight",
    "mlp.gate_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
)
NORMS = ("input_layernorm", "post_attention_layernorm")
PROMPTS = ("Once upon a time,", "The three most important things about <water> & fire are", "Dear Sir,\nI was")
TASKS = (("arithmetic_small", "acc"), ("arithmetic_small", "acc_norm"))
PREDICTIONS = 8000
NEURONS = 1536


class Maker:
    """Draws the parts of one comparison; every number comes from one seed."""

    def __init__(self, *, layers: int, seed: int, intervals: bool) -> None:
        self.layers, self.intervals = layers, intervals
        self.random = np.random.default_rng(seed)

    def estimate(self, value: float, spread: float | None = None) -> Estimate:
        """With an interval of `spread` to either side (5 % of the value unless given)."""
        half = abs(value) * 0.05 if spread is None else spread
        if not self.intervals or not math.isfinite(value):
            return Estimate(value=value)
        return Estimate(value=value, low=value - half, high=value + half)

    def measured(self, name: str, amount: float, **parts: bool) -> Measured:
        loss = 2.9 + 0.2 * amount
        bins = [
            CalibrationBin(
                predictions=int(PREDICTIONS / 15), confidence=(n + 0.5) / 15, accuracy=((n + 0.5) / 15) ** (1 + amount)
            )
            for n in range(15)
        ]
        bins[7] = CalibrationBin(predictions=0, confidence=0, accuracy=0)
        return Measured(
            name=name,
            source=f"models/{name}",
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
            dtype="float32",
            device="cpu",
            recipe={"recipe": {"name": f"recipe-of-{amount:g}", "layers": "all"}} if amount else None,
            negative_log_likelihood=self.estimate(loss),
            perplexity=self.estimate(math.exp(loss)),
            confidence=self.estimate(0.42 - 0.05 * amount),
            accuracy=self.estimate(0.41 - 0.05 * amount),
            entropy=self.estimate(2.8 + 0.3 * amount),
            calibration_error=self.estimate(0.021 + 0.03 * amount, 0.004),
            calibration=bins,
            signal=self.signal(amount) if parts["signal"] else None,
            gradient=self.gradient(amount) if parts["gradient"] else None,
            speed=Speed(prefill=self.rate(610 - 60 * amount), decode=self.rate(31 - 4 * amount))
            if parts["speed"]
            else None,
            tasks=[self.score(task, metric, amount) for task, metric in TASKS] if parts["tasks"] else [],
        )

    def rate(self, median: float) -> Rate:
        runs = [float(median * factor) for factor in (0.97, 0.99, 1.0, 1.0, 1.01, 1.02)]
        return Rate(median=median, low=runs[0], high=runs[-1], runs=runs)

    def score(self, task: str, metric: str, amount: float) -> TaskScore:
        return TaskScore(
            task=task,
            version="1",
            metric=metric,
            higher_is_better=True,
            value=0.5 - 0.1 * amount,
            standard_error=0.03,
            questions=200,
        )

    def norms(self, place: str, layer: int | None, depth: int, amount: float) -> Norms:
        mean = 3.0 * 1.12**depth * (1 + 0.3 * amount * depth / max(1, self.layers))
        return Norms(
            place=place, layer=layer, mean=self.estimate(mean), deviation=0.3 * mean, first=mean * (40 if depth else 1)
        )

    def signal(self, amount: float) -> Signal:
        numbers = range(self.layers)
        inputs = [self.norms("layer input", n, n, amount) for n in numbers]
        zero = 0.7 * min(amount, 1)
        return Signal(
            inputs=[*inputs, self.norms("layer input", None, self.layers, amount)],
            growth=[self.estimate(1.12 + 0.02 * amount + 0.01 * float(self.random.normal())) for _ in numbers],
            norms=[
                *(self.norms(place, n, n, amount) for n in numbers for place in NORMS),
                self.norms("final norm", None, self.layers, amount),
            ],
            activations=[
                Activations(
                    layer=n,
                    neurons=NEURONS,
                    zero=self.estimate(zero),
                    near_zero=self.estimate(0.1 + 0.8 * zero),
                    dead=int(20 * amount),
                    nearly_dead=7,
                )
                for n in numbers
            ],
        )

    def gradient(self, amount: float) -> Gradient:
        numbers: list[int | None] = list(range(self.layers))
        families = [
            FamilyGradient(
                family=family,
                layers=numbers,
                parameters=[884_736] * self.layers,
                norm=[self.estimate((1 + amount) * (1 + at) * 0.1 / (1 + n)) for n in range(self.layers)],
            )
            for at, family in enumerate(FAMILIES)
        ]
        outside = [
            FamilyGradient(family=name, layers=[None], parameters=[1], norm=[self.estimate(0.2 + amount)])
            for name in ("model.embed_tokens.weight", "model.norm.weight")
        ]
        return Gradient(
            windows=10, loss=self.estimate(2.9), total=self.estimate(1.7 + amount), families=[*families, *outside]
        )

    def difference(self, amount: float, **parts: bool) -> Difference:
        depth = np.arange(self.layers + 1) / max(1, self.layers)
        cosine = [self.estimate(float(1 - 0.2 * min(amount, 2) * d**2), 0.004 * amount * d) for d in depth]
        kl = 0.08 * amount
        histogram = [0] * 40
        if amount:
            histogram = self.random.multinomial(PREDICTIONS - 30, np.exp(-((np.arange(40) - 22.0) ** 2) / 50) / 12.5331)
        numbers: list[int | None] = list(range(self.layers))
        return Difference(
            perplexity_ratio=self.estimate(math.exp(0.2 * amount), 0.01 * amount),
            negative_log_likelihood=self.estimate(0.2 * amount, 0.01 * amount),
            confidence=self.estimate(-0.05 * amount, 0.01 * amount),
            confidence_squared=self.estimate(0.01 * amount, 0.001 * amount),
            entropy=self.estimate(0.3 * amount, 0.05 * amount),
            calibration_error=self.estimate(0.03 * amount, 0.04 * amount),
            accuracy=self.estimate(-0.05 * amount, 0.01 * amount),
            kl=self.estimate(kl, 0.1 * kl),
            logit_cosine=self.estimate(1 - 0.03 * amount, 0.002 * amount),
            top1_agreement=self.estimate(1 - 0.1 * amount, 0.01 * amount),
            top5_agreement=self.estimate(1 - 0.08 * amount, 0.01 * amount),
            hidden_cosine=cosine,
            hidden_cka=cosine,
            kl_histogram=Histogram(
                edges=[10 ** (-9 + n / 4) for n in range(41)],
                counts=[int(count) for count in histogram],
                below=30 if amount else PREDICTIONS,
                above=0,
            ),
            kl_by_position=[
                PositionBin(first=32 * n, last=32 * n + 31, mean=kl / (1 + 0.1 * n), predictions=500) for n in range(16)
            ],
            prefill_ratio=self.estimate(1 - 0.1 * amount, 0.03) if parts["speed"] else None,
            decode_ratio=self.estimate(1 - 0.13 * amount, 0.02) if parts["speed"] else None,
            signal=SignalDifference(
                input_ratio=[self.estimate(1 + 0.3 * amount * float(d), 0.02 * amount) for d in depth],
                zero=[self.estimate(0.7 * min(amount, 1), 0.02 * amount) for _ in numbers],
                near_zero=[self.estimate(0.5 * min(amount, 1), 0.02 * amount) for _ in numbers],
            )
            if parts["signal"]
            else None,
            gradient=GradientDifference(
                total=self.estimate(1 + amount / 1.7, 0.1 * amount),
                families=[
                    FamilyRatio(
                        family=family, layers=numbers, ratio=[self.estimate(1 + amount, 0.1 * amount) for _ in numbers]
                    )
                    for family in FAMILIES
                ],
                only_base=[],
                only_other=["mlp.act_fn.beta"] if amount else [],
            )
            if parts["gradient"]
            else None,
            weights=self.weights(amount) if parts["weights"] else None,
            tasks=[self.task_difference(task, metric, amount) for task, metric in TASKS] if parts["tasks"] else [],
            changed_settings={"hidden_act": ["silu", "relu <&>"]} if amount else {},
        )

    def task_difference(self, task: str, metric: str, amount: float) -> TaskDifference:
        return TaskDifference(
            task=task,
            metric=metric,
            higher_is_better=True,
            difference=self.estimate(-0.1 * amount, 0.04),
            questions=200,
            changed=int(30 * amount),
        )

    def weights(self, amount: float) -> Weights:
        tensors = []
        for layer in range(self.layers):
            for family in FAMILIES:
                touched = amount if family.startswith("mlp") else 0
                tensors.append(self.change(f"model.layers.{layer}.{family}", layer, family, touched))
        tensors += [self.change(name, None, name, 0) for name in ("model.embed_tokens.weight", "model.norm.weight")]
        counted = sum(math.prod(tensor.shape) for tensor in tensors)
        equal = sum(math.prod(tensor.shape) for tensor in tensors if tensor.equal_bytes)
        return Weights(
            source="files",
            parameters=counted,
            equal_bytes=equal,
            equal_values=equal + (123 if amount else 0),
            tensors=tensors,
            only_base=[],
            only_other=["model.layers.0.mlp.act_fn.beta"] if amount else [],
            other_shape=[],
        )

    def change(self, name: str, layer: int | None, family: str, amount: float) -> TensorChange:
        relative = 0.02 * amount * float(np.exp(self.random.normal()))
        return TensorChange(
            name=name,
            layer=layer,
            family=family,
            shape=[576, 1536] if "proj" in family else [576],
            dtypes=["BF16", "BF16"],
            equal_bytes=not amount,
            equal_values=not amount,
            cosine=1 - relative**2 / 2,
            relative_change=relative,
            singular_base=[5.0, 3.0],
            singular_other=[5.0 + relative, 3.0],
        )

    def generated(self, prompt: str, mode: Any, names: Sequence[str], amounts: Sequence[float]) -> Generated:
        words = [f" word{n}" for n in range(12)]
        continuations = []
        for name, amount in zip(names, amounts, strict=True):
            shared = len(words) if not amount else 5
            tokens = words[:shared] + [f" <{name}>{n}" for n in range(12 - shared)]
            continuations.append(
                Continuation(
                    model=name,
                    text="".join(tokens),
                    tokens=tokens,
                    shared_tokens=shared,
                    shared_characters=len("".join(tokens[:shared])),
                    confidence=[float(value) for value in self.random.uniform(0.2, 1, 12)],
                    state_cosine=[float(value) for value in self.random.uniform(0.3, 0.9, 11)],
                )
            )
        return Generated(prompt=prompt, mode=mode, continuations=continuations)


def made_comparison(
    names: Sequence[str] = ("base", "other"),
    *,
    amounts: Sequence[float] | None = None,
    layers: int = 4,
    seed: int = 0,
    intervals: bool = True,
    prompts: Sequence[str] = PROMPTS,
    without: Sequence[str] = (),
) -> Comparison:
    """A comparison of `names[0]` with the others.

    `amounts`: how much each other differs, 0 for not at all; by default 0.3, 0.6 and so on. `without`: parts that were
    not measured, among signal, gradient, speed, weights, tasks.
    """
    amounts = [0.3 * n for n in range(1, len(names))] if amounts is None else list(amounts)
    parts = {part: part not in without for part in ("signal", "gradient", "speed", "weights", "tasks")}
    make = Maker(layers=layers, seed=seed, intervals=intervals)
    base = make.measured(names[0], 0.0, **parts)
    others = [
        Other(model=make.measured(name, amount, **parts), difference=make.difference(amount, **parts))
        for name, amount in zip(names[1:], amounts, strict=True)
    ]
    return Comparison(
        plan=Plan(prompts=tuple(prompts), tasks=TaskPlan(names=("arithmetic_small",)) if parts["tasks"] else None),
        text=TextUsed(
            documents=["a.txt", "b.txt"],
            unit="a document, or a passage of about 2,000 characters of one",
            units=31,
            windows=16,
            predictions=PREDICTIONS,
            start_token=False,
            sha256="ab" * 32,
        ),
        base=base,
        others=others,
        generated=[
            make.generated(prompt, mode, names, [0.0, *amounts]) for prompt in prompts for mode in ("greedy", "sampled")
        ],
        environment=Environment(
            date="2026-01-02T03:04:05+00:00",
            cpu="a processor",
            cores=2,
            threads=1,
            accelerator="none",
            platform="Linux",
            versions={"torch": "2.13.0"},
        ),
        notes=["A note on <this>."],
    )
