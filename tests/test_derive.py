"""Derivative neurons: lengths, angles and provenance of what a source neuron gives."""

import hashlib
import warnings

import numpy as np
import pytest

from neuroweave.surgery.neurons.bank import Bank, Neuron, save_bank
from neuroweave.surgery.neurons.derive import derive_bank


def sources(count=3, size=123, seed=0):
    random = np.random.default_rng(seed)
    gate, up, down = (random.normal(size=(count, size)).astype("f4") * scale for scale in (0.1, 3, 20))
    up[0] = 2 * gate[0]
    neurons = [
        Neuron(f"n{i}", "source", {"layer": i, "index": 7}, statistics={"gate norm": 1.5 + i}, fired=[{"value": 1.0}])
        for i in range(count)
    ]
    return Bank(gate, up, down, neurons, {"activation": "silu", "seed": 5})


def family(bank, name):
    """Index by operation for one source neuron's derivatives; moved ones in a list."""
    found = {"moved": []}
    for index, neuron in enumerate(bank.neurons):
        if neuron.origin.get("parent") == name:
            operation = neuron.origin["operation"]
            found.setdefault("moved", []).append(index) if operation == "moved" else found.setdefault(
                (operation, neuron.origin["gain"]), index
            )
    return found


def unit(vectors):
    vectors = np.asarray(vectors, "f8")
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_each_source_is_followed_by_its_family():
    bank = sources()
    derived = derive_bank(bank, seed=1, per_source=6)
    names = [neuron.name for neuron in derived.neurons[:7]]
    assert names == ["n0", "n0/mirrored", "n0/scaled-0.5", "n0/scaled-2", "n0/moved-1", "n0/moved-2", "n0/moved-3"]
    assert [neuron.kind for neuron in derived.neurons] == 3 * (["source"] + 6 * ["derivative"])
    for part in ("gate", "up", "down"):
        assert np.array_equal(getattr(derived, part)[::7], getattr(bank, part))
    assert derived.neurons[7] == bank.neurons[1]
    child = derived.neurons[8]
    assert child.origin == {"parent": "n1", "operation": "mirrored", "gain": 1.0, "statistics": "inherited"}
    assert (child.statistics, child.fired, child.response) == ({"gate norm": 2.5}, [], None)
    assert derived.provenance["sources"]["seed"] == 5
    assert derived.provenance["activation"] == "silu"


def test_mirrored_and_scaled_are_exact():
    derived = derive_bank(sources(), seed=1)
    for source in ("n0", "n2"):
        own, kin = [neuron.name for neuron in derived.neurons].index(source), family(derived, source)
        for part in ("gate", "up", "down"):
            vectors = getattr(derived, part)
            assert np.array_equal(vectors[kin["mirrored", 1.0]], -vectors[own])
            for gain in (0.5, 2.0):
                expected = vectors[own] if part == "down" else np.float32(gain) * vectors[own]
                assert np.array_equal(vectors[kin["scaled", gain]], expected)


@pytest.mark.parametrize("size", [3, 7, 123, 576])
def test_moved_neurons_keep_lengths_and_the_angle_between_gate_and_up(size):
    bank = sources(size=size)
    derived = derive_bank(bank, seed=1, per_source=9)
    for index, source in enumerate(bank.neurons):
        moved = family(derived, source.name)["moved"]
        gains = [derived.neurons[each].origin["gain"] for each in moved]
        assert gains == [0.5, 1.0, 2.0, 0.5, 1.0, 2.0]
        for part in ("gate", "up", "down"):
            lengths = np.linalg.norm(getattr(derived, part)[moved].astype("f8"), axis=1)
            expected = np.linalg.norm(getattr(bank, part)[index].astype("f8"))
            np.testing.assert_allclose(lengths / expected, 1 if part == "down" else gains, rtol=1e-5)
        cosine = unit(bank.gate[index]) @ unit(bank.up[index])
        found = (unit(derived.gate[moved]) * unit(derived.up[moved])).sum(axis=1)
        np.testing.assert_allclose(found, cosine, atol=1e-5)
        np.testing.assert_allclose(unit(derived.gate[moved]) @ unit(bank.gate[index]), 0, atol=1e-5)
        np.testing.assert_allclose(unit(derived.down[moved]) @ unit(bank.down[index]), 0, atol=1e-5)


def test_moved_neurons_of_one_source_are_orthogonal():
    derived = derive_bank(sources(), seed=1)
    moved = family(derived, "n1")["moved"]
    for part in (derived.gate, derived.down):
        np.testing.assert_allclose(unit(part[moved]) @ unit(part[moved]).T, np.eye(len(moved)), atol=1e-5)
    assert np.array_equal(derived.gate[4] * 2, derived.up[4])  # n0's up direction is its gate's


def test_moved_neurons_of_two_sources_are_not_related():
    derived = derive_bank(sources(2, size=576), seed=1, per_source=30)
    cosines = unit(derived.gate[family(derived, "n0")["moved"]]) @ unit(derived.gate[family(derived, "n1")["moved"]]).T
    assert abs(cosines).max() < 5 / np.sqrt(576)


def test_same_seed_same_bytes(tmp_path):
    first = save_bank(derive_bank(sources(), seed=1), tmp_path / "a.safetensors")
    assert save_bank(derive_bank(sources(), seed=1), tmp_path / "b.safetensors").sha256 == first.sha256
    other = derive_bank(sources(), seed=2)
    assert not np.array_equal(other.gate, first.gate)


def test_golden():
    random = np.arange(1, 22, dtype="f4").reshape(3, 7) % 5 - 2
    bank = Bank(random, np.roll(random, 1, axis=1), random[::-1].copy(), [Neuron(n, "source") for n in "abc"], {})
    derived = derive_bank(bank, seed=42)
    digest = hashlib.sha256(b"".join(getattr(derived, part).tobytes() for part in ("gate", "up", "down")))
    assert digest.hexdigest() == "20e7035c96f55d6f66ec4cb7153a9dc5302a6b6fe0f897c5ecae29462ee0096e"


@pytest.mark.parametrize(("per_source", "operations"), [(0, []), (1, ["mirrored"]), (2, ["mirrored", "scaled"])])
def test_few_derivatives(per_source, operations):
    derived = derive_bank(sources(), seed=1, per_source=per_source)
    assert [neuron.origin.get("operation") for neuron in derived.neurons[: 1 + per_source]] == [None, *operations]
    assert len(derived) == 3 * (1 + per_source)


def test_a_defined_neuron_stays_defined():
    behaviour = {"knots": [0.0], "slopes": [1.0], "range": 4.0, "tolerance": 0.05}
    direction = np.eye(1, 7, dtype="f4")
    bank = Bank(direction, direction, direction, [Neuron("line", "source", {"spec": "s"}, behaviour)], {})
    assert all(neuron.behaviour == behaviour for neuron in derive_bank(bank, seed=1).neurons)


def with_zero(part):
    bank = sources()
    getattr(bank, part)[1] = 0
    return bank


@pytest.mark.parametrize(
    ("bank", "settings", "message"),
    [
        (derive_bank(sources(), seed=1), {}, "neuron 'n0/mirrored' is a derivative already; derive from the bank of"),
        (sources(size=2), {}, "hidden size 2: there is nowhere to move to; expected 3 or more"),
        (sources(), {"per_source": -1}, "per_source -1: expected 0 or more"),
        (sources(), {"gains": ()}, r"gains \[\]: expected numbers above 0, one at least"),
        (sources(), {"gains": (1.0, -2.0)}, r"gains \[1.0, -2.0\]: expected numbers above 0"),
        (sources(), {"gains": (1e39,)}, r"gain 1e\+39: expected 1\.2e-38 to 3\.4e\+38, which float32 holds"),
        (sources(), {"gains": (1e-42,)}, r"gain 1e-42: expected 1\.2e-38"),
        (
            sources(),
            {"gains": (1.0, 2e38)},
            r"neuron 'n0': its up direction has length .*, which gain 2e\+38 takes out",
        ),
        (sources(), {"gains": (2e-38,)}, "neuron 'n0': its gate direction has length .*, which gain 2e-38 takes out"),
        (Bank(*np.zeros((3, 0, 7), "f4"), [], {}), {}, "the bank has no neurons"),
        (with_zero("up"), {}, "neuron 'n1': one of its directions is zero; it cannot be moved"),
    ],
)
def test_refusals(bank, settings, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            derive_bank(bank, seed=1, **settings)
