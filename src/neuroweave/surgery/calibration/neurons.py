"""Match each neuron's new activation to its old one: c * new(s * g) for old(g), and choose who gets which segment.

Both scales fold into weights that are there: s into the neuron's row of the gate, c into its column of the down
projection. Letters: T tokens, M neurons, K members of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Function = Callable[[Tensor], Tensor]
SCALES = tuple(2.0 ** (step / 4) for step in range(-8, 9))  # s: 1/4 to 4
LEAST_C, MOST_C = 0.1, 10.0
ROUNDING = 1e-6  # of float32 sums: a scale is not taken for less


def match(
    old: Function, new: Function, gate_TM: Float[Tensor, "T M"], up_TM: Float[Tensor, "T M"], *, free: bool = True
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, " M"]]:
    """(s, c, error): for each neuron the scales with the least sum over tokens of (up * (old(g) - c * new(s g)))^2.

    `up_TM`: what the activation is multiplied with (ones in an MLP without gate). s is one of `SCALES`; c follows in
    closed form, kept between `LEAST_C` and `MOST_C`; unless `free` it is 1.
    """
    wanted = old(gate_TM) * up_TM
    whole = wanted.pow(2).sum(0)
    neurons = gate_TM.shape[1]
    best_s, best_c = torch.ones(neurons), torch.ones(neurons)
    best_error = (new(gate_TM) * up_TM - wanted).pow(2).sum(0)
    for s in SCALES:
        found = new(s * gate_TM) * up_TM
        own, cross = found.pow(2).sum(0), (found * wanted).sum(0)
        c = (cross / own.clamp(min=1e-30)).clamp(LEAST_C, MOST_C) if free else torch.ones_like(own)
        error = whole - 2 * c * cross + c.pow(2) * own
        better = error < best_error - ROUNDING * whole
        best_s[better], best_c[better], best_error[better] = s, c[better], error[better]
    return best_s, best_c, best_error.clamp(min=0)


def assign(error_MK: Float[Tensor, "M K"], sizes: Sequence[int]) -> Int[Tensor, " M"]:
    """A member for each neuron, `sizes[k]` neurons each, with a small sum of errors: exact for two members.

    The last member takes the neurons that lose least by it against the best of the others; then the one before. Of
    equal neurons those stay that are in its segment. Returns an order of the neurons: the first `sizes[0]` run member
    0, and so on, in ascending order inside a member.
    """
    left = torch.arange(error_MK.shape[0])
    present = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    groups: list[Tensor] = []
    for k in reversed(range(len(sizes))):
        if k == 0:
            groups.append(left)
            break
        regret = error_MK[left, k] - error_MK[left, :k].amin(1)
        taken = torch.zeros(len(left), dtype=torch.bool)
        staying_first = (present[left] != k).int().argsort(stable=True)
        taken[staying_first[regret[staying_first].argsort(stable=True)[: sizes[k]]]] = True
        groups.append(left[taken])
        left = left[~taken]
    return torch.cat(groups[::-1])
