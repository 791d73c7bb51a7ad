"""A recipe: which sites of a model get which activation, in which layers. What a person writes, in YAML or Python.

    name: half-relu
    sites:
      - site: mlp
        activation: {segments: [relu, silu]}     # or the short form "relu|silu"
        layers: every 2nd

The recipe knows nothing of any model; `sites.py` resolves it on one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from neuroweave.activations.formulas import FORMULAS

LAYER_SITES = (
    "mlp",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
)
MODEL_SITES = ("embedding", "head")
SITES = (*LAYER_SITES, *MODEL_SITES)
EVERYWHERE = "everywhere"

ORDINAL = re.compile(r"every (\d+)(?:st|nd|rd|th)(?: from (\d+))?")
RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


def nearest(word: str, known: Any) -> str:
    """` (did you mean X?)` when something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def member_spec(member: Any) -> str | dict[str, Any]:
    """One activation that is not a mixture: a name, or `{"swish_beta": number}`, in canonical form."""
    if isinstance(member, dict) and list(member) == ["swish_beta"]:
        beta = member["swish_beta"]
        beta = beta.get("beta") if isinstance(beta, dict) else beta
        if isinstance(beta, bool) or not isinstance(beta, int | float):
            raise ValueError(f"swish_beta takes a number, got {beta!r}")
        return {"swish_beta": {"beta": float(beta)}}
    if not isinstance(member, str):
        raise ValueError(f"an activation is a name, got {member!r}")
    if member != "original" and member not in FORMULAS:
        known = [*FORMULAS, "original"]
        raise ValueError(f"activation {member!r} is not known{nearest(member, known)}; known: {', '.join(known)}")
    return member


def activation_spec(value: Any) -> str | dict[str, Any]:
    """Any activation that a recipe can hold, in canonical form. Raises ValueError with what is known."""
    if isinstance(value, str) and "|" in value:
        value = {"segments": [part.strip() for part in value.split("|")]}
    if isinstance(value, dict) and len(value) == 1:
        [(kind, settings)] = value.items()
        if kind == "segments":
            return {"segments": segment_settings(settings)}
        if kind == "mixture":
            return {"mixture": mixture_settings(settings)}
        if kind != "swish_beta":
            known = ("segments", "mixture", "swish_beta")
            raise ValueError(
                f"{kind!r} is not a kind of activation{nearest(str(kind), known)}; known: {', '.join(known)}"
            )
    return member_spec(value)


def several(kind: str, members: Any) -> list[Any]:
    if not isinstance(members, list | tuple) or len(members) < 2:
        raise ValueError(f"{kind} takes a list of at least two activations, got {members!r}")
    return list(members)


def segment_settings(settings: Any) -> list[Any] | dict[str, Any]:
    """A list of members where the segments are even, `{"members": [..], "sizes": [..]}` where they are not."""
    if not isinstance(settings, dict):
        return [member_spec(member) for member in several("segments", settings)]
    for key in settings:
        if key not in ("members", "sizes"):
            known = ("members", "sizes")
            raise ValueError(f"segments has no setting {key!r}{nearest(str(key), known)}; known: members, sizes")
    members = [member_spec(member) for member in several("segments", settings.get("members"))]
    sizes = settings.get("sizes")
    if sizes is None:
        return members
    whole = isinstance(sizes, list | tuple) and all(type(size) is int and size > 0 for size in sizes)
    if not whole or len(sizes) != len(members):
        raise ValueError(f"sizes takes {len(members)} whole numbers of at least 1, a segment's each; got {sizes!r}")
    return {"members": members, "sizes": list(sizes)}


def mixture_settings(settings: Any) -> dict[str, Any]:
    settings = {"members": settings} if isinstance(settings, list | tuple) else settings
    known = ("members", "start_logit", "hard")
    if not isinstance(settings, dict) or "members" not in settings:
        raise ValueError(f"mixture takes members (a list of activations), got {settings!r}")
    for key in settings:
        if key not in known:
            raise ValueError(f"mixture has no setting {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    result: dict[str, Any] = {"members": [member_spec(member) for member in several("mixture", settings["members"])]}
    if "start_logit" in settings:
        if not 0 < float(settings["start_logit"]) <= 50:
            raise ValueError(f"start_logit is between 0 and 50, got {settings['start_logit']!r}")
        result["start_logit"] = float(settings["start_logit"])
    if "hard" in settings:
        if not isinstance(settings["hard"], bool):
            raise ValueError(f"hard is true or false, got {settings['hard']!r}")
        result["hard"] = settings["hard"]
    return result


def site_names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"site is a name or a list of names, got {value!r}")
    for name in names:
        if name not in (*SITES, EVERYWHERE):
            known = (*SITES, EVERYWHERE)
            raise ValueError(f"site {name!r} is not known{nearest(str(name), known)}; known: {', '.join(known)}")
    return list(names)


def layer_selection(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, list) and any(isinstance(item, bool) for item in value)):
        raise ValueError(f"layers takes numbers, got {value!r}")
    if isinstance(value, int):
        return [value]
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        return list(value)
    text = value.strip() if isinstance(value, str) else ""
    if text == "all" or ORDINAL.fullmatch(text) or RANGE.fullmatch(text):
        return text
    if re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        return [int(number) for number in text.split(",")]
    raise ValueError(f'layers is "all", a list of numbers, a range such as 4-9, or "every 2nd from 1"; got {value!r}')


def select_layers(selection: str | list[int], count: int) -> list[int]:
    """The layer numbers that a selection means in a model of `count` layers. Raises ValueError for absent layers."""
    if selection == "all":
        return list(range(count))
    chosen: list[int]
    if isinstance(selection, list):
        chosen = sorted(set(selection))
    elif match := ORDINAL.fullmatch(selection):
        step, start = int(match[1]), int(match[2] or 0)
        if step < 1:
            raise ValueError(f"layers {selection!r}: the step must be at least 1")
        chosen = list(range(start, max(count, start + 1), step))
    else:
        match = RANGE.fullmatch(selection)
        first, last = (int(match[1]), int(match[2])) if match else (0, -1)
        if first > last:
            raise ValueError(f"layers {selection!r}: an empty range")
        chosen = list(range(first, last + 1))
    absent = [layer for layer in chosen if not 0 <= layer < count]
    if absent:
        raise ValueError(f"layer {absent[0]} does not exist: the model has layers 0 to {count - 1}")
    return chosen


ActivationField: TypeAlias = Annotated[str | dict[str, Any], BeforeValidator(activation_spec)]


class SiteEdit(BaseModel):
    """One line of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: Annotated[list[str], BeforeValidator(site_names)] = Field(
        description=f"a site or a list of sites: {', '.join(SITES)}; or `{EVERYWHERE}`, every site that the model has"
    )
    activation: ActivationField = Field(
        description="a name; several joined by | (even segments); {segments: [..]}; "
        "{segments: {members: [..], sizes: [..]}}; {mixture: {members: [..]}} "
        "(learned per neuron); {swish_beta: number}; `original` is the model's own"
    )
    layers: Annotated[Literal["all"] | str | list[int], BeforeValidator(layer_selection)] = Field(
        default="all", description='"all", a list of numbers, a range (4-9), or "every 2nd from 1"'
    )


class Recipe(BaseModel):
    """What to change in a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="custom", description="what the recipe is called in configs and reports", min_length=1)
    description: str = Field(default="", description="one sentence for people")
    sites: list[SiteEdit] = Field(description="the edits, in order; a later one replaces an earlier one", min_length=1)

    @classmethod
    def parse(cls, value: Any, *, source: str = "recipe") -> Recipe:
        """From plain data. Raises ValueError that says where, what came, and what is known."""
        if not isinstance(value, dict):
            raise ValueError(
                f"{source}: a recipe is a mapping with the keys {', '.join(cls.model_fields)}; got {value!r}"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{source}: {explain(error)}") from None

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """From a YAML file, or the name of a shipped recipe."""
        path = Path(source)
        if not path.is_file():
            shipped = shipped_recipes()
            if str(source) not in shipped:
                hint = nearest(str(source), shipped)
                raise ValueError(f"{source}: no such recipe file, nor a shipped one{hint}: {', '.join(shipped)}")
            path = shipped[str(source)]
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not YAML: {error}") from None
        return cls.parse(value, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()


def explain(error: ValidationError) -> str:
    """The first thing wrong, in one sentence, with the nearest name for a key that is not known."""
    problems = error.errors()
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    *place, key = [str(part) for part in problem["loc"]] or ["recipe"]
    where = ".".join(place)
    if problem["type"] == "extra_forbidden":
        known = (SiteEdit if place else Recipe).model_fields
        return (
            f"key {key!r}{' in ' + where if where else ''} is not known{nearest(key, known)}; known: {', '.join(known)}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join([*place, key])}: {message}"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with Neuroweave."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "recipes", here.parents[3] / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}
