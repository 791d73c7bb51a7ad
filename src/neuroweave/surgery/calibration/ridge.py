"""Ridge least squares for a projection, its sums streamed: argmin_W sum_t w_t |y*_t - W a_t|^2 + l |W - W0|^2.

Letters: T tokens, M inputs of the projection, D outputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_CAUTION = 8


class RidgeSums:
    """Gram matrix [M, M] and cross products [D, M] of what still lacks, in float64; one block of tokens in memory."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram_MM = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross_DM = torch.zeros(outputs, inputs, dtype=torch.float64)
        self.tokens = 0

    def add(
        self, a_TM: Float[Tensor, "T M"], lacking_TD: Float[Tensor, "T D"], weight_T1: Float[Tensor, "T 1"]
    ) -> None:
        """`lacking_TD`: y* - W0 a. Products of a block are float32, their sum over blocks is float64."""
        root = weight_T1.sqrt()
        a_TM, lacking_TD = a_TM * root, lacking_TD * root
        self.gram_MM += a_TM.T @ a_TM
        self.cross_DM += lacking_TD.T @ a_TM
        self.tokens += len(a_TM)

    def correction(self, ridge: float, caution_D: Int[Tensor, " D"] | None = None) -> Float[Tensor, "D M"]:
        """W - W0 in float64; `ridge`: l relative to the Gram matrix's mean diagonal. Uses up the Gram matrix.

        `caution_D`: l is 4 to this power times as large for an output's row; beyond `MOST_CAUTION` it stays as it is.
        Raises ValueError when the sums are not finite, or the matrix stays singular (a ridge of 0 with dead inputs).
        """
        diagonal = self.gram_MM.diagonal()
        mean = float(diagonal.mean())
        if not (mean >= 0 and torch.isfinite(self.cross_DM).all()):
            raise ValueError("the layer's inputs or targets are not finite, so no weights can be solved for")
        found = torch.zeros_like(self.cross_DM)
        if mean == 0:
            return found
        caution = torch.zeros(len(found), dtype=torch.long) if caution_D is None else caution_D
        added = 0.0
        for power in sorted(set(caution.tolist()) & set(range(MOST_CAUTION + 1))):
            wanted = ridge * mean * 4.0**power
            diagonal += wanted - added
            added = wanted
            factor, info = torch.linalg.cholesky_ex(self.gram_MM)
            if int(info):
                raise ValueError(f"the least squares problem is singular with ridge {ridge}; give a larger one")
            rows = caution == power
            found[rows] = torch.cholesky_solve(self.cross_DM[rows].T, factor).T
        return found
