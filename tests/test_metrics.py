"""Metrics against SciPy and NumPy in float64, and the identities that must hold to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import distance
from scipy.special import log_softmax, rel_entr

from neuroweave.diagnose import metrics

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
    np.testing.assert_allclose(metrics.top1_confidence(log_p), np.exp(wanted_p.max(-1)), rtol=1e-12)
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
