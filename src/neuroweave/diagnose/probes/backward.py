"""One backward pass through a model, its gradients taken off as they come: about one is held at a time.

With a head, logits are computed a few positions at a time, and what the head itself uses is held until the end. A
vocabulary of 262,144 entries makes the head's weight the largest matrix of a small model, often the embedding too: its
gradient is there once, in one place, and what the embedding adds are the rows of the tokens that were read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuroweave.diagnose.probes.head import Head, head_rows, plain_projection
from neuroweave.diagnose.subject import Subject, evaluating


@dataclass(eq=False)
class Collector:
    """Norms of gradients by parameter name, in order of arrival.

    A gradient that comes through the head is not complete before the last chunk, nor, if the parameter has a place in
    the rest of the model too, before that was passed.
    """

    parameters: Mapping[str, nn.Parameter]
    norms: dict[str, float] = field(default_factory=dict)
    held: dict[str, nn.Parameter] = field(default_factory=dict)
    of_head: bool = False  # the backward pass that runs is one of several through the head

    def arrive(self, name: str, parameter: nn.Parameter) -> None:
        if self.of_head:
            self.held[name] = parameter
        else:
            self.finish(name, parameter)

    def finish(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self.norms[name] = gradient_norm(parameter.grad)
            parameter.grad = None

    def keep(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Take over a gradient that was made elsewhere; what comes later is added to it."""
        parameter.grad = gradient
        self.held |= {name: known for name, known in self.parameters.items() if known is parameter}


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, every parameter wants a gradient and has none, that of an embedding comes as the rows of its tokens;
    afterwards all is as before, and no hook is left.
    """
    embeddings = [module for module in model.modules() if gives_whole_gradient(module)]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with evaluating(model):
        try:
            for embedding in embeddings:
                embedding.sparse = True
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(True)
            yield
        finally:
            for embedding in embeddings:
                embedding.sparse = False
            for parameter, wanted, gradient in before:
                parameter.requires_grad_(wanted)
                parameter.grad = gradient


def gives_whole_gradient(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether `module` is an embedding whose gradient can come as rows instead."""
    return isinstance(module, nn.Embedding) and not module.sparse and not module.scale_grad_by_freq


@contextmanager
def taken_off(parameters: Mapping[str, nn.Parameter]) -> Iterator[Collector]:
    """Gradients that come inside are taken off and their norms kept; at the end no gradient and no hook is left."""
    collector = Collector(parameters)
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda arrived, name=name: collector.arrive(name, arrived))
        for name, parameter in parameters.items()
    ]
    try:
        yield collector
        for name, parameter in collector.held.items():
            collector.finish(name, parameter)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.grad = None


def backward(subject: Subject, ids: Int[Tensor, "1 tokens"], head: Head | None, collector: Collector) -> float:
    """Back-propagate the mean negative log-likelihood of one window; returns it, in nats per token.

    A loss that is not finite, or that no parameter takes part in, is not back-propagated.
    """
    model: Any = subject.model
    targets = ids[0, 1:]
    if head is None:
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits[0, :-1]
        loss = summed_loss(logits, targets) / len(targets)
        check_graph(subject, loss)
        if torch.isfinite(loss):
            loss.backward()
        return loss.item()
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1, return_dict=True)
    states = out.hidden_states[-1][0, :-1]
    rows = head_rows(out.logits.shape[-1], torch.finfo(loss_dtype(out.logits)).bits // 8)
    del out
    check_graph(subject, states)
    leaf = states.detach().requires_grad_()
    total = 0.0
    collector.of_head = True
    with added_in_place(plain_projection(head), collector):
        for first in range(0, len(targets), rows):
            chunk = slice(first, first + rows)
            loss = summed_loss(head(leaf[chunk]), targets[chunk]) / len(targets)
            total += loss.item()
            if not np.isfinite(total):
                return total
            loss.backward()
    collector.of_head = False
    states.backward(leaf.grad)
    return total


@contextmanager
def added_in_place(projection: nn.Linear | None, collector: Collector) -> Iterator[None]:
    """Inside, each call's gradient of the projection's weight is added to one matrix, which autograd would do with a
    matrix for the sum and another for the call. It is the collector's afterwards.
    """
    if projection is None:
        yield
        return
    weight: nn.Parameter = projection.weight  # type: ignore[assignment]  # torch says Tensor
    gradient: list[Tensor] = []

    def see_call(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        states = arguments[0].detach().flatten(0, -2)
        output.register_hook(lambda of_output: add(of_output.flatten(0, -2), states))

    def add(of_output: Float[Tensor, "tokens outputs"], states: Float[Tensor, "tokens inputs"]) -> None:
        if not gradient:
            gradient.append(torch.zeros_like(weight))
        gradient[0].addmm_(of_output.T, states)

    hook = projection.register_forward_hook(see_call)
    weight.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        weight.requires_grad_(True)
    if gradient:
        collector.keep(weight, gradient[0])


def loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def summed_loss(logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Negative log-likelihood in nats, added up, in float32 at least."""
    return nn.functional.cross_entropy(logits.to(loss_dtype(logits)), targets.to(logits.device), reduction="sum")


def gradient_norm(gradient: Tensor) -> float:
    """Euclidean norm; rows in float32 at least, then over rows in float64: no wide copy of a large gradient. Of one
    that is sparse, rows that stand for the same token are added up first."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    rows = gradient.reshape(-1, gradient.shape[-1]) if gradient.ndim > 1 else gradient.reshape(1, -1)
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).cpu().double()).item()


def check_graph(subject: Subject, result: Tensor) -> None:
    if not result.requires_grad:
        raise ValueError(
            f"{subject.name} cannot give gradients: its loss does not depend on its parameters in a way that autograd "
            "sees (a forward pass under no_grad?); leave the gradients out"
        )
