"""What is kept of the predictions: sums per unit of text, per position and per histogram bin, never anything per token.

Dimensions: units (passages of text), positions (of a window), states (hidden states: input of the first layer, then
after each layer), bins. Every tally is a set of arrays that can be stored and taken up again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroweave.diagnose.probes import metrics

CALIBRATION_BINS = 20
KL_EDGES = 10.0 ** (np.arange(-24, 9) / 4)  # nats per token, four bins to a factor of ten, 1e-6 to 100
ALIGNED_POSITIONS = 256  # of a window, at most: the kernels take the square of their number
FEWEST_ALIGNED = 4


class Arrays:
    """A dataclass of arrays, by name."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Become the tally that `arrays` were taken from."""
        for field in fields(self):  # type: ignore[arg-type]
            setattr(self, field.name, np.array(arrays[field.name]))


@dataclass(eq=False)
class Places(Arrays):
    """How many predictions there were."""

    counts: np.ndarray  # [units]
    counts_at: np.ndarray  # [positions]

    @classmethod
    def empty(cls, units: int, positions: int) -> Places:
        return cls(np.zeros(units, dtype=np.int64), np.zeros(positions, dtype=np.int64))

    def add(self, unit: int, predictions: int) -> None:
        self.counts[unit] += predictions
        self.counts_at[:predictions] += 1


@dataclass(eq=False)
class Tally(Arrays):
    """Sums over one model's predictions. The bins hold predictions by the probability of the top token."""

    negative_log_likelihood: np.ndarray  # [units]
    entropy: np.ndarray  # [units]
    bin_counts: np.ndarray  # [units, bins]
    bin_confidence: np.ndarray  # [units, bins] sum of the probability
    bin_correct: np.ndarray  # [units, bins] predictions whose top token is the one that came

    @classmethod
    def empty(cls, units: int) -> Tally:
        return cls(np.zeros(units), np.zeros(units), *(np.zeros((units, CALIBRATION_BINS)) for _ in range(3)))

    @property
    def confidence(self) -> np.ndarray:
        """[units]"""
        return self.bin_confidence.sum(1)

    @property
    def correct(self) -> np.ndarray:
        """[units]"""
        return self.bin_correct.sum(1)

    def add(self, unit: int, p: Tensor, log_p: Tensor, targets: Tensor) -> None:
        """Count the predictions `p` [tokens, vocabulary] and their logarithms of `targets` [tokens]."""
        self.negative_log_likelihood[unit] += metrics.negative_log_likelihood(log_p, targets).sum().item()
        self.entropy[unit] += metrics.entropy(p, log_p).sum().item()
        top = log_p.argmax(-1)
        confidence = p.gather(-1, top[:, None]).squeeze(-1)
        bins = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
        for sums, values in (
            (self.bin_counts, torch.ones_like(confidence)),
            (self.bin_confidence, confidence),
            (self.bin_correct, (top == targets).to(confidence.dtype)),
        ):
            sums[unit] += torch.bincount(bins, weights=values, minlength=CALIBRATION_BINS).cpu().numpy()


@dataclass(eq=False)
class PairTally(Arrays):
    """Sums over the predictions of a base and another model at the same places."""

    kl: np.ndarray  # [units]
    logit_cosine: np.ndarray  # [units]
    top1: np.ndarray  # [units]
    top5: np.ndarray  # [units]
    confidence_squared: np.ndarray  # [units]
    hidden_cosine: np.ndarray  # [units, states]; no states where the two models have other shapes
    alignment: np.ndarray  # [units, 3, states]: HSIC of base and other, base and base, other and other
    kl_counts: np.ndarray  # [bins + 2], the first below the edges, the last above
    kl_at: np.ndarray  # [positions]

    @classmethod
    def empty(cls, units: int, positions: int) -> PairTally:
        sums: dict[str, Any] = {
            name: np.zeros(units) for name in ("kl", "logit_cosine", "top1", "top5", "confidence_squared")
        }
        return cls(
            **sums,
            hidden_cosine=np.zeros((units, 0)),
            alignment=np.zeros((units, 3, 0)),
            kl_counts=np.zeros(len(KL_EDGES) + 1, dtype=np.int64),
            kl_at=np.zeros(positions),
        )

    def add_predictions(
        self, unit: int, first: int, logits: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor],
        log_p: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """Count predictions from position `first` on; pairs of base and other, each [tokens, vocabulary]."""
        kl = metrics.kl_divergence(*log_p, base_p=p[0]).cpu().numpy().astype(np.float64)
        self.kl[unit] += kl.sum()
        self.kl_at[first : first + len(kl)] += kl
        self.kl_counts += np.bincount(np.searchsorted(KL_EDGES, kl, side="right"), minlength=len(self.kl_counts))
        ours, theirs = (without_ruled_out(each) for each in logits)
        self.logit_cosine[unit] += metrics.cosine_similarity(ours, theirs).sum().item()
        self.top1[unit] += metrics.top1_agreement(*logits).sum().item()
        self.top5[unit] += metrics.top_agreement(*logits).sum().item()
        self.confidence_squared[unit] += (p[0].amax(-1) - p[1].amax(-1)).square().sum().item()

    def add_states(self, unit: int, base_states: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Count hidden states, each [tokens, width]; models of another number of layers are passed over, and cosine
        similarity where widths differ."""
        if len(base_states) != len(states) or not states:
            return
        if self.alignment.shape[2] == 0:
            self.alignment = np.zeros((len(self.alignment), 3, len(states)))
        same = all(a.shape == b.shape for a, b in zip(base_states, states, strict=True))
        if same and self.hidden_cosine.shape[1] == 0:
            self.hidden_cosine = np.zeros((len(self.hidden_cosine), len(states)))
        for depth, (a, b) in enumerate(zip(base_states, states, strict=True)):
            there = b.to(a.device)
            if same:
                self.hidden_cosine[unit, depth] += metrics.cosine_similarity(a, there).sum().item()
            chosen = aligned_positions(len(a))
            if len(chosen) >= FEWEST_ALIGNED:
                self.alignment[unit, :, depth] += metrics.alignment_sums(a[chosen], there[chosen])


def aligned_positions(tokens: int) -> list[int]:
    """Evenly spaced positions of a window, the first left out: its state is often hundreds of times larger (an
    attention sink), and the alignment would describe nothing else."""
    step = max(1, -(-(tokens - 1) // ALIGNED_POSITIONS))
    return list(range(1, tokens, step))


def without_ruled_out(logits: Tensor) -> Tensor:
    """The logits with 0 for minus infinity: a token that is ruled out has no part in the direction of the vector."""
    return logits if torch.isfinite(logits.sum(dtype=torch.float32)) else logits.nan_to_num(neginf=0.0)
