"""Distillation losses: how far a student's predictions and hidden states are from its teacher's.

Losses of predictions are per row (one position each), in nats and float32, whatever the dtype of the logits.
`chunked_mean` takes their mean a few rows at a time, so that logits of a large vocabulary never exist all at once.

Letters: N rows (positions), V vocabulary, K teacher's most likely tokens, B batch, T positions, D and E hidden
sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 1 << 26  # of float32 logits
IGNORED = -100  # a label that counts for nothing, as in transformers


def full_kl(
    student_NV: Float[Tensor, "N V"], teacher_NV: Float[Tensor, "N V"], *, temperature: float = 1.0
) -> Float[Tensor, " N"]:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each row, over the whole vocabulary.

    T^2 keeps the gradient's size when the temperature changes (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).
    """
    log_p, log_q = (log_probabilities(logits, temperature) for logits in (teacher_NV, student_NV))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def log_probabilities(logits_NV: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    logits_NV = logits_NV.float()
    return torch.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)


def top_of(
    teacher_NV: Float[Tensor, "N V"], k: int, *, temperature: float = 1.0
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"], Float[Tensor, " N"]]:
    """Of each row: the ids of the k most likely tokens, their log probabilities, and the log of the rest's mass.

    The rest's mass is added up from its own probabilities, not taken from 1: it may be as small as 1e-30.
    """
    log_p = log_probabilities(teacher_NV, temperature)
    values, ids = log_p.topk(k, dim=-1)
    return ids, values, log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)


def topk_kl(
    student_NV: Float[Tensor, "N V"],
    ids_NK: Int[Tensor, "N K"],
    log_p_NK: Float[Tensor, "N K"],
    log_rest_N: Float[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """T^2 * KL of each row with all tokens but the teacher's K first in one bucket; at most `full_kl`, equal at K = V.

    `ids_NK`, `log_p_NK`, `log_rest_N`: as `top_of` gives them, taken at the same temperature.
    """
    log_q = log_probabilities(student_NV, temperature)
    ids_NK, log_p_NK = ids_NK.long(), log_p_NK.float()
    first = (log_p_NK.exp() * (log_p_NK - log_q.gather(-1, ids_NK))).sum(-1)
    if ids_NK.shape[-1] == student_NV.shape[-1]:
        return temperature**2 * first
    rest_q = log_q.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)
    log_rest_N = log_rest_N.float().clamp_min(-100.0)  # a mass of e^-100 and one of 0 count the same: nothing
    return temperature**2 * (first + log_rest_N.exp() * (log_rest_N - rest_q))


def next_token_loss(student_NV: Float[Tensor, "N V"], labels_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log softmax(student)[label] of each row, 0 where the label is `IGNORED`."""
    return torch.nn.functional.cross_entropy(student_NV.float(), labels_N, ignore_index=IGNORED, reduction="none")


def hidden_distance(
    student: Sequence[Float[Tensor, "B T D"]], teacher: Sequence[Float[Tensor, "B T E"]]
) -> Float[Tensor, ""]:
    """Mean over layers and positions of |s - t|^2 / |t|^2, in float32.

    Each position is measured by its own length: the few positions with huge states (attention sinks) would otherwise be
    all that counts. Raises ValueError for another number of layers or another hidden size.
    """
    if len(student) != len(teacher) or not teacher:
        raise ValueError(f"hidden states of {len(student)} layers of the student, {len(teacher)} of the teacher")
    if student[0].shape != teacher[0].shape:
        raise ValueError(
            f"hidden states {list(student[0].shape)} of the student, {list(teacher[0].shape)} of the teacher; "
            f"hidden states can only be matched where both have the same size"
        )
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours.float(), theirs.float().to(ours.device)
        square = theirs.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        total = total + ((ours - theirs).square().sum(-1) / square).mean()
    return total / len(student)


# ------------------------------------------------------------------------------------------------- a few rows at a time


def chunk_rows(vocabulary: int) -> int:
    """Rows whose float32 logits take about `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def chunked_mean(
    losses: Callable[[Tensor, slice], Tensor],
    states: Float[Tensor, "N D"],
    *,
    rows: int,
    parameters: Sequence[Tensor] = (),
) -> Float[Tensor, ""]:
    """The mean of `losses(states[part], part)` over all rows, with the gradients of states and `parameters`.

    `losses` gives one loss per row of the part that it gets, a slice of at most `rows` rows. Every part's gradient is
    taken at once and its logits are dropped, so that memory is that of one part. `parameters`: what `losses` uses
    beside the states (an output head's weights); those that need no gradient cost none.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.is_grad_enabled() and (states.requires_grad or wanted):
        return ChunkedMean.apply(losses, rows, states, *wanted)
    parts = (slice(start, start + rows) for start in range(0, len(states), rows))
    return torch.stack([losses(states[part], part).sum() for part in parts]).sum() / len(states)


class ChunkedMean(torch.autograd.Function):
    """The gradient is computed in `forward`, part by part, as in Liger Kernel's fused linear losses."""

    @staticmethod
    def forward(
        ctx: Any, losses: Callable[[Tensor, slice], Tensor], rows: int, states: Tensor, *parameters: Tensor
    ) -> Tensor:
        count, needs = len(states), [ctx.needs_input_grad[2], *(True for _ in parameters)]
        gradients = [
            torch.zeros_like(each) if need else None for each, need in zip((states, *parameters), needs, strict=True)
        ]
        total = torch.zeros((), device=states.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            with torch.enable_grad():
                chunk = states[part].detach().requires_grad_(needs[0])
                loss = losses(chunk, part).sum() / count
                found = torch.autograd.grad(loss, [chunk, *parameters] if needs[0] else list(parameters))
            total += loss.detach()
            if needs[0]:
                gradients[0][part] = found[0]  # type: ignore[index]
            for gradient, more in zip(gradients[1:], found[1:] if needs[0] else found, strict=True):
                gradient.add_(more)  # type: ignore[union-attr]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        return None, None, *(None if each is None else each * outer[0] for each in ctx.saved_tensors)
