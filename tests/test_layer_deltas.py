"""One layer's deltas against a float64 reference, and what sign symmetry promises, measured."""

import itertools
import math
import threading

import ml_dtypes
import numpy as np
import pytest
import scipy.fft
from scipy.special import expit

from neuroweave.surgery.neurons.bank import Bank, Neuron
from neuroweave.surgery.neurons.frames import Frames
from neuroweave.surgery.neurons.layer_deltas import DTYPES, LayerDeltas, PreparedBank
from neuroweave.surgery.neurons.randomness import permutation
from neuroweave.surgery.neurons.slots import Layout, Slots, expand, without_twins

BEHAVIOUR = {"knots": [0.0, 1.0], "slopes": [0.0, 1.0], "range": 4.0, "tolerance": 0.05}
SCALE = 0.02


def make_bank(count=5, size=24, seed=0, defined=(), **origins):
    random = np.random.default_rng(seed)
    gate, up, down = (random.normal(size=(count, size)).astype("f4") * length for length in (1, 3, 0.2))
    up[0] = gate[0]
    neurons = []
    for index in range(count):
        behaviour = BEHAVIOUR if index in defined else None
        neurons.append(Neuron(f"n{index}", "source", origins.get(f"n{index}", {}), behaviour))
        if behaviour:
            up[index] = gate[index]
    return Bank(gate, up, down, neurons, {})


def make_layer(bank, neurons, *, dtype="F32", seed=1, layer=3, hidden=None, symmetry="signs"):
    prepared = PreparedBank(bank, hidden or bank.hidden_size, seed)
    slots, _ = expand([bank.neurons[index] for index in without_twins(bank)], "silu")
    codes = dict.fromkeys(("gate", "up", "down"), dtype)
    return LayerDeltas(
        prepared, slots, seed=seed, layer=layer, neurons=neurons, dtypes=codes, gate_scale=SCALE, symmetry=symmetry
    )


def whole(layer, projection):
    return layer.block(projection, 0, layer.shapes[projection][0])


def reference(bank, neurons, seed=1, layer=3):
    """(gate, up, down) in float64, slot by slot, with SciPy's basis and Householder reflections written out."""
    size, unit = bank.hidden_size, lambda x: x.astype("f8") / np.linalg.norm(x.astype("f8"))
    gate, up, down = np.zeros((neurons, size)), np.zeros((neurons, size)), np.zeros((size, neurons))
    groups = {}
    slots, _ = expand(bank.neurons, "silu")
    for slot in zip(slots.neuron.tolist(), slots.gain.tolist(), slots.weight.tolist(), strict=True):
        groups.setdefault(slot[0], []).append(slot)
    order = permutation(seed, "slots", layer, count=len(bank)).tolist()
    vectors = 1 + permutation(seed, "rows", layer, count=size - 1)
    dct = scipy.fft.dct(np.eye(size), type=2, norm="ortho", axis=0)
    frames = {
        side: Frames(getattr(PreparedBank(bank, size, seed), name), seed, layer, side)
        for side, name in (("read", "read"), ("write", "write"))
    }

    def frame_vector(side, which, c, row):
        signs = np.where(frames[side].sign_bits(np.array([which]), slice(0, size))[0], -1.0, 1.0)
        basis = dct * signs
        v = basis[0] + c if basis[0] @ c >= 0 else basis[0] - c
        return basis[row] - 2 * (v @ basis[row]) / (v @ v) * v

    pair, turn, room, skipped = 0, 0, neurons // 2, False
    while pair < room and not skipped:
        for which in order:
            if len(groups[which]) > room - pair:
                skipped = True
                continue
            c, u, o = unit(bank.gate[which]), unit(bank.up[which]), unit(bank.down[which])
            if turn:
                row, other = vectors[(turn - 1) % (size - 1)], vectors[turn % (size - 1)]
                cosine = c @ u
                moved = frame_vector("read", which, c, row)
                u = cosine * moved + math.sqrt(max(0, 1 - cosine**2)) * frame_vector("read", which, c, other)
                c, o = moved, frame_vector("write", which, o, row)
            for _, gain, weight in groups[which]:
                for sign, at in ((1, 2 * pair), (-1, 2 * pair + 1)):
                    gate[at], up[at], down[:, at] = sign * gain * c, sign * gain * u, sign * weight * o
                pair += 1
        turn += 1
    return tuple(SCALE * math.sqrt(size) * part for part in (gate, up, down))


@pytest.mark.parametrize("neurons", [1, 2, 7, 31, 123, 500])
@pytest.mark.parametrize("bank", [make_bank(), make_bank(3, 7), make_bank(6, 24, defined=(0, 4)), make_bank(1, 3)])
def test_deltas_are_those_of_the_reference(bank, neurons):
    layer = make_layer(bank, neurons)
    for projection, expected in zip(("gate", "up", "down"), reference(bank, neurons), strict=True):
        found = whole(layer, projection)
        assert found.shape == expected.shape
        size = max(1, abs(expected).max(initial=0))
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * size, err_msg=projection)


def test_a_scaled_neuron_keeps_its_gain():
    bank = make_bank(2, 24, n1={"operation": "scaled", "parent": "elsewhere", "gain": 2.0})
    expected = reference(bank, 50)
    for projection, part in zip(("gate", "up", "down"), expected, strict=True):
        np.testing.assert_allclose(whole(make_layer(bank, 50), projection), part, atol=1e-6)
    norms = np.linalg.norm(expected[0], axis=1) / (SCALE * math.sqrt(24))
    assert sorted({round(norm, 3) for norm in norms.tolist()}) == [1, 2]


def test_a_scaled_defined_neuron_scales_the_gains_of_its_group():
    plain, _ = expand(make_bank(1, 24, defined=(0,)).neurons, "silu")
    scaled, realised = expand(make_bank(1, 24, defined=(0,), n0={"gain": 2.0}).neurons, "silu")
    assert scaled.gain.tolist() == (2 * plain.gain).tolist()
    assert scaled.weight.tolist() == plain.weight.tolist() == np.array(realised[0].fit.weights, "f4").tolist()


# The bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neurons", [1, 2, 7, 123, 250])
@pytest.mark.parametrize("size", [3, 24, 131])
def test_bytes_do_not_depend_on_the_cut(neurons, size, dtype):
    bank = make_bank(7, size, defined=(2,))
    random = np.random.default_rng(neurons)
    for projection in ("gate", "up", "down"):
        expected = whole(make_layer(bank, neurons, dtype=dtype), projection)
        assert expected.dtype == DTYPES[dtype]
        layer = make_layer(bank, neurons, dtype=dtype)
        rows = len(expected)
        cuts = sorted({0, rows, *random.integers(0, rows + 1, 6).tolist()})
        for begin, end in random.permutation(list(itertools.pairwise(cuts))).tolist():
            assert layer.block(projection, begin, end).tobytes() == expected[begin:end].tobytes()
        for row in {0, rows // 2, rows - 1}:
            assert layer.block(projection, row, row + 1).tobytes() == expected[row].tobytes()
        assert layer.block(projection, rows, rows).shape == (0, expected.shape[1])


def test_bytes_do_not_depend_on_the_number_of_threads():
    bank = make_bank(40, 131, defined=(2, 30))
    expected = {name: whole(make_layer(bank, 700, dtype="BF16"), name).tobytes() for name in ("gate", "up", "down")}
    layer, found = make_layer(bank, 700, dtype="BF16"), {}

    def run(name, begin, end):
        found[name, begin] = layer.block(name, begin, end).tobytes()

    work = [(name, at, min(at + 37, layer.shapes[name][0])) for name in expected for at in range(0, 700, 37)]
    work = [item for item in work if item[1] < layer.shapes[item[0]][0]]
    threads = [threading.Thread(target=run, args=item) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, whole_bytes in expected.items():
        assert b"".join(found[key] for key in sorted(key for key in found if key[0] == name)) == whole_bytes


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_rounding_is_to_the_nearest(dtype, projection):
    bank = make_bank(9, 123, defined=(1,))
    single = whole(make_layer(bank, 301), projection)
    found = whole(make_layer(bank, 301, dtype=dtype), projection)
    assert found.tobytes() == single.astype(DTYPES[dtype]).tobytes()


def test_bfloat16_ties_go_to_even():
    from neuroweave.surgery.neurons.layer_deltas import _store_pairs, _stored_bits

    bits = np.random.default_rng(0).integers(0, 0x7F00, 4000).astype("u4") << 16
    values = (bits | np.array([0x8000, 0x7FFF, 0x8001, 0], "u4").repeat(1000)).view("f4").reshape(4, 1000)
    expected = values.astype(ml_dtypes.bfloat16)
    assert np.array_equal(_stored_bits(values.copy(), DTYPES["BF16"]), expected.view("u2"))
    words = np.zeros((4, 2000), "u2")
    _store_pairs(values.copy(), words, DTYPES["BF16"], True)
    assert np.array_equal(words[:, 0::2], expected.view("u2"))
    assert np.array_equal(words[:, 1::2], (-expected).view("u2"))


def test_layers_and_seeds_differ():
    bank = make_bank(5, 123)
    blocks = [whole(make_layer(bank, 60, **settings), "gate") for settings in ({}, {"seed": 2}, {"layer": 4})]
    for at, one in enumerate(blocks):
        for other in blocks[:at]:
            assert (one[20:] == other[20:]).mean() < 0.01


def test_another_hidden_size():
    bank = make_bank(5, 24)
    for hidden in (7, 123):
        layer = make_layer(bank, 40, hidden=hidden)
        assert whole(layer, "down").shape == (hidden, 40)
        np.testing.assert_allclose(np.sqrt((whole(layer, "gate") ** 2).mean(axis=1)), SCALE, rtol=1e-5)


def test_a_mirrored_twin_counts_once():
    bank = make_bank(3, 24)
    twin = Neuron("n1/mirrored", "derivative", {"parent": "n1", "operation": "mirrored", "gain": 1.0})
    both = Bank(
        *(np.concatenate([part, -part[1:2]]) for part in (bank.gate, bank.up, bank.down)), [*bank.neurons, twin], {}
    )
    for projection in ("gate", "up", "down"):
        assert np.array_equal(whole(make_layer(both, 50), projection), whole(make_layer(bank, 50), projection))
    alone = Bank(both.gate[3:], both.up[3:], both.down[3:], [twin], {})
    np.testing.assert_allclose(
        whole(make_layer(alone, 3), "gate")[0], -bank.gate[1] / 50 * 24**0.5 / np.linalg.norm(bank.gate[1]), atol=1e-6
    )


# What sign symmetry promises


def output(layer, x):
    """down @ (silu(gate @ x) * (up @ x)) in float64, for columns of x."""
    gate, up, down = (whole(layer, name).astype("f8") for name in ("gate", "up", "down"))
    pre = gate @ x
    return down @ (pre * expit(pre) * (up @ x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neurons", [2, 7, 250])
def test_pairs_sum_to_exactly_zero(neurons, dtype):
    layer = make_layer(make_bank(5, 24, defined=(1,)), neurons, dtype=dtype)
    even = neurons // 2 * 2
    for projection in ("gate", "up", "down"):
        delta = whole(layer, projection).astype("f8")
        delta = delta.T if projection == "down" else delta
        assert not (delta[0:even:2] + delta[1:even:2]).any()
        assert not delta[even:].any()
        assert delta.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_odd_and_adds_no_mean(dtype):
    layer = make_layer(make_bank(5, 24, defined=(1,)), 250, dtype=dtype)
    x = 3 * np.random.default_rng(1).normal(size=(24, 200))
    there, back = output(layer, x), output(layer, -x)
    size = abs(there).mean()
    assert abs(there + back).max() < 1e-11 * size
    assert size > 0.001


def test_one_sided_pairs_add_a_mean():
    layer = make_layer(make_bank(5, 24), 250, symmetry="one-sided")
    for projection in ("gate", "up"):
        delta = whole(layer, projection)
        assert np.array_equal(delta[0::2], delta[1::2])
    assert np.array_equal(whole(layer, "down")[:, 0::2], whole(layer, "down")[:, 1::2])
    x = 3 * np.random.default_rng(1).normal(size=(24, 200))
    there, back = output(layer, x), output(layer, -x)
    assert abs((there + back).mean(axis=1)).mean() > 0.1 * abs(there).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 0.0505), ("F16", 0.052), ("BF16", 0.075)])
def test_a_behaviour_is_realised(dtype, tolerance):
    """A layer of one defined neuron writes its function of s = gate_scale sqrt(d) c.x, also where it was moved to."""
    size = 123
    bank = make_bank(1, size, defined=(0,))
    pairs = len(expand(bank.neurons, "silu")[0])
    layer = make_layer(bank, 4 * pairs, dtype=dtype)  # its own direction, and one that it is moved to
    scale = SCALE * math.sqrt(size)
    exact = make_layer(bank, 4 * pairs)
    gains, weights = layer.layout.slots.gain, layer.layout.slots.weight
    for turn in (0, 1):
        c = whole(exact, "gate")[2 * pairs * turn].astype("f8") / (scale * gains[0])
        o = whole(exact, "down")[:, 2 * pairs * turn].astype("f8") / (scale * weights[0])
        other = whole(exact, "gate")[2 * pairs * (1 - turn)]
        assert abs(c @ other) < 1e-5
        s = np.linspace(-4, 4, 801)
        written = output(layer, np.outer(c, s / scale))
        truth = np.interp(s, [-4, -1, 1, 4], [-3, 0, 0, 3])
        assert abs(o @ written / scale - truth).max() <= tolerance * 3
        np.testing.assert_allclose(written - np.outer(o, o @ written), 0, atol=tolerance)


def test_rounds_are_orthogonal():
    bank = make_bank(3, 123)
    gate = whole(make_layer(bank, 2 * 3 * 40), "gate").astype("f8")[0::2] / (SCALE * math.sqrt(123))
    for which in range(3):
        rows = gate[which::3]
        np.testing.assert_allclose(rows @ rows.T, np.eye(40), atol=3e-6)


# Slots


def make_slots(*sizes):
    neuron = np.repeat(np.arange(len(sizes)), sizes)
    return Slots(neuron, np.ones(len(neuron), "f4"), np.ones(len(neuron), "f4"))


def test_a_group_that_does_not_fit_gives_way():
    for seed in range(20):
        layout = Layout.draw(make_slots(4, 1, 3, 1), 9 + 3, seed=seed, layer=0)
        order = list(dict.fromkeys(layout.slots.neuron.tolist()))
        first = next(neuron for neuron in order if neuron != 0)
        expected = [2, 2, 2] if first == 2 else [neuron for neuron in order if neuron in (1, 3)]
        assert (layout.rounds, layout.last.neuron.tolist()) == (1, expected)


def test_slots_that_nothing_fits_are_left():
    layout = Layout.draw(make_slots(4, 3), 9, seed=0, layer=0)
    assert (layout.rounds, layout.pairs, len(layout.last)) == (1, 7, 0)
    assert Layout.draw(make_slots(4, 3), 2, seed=0, layer=0).pairs == 0


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (0, 30), (3, 4), (6, 8), (13, 30), (29, 30)])
def test_runs_are_the_slots_in_order(begin, end):
    layout = Layout.draw(make_slots(2, 1, 4), 16, seed=3, layer=1)
    turns = [(turn, slot) for turn in range(layout.rounds) for slot in layout.slots.neuron.tolist()]
    turns += [(layout.rounds, slot) for slot in layout.last.neuron.tolist()]
    found = []
    for first, turn, slots in layout.runs(begin, end):
        assert first == begin + len(found)
        found += [(turn, slot) for slot in slots.neuron.tolist()]
    assert found == turns[begin:end]


def test_refusals():
    layer = make_layer(make_bank(), 10)
    with pytest.raises(ValueError, match="layer 3: rows 4 to 11 of gate, which has 10"):
        layer.block("gate", 4, 11)
    bank = make_bank()
    bank.up[2] = 0
    with pytest.raises(ValueError, match="neuron 'n2': its up direction is zero"):
        PreparedBank(bank, 24, 1)
    bank = make_bank(defined=(3,))
    bank.neurons[3] = Neuron("n3", "source", {}, BEHAVIOUR | {"tolerance": 0.001})
    with pytest.raises(ValueError, match=r"neuron 'n3': up to 8 pairs of silu reach an error of 0\.01"):
        expand(bank.neurons, "silu")
