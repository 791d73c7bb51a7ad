"""What the numbers allow to be said, in plain words. A direction ("higher", "slower") is only named where the 95 %
interval leaves out "no difference"; the terminal and the report speak with these same sentences."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from neuroweave.diagnose.comparison import Comparison, Difference, Estimate, Measured, Other, Rate


@dataclass(frozen=True)
class Row:
    """One line of the table of differences; all fields are ready to print."""

    metric: str
    base: str
    other: str
    difference: str
    interval: str
    reading: str


def reading(estimate: Estimate, reference: float, *, above: str = "higher", below: str = "lower") -> str:
    """`above` or `below` the reference of "no difference", or that this cannot be said."""
    if estimate.value == reference and {estimate.low, estimate.high} <= {None, reference}:
        return "identical"
    if estimate.low is None:
        return "no interval"
    if not estimate.excludes(reference):
        return "within noise"
    return above if estimate.value > reference else below


def number(value: float) -> str:
    """Four significant digits or decimals; an exponent only for what is very large or very small."""
    size = abs(value)
    if size < 1000 and value == int(value):
        return str(int(value))  # an exact 1 or 0 is not the same as 1.000
    if size >= 1e9 or size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    decimals = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4
    return f"{value:.{decimals}f}"


def interval(estimate: Estimate) -> str:
    """`low to high`, or an empty text."""
    return "" if estimate.low is None or estimate.high is None else f"{number(estimate.low)} to {number(estimate.high)}"


def with_interval(estimate: Estimate) -> str:
    """`value (95 % interval low to high)`."""
    return (
        f"{number(estimate.value)} ({f'95 % interval {interval(estimate)}' if interval(estimate) else 'no interval'})"
    )


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} %"


def rows(base: Measured, other: Other) -> list[Row]:
    """The table of differences of one model."""
    model, difference = other.model, other.difference

    def row(metric: str, values: tuple[str, str], estimate: Estimate, reference: float) -> Row:
        words = {"above": "differs", "below": "differs"} if values == ("", "") else {}
        return Row(
            metric,
            *values,
            number(estimate.value),
            interval(estimate),
            reading(estimate, reference, **words),
        )

    perplexities = number(base.perplexity.value), number(model.perplexity.value)
    confidences = number(base.confidence.value), number(model.confidence.value)
    table = [
        row("perplexity, ratio", perplexities, difference.perplexity_ratio, 1.0),
        row("top-1 confidence, difference", confidences, difference.confidence, 0.0),
        row("KL(base || other), nats per token", ("", ""), difference.kl, 0.0),
        row("cosine similarity of logits", ("", ""), difference.logit_cosine, 1.0),
        row("top-1 agreement", ("", ""), difference.top1_agreement, 1.0),
    ]
    if difference.hidden_cosine:
        table.append(row("cosine similarity, last hidden state", ("", ""), difference.hidden_cosine[-1], 1.0))
    for name, part, ratio in speeds(base, model, difference):
        table.append(row(f"{name} tokens/s, ratio", (number(part[0].median), number(part[1].median)), ratio, 1.0))
    return table


def speeds(base: Measured, model: Measured, difference: Difference) -> list[tuple[str, tuple[Rate, Rate], Estimate]]:
    """(what, rates of base and other, ratio), where speed was measured."""
    if not (base.speed and model.speed and difference.prefill_ratio and difference.decode_ratio):
        return []
    return [
        ("prefill", (base.speed.prefill, model.speed.prefill), difference.prefill_ratio),
        ("decode", (base.speed.decode, model.speed.decode), difference.decode_ratio),
    ]


def sentences(comparison: Comparison, other: Other) -> list[str]:
    """The verdict on one model."""
    base, model, difference = comparison.base, other.model, other.difference
    said = [describe_change(other)]
    if is_identical(difference):
        said.append(f"On this text it is the same as {base.name}: every prediction is equal (ratio 1, KL 0, exactly).")
    else:
        said += [describe_perplexity(base, model, difference), describe_predictions(base, difference)]
        departure = describe_departure(difference)
        said += [departure] if departure else []
    for name, _, ratio in speeds(base, model, difference):
        verb = "reads a prompt (prefill)" if name == "prefill" else "writes (decode)"
        pace = reading(ratio, 1.0, above="faster than", below="slower than")
        if pace in ("faster than", "slower than"):
            said.append(f"It {verb} {pace} {base.name}: speed ratio {with_interval(ratio)}.")
        else:
            why = "too few runs to tell" if pace == "no interval" else "no difference beyond noise"
            said.append(f"How fast it {verb}: {why}, speed ratio {with_interval(ratio)}.")
    return said


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
        return "Its config differs in " + ", ".join(f"{key} ({a} → {b})" for key, (a, b) in settings.items()) + "."
    return "No recipe is recorded and its config is the base's; whatever differs is in the weights or in memory only."


def recipe_name(recipe: dict[str, Any] | None) -> str | None:
    """The recipe's own name, at the top or one level down."""
    for place in (recipe, (recipe or {}).get("recipe")):
        if isinstance(place, str):
            return place
        if isinstance(place, dict) and isinstance(place.get("name"), str):
            return place["name"]
    return None


def describe_perplexity(base: Measured, model: Measured, difference: Difference) -> str:
    ratio = difference.perplexity_ratio
    verb = {
        "higher": f"It predicts this text worse than {base.name}",
        "lower": f"It predicts this text better than {base.name}",
        "no interval": "Whether it predicts better or worse cannot be told from one unit of text",
    }.get(reading(ratio, 1.0), "How well it predicts this text does not differ beyond noise")
    numbers = f"perplexity {number(model.perplexity.value)} against {number(base.perplexity.value)}"
    return f"{verb}: {numbers}, ratio {with_interval(ratio)}."


def describe_predictions(base: Measured, difference: Difference) -> str:
    return (
        f"Its predictions lie {with_interval(difference.kl)} nats per token from {base.name}'s (mean KL); the logits "
        f"have cosine similarity {number(difference.logit_cosine.value)}; both put the same token first in "
        f"{percent(difference.top1_agreement)} of places."
    )


def describe_departure(difference: Difference) -> str | None:
    """Where in the depth the hidden states lose the most similarity."""
    values = [estimate.value for estimate in difference.hidden_cosine]
    if len(values) < 2:
        return None
    if values[0] < 0.99:
        return f"The signal departs at the very input: cosine similarity {number(values[0])} before the first layer."
    losses = [before - after for before, after in itertools.pairwise(values)]
    layer = max(range(len(losses)), key=losses.__getitem__)
    if losses[layer] < 0.001:
        return None
    last = layer == len(losses) - 1
    where = "the last layer and the final norm" if last else f"layer {layer} of 0 to {len(losses) - 1}"
    return (
        f"The signal departs most in {where}: cosine similarity of hidden states {number(values[layer])} before and "
        f"{number(values[layer + 1])} after."
    )


def summary(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the short table: one column per model, one row per measure, values with their intervals."""
    base, others = comparison.base, comparison.others
    differences = [other.difference for other in others]
    table = [
        ["perplexity", *(bracketed(model.perplexity) for model in comparison.models)],
        ["ratio to the base's", "", *(bracketed(difference.perplexity_ratio) for difference in differences)],
        ["mean KL, nats", "", *(bracketed(difference.kl) for difference in differences)],
        ["cosine of logits", "", *(bracketed(difference.logit_cosine) for difference in differences)],
        ["top-1 agreement", "", *(bracketed(difference.top1_agreement) for difference in differences)],
    ]
    timed = [speeds(base, other.model, other.difference) for other in others]
    for part in range(len(timed[0])):
        name, (own, _), _ = timed[0][part]
        rates = [number(own.median), *(number(parts[part][1][1].median) for parts in timed)]
        table.append([f"{name}, tokens/s", *rates])
        table.append(["ratio to the base's", "", *(bracketed(parts[part][2]) for parts in timed)])
    return ["", *(model.name for model in comparison.models)], table


def bracketed(estimate: Estimate) -> str:
    """`value [low, high]`."""
    if estimate.low is None or estimate.high is None:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
