"""Neuroweave: change the neurons of a language model and know what the change did.

Importing this package lets transformers load patched checkpoints: `AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from neuroweave.surgery.on_disk import patch_checkpoint
    from neuroweave.surgery.patching import Patch, patch, unpatch
    from neuroweave.surgery.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Patch", "Recipe", "patch", "patch_checkpoint", "unpatch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import neuroweave.surgery

        return getattr(neuroweave.surgery, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def register_patched_models(_: Any) -> None:
    """Once transformers' Auto classes are there (not before: importing them takes seconds), add patched checkpoints."""
    import neuroweave.surgery.modeling  # noqa: F401  (registers at the end of its import)
