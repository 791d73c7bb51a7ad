"""Train NeuroBLAST with JAX as a configuration says: the same data, rows, metrics and output as the torch loop.

One process a host; every device works on each step. Sample i of the run is the same row for any number of devices and
hosts, so a run goes on with the very next one on the same or another number of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroweave.checkpoint.hub import local_folder
from neuroweave.checkpoint.loading import check_source, check_weights, cpu_multiplies_bfloat16
from neuroweave.checkpoint.staging import check_free_space, staged_folder
from neuroweave.neuroblast.jax_attention import default_attention
from neuroweave.neuroblast.jax_modeling import Computation, NeuroBlast
from neuroweave.neuroblast.jax_weights import StoredModel, describe_stored, initial_params, load_params, save_model
from neuroweave.training import jax_mesh
from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.jax_batches import Batches
from neuroweave.training.jax_checkpoints import JaxCheckpoints
from neuroweave.training.jax_hosts import check_same_model, held_by_all
from neuroweave.training.jax_processes import anybody, check_agreement, first_ahead, is_first, join_processes
from neuroweave.training.jax_step import (
    NEVER,
    Loss,
    State,
    build_optimizer,
    evaluation_sums,
    initial_state,
    pieces_for,
    train_step,
)
from neuroweave.training.metrics import (
    RunMetrics,
    check_trackers,
    resident_gb,
    start_trackers,
)
from neuroweave.training.model_to_train import check_match, fresh_configuration, load_training_tokenizer
from neuroweave.training.optimisation import learning_rates
from neuroweave.training.outcome import RECORD_FILE, NotFiniteError, TrainPlan, TrainResult, plan_run
from neuroweave.training.rows import RunRows, Share, open_rows
from neuroweave.training.run_folder import clear_run, write_run_file
from neuroweave.training.safe_checkpoints import last_sealed, room_for
from neuroweave.training.stop_signal import StopSignal

Say = Callable[[str], None]
ONLY_TORCH = {"compile": False, "gate_entropy": 0.0, "workers": 0, "parts": "all"}
ATTENTION = ("auto", "eager", "splash")
ASK_EVERY = 10  # steps between two questions to the other hosts whether somebody wants to stop


@dataclass
class Prepared:
    """Everything that a run needs, checked; no weights yet."""

    configuration: TrainConfiguration
    origin: StoredModel | Any  # a checkpoint, or the configuration of a fresh model
    model: NeuroBlast
    tokenizer: Any
    rows: RunRows
    mesh: Any
    loss: Loss
    plan: TrainPlan
    batches: Batches


def train_with_jax(
    configuration: TrainConfiguration,
    *,
    resume: bool | None = None,
    report: Say | None = None,
    note: Say | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Run it to the end, as `train.train` does, with the same arguments and errors."""
    began = time.perf_counter()
    join_processes()
    main = is_first()
    check_agreement(configuration, resume=resume)
    with held_by_all(configuration, resume=resume):
        prepared = prepare_together(configuration, note=note if main else None, progress=progress if main else None)
        if main:
            if resume is False:
                clear_run(Path(configuration.output.folder))
            write_run_file(configuration, backend="jax")
        run = JaxRun(prepared, report=report if main else None, note=note if main else None)
        with jax.set_mesh(prepared.mesh), jax.default_matmul_precision(products(configuration)):
            state = run.train()
        result = TrainResult.of_run(configuration.output.folder, prepared.plan, time.perf_counter() - began, main=main)
        write_model(prepared, state["params"], result)
    return result


def prepare_with_jax(
    configuration: TrainConfiguration, *, note: Say | None = None, progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """Tokenise what is not tokenised yet, and check that everything fits. Raises ValueError."""
    join_processes()
    check_agreement(configuration, dry_run=True)
    return prepare_together(configuration, note=note, progress=progress)


def prepare_together(
    configuration: TrainConfiguration, *, note: Say | None = None, progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """As `prepare_with_jax`, of hosts that agree."""
    training, data = configuration.training, configuration.data
    check_supported(configuration)
    check_trackers(configuration.metrics.report_to)
    mesh = jax_mesh.make_mesh(configuration.jax)
    places = jax_mesh.row_places(mesh)
    accumulation = training.accumulation(places, called="groups of devices (jax.data x jax.fsdp)")
    tokenizer = load_training_tokenizer(configuration)
    with first_ahead():
        origin = origin_of(configuration, tokenizer)
    config, edits = (origin.config, origin.plan) if isinstance(origin, StoredModel) else (origin, [])
    dtype = compute_dtype(training.precision)
    check_same_model(origin)
    model = NeuroBlast(config, edits, computation=computation_of(configuration, config, mesh, dtype))
    share = Share(jax.process_index(), jax.process_count(), first_ahead)
    rows = open_rows(configuration, tokenizer, vocabulary=config.vocab_size, share=share, progress=progress)
    parameters = sum(math.prod(row.array_shape) for row in model.table)
    plan = plan_run(
        configuration,
        rows,
        parameters=parameters,
        trained=parameters,
        accumulation=accumulation,
        processes=jax.process_count(),
        precision=np.dtype(dtype).name,
        device=f"{jax.device_count()} {jax.devices()[0].platform}",
    )
    output = configuration.output
    check_free_space(output.folder, room_for(output.folder, keep=output.keep, nbytes=plan.checkpoint_bytes))
    if rows.held_out is None and note is not None:
        note("no document is held out (data.held_out, or too little text): the run is not evaluated")
    pieces = pieces_for(data.sequence_length, training.micro_batch_size, config.vocab_size, configuration.jax.tensor)
    loss = Loss(training.label_smoothing, pieces, packed=data.packing)
    batches = Batches(rows, mesh, rows=training.batch_size, passes=accumulation)
    return Prepared(configuration, origin, model, tokenizer, rows, mesh, loss, plan, batches)


def check_supported(configuration: TrainConfiguration) -> None:
    """Raise ValueError for settings that only the torch backend follows."""
    training = configuration.training
    for name, neutral in ONLY_TORCH.items():
        if getattr(training, name) != neutral:
            raise ValueError(
                f"training.{name}: {getattr(training, name)} is of the torch backend; leave it out, or train with "
                f"--backend torch"
            )
    if training.attention not in ATTENTION:
        raise ValueError(f"training.attention: the JAX backend takes {', '.join(ATTENTION)}, got {training.attention}")


def origin_of(configuration: TrainConfiguration, tokenizer: Any) -> StoredModel | Any:
    """The checkpoint to go on with, or the configuration of a fresh model. Raises ValueError."""
    if configuration.model.path is None:
        return fresh_configuration(configuration, tokenizer)
    check_source(configuration.model.path)
    folder = local_folder(configuration.model.path)
    check_weights(folder)
    stored = describe_stored(folder)
    check_match(tokenizer, stored.config.vocab_size, folder)
    return stored


def compute_dtype(precision: str) -> Any:
    """Of matrix products. `auto`: bfloat16 on accelerators, float32 on a CPU, where XLA gains nothing by it."""
    on_cpu = jax.devices()[0].platform == "cpu"
    if precision == "bfloat16" and on_cpu and not cpu_multiplies_bfloat16():
        raise ValueError("training.precision is bfloat16, but this CPU has no bfloat16 products; say float32 or auto")
    return jnp.float32 if precision == "float32" or (precision == "auto" and on_cpu) else jnp.bfloat16


def products(configuration: TrainConfiguration) -> str:
    """How exactly float32 matrices are multiplied, where the hardware has shorter ways."""
    return "high" if configuration.training.tf32 else "highest"


def computation_of(configuration: TrainConfiguration, config: Any, mesh: Any, dtype: Any) -> Computation:
    """Raises ValueError where the attention that is asked for cannot train this model."""
    training, remat = configuration.training, configuration.jax.remat
    if remat == "auto":
        remat = "full" if training.gradient_checkpointing else "none"
    even = config.num_key_value_heads % configuration.jax.tensor == 0
    own = default_attention(jax.devices()[0].platform, dropout=config.attention_dropout) if even else "plain"
    kind = {"auto": own, "eager": "plain"}.get(training.attention, training.attention)
    if kind == "splash" and config.attention_dropout:
        raise ValueError("training.attention: splash has no dropout; leave attention_dropout at 0, or say eager")
    if kind == "splash" and not even:
        raise ValueError(
            f"training.attention: splash cannot divide {config.num_key_value_heads} key-value heads among jax.tensor "
            f"{configuration.jax.tensor} devices; change jax.tensor, or say eager"
        )
    return Computation(dtype=dtype, attention=kind, remat=remat, sharding=jax_mesh.place_hidden(mesh))


# --------------------------------------------------------------------------------------------------------- the loop


class JaxRun:
    """One run, from the state to its last step."""

    def __init__(self, prepared: Prepared, *, report: Say | None, note: Say | None) -> None:
        configuration = prepared.configuration
        self.prepared, self.configuration, self.plan = prepared, configuration, prepared.plan
        self.folder = Path(configuration.output.folder)
        self.checkpoints = JaxCheckpoints(self.folder, keep=configuration.output.keep, note=note)
        self.optimizer = build_optimizer(configuration.training, prepared.model.table)
        self.rates = learning_rates(configuration.training, prepared.plan.steps)
        self.metrics: RunMetrics | None = None
        if is_first():
            self.metrics = RunMetrics(
                self.folder,
                tokens_per_step=prepared.plan.tokens // prepared.plan.steps,
                report=report,
                memory=memory_gb,
                trackers=start_trackers(configuration.metrics.report_to, self.folder),
            )
        self.batches = prepared.batches
        self.stop = StopSignal()

    def train(self) -> State:
        """The state after the last step. Raises NotFiniteError, ValueError for a failed save, KeyboardInterrupt."""
        state, done = self.begin()
        step = self.compiled_step(state)
        pending: list[dict[str, Any]] = []
        if self.metrics is not None:
            self.metrics.begin(done)
        try:
            with self.stop.listening():
                for number in range(done, self.plan.steps):
                    rate = self.rates(number)
                    state, facts = step(state, self.batches.of_step(number), jnp.float32(rate))
                    pending.append(facts)
                    state = self.after_step(number + 1, state, pending, rate)
        except BaseException:
            if jax.process_count() == 1:  # a save that has begun is finished, or python's exit would break it off
                with contextlib.suppress(ValueError):
                    self.checkpoints.finish()
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()
        self.checkpoints.close()
        return state

    def begin(self) -> tuple[State, int]:
        """(the state to start from, steps that it has behind it)."""
        prepared, like = self.prepared, self.abstract_state()
        found = self.checkpoints.to_resume()
        if found is not None:
            self.check_goes_on(found)
            state, data = self.checkpoints.restore(found, like)
            self.batches.restore(data["batches"], found)
            return state, int(data["step"])
        place = functools.partial(jax_mesh.place_weights, mesh=prepared.mesh)
        if isinstance(prepared.origin, StoredModel):
            params = load_params(prepared.origin, prepared.model.table, place=place)
        else:
            params = initial_params(prepared.model.table, seed=self.configuration.training.seed, place=place)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        begin = jax.jit(functools.partial(initial_state, optimizer=self.optimizer), out_shardings=shardings)
        return begin(params), 0

    def check_goes_on(self, checkpoint: Path) -> None:
        """Raise ValueError where the run is further than it is told to go."""
        step, steps = int(checkpoint.name.rpartition("-")[2]), self.plan.steps
        if step > steps:
            raise ValueError(
                f"{self.folder}: is at step {step} ({checkpoint.name}), and the settings say {steps} steps; a run does "
                f"not go back: give training.steps {step} or more, or --fresh starts anew"
            )

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        mesh, table = self.prepared.mesh, self.prepared.model.table
        return abstract_state(table, self.optimizer, mesh)

    def compiled_step(self, state: State) -> Any:
        training, prepared = self.configuration.training, self.prepared
        step = functools.partial(
            train_step, prepared.model, self.optimizer, prepared.loss, training.clip, training.seed
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, jax_mesh.whole(prepared.mesh)))

    def after_step(self, step: int, state: State, pending: list[dict[str, Any]], rate: float) -> State:
        """Log, evaluate, save, and stop where it is time to."""
        metrics, output = self.configuration.metrics, self.configuration.output
        last = step == self.plan.steps
        asked = self.stop.asked
        if jax.process_count() > 1:  # asking waits for the devices of all hosts: not at every step
            asked = step % ASK_EVERY == 0 and anybody(asked)
        saves = last or asked or step % output.save_every == 0
        evaluates = self.prepared.rows.held_out is not None and (
            last or step % (metrics.evaluate_every or output.save_every) == 0
        )
        on_cpu = jax.devices()[0].platform == "cpu"
        if saves or step % metrics.log_every == 0:
            self.log(step, pending, rate)
        elif on_cpu:  # on an accelerator, reading the number would wait for the step to finish
            self.check_finite(pending[-1])
        if evaluates and not asked:
            self.tell(step, {"eval_loss": self.evaluate(state)})
        if saves:
            self.checkpoints.save(step, state, {"step": step, "batches": self.batches.place()})
            if self.metrics is not None:
                self.metrics.pause()
        if asked and not last:
            self.checkpoints.finish()
            raise KeyboardInterrupt(
                f"{self.folder / f'checkpoint-{step}'} is saved; the same command goes on from there"
            )
        return state

    def log(self, step: int, pending: list[dict[str, Any]], rate: float) -> None:
        facts = jax.device_get(pending)
        pending.clear()
        self.check_finite(facts[-1])
        loss = float(np.mean([each["loss"] for each in facts]))
        self.tell(step, {"loss": loss, "grad_norm": float(facts[-1]["grad_norm"]), "learning_rate": rate})

    def tell(self, step: int, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.tell(step, values, total=self.plan.steps)

    def check_finite(self, facts: Mapping[str, Any]) -> None:
        bad = int(facts["bad_step"])
        if bad == NEVER:
            return
        self.checkpoints.finish()
        raise NotFiniteError.at(bad, last_sealed(self.folder))

    def evaluate(self, state: State) -> float:
        """Nats per token on the held-out rows."""
        if not hasattr(self, "compiled_evaluation"):
            sums = functools.partial(evaluation_sums, self.prepared.model, self.prepared.loss)
            self.compiled_evaluation = jax.jit(sums, out_shardings=jax_mesh.whole(self.prepared.mesh))
        total, tokens = 0.0, 0
        for batch in self.batches.held_out(self.configuration.training.micro_batch_size):
            loss, count = self.compiled_evaluation(state["params"], batch)
            total, tokens = total + float(loss), tokens + int(count)
        if not tokens:
            raise ValueError("the held-out rows have no token to predict; give longer documents, or more of them")
        return total / tokens


def abstract_state(table: Any, optimizer: Any, mesh: Any) -> State:
    """Shapes, dtypes and shardings of a training state: moments lie as their weights do, numbers lie everywhere."""
    params = {
        row.key: jax.ShapeDtypeStruct(row.array_shape, jnp.float32, sharding=jax_mesh.place_weights(row, mesh))
        for row in table
    }
    shapes = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer), params)

    def placed(keys: Any, leaf: Any) -> Any:
        own = next((params[key.key] for key in keys if getattr(key, "key", None) in params), None)
        sharding = jax_mesh.whole(mesh) if own is None else own.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, shapes)


def memory_gb() -> float:
    """The most memory that a device of this process has held; on a CPU, the process itself."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else resident_gb()


def write_model(prepared: Prepared, params: Any, result: TrainResult) -> None:
    """The trained model in RUN/model as an ordinary checkpoint, whole or not at all."""
    origin, table = prepared.origin, prepared.model.table
    if not is_first():
        save_model(Path(os.devnull), params, table, model=origin, writes=False)
        return
    with staged_folder(result.model, overwrite=True) as folder:
        save_model(folder, params, table, model=origin)
        prepared.tokenizer.save_pretrained(folder)
        record = result.record(prepared.configuration) | {"backend": "jax"}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
