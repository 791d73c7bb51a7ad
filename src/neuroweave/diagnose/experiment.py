"""The whole comparison: one base, one or more others, the same text, the same prompts, the same clock."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import nn

from neuroweave.diagnose.assembly import Findings, describe_limits, describe_model, describe_other, describe_text
from neuroweave.diagnose.bootstrap import LEAST_UNITS, Bootstrap
from neuroweave.diagnose.environment import describe_environment
from neuroweave.diagnose.ledger import Ledger
from neuroweave.diagnose.probes.generation import Written, check_prompts, join_written, write_all
from neuroweave.diagnose.probes.gradient import GradientTally, measure_gradients
from neuroweave.diagnose.probes.prediction import LiveReader, Reader, Tallies, measure_windows
from neuroweave.diagnose.probes.signal import SignalTally
from neuroweave.diagnose.probes.speed import measure_speed
from neuroweave.diagnose.probes.stored import StoredReader, store
from neuroweave.diagnose.probes.tallies import Places
from neuroweave.diagnose.probes.tasks import TaskRun, run_tasks
from neuroweave.diagnose.probes.weights import compare_weights, is_checkpoint
from neuroweave.diagnose.results.comparison import Comparison, Failure, Speed
from neuroweave.diagnose.results.plan import Plan
from neuroweave.diagnose.results.weights import Weights
from neuroweave.diagnose.subject import Profile, Subject, at_rest, check_comparable, check_vocabulary
from neuroweave.progress import follow, progress
from neuroweave.text.sample import Sample, draw_sample
from neuroweave.text.tokens import NamedText

KEEP_SECONDS = 15.0  # between two notes of how far the pass over the text is
MISTAKES = (ValueError, RuntimeError, MemoryError, NotImplementedError)  # of a model, not of this program


def compare(
    base: Subject,
    others: Iterable[Subject],
    documents: Iterable[NamedText],
    *,
    plan: Plan | None = None,
    ledger: Ledger | None = None,
) -> Comparison:
    """Measure `others` against `base`, all in memory, on the same tokens of `documents`; the models stay as they were.

    What one model cannot do (logits that are not numbers, no gradients) is entered in `failures`; the rest stands.
    `ledger`: takes up what an interrupted run of the same comparison has measured.
    Raises ValueError on models that cannot be compared, text that cannot be measured, and a base whose logits are not
    numbers.
    """
    subjects = [base, *others]
    if len(subjects) == 1:
        raise ValueError("there is nothing to compare with the base; name at least one other model")
    plan, ledger = plan or Plan(), ledger or Ledger()
    experiment = Experiment(base, documents, plan, ledger)
    for other in subjects[1:]:
        experiment.admit(other)
    with told_to_go_on(ledger):
        with ExitStack() as stack:
            for subject in subjects:
                stack.enter_context(at_rest(subject.model))
            experiment.predict_all(subjects)
            experiment.write_and_time(subjects)
        for subject in subjects:
            experiment.measure_alone(subject)
        for other in subjects[1:]:
            experiment.weigh(base, other)
        return experiment.result(in_turns=True)


def compare_one_by_one(
    loaders: Sequence[Callable[[], Subject]],
    documents: Iterable[NamedText],
    *,
    plan: Plan | None = None,
    ledger: Ledger,
) -> Comparison:
    """`compare` for models that do not fit in memory together: each is loaded, measured and let go, the base first.

    Every number is the same but speeds, which come from different times. The base's hidden states are kept in the
    ledger's folder meanwhile. Weights are compared where all models came from folders.
    """
    if len(loaders) < 2:
        raise ValueError("there is nothing to compare with the base; name at least one other model")
    plan = plan or Plan()
    with told_to_go_on(ledger):
        return _one_by_one(loaders, documents, plan, ledger)


def _one_by_one(
    loaders: Sequence[Callable[[], Subject]], documents: Iterable[NamedText], plan: Plan, ledger: Ledger
) -> Comparison:
    experiment: Experiment | None = None
    reference: StoredReader | None = None
    for number, load in enumerate(loaders):
        subject = load()
        if experiment is None:
            experiment = Experiment(subject, documents, plan, ledger)
        else:
            experiment.admit(subject)
        with at_rest(subject.model):
            if reference is None:
                reference = experiment.store(subject)
                reference.release()
            else:
                experiment.predict_one(reference, subject, number)
            experiment.write_and_time([subject])
        experiment.measure_alone(subject)
        del subject
        gc.collect()
    assert experiment is not None
    experiment.weigh_files()
    return experiment.result(in_turns=False)


class Experiment:
    """One comparison under way: what is known of each model, in the order in which they came."""

    def __init__(self, base: Subject, documents: Iterable[NamedText], plan: Plan, ledger: Ledger) -> None:
        check_prompts(plan.prompts)
        self.plan, self.ledger = plan, ledger
        self.sample: Sample = draw_sample(
            documents, base.tokenizer, tokens=plan.tokens, window=plan.window, passage=plan.passage
        )
        self.units = len(self.sample.passages)
        self.places: Places | None = None
        self.found: dict[str, Findings] = {}
        self.failures: list[Failure] = []
        self.base = self.admit(base)

    def admit(self, subject: Subject) -> Findings:
        """Enter a model. Raises ValueError when it cannot be compared with the base."""
        profile = Profile.of(subject)
        if profile.name in self.found:
            raise ValueError(f"two models are called {profile.name!r}; give each its own name")
        first = next(iter(self.found.values())).profile if self.found else profile
        check_comparable(first, profile, self.sample, self.plan.window)
        self.found[profile.name] = Findings(profile)
        return self.found[profile.name]

    def attempt(self, name: str, part: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, or None with the failure noted."""
        try:
            return measure()
        except MISTAKES as error:
            self.failures.append(Failure(model=name, part=part, message=str(error) or type(error).__name__))
            return None

    # Predictions and signal: one pass over the text

    def reader(self, subject: Subject) -> LiveReader:
        if self.plan.signal:
            self.found[subject.name].signal = SignalTally(subject.model, units=self.units)
        return LiveReader(subject, self.sample, self.found[subject.name].signal)

    def predict_all(self, subjects: Sequence[Subject]) -> None:
        readers = [self.reader(subject) for subject in subjects]
        signals = [self.found[subject.name].signal for subject in subjects]
        self._pass(readers[0], readers[1:], signals)

    def store(self, base: Subject) -> StoredReader:
        """Run the base over the text and keep what it gives on the disk."""
        folder = self.ledger.scratch("base")
        with progress(f"reading {base.name}", total=len(self.sample.windows), unit="window") as bar:
            return store(self.reader(base), self.sample, folder, after_window=bar.update)

    def predict_one(self, reference: Reader, subject: Subject, number: int) -> None:
        self._pass(reference, [self.reader(subject)], [self.found[subject.name].signal])

    def _pass(self, base: Reader, others: Sequence[Reader], signals: Sequence[SignalTally | None]) -> None:
        for other in others:
            check_vocabulary((base.name, base.vocabulary), (other.name, other.vocabulary))
        name = json.dumps(["prediction", base.name, *(other.name for other in others)])
        tallies = Tallies.empty(self.sample, len(others))
        done = restore_pass(self.ledger.arrays(name), tallies, signals)
        left = list(enumerate(self.sample.windows))[done:]
        kept = time.monotonic()
        with progress("measuring", total=len(self.sample.windows), unit="window", done=done) as bar:
            for number in measure_windows(base, others, left, tallies):
                bar.update()
                if time.monotonic() - kept > KEEP_SECONDS or number == len(self.sample.windows) - 1:
                    self.ledger.keep_arrays(name, pass_arrays(number + 1, tallies, signals))
                    kept = time.monotonic()
        self.places, self.base.tally = tallies.places, tallies.base
        for index, other in enumerate(others):
            if index in tallies.broken:
                self.failures.append(Failure(model=other.name, part="prediction", message=tallies.broken[index]))
            else:
                self.found[other.name].tally, self.found[other.name].pair = tallies.others[index], tallies.pairs[index]

    # The rest, model by model

    def write_and_time(self, subjects: Sequence[Subject]) -> None:
        """Continuations and speed; to be called with the models at rest."""
        able = [subject for subject in subjects if not self.is_broken(subject.name)]
        modes = 2 if self.plan.sampling else 1
        with progress("writing", total=len(able) * len(self.plan.prompts) * modes, unit="text") as bar:
            for subject in able:
                self.found[subject.name].written = self._written(subject, bar.update)
        if self.plan.speed is None:
            return
        name = json.dumps(["speed", *(subject.name for subject in able)])
        speeds = self.ledger.record(name)
        if speeds is None:
            plan, prompt = self.plan.speed, max(self.sample.windows, key=lambda window: window.predictions).token_ids
            with progress("timing", total=len(able) * (plan.warmups + plan.repeats), unit="run") as bar:
                measured = self.attempt(
                    able[0].name, "speed", lambda: measure_speed(able, prompt, plan, after_run=bar.update)
                )
            speeds = [speed.model_dump() for speed in measured or []]
            self.ledger.keep_record(name, speeds)
        for subject, speed in zip(able, speeds, strict=False):
            self.found[subject.name].speed = Speed.model_validate(speed)

    def _written(self, subject: Subject, after_prompt: Callable[[], object]) -> list[Written]:
        name = json.dumps(["written", subject.name])
        kept = self.ledger.record(name)
        if kept is not None:
            return [Written.model_validate(each) for each in kept]
        written = self.attempt(
            subject.name, "generation", lambda: write_all(subject, self.plan, after_prompt=after_prompt)
        )
        if written is not None:
            self.ledger.keep_record(name, [each.model_dump() for each in written])
        return written or []

    def measure_alone(self, subject: Subject) -> None:
        """Gradients and benchmarks."""
        if self.is_broken(subject.name):
            return
        if self.plan.gradient is not None:
            self.found[subject.name].gradient = self.attempt(subject.name, "gradient", lambda: self._gradient(subject))
        if self.plan.tasks is not None:
            runs = self.attempt(subject.name, "tasks", lambda: self._tasks(subject))
            self.found[subject.name].tasks = runs or []

    def _gradient(self, subject: Subject) -> GradientTally:
        assert self.plan.gradient is not None
        name = json.dumps(["gradient", subject.name])
        kept = self.ledger.arrays(name)
        if kept is not None:
            return GradientTally.from_arrays(kept)
        plan = self.plan.gradient
        windows = min(plan.windows, len(self.sample.windows))
        with at_rest(subject.model):
            head = LiveReader(subject, self.sample).head
        with progress(f"gradients of {subject.name}", total=windows, unit="window") as bar:
            tally = measure_gradients(subject, self.sample.windows, plan, head=head, after_window=bar.update)
        self.ledger.keep_arrays(name, tally.arrays())
        return tally

    def _tasks(self, subject: Subject) -> list[TaskRun]:
        assert self.plan.tasks is not None
        name = json.dumps(["tasks", subject.name])
        kept = self.ledger.record(name)
        if kept is not None:
            return [TaskRun.model_validate(run) for run in kept]
        with progress(f"benchmarks of {subject.name}", unit="answer") as bar:
            runs = run_tasks(subject, self.plan.tasks, seed=self.plan.seed, progress=follow(bar))
        self.ledger.keep_record(name, [run.model_dump() for run in runs])
        return runs

    def weigh(self, base: Subject, other: Subject) -> None:
        if not self.plan.weights:
            return
        name = json.dumps(["weights", base.name, other.name])
        kept = self.ledger.record(name)
        if kept is not None:
            self.found[other.name].weights = Weights.model_validate(kept)
            return
        with progress(f"weights of {other.name}", unit="tensor") as bar:
            weights = self.attempt(other.name, "weights", lambda: compare_weights(base, other, after_tensor=bar.update))
        if weights is not None:
            self.ledger.keep_record(name, weights.model_dump())
        self.found[other.name].weights = weights

    def is_broken(self, name: str) -> bool:
        """Whether the model's predictions were not numbers, so that nothing else of it is worth measuring."""
        return any(failure.model == name and failure.part == "prediction" for failure in self.failures)

    def written_by_all(self, models: Sequence[Findings]) -> list[list[Written]]:
        """The continuations of the models that wrote any; none at all without the base's to compare with."""
        return [found.written for found in models if found.written] if self.base.written else []

    def unread(self) -> list[str]:
        """What of a model's layers could not be read."""
        return [f"{name}: {note}" for name, found in self.found.items() if found.signal for note in found.signal.notes]

    def weigh_files(self) -> None:
        """Compare weights where every model came from a folder."""
        for found in [found for found in self.found.values() if found is not self.base and found.pair]:
            if self.plan.weights and all(is_checkpoint(each.profile.source) for each in (self.base, found)):
                self.weigh(*(without_model(each.profile) for each in (self.base, found)))

    def result(self, *, in_turns: bool) -> Comparison:
        plan, base = self.plan, self.base
        assert self.places is not None
        bootstrap = Bootstrap(self.units, resamples=plan.resamples, seed=plan.seed, least=LEAST_UNITS)
        measured = [found for found in self.found.values() if found.pair is not None]
        others = [describe_other(base, other, self.places, plan, bootstrap, in_turns=in_turns) for other in measured]
        return Comparison(
            plan=plan,
            text=describe_text(self.sample, plan),
            base=describe_model(base, self.places, plan, bootstrap),
            others=others,
            generated=join_written(self.written_by_all([base, *measured]), base.profile.tokenizer),
            environment=describe_environment(),
            failures=self.failures,
            notes=[*describe_limits(self.sample, plan, others, in_turns=in_turns), *self.unread()],
        )  # fmt: skip


def without_model(profile: Profile) -> Subject:
    """A subject whose model was let go: enough where its files are read."""
    return Subject(profile.name, nn.Module(), profile.tokenizer, profile.source)


@contextmanager
def told_to_go_on(ledger: Ledger) -> Iterator[None]:
    """Ctrl-C within carries a word about what is kept, for whoever reports it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not ledger.holds_any:
            raise
        raise KeyboardInterrupt("what was measured is kept, the same command goes on with it") from stop


def pass_arrays(done: int, tallies: Tallies, signals: Sequence[SignalTally | None]) -> dict[str, np.ndarray]:
    """Everything that a pass over the text has counted, `done` windows of it."""
    arrays = {"done": np.array(done), "broken": np.array(json.dumps(tallies.broken))}
    for label, part in labelled(tallies, signals):
        arrays |= {f"{label}.{name}": array for name, array in part.arrays().items()}
    return arrays


def restore_pass(arrays: dict[str, np.ndarray] | None, tallies: Tallies, signals: Sequence[SignalTally | None]) -> int:
    """Put back what `pass_arrays` gave; returns how many windows that was."""
    if arrays is None:
        return 0
    for label, part in labelled(tallies, signals):
        own = {name.removeprefix(f"{label}."): array for name, array in arrays.items() if name.startswith(f"{label}.")}
        part.restore(own)
    tallies.broken = {int(index): text for index, text in json.loads(str(arrays["broken"])).items()}
    return int(arrays["done"])


def labelled(tallies: Tallies, signals: Sequence[SignalTally | None]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [("places", tallies.places), ("base", tallies.base)]
    found += [(f"other{index}", part) for index, part in enumerate(tallies.others)]
    found += [(f"pair{index}", part) for index, part in enumerate(tallies.pairs)]
    return found + [(f"signal{index}", part) for index, part in enumerate(signals) if part is not None]
