"""Gated MLPs run fused while a model is trained, where that is faster or smaller; `NEUROWEAVE_FUSED=0` turns it off."""

from __future__ import annotations

import torch
from torch import nn

from neuroweave.activations.fused_glu import FusedMlps, fuse_glu, has_triton
from neuroweave.native.build import available


def fuse_mlps(model: nn.Module, *, device: str, precision: torch.dtype) -> FusedMlps:
    """Fuse what has kernels on this device: C++ for float32 on CPUs, Triton on GPUs. Elsewhere nothing is changed:
    the PyTorch form keeps less for the backward pass, and takes longer.

    Processes that get their weights later (FSDP) fuse as well, or processes would round differently.
    """
    if device == "cuda":
        return fuse_glu(model, without_weights=True) if has_triton() else FusedMlps()
    native = device == "cpu" and precision == torch.float32 and available()
    return fuse_glu(model, without_weights=True) if native else FusedMlps()
