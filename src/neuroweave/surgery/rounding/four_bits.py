"""Round a matrix to 4-bit numbers so that what it computes changes least on inputs that were seen.

GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after the other, and the error that each leaves is
taken up by the columns that are still to come, as least squares on the inputs says. Letters: D outputs, C inputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from neuroweave.runtime.weights import GROUP, four_bit_scales, rounded

RIDGE = 0.01  # of the mean of the diagonal
BLOCK = 128  # columns whose errors are passed on within, before the rest learns of them


@torch.no_grad()
def round_to_four_bits(weight: Float[Tensor, "D C"], gram: Float[Tensor, "C C"]) -> Float[Tensor, "D C"]:
    """The weights on a grid of 16 numbers for each row's group of 32 inputs. `gram`: inputs^T inputs.

    `pack(..., "int4")` finds the same grid again. Raises ValueError for weights or inputs that are not finite.
    """
    if not (torch.isfinite(weight).all() and torch.isfinite(gram).all()):
        raise ValueError("weights or inputs that are not finite cannot be rounded")
    weight, gram = weight.float().clone(), gram.double().clone()
    columns = weight.shape[1]
    diagonal = gram.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1.0
    diagonal += RIDGE * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    made = torch.empty_like(weight)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(len(weight), stop - start)
        for column in range(start, stop):
            if column % GROUP == 0:
                group = weight[:, column : column + GROUP]
                group = torch.nn.functional.pad(group, (0, GROUP - group.shape[1]))
                scale = four_bit_scales(group[:, None])
            values = weight[:, column]
            number = rounded(values[:, None, None], scale)[:, 0, 0]
            made[:, column] = number * scale[:, 0].float()
            error = (values - made[:, column]) / upper[column, column]
            errors[:, column - start] = error
            if column + 1 < stop:
                weight[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return made
