"""One pass over windows of text for a base model and others: the same tokens for all, every model run once a window.

Nothing is kept per token, so memory does not grow with the length of the text. Logits are computed a few positions at
a time where a model's head can be told (`head.py`), and worked off in chunks so small that their float64 copies stay in
a cache. A model that gives no numbers is dropped from there on; the rest of the pass goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from neuroweave.diagnose.probes import metrics
from neuroweave.diagnose.probes.head import find_head, head_rows
from neuroweave.diagnose.probes.signal import SignalTally
from neuroweave.diagnose.probes.tallies import PairTally, Places, Tally
from neuroweave.diagnose.subject import Subject
from neuroweave.text.sample import Sample, Window

CHUNK_ELEMENTS = 1 << 19  # of a float64 chunk of logits: 4 MiB, which a cache holds; twice as fast as 32 MiB on a CPU
ACCELERATOR_CHUNK_ELEMENTS = 1 << 24  # 128 MiB: few, large kernels


@dataclass(eq=False)
class Seen:
    """What a model makes of one window: hidden states, each [predictions, width], and logits by rows. The last
    position predicts nothing that is in the window, so it is left out everywhere."""

    states: list[Tensor]
    logits: Callable[[slice], Tensor]


@runtime_checkable
class Reader(Protocol):
    """A model as the pass uses it: in memory, or as what an earlier pass stored of it."""

    name: str
    vocabulary: int

    def read(self, window: Window, number: int) -> Seen:
        """What the model makes of the `number`-th window."""


class LiveReader:
    """A model in memory. To be used with the model at rest."""

    def __init__(self, subject: Subject, sample: Sample, signal: SignalTally | None = None) -> None:
        self.subject, self.name, self.signal = subject, subject.name, signal
        longest = max(sample.windows, key=lambda window: window.predictions)
        out = self._run(longest.token_ids[:4])
        self.vocabulary = int(out.logits.shape[-1])
        self.head = find_head(subject.model, out)

    def _run(self, token_ids: Sequence[int], **settings: Any) -> Any:
        ids = torch.tensor([list(token_ids)], device=self.subject.device)
        return self.subject.model(
            input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True, **settings
        )

    def read(self, window: Window, number: int) -> Seen:
        with self.signal.attached() if self.signal else nullcontext():
            out = self._run(window.token_ids, **({"logits_to_keep": 1} if self.head else {}))
        if self.signal:
            self.signal.add(window.unit)
        states = [state[0, :-1] for state in (getattr(out, "hidden_states", None) or ())]
        if self.head is None:
            logits = out.logits[0, :-1]
            return Seen(states, lambda rows: logits[rows])
        head, last = self.head, states[-1]
        return Seen(states, lambda rows: head(last[rows]))


@dataclass(eq=False)
class Tallies:
    """All sums of one pass. `others` and `pairs` are in the order of the readers; `broken` says which of them gave no
    numbers, and how."""

    places: Places
    base: Tally
    others: list[Tally]
    pairs: list[PairTally]
    broken: dict[int, str]

    @classmethod
    def empty(cls, sample: Sample, others: int) -> Tallies:
        units = len(sample.passages)
        positions = max(window.predictions for window in sample.windows)
        return cls(
            places=Places.empty(units, positions),
            base=Tally.empty(units),
            others=[Tally.empty(units) for _ in range(others)],
            pairs=[PairTally.empty(units, positions) for _ in range(others)],
            broken={},
        )


def measure_windows(
    base: Reader, others: Sequence[Reader], windows: Sequence[tuple[int, Window]], tallies: Tallies
) -> Iterator[int]:
    """Run (number, window) after window through the base and all others, KV cache off, and add to the sums; gives each
    window's number when it is done. To be called with the models at rest (`subject.at_rest`).

    Raises ValueError when the base's logits are not finite; another model's are noted in `tallies.broken`.
    """
    for number, window in windows:
        measure_window(base, others, window, number, tallies)
        tallies.places.add(window.unit, window.predictions)
        yield number


def measure_window(base: Reader, others: Sequence[Reader], window: Window, number: int, tallies: Tallies) -> None:
    """Add one window, the `number`-th, to the sums."""
    unit, targets = window.unit, torch.tensor(window.token_ids[1:])
    ours = base.read(window, number)
    theirs: dict[int, Seen] = {}
    for index, other in enumerate(others):
        if index not in tallies.broken:
            seen = other.read(window, number)
            tallies.pairs[index].add_states(unit, ours.states, seen.states)
            theirs[index] = seen
    step = head_rows(base.vocabulary)
    for first in range(0, window.predictions, step):
        rows = slice(first, first + step)
        base_logits = ours.logits(rows)
        check_logits(base.name, base_logits, ours, number, first)
        logits: dict[int, Tensor] = {}
        for index, seen in list(theirs.items()):
            try:
                found = seen.logits(rows)
                check_logits(others[index].name, found, seen, number, first)
                logits[index] = found.to(base_logits.device)
            except ValueError as error:
                tallies.broken[index] = str(error)
                del theirs[index]
        count_rows(base_logits, logits, targets[rows].to(base_logits.device), unit, first, tallies)


def count_rows(
    base_logits: Tensor, logits: dict[int, Tensor], targets: Tensor, unit: int, first: int, tallies: Tallies
) -> None:
    """Add predictions from position `first` on; `logits`: of the other models, by number."""
    elements = CHUNK_ELEMENTS if base_logits.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    step = max(1, elements // base_logits.shape[-1])
    for start in range(0, len(targets), step):
        chunk = slice(start, start + step)
        base_log_p = metrics.log_probabilities(base_logits[chunk])
        base_p = base_log_p.exp()
        tallies.base.add(unit, base_p, base_log_p, targets[chunk])
        for index, theirs in logits.items():
            log_p = metrics.log_probabilities(theirs[chunk])
            p = log_p.exp()
            tallies.others[index].add(unit, p, log_p, targets[chunk])
            tallies.pairs[index].add_predictions(
                unit, first + start, (base_logits[chunk], theirs[chunk]), (base_p, p), (base_log_p, log_p)
            )


def check_logits(name: str, logits: Tensor, seen: Seen, number: int, first: int) -> None:
    """Raise ValueError if a logit of the window's positions from `first` on is NaN or plus infinity, saying where, and
    which layer began it."""
    # A sum meets every NaN without a copy of the logits; minus infinity (a token ruled out) is no fault.
    if torch.isfinite(logits.sum(dtype=torch.float32)):
        return
    broken = (torch.isnan(logits) | (logits == torch.inf)).any(-1)
    broken |= (logits == -torch.inf).all(-1)
    if not broken.any():
        return
    position = first + int(broken.nonzero()[0])
    message = f"{name} gives logits that are not numbers (window {number}, position {position} of it)"
    for depth, state in enumerate(seen.states):
        if not torch.isfinite(state).all():
            where = "the input of layer 0" if depth == 0 else f"the output of layer {depth - 1}"
            raise ValueError(f"{message}; the first hidden state that is not finite is {where}")
    blame = "the hidden states are finite, so it is the output projection" if seen.states else "try dtype float32"
    raise ValueError(f"{message}; {blame}")
