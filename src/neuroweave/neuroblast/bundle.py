"""The modules that a NeuroBLAST checkpoint carries in one file, for `trust_remote_code`."""

from __future__ import annotations

from neuroweave.checkpoint.self_contained import join_modules

MODEL_TYPE = "neuroblast"
MODULES = (
    ("neuroblast", "layer_plan.py"),
    ("neuroblast", "configuration.py"),
    ("neuroblast", "convolution.py"),
    ("neuroblast", "modeling.py"),
)


def bundle() -> str:
    """The modelling file of a NeuroBLAST checkpoint."""
    return join_modules(MODULES)
