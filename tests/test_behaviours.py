"""Behaviours as groups of pairs: the fits against np.interp and SciPy, the file against what a person may get wrong."""

import math
import warnings

import numpy as np
import pytest
from scipy.special import erf, expit

from neuroweave.surgery.neurons.bank import Bank, Neuron, load_bank, save_bank
from neuroweave.surgery.neurons.behaviours import define_neurons
from neuroweave.surgery.neurons.pair_fit import SYMMETRIC, PiecewiseLinear, fit_pairs, pair_output, piecewise_linear

REFERENCE = {
    "silu": lambda s: s * expit(s),
    "gelu": lambda s: 0.5 * s * (1 + erf(s / math.sqrt(2))),
    "gelu_tanh": lambda s: 0.5 * s * (1 + np.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3))),
}
# name: knots, slopes, and the same function as points for np.interp
FUNCTIONS = {
    "linear": ([0], [1], ([-4, 4], [-4, 4])),
    "soft threshold": ([0, 1], [0, 1], ([-4, -1, 1, 4], [-3, 0, 0, 3])),
    "dead zone": ([2], [-0.5], ([-4, -2, 2, 4], [1, 0, 0, -1])),
    "saturating ramp": ([0, 2], [1, 0], ([-4, -2, 2, 4], [-2, -2, 2, 2])),
    "stiffening": ([0, 1], [0.2, 1], ([-4, -1, 1, 4], [-3.2, -0.2, 0.2, 3.2])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_what_interp_says(name):
    knots, slopes, points = FUNCTIONS[name]
    s = np.linspace(-4, 4, 1601)
    np.testing.assert_allclose(piecewise_linear(knots, slopes)(s), np.interp(s, *points), atol=1e-12)


@pytest.mark.parametrize("activation", SYMMETRIC)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_fit_is_as_good_as_it_says(name, activation):
    knots, slopes, points = FUNCTIONS[name]
    fit = fit_pairs(piecewise_linear(knots, slopes), activation)
    s, act = np.linspace(-4, 4, 7001), REFERENCE[activation]
    realised = sum(
        weight * (act(gain * s) * (gain * s) + act(-gain * s) * (gain * s))
        for gain, weight in zip(fit.gains, fit.weights, strict=True)
    )
    truth = np.interp(s, *points)
    error = np.abs(realised - truth).max() / np.abs(truth).max()
    assert error <= 0.0505
    assert error == pytest.approx(fit.error, abs=5e-4)
    np.testing.assert_allclose(realised, fit(s, activation), atol=1e-11)
    np.testing.assert_allclose(realised[::-1], -realised, atol=1e-11)


@pytest.mark.parametrize("activation", SYMMETRIC)
def test_a_pair_is_odd_and_has_no_mean(activation):
    s = np.random.default_rng(0).normal(size=1000) * 3
    np.testing.assert_allclose(pair_output(-s, activation), -pair_output(s, activation), rtol=1e-12)
    assert abs(np.concatenate([pair_output(s, activation), pair_output(-s, activation)]).sum()) < 1e-9
    assert abs(pair_output(s, activation)).mean() > 1


def test_no_more_pairs_than_needed():
    def pairs(tolerance):
        return len(fit_pairs(piecewise_linear([0], [1], tolerance=tolerance), "silu").gains)

    assert [pairs(0.25), pairs(0.05), pairs(0.03)] == [1, 2, 3]


def test_weights_have_five_digits():
    fit = fit_pairs(piecewise_linear([0, 1], [0, 1]), "gelu_tanh")
    assert all(float(f"{weight:.4e}") == weight for weight in fit.weights)


@pytest.mark.parametrize("scale", [0.1, 10])
def test_a_fit_follows_the_range(scale):
    narrow = fit_pairs(piecewise_linear([0, 1], [0, 1]), "silu")
    wide = fit_pairs(piecewise_linear([0, scale], [0, 1], range=4 * scale), "silu")
    np.testing.assert_allclose(np.multiply(wide.gains, scale), narrow.gains, rtol=1e-5)
    np.testing.assert_allclose(np.divide(wide.weights, scale), narrow.weights, rtol=1e-3)


@pytest.mark.parametrize("activation", SYMMETRIC)
def test_what_pairs_cannot_do(activation):
    sharp = piecewise_linear([0, 1, 2], [1, -1, 0])
    with pytest.raises(ValueError, match=rf"up to 8 pairs of {activation} reach an error of 0\.4\d\d of the largest"):
        fit_pairs(sharp, activation)


def test_an_activation_that_is_not_symmetric():
    with pytest.raises(ValueError, match="activation 'relu': sign-symmetric pairs need one of silu, gelu, gelu_tanh"):
        fit_pairs(piecewise_linear([0], [1]), "relu")


def test_knots_below_zero_state_the_other_half():
    both = piecewise_linear([-4, -1, 1], [1, 0, 1])
    s = np.linspace(-4, 4, 801)
    np.testing.assert_allclose(both(s), piecewise_linear([0, 1], [0, 1])(s), atol=1e-12)
    np.testing.assert_allclose(piecewise_linear([-1, 1], [0, 1])(s), both(s), atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (([-4, 0], [0, 1]), r"not an odd function: slope 0 on \[-4, 0\] and 1 on \[0, 4\]; sign-symmetric pairs"),
        (([-2, 1], [0, 1]), r"not an odd function: slope 0 on \[-2, -1\] and 1 on \[1, 2\]"),
        (([], []), "0 knots and 0 slopes; expected one slope for each knot"),
        (([0, 1], [1]), "2 knots and 1 slopes"),
        (([0, 0], [1, 2]), r"knots \[0, 0\] do not ascend"),
        (([0], [math.nan]), "must be finite numbers"),
        (([0], [1], 0.0), "range 0.0: expected more than 0"),
        (([0], [1], 4.0, 1.0), "tolerance 1.0: expected more than 0 and less than 1"),
        (([0], [1e308]), r"slope 1e\+308: expected a size from 1e-06 to 1e\+06, or 0"),
        (([0], [1e-320]), r"slope 9\.99989e-321: expected a size"),
        (([0, 1e-7], [0, 1]), r"knot 1e-07: expected a size"),
        (([0], [1], 1e300), r"range 1e\+300: expected a size from 1e-06 to 1e\+06$"),
        (([5], [1]), r"the function is 0 everywhere on \[-4, 4\]"),
    ],
)
def test_functions_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        piecewise_linear(*settings)


@pytest.mark.parametrize("slope", [1e-6, -1e6])
@pytest.mark.parametrize("span", [1e-6, 1e6])
def test_the_ends_of_the_span(slope, span, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_pairs(piecewise_linear([0], [slope], span), "silu").error <= 0.05
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"knots": 0, "slopes": [1]}, "the behaviour's knots is 0; expected a list of numbers"),
        ({"knots": [0], "slopes": [True]}, r"the behaviour's slopes is \[True\]; expected a list of numbers"),
        ({"knots": [0], "slopes": [1], "range": "4"}, "the behaviour's range is '4'; expected a number"),
        ({"knots": [0], "slopes": [1], "tolerance": None}, "the behaviour's tolerance is None; expected a number"),
    ],
)
def test_a_damaged_form(about, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseLinear.from_dict(about)


def test_a_bank_s_form_comes_back():
    behaviour = piecewise_linear([0, 1], [0, 1], 3, 0.1)
    assert PiecewiseLinear.from_dict(behaviour.to_dict()) == behaviour
    with pytest.raises(ValueError, match="is not one of knots, slopes, range and tolerance"):
        PiecewiseLinear.from_dict({"knots": [0], "slope": [1]})


# The file

SPEC = """
hidden_size: 7
neurons:
  - name: one
    knots: [0, 1]
    slopes: [0, 1]
    direction: {random: 1}
    output: {values: [0, 0, 3, 0, -4, 0, 0]}
  - name: two
    knots: [0]
    slopes: [1]
    range: 2
    tolerance: 0.03
    direction: {random: 2}
    output: {random: 1}
"""


BOMB = "- &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"- &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]\n" for n in range(1, 8)
)


def write(folder, text):
    path = folder / "behaviours.yaml"
    path.write_text(text)
    return path


def test_a_defined_bank(tmp_path):
    bank = define_neurons(write(tmp_path, SPEC), seed=3)
    assert bank.gate.shape == (2, 7)
    assert np.array_equal(bank.gate, bank.up)
    np.testing.assert_allclose(bank.down[0], [0, 0, 0.6, 0, -0.8, 0, 0], atol=1e-7)
    assert np.array_equal(bank.down[1], bank.gate[0])
    np.testing.assert_allclose(np.linalg.norm(bank.gate, axis=1), 1, atol=1e-6)
    assert abs(bank.gate[0] @ bank.gate[1]) < 0.999
    one, two = bank.neurons
    assert one.kind == two.kind == "source"
    assert one.behaviour == {"knots": [0.0, 1.0], "slopes": [0.0, 1.0], "range": 4.0, "tolerance": 0.05}
    assert one.origin == {"spec": "behaviours.yaml", "direction": {"random": 1}, "output": {"values": 7}}
    assert one.statistics["pairs (silu)"] == 2
    assert two.statistics["fit error (gelu)"] <= 0.03
    assert bank.provenance["seed"] == 3


def test_same_seed_same_bytes(tmp_path):
    path = write(tmp_path, SPEC)
    first = save_bank(define_neurons(path, seed=3), tmp_path / "a.safetensors")
    assert save_bank(define_neurons(path, seed=3), tmp_path / "b.safetensors").sha256 == first.sha256
    other = define_neurons(path, seed=4)
    assert not np.array_equal(other.gate, first.gate)
    assert np.array_equal(load_bank(tmp_path / "a.safetensors").gate, first.gate)


def test_directions_of_a_bank(tmp_path):
    vectors = np.eye(3, 7, dtype="f4")
    save_bank(
        Bank(2 * vectors[:1], vectors[1:2], 5 * vectors[2:], [Neuron("n", "source")], {}), tmp_path / "b.safetensors"
    )
    text = SPEC.replace("{random: 2}", "{bank: b.safetensors, neuron: n}").replace(
        "output: {random: 1}", "output: {bank: b.safetensors, neuron: n}"
    )
    bank = define_neurons(write(tmp_path, text))
    assert np.array_equal(bank.gate[1], vectors[0])
    assert np.array_equal(bank.down[1], vectors[2])
    assert list(bank.provenance["banks"]) == ["b.safetensors"]


def test_only_the_activation_that_is_asked_for(tmp_path):
    bank = define_neurons(write(tmp_path, "activation: gelu_tanh\n" + SPEC))
    assert set(bank.neurons[0].statistics) == {"pairs (gelu_tanh)", "fit error (gelu_tanh)"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "tolerance",
            "tolerence",
            "neuron 'two': key 'tolerence' is not known (did you mean 'tolerance'?); known: name",
        ),
        (
            "hidden_size",
            "hiden_size",
            "key 'hiden_size' is not known (did you mean 'hidden_size'?); known: hidden_size",
        ),
        ("{random: 2}", "{randm: 2}", "neuron 'two', direction: key 'randm' is not known (did you mean 'random'?)"),
        ("{random: 2}", "{random: 2, neuron: x}", "a direction is {random: NUMBER}, {values: [..]} or {bank: FILE"),
        ("{random: 2}", "{bank: b}", "neuron 'two', direction: a direction is {random: NUMBER}"),
        ("{random: 2}", "{values: [1, 2]}", "neuron 'two': a direction has 2 values; hidden_size is 7"),
        ("{random: 2}", "{values: [0, 0, 0, 0, 0, 0, 0]}", "neuron 'two': direction 0 is zero"),
        ("{random: 2}", "{bank: no.safetensors, neuron: n}", "no.safetensors: no such file; expected a neuron bank"),
        ("    direction: {random: 2}\n", "", "neuron 'two': 'direction' is missing: what the neuron reads"),
        ("name: two", "name: one", "the bank names 'one' twice"),
        ("slopes: [0, 1]", "slopes: [0, much]", "neuron 'one', slopes, 1: Input should be a valid number"),
        ("knots: [0, 1]", "knots: [-1, 1]\n    range: 9", None),
        ("knots: [0]", "knots: [-1]", None),
        ("slopes: [0, 1]", "slopes: [1, -1]", "neuron 'one': up to 8 pairs of silu reach an error of 0."),
        ("hidden_size: 7", "hidden_size: 2", "hidden_size: Input should be greater than or equal to 3"),
        (
            "hidden_size: 7",
            "hidden_size: 7\nactivation: relu",
            "activation: Input should be 'silu', 'gelu' or 'gelu_tanh'",
        ),
        (SPEC, "- a list", "expected a mapping with the keys hidden_size, activation, neurons; got ['a list']"),
        (SPEC, "a: [", "not YAML"),
        (SPEC, 5000 * "[", "the YAML is nested too deeply"),
        (SPEC, 3000 * "{a: ", "the YAML is nested too deeply"),
        (SPEC, "hidden_size: 1" + 5000 * "0", "not YAML: Exceeds the limit"),
        (SPEC, "a: 2020-13-45", "not YAML: month must be in 1..12"),
        (SPEC, "a: !!int ''", "not YAML: string index out of range"),
        (SPEC, BOMB, "expected a mapping with the keys hidden_size, activation, neurons; got ["),
        (SPEC, f"hidden_size: 7\nneurons: [{{name: {9999 * 'n'}}}]", "nnn...nnn"),
        (SPEC, f"? {9999 * 'k'}\n: 1", "kkk...kkk"),
        ("slopes: [0, 1]", "slopes: [0, true]", "neuron 'one', slopes, 1: Input should be a valid number"),
        ("slopes: [0, 1]", "slopes: [0, '1']", "neuron 'one', slopes, 1: Input should be a valid number"),
        ("range: 2", "range: 1e3", "range: Input should be a valid number, got '1e3'; a number has no quotes, and an"),
        ("range: 2", "range: 1.0e+300", "neuron 'two': range 1e+300: expected a size from 1e-06 to 1e+06"),
        ("{random: 2}", "{random: true}", "neuron 'two', direction, random: Input should be a valid integer"),
        ("hidden_size: 7", "hidden_size: '7'", "hidden_size: Input should be a valid integer"),
    ],
)
def test_slips_in_the_file(tmp_path, old, new, message):
    path = write(tmp_path, SPEC.replace(old, new, 1))
    if message is None:  # knots below 0 that fit
        assert len(define_neurons(path)) == 2
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011  (compared below, as a whole text)
        define_neurons(path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 400


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such file; expected behaviours in YAML"):
        define_neurons(tmp_path / "none.yaml")


def test_a_function_that_is_not_odd_names_the_neuron(tmp_path):
    path = write(tmp_path, SPEC.replace("knots: [0, 1]", "knots: [-4, 0]", 1))
    with pytest.raises(ValueError, match="neuron 'one': not an odd function"):
        define_neurons(path)
