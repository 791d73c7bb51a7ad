"""What the numbers allow to be said, in plain words. A direction ("higher", "slower") is only named where the 95 %
interval leaves out "no difference"; the terminal and the report speak with these same sentences."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from neuroweave.diagnose.report.differences import speeds
from neuroweave.diagnose.report.numbers import (
    PRACTICALLY,
    bracketed,
    interval,
    number,
    percent,
    reading,
    share,
    speed_reading,
    value_of,
    with_interval,
)
from neuroweave.diagnose.results.comparison import Comparison, Difference, Failure, Measured, Other
from neuroweave.diagnose.results.records import Estimate

VISIBLE = 1e-4  # a loss of cosine similarity below this is not called a departure
CLEAR = 1e-3
MOST_SETTINGS = 6


@dataclass(frozen=True)
class Tile:
    """One number at the top of a verdict; all fields are ready to print."""

    label: str
    value: str
    detail: str
    reading: str


def sentences(comparison: Comparison, other: Other) -> list[str]:
    """The verdict on one model, its failures last."""
    base, model, difference = comparison.base, other.model, other.difference
    said = [describe_change(other), describe_weights(base, difference)]
    if is_identical(difference):
        said.append(f"On this text it is the same as {base.name}: every prediction is equal (ratio 1, KL 0, exactly).")
    else:
        said += [
            describe_perplexity(base, model, difference),
            describe_predictions(base, difference),
            describe_departure(difference),
        ]
    said += [describe_sparsity(base, model, difference), *describe_tasks(base, difference)]
    said += [describe_speed(base, name, ratio) for name, _, ratio in speeds(base, model, difference)]
    said += [describe_failure(failure) for failure in comparison.failures if failure.model == model.name]
    return [sentence for sentence in said if sentence]


def unmeasured(comparison: Comparison) -> list[str]:
    """What failed and belongs to no model that has a verdict: the base, or a model that gave no predictions."""
    judged = {other.model.name for other in comparison.others}
    return [f"{f.model}: {describe_failure(f)}" for f in comparison.failures if f.model not in judged]


def describe_failure(failure: Failure) -> str:
    return f"Not measured ({failure.part}): {failure.message}"


def is_identical(difference: Difference) -> bool:
    return (
        difference.perplexity_ratio.value == 1
        and difference.kl.value == 0
        and difference.logit_cosine.value == 1
        and difference.top1_agreement.value == 1
    )


def describe_change(other: Other) -> str:
    """What was changed, as far as the config records it."""
    name = recipe_name(other.model.recipe)
    settings = other.difference.changed_settings
    if other.model.recipe is not None:
        return f"Changed by the recipe “{name}”." if name else "Changed by a recipe of neuroweave (below)."
    if settings:
        shown = [f"{key} ({a} → {b})" for key, (a, b) in itertools.islice(settings.items(), MOST_SETTINGS)]
        rest = f" and {len(settings) - MOST_SETTINGS} others" if len(settings) > MOST_SETTINGS else ""
        return "Its config differs in " + ", ".join(shown) + rest + "."
    return "No recipe is recorded and its config is the base's; whatever differs is in the weights or in memory only."


def recipe_name(recipe: dict[str, Any] | None) -> str | None:
    """The recipe's own name, at the top or one level down."""
    for place in (recipe, (recipe or {}).get("recipe")):
        if isinstance(place, str):
            return place
        if isinstance(place, dict) and isinstance(place.get("name"), str):
            return str(place["name"])
    return None


def describe_weights(base: Measured, difference: Difference) -> str | None:
    weights = difference.weights
    if weights is None or not weights.parameters:
        return None
    unmatched = len(weights.only_base) + len(weights.only_other) + len(weights.other_shape)
    tensors = "1 tensor is" if unmatched == 1 else f"{unmatched} tensors are"
    rest = f"; {tensors} in one model only or of another shape" if unmatched else ""
    if weights.equal_bytes == weights.parameters:
        return f"It shares all weights of {base.name}, equal to the byte{rest}."
    counted = f"{weights.equal_bytes:,} of {weights.parameters:,} numbers are in tensors that are equal to the byte"
    by_bytes, by_values = (share(equal, weights.parameters) for equal in (weights.equal_bytes, weights.equal_values))
    values = f", {by_values} of all numbers are equal in value" if by_values != by_bytes else ""
    part = f"{by_bytes} of the weights" if weights.equal_bytes else "no weights"
    return f"It shares {part} with {base.name}: {counted}{values}{rest}."


def describe_perplexity(base: Measured, model: Measured, difference: Difference) -> str:
    ratio = difference.perplexity_ratio
    numbers = f"perplexity {number(model.perplexity.value)} against {number(base.perplexity.value)}"
    if not (math.isfinite(model.perplexity.value) and math.isfinite(base.perplexity.value)):
        return f"How well it predicts this text cannot be compared: {numbers}."
    verb = {
        "higher": f"It predicts this text worse than {base.name}",
        "lower": f"It predicts this text better than {base.name}",
        "no interval": "How well it predicts this text is not compared, as too little text was read for an interval",
        "practically the same": f"It predicts this text practically the same as {base.name}",
        "identical": f"It predicts this text exactly as well as {base.name}",
    }.get(reading(ratio, 1.0, tolerance=PRACTICALLY), "How well it predicts this text does not differ beyond noise")
    return f"{verb}: {numbers}, ratio {with_interval(ratio, 1.0)}."


def describe_predictions(base: Measured, difference: Difference) -> str:
    return (
        f"Its predictions lie {with_interval(difference.kl)} nats per token from {base.name}'s (mean KL); the logits "
        f"have cosine similarity {value_of(difference.logit_cosine, 1.0)}; both put the same token first in "
        f"{percent(difference.top1_agreement)} of places."
    )


def describe_departure(difference: Difference) -> str | None:
    """Where in the depth the hidden states first leave the base's, and where they lose the most similarity."""
    estimates = difference.hidden_cosine
    values = [estimate.value for estimate in estimates]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    if values[0] < 0.99:
        return f"The signal departs at the very input: cosine similarity {number(values[0])} before the first layer."
    losses = [before - after for before, after in itertools.pairwise(values)]
    most, layers = max(range(len(losses)), key=losses.__getitem__), len(losses)
    if losses[most] < CLEAR:
        least = value_of(min(estimates, key=lambda estimate: estimate.value), 1.0)
        return f"The signal departs nowhere by much: hidden states keep a cosine similarity of {least} at every depth."
    first = next(layer for layer in range(layers) if 1 - values[layer + 1] > VISIBLE)
    before, after = estimates[most], estimates[most + 1]
    start = (
        ""
        if first == most
        else f"first in {place(first, layers)} ({value_of(estimates[first + 1], 1.0)} after it) and "
    )
    unsure = (
        "; the two intervals overlap, so another layer may depart as much"
        if before.low is not None and after.high is not None and after.high >= before.low
        else ""
    )
    return (
        f"The signal departs {start}most in {place(most, layers)}: cosine similarity of hidden states "
        f"{bracketed(before)} before and {bracketed(after)} after{unsure}."
    )


def place(layer: int, layers: int) -> str:
    """The last similarity is taken after the final norm."""
    return "the last layer and the final norm" if layer == layers - 1 else f"layer {layer} of 0 to {layers - 1}"


def describe_sparsity(base: Measured, model: Measured, difference: Difference) -> str | None:
    """Exact zeros: in how many layers an interval leaves out "no difference"."""
    if not (difference.signal and difference.signal.zero):
        return None
    readings = [reading(estimate, 0.0) for estimate in difference.signal.zero]
    counts = [f"{word} in {readings.count(word)}" for word in ("higher", "lower") if word in readings]
    if not counts:
        return None
    return (
        f"The share of MLP activations that are exactly zero is {' and '.join(counts)} of {len(readings)} layers: "
        f"{zeros(model)} on average over layers against {zeros(base)}."
    )


def zeros(model: Measured) -> str:
    """Share of exact zeros among MLP activations, mean over layers; empty where it was not measured."""
    layers = model.signal.activations if model.signal else []
    if not layers:
        return ""
    mean = sum(layer.zero.value for layer in layers) / len(layers)
    return f"{100 * mean:.1f} %" if mean else "0 %"


def describe_tasks(base: Measured, difference: Difference) -> list[str]:
    """A sentence for every benchmark that differs beyond noise, and one for the rest."""
    said, rest = [], 0
    for task in difference.tasks:
        good, bad = ("better", "worse") if task.higher_is_better else ("worse", "better")
        word = reading(task.difference, 0.0, above=good, below=bad)
        if word in (good, bad):
            gap = f"difference {with_interval(task.difference, 0.0)} over {task.questions} questions"
            said.append(f"On {task.task} ({task.metric}) it does {word} than {base.name}: {gap}.")
        else:
            rest += 1
    if rest:
        which = "No other" if said else "No"
        said.append(f"{which} benchmark score ({rest}) differs from {base.name}'s beyond noise.")
    return said


def describe_speed(base: Measured, name: str, ratio: Estimate) -> str:
    verb = "reads a prompt (prefill)" if name == "prefill" else "writes (decode)"
    pace = speed_reading(ratio)
    numbers = f"median of paired speed ratios {with_interval(ratio, 1.0)}"
    if pace in ("faster", "slower"):
        return f"It {verb} {pace} than {base.name}: {numbers}."
    why = {
        "no interval": "too few runs to tell",
        "too noisy to tell": "too noisy to tell",
        "identical": "no difference",
    }
    return f"How fast it {verb}: {why.get(pace, 'no difference beyond noise')}, {numbers}."


def tiles(base: Measured, other: Other) -> list[Tile]:
    """The few numbers that a reader looks for first."""
    difference = other.difference
    ratio, kl = difference.perplexity_ratio, difference.kl
    shown = [
        tile("perplexity ratio", ratio, 1.0, reading(ratio, 1.0, tolerance=PRACTICALLY)),
        tile("mean KL, nats", kl, 0.0, reading(kl, 0.0, above="differs", below="differs")),
    ]
    for name, _, speed in speeds(base, other.model, difference):
        shown.append(tile(f"{name} speed ratio", speed, 1.0, speed_reading(speed)))
    weights = difference.weights
    if weights and weights.parameters:
        equal = share(weights.equal_bytes, weights.parameters)
        shown.append(Tile("weights shared", equal, "equal to the byte", "counted"))
    return shown


def tile(label: str, estimate: Estimate, reference: float, word: str) -> Tile:
    between = interval(estimate, reference)
    return Tile(label, value_of(estimate, reference), between or "no interval", word)


def summary(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the short table: one column per model, one row per measure, values with their intervals."""
    base, models = comparison.base, comparison.models
    differences = [other.difference for other in comparison.others]
    table = [
        ["perplexity", *(bracketed(model.perplexity) for model in models)],
        ["ratio to the base's", "", *(bracketed(difference.perplexity_ratio, 1.0) for difference in differences)],
        ["mean KL, nats", "", *(bracketed(difference.kl) for difference in differences)],
        ["cosine of logits", "", *(bracketed(difference.logit_cosine, 1.0) for difference in differences)],
        ["top-1 agreement", "", *(bracketed(difference.top1_agreement) for difference in differences)],
        ["calibration error", *(bracketed(model.calibration_error) for model in models)],
    ]
    if any(difference.signal and excluding(difference.signal.zero) for difference in differences):
        table.append(["zero activations", *(zeros(model) for model in models)])
    if any(difference.weights for difference in differences):
        counted = [difference.weights for difference in differences]
        shared = [share(w.equal_bytes, w.parameters) if w and w.parameters else "" for w in counted]
        table.append(["weights shared", "", *shared])
    timed = [speeds(base, other.model, other.difference) for other in comparison.others]
    for part, name in enumerate(("prefill", "decode")):
        if any(timed) and base.speed:
            rates = ["" if not parts else number(parts[part][1][1].median) for parts in timed]
            own = base.speed.prefill if name == "prefill" else base.speed.decode
            table.append([f"{name}, tokens/s", number(own.median), *rates])
            ratios = ["" if not parts else bracketed(parts[part][2], 1.0) for parts in timed]
            table.append(["median of ratios", "", *ratios])
    return ["", *(model.name for model in models)], table


def excluding(estimates: list[Estimate]) -> bool:
    """Whether any of the intervals leaves out 0."""
    return any(estimate.excludes(0.0) for estimate in estimates)
