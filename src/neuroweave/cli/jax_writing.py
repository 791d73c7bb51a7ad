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
from neuroweave.cli.streaming import Continuation, Stream, Writer
from neuroweave.neuroblast.jax_generation import Generator, Sampling
from neuroweave.neuroblast.jax_modeling import Computation, NeuroBlast
from neuroweave.neuroblast.jax_weights import describe_stored, load_params

# transformers' other ways to change which tokens are chosen, and the value at which they do nothing
NOT_DONE = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "min_length": 0, "min_new_tokens": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "guidance_scale": None, "encoder_repetition_penalty": 1.0, "top_h": None,
    "exponential_decay_length_penalty": None,
}  # fmt: skip
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
        refuse_unknown(config)
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


def refuse_unknown(config: GenerationConfig) -> None:
    """Raise ValueError for a setting of the checkpoint that decides about tokens and that is not done here."""
    for name, neutral in NOT_DONE.items():
        if (value := getattr(config, name, neutral)) not in (None, neutral):
            raise ValueError(
                f"generation_config.json: {name} is {value}, which the JAX backend does not follow; use --backend torch"
            )


def sampling_of(config: GenerationConfig) -> Sampling:
    """transformers' settings as the JAX side has them; where they are silent, transformers' defaults."""
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        draw=True,
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=50 if config.top_k is None else config.top_k,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=penalty,
    )


def generation_config(folder: Path, config: Any) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)
