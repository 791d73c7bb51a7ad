"""A training step of the same small NeuroBLAST in JAX and in torch, on one CPU, in turn.

    python benchmarks/jax_step_time.py [--pairs 7] [--preset small] [--length 256] [--rows 4] [--packed] [--profile DIR]

The same weights, rows, loss, clipping and AdamW; each pair times some steps of both loops, the order alternating, and
both must end with the same loss. Prints tokens per second, the median ratio of the times and its middle half.
`--profile`: leave a trace of the JAX steps there.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from neuroweave.diagnose.environment import describe_environment
from neuroweave.neuroblast.configuration import PRESETS, build_configuration
from neuroweave.neuroblast.jax_modeling import NeuroBlast
from neuroweave.neuroblast.modeling import NeuroBlastForCausalLM
from neuroweave.training.configuration import build_configuration as build_training
from neuroweave.training.jax_step import Loss, build_optimizer, initial_state, train_step

VOCABULARY, RATE = 4096, 1e-3


def rows_of(options: argparse.Namespace) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, VOCABULARY, (options.rows, options.length))
    positions = np.broadcast_to(np.arange(options.length), ids.shape).copy()
    if options.packed:
        positions[:, options.length // 3 :] -= options.length // 3
    return {"input_ids": ids, "position_ids": positions, "labels": np.where(positions == 0, -100, ids)}


class TorchStep:
    def __init__(self, model: NeuroBlastForCausalLM, batch: dict[str, np.ndarray], packed: bool) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
        names = batch if packed else [name for name in batch if name != "position_ids"]
        self.batch = {name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in names}

    def __call__(self) -> float:
        loss = self.model(**self.batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class JaxStep:
    def __init__(self, model: NeuroBlastForCausalLM, batch: dict[str, np.ndarray], packed: bool) -> None:
        made = NeuroBlast(model.config)
        tensors = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
        params = {
            row.key: jnp.asarray(np.stack([tensors[n] for n in row.names]) if row.stacked else tensors[row.key])
            for row in made.table
        }
        value: dict[str, Any] = {"tokenizer": {"path": "x"}, "training": {"steps": 1}, "output": {"folder": "x"}}
        optimizer = build_optimizer(build_training(value).training, made.table)
        self.state = initial_state(params, optimizer)
        self.batch = {name: jnp.asarray(array[None], jnp.int32) for name, array in batch.items()}
        step = functools.partial(train_step, made, optimizer, Loss(packed=packed), 1.0, 0)
        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self) -> float:
        self.state, facts = self.step(self.state, self.batch, jnp.float32(RATE))
        return float(facts["loss"])


def timed(step: Any, count: int) -> tuple[float, float]:
    began = time.perf_counter()
    for _ in range(count):
        loss = step()
    return (time.perf_counter() - began) / count, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each half of a pair")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--packed", action="store_true", help="two documents a row")
    parser.add_argument("--profile", metavar="DIR")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = NeuroBlastForCausalLM(build_configuration(PRESETS[options.preset][0] | {"vocab_size": VOCABULARY}))
    batch = rows_of(options)
    in_jax, in_torch = (kind(model, batch, options.packed) for kind in (JaxStep, TorchStep))
    losses = {name: [timed(step, 1)[1] for _ in range(2)] for name, step in (("jax", in_jax), ("torch", in_torch))}
    np.testing.assert_allclose(losses["jax"], losses["torch"], atol=1e-4)
    pairs = []
    for number in range(options.pairs):
        order = [("jax", in_jax), ("torch", in_torch)]
        found = {name: timed(step, options.steps)[0] for name, step in (order if number % 2 else order[::-1])}
        pairs.append(found)
        print(
            f"jax {found['jax'] * 1e3:.0f} ms, torch {found['torch'] * 1e3:.0f} ms: {found['jax'] / found['torch']:.3f}"
        )
    if options.profile:
        with jax.profiler.trace(options.profile):
            timed(in_jax, options.steps)
    low, middle, high = statistics.quantiles([pair["jax"] / pair["torch"] for pair in pairs], n=4)
    rates = {name: batch["input_ids"].size / statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    machine = describe_environment()
    print(
        f"{machine.cpu}, {torch.get_num_threads()} threads, {datetime.date.today()}; {options.preset}, "
        f"{options.rows} x {options.length} tokens{', packed' if options.packed else ''}: jax {rates['jax']:,.0f} "
        f"tokens/s, torch {rates['torch']:,.0f}; jax / torch {middle:.3f} of the time ({low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()
