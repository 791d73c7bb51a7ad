"""The whole comparison: one base, one or more others, the same text, the same prompts, the same clock."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from neuroweave.diagnose.bootstrap import FEWEST_UNITS, Bootstrap
from neuroweave.diagnose.comparison import (
    Comparison,
    Difference,
    Generated,
    Histogram,
    Measured,
    Other,
    Plan,
    PositionBin,
    Speed,
    TextUsed,
)
from neuroweave.diagnose.environment import describe_environment
from neuroweave.diagnose.generation import check_prompts, continue_prompts
from neuroweave.diagnose.measure import KL_EDGES, PairTally, Tallies, Tally, measure_windows
from neuroweave.diagnose.passages import Document, Sample, draw_sample
from neuroweave.diagnose.speed import measure_speed, speed_ratio
from neuroweave.diagnose.subject import Subject, at_rest, changed_settings, check_comparable

POSITION_BINS = 32


@dataclass(frozen=True)
class Pass:
    """What one run over the text gave, for the base and the others that were in memory with it."""

    base: Measured
    others: list[Other]
    generated: list[Generated]


def compare(
    base: Subject,
    others: Iterable[Subject],
    documents: Iterable[Document],
    *,
    plan: Plan | None = None,
    together: bool = True,
) -> Comparison:
    """Measure `others` against `base` on the same tokens of `documents`; the models' logits stay as they were.

    `together`: the others are all in memory and share one pass, so that the base reads each window once. Otherwise
    they are taken from `others` one by one, each let go before the next is asked for, and the base runs once for each.
    Raises ValueError on models that cannot be compared, text that cannot be measured, and logits that are not numbers.
    """
    plan = plan or Plan()
    check_prompts(plan.prompts)
    sample = draw_sample(documents, base.tokenizer, tokens=plan.tokens, window=plan.window, passage=plan.passage)
    bootstrap = Bootstrap(len(sample.passages), resamples=plan.resamples, seed=plan.seed)
    names = {base.name}
    passes = []
    for group in grouped(others, together):
        for position in range(len(group)):  # no loop variable may hold on to a model
            if group[position].name in names:
                raise ValueError(f"two models are called {group[position].name!r}; give each its own name")
            names.add(group[position].name)
            check_comparable(base, group[position], sample, plan.window)
        passes.append(run_pass(base, group, sample, plan, bootstrap))
        group.clear()
    if len(names) == 1:
        raise ValueError("there is nothing to compare with the base; name at least one other model")
    return Comparison(
        plan=plan,
        text=describe_text(sample, plan),
        base=passes[0].base,
        others=[other for done in passes for other in done.others],
        generated=merge_generated([done.generated for done in passes]),
        environment=describe_environment(),
        notes=describe_limits(sample, plan, passes),
    )


def grouped(others: Iterable[Subject], together: bool) -> Iterator[list[Subject]]:
    """All in one list, or one by one in lists that the caller empties: a model is free before the next comes."""
    if together:
        yield list(others)
        return
    remaining = iter(others)
    while group := list(itertools.islice(remaining, 1)):
        yield group


def run_pass(base: Subject, others: Sequence[Subject], sample: Sample, plan: Plan, bootstrap: Bootstrap) -> Pass:
    """Everything about the models that are in memory at once."""
    subjects = [base, *others]
    with ExitStack() as stack:
        for subject in subjects:
            stack.enter_context(at_rest(subject.model))
        with tqdm(total=len(sample.windows), desc="measuring", unit="window", disable=None) as bar:
            tallies = measure_windows(base, others, sample, after_window=bar.update)
        with tqdm(total=len(subjects) * len(plan.prompts), desc="writing", unit="text", disable=None) as bar:
            generated = continue_prompts(subjects, plan.prompts, plan.new_tokens, after_prompt=bar.update)
        speeds: Sequence[Speed | None] = [None] * len(subjects)
        if plan.speed:
            runs = len(subjects) * (plan.speed.warmups + plan.speed.repeats)
            with tqdm(total=runs, desc="timing", unit="run", disable=None) as bar:
                prompt = max(sample.windows, key=lambda window: window.predictions).token_ids
                speeds = measure_speed(subjects, prompt, plan.speed, after_run=bar.update)
    measured_base = describe_model(base, tallies.base, tallies.counts, bootstrap, speeds[0])
    found = [
        Other(
            model=describe_model(other, tally, tallies.counts, bootstrap, speed),
            difference=describe_difference(base, other, number, tallies, bootstrap, (speeds[0], speed)),
        )
        for number, (other, tally, speed) in enumerate(zip(others, tallies.others, speeds[1:], strict=True))
    ]
    return Pass(measured_base, found, generated)


def describe_model(
    subject: Subject, tally: Tally, counts: np.ndarray, bootstrap: Bootstrap, speed: Speed | None
) -> Measured:
    return Measured(
        name=subject.name,
        source=subject.source,
        architecture=type(subject.model).__name__,
        parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
        dtype=subject.dtype,
        device=str(subject.device),
        recipe=subject.recipe,
        negative_log_likelihood=bootstrap.estimate(tally.negative_log_likelihood, counts),
        perplexity=bootstrap.estimate(tally.negative_log_likelihood, counts, exponential=True),
        confidence=bootstrap.estimate(tally.confidence, counts),
        confidence_counts=tally.confidence_counts.tolist(),
        speed=speed,
    )


def describe_difference(
    base: Subject,
    other: Subject,
    number: int,
    tallies: Tallies,
    bootstrap: Bootstrap,
    speeds: tuple[Speed | None, Speed | None],
) -> Difference:
    """Of the `number`-th other model. Differences are taken per unit before the draws: that is what pairs them."""
    counts, tally, pair = tallies.counts, tallies.others[number], tallies.pairs[number]
    likelihood = subtract(tally.negative_log_likelihood, tallies.base.negative_log_likelihood)
    ours, theirs = speeds
    return Difference(
        perplexity_ratio=bootstrap.estimate(likelihood, counts, exponential=True),
        negative_log_likelihood=bootstrap.estimate(likelihood, counts),
        confidence=bootstrap.estimate(tally.confidence - tallies.base.confidence, counts),
        kl=bootstrap.estimate(pair.kl, counts),
        logit_cosine=bootstrap.estimate(pair.logit_cosine, counts),
        top1_agreement=bootstrap.estimate(pair.agreement, counts),
        hidden_cosine=bootstrap.estimates(pair.hidden_cosine, counts),
        kl_histogram=Histogram(
            edges=KL_EDGES.tolist(),
            counts=pair.kl_counts[1:-1].tolist(),
            below=int(pair.kl_counts[0]),
            above=int(pair.kl_counts[-1]),
        ),
        kl_by_position=position_bins(pair, tallies.counts_at),
        prefill_ratio=speed_ratio(ours.prefill, theirs.prefill) if ours and theirs else None,
        decode_ratio=speed_ratio(ours.decode, theirs.decode) if ours and theirs else None,
        changed_settings=changed_settings(base, other),
    )


def subtract(other: np.ndarray, base: np.ndarray) -> np.ndarray:
    """other - base, where infinity (a token came that both models rule out) minus itself is 0."""
    with np.errstate(invalid="ignore"):
        return np.where(other == base, 0.0, other - base)


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


def describe_limits(sample: Sample, plan: Plan, passes: Sequence[Pass]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = []
    units = len(sample.passages)
    if units < 2:
        notes.append("There is only one unit of text, so there are no intervals; measure on more text.")
    elif units < FEWEST_UNITS:
        notes.append(f"There are only {units} units of text: the intervals are likely too narrow; measure on more.")
    if sample.exhausted:
        read = sum(len(window.token_ids) for window in sample.windows)
        notes.append(f"The text holds only {read:,} tokens in usable windows of the {plan.tokens:,} asked for.")
    notes.extend(
        f"{other.model.name}: no cosine similarity of hidden states, because its layers are of another number or width "
        "than the base's or are not given out by the model."
        for done in passes
        for other in done.others
        if not other.difference.hidden_cosine
    )
    if sum(len(done.others) for done in passes) > 1:
        notes.append("Each interval stands for itself; they are not widened for the number of models compared.")
    return notes


def merge_generated(runs: Sequence[Sequence[Generated]]) -> list[Generated]:
    """The same prompts from several passes, the base's continuation once."""
    return [
        Generated(
            prompt=same[0].prompt,
            continuations=[*same[0].continuations, *(text for more in same[1:] for text in more.continuations[1:])],
        )
        for same in zip(*runs, strict=True)
    ]
