"""Many changes of one model against the unchanged model, one after the other on the same instance.

The unchanged model is run over the text once; its hidden states stay on the disk meanwhile. A change is made, measured
and undone before the next. What changes a model is the caller's: nothing here knows recipes or fusions.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from neuroweave.diagnose.assembly import describe_model, describe_other, describe_text
from neuroweave.diagnose.bootstrap import LEAST_UNITS, Bootstrap
from neuroweave.diagnose.environment import describe_environment
from neuroweave.diagnose.experiment import MISTAKES, Experiment
from neuroweave.diagnose.ledger import Ledger
from neuroweave.diagnose.probes.prediction import Tallies, measure_windows
from neuroweave.diagnose.probes.signal import SignalTally
from neuroweave.diagnose.probes.stored import StoredReader
from neuroweave.diagnose.probes.tallies import Tally
from neuroweave.diagnose.results.plan import Plan
from neuroweave.diagnose.results.records import Estimate
from neuroweave.diagnose.results.sweep import (
    BASE,
    Heading,
    Kind,
    ModelUsed,
    Outcome,
    Point,
    PointsFile,
    RankedLayer,
    change_key,
)
from neuroweave.diagnose.subject import Subject, at_rest
from neuroweave.text.sample import draw_sample
from neuroweave.text.tokens import NamedText

REFERENCE_DRIFT = 1e-6  # relative; the same states through the same head give the same likelihoods to the last bit
NOTHING = {"speed": None, "gradient": None, "sampling": None, "weights": False}


try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Variant:
    """One change. `settings`: what was varied; `change`: all of it, as plain JSON values.

    `applied()`: the changed model as a context; at its end the model is as it was. It may be the unchanged model's own
    instance, changed in place, but must not write into the output head's weights.
    """

    name: str
    settings: Mapping[str, Any]
    applied: Callable[[], AbstractContextManager[Subject]]
    change: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return change_key(self.change or self.settings)


def variant_plan(**settings: Any) -> Plan:
    """A plan with nothing in it but what a pass over the text gives: predictions, and the signal if it is asked for."""
    return Plan.model_validate(NOTHING | settings)


def make_heading(
    kind: Kind, model: ModelUsed, tokenizer: PreTrainedTokenizerBase, documents: Iterable[NamedText], *, plan: Plan
) -> Heading:
    """The heading of a file of points, for which only the tokenizer is needed.

    Raises ValueError for a text that holds fewer tokens than the plan asks for: points of texts of other lengths cannot
    stand together.
    """
    sample = draw_sample(documents, tokenizer, tokens=plan.tokens, window=plan.window, passage=plan.passage)
    if sample.exhausted:
        held = sum(len(window.token_ids) for window in sample.windows)
        raise ValueError(
            f"the text holds only {held:,} tokens in usable windows of the {plan.tokens:,} asked for; give more text, "
            f"or --tokens {held}"
        )
    predictions = [0] * len(sample.passages)
    for window in sample.windows:
        predictions[window.unit] += window.predictions
    return Heading(
        kind=kind,
        model=model,
        plan=plan,
        text=describe_text(sample, plan),
        predictions=predictions,
        environment=describe_environment(),
    )


def measure_into(
    file: PointsFile, base: Subject, documents: Iterable[NamedText], variants: Sequence[Variant]
) -> Iterator[Point]:
    """`measure_variants` by the file's plan; each point is in the file before it is given.

    Raises ValueError when another run is measuring into the file, or has done so since it was read.
    """
    with scratch_beside(file.path) as scratch:
        file.check_unchanged()
        for point in measure_variants(base, documents, variants, plan=file.heading.plan, ledger=Ledger(scratch)):
            if point.key != BASE or BASE not in file.points:
                file.append(point)
            yield point


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A folder for the unchanged model's hidden states, gone at the end whatever happens, and locked meanwhile.

    Raises ValueError when another run has it.
    """
    folder = path.with_name(f".{path.name}.scratch")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder, path)
    try:
        for left in folder.iterdir():  # by a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def lock(folder: Path, path: Path) -> int:
    """The descriptor that holds a lock on `folder`; a process that ends, however, lets it go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except BlockingIOError:
        pass
    except FileNotFoundError:  # the other run has just ended, and removed it
        pass
    except OSError:  # some network file systems have no locks
        return descriptor
    os.close(descriptor)
    raise ValueError(f"{path}: another run is measuring into this file; wait for it, or name another file")


def measure_variants(
    base: Subject, documents: Iterable[NamedText], variants: Iterable[Variant], *, plan: Plan, ledger: Ledger
) -> Iterator[Point]:
    """The unchanged model's point, then one for each variant, as soon as it is measured.

    `ledger`: one with a folder, for the unchanged model's hidden states. A variant that cannot be made or gives no
    numbers becomes a point with its failure. Raises ValueError on text that cannot be measured, and when the unchanged
    model's logits are not numbers.
    """
    began = time.monotonic()
    experiment = Experiment(base, documents, plan, ledger)
    bootstrap = Bootstrap(experiment.units, resamples=plan.resamples, seed=plan.seed, least=LEAST_UNITS)
    with at_rest(base.model):
        reference = experiment.store(base)
        count_base(experiment, reference)
    own = experiment.base.tally
    assert own is not None
    experiment.ledger = Ledger()  # a variant is measured whole, or again
    yield base_point(experiment, bootstrap, seconds=time.monotonic() - began)
    for number, variant in enumerate(variants, start=1):
        began = time.monotonic()
        outcome, failure = None, None
        try:
            outcome = measure_variant(experiment, reference, variant, number, own, bootstrap)
        except MISTAKES as error:
            failure = str(error) or type(error).__name__
        experiment.found = {base.name: experiment.base}
        experiment.failures.clear()
        yield Point(
            key=variant.key,
            name=variant.name,
            settings=dict(variant.settings),
            change=dict(variant.change),
            outcome=outcome,
            failure=failure,
            seconds=time.monotonic() - began,
        )


def count_base(experiment: Experiment, reference: StoredReader) -> None:
    """Add up the unchanged model's predictions."""
    tallies = Tallies.empty(experiment.sample, 0)
    for _ in measure_windows(reference, [], list(enumerate(experiment.sample.windows)), tallies):
        pass
    experiment.places, experiment.base.tally = tallies.places, tallies.base


def measure_variant(
    experiment: Experiment, reference: StoredReader, variant: Variant, number: int, own: Tally, bootstrap: Bootstrap
) -> Outcome:
    """What the change does. Raises ValueError when it gives no numbers, or has changed the reference as well."""
    with variant.applied() as changed:
        subject = replace(changed, name=variant.name)
        found = experiment.admit(subject)
        with at_rest(subject.model):
            experiment.predict_one(reference, subject, number)
    check_reference(experiment, own)
    if found.pair is None:
        raise ValueError(experiment.failures[-1].message)
    assert experiment.places is not None
    other = describe_other(experiment.base, found, experiment.places, experiment.plan, bootstrap, in_turns=False)
    difference, signal = other.difference, other.model.signal
    zero, near_zero = sparsity(found.signal, bootstrap)
    return Outcome(
        perplexity=other.model.perplexity,
        perplexity_ratio=difference.perplexity_ratio,
        kl=difference.kl,
        kl_sums=found.pair.kl.tolist(),
        logit_cosine=difference.logit_cosine,
        top1_agreement=difference.top1_agreement,
        zero=zero,
        near_zero=near_zero,
        activations=signal.activations if signal else [],
    )


def check_reference(experiment: Experiment, own: Tally) -> None:
    """Raise ValueError unless the unchanged model still predicts what it did: its output head is the model's own."""
    now = experiment.base.tally
    assert now is not None
    kept = np.isclose(
        now.negative_log_likelihood, own.negative_log_likelihood, rtol=REFERENCE_DRIFT, atol=0, equal_nan=True
    )
    if not kept.all():
        raise ValueError(
            "the change writes into the weights of the output head, with which the unchanged model is read as well; "
            "change a copy of the model"
        )


def base_point(experiment: Experiment, bootstrap: Bootstrap, *, seconds: float) -> Point:
    """The unchanged model, by definition without a difference."""
    assert experiment.places is not None
    model = describe_model(experiment.base, experiment.places, experiment.plan, bootstrap)
    several = experiment.units >= LEAST_UNITS
    none, one = (Estimate(value=x, low=x, high=x) if several else Estimate(value=x) for x in (0.0, 1.0))
    zero, near_zero = sparsity(experiment.base.signal, bootstrap)
    outcome = Outcome(
        perplexity=model.perplexity,
        perplexity_ratio=one,
        kl=none,
        kl_sums=[0.0] * experiment.units,
        logit_cosine=one,
        top1_agreement=one,
        zero=zero,
        near_zero=near_zero,
        activations=model.signal.activations if model.signal else [],
    )
    return Point(key=BASE, name=experiment.base.profile.name, settings={}, outcome=outcome, seconds=seconds)


def sparsity(signal: SignalTally | None, bootstrap: Bootstrap) -> tuple[Estimate | None, Estimate | None]:
    """Shares of exact zeros and of near zeros among the MLP activations of all layers that were read."""
    if signal is None or not signal.active:
        return None, None
    totals = {name: [part.sum(1) for part in signal.shares(name)] for name in ("zeros", "near_zeros")}
    zero, near_zero = (bootstrap.estimate(sums, counts) for sums, counts in totals.values())
    return zero, near_zero


# ------------------------------------------------------------------------------------------ what points say together


def frontier(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each pair is on the Pareto frontier: no other pair is at most as large in both and smaller in one."""
    return [not any(other != cost and other[0] <= cost[0] and other[1] <= cost[1] for other in costs) for cost in costs]


def on_frontier(points: Sequence[Point]) -> dict[str, list[str]]:
    """Key -> the frontiers that a point is on: `perplexity` (least KL and least perplexity ratio) and `sparsity` (least
    KL and most near zeros). The unchanged model is on none: it would dominate every change."""
    found: dict[str, list[str]] = {point.key: [] for point in points}
    costs: dict[str, Callable[[Outcome], float | None]] = {
        "perplexity": lambda outcome: outcome.perplexity_ratio.value,
        "sparsity": lambda outcome: -outcome.near_zero.value if outcome.near_zero else None,
    }
    for name, cost in costs.items():
        known = {
            point.key: (point.outcome.kl.value, second)
            for point in points
            if point.key != BASE and point.outcome and (second := cost(point.outcome)) is not None
        }
        known = {key: pair for key, pair in known.items() if not np.isnan(pair).any()}
        for key, best in zip(known, frontier(list(known.values())), strict=True):
            found[key] += [name] if best else []
    return found


def rank_layers(points: Sequence[Point], predictions: Sequence[int], *, plan: Plan) -> list[RankedLayer]:
    """Layers by the KL of changing each alone, the most sensitive first, each with the ranks that are within noise.

    Two layers are told apart when the 95 % interval of their difference in KL, on the same draws of units, leaves out
    0. A layer's best rank counts those that are told apart above it, its worst those below.
    `points`: with `layer` in their settings; `predictions` [units].
    """
    known = [(int(point.settings["layer"]), point.outcome) for point in points if point.outcome]
    known.sort(key=lambda entry: (-entry[1].kl.value, entry[0]))
    sums = np.array([outcome.kl_sums for _, outcome in known]).T
    ranked = [
        RankedLayer(layer=layer, rank=rank, first=None, last=None, kl=outcome.kl)
        for rank, (layer, outcome) in enumerate(known, 1)
    ]
    if len(predictions) < LEAST_UNITS or not known or not np.isfinite(sums).all():
        return ranked
    draws = Bootstrap(len(predictions), resamples=plan.resamples, seed=plan.seed).means(sums, np.array(predictions))
    result = []
    for index, layer in enumerate(ranked):
        low, high = np.percentile(draws - draws[:, index : index + 1], [2.5, 97.5], axis=0)
        first, last = 1 + int((low > 0).sum()), len(ranked) - int((high < 0).sum())
        result.append(layer.model_copy(update={"first": first, "last": last}))
    return result
