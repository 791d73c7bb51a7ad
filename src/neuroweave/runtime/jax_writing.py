"""`neuroweave generate --backend jax`: a NeuroBLAST model that continues text in JAX, in the place of a torch one."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GenerationConfig

from neuroweave.checkpoint.hub import local_folder
from neuroweave.checkpoint.loading import check_source, check_weights, load_tokenizer
from neuroweave.neuroblast.jax_generation import Generator, Sampling
from neuroweave.neuroblast.jax_modeling import Computation, NeuroBlast
from neuroweave.neuroblast.jax_weights import describe_stored, load_params
from neuroweave.runtime.token_choice import check_sampling, refuse_unknown, settings_with_defaults
from neuroweave.runtime.writing import Continuation, Stream, Writer

DTYPES = {"auto": jnp.float32, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """What a `Writer` asks of a model, and what generates."""

    config: Any
    generation_config: GenerationConfig
    generator: Generator


class JaxWriter(Writer):
    """As `Writer`, its tokens made by JAX."""

    @classmethod
    def load(cls, source: str, *, assistant: str | None = None, dtype: str = "auto", device: str = "auto") -> JaxWriter:
        """Raises ValueError for a model that is no NeuroBLAST, and for what the JAX side does not do."""
        if assistant is not None:
            raise ValueError("--assistant is of the torch backend; leave it out, or use --backend torch")
        if {"cuda": "gpu"}.get(device, device) not in ("auto", jax.default_backend()):
            raise ValueError(f"--device {device}: JAX runs on {jax.default_backend()}; JAX_PLATFORMS chooses another")
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: the JAX backend takes {', '.join(DTYPES)}")
        check_source(source)
        folder = local_folder(source)
        check_weights(folder)
        stored = describe_stored(folder)
        model = NeuroBlast(stored.config, stored.plan, computation=Computation(dtype=DTYPES[dtype]))
        params = load_params(stored, model.table)
        if DTYPES[dtype] != jnp.float32:  # matrices once, not at every token
            params = {key: array.astype(DTYPES[dtype]) if array.ndim > 1 else array for key, array in params.items()}
        name = np.dtype(DTYPES[dtype]).name
        loaded = LoadedModel(stored.config, generation_config(folder, stored.config), Generator(model, params))
        return cls(source, loaded, load_tokenizer(folder), f"jax on {jax.default_backend()}, {name}", {})

    def write(
        self, ids: Sequence[int], config: GenerationConfig, *, seed: int, show: Callable[[str], object]
    ) -> Continuation:
        if config.prompt_lookup_num_tokens:
            raise ValueError("--prompt-lookup is of the torch backend; leave it out, or use --backend torch")
        refuse_unknown(config, "use --backend torch")
        check_sampling(config)
        stream, ends = Stream(self.tokenizer, show), set(config.eos_token_id or [])
        found: list[int] = []
        prompt = np.asarray([list(ids)])
        stream.put(torch.from_numpy(prompt))
        made = functools.partial(
            self.model.generator.tokens,
            prompt,
            new_tokens=config.max_new_tokens,
            sampling=sampling_of(config),
            seed=seed,
        )
        with jax.default_matmul_precision("highest"):
            self._continue(made, stream, ends, found)
        stream.end()
        return self._describe(found, config, stream)

    def _continue(self, made: Any, stream: Stream, ends: set[int], found: list[int]) -> None:
        for _ in itertools.islice(made(), 2):  # both programs are compiled before the clock starts
            pass
        stream.started = time.perf_counter()
        for token in made():
            if int(token[0]) < 0:
                raise ValueError(
                    f"{self.source}: its logits are not numbers, so no token can be drawn; give --dtype float32, or "
                    "look at the weights with neuroweave verify"
                )
            found.append(int(token[0]))
            stream.put(torch.tensor([found[-1]]))
            if found[-1] in ends:
                break


def sampling_of(config: GenerationConfig) -> Sampling:
    """transformers' settings as the JAX side has them."""
    return Sampling(draw=bool(config.do_sample), **settings_with_defaults(config))


def generation_config(folder: Path, config: Any) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)
