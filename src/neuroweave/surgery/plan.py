"""A recipe resolved on one model: the plan that `apply.py` carries out and that a patched checkpoint stores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from neuroweave.activations.mixtures import ActivationSpec
from neuroweave.surgery.apply import Edit, Plan
from neuroweave.surgery.recipe import EVERYWHERE, LAYER_SITES, Recipe, SiteEdit, select_layers
from neuroweave.surgery.sites import Place, decoder_stacks, describe_sites, find_sites


@dataclass(frozen=True)
class Resolution:
    """`plan`: what to do. `layers`: decoder layers changed at each site (0 for embedding and head). `left_out`: what an
    `everywhere` could not reach, in words."""

    plan: Plan
    layers: dict[str, int]
    left_out: list[str]


def resolve(model: PreTrainedModel, recipe: Recipe) -> Resolution:
    """The plan of a recipe on this model (a model on the meta device will do: only its structure is read).

    Raises ValueError for a site or layer that the model lacks, naming what is there.
    """
    places = find_sites(model)
    stacks = decoder_stacks(model)
    count = max(map(len, stacks))
    chosen: dict[Place, ActivationSpec] = {}
    left_out: list[str] = []
    for edit in recipe.sites:
        for site in edit.site:
            if site != EVERYWHERE:
                chosen.update(dict.fromkeys(select(site, edit, places, count, model), edit.activation))
                continue
            for each, found in places.items():
                if each in LAYER_SITES or edit.layers == "all":
                    asked = within(found, edit, count)
                    reached = [place for place in asked if place.op]
                    left_out += [f"{each} in {place.path}" for place in asked if not place.op]
                    chosen.update(dict.fromkeys(reached, edit.activation))
            left_out += [site for site in LAYER_SITES if site not in places]
    for place, activation in chosen.items():
        refuse_parameters(model, place, activation)
    edits = edits_of(chosen)
    if not edits:
        raise ValueError(f"recipe {recipe.name!r} changes nothing: every activation it names is the model's own")
    numbers: dict[str, set[int | None]] = {}
    for place in chosen:
        numbers.setdefault(place.site, set()).add(place.layer)
    return Resolution(
        plan=grouped(edits, [path for stack in stacks for path, _ in stack]),
        layers={site: len(found - {None}) for site, found in numbers.items()},
        left_out=sorted(set(left_out)),
    )


def select(
    site: str, edit: SiteEdit, places: dict[str, list[Place]], count: int, model: PreTrainedModel
) -> list[Place]:
    """The places of one site in the layers that were asked for."""
    if site not in places:
        raise ValueError(f"{model.config.model_type} has no site {site}; it has: {describe_sites(places)}")
    if site not in LAYER_SITES:
        if edit.layers != "all":
            raise ValueError(f"site {site} is not in a layer; leave out `layers` there")
        return places[site]
    found = within(places[site], edit, count)
    if isinstance(edit.layers, list) and (absent := set(edit.layers) - {place.layer for place in found}):
        there = sorted({place.layer for place in places[site] if place.layer is not None})
        raise ValueError(f"layer {min(absent)} has no site {site}; layers that have it: {there}")
    if not found:
        raise ValueError(f"no layer of {edit.layers!r} has site {site}")
    if inline := [place.path for place in found if not place.op]:
        raise ValueError(
            f"{inline[0]} computes its activation inside its own code, so site {site} does not reach it"
            + (f" (and {len(inline) - 1} more)" if len(inline) > 1 else "")
        )
    return found


def within(places: list[Place], edit: SiteEdit, count: int) -> list[Place]:
    numbers = set(select_layers(edit.layers, count))
    return [place for place in places if place.layer is None or place.layer in numbers]


def refuse_parameters(model: PreTrainedModel, place: Place, activation: ActivationSpec) -> None:
    """Raise ValueError for `original` inside a mixture where it has weights: they would change their names."""
    if not isinstance(activation, dict) or place.op != "activation":
        return
    settings: Any = activation.get("segments") or activation.get("mixture", {})
    members = settings.get("members", []) if isinstance(settings, dict) else settings
    if "original" in members and model.get_submodule(place.path).state_dict():
        raise ValueError(
            f"{place.path} has weights of its own, so 'original' cannot be a member of a mixture there; "
            f"name the other activations, or leave the site as it is"
        )


def edits_of(chosen: dict[Place, ActivationSpec]) -> list[Edit]:
    """One edit for each module: what was chosen for parts of the same projection is put together."""
    by_path: dict[str, list[tuple[Place, ActivationSpec]]] = {}
    for place, activation in chosen.items():
        if activation != "original":
            by_path.setdefault(place.path, []).append((place, activation))
    return [edit_of(path, entries) for path, entries in by_path.items()]


def edit_of(path: str, entries: list[tuple[Place, ActivationSpec]]) -> Edit:
    first = entries[0][0]
    edit: Edit = {"op": first.op, "site": [place.site for place, _ in entries], "path": path, "layer": first.layer}
    if first.op != "projection":
        return edit | settled(entries[0][1], first)
    for side in ("before", "after"):
        there = [(place, activation) for place, activation in entries if place.side == side]
        if side == "before" and there:
            place, activation = there[0]
            spec = settled(activation, place)
            edit |= {"before": spec.pop("activation")} | spec
        elif there:
            edit["after"] = parts_of(path, there)
    return edit


def parts_of(path: str, entries: list[tuple[Place, ActivationSpec]]) -> list[Edit]:
    """What runs after a projection: on the whole of it, or part by part where it is fused."""
    same = all(activation == entries[0][1] for _, activation in entries)
    elementwise = not isinstance(entries[0][1], dict) or "swish_beta" in entries[0][1]
    if entries[0][0].shared:
        if len(entries) < 3 or not same or not elementwise:
            raise ValueError(
                f"{path} holds q, k and v interleaved by head: give attention.q, attention.k and attention.v one "
                f"elementwise activation together, or leave all three as they are"
            )
        return [settled(entries[0][1], entries[0][0])]
    parts = [(place.part, activation, place) for place, activation in entries]
    if len(parts) == 3 and same and elementwise and all(part for part, _, _ in parts):
        return [settled(entries[0][1], entries[0][0])]
    result = []
    for part, activation, place in parts:
        where = {"start": part[0], "stop": part[1]} if part else {}
        result.append(settled(activation, place) | where)
    return result


def settled(activation: ActivationSpec, place: Place) -> Edit:
    """The activation with all that depends on the model filled in: a mixture's neutral member and its neurons."""
    if isinstance(activation, dict) and isinstance(activation.get("segments"), dict):
        sizes = activation["segments"]["sizes"]
        if place.neurons and sum(sizes) != place.neurons:
            raise ValueError(f"{place.path}: segments of {sizes} are {sum(sizes)} neurons; it has {place.neurons}")
    if not isinstance(activation, dict) or "mixture" not in activation:
        return {"activation": activation}
    settings = activation["mixture"]
    neutral = neutral_member(settings["members"], place.original)
    if neutral is None:
        raise ValueError(
            f"{place.path}: the mixture {settings['members']} holds no activation that equals the original there "
            f"({place.original or 'one without a name'}), so it would not start as the original model; add 'original'"
        )
    if not place.neurons:
        raise ValueError(f"{place.path}: the number of neurons could not be read off, so no neuron mixture fits there")
    return {"activation": {"mixture": {**settings, "neutral": neutral}}, "neurons": place.neurons}


def neutral_member(members: list[Any], original: str) -> int | None:
    """The index of the member that computes what the model computed before."""
    names = ["original", original] + (["swish_beta"] if original == "silu" else [])
    for name in names:
        if name and name in members:
            return members.index(name)
    return None


def grouped(edits: list[Edit], layers: list[str]) -> Plan:
    """Edits that differ in the layer number alone, as one with a list of layers. `layers`: paths of all layers."""
    groups: dict[str, Edit] = {}
    for edit in edits:
        number = edit.pop("layer")
        if number is not None:
            layer = next(path for path in layers if f"{edit['path']}.".startswith(f"{path}."))
            stack, _, index = layer.rpartition(".")
            number = int(index)  # in its list: a decoder of several stages has several
            edit["path"] = f"{stack}.{{}}" + edit["path"].removeprefix(layer)
        key = json.dumps(edit, sort_keys=True)
        group = groups.setdefault(key, edit | ({"layers": []} if number is not None else {}))
        if number is not None:
            group["layers"].append(number)
    return list(groups.values())
