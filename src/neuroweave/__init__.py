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
    """Once transformers' AutoConfig is there (not before: it takes seconds), adds NeuroBLAST and patched checkpoints.

    A finder that lets transformers' modules be found as usual and, when the last of those that import each other has
    been executed, registers. (wrapt has import hooks too, but takes 80 ms to import, as long as NumPy: measured,
    2026-11-23.)
    """

    name = "transformers.models.auto.configuration_auto"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith("transformers.") or fullname in self.asked:
            return None
        self.asked.add(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: Any) -> None:
            load(module)
            if self in sys.meta_path and self.name in sys.modules and not self.unfinished(fullname):
                sys.meta_path.remove(self)
                self.register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]  # of this one loader object
        return spec

    def __init__(self) -> None:
        self.asked: set[str] = set()

    @staticmethod
    def unfinished(but: str) -> bool:
        """Whether a module of transformers other than `but` is being imported: it would be found half made."""
        return any(
            name.startswith("transformers.") and name != but and getattr(module.__spec__, "_initializing", False)
            for name, module in list(sys.modules.items())
            if getattr(module, "__spec__", None) is not None
        )

    @staticmethod
    def register() -> None:
        import neuroweave.neuroblast.modeling
        import neuroweave.neuroblast.published
        import neuroweave.surgery.modeling  # noqa: F401  (they register at the end of their import)


if _Registrar.name in sys.modules:
    _Registrar.register()
else:
    sys.meta_path.insert(0, _Registrar())
