"""Recipes: what they may say, what they come to, and what is answered to a slip."""

import pytest
import yaml

from neuroweave.surgery.recipe import Recipe, select_layers, shipped_recipes

SHIPPED = {
    "automixed-relu-silu",
    "automixed-relu-gelu-silu",
    "silu-tanh-mlp",
    "silu-tanh-everywhere",
    "phantom-mlp",
    "phantom-everywhere",
    "learned-mixture",
}


def edit(**fields):
    return {"sites": [{"site": "mlp", "activation": "relu"} | fields]}


def test_the_shipped_recipes_are_there_and_load():
    assert set(shipped_recipes()) == SHIPPED
    for name in SHIPPED:
        assert Recipe.load(name).name == name


def test_a_file_round_trips(tmp_path):
    recipe = Recipe.parse(edit(activation={"mixture": ["original", {"swish_beta": 1.7}]}, layers="every 2nd from 1"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("phantom", "phantom"),
        ("relu|silu", {"segments": ["relu", "silu"]}),
        ("relu | gelu|silu", {"segments": ["relu", "gelu", "silu"]}),
        ({"segments": {"members": ["relu", "silu"]}}, {"segments": ["relu", "silu"]}),
        (
            {"segments": {"members": ["relu", "silu"], "sizes": [3, 4]}},
            {"segments": {"members": ["relu", "silu"], "sizes": [3, 4]}},
        ),
        ({"swish_beta": 2}, {"swish_beta": {"beta": 2.0}}),
        ({"mixture": ["original", "relu"]}, {"mixture": {"members": ["original", "relu"]}}),
    ],
)
def test_short_forms(given, canonical):
    assert Recipe.parse(edit(activation=given)).sites[0].activation == canonical


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        (3, [3]),
        ([5, 1, 5], [1, 5]),
        ("2-4", [2, 3, 4]),
        ("every 2nd", [0, 2, 4, 6]),
        ("every 3rd from 1", [1, 4]),
        ("0, 6", [0, 6]),
    ],
)
def test_layers(selection, layers):
    assert select_layers(Recipe.parse(edit(layers=selection)).sites[0].layers, 7) == layers


@pytest.mark.parametrize("selection", [[7], "5-9", "every 2nd from 8", 100])
def test_absent_layers(selection):
    with pytest.raises(ValueError, match=r"layer \d+ does not exist: the model has layers 0 to 6"):
        select_layers(Recipe.parse(edit(layers=selection)).sites[0].layers, 7)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"nmae": "x", **edit()}, r"recipe: key 'nmae' is not known \(did you mean 'name'\?\)"),
        (edit(activtion="relu"), r"key 'activtion' in sites.0 is not known \(did you mean 'activation'\?\)"),
        (edit(site="mpl"), r"sites.0.site: site 'mpl' is not known \(did you mean 'mlp'\?\); known: mlp, mlp.gate"),
        (
            edit(activation="phantm"),
            r"sites.0.activation: activation 'phantm' is not known \(did you mean 'phantom'\?\)",
        ),
        (edit(activation={"segmnts": ["relu", "silu"]}), r"did you mean 'segments'"),
        (edit(activation={"segments": ["relu"]}), "at least two activations"),
        (edit(activation={"segments": {"members": ["relu", "silu"], "size": [1, 2]}}), r"did you mean 'sizes'"),
        (edit(activation={"segments": {"members": ["relu", "silu"], "sizes": [1, 0]}}), "sizes takes 2 whole numbers"),
        (edit(activation={"mixture": {"members": ["relu", "silu"], "hrd": True}}), r"did you mean 'hard'"),
        (edit(activation={"swish_beta": "x"}), "swish_beta takes a number, got 'x'"),
        (edit(activation={"swish_beta": True}), "swish_beta takes a number, got True"),
        (edit(layers="every other"), 'layers is "all", a list of numbers, a range such as 4-9'),
        (edit(layers=True), "layers takes numbers, got True"),
        ({"sites": []}, "sites: List should have at least 1 item"),
        ({}, "sites: Field required"),
        ([], r"a recipe is a mapping with the keys name, description, sites; got \[\]"),
    ],
)
def test_slips_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(value)


def test_a_recipe_that_is_nowhere(tmp_path):
    with pytest.raises(
        ValueError, match=r"phantom-ml: no such recipe file, nor a shipped one \(did you mean 'phantom-mlp'"
    ):
        Recipe.load("phantom-ml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml: not YAML"):
        Recipe.load(tmp_path / "bad.yaml")
