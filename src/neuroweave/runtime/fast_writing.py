"""`neuroweave generate --fast`: a model that continues text in the fast runtime, in the place of a transformers one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, set_seed

from neuroweave.native.build import SWITCH
from neuroweave.runtime.engine import Engine
from neuroweave.runtime.lowering import UnsupportedModelError, lower
from neuroweave.runtime.operations import Program
from neuroweave.runtime.prefix_cache import shared
from neuroweave.runtime.sparse_mlps import sparsify
from neuroweave.runtime.sparsity import thresholds_on_prose
from neuroweave.runtime.token_choice import check_sampling, chooser, refuse_unknown
from neuroweave.runtime.writing import Continuation, StopWriting, Stream, Writer, check_device, load_causal

WAY_OUT = "leave --fast out"


@dataclass(frozen=True)
class LoweredModel:
    """What a `Writer` asks of a model, and its program."""

    config: Any
    generation_config: GenerationConfig
    program: Program
    size: int  # parameters of the model that it was made from


@dataclass(eq=False)
class KeptEngine:
    """The engine of the last text, and what it has seen of it."""

    program: Program
    engine: Engine | None = None
    seen: list[int] = field(default_factory=list)
    why_none: str = ""

    def begin(self, ids: Sequence[int], positions: int) -> Engine:
        """An engine that has seen as much of `ids` as is known, but not all; it is not known before `put`."""
        known, self.seen = shared(self.seen, ids[:-1]), []
        if self.engine is None:
            self.engine = Engine(self.program, positions=positions)
        elif not self.engine.go_back(known):
            self.engine.reset()
        if self.engine.positions < positions:
            longer = min(2 * self.engine.positions, self.program.positions)
            self.engine = self.engine.with_room(max(longer, positions))
        return self.engine

    def put(self, text: Sequence[int]) -> None:
        assert self.engine is not None
        self.seen = list(text[: self.engine.seen])


class FastWriter(Writer):
    """As `Writer`, its tokens made by the fast runtime."""

    @classmethod
    def load(
        cls, source: str, *, assistant: str | None = None, dtype: str = "auto", device: str = "auto",
        weights: str = "float32", sparse: float | None = None,
    ) -> Writer:  # fmt: skip
        """`weights`: the format of matrices. `sparse`: the share of the MLPs' neurons that are skipped. On a GPU:
        transformers with a static cache, which it compiles, and `sparse_mlps`. That has not been run.

        Raises ValueError for a model that the runtime has no program for, and for what it does not do.
        """
        if assistant is not None:
            raise ValueError(f"--assistant is not for the fast runtime; {WAY_OUT}")
        check_device(device)
        if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
            if weights != "float32":
                raise ValueError("--weights is for CPUs; leave it out, or give --device cpu")
            model, tokenizer, how = load_causal(source, dtype, device)
            thresholds, told = skipped_neurons(model, tokenizer, sparse)
            if thresholds and (left := sparsify(model, thresholds).left):
                told += f", {len(left)} of which run dense: {next(iter(left.values()))}"
            return Writer(source, model, tokenizer, f"{how}, static cache{told}", {"cache_implementation": "static"})
        if device not in ("auto", "cpu"):
            raise ValueError(f"--device {device}: the fast runtime is for cpu and cuda; {WAY_OUT}")
        if dtype not in ("auto", "float32"):
            raise ValueError(f"--dtype {dtype}: the fast runtime computes in float32; --weights rounds the weights")
        model, tokenizer, _ = load_causal(source, "float32", "cpu")
        thresholds, told = skipped_neurons(model, tokenizer, sparse)
        try:
            program = lower(model, format=weights, thresholds=thresholds)
        except UnsupportedModelError as error:
            raise ValueError(f"{error}; {WAY_OUT}") from error
        engine = Engine(program, positions=1)
        how = f"fast runtime on cpu, weights {weights}{told}" + (
            "" if engine.compiled else f", in PyTorch: {engine.why_not}"
        )
        return cls(
            source,
            LoweredModel(model.config, model.generation_config, program, model.num_parameters()),
            tokenizer,
            how,
            {},
            "" if engine.compiled or os.environ.get(SWITCH) == "0" else f"not compiled, so slower: {engine.why_not}",
        )

    def remembering(self) -> Writer:
        return replace(self, prefixes=KeptEngine(self.model.program))

    def parameters(self) -> int:
        return self.model.size

    def write(
        self, ids: Sequence[int], config: GenerationConfig, *, seed: int, show: Callable[[str], object]
    ) -> Continuation:
        if config.prompt_lookup_num_tokens:
            raise ValueError(f"--prompt-lookup is not for the fast runtime; {WAY_OUT}")
        refuse_unknown(config, WAY_OUT)
        check_sampling(config)
        kept = self.prefixes or KeptEngine(self.model.program)
        engine = kept.begin(ids, len(ids) + config.max_new_tokens)
        choose = chooser(config, self.source)
        stream, ends = Stream(self.tokenizer, show), set(config.eos_token_id or [])
        stream.put(torch.tensor([list(ids)]))
        stream.started = time.perf_counter()
        set_seed(seed)
        text = list(ids)
        logits = engine.read_prompt(text[engine.seen :])
        try:
            while True:
                text.append(choose(text, logits))
                stream.put(torch.tensor([text[-1]]))
                if text[-1] in ends or len(text) == len(ids) + config.max_new_tokens:
                    break
                logits = engine.step(text[-1])
            stream.end()
        except StopWriting:
            kept.put(text)
            raise
        kept.put(text)
        return self._describe(text[len(ids) :], config, stream)


def skipped_neurons(model: Any, tokenizer: Any, share: float | None) -> tuple[dict[int, Tensor], str]:
    """(thresholds by layer, what to say of them), found on shipped prose."""
    if share is None:
        return {}, ""
    found = thresholds_on_prose(model, tokenizer, share)
    kept = found.worth_it()
    return kept, f", {found.mean_share:.0%} of the neurons skipped, in {len(kept)} of {len(found.shares)} layers"
