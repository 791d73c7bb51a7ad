"""Patch a model in memory, and undo it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from neuroweave import __version__
from neuroweave.checkpoint.sealed import FORMAT_VERSION, KEY
from neuroweave.neuroblast.bundle import MODEL_TYPE as NEUROBLAST
from neuroweave.surgery.apply import apply_plan
from neuroweave.surgery.modeling import PatchedModel, adopt, model_class, release
from neuroweave.surgery.plan import Resolution, resolve
from neuroweave.surgery.recipe import Recipe

RecipeLike = Recipe | dict[str, Any] | str | Path


class Patch:
    """What `patch` did to a model. `undo()` puts the model back; as a context manager it does so at the end.

    `model`: the model. `recipe`: what was asked for. `resolution`: what it came to on this model.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, resolution: Resolution) -> None:
        self.model, self.recipe, self.resolution = model, recipe, resolution

    def undo(self) -> None:
        """Put back every activation, class and config field. Does nothing when the model is not patched any more."""
        if isinstance(self.model, PatchedModel):
            unpatch(self.model)

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(model: PreTrainedModel, recipe: RecipeLike) -> Patch:
    """Change the activations of this model instance as the recipe says; the returned handle can undo it.

    `recipe`: a `Recipe`, the dict of one, a YAML file, or the name of a shipped recipe. The model becomes an instance
    of a patched class of its family, so that `save_pretrained` writes a patched checkpoint and never a silent
    original. Raises ValueError, and leaves the model as it was, for sites or layers that it lacks.
    """
    recipe = as_recipe(recipe)
    refuse_unpatchable(model)
    resolution = resolve(model, recipe)
    base = type(model)
    undo = apply_plan(model, resolution.plan)
    adopt(model.config, entry_for(model, recipe, resolution))
    model.__class__ = model_class(base, type(model.config))
    model._neuroweave_undo = undo  # type: ignore[assignment]
    return Patch(model, recipe, resolution)


def unpatch(model: PreTrainedModel) -> None:
    """Make a patched model, loaded or patched in memory, the original again. Raises ValueError when it is not one."""
    if not isinstance(model, PatchedModel):
        raise ValueError(f"{type(model).__name__} is not a patched model")
    for undo in model._neuroweave_undo:
        undo()
    del model._neuroweave_undo
    model.__class__ = type(model).__mro__[2]
    release(model.config)


def as_recipe(recipe: RecipeLike) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.load(recipe) if isinstance(recipe, str | Path) else Recipe.parse(recipe)


def entry_for(model: PreTrainedModel, recipe: Recipe, resolution: Resolution) -> dict[str, Any]:
    """What a patched config keeps under `neuroweave`."""
    prefix = model.base_model_prefix
    return {
        "version": FORMAT_VERSION,
        "neuroweave_version": __version__,
        "base": {
            "model_type": type(model.config).model_type,
            "architectures": model.config.architectures or [type(model).__name__],
            "class": type(model).__name__,
            "prefix": f"{prefix}." if prefix and hasattr(model, prefix) else "",
        },
        "recipe": recipe.to_dict(),
        "plan": resolution.plan,
    }


def refuse_unpatchable(model: PreTrainedModel) -> None:
    """Raise ValueError for models in which a patch would be impossible, or silently without effect."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"patch takes a transformers model, got {type(model).__name__}; patch before wrapping it (PEFT, DDP)"
        )
    if isinstance(model, PatchedModel):
        name = model.config.neuroweave.get("recipe", {}).get("name", "?")
        raise ValueError(
            f"the model is already patched (recipe {name!r}); undo that first, or put both into one recipe"
        )
    foreign = hasattr(model.config, "auto_map") and model.config.model_type != NEUROBLAST
    if hasattr(model.config, KEY) or foreign:
        raise ValueError(
            "the model needs its own remote code; only families that transformers or neuroweave know can be patched"
        )
    for name, module in model.named_modules():
        forward = vars(module).get("forward", type(module).forward)
        if (getattr(forward, "__module__", None) or "").startswith("liger_kernel"):
            raise ValueError(
                f"{name}: its forward was replaced by Liger's, which hard-codes the activation and would drop the "
                f"patch without a word; load the model without use_liger_kernel"
            )
