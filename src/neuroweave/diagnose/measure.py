"""One pass over windows of text for a base model and others: the same tokens for all, the base run once per window.

Nothing is kept per token. What a window yields goes into sums per unit of text, per position and per histogram bin, so
memory does not grow with the length of the text; and the vocabulary is worked off in chunks of positions, so that
float64 copies stay small however many entries it has. Only one window's logits of two models are held at a time.

Dimensions: units (passages of text), positions (of a window), states (hidden states: input of the first layer, then
after each layer), bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuroweave.diagnose import metrics
from neuroweave.diagnose.passages import Sample, Window
from neuroweave.diagnose.subject import Subject

CHUNK_ELEMENTS = 1 << 19  # of a float64 chunk of logits: 4 MiB, which a cache holds; twice as fast as 32 MiB on a CPU
ACCELERATOR_CHUNK_ELEMENTS = 1 << 24  # 128 MiB: few, large kernels
CONFIDENCE_BINS = 20
KL_EDGES = 10.0 ** (np.arange(-24, 9) / 4)  # nats per token, four bins to a factor of ten, 1e-6 to 100


@dataclass(eq=False)
class Tally:
    """Sums over one model's predictions."""

    negative_log_likelihood: np.ndarray  # [units]
    confidence: np.ndarray  # [units]
    confidence_counts: np.ndarray  # [bins]

    @classmethod
    def empty(cls, units: int) -> Tally:
        return cls(np.zeros(units), np.zeros(units), np.zeros(CONFIDENCE_BINS, dtype=np.int64))

    def add(self, unit: int, log_p: Tensor, targets: Tensor) -> None:
        """Count the predictions `log_p` [tokens, vocabulary] of `targets` [tokens]."""
        self.negative_log_likelihood[unit] += metrics.negative_log_likelihood(log_p, targets).sum().item()
        confidence = metrics.top1_confidence(log_p)
        self.confidence[unit] += confidence.sum().item()
        bins = (confidence * CONFIDENCE_BINS).long().clamp_max(CONFIDENCE_BINS - 1)
        self.confidence_counts += torch.bincount(bins, minlength=CONFIDENCE_BINS).cpu().numpy()


@dataclass(eq=False)
class PairTally:
    """Sums over the predictions of a base and another model at the same places."""

    kl: np.ndarray  # [units]
    logit_cosine: np.ndarray  # [units]
    agreement: np.ndarray  # [units]
    hidden_cosine: np.ndarray  # [units, states]; no states where the two models have other shapes
    kl_counts: np.ndarray  # [bins + 2], the first below the edges, the last above
    kl_at: np.ndarray  # [positions]

    @classmethod
    def empty(cls, units: int, positions: int) -> PairTally:
        return cls(
            kl=np.zeros(units),
            logit_cosine=np.zeros(units),
            agreement=np.zeros(units),
            hidden_cosine=np.zeros((units, 0)),
            kl_counts=np.zeros(len(KL_EDGES) + 1, dtype=np.int64),
            kl_at=np.zeros(positions),
        )

    def add_predictions(
        self, unit: int, first: int, base_logits: Tensor, logits: Tensor, base_log_p: Tensor, log_p: Tensor
    ) -> None:
        """Count predictions from position `first` on; all tensors are [tokens, vocabulary]."""
        kl = metrics.kl_divergence(base_log_p, log_p).cpu().numpy().astype(np.float64)
        self.kl[unit] += kl.sum()
        self.kl_at[first : first + len(kl)] += kl
        self.kl_counts += np.bincount(np.searchsorted(KL_EDGES, kl, side="right"), minlength=len(self.kl_counts))
        cosine = metrics.cosine_similarity(without_ruled_out(base_logits), without_ruled_out(logits))
        self.logit_cosine[unit] += cosine.sum().item()
        self.agreement[unit] += metrics.top1_agreement(base_logits, logits).sum().item()

    def add_states(self, unit: int, base_states: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Count hidden states, each [tokens, width]; models of other shapes are passed over."""
        if [state.shape for state in base_states] != [state.shape for state in states]:
            return
        if self.hidden_cosine.shape[1] == 0:
            self.hidden_cosine = np.zeros((len(self.hidden_cosine), len(states)))
        for depth, (a, b) in enumerate(zip(base_states, states, strict=True)):
            self.hidden_cosine[unit, depth] += metrics.cosine_similarity(a, b.to(a.device)).sum().item()


@dataclass(eq=False)
class Tallies:
    """All sums of one pass. `others` and `pairs` are in the order of the models."""

    counts: np.ndarray  # [units] predictions
    counts_at: np.ndarray  # [positions] predictions
    base: Tally
    others: list[Tally]
    pairs: list[PairTally]


def measure_windows(
    base: Subject, others: Sequence[Subject], sample: Sample, *, after_window: Callable[[], object] = lambda: None
) -> Tallies:
    """Run every window through the base and all others, KV cache off, and sum up what the metrics say.

    To be called with the models at rest (`subject.at_rest`). `after_window` is called after each window.
    Raises ValueError when logits are not finite or the models predict over vocabularies of different sizes.
    """
    units = len(sample.passages)
    positions = max(window.predictions for window in sample.windows)
    tallies = Tallies(
        counts=np.zeros(units, dtype=np.int64),
        counts_at=np.zeros(positions, dtype=np.int64),
        base=Tally.empty(units),
        others=[Tally.empty(units) for _ in others],
        pairs=[PairTally.empty(units, positions) for _ in others],
    )
    for number, window in enumerate(sample.windows):
        tallies.counts[window.unit] += window.predictions
        tallies.counts_at[: window.predictions] += 1
        measure_window(base, others, window, number, tallies)
        after_window()
    return tallies


def measure_window(base: Subject, others: Sequence[Subject], window: Window, number: int, tallies: Tallies) -> None:
    """Add one window, the `number`-th (for messages), to the sums."""
    targets = torch.tensor(window.token_ids[1:], device=base.device)
    base_logits, base_states = forward(base, window, number)
    elements = CHUNK_ELEMENTS if base_logits.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    rows = max(1, elements // base_logits.shape[-1])
    for first in range(0, len(targets), rows):
        chunk = slice(first, first + rows)
        tallies.base.add(window.unit, metrics.log_probabilities(base_logits[chunk]), targets[chunk])
    for other, tally, pair in zip(others, tallies.others, tallies.pairs, strict=True):
        logits, states = forward(other, window, number)
        if logits.shape != base_logits.shape:
            raise ValueError(
                f"{other.name} predicts over {logits.shape[-1]} entries and {base.name} over {base_logits.shape[-1]}, "
                "although their tokenizers are equal (a padded or resized vocabulary?); give them the same size"
            )
        for first in range(0, len(targets), rows):
            chunk = slice(first, first + rows)
            ours, theirs = base_logits[chunk], logits[chunk].to(base_logits.device)
            base_log_p, log_p = metrics.log_probabilities(ours), metrics.log_probabilities(theirs)
            tally.add(window.unit, log_p, targets[chunk])
            pair.add_predictions(window.unit, first, ours, theirs, base_log_p, log_p)
        pair.add_states(window.unit, base_states, states)
        del logits, states


def without_ruled_out(logits: Tensor) -> Tensor:
    """The logits with 0 for minus infinity: a token that is ruled out has no part in the direction of the vector."""
    return logits if torch.isfinite(logits.sum(dtype=torch.float32)) else logits.nan_to_num(neginf=0.0)


def forward(subject: Subject, window: Window, number: int) -> tuple[Tensor, list[Tensor]]:
    """Logits [predictions, vocabulary] and hidden states, each [predictions, width], of one window.

    The last position predicts nothing that is in the window, so it is left out everywhere. The states are an empty
    list for a model that does not give them. Raises ValueError when logits are not finite.
    """
    ids = torch.tensor([window.token_ids], device=subject.device)
    out = subject.model(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True)
    logits = out.logits[0, :-1]
    states = [state[0, :-1] for state in (getattr(out, "hidden_states", None) or ())]
    # A sum meets every NaN without a copy of the logits; minus infinity (a token ruled out) is no fault.
    if not torch.isfinite(logits.sum(dtype=torch.float32)):
        refuse_broken_logits(subject, logits, states, number)
    return logits, states


def refuse_broken_logits(subject: Subject, logits: Tensor, states: Sequence[Tensor], number: int) -> None:
    """Raise ValueError if a logit is NaN or plus infinity, saying where, and which layer began it."""
    broken = (torch.isnan(logits) | (logits == torch.inf)).any(-1)
    broken |= (logits == -torch.inf).all(-1)
    if not broken.any():
        return
    position = int(broken.nonzero()[0])
    message = f"{subject.name} gives logits that are not numbers (window {number}, position {position} of it)"
    for depth, state in enumerate(states):
        if not torch.isfinite(state).all():
            where = "the input of layer 0" if depth == 0 else f"the output of layer {depth - 1}"
            raise ValueError(f"{message}; the first hidden state that is not finite is {where}")
    blame = "the hidden states are finite, so it is the output projection" if states else "try dtype float32"
    raise ValueError(f"{message}; {blame}")
