"""One optimizer step in JAX: passes accumulated in constant memory, the loss of real tokens alone, AdamW.

Each pass adds up losses, gradients and token counts over its rows; they are divided once, at the end, so a step is the
same whatever the passes, the devices and how unequally tokens lie among them. Letters: A passes, B rows of a pass, T
tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from neuroweave.neuroblast.jax_modeling import NeuroBlast
from neuroweave.neuroblast.tensor_table import TensorRow
from neuroweave.training.configuration import TrainingSection
from neuroweave.training.optimisation import decays
from neuroweave.training.packing import IGNORED

State = dict[str, Any]  # params, optimizer, step, bad_step
Batch = Mapping[str, Array]
LOGIT_BYTES = 1 << 28  # of float32 logits that exist at once on a device
NEVER = 2**31 - 1  # the step of what has not happened


@dataclass(frozen=True)
class Loss:
    """What is made small. `smoothing`: of the labels; `pieces`: the tokens of a row have their logits made in so many
    parts, one after the other; `packed`: positions that begin anew shut documents off from each other."""

    smoothing: float = 0.0
    pieces: int = 1
    packed: bool = True


def pieces_for(tokens: int, rows: int, vocabulary: int, shards: int = 1) -> int:
    """In how many parts the logits of `rows` rows on a device are to be made."""
    return min(tokens, math.ceil(4 * tokens * rows * vocabulary / shards / LOGIT_BYTES))


def loss_sums(
    model: NeuroBlast, params: Mapping[str, Array], batch: Batch, loss: Loss, dropout_keys: Array | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(sum of -log p of the next tokens, in nats; their number) over the rows [B, T] of a batch.

    `batch`: `input_ids`, `labels` (the same, `IGNORED` where nothing stands before a token) and `position_ids`.
    """
    positions = batch["position_ids"] if loss.packed else None
    h, _ = model.hidden_states(params, batch["input_ids"], position_ids=positions, dropout_keys=dropout_keys)
    following = jnp.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    B, T, C = h.shape
    size = -(-T // loss.pieces)
    pieces = -(-T // size)
    if pieces == 1:
        return token_losses(model, params, h, following, loss.smoothing)
    h = jnp.pad(h, ((0, 0), (0, pieces * size - T), (0, 0))).reshape(B, pieces, size, C).swapaxes(0, 1)
    following = jnp.pad(following, ((0, 0), (0, pieces * size - T)), constant_values=IGNORED)
    following = following.reshape(B, pieces, size).swapaxes(0, 1)

    @jax.checkpoint
    def piece(sums: Any, part: Any) -> tuple[Any, None]:
        total, count = token_losses(model, params, part[0], part[1], loss.smoothing)
        return (sums[0] + total, sums[1] + count), None

    return lax.scan(piece, (jnp.zeros(()), jnp.zeros((), jnp.int32)), (h, following))[0]


def token_losses(
    model: NeuroBlast, params: Mapping[str, Array], h: Array, following: Array, smoothing: float
) -> tuple[Array, Array]:
    logits = model.logits(params, h)
    real = following != IGNORED
    target = jnp.take_along_axis(logits, jnp.where(real, following, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - (1 - smoothing) * target
    if smoothing:
        losses = losses - smoothing * logits.mean(-1)
    return jnp.where(real, losses, 0.0).sum(), real.sum(dtype=jnp.int32)


# ------------------------------------------------------------------------------------------------------ optimizer


def build_optimizer(training: TrainingSection, table: list[TensorRow]) -> optax.GradientTransformation:
    """AdamW but for the learning rate, which each step is given."""
    mask = {row.key: decays(row.key, len(row.shape)) for row in table}
    return optax.chain(
        optax.scale_by_adam(training.adam_beta1, training.adam_beta2, training.adam_epsilon),
        optax.add_decayed_weights(training.weight_decay, mask=mask),
    )


def initial_state(params: Mapping[str, Array], optimizer: optax.GradientTransformation) -> State:
    count = jnp.zeros((), jnp.int32)
    return {"params": params, "optimizer": optimizer.init(params), "step": count, "bad_step": count + NEVER}


def train_step(
    model: NeuroBlast,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    clip: float,
    seed: int,
    state: State,
    batch: Batch,
    rate: Array,
) -> tuple[State, dict[str, Array]]:
    """(the state after a step on the rows [A, B, T], its loss, gradient norm, tokens and first bad step).

    A step whose loss, gradient or weights are not finite changes no weight and is remembered as `bad_step`. Dropout of
    row r of step s is drawn from (seed, s, r) alone, whatever pass and device it is computed in.
    """
    params = state["params"]
    dropping = model.config.dropout > 0 or model.config.attention_dropout > 0
    key = jax.random.fold_in(jax.random.key(seed), state["step"]) if dropping else None

    def add_pass(sums: Any, part: Any) -> tuple[Any, None]:
        number, rows = part
        places = number * rows["input_ids"].shape[0] + jnp.arange(rows["input_ids"].shape[0])
        own = None if key is None else jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
        (total, count), gradient = jax.value_and_grad(
            lambda params: loss_sums(model, params, rows, loss, own), has_aux=True
        )(params)
        return jax.tree.map(jnp.add, sums, (gradient, total, count)), None

    passes = batch["input_ids"].shape[0]
    nothing = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros((), jnp.int32))
    if passes == 1:
        (gradient, total, count), _ = add_pass(nothing, (jnp.zeros((), jnp.int32), {n: x[0] for n, x in batch.items()}))
    else:
        (gradient, total, count), _ = lax.scan(add_pass, nothing, (jnp.arange(passes), dict(batch)))
    tokens = jnp.maximum(count, 1)
    gradient = jax.tree.map(lambda g: g / tokens, gradient)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    if clip:
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), gradient)  # as torch clips
    updates, moments = optimizer.update(gradient, state["optimizer"], params)
    step = state["step"] + 1
    after = {"params": jax.tree.map(lambda p, u: p - rate * u, params, updates), "optimizer": moments}
    finite = [jnp.isfinite(array).all() for array in (total, norm, *jax.tree.leaves(after["params"]))]
    fine = jnp.stack(finite).all()
    kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, {n: state[n] for n in after})
    bad = jnp.where(fine, state["bad_step"], jnp.minimum(state["bad_step"], step))
    facts = {"loss": total / tokens, "grad_norm": norm, "tokens": count, "bad_step": bad}
    return kept | {"step": step, "bad_step": bad}, facts


def evaluation_sums(model: NeuroBlast, loss: Loss, params: Mapping[str, Array], batch: Batch) -> tuple[Array, Array]:
    """(sum of losses without smoothing or dropout, number of tokens) of rows [1, B, T]."""
    rows = {name: array[0] for name, array in batch.items()}
    return loss_sums(model, params, rows, Loss(0.0, loss.pieces, loss.packed))
