"""Harden learned mixtures: each neuron keeps the activation it chose, and neurons of one choice become a segment.

In each MLP the neurons are put in order of their choice, which changes nothing of what it computes, and the mixture
becomes a segment mixture of uneven sizes: a plain recipe without parameters. A Swish with a beta of its own becomes a
silu, since x sigmoid(beta x) = silu(beta x) / beta: beta goes into the neuron's row of the gate and 1 / beta into its
column of the down projection. Letters: M neurons, C hidden size.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuroweave.activations.mixtures import ActivationSpec, NeuronMixture, build_activation
from neuroweave.checkpoint.loading import check_source, check_weights
from neuroweave.checkpoint.resaving import load_stored, save_like
from neuroweave.checkpoint.sealed import KEY, MODELING_FILE
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.surgery.apply import CalledActivation, paths_of, replace
from neuroweave.surgery.mlp_parts import MlpParts, find_mlp
from neuroweave.surgery.modeling import PatchedModel
from neuroweave.surgery.patching import patch, unpatch
from neuroweave.surgery.recipe import Recipe
from neuroweave.surgery.sites import Place, decoder_stacks, find_sites

LEAST_BETA = 1e-3  # a smaller one is taken for this: 1 / beta goes into the weights
TOLERANCE = 1e-2  # of an MLP's output, relative: reordering and scaling move rounding alone, in bfloat16 as well
TRIED = 64  # random hidden states
HISTORY = ("source", "calibration", "healing")


@dataclass
class HardenedLayer:
    """`chosen`: activation -> neurons, in the order of the segments. `lost`: |hard - soft| / |soft| of the MLP's output
    on random hidden states: what taking each neuron's largest weight alone does. `kept`: why the mixture stays a
    (hard) mixture, where it does."""

    path: str
    layer: int | None
    chosen: dict[str, int] = field(default_factory=dict)
    lost: float = 0.0
    kept: str = ""


@dataclass(frozen=True)
class Hardening:
    """`recipe`: of the model now; None where nothing but original activations is left."""

    layers: list[HardenedLayer]
    recipe: Recipe | None

    def as_dict(self) -> dict[str, Any]:
        recipe = None if self.recipe is None else self.recipe.to_dict()
        return {"layers": [asdict(layer) for layer in self.layers], "recipe": recipe}


@torch.no_grad()
def harden(model: PreTrainedModel) -> Hardening:
    """Replace the learned mixtures of a patched model, in place, by segments of the neurons that chose alike.

    Mixtures elsewhere than inside an MLP of known form stay, with `hard: true`: their neurons have a fixed place. Where
    every neuron chose its original activation, nothing is left of the patch: the model is no patched one any more.
    Raises ValueError for a model without learned mixtures.
    """
    mixtures = learned_mixtures(model)
    entry = copy.deepcopy(model.config.neuroweave)
    specs = {path: edit["activation"] for edit in entry["plan"] for path in paths_of(edit) if path in mixtures}
    unpatch(model)
    places = {place.path: place for place in find_sites(model).get("mlp", ()) if place.op}
    layers, edits = [], []
    for path, mixture in mixtures.items():
        place = places.get(path)
        done = HardenedLayer(path, None if place is None else place.layer)
        layers.append(done)
        try:
            if place is None:
                raise ValueError("not inside an MLP: its neurons have a fixed place")
            mlp = mlp_at(model, place, list(places.values()))
            activation = harden_mlp(mlp, mixture, specs[path]["mixture"]["members"], place.original, done)
        except ValueError as error:
            done.kept = str(error)
            continue
        activation = "original" if activation == place.original else activation
        edits.append({"site": "mlp", "layers": [done.layer], "activation": activation})
    recipe = hardened_recipe(entry["recipe"], edits, kept=any(layer.kept for layer in layers))
    if recipe is not None:
        patch(model, recipe)
    for layer in layers:
        if layer.kept:
            model.get_submodule(layer.path).load_state_dict(mixtures[layer.path].state_dict())
    return Hardening(layers, recipe)


def learned_mixtures(model: PreTrainedModel) -> dict[str, NeuronMixture]:
    """Path -> mixture. Raises ValueError for a model that has none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, NeuronMixture)}
    if not isinstance(model, PatchedModel) or not found:
        raise ValueError("the model has no learned mixture; harden takes one that was patched with a mixture")
    return found


def mlp_at(model: PreTrainedModel, place: Place, places: list[Place]) -> MlpParts:
    """The MLP around an activation. Raises ValueError, with the reason, where its neurons cannot be reordered."""
    if sum(other.layer == place.layer for other in places) > 1:
        raise ValueError("several MLPs in one layer")
    layer = next(
        module for stack in decoder_stacks(model) for path, module in stack if place.path.startswith(f"{path}.")
    )
    mlp = find_mlp(model, layer)
    if mlp.gate is None:
        raise ValueError("what its activation reads is no plain matrix")
    return mlp


def harden_checkpoint(source: str | Path, out: str | Path, *, overwrite: bool = False) -> Hardening:
    """Write `out`: the patched folder `source` with its learned mixtures hardened, and the recipe as `recipe.yaml`.

    What the config recorded of its making (source, calibration, healing) comes along. Raises ValueError, before
    anything is written, for a folder that is not a checkpoint or has no learned mixture.
    """
    source = Path(source)
    check_source(source)
    check_weights(source)
    check_output(out, overwrite=overwrite, sources=[source])
    model = load_stored(source)
    history = {key: value for key, value in getattr(model.config, KEY, {}).items() if key in HISTORY}
    done = harden(model)
    with staged_folder(out, overwrite=overwrite, sources=[source]) as folder:
        check_free_space(folder, sum(parameter.nbytes for parameter in model.parameters()))
        if done.recipe is not None:
            entry: dict[str, Any] = model.config.neuroweave
            entry |= history | {"hardening": {"layers": [asdict(layer) for layer in done.layers]}}
            (folder / "recipe.yaml").write_text(
                yaml.safe_dump(done.recipe.to_dict(), sort_keys=False), encoding="utf-8"
            )
        save_like(model, source, folder, leave=() if done.recipe is not None else (MODELING_FILE,))
    return done


# --------------------------------------------------------------------------------------------------------- one MLP


def harden_mlp(
    mlp: MlpParts, mixture: NeuronMixture, members: list[Any], original: str, done: HardenedLayer
) -> ActivationSpec:
    """Reorder the MLP's neurons, and give the activation that then stands for the mixture.

    Raises ValueError, and leaves the MLP as it was, where that does not give what the hard mixture gives.
    """
    chosen, beta = mixture.choices(), folded_beta(mixture)
    names = [canonical(member, original, learned=k == mixture.swish) for k, member in enumerate(members)]
    kinds = list({json.dumps(names[k]): names[k] for k in range(len(names)) if (chosen == k).any()}.values())
    segment_M = torch.tensor([kinds.index(name) if name in kinds else -1 for name in names])[chosen.cpu()]
    order = segment_M.argsort(stable=True).to(chosen.device)
    sizes = torch.bincount(segment_M, minlength=len(kinds)).tolist()
    activation = segments(kinds, sizes)
    soft = with_activation(mlp, mixture)
    was_hard, mixture.hard = mixture.hard, True
    hard = with_activation(mlp, mixture)
    mixture.hard = was_hard
    weights = (*mlp.neuron_rows(), mlp.down.weight)
    before = [weight.detach().clone() for weight in weights]
    mlp.scale(beta, 1 / beta)
    mlp.reorder(order)
    kept = mlp.activation if isinstance(mlp.activation, nn.Module) else CalledActivation(mlp.activation)
    found = with_activation(mlp, build_activation(activation, original=kept))
    if not relative(found, hard) < TOLERANCE:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
        raise ValueError("its neurons are not free to move: something between the projections knows their order")
    done.chosen = {as_text(kind): size for kind, size in zip(kinds, sizes, strict=True)}
    done.lost = relative(hard, soft)
    return activation


def folded_beta(mixture: NeuronMixture) -> Float[Tensor, " M"]:
    """beta of the neurons that chose the learned Swish, 1 for the others; at least `LEAST_BETA` from zero."""
    ones = torch.ones_like(mixture.gating_logits[:, 0])
    if mixture.beta is None:
        return ones
    away = torch.where(mixture.beta < 0, -1.0, 1.0) * mixture.beta.abs().clamp(min=LEAST_BETA)
    return torch.where(mixture.choices() == mixture.swish, away, ones)


def canonical(member: Any, original: str, *, learned: bool) -> Any:
    """A member as a segment's activation: silu for a Swish of its own beta, the original by its name."""
    if learned:
        return "silu"
    return original if member == "original" and original else member


def segments(kinds: list[Any], sizes: list[int]) -> ActivationSpec:
    if len(kinds) == 1:
        return kinds[0]
    return {"segments": {"members": kinds, "sizes": sizes}}


def with_activation(mlp: MlpParts, activation: nn.Module) -> Tensor:
    """What the MLP gives for random hidden states [1, TRIED, C] when it runs `activation`."""
    assert mlp.gate is not None
    weight: Any = mlp.gate.weight
    generator = torch.Generator().manual_seed(0)
    x_BTC = torch.randn(1, TRIED, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    undo = replace(mlp.block, mlp.path.rpartition(".")[2], activation)
    try:
        y = mlp.block(x_BTC)
    except TypeError as error:
        raise ValueError(f"its forward takes more than hidden states ({error})") from error
    finally:
        undo()
    return (y[0] if isinstance(y, tuple) else y).float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def as_text(kind: Any) -> str:
    return kind if isinstance(kind, str) else json.dumps(kind)


# ---------------------------------------------------------------------------------------------------------- recipe


def hardened_recipe(recipe: dict[str, Any], edits: list[dict[str, Any]], *, kept: bool) -> Recipe | None:
    """The recipe with each layer's segments; mixtures that stay are hard. None where it would change nothing."""
    sites = []
    for site in recipe["sites"]:
        mixed = isinstance(site["activation"], dict) and "mixture" in site["activation"]
        if mixed and not kept and site["site"] == ["mlp"]:
            continue  # every place of it is in `edits`
        sites.append(site | {"activation": hard(site["activation"])} if mixed else site)
    together: dict[str, dict[str, Any]] = {}
    for edit in edits:
        if not sites_reach_mlp(sites) and edit["activation"] == "original":
            continue
        group = together.setdefault(json.dumps(edit["activation"]), edit | {"layers": []})
        group["layers"] += edit["layers"]
    if not sites and not together:
        return None
    name = f"{recipe['name']}, hardened"
    return Recipe.parse({"name": name, "sites": [*sites, *together.values()]}, source="hardened recipe")


def sites_reach_mlp(sites: list[dict[str, Any]]) -> bool:
    return any({"mlp", "everywhere"} & set(site["site"]) for site in sites)


def hard(activation: dict[str, Any]) -> dict[str, Any]:
    return {"mixture": activation["mixture"] | {"hard": True}}
