"""The words of a verdict: a direction is named only where an interval carries it, in enough digits to be seen."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
from made_comparison import made_comparison

from neuroweave.diagnose.report import numbers, verdict
from neuroweave.diagnose.report.differences import rows
from neuroweave.diagnose.results.comparison import Comparison, Difference, Failure, Other
from neuroweave.diagnose.results.records import Estimate
from neuroweave.diagnose.results.tasks import TaskDifference

DIRECTIONS = ("higher", "lower", "worse", "better", "faster", "slower")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return made_comparison(("base", "the same", "<b>noisy & loud</b>"), amounts=(0, 0.5))


def changed(other: Other, **parts: Any) -> Other:
    """`other` with another difference."""
    return other.model_copy(update={"difference": other.difference.model_copy(update=parts)})


def said(comparison: Comparison, **parts: Any) -> str:
    return " ".join(verdict.sentences(comparison, changed(comparison.others[1], **parts)))


def test_equal_models_are_called_equal(comparison: Comparison) -> None:
    same = comparison.others[0]
    text = " ".join(verdict.sentences(comparison, same))
    assert "the same as base: every prediction is equal" in text
    assert "It shares all weights of base, equal to the byte." in text
    assert not any(word in text for word in DIRECTIONS)
    assert {row.reading for row in rows(comparison.base, same)} == {"identical", "counted", "within noise"}
    assert [row.reading for row in rows(comparison.base, same)][:13] == ["identical"] * 13


@pytest.mark.parametrize(
    ("ratio", "words", "reading"),
    [
        (Estimate(value=1.02, low=1.01, high=1.03), "worse than base: perplexity", "higher"),
        (Estimate(value=0.98, low=0.97, high=0.99), "better than base: perplexity", "lower"),
        (Estimate(value=0.98, low=0.95, high=1.01), "does not differ beyond noise", "within noise"),
        (Estimate(value=0.98, low=0.97, high=1.0), "does not differ beyond noise", "within noise"),
        (Estimate(value=0.98), "too little text was read for an interval", "no interval"),
        (Estimate(value=1.0004, low=1.0002, high=1.0006), "practically the same as base", "practically the same"),
        (Estimate(value=1.0, low=0.9995, high=1.0005), "practically the same as base", "practically the same"),
        (Estimate(value=1.0009, low=1.0006, high=1.0012), "worse than base", "higher"),
        (Estimate(value=1.0, low=1.0, high=1.0), "exactly as well as base", "identical"),
    ],
)
def test_a_direction_is_named_only_with_an_interval_that_carries_it(
    comparison: Comparison, ratio: Estimate, words: str, reading: str
) -> None:
    parts = {"perplexity_ratio": ratio, "tasks": []}
    text = said(comparison, **parts)
    assert words in text
    assert sum(word in text for word in ("worse than", "better than")) == (reading in ("higher", "lower"))
    assert rows(comparison.base, changed(comparison.others[1], **parts))[0].reading == reading
    assert verdict.tiles(comparison.base, changed(comparison.others[1], **parts))[0].reading == reading


def test_a_small_difference_is_shown_in_digits_that_show_it(comparison: Comparison) -> None:
    text = said(comparison, perplexity_ratio=Estimate(value=1.00042, low=1.00031, high=1.00053))
    assert (
        "practically the same as base: perplexity 20.09 against 18.17, ratio 1.0004 (95 % interval 1.0003 to 1.0005)"
        in text
    )
    for estimate in (
        Estimate(value=1.0000042, low=1.0000031, high=1.2),
        Estimate(value=0.99996, low=0.9, high=0.99998),
    ):
        shown = numbers.with_interval(estimate, 1.0)
        assert not re.search(r"1\.0+\b", shown), shown


@pytest.mark.parametrize("seed", range(30))
def test_what_is_printed_lies_on_the_same_side_as_what_was_measured(seed: int) -> None:
    draw = random.Random(seed)
    reference = float(draw.choice((0, 1)))
    sign, gap = draw.choice((-1, 1)), 10 ** draw.uniform(-6, 0)
    near, far = sorted((gap, gap * draw.uniform(1, 9)))
    ends = sorted((reference + sign * near, reference + sign * far))
    estimate = Estimate(value=sum(ends) / 2, low=ends[0], high=ends[1])
    printed = [numbers.value_of(estimate, reference), *numbers.interval(estimate, reference).split(" to ")]
    for text, exact in zip(printed, (estimate.value, *ends), strict=True):
        value = float(text.replace(",", ""))
        assert value != reference, (text, exact)
        assert (value > reference) == (exact > reference), (text, exact)
        assert value == pytest.approx(exact, rel=1e-2, abs=0.51 * near)


def test_an_infinite_perplexity_is_not_judged(comparison: Comparison) -> None:
    broken = comparison.others[1]
    model = broken.model.model_copy(update={"perplexity": Estimate(value=math.inf)})
    parts = {"perplexity_ratio": Estimate(value=math.inf), "kl": Estimate(value=math.inf), "tasks": []}
    other = changed(broken, **parts).model_copy(update={"model": model})
    text = " ".join(verdict.sentences(comparison, other))
    assert "cannot be compared: perplexity infinite against 18.17." in text
    assert "Its predictions lie infinite (no interval) nats per token" in text
    assert "worse than" not in text
    assert rows(comparison.base, other)[0].reading == "no interval"


def test_speed_is_claimed_only_with_an_interval(comparison: Comparison) -> None:
    for ratio, words, reading in [
        (Estimate(value=0.9, low=0.8, high=0.95), "writes (decode) slower than base", "slower"),
        (Estimate(value=1.1, low=1.05, high=1.2), "writes (decode) faster than base", "faster"),
        (Estimate(value=1.1, low=0.9, high=1.2), "writes (decode): no difference beyond noise", "within noise"),
        (Estimate(value=1.1), "writes (decode): too few runs to tell", "no interval"),
        (Estimate(value=1.3, low=1.1, high=1.7), "writes (decode): too noisy to tell", "too noisy to tell"),
        (Estimate(value=0.7, low=0.6, high=0.91), "writes (decode): too noisy to tell", "too noisy to tell"),
    ]:
        text = said(comparison, decode_ratio=ratio)
        assert words in text
        assert "median of paired speed ratios" in text
        assert rows(comparison.base, changed(comparison.others[1], decode_ratio=ratio))[-1].reading == reading


def test_where_the_signal_departs(comparison: Comparison) -> None:
    def depth(*values: float, half: float = 0.0) -> list[Estimate]:
        return [Estimate(value=value, low=value - half, high=value + half) for value in values]

    text = said(comparison, hidden_cosine=depth(1, 1, 0.999, 0.9, 0.89))
    assert "departs first in layer 1 of 0 to 3 (0.9990 after it) and most in layer 2 of 0 to 3" in text
    assert "0.9990 [0.9990, 0.9990] before and 0.9000 [0.9000, 0.9000] after" in text
    assert "overlap" not in text
    text = said(comparison, hidden_cosine=depth(1, 1, 0.999, 0.9, 0.89, half=0.06))
    assert "another layer may depart as much" in text
    assert "most in the last layer and the final norm" in said(comparison, hidden_cosine=depth(1, 1, 0.9))
    assert "departs at the very input" in said(comparison, hidden_cosine=depth(0.9, 0.8))
    assert "departs nowhere by much" in said(comparison, hidden_cosine=depth(1, 0.99995, 0.9999))
    for nothing in ([], depth(1.0), depth(1, math.nan, 0.9)):
        assert "departs" not in said(comparison, hidden_cosine=nothing)


def test_shared_weights_are_a_number(comparison: Comparison) -> None:
    text = said(comparison)
    assert "It shares 57.1 % of the weights with base: 14,159,232 of 24,776,064 numbers" in text
    weights = comparison.others[1].difference.weights
    assert weights is not None
    for equal, words in [
        (0, "It shares no weights with base: 0 of 24,776,064 numbers"),
        (24_776_063, "It shares over 99.9 % of the weights"),
        (1, "It shares under 0.1 % of the weights"),
    ]:
        assert words in said(comparison, weights=weights.model_copy(update={"equal_bytes": equal}))


def test_sparsity_counts_the_layers_whose_interval_leaves_out_0(comparison: Comparison) -> None:
    signal = comparison.others[1].difference.signal
    assert signal is not None
    zero = [Estimate(value=0.1, low=0.05, high=0.2), Estimate(value=0.1, low=-0.05, high=0.2), Estimate(value=0.1)]
    text = said(comparison, signal=signal.model_copy(update={"zero": zero}))
    assert "exactly zero is higher in 1 of 3 layers: 35.0 % on average over layers against 0 %." in text
    assert "exactly zero" not in said(comparison, signal=signal.model_copy(update={"zero": zero[1:]}))


def test_benchmarks_are_judged_by_their_own_direction(comparison: Comparison) -> None:
    tasks = comparison.others[1].difference.tasks
    clear = tasks[0].model_copy(update={"difference": Estimate(value=0.1, low=0.05, high=0.2)})
    noisy = tasks[0].model_copy(update={"difference": Estimate(value=0.1, low=-0.05, high=0.2)})
    assert "it does better than base: difference 0.1000" in said(comparison, tasks=[clear])
    fewer = clear.model_copy(update={"higher_is_better": False})
    assert "it does worse than base: difference 0.1000" in said(comparison, tasks=[fewer])
    text = said(comparison, tasks=[noisy])
    assert "No benchmark score (1) differs from base's beyond noise." in text
    assert "it does" not in text


def test_failures_are_said_where_they_belong(comparison: Comparison) -> None:
    failures = [
        Failure(model="the same", part="gradient", message="out of memory"),
        Failure(model="base", part="speed", message="no clock"),
        Failure(model="gone", part="prediction", message="NaN logits"),
    ]
    failed = comparison.model_copy(update={"failures": failures})
    assert verdict.sentences(failed, failed.others[0])[-1] == "Not measured (gradient): out of memory"
    assert "Not measured" not in " ".join(verdict.sentences(failed, failed.others[1]))
    assert verdict.unmeasured(failed) == [
        "base: Not measured (speed): no clock",
        "gone: Not measured (prediction): NaN logits",
    ]


def test_summary_has_a_column_per_model(comparison: Comparison) -> None:
    header, table = verdict.summary(comparison)
    assert header == ["", "base", "the same", "<b>noisy & loud</b>"]
    assert all(len(row) == 4 for row in table)
    assert [row[0] for row in table] == [
        "perplexity",
        "ratio to the base's",
        "mean KL, nats",
        "cosine of logits",
        "top-1 agreement",
        "calibration error",
        "zero activations",
        "weights shared",
        "prefill, tokens/s",
        "median of ratios",
        "decode, tokens/s",
        "median of ratios",
    ]
    assert table[1][1:3] == ["", "1 [1, 1]"]
    assert table[6][1:] == ["0 %", "0 %", "35.0 %"]
    assert table[7][1:] == ["", "100 %", "57.1 %"]


def test_summary_leaves_out_what_does_not_differ_or_was_not_measured(comparison: Comparison) -> None:
    alone = comparison.model_copy(update={"others": comparison.others[:1]})
    assert "zero activations" not in [row[0] for row in verdict.summary(alone)[1]]
    bare = made_comparison(without=("signal", "gradient", "speed", "weights", "tasks"))
    assert [row[0] for row in verdict.summary(bare)[1]][-1] == "calibration error"
    header, table = verdict.summary(comparison.model_copy(update={"others": []}))
    assert header == ["", "base"]
    assert all(len(row) == 2 for row in table)


def test_without_intervals_nothing_has_a_direction() -> None:
    made = made_comparison(intervals=False)
    assert not any(word in sentence for word in DIRECTIONS for sentence in verdict.sentences(made, made.others[0]))
    assert {row.reading for row in rows(made.base, made.others[0])} == {"no interval", "counted"}


def test_every_reading_follows_from_its_interval(comparison: Comparison) -> None:
    """All estimates of the table, moved so that each interval holds "no difference": no direction may be left."""

    def blurred(name: str, value: Any) -> Any:
        if isinstance(value, Estimate):
            return Estimate(value=value.value, low=value.value - 2, high=value.value + 2)
        if isinstance(value, list) and value and isinstance(value[0], Estimate):
            return [blurred(name, one) for one in value]
        if isinstance(value, list) and value and isinstance(value[0], TaskDifference):
            return [one.model_copy(update={"difference": blurred(name, one.difference)}) for one in value]
        return value

    loud = comparison.others[1].difference
    parts = {name: blurred(name, getattr(loud, name)) for name in Difference.model_fields}
    assert loud.gradient is not None
    parts["gradient"] = loud.gradient.model_copy(update={"total": Estimate(value=1.3, low=0.9, high=1.7)})
    readings = {row.reading for row in rows(comparison.base, changed(comparison.others[1], **parts))}
    assert readings == {"within noise", "counted"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.99999, "1.0000"),
        (0.10294, "0.1029"),
        (17.666, "17.67"),
        (4.806e6, "4,806,000"),
        (1.2e-7, "1.2e-07"),
        (math.inf, "infinite"),
        (-math.inf, "minus infinite"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert numbers.number(value) == text
