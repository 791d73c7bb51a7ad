"""Which neurons of which layers to take: scores from what was measured, and how many each layer gives.

Legend: m neurons of a layer, K chosen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, Int

from neuroweave.surgery.neurons.neuron_statistics import LayerStatistics

FEWEST = 8  # tokens that a selective neuron fires on


def by_contribution(of: LayerStatistics, down_norms: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
    """mean |h| * ||down||: the mean length of what a neuron adds to the residual stream."""
    return of.mean_absolute * down_norms


def by_selectivity(of: LayerStatistics, down_norms: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
    """Kurtosis of h, high for a neuron that is silent but for few tokens, of those that pass two conditions.

    It is among the half of its layer that contributes most: without that the winners hardly do anything, ever. And its
    kurtosis is at most 1 / `FEWEST` of the number of positions, which it would be if so many tokens had equal shares in
    the fourth moment: what one or two tokens do cannot be told from chance. The others follow, by contribution.
    """
    contribution, kurtosis = by_contribution(of, down_norms), of.activation.kurtosis
    passed = (contribution >= np.median(contribution)) & (kurtosis * FEWEST <= of.activation.count)
    return np.where(passed, kurtosis, contribution - contribution.max() - 1)


SELECTIONS: dict[str, Callable[[LayerStatistics, np.ndarray], np.ndarray]] = {
    "contribution": by_contribution,
    "selectivity": by_selectivity,
}


def shares(count: int, scores: Sequence[np.ndarray]) -> list[int]:
    """How many neurons each layer gives: equal within one, but no more than it has; the odd ones spread over depth."""
    given = [0] * len(scores)
    while count:
        open_layers = [at for at, score in enumerate(scores) if given[at] < len(score)]
        each, rest = divmod(count, len(open_layers))
        if each:
            for at in open_layers:
                more = min(each, len(scores[at]) - given[at])
                given[at] += more
                count -= more
        else:
            for turn in range(rest):
                given[open_layers[(2 * turn + 1) * len(open_layers) // (2 * rest)]] += 1
            count = 0
    return given


def best(score: Float64[np.ndarray, " m"], count: int) -> Int[np.ndarray, " K"]:
    """The indices of the `count` highest scores, in ascending order; of equal ones the lower index."""
    return np.sort(np.argsort(-score, kind="stable")[:count])
