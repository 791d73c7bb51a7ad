"""The modules that a patched checkpoint carries in one file, for `trust_remote_code`."""

from __future__ import annotations

from neuroweave.checkpoint.self_contained import join_modules
from neuroweave.neuroblast import bundle as neuroblast

MODULES = (
    ("activations", "formulas.py"),
    ("activations", "torch.py"),
    ("activations", "mixtures.py"),
    ("checkpoint", "sealed.py"),
    ("surgery", "apply.py"),
    ("surgery", "modeling.py"),
)


def bundle(model_type: str = "") -> str:
    """The modelling file of a patched checkpoint; `model_type`: what was patched, whose code comes along if ours."""
    if model_type == neuroblast.MODEL_TYPE:
        return join_modules((*neuroblast.MODULES, *MODULES), ending="register_neuroblast()")
    return join_modules(MODULES)
