"""What two models say about the same tokens: pure functions on tensors, one number per token.

Dimensions: tokens (positions that were scored), vocabulary, width (of a hidden state).

Logits are raised to float64 before the softmax: the KL divergence of two near models is a sum of terms that almost
cancel. A model against itself gives exactly 0 for KL, exactly 1 for cosine similarity, True for agreement.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPU, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def log_probabilities(logits: Float[Tensor, "tokens vocabulary"]) -> Float[Tensor, "tokens vocabulary"]:
    """log softmax(logits) in nats, computed in float64 whatever the dtype of the logits."""
    return torch.log_softmax(logits, dim=-1, dtype=wide_dtype(logits.device))


def negative_log_likelihood(
    log_p: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """-log p(target), in nats per token. `log_p`: from `log_probabilities`; `targets`: the tokens that really came."""
    return -log_p.gather(-1, targets[:, None]).squeeze(-1)


def entropy(
    p: Float[Tensor, "tokens vocabulary"], log_p: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """-sum_v p(v) log p(v), in nats; p = 0 adds nothing."""
    return (p * log_p).masked_fill_(p == 0, 0.0).sum(-1).neg().clamp_min(0.0)


def kl_divergence(
    base_log_p: Float[Tensor, "tokens vocabulary"],
    other_log_p: Float[Tensor, "tokens vocabulary"],
    base_p: Float[Tensor, "tokens vocabulary"] | None = None,
) -> Float[Tensor, " tokens"]:
    """KL(base || other) = sum_v p_base(v) (log p_base(v) - log p_other(v)), in nats per token.

    `base_p`: exp(base_log_p), where it is at hand.

    A token to which the base gives probability 0 adds nothing (the limit of p log p). Never below 0: what rounding
    leaves under it is cut off. Infinite where the other model rules out a token that the base allows.
    """
    p = base_log_p.exp() if base_p is None else base_p
    terms = (base_log_p - other_log_p).mul_(p).masked_fill_(p == 0, 0.0)
    return terms.sum(-1).clamp_min(0.0)


def cosine_similarity(a: Float[Tensor, "tokens width"], b: Float[Tensor, "tokens width"]) -> Float[Tensor, " tokens"]:
    """a.b / (|a| |b|) for each token, in float64.

    Equal vectors give exactly 1 (the root of a square is exact, which the product of two roots is not). Two zero
    vectors are equal, so 1; one zero vector against another direction is 0.
    """
    a, b = a.to(wide_dtype(a.device)), b.to(wide_dtype(b.device))
    squares_a, squares_b = (a * a).sum(-1), (b * b).sum(-1)
    lengths = torch.sqrt(squares_a * squares_b)
    cosine = ((a * b).sum(-1) / lengths).clamp(-1.0, 1.0)
    both_zero = ((squares_a == 0) & (squares_b == 0)).to(cosine.dtype)
    return torch.where(lengths == 0, both_zero, cosine)


def top1_agreement(
    base_logits: Float[Tensor, "tokens vocabulary"], other_logits: Float[Tensor, "tokens vocabulary"]
) -> Bool[Tensor, " tokens"]:
    """Whether both models put the same token first."""
    return base_logits.argmax(-1) == other_logits.argmax(-1)


def top_agreement(
    base_logits: Float[Tensor, "tokens vocabulary"], other_logits: Float[Tensor, "tokens vocabulary"], *, count: int = 5
) -> Float[Tensor, " tokens"]:
    """The share of the base's `count` top tokens that are among the other's; all of them in a smaller vocabulary."""
    count = min(count, base_logits.shape[-1])
    ours, theirs = base_logits.topk(count).indices, other_logits.topk(count).indices
    return (ours[:, :, None] == theirs[:, None, :]).any(-1).to(wide_dtype(ours.device)).mean(-1)


def alignment_sums(a: Float[Tensor, "tokens width"], b: Float[Tensor, "tokens other"]) -> tuple[float, float, float]:
    """Unbiased HSIC of the linear kernels of (a, b), (a, a) and (b, b), to be added up over batches of tokens: linear
    centred kernel alignment is hsic(a, b) / sqrt(hsic(a, a) hsic(b, b)) of the sums (Nguyen et al. 2021,
    "Do wide and deep networks learn the same things?", with the estimator of Song et al. 2012).

    The same directions in another basis give 1, unrelated ones about 0, whatever the widths. Needs four tokens.
    """
    kernels = [kernel_without_diagonal(states) for states in (a, b)]
    hsic = [unbiased_hsic(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 0), (1, 1))]
    return hsic[0], hsic[1], hsic[2]


def kernel_without_diagonal(states: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens tokens"]:
    """X X^T of the centred states with zeros on the diagonal. float32: a float64 product takes twice the time."""
    centred = states.float() - states.float().mean(0)
    return (centred @ centred.T).fill_diagonal_(0)


def unbiased_hsic(a: Float[Tensor, "tokens tokens"], b: Float[Tensor, "tokens tokens"]) -> float:
    """[tr(AB) + 1'A1 1'B1 / ((n-1)(n-2)) - 2/(n-2) 1'AB1] / (n (n-3)), both symmetric with a zero diagonal."""
    n, wide = len(a), wide_dtype(a.device)
    rows_a, rows_b = a.sum(0, dtype=wide), b.sum(0, dtype=wide)
    trace = (a * b).sum(dtype=wide)
    both = trace + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_a * rows_b).sum()
    return float(both / (n * (n - 3)))
