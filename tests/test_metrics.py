"""Metrics against SciPy and NumPy in float64, and the identities that must hold to the last bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import distance
from scipy.special import log_softmax, rel_entr

from neuroweave.diagnose.probes import metrics

SIZES = [(1, 1), (1, 7), (7, 123), (3, 5001)]


def logits(tokens: int, vocabulary: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
def test_predictions_match_scipy(tokens: int, vocabulary: int) -> None:
    a, b = logits(tokens, vocabulary), logits(tokens, vocabulary, seed=1)
    targets = torch.arange(tokens) % vocabulary
    log_p, log_q = metrics.log_probabilities(a), metrics.log_probabilities(b)
    wanted_p, wanted_q = (log_softmax(x.numpy().astype(np.float64), axis=-1) for x in (a, b))
    assert log_p.dtype == torch.float64
    np.testing.assert_allclose(log_p, wanted_p, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        metrics.negative_log_likelihood(log_p, targets), -wanted_p[np.arange(tokens), targets], atol=1e-12
    )
    np.testing.assert_allclose(
        metrics.kl_divergence(log_p, log_q), rel_entr(np.exp(wanted_p), np.exp(wanted_q)).sum(-1), atol=1e-12
    )
    np.testing.assert_allclose(
        metrics.entropy(log_p.exp(), log_p), stats.entropy(np.exp(wanted_p), axis=-1), atol=1e-12
    )
    np.testing.assert_array_equal(metrics.top1_agreement(a, b), a.numpy().argmax(-1) == b.numpy().argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_cosine_matches_scipy(tokens: int, width: int, dtype: torch.dtype) -> None:
    a, b = logits(tokens, width).to(dtype), logits(tokens, width, seed=1).to(dtype)
    wanted = [1 - distance.cosine(x, y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    np.testing.assert_allclose(metrics.cosine_similarity(a, b), wanted, atol=1e-12)


def test_kl_of_near_models_keeps_its_digits() -> None:
    """The second-order formula, var_p(d) / 2, is exact here to one part in a thousand; float32 would be off by more."""
    a = logits(7, 5001, scale=2.0).double()
    step = 1e-5 * logits(7, 5001, seed=1, scale=1.0).double()
    p = torch.softmax(a, -1)
    wanted = 0.5 * ((p * step**2).sum(-1) - (p * step).sum(-1) ** 2)
    kl = metrics.kl_divergence(metrics.log_probabilities(a), metrics.log_probabilities(a + step))
    torch.testing.assert_close(kl, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
def test_a_model_against_itself_is_exact(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    a = logits(tokens, vocabulary).to(dtype)
    log_p = metrics.log_probabilities(a)
    assert (metrics.kl_divergence(log_p, log_p.clone()) == 0).all()
    assert (metrics.cosine_similarity(a, a.clone()) == 1).all()
    assert metrics.top1_agreement(a, a.clone()).all()


def test_kl_is_never_negative_and_knows_direction() -> None:
    a, b = metrics.log_probabilities(logits(123, 7)), metrics.log_probabilities(logits(123, 7, seed=2))
    nudged = metrics.log_probabilities(logits(123, 7).double() * (1 + 1e-12))
    assert (metrics.kl_divergence(a, nudged) >= 0).all()
    assert not torch.allclose(metrics.kl_divergence(a, b), metrics.kl_divergence(b, a))


def hsic_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator written as sums over distinct indices: tr(KL) over pairs, triples and quadruples."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    pairs = triples = quadruples = 0.0
    for i, j in itertools.permutations(range(n), 2):
        pairs += k[i, j] * m[i, j]
        for q in set(range(n)) - {i, j}:
            triples += k[i, j] * m[i, q]
            quadruples += k[i, j] * sum(m[q, r] for r in set(range(n)) - {i, j, q})
    return (
        pairs / (n * (n - 1)) + quadruples / (n * (n - 1) * (n - 2) * (n - 3)) - 2 * triples / (n * (n - 1) * (n - 2))
    )


@pytest.mark.parametrize("tokens", [4, 7])
def test_alignment_is_the_unbiased_estimator(tokens: int) -> None:
    a, b = logits(tokens, 5, scale=1.0), logits(tokens, 3, seed=1, scale=1.0)
    x, y = a.double().numpy(), b.double().numpy()
    wanted = [hsic_by_hand(x, y), hsic_by_hand(x, x), hsic_by_hand(y, y)]
    np.testing.assert_allclose(metrics.alignment_sums(a, b), wanted, rtol=1e-4, atol=1e-5)


def test_alignment_knows_a_basis_from_a_change() -> None:
    a = logits(123, 32, scale=1.0)
    turn = torch.linalg.qr(logits(32, 32, seed=3))[0]

    def aligned(b: torch.Tensor) -> float:
        both, ours, theirs = metrics.alignment_sums(a, b)
        return both / math.sqrt(ours * theirs)

    assert aligned(a.clone()) == 1
    assert aligned(3 * a @ turn + 5) == pytest.approx(1, abs=1e-5)
    assert abs(aligned(logits(123, 32, seed=4))) < 0.2
    # Equal parts of noise: the kernel is that of the signal, of the noise, and two mixed ones of the same size.
    assert aligned(a + logits(123, 32, seed=4, scale=1.0)) == pytest.approx(1 / 2, abs=0.06)


def test_shared_top_tokens() -> None:
    a = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0, 0], [9, 8, 7, 6, 5, 0, 0, 0]])
    b = torch.tensor([[5.0, 6, 7, 8, 9, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    assert metrics.top_agreement(a, b).tolist() == [1.0, 0.4]
    assert metrics.top_agreement(a[:, :3], b[:, :3]).tolist() == [1.0, 1.0]  # fewer entries than five


def test_entropy_of_what_is_ruled_out() -> None:
    log_p = metrics.log_probabilities(torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]]))
    np.testing.assert_allclose(metrics.entropy(log_p.exp(), log_p), [np.log(2), 0], atol=1e-15)


def test_tokens_that_are_ruled_out() -> None:
    """p = 0 adds nothing, also where q = 0 too; q = 0 where p > 0 is infinitely far."""
    inf = torch.inf
    both = metrics.log_probabilities(torch.tensor([[0.0, 0.0, -inf]]))
    one = metrics.log_probabilities(torch.tensor([[0.0, 0.0, 0.0]]))
    assert metrics.kl_divergence(both, both).tolist() == [0.0]
    np.testing.assert_allclose(metrics.kl_divergence(both, one), [np.log(1.5)], rtol=1e-12)
    assert metrics.kl_divergence(one, both).tolist() == [inf]


def test_cosine_of_zero_vectors() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert metrics.cosine_similarity(zero, zero).tolist() == [1.0]
    assert metrics.cosine_similarity(zero, one).tolist() == [0.0]
    assert metrics.cosine_similarity(one, -one).tolist() == [-1.0]
