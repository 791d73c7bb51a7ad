"""Change a model that exists: recipes, the sites where they act, patching in memory and on disk.

`Recipe` and `patch` are the public names; they need PyTorch and transformers, so they are imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroweave.surgery.on_disk import patch_checkpoint
    from neuroweave.surgery.patching import Patch, patch, unpatch
    from neuroweave.surgery.recipe import Recipe

__all__ = ["Patch", "Recipe", "patch", "patch_checkpoint", "unpatch"]
_HOMES = {
    "Patch": "patching",
    "patch": "patching",
    "unpatch": "patching",
    "Recipe": "recipe",
    "patch_checkpoint": "on_disk",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"neuroweave.surgery.{_HOMES[name]}"), name)
