"""A model that decodes fast on a CPU: reads a prompt in PyTorch, then makes one token after the other, compiled.

Letters: V vocabulary, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from neuroweave.native.build import NativeUnavailableError
from neuroweave.runtime.compiled import CompiledProgram
from neuroweave.runtime.operations import Gather, Program, empty_caches
from neuroweave.runtime.reference import read, run_reference

CHUNK = 512  # tokens of a prompt that are read at once


class Engine:
    """A program and its caches. `positions`: how long a text may be. `compiled`: whether a compiler was found;
    `why_not` says why it was not."""

    def __init__(self, program: Program, *, positions: int, threads: int | None = None) -> None:
        if not 1 <= positions <= program.positions:
            raise ValueError(f"{positions} positions: this model has {program.positions}")
        self.program, self.positions, self.seen = program, positions, 0
        self.caches = empty_caches(program, positions)
        self.threads = torch.get_num_threads() if threads is None else threads
        self.why_not = ""
        self.runner: CompiledProgram | None = None
        try:
            self.runner = CompiledProgram(program, self.caches, self.threads)
        except NativeUnavailableError as error:
            self.why_not = str(error)

    @property
    def compiled(self) -> bool:
        return self.runner is not None

    def reset(self) -> None:
        """Forget the text. What the caches hold of it is never read again."""
        self.seen = 0

    def go_back(self, seen: int) -> bool:
        """Whether the first `seen` tokens of what was seen are all that is left of it now: a convolution's states
        belong to the last token alone."""
        if seen < self.seen and any(isinstance(op, Gather) for op in self.program.operations):
            return False
        self.seen = min(seen, self.seen)
        return True

    def with_room(self, positions: int) -> Engine:
        """One for a longer text, that has seen the same."""
        other = Engine(self.program, positions=positions, threads=self.threads)
        other.seen = self.seen
        for place, op in enumerate(self.program.operations):
            for ours, theirs in zip(self.caches.get(place, ()), other.caches.get(place, ()), strict=True):
                if isinstance(op, Gather):
                    theirs.copy_(ours)
                else:
                    theirs[:, : self.seen] = ours[:, : self.seen]
        return other

    def read_prompt(self, tokens: Sequence[int]) -> Float[Tensor, " V"]:
        """The logits after `tokens`, which follow what was seen before."""
        if not tokens:
            raise ValueError("there is no token to read")
        self.check_room(len(tokens))
        for start in range(0, len(tokens), CHUNK):
            part = list(tokens[start : start + CHUNK])
            state = run_reference(self.program, self.caches, part, self.seen)
            self.seen += len(part)
        return read(state, self.program.logits)[-1]

    def step(self, token: int) -> Float[Tensor, " V"]:
        """The logits after one more token; overwritten by the next step."""
        if self.runner is None:
            return self.read_prompt([token])
        self.check_room(1)
        self.runner.step(token, self.seen)
        self.seen += 1
        return self.runner.buffers[self.program.logits.buffer]

    def check_room(self, tokens: int) -> None:
        if self.seen + tokens > self.positions:
            raise ValueError(f"{self.seen + tokens} tokens, but there is room for {self.positions}")
