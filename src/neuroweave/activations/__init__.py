"""What a neuron does: each formula once (`formulas`), mixtures of them, and the bindings for each framework.

`FORMULAS` needs no framework; `neuroweave.activations.torch` and `.mixtures` need PyTorch.
"""

from neuroweave.activations.formulas import FORMULAS, Primitives

__all__ = ["FORMULAS", "Primitives"]
