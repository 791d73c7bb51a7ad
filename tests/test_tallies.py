"""Calibration and agreement summed over units against one plain pass over everything; storing and taking up again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from neuroweave.diagnose.assembly import alignment, calibration_bins, calibration_error, calibration_gaps
from neuroweave.diagnose.bootstrap import Bootstrap
from neuroweave.diagnose.ledger import Ledger
from neuroweave.diagnose.probes import metrics
from neuroweave.diagnose.probes.tallies import CALIBRATION_BINS, PairTally, Tally, aligned_positions


def predictions(tokens: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(tokens, 11, generator=torch.Generator().manual_seed(seed))


def filled(tokens: int = 123, units: int = 3) -> tuple[Tally, np.ndarray, np.ndarray]:
    logits = predictions(tokens)
    targets = torch.randint(0, 11, (tokens,), generator=torch.Generator().manual_seed(1))
    tally = Tally.empty(units)
    log_p = metrics.log_probabilities(logits)
    for unit in range(units):
        tally.add(unit, log_p[unit::units].exp(), log_p[unit::units], targets[unit::units])
    return tally, softmax(logits.double().numpy(), -1), targets.numpy()


def test_calibration_error_by_its_definition() -> None:
    tally, p, targets = filled()
    sure, right = p.max(-1), p.argmax(-1) == targets
    bins = np.digitize(sure, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1])
    wanted = sum(
        (bins == number).mean() * abs(sure[bins == number].mean() - right[bins == number].mean())
        for number in np.unique(bins)
    )
    counts = tally.bin_counts.sum(1)
    estimate = Bootstrap(3, resamples=200).statistic(calibration_error, calibration_gaps(tally), counts[:, None])[0]
    assert estimate.value == pytest.approx(wanted, rel=1e-12)
    shown = calibration_bins(tally)
    assert [part.predictions for part in shown] == np.bincount(bins, minlength=CALIBRATION_BINS).tolist()
    fullest = int(np.argmax([part.predictions for part in shown]))
    assert shown[fullest].accuracy == pytest.approx(right[bins == fullest].mean())
    assert shown[fullest].confidence == pytest.approx(sure[bins == fullest].mean())


def test_a_perfect_model_is_calibrated() -> None:
    logits = torch.full((7, 5), -torch.inf)
    logits[:, 2] = 0.0
    log_p = metrics.log_probabilities(logits)
    tally = Tally.empty(1)
    tally.add(0, log_p.exp(), log_p, torch.full((7,), 2))
    assert calibration_error(calibration_gaps(tally), np.array([[7.0]])).tolist() == [[0.0]]
    assert tally.entropy.tolist() == [0.0]


def test_alignment_of_a_model_with_itself_is_exactly_one() -> None:
    pair = PairTally.empty(4, 40)
    for unit in range(4):
        states = [predictions(30 + unit, seed=unit + 10 * depth) for depth in range(3)]
        pair.add_states(unit, states, [state.clone() for state in states])
    found = alignment(pair, Bootstrap(4, resamples=200))
    assert [(each.value, each.low, each.high) for each in found] == [(1, 1, 1)] * 3


def test_states_of_another_width_are_aligned_but_have_no_cosine() -> None:
    pair = PairTally.empty(1, 40)
    pair.add_states(0, [predictions(20)], [torch.cat([predictions(20), predictions(20)], -1)])
    assert pair.hidden_cosine.shape == (1, 0)
    assert alignment(pair, Bootstrap(1))[0].value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("tokens", "wanted"), [(1, 0), (4, 3), (257, 256), (258, 129), (512, 256)])
def test_aligned_positions(tokens: int, wanted: int) -> None:
    chosen = aligned_positions(tokens)
    assert len(chosen) == wanted
    assert 0 not in chosen
    assert all(0 < at < tokens for at in chosen)


def test_arrays_come_back(tmp_path) -> None:
    tally, _, _ = filled()
    ledger = Ledger(tmp_path)
    assert ledger.arrays("a") is None
    ledger.keep_arrays("a", tally.arrays())
    again = Tally.empty(3)
    again.restore(Ledger(tmp_path).arrays("a"))
    for name, array in tally.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
    next((tmp_path / "measured-so-far").iterdir()).write_bytes(b"half")
    assert Ledger(tmp_path).arrays("a") is None
    ledger.keep_record("b", {"x": 1})
    assert Ledger(tmp_path).record("b") == {"x": 1}
    ledger.remove()
    assert not list(tmp_path.iterdir())
