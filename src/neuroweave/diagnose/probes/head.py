"""A model's output head by itself: logits of a few positions at a time from the last hidden state.

A vocabulary of 262,144 entries at 512 positions is half a gigabyte of logits a model; what is computed from them needs
a few rows at a time. The head is found by what the model does, not by its class: a candidate counts only if it gives
the logits that a forward pass gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]
CHUNK_BYTES = 1 << 26  # of logits
_CLOSE = 1e-3  # of the largest logit; another scale or a missing soft cap is off by far more


def unscaled(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True, eq=False)
class OutputHead:
    """The output projection of a model and what its family does to the logits after it."""

    projection: nn.Module
    scale: Callable[[Tensor], Tensor] = unscaled

    def __call__(self, states: Tensor) -> Tensor:
        return self.scale(self.projection(states))


def plain_projection(head: Head | None) -> nn.Linear | None:
    """The projection of `head` where it is a linear layer and nothing else: not patched, adapted or quantized."""
    module = head.projection if isinstance(head, OutputHead) else head
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    return module


def find_head(model: nn.Module, out: Any) -> OutputHead | None:
    """A function from last hidden states [tokens, width] to logits [tokens, vocabulary], in the model's dtype.

    `out`: of a forward pass with hidden states, to try candidates on. None when no candidate gives the model's own
    logits, or the model cannot leave out logits of a forward pass.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    module = find() if find else None
    if module is None or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    states = getattr(out, "hidden_states", None)
    if not states or not torch.isfinite(out.logits).all():
        return None
    for head in candidates(model, module):
        logits = head(states[-1][0])
        wanted = out.logits[0]
        if logits.shape == wanted.shape and (logits - wanted).abs().max() <= _CLOSE * wanted.abs().max():
            return head
    return None


def candidates(model: nn.Module, module: nn.Module) -> Iterator[OutputHead]:
    """The output projection by itself, and with each of the scalings that families put after it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    cap, scale, divisor = (
        getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    yield OutputHead(module)
    if isinstance(cap, int | float) and cap:  # Gemma 2
        yield OutputHead(module, lambda logits: torch.tanh(logits / cap) * cap)
    if isinstance(scale, int | float):  # Cohere
        yield OutputHead(module, lambda logits: logits * scale)
    if isinstance(divisor, int | float) and divisor:  # Granite
        yield OutputHead(module, lambda logits: logits / divisor)


def head_rows(vocabulary: int, itemsize: int = 4) -> int:
    """Positions whose logits take about `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (vocabulary * itemsize))
