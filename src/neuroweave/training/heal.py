"""Heal a patched checkpoint: train it to predict what its teacher predicts, and write the result as another folder.

While it runs, its checkpoints, the teacher's cached predictions and metrics.jsonl lie in `.OUTPUT.neuroweave-heal`
beside the output. The same command goes on from there; the folder goes away when the output is written.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from neuroweave import __version__
from neuroweave.checkpoint.loading import load_tokenizer
from neuroweave.checkpoint.manifest import fingerprints
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.resaving import load_stored, save_like
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.text.tokens import NamedText, token_ids_sha256
from neuroweave.training import agreement
from neuroweave.training.choice_log import CHOICES_FILE, ChoiceLog
from neuroweave.training.distillation_loop import KL, Blend, FindHead, HealingTrainer, Objective, Windows, predictor
from neuroweave.training.fused_mlps import fuse_mlps
from neuroweave.training.healing_inputs import Split, check_pair, check_tokenizers, split_windows
from neuroweave.training.healing_work import Work, job_of
from neuroweave.training.metrics import MetricsFile
from neuroweave.training.model_to_train import choose_precision
from neuroweave.training.teacher_logits import TeacherLogits, cache_teacher_logits, fingerprint_of
from neuroweave.training.torch_loop import RowDataset
from neuroweave.training.train import start_processes
from neuroweave.training.trainable import LORA_RANK, PARTS, select

LOSSES = ("full", "topk")
# by what is trained: from a calibrated model, higher rates gave a higher KL than before on some 20,000 tokens
LEARNING_RATES = {"mixtures": 1e-2, "mlp": 2e-5, "lora": 7e-4, "all": 2e-5}
HELD_OUT_TOKENS = 8192

Say = Callable[[str], None]
MakeBlend = Callable[[PreTrainedModel, PreTrainedModel], Blend]


@dataclass(frozen=True)
class HealOptions:
    """How to heal. `train`: one of `PARTS`. `loss`: `full` (whole vocabulary) or `topk` (the teacher's `top_k` first
    tokens, cached on disk, the rest as one). `hidden`, `cross_entropy`: weights of hidden states and of the text
    itself beside the KL. `blend`: steps from the old activations to the new. `tokens`: to train on, in steps of
    `batch` * `accumulate` windows of `window`. `learning_rate`: None for that of `LEARNING_RATES`.
    `evaluate_every`: steps between looks at the held-out KL, None for an eighth of the run; `patience`: looks in a row
    without a better one that end it. `precision`: of matrix products.
    """

    train: str = "lora"
    loss: str = "full"
    top_k: int = 64
    hidden: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    blend: int = 0
    tokens: int = 262_144
    window: int = 512
    batch: int = 1
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: float = 0.05
    evaluate_every: int | None = None
    patience: int = 3
    lora_rank: int = LORA_RANK
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("train", PARTS), ("loss", LOSSES), ("precision", ("auto", "float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; choose from {', '.join(known)}")
        positive = ("top_k", "batch", "accumulate", "patience", "lora_rank", "temperature", "learning_rate")
        for name in (*positive, "evaluate_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("hidden", "cross_entropy", "blend", "warmup", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or LEARNING_RATES[self.train]

    def steps(self, processes: int = 1) -> int:
        """Raises ValueError when the tokens are not even one step."""
        step = self.batch * self.accumulate * self.window * processes
        if self.tokens < step:
            raise ValueError(f"tokens {self.tokens} are less than one step of {step}; give more, or a smaller batch")
        if self.blend >= self.tokens // step:
            raise ValueError(
                f"blend over {self.blend} steps, but the run has {self.tokens // step}; its last steps must train the "
                f"patched model itself"
            )
        return self.tokens // step


@dataclass(frozen=True)
class Healing:
    """What a heal did. KL(teacher || student) in nats per token, on documents that were held out from training."""

    options: HealOptions
    trained: int
    steps: int
    tokens: int
    windows: int
    held_out_tokens: int
    kl_before: float
    kl_after: float
    best_step: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def heal_checkpoint(
    patched: str | Path,
    teacher: str | Path,
    out: str | Path,
    documents: Sequence[NamedText],
    *,
    options: HealOptions | None = None,
    blend: MakeBlend | None = None,
    find_head: FindHead | None = None,
    resume: bool = True,
    overwrite: bool = False,
    report: Say | None = None,
    note: Say | None = None,
) -> Healing:
    """Write `out`: the folder `patched`, trained on `documents` to predict what the folder `teacher` predicts.

    Recipe and dtype stay; config.json records what was done under `neuroweave.healing`. The weights with the lowest
    held-out KL are written, those of `patched` where none was lower. `blend`: makes what moves the student between its
    old and new activations, for `options.blend`. `find_head`: finds a model's output head, so that logits are made some
    rows at a time. `resume`: go on where the same heal was stopped; False begins anew. `report`, `note`: lines of text.
    Raises ValueError, before `out` is touched, for folders and texts that do not fit; KeyboardInterrupt after Ctrl-C.
    """
    patched, teacher, options = Path(patched), Path(teacher), options or HealOptions()
    options = replace(options, learning_rate=options.rate)
    if options.blend and blend is None:
        raise ValueError("blend needs something that blends; give neuroweave.surgery.blending.Blending")
    check_pair(patched, teacher, window=options.window)
    target = check_output(out, overwrite=overwrite, sources=[patched, teacher])
    device, processes = start_processes()
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("heal keeps student and teacher whole in every process; start it with torchrun, not with FSDP")
    steps = options.steps(processes)
    tokenizer = load_tokenizer(teacher)
    check_tokenizers(patched, load_tokenizer(patched), tokenizer)
    split = split_windows(documents, tokenizer, window=options.window, held_out_tokens=HELD_OUT_TOKENS)
    job = job_of([patched, teacher], options=asdict(options), text=text_sha256(split))
    with Work.open(target, job, resume=resume) as work:
        heal = Heal(patched, teacher, options, split, work, device, steps)
        done = heal.run(blend=blend, find_head=find_head, report=report, note=note)
        if agreement.is_first():
            heal.write(out, done, overwrite=overwrite)
        agreement.from_all(None)  # nobody leaves before it is written
        if agreement.is_first():
            work.remove()
    return done


def text_sha256(split: Split) -> str:
    return token_ids_sha256([*split.training.tolist(), *split.held_out.tolist()])


class Heal:
    """One heal, from loaded models to a written folder."""

    def __init__(
        self, patched: Path, teacher: Path, options: HealOptions, split: Split, work: Work, device: str, steps: int
    ) -> None:
        self.patched, self.teacher, self.options, self.split, self.work = patched, teacher, options, split, work
        self.device, self.steps = device, steps
        self.student = load_stored(patched)
        self.dtypes = {name: parameter.dtype for name, parameter in self.student.named_parameters()}
        self.student.float().to(device)
        self.reference = load_reference(teacher, device)

    def run(
        self, *, blend: MakeBlend | None, find_head: FindHead | None, report: Say | None, note: Say | None
    ) -> Healing:
        """Train, and leave the best weights in `student`, in float32 as they will be stored."""
        began, options = time.perf_counter(), self.options
        sample = self.split.held_out[:1, :8]
        student, teacher = (predictor(model, sample, find_head) for model in (self.student, self.reference))
        mixing = blend(self.student, self.reference) if options.blend and blend is not None else None
        torch.manual_seed(options.seed)  # adapters begin at random
        chosen = select(self.student, options.train, lora_rank=options.lora_rank)
        weights = 4 * self.student.num_parameters()
        checkpoint = 8 * chosen.count + (4 * chosen.count if options.train == "lora" else weights)
        check_free_space(self.work.folder, 3 * checkpoint + weights)  # best, last and next one, and the output
        precision = choose_precision(options.precision, self.device)
        windows = Windows(self.split.training, seed=options.seed)
        processes = agreement.processes()
        rows = self.steps * options.batch * options.accumulate * processes
        main = agreement.is_first()
        trainer = HealingTrainer(
            chosen.model,
            self.arguments(precision),
            RowDataset(windows, rows),
            RowDataset(Windows(self.split.held_out), len(self.split.held_out)),
            student=student,
            teacher=teacher,
            objective=Objective(
                options.top_k if options.loss == "topk" else 0,
                options.hidden,
                options.cross_entropy,
                options.temperature,
            ),
            cached=self.cached(teacher) if options.loss == "topk" and not options.hidden else None,
            blend=mixing,
            blend_steps=options.blend,
            patience=options.patience,
            callbacks=[
                MetricsFile(rows // self.steps * options.window, report=report if main else None),
                ChoiceLog(),
            ],
            keep=1,
            note=note if main else None,
        )
        trainer.state.max_steps = self.steps
        if "kl_before" not in self.work.known:
            self.work.tell(kl_before=trainer.evaluate()[KL])
        fused = fuse_mlps(chosen.model, device=self.device, precision=precision)
        trainer.train(resume_from_checkpoint=True)
        fused()
        before, state = self.work.known["kl_before"], trainer.state
        self.student = chosen.finish()
        if trainer.use_cache is not None:
            self.student.config.use_cache = trainer.use_cache  # the Trainer switches it off
        if mixing is not None:
            mixing.undo()
        improved = state.best_metric is not None and state.best_metric < before
        if not improved:
            self.take_back()
            if note is not None and main:
                note(f"the held-out KL never came below {before:.4f}: the weights stay as they were")
        self.round()
        trainer.model = trainer.model_wrapped = self.student
        return Healing(
            options,
            chosen.count,
            state.global_step,
            state.global_step * rows // self.steps * options.window,
            len(self.split.training),
            self.split.held_out.numel(),
            before,
            trainer.evaluate()[KL] if improved else before,
            (state.best_global_step or 0) if improved else 0,
            time.perf_counter() - began,
        )

    def arguments(self, precision: torch.dtype) -> TrainingArguments:
        options = self.options
        every = min(self.steps, options.evaluate_every or max(1, self.steps // 8))
        return TrainingArguments(
            output_dir=str(self.work.run),
            max_steps=self.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.rate,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(options.warmup * self.steps),
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == torch.bfloat16,
            use_cpu=self.device == "cpu",
            seed=options.seed,
            dataloader_pin_memory=self.device == "cuda",
            logging_steps=max(1, min(every, self.steps // 40)),
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            load_best_model_at_end=True,
            metric_for_best_model="kl",
            greater_is_better=False,
            report_to=[],
        )

    def cached(self, teacher: Any) -> TeacherLogits:
        """The teacher's top tokens of every window, made once."""
        options = self.options

        @torch.no_grad()
        def logits_of(row: torch.Tensor) -> torch.Tensor:
            states, _ = teacher.states(teacher.model, row.to(self.device))
            return teacher.logits(states)

        with Checkpoint(self.teacher, allow_orphans=True) as checkpoint:
            files = fingerprints(checkpoint)
        text = token_ids_sha256(self.split.training.tolist())
        key = fingerprint_of(teacher=files, text=text, k=options.top_k, temperature=options.temperature)
        with PartialState().main_process_first():  # the first process makes it, the others read it
            return cache_teacher_logits(
                self.work.teacher,
                self.split.training,
                logits_of,
                k=options.top_k,
                fingerprint=key,
                temperature=options.temperature,
            )

    def take_back(self) -> None:
        """The weights of the patched folder again."""
        self.student.load_state_dict(load_stored(self.patched).state_dict())

    @torch.no_grad()
    def round(self) -> None:
        """Round the weights to the dtypes that they are stored in, so that what is measured is what is written."""
        for name, parameter in self.student.named_parameters():
            parameter.copy_(parameter.to(self.dtypes[name]))

    def write(self, out: str | Path, done: Healing, *, overwrite: bool) -> None:
        """The student in the dtypes of the patched folder, beside that folder's other files."""
        with Checkpoint(self.teacher, allow_orphans=True) as checkpoint:
            files = fingerprints(checkpoint)
        for name, parameter in self.student.named_parameters():
            parameter.data = parameter.data.to(self.dtypes[name])
        entry = {"neuroweave": __version__, **done.as_dict(), "text_sha256": text_sha256(self.split)}
        entry.pop("seconds")
        self.student.config.neuroweave["healing"] = entry | {"teacher": {"files": files}}
        with staged_folder(out, overwrite=overwrite, sources=[self.patched, self.teacher]) as folder:
            if (self.work.run / CHOICES_FILE).is_file():
                shutil.copyfile(self.work.run / CHOICES_FILE, folder / CHOICES_FILE)
            save_like(self.student, self.patched, folder)


def load_reference(folder: Path, device: str) -> PreTrainedModel:
    """The teacher: in float32 on a CPU, on an accelerator in the dtype that it is stored in."""
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a decorator that hides its type
    return model.eval().requires_grad_(False)
