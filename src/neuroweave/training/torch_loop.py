"""transformers' Trainer with guards: it stops at the first loss that is not finite, saves checkpoints that count only
when complete, ends cleanly on Ctrl-C, and resumes with the very next sample.

Sample i of the dataset is sample i of the whole run: there is no epoch and no shuffling here, so going on is index
arithmetic, and the rows of a step are the same for any number of processes. Letters: B rows, T tokens of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from neuroweave.activations.neuron_choices import gate_entropy
from neuroweave.training import agreement, resharding, safe_checkpoints
from neuroweave.training.optimisation import decays
from neuroweave.training.outcome import NotFiniteError
from neuroweave.training.stop_signal import StopSignal

IGNORED = -100
NEVER = 2**62  # the step of what has not happened


@runtime_checkable
class Rows(Protocol):
    """What can be trained on: row(i) is sample i of the run, arrays [T] by the name of the model's argument."""

    def row(self, index: int) -> Any: ...


@runtime_checkable
class Placed(Protocol):
    """A dataset that keeps its place beside a checkpoint: one that is read in order alone."""

    def save_place(self, checkpoint: Path, rows: int) -> None: ...
    def restore_place(self, checkpoint: Path) -> None: ...


class RowDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows 0 to `count` as a map-style dataset of tensors. `rows.row(i)`: a mapping, or an object with `arrays()`."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows.row(index)
        named = row if isinstance(row, dict) else vars(row)
        return {name: torch.as_tensor(array) for name, array in named.items()}


def stack_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of one length as a batch: [B, T] each."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


class Guard(TrainerCallback):
    """Lets the trainer look at every finished step, after transformers' own decisions about it."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.after_step(control)


class GuardedTrainer(Trainer):
    """The loop of `neuroweave train` and `neuroweave heal`.

    `rows`, `held_out`: map-style datasets of {"input_ids", "position_ids", "labels", ...}: [T] each; `rows[i]` is
    sample i of the whole run. `tokenizer`: saved with every checkpoint. `gate_entropy`: weight of the learned mixtures'
    gate entropy in the loss. `label_smoothing`: share of the target that is spread over all tokens. `keep`: number of
    checkpoints that stay. `note`: gets a line of text about what a person should know.

    A subclass may override `compute_loss` (end it with `share_of_step`) and `evaluation_sums`.
    `train(resume_from_checkpoint=True)` goes on from the newest complete checkpoint, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        rows: torch.utils.data.Dataset[Any],
        held_out: torch.utils.data.Dataset[Any] | None = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        tokenizer: Any = None,
        gate_entropy: float = 0.0,
        label_smoothing: float = 0.0,
        keep: int = 2,
        note: Callable[[str], None] | None = None,
    ) -> None:
        config = getattr(model, "config", None)
        use_cache = getattr(config, "use_cache", None)  # the Trainer switches it off, in what is saved too
        super().__init__(
            model=model,
            args=in_order(arguments),
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=stack_rows,
            callbacks=[Guard(self), *callbacks],
        )
        for shown in (PrinterCallback, ProgressCallback):
            self.remove_callback(shown)
        self.use_cache, self.tokenizer_files, self.keep, self.note = use_cache, tokenizer, keep, note
        self.stop, self.interrupted = StopSignal(), False
        self.first_bad_step = torch.tensor(NEVER, device=arguments.device)
        self.gate_entropy, self.smoothing = gate_entropy, label_smoothing
        if gate_entropy and self.is_fsdp_enabled:
            raise ValueError("the gate entropy cannot be taken of weights that are sharded; train with DDP instead")

    def create_accelerator_and_postprocess(self) -> None:
        agreement.shard_on_cpu(getattr(self.args, "mixed_precision", None))
        super().create_accelerator_and_postprocess()

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Raises NotFiniteError, ValueError for a save that fails, KeyboardInterrupt after Ctrl-C."""
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None and isinstance(self.train_dataset, Placed):
            self.train_dataset.restore_place(checkpoint)
        self.stop, self.interrupted = StopSignal(), False
        self.first_bad_step = torch.full_like(self.first_bad_step, NEVER)
        with self.stop.listening():
            result = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        if self.interrupted:
            folder = safe_checkpoints.last_sealed(self.run_folder)
            raise KeyboardInterrupt(f"{folder} is saved; the same command goes on from there")
        return result

    @property
    def run_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """The folder to go on from; with several processes, all of them get what the first one found."""
        found: list[Any] = [None, None]
        if self.args.process_index == 0:
            try:
                found[0] = self._look_for_checkpoint(asked)
            except ValueError as error:
                found[1] = str(error)
        checkpoint, problem = agreement.from_first(found)
        if problem is not None:
            raise ValueError(problem)
        return checkpoint

    def _look_for_checkpoint(self, asked: str | bool | None) -> Path | None:
        if isinstance(asked, str):
            if problem := safe_checkpoints.what_is_wrong(Path(asked)):
                raise ValueError(f"{asked}: cannot be resumed: {problem}")
            return Path(asked)
        if asked:
            return safe_checkpoints.to_resume(self.run_folder, note=self.note)
        if old := safe_checkpoints.last_sealed(self.run_folder):
            raise ValueError(f"{old} is of an earlier run; resume it, or choose another output folder")
        return None

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but a resumed run logs, evaluates and saves as its arguments say now."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss, with smoothed labels where asked for, plus the weighted gate entropy."""
        if self.smoothing:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
            loss = self.smoothed_loss(outputs.logits, inputs["labels"], num_items_in_batch)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self.gate_share(model, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def smoothed_loss(self, logits_BTV: Tensor, labels_BT: Tensor, num_items_in_batch: Any) -> Tensor:
        """Cross-entropy with the target (1 - s) at the next token and s / V at each of all V tokens."""
        following = labels_BT[:, 1:].flatten()
        logits = logits_BTV[:, :-1].flatten(0, 1).float()
        total = nn.functional.cross_entropy(logits, following, reduction="sum", label_smoothing=self.smoothing)
        return self.share_of_step(total, num_items_in_batch, (following != IGNORED).sum())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those of matrices: transformers goes by names, and ours do not all have `norm` in the place that it knows."""
        return [name for name, parameter in model.named_parameters() if decays(name, parameter.ndim)]

    def gate_share(self, model: nn.Module, num_items_in_batch: Any) -> Tensor | float:
        """One pass's share of the gate entropy, times its weight; 0 where it has none."""
        if not self.gate_entropy:
            return 0.0
        passes = 1 if num_items_in_batch is None else self.args.gradient_accumulation_steps
        return self.gate_entropy * gate_entropy(model) / passes

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._watch(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, Tensor):
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self._watch(norm)
        return norm

    def _watch(self, value: Tensor) -> None:
        """Remember the first step at which `value` is not finite, without waiting for the device."""
        step = torch.full_like(self.first_bad_step, self.state.global_step + 1)
        bad = torch.where(torch.isfinite(value.detach()).all(), torch.full_like(step, NEVER), step)
        self.first_bad_step = torch.minimum(self.first_bad_step, bad.to(self.first_bad_step.device))

    def after_step(self, control: TrainerControl) -> None:
        """Between two steps: has somebody asked to stop, is all still finite, is what is saved logged before?"""
        if agreement.largest(int(self.stop.asked)):
            self.interrupted = control.should_save = control.should_training_stop = True
        if control.should_save or control.should_training_stop:
            control.should_log = True  # so that the mean loss of a line never spans a resume
        # on an accelerator, reading the number would wait for the step to finish
        if control.should_log or control.should_evaluate or self.args.device.type == "cpu":
            self.check_finite()

    def check_finite(self) -> None:
        """Raise NotFiniteError, on all processes, when any of them has seen a loss or a gradient that is not."""
        step = NEVER - agreement.largest(NEVER - int(self.first_bad_step.item()))
        if step == NEVER:
            return
        raise NotFiniteError.at(step, safe_checkpoints.last_sealed(self.run_folder))

    def share_of_step(self, total: Tensor, num_items_in_batch: Tensor | int | None, items: Tensor | int) -> Tensor:
        """What `compute_loss` returns for a sum over the `items` tokens of its rows: added up over all passes and
        averaged over all processes, the shares of a step are the mean over its tokens. In evaluation: the mean."""
        if num_items_in_batch is None:
            return total / items
        return total / num_items_in_batch * self.accelerator.num_processes

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluation_sums(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the predicted tokens of a batch, and `tokens`, their number. Each sum is reported per token.

        A subclass adds what it measures; `inputs` are on the device.
        """
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        loss = model(**inputs).loss.float()
        return {"loss": torch.where(tokens > 0, loss, 0.0) * tokens, "tokens": tokens}

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Each sum of `evaluation_sums` over the held-out rows, divided by their tokens; every row counts once."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model_wrapped
        sums: dict[str, Any] = {}
        was_training = model.training
        model.eval()
        for batch in self._own_batches(rows):
            with self.accelerator.autocast():
                found = self.evaluation_sums(model, self._prepare_inputs(batch))
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        model.train(was_training)
        totals = agreement.summed(torch.stack([torch.as_tensor(value) for value in sums.values()]))
        by_name = dict(zip(sums, totals.tolist(), strict=True))
        tokens = by_name.pop("tokens")
        if not tokens:
            raise ValueError("the held-out rows have no token to predict; give longer documents, or more of them")
        metrics = {f"{metric_key_prefix}_{name}": value / tokens for name, value in by_name.items()}
        metrics[f"{metric_key_prefix}_tokens"] = int(tokens)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _own_batches(self, rows: Any) -> Iterator[dict[str, Tensor]]:
        """This process's batches; all have equally many (sharded models compute together), the last ones perhaps with
        every label ignored."""
        size, world, mine = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        for start in range(0, len(rows), size * world):
            indices = range(start + mine * size, min(start + (mine + 1) * size, len(rows)))
            batch = stack_rows([rows[index] for index in indices or [0]])
            if not indices:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            yield batch

    # ---------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but weights that are not finite are never saved, and only a complete folder counts."""
        self.check_finite()
        finite = all(bool(torch.isfinite(local(parameter)).all()) for parameter in self.model_wrapped.parameters())
        if agreement.largest(int(not finite)):
            step = self.state.global_step
            raise NotFiniteError(f"the weights are not finite after step {step}; they are not saved", step)
        folder = self.run_folder / f"checkpoint-{self.state.global_step}"
        with safe_checkpoints.guarded_save(self.run_folder, folder, nbytes=self._checkpoint_bytes()):
            super()._save_checkpoint(model, trial)
            self._describe(folder)
            if isinstance(self.train_dataset, Placed):
                rows_of_a_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
                self.train_dataset.save_place(folder, self.state.global_step * rows_of_a_step)
            self._seal(folder)
        if self.args.process_index == 0:
            safe_checkpoints.rotate(self.run_folder, keep=self.keep, spare=self.state.best_model_checkpoint)
            safe_checkpoints.remove_incomplete(self.run_folder)

    def _describe(self, folder: Path) -> None:
        """Configuration and tokenizer, which a sharded checkpoint would lack."""
        if self.is_fsdp_enabled and self.args.process_index == 0:
            with self.configuration_as_given():
                self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
            if self.tokenizer_files is not None:
                self.tokenizer_files.save_pretrained(folder)

    def _seal(self, folder: Path) -> None:
        """Hash the files, each process its part, and write `complete.json` when all processes have written theirs."""
        world, mine = self.args.world_size, self.args.process_index
        agreement.from_all(None)
        parts = agreement.from_all(safe_checkpoints.hash_files(folder, safe_checkpoints.files_of(folder)[mine::world]))
        if mine == 0:
            files = {name: entry for part in parts for name, entry in part.items()}
            safe_checkpoints.seal_checkpoint(folder, step=self.state.global_step, files=files, processes=world)
        agreement.from_all(None)

    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: weights and optimizer state of this process, and a little more."""
        states = [] if self.optimizer is None else [s for s in self.optimizer.state.values() if isinstance(s, dict)]
        tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        parts = [local(tensor) for tensor in (*self.model_wrapped.parameters(), *tensors)]
        shards = self.args.world_size if self.is_fsdp_enabled else 1
        return int(1.02 * shards * sum(part.numel() * part.element_size() for part in parts)) + 2_000_000

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self.configuration_as_given():
            super()._save(output_dir, state_dict=state_dict)
            if self.tokenizer_files is not None and self.args.should_save and output_dir is not None:
                self.tokenizer_files.save_pretrained(output_dir)

    @contextlib.contextmanager
    def configuration_as_given(self) -> Iterator[None]:
        """The model's configuration with the `use_cache` that it came with: the Trainer switches it off."""
        config = getattr(unwrapped(self.model_wrapped), "config", None)
        if config is None or self.use_cache is None:
            yield
            return
        during, config.use_cache = config.use_cache, self.use_cache
        try:
            yield
        finally:
            config.use_cache = during

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's; a checkpoint that was saved sharded loads unsharded, and the other way round."""
        target = self.model_wrapped if model is None else model
        if not resharding.load_weights(self, Path(resume_from_checkpoint), target):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not resharding.load_optimizer(self, Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)


def in_order(arguments: TrainingArguments) -> TrainingArguments:
    """The arguments, with what the guards rely on: rows in order, all columns kept, NaN seen, saves rotated here."""
    arguments.train_sampling_strategy = "sequential"
    arguments.remove_unused_columns = False
    arguments.logging_nan_inf_filter = False
    arguments.save_total_limit = None
    arguments.disable_tqdm = True
    arguments.n_gpu  # noqa: B018  # the first look at it sets the next line's field
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs in one process would be torch's old DataParallel
    return arguments


def unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
