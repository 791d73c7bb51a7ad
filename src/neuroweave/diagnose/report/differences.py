"""The table of differences: one line a measure, with its interval and what that allows to be said."""

from __future__ import annotations

from dataclasses import dataclass

from neuroweave.diagnose.report.numbers import (
    PRACTICALLY,
    decimals_for,
    interval,
    number,
    reading,
    share,
    speed_reading,
    value_of,
)
from neuroweave.diagnose.results.comparison import Difference, Measured, Other, Rate
from neuroweave.diagnose.results.records import Estimate
from neuroweave.diagnose.results.tasks import TaskDifference, TaskScore

UNMARKED = ("within noise", "no interval", "identical", "practically the same", "too noisy to tell", "counted")


@dataclass(frozen=True)
class Row:
    """One line of the table; all fields are ready to print."""

    metric: str
    base: str
    other: str
    difference: str
    interval: str
    reading: str


def rows(base: Measured, other: Other) -> list[Row]:
    """The table of differences of one model."""
    model, difference = other.model, other.difference
    table = [
        *prediction_rows(base, model, difference),
        *agreement_rows(difference),
        *signal_rows(difference),
    ]
    if difference.gradient and base.gradient and model.gradient:
        totals = base.gradient.total, model.gradient.total
        table.append(compared("norm of the loss gradient, ratio", totals, difference.gradient.total, 1.0))
    if difference.weights and difference.weights.parameters:
        weights = difference.weights
        for what, equal in (("to the byte", weights.equal_bytes), ("in value", weights.equal_values)):
            table.append(Row(f"weights equal {what}", "", "", share(equal, weights.parameters), "", "counted"))
    table += [task_row(base.tasks, model.tasks, task) for task in difference.tasks]
    for name, (ours, theirs), ratio in speeds(base, model, difference):
        table.append(
            Row(
                f"{name} tokens/s, median of paired ratios",
                number(ours.median),
                number(theirs.median),
                value_of(ratio, 1.0),
                interval(ratio, 1.0),
                speed_reading(ratio),
            )
        )
    return table


def compared(
    metric: str, values: tuple[Estimate, Estimate], estimate: Estimate, reference: float, *, tolerance: float = 0.0
) -> Row:
    """A measure that each model has by itself; enough decimals that different values look different."""
    least = decimals_for(estimate, reference) if reference == 0 else 0
    return Row(
        metric,
        number(values[0].value, least=least),
        number(values[1].value, least=least),
        value_of(estimate, reference),
        interval(estimate, reference),
        reading(estimate, reference, tolerance=tolerance),
    )


def between(metric: str, estimate: Estimate, reference: float) -> Row:
    """A measure that only two models have together: there is no direction to name."""
    return Row(
        metric,
        "",
        "",
        value_of(estimate, reference),
        interval(estimate, reference),
        reading(estimate, reference, above="differs", below="differs"),
    )


def prediction_rows(base: Measured, model: Measured, difference: Difference) -> list[Row]:
    likelihoods = base.negative_log_likelihood, model.negative_log_likelihood
    errors = base.calibration_error, model.calibration_error
    return [
        compared(
            "perplexity, ratio",
            (base.perplexity, model.perplexity),
            difference.perplexity_ratio,
            1.0,
            tolerance=PRACTICALLY,
        ),
        compared(
            "negative log-likelihood, nats per token",
            likelihoods,
            difference.negative_log_likelihood,
            0.0,
            tolerance=PRACTICALLY,
        ),
        compared("accuracy of the top token", (base.accuracy, model.accuracy), difference.accuracy, 0.0),
        compared("top-1 confidence", (base.confidence, model.confidence), difference.confidence, 0.0),
        compared("expected calibration error", errors, difference.calibration_error, 0.0),
        compared("entropy, nats", (base.entropy, model.entropy), difference.entropy, 0.0),
    ]


def agreement_rows(difference: Difference) -> list[Row]:
    return [
        between("KL(base || other), nats per token", difference.kl, 0.0),
        between("cosine similarity of logits", difference.logit_cosine, 1.0),
        between("top-1 agreement", difference.top1_agreement, 1.0),
        between("top-5 agreement", difference.top5_agreement, 1.0),
        between("mean squared difference of confidence", difference.confidence_squared, 0.0),
    ]


def signal_rows(difference: Difference) -> list[Row]:
    table = []
    if difference.hidden_cosine:
        table.append(between("cosine similarity, last hidden state", difference.hidden_cosine[-1], 1.0))
    if difference.hidden_cka:
        table.append(between("centred kernel alignment, last hidden state", difference.hidden_cka[-1], 1.0))
    return table


def task_row(ours: list[TaskScore], theirs: list[TaskScore], task: TaskDifference) -> Row:
    def score(scores: list[TaskScore]) -> str:
        found = [s for s in scores if (s.task, s.metric) == (task.task, task.metric)]
        if not found:
            return ""
        error = found[0].standard_error
        return number(found[0].value) + ("" if error is None else f" ± {number(error)}")

    return Row(
        f"{task.task}, {task.metric}",
        score(ours),
        score(theirs),
        value_of(task.difference, 0.0),
        interval(task.difference, 0.0),
        reading(task.difference, 0.0),
    )


def speeds(base: Measured, model: Measured, difference: Difference) -> list[tuple[str, tuple[Rate, Rate], Estimate]]:
    """(what, rates of base and other, ratio), where speed was measured."""
    if not (base.speed and model.speed and difference.prefill_ratio and difference.decode_ratio):
        return []
    return [
        ("prefill", (base.speed.prefill, model.speed.prefill), difference.prefill_ratio),
        ("decode", (base.speed.decode, model.speed.decode), difference.decode_ratio),
    ]
