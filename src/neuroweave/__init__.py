"""Neuroweave: change the neurons of a language model and know what the change did.

Importing this package lets transformers load patched checkpoints: `AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

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


class _Registrar:
    """Once transformers' Auto classes are there (not before: importing them takes seconds), adds patched checkpoints.

    A finder that lets the module be found as usual and has its loader go on with the registration. (wrapt has import
    hooks too, but takes 80 ms to import, as long as NumPy: measured, 2026-11-23.)
    """

    name = "transformers.models.auto.modeling_auto"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: Any) -> None:
            load(module)
            self.register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]  # of this one loader object
        return spec

    @staticmethod
    def register() -> None:
        import neuroweave.neuroblast.modeling
        import neuroweave.neuroblast.published
        import neuroweave.surgery.modeling  # noqa: F401  (they register at the end of their import)


if _Registrar.name in sys.modules:
    _Registrar.register()
else:
    sys.meta_path.insert(0, _Registrar())
