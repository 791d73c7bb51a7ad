"""Continue text with the JAX model: the prompt in one pass, then a token a step from keys, values and columns kept.

Choosing a token is transformers' way, in its order: repetition penalty, temperature, top-k, top-p, min-p. Letters: B
rows, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neuroweave.neuroblast.jax_modeling import NeuroBlast

CACHE_STEP = 128  # the cache's length is a multiple: prompts of about one length share a compiled step


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest one, or drawn. `top_k` 0, `top_p` 1, `min_p` 0: from all."""

    draw: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def choose(
    logits_BV: Float[Array, "B V"], said_BV: Bool[Array, "B V"], sampling: Sampling, key: Array
) -> Int[Array, " B"]:
    """The next token of each row, -1 where its scores are not finite; `said_BV`: the tokens that its text has so far.

    A penalty or a temperature that float32 is too small for makes them so.
    """
    scores = logits_BV
    if sampling.repetition_penalty != 1:
        less = jnp.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
        scores = jnp.where(said_BV, less, scores)
    if sampling.draw:
        scores = scores / sampling.temperature
    finite = jnp.isfinite(scores).all(-1)
    if not sampling.draw:
        return jnp.where(finite, scores.argmax(-1), -1)
    if 0 < sampling.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, sampling.top_k)[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if sampling.top_p < 1:
        ascending = jnp.sort(scores, axis=-1)
        below = jax.nn.softmax(ascending, axis=-1).cumsum(-1) <= 1 - sampling.top_p
        below = below.at[..., -1].set(False)  # the likeliest stays
        least = jnp.where(below, jnp.inf, ascending).min(-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if sampling.min_p > 0:
        p = jax.nn.softmax(scores, axis=-1)
        scores = jnp.where(p < sampling.min_p * p.max(-1, keepdims=True), -jnp.inf, scores)
    return jnp.where(finite, jax.random.categorical(key, scores, axis=-1), -1)


class Generator:
    """Continues prompts with a model and its arrays."""

    def __init__(self, model: NeuroBlast, params: Mapping[str, Array]) -> None:
        self.model, self.params = model, params
        self._prefill = jax.jit(self._read, static_argnames=("length", "sampling"))
        self._decode = jax.jit(self._step, static_argnames=("sampling",), donate_argnames=("state",))

    def tokens(
        self,
        prompt_BT: Int[np.ndarray, "B T"],
        *,
        new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        attention_mask: Int[np.ndarray, "B T"] | None = None,
    ) -> Iterator[Int[np.ndarray, " B"]]:
        """The next token of every row, `new_tokens` times; -1 where the logits are not finite.

        `attention_mask`: 0 where a shorter prompt is padded, at its left.
        """
        sampling = sampling or Sampling()
        batch, prompt = prompt_BT.shape
        length = -(-(prompt + new_tokens) // CACHE_STEP) * CACHE_STEP
        mask = np.ones((batch, prompt), np.int32) if attention_mask is None else np.asarray(attention_mask, np.int32)
        if not (mask[:, -1] == 1).all():
            raise ValueError(
                "attention_mask: prompts of different lengths are padded at their left, these end in padding"
            )
        state = self._prefill(
            self.params,
            jnp.asarray(prompt_BT),
            jnp.asarray(mask),
            jax.random.key(seed),
            length=length,
            sampling=sampling,
        )
        for made in range(new_tokens):
            token = state["token"]
            if made + 1 < new_tokens:
                token.copy_to_host_async()
            yield np.asarray(token)
            if made + 1 < new_tokens:
                state = self._decode(self.params, state=state, sampling=sampling)

    def _read(
        self, params: Any, prompt_BT: Array, mask_BT: Array, key: Array, *, length: int, sampling: Sampling
    ) -> dict[str, Any]:
        batch = prompt_BT.shape[0]
        positions = jnp.maximum(mask_BT.cumsum(-1) - 1, 0)
        cache = self.model.empty_cache(batch, length)
        h, filled = self.model.hidden_states(
            params, prompt_BT, position_ids=positions, attention_mask=mask_BT, cache=cache
        )
        rows = jnp.arange(batch)[:, None]
        said = jnp.zeros((batch, self.model.config.vocab_size), bool).at[rows, prompt_BT].max(mask_BT.astype(bool))
        return self._next(params, h[:, -1], filled, said, positions[:, -1], key, sampling)

    def _step(self, params: Any, *, state: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        position = state["position"] + 1
        h, cache = self.model.hidden_states(
            params, state["token"][:, None], position_ids=position[:, None], cache=state["cache"]
        )
        return self._next(params, h[:, -1], cache, state["said"], position, state["key"], sampling)

    def _next(
        self, params: Any, h_BC: Array, cache: Any, said: Array, position: Array, key: Array, sampling: Sampling
    ) -> dict[str, Any]:
        key, own = jax.random.split(key)
        logits = self.model.logits(params, h_BC)
        token = choose(logits, said, sampling, own)
        token = jnp.where(jnp.isfinite(logits).all(-1), token, -1)
        said = said.at[jnp.arange(len(token)), token].set(True)
        return {"token": token, "cache": cache, "said": said, "position": position, "key": key}
