"""Run a decoder one layer at a time over many windows of text, its hidden states on the disk in between.

Any model whose layers run one after the other works: the model's own forward is called, with the layers before the one
that is wanted handing on stored hidden states, and the pass ended behind it. So masks, positions and whatever else a
layer is given are the model's own. Letters: N windows, T tokens of each, C hidden size.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuroweave.surgery.sites import decoder_stacks, text_decoder


class _BehindTheLayer(Exception):  # noqa: N818
    """Ends a pass early; no error."""


class LayerStream:
    """The hidden states [N, T, C] that enter layer `at` of a model, and the way to the next one.

    `model` keeps its weights in the dtype that it was loaded in (mapped from the disk, where it was so loaded); one
    layer at a time is copied to float32. Use as a context manager: the files in `folder` go at the end.
    Raises ValueError for a model whose layers do not hand on one tensor each.
    """

    def __init__(self, model: PreTrainedModel, windows_NT: Tensor, *, folder: Path, batch: int = 4) -> None:
        self.model, self.windows_NT, self.batch = model.eval(), windows_NT, batch
        stacks = decoder_stacks(model)
        if len(stacks) != 1:
            raise ValueError(f"{type(model).__name__} has {len(stacks)} lists of decoder layers; expected one decoder")
        self.paths, self.layers = [path for path, _ in stacks[0]], [layer for _, layer in stacks[0]]
        inside = {id(tensor) for layer in self.layers for tensor in (*layer.parameters(), *layer.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in inside and tensor.is_floating_point():
                tensor.data = tensor.data.float()
        self.at = 0
        self._folder = Path(tempfile.mkdtemp(prefix="stream-", dir=folder))
        self._states: np.memmap | None = None
        self._working: nn.Module | None = None
        self.entered = torch.empty(0)  # what the present layer got in the last pass

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._states = None
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def layer(self) -> nn.Module:
        """The present layer in float32: a copy, or itself where it is in float32 already."""
        if self._working is None:
            original = self.layers[self.at]
            plain = all(parameter.dtype == torch.float32 for parameter in original.parameters())
            self._working = original if plain else copy.deepcopy(original).float()
        return self._working

    def batches(self) -> Iterator[slice]:
        """The windows in batches."""
        for start in range(0, len(self.windows_NT), self.batch):
            yield slice(start, min(start + self.batch, len(self.windows_NT)))

    @torch.no_grad()
    def run(self, rows: slice, *, until: nn.Module | None = None) -> Tensor:
        """The present layer's output [B, T, C] for some windows; `until`: a module in it behind which the pass ends
        already, and whose output is returned."""
        output: list[Tensor] = []

        def end(_: nn.Module, __: Any, result: Tensor) -> None:
            output.append(result)
            raise _BehindTheLayer

        handle = None if until is None else until.register_forward_hook(end)
        try:
            with suppress(_BehindTheLayer), self._short_circuit(rows, output):
                text_decoder(self.model)(input_ids=self.windows_NT[rows], use_cache=False)
        finally:
            if handle is not None:
                handle.remove()
        return output[0]

    def stored(self, rows: slice) -> Tensor:
        """The hidden states [B, T, C] that enter the present layer."""
        assert self._states is not None, "before the first layer there is nothing stored"
        return torch.from_numpy(np.array(self._states[rows]))

    def advance(self, outputs: Callable[[slice], Tensor] | None = None) -> None:
        """Store the present layer's output for all windows and go on to the next; `outputs`: in place of `run`."""
        made, path = outputs or self.run, self._folder / f"{self.at + 1}.f32"
        states: np.memmap | None = None
        for rows in self.batches():
            out = made(rows)
            if states is None:
                states = np.memmap(path, np.float32, "w+", shape=(len(self.windows_NT), *out.shape[1:]))
            states[rows] = out.numpy()
        self._states, self._working = states, None
        (self._folder / f"{self.at}.f32").unlink(missing_ok=True)
        self.at += 1

    @contextmanager
    def _short_circuit(self, rows: slice, output: list[Tensor]) -> Iterator[None]:
        """The layers before the present one hand on what is stored, and the pass ends behind it."""
        working, entering = self.layer, self.stored(rows) if self.at else None

        def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return hidden_states

        def present(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            given = self.entered = hidden_states.float() if entering is None else entering
            result = type(working).forward(working, given, *args, **kwargs)
            first = result[0] if isinstance(result, tuple) else result
            if not isinstance(first, Tensor) or first.shape != given.shape:
                raise ValueError(
                    f"{type(working).__name__} does not hand on hidden states of the shape that it got, so the model "
                    f"cannot be run layer by layer"
                )
            output.append(first)
            raise _BehindTheLayer

        for number, layer in enumerate(self.layers[: self.at + 1]):
            layer.__dict__["forward"] = present if number == self.at else skip
        try:
            yield
        finally:
            for layer in self.layers[: self.at + 1]:
                del layer.__dict__["forward"]


@contextmanager
def listening(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """(input, output) of each module in the passes within the block, the last one's."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        given: Any = inputs[0] if inputs else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        seen[module] = (given, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bypassed(module: nn.Module) -> Iterator[None]:
    """The module hands on what it gets."""
    handle = module.register_forward_hook(lambda _, given, __: given[0])
    try:
        yield
    finally:
        handle.remove()
