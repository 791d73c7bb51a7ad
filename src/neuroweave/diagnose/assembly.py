"""From the sums of a run to the typed result: every number with its interval."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from neuroweave.activations.neuron_choices import NeuronChoices
from neuroweave.diagnose.bootstrap import FEWEST_UNITS, LEAST_UNITS, Bootstrap
from neuroweave.diagnose.probes.anatomy import layers_and_families
from neuroweave.diagnose.probes.generation import Written
from neuroweave.diagnose.probes.gradient import GradientTally, gradient_difference, gradient_result
from neuroweave.diagnose.probes.signal import SignalTally, signal_difference
from neuroweave.diagnose.probes.speed import speed_ratio
from neuroweave.diagnose.probes.tallies import CALIBRATION_BINS, KL_EDGES, PairTally, Places, Tally
from neuroweave.diagnose.probes.tasks import TaskRun, task_differences
from neuroweave.diagnose.results.comparison import (
    CalibrationBin,
    Difference,
    Measured,
    Other,
    PositionBin,
    Speed,
    TextUsed,
)
from neuroweave.diagnose.results.neurons import MixtureChoices
from neuroweave.diagnose.results.plan import Plan
from neuroweave.diagnose.results.records import Estimate, Histogram
from neuroweave.diagnose.results.weights import Weights
from neuroweave.diagnose.subject import Profile, changed_settings
from neuroweave.text.sample import Sample

POSITION_BINS = 32


@dataclass(eq=False)
class Findings:
    """What was measured of one model; None or empty: it was not, or it failed."""

    profile: Profile
    tally: Tally | None = None
    pair: PairTally | None = None  # of every model but the base
    signal: SignalTally | None = None
    gradient: GradientTally | None = None
    written: list[Written] = field(default_factory=list)
    speed: Speed | None = None
    weights: Weights | None = None
    tasks: list[TaskRun] = field(default_factory=list)


def describe_model(found: Findings, places: Places, plan: Plan, bootstrap: Bootstrap) -> Measured:
    tally, counts, profile = found.tally, places.counts, found.profile
    assert tally is not None
    return Measured(
        name=profile.name,
        source=profile.source,
        architecture=profile.architecture,
        parameters=profile.parameters,
        dtype=profile.dtype,
        device=profile.device,
        recipe=profile.recipe,
        choices=mixture_choices(profile.choices),
        negative_log_likelihood=bootstrap.estimate(tally.negative_log_likelihood, counts),
        perplexity=bootstrap.estimate(tally.negative_log_likelihood, counts, exponential=True),
        confidence=bootstrap.estimate(tally.confidence, counts),
        accuracy=bootstrap.estimate(tally.correct, counts),
        entropy=bootstrap.estimate(tally.entropy, counts),
        calibration_error=bootstrap.statistic(calibration_error, calibration_gaps(tally), column(counts))[0],
        calibration=calibration_bins(tally),
        signal=found.signal.result(bootstrap) if found.signal else None,
        gradient=gradient_result(found.gradient, resamples=plan.resamples, seed=plan.seed) if found.gradient else None,
        speed=found.speed,
        tasks=[score for run in found.tasks for score in run.scores],
    )


def mixture_choices(found: list[NeuronChoices]) -> list[MixtureChoices]:
    """The same with the layer that each mixture is in, and its name there."""
    places = layers_and_families([each.path for each in found])
    return [
        MixtureChoices(
            layer=places[each.path][0],
            family=places[each.path][1],
            neurons=each.neurons,
            weights=each.weights,
            entropy=each.entropy,
        )
        for each in found
    ]


def describe_other(
    base: Findings, other: Findings, places: Places, plan: Plan, bootstrap: Bootstrap, *, in_turns: bool
) -> Other:
    """`in_turns`: both models' speeds were timed turn by turn, so that a ratio can be taken turn by turn."""
    return Other(
        model=describe_model(other, places, plan, bootstrap),
        difference=describe_difference(base, other, places, plan, bootstrap, in_turns=in_turns),
    )


def describe_difference(
    base: Findings, other: Findings, places: Places, plan: Plan, bootstrap: Bootstrap, *, in_turns: bool
) -> Difference:
    """Differences are taken per unit before the draws: that is what pairs them."""
    ours, theirs, pair, counts = base.tally, other.tally, other.pair, places.counts
    assert ours is not None
    assert theirs is not None
    assert pair is not None
    likelihood = subtract(theirs.negative_log_likelihood, ours.negative_log_likelihood)
    settings = {"resamples": plan.resamples, "seed": plan.seed}
    ratios = speed_ratios(base.speed, other.speed, in_turns=in_turns)
    return Difference(
        perplexity_ratio=bootstrap.estimate(likelihood, counts, exponential=True),
        negative_log_likelihood=bootstrap.estimate(likelihood, counts),
        confidence=bootstrap.estimate(theirs.confidence - ours.confidence, counts),
        confidence_squared=bootstrap.estimate(pair.confidence_squared, counts),
        entropy=bootstrap.estimate(theirs.entropy - ours.entropy, counts),
        accuracy=bootstrap.estimate(theirs.correct - ours.correct, counts),
        calibration_error=bootstrap.statistic(
            lambda a, b, count: calibration_error(b, count) - calibration_error(a, count),
            calibration_gaps(ours), calibration_gaps(theirs), column(counts),
        )[0],
        kl=bootstrap.estimate(pair.kl, counts),
        logit_cosine=bootstrap.estimate(pair.logit_cosine, counts),
        top1_agreement=bootstrap.estimate(pair.top1, counts),
        top5_agreement=bootstrap.estimate(pair.top5, counts),
        hidden_cosine=bootstrap.estimates(pair.hidden_cosine, counts),
        hidden_cka=alignment(pair, bootstrap),
        kl_histogram=Histogram(
            edges=KL_EDGES.tolist(),
            counts=pair.kl_counts[1:-1].tolist(),
            below=int(pair.kl_counts[0]),
            above=int(pair.kl_counts[-1]),
        ),
        kl_by_position=position_bins(pair, places.counts_at),
        prefill_ratio=ratios[0],
        decode_ratio=ratios[1],
        signal=signal_difference(base.signal, other.signal, bootstrap) if base.signal and other.signal else None,
        gradient=gradient_difference(base.gradient, other.gradient, **settings)
        if base.gradient and other.gradient
        else None,
        weights=other.weights,
        tasks=task_differences(base.tasks, other.tasks, **settings) if base.tasks and other.tasks else [],
        changed_settings=changed_settings(base.profile, other.profile),
    )  # fmt: skip


def subtract(other: np.ndarray, base: np.ndarray) -> np.ndarray:
    """other - base, where infinity (a token came that both models rule out) minus itself is 0."""
    with np.errstate(invalid="ignore"):
        return np.where(other == base, 0.0, other - base)


def column(counts: np.ndarray) -> np.ndarray:
    """[units, 1], as the bootstrap takes statistics."""
    return np.asarray(counts, dtype=np.float64)[:, None]


def calibration_gaps(tally: Tally) -> np.ndarray:
    """[units, bins] what a bin's predictions were surer of than they were right, summed."""
    return np.asarray(tally.bin_confidence - tally.bin_correct)


def calibration_error(gaps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Expected calibration error [draws, 1] from totals: sum over bins of |confidence - accuracy|, weighted by the
    bins' predictions (Guo et al. 2017, "On calibration of modern neural networks")."""
    return np.asarray(np.abs(gaps).sum(1, keepdims=True) / counts)


def calibration_bins(tally: Tally) -> list[CalibrationBin]:
    totals = [sums.sum(0) for sums in (tally.bin_counts, tally.bin_confidence, tally.bin_correct)]
    return [
        CalibrationBin(
            predictions=int(count),
            confidence=float(sure / count) if count else (index + 0.5) / CALIBRATION_BINS,
            accuracy=float(right / count) if count else 0.0,
        )
        for index, (count, sure, right) in enumerate(zip(*totals, strict=True))
    ]


def alignment(pair: PairTally, bootstrap: Bootstrap) -> list[Estimate]:
    """Centred kernel alignment by depth, where there were windows long enough for it."""
    both, ours, theirs = (np.ascontiguousarray(pair.alignment[:, part]) for part in range(3))
    if not both.size or not ours.any():
        return []
    return bootstrap.statistic(lambda a, b, c: a / np.sqrt(b * c), both, ours, theirs)


def speed_ratios(base: Speed | None, other: Speed | None, *, in_turns: bool) -> tuple[Estimate | None, Estimate | None]:
    if base is None or other is None:
        return None, None
    if in_turns:
        return speed_ratio(base.prefill, other.prefill), speed_ratio(base.decode, other.decode)
    return (
        Estimate(value=other.prefill.median / base.prefill.median),
        Estimate(value=other.decode.median / base.decode.median),
    )


def position_bins(pair: PairTally, counts_at: np.ndarray) -> list[PositionBin]:
    """Mean KL in at most `POSITION_BINS` runs of positions."""
    edges = np.unique(np.linspace(0, len(counts_at), min(POSITION_BINS, len(counts_at)) + 1).astype(int))
    return [
        PositionBin(
            first=int(first),
            last=int(end) - 1,
            mean=float(pair.kl_at[first:end].sum() / counts_at[first:end].sum()),
            predictions=int(counts_at[first:end].sum()),
        )
        for first, end in itertools.pairwise(edges)
    ]


def describe_text(sample: Sample, plan: Plan) -> TextUsed:
    return TextUsed(
        documents=sample.documents,
        unit=f"a document, or of a longer one a passage of about {plan.passage:,} characters",
        units=len(sample.passages),
        windows=len(sample.windows),
        predictions=sample.predictions,
        start_token=sample.start_token,
        sha256=sample.sha256,
    )


def units_of_text(units: int) -> str:
    return "There is only one unit of text" if units == 1 else f"There are only {units} units of text"


def describe_limits(sample: Sample, plan: Plan, others: Sequence[Other], *, in_turns: bool) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = []
    units = len(sample.passages)
    if units < LEAST_UNITS:
        notes.append(f"{units_of_text(units)}, too little for intervals; measure on more text.")
    elif units < FEWEST_UNITS:
        notes.append(f"There are only {units} units of text: the intervals are likely too narrow; measure on more.")
    if sample.exhausted:
        read = sum(len(window.token_ids) for window in sample.windows)
        notes.append(f"The text holds only {read:,} tokens in usable windows of the {plan.tokens:,} asked for.")
    notes.extend(
        f"{other.model.name}: no cosine similarity of hidden states, because its layers are of another number or width "
        "than the base's or are not given out by the model."
        for other in others
        if not other.difference.hidden_cosine
    )
    if not in_turns and plan.speed is not None:
        notes.append(
            "The models were in memory one after the other; their speeds come from different times, so the ratios have "
            "no intervals."
        )
    if len(others) > 1:
        notes.append("Each interval stands for itself; they are not widened for the number of models compared.")
    return notes
