"""A model in memory as lm-evaluation-harness reads it. Imports the harness: needs `pip install "neuroweave[eval]"`.

The harness takes the model as it is: nothing is tied, moved or switched, and its tokenizer is a copy. Log-likelihoods
are computed at the positions of the answers only, so that a vocabulary of 262,144 entries fits in memory.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from neuroweave.diagnose.subject import Subject

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (context, answer) as text, and the tokens of each

LOGIT_BYTES = 1 << 27  # of one forward pass; the log-softmax takes as much again
BATCH_TOKENS = 1024  # of one forward pass on a CPU, where more at a time is no faster
ACCELERATOR_BATCH_TOKENS = 16_384
GENERATION_BATCH = 8  # prompts that are continued side by side
ERROR_RESAMPLES = 1000  # of the harness's bootstrap, for the error of what is not a mean


class Borrowed:
    """What the harness needs of a model. Not an nn.Module: the weights of one would be tied by the harness again."""

    def __init__(self, subject: Subject) -> None:
        self.config, self.device = subject.config, subject.device
        self.generate = getattr(subject.model, "generate", None)


class HarnessModel(HFLM):
    """A causal language model in memory. `truncated` collects the requests whose context was cut on the left."""

    def __init__(self, subject: Subject, *, progress: Callable[[int, int], object]) -> None:
        self.subject, self.progress = subject, progress
        self.truncated: set[tuple[str, str]] = set()
        self._settings: dict[str, int] = {}
        self._can_keep = "logits_to_keep" in inspect.signature(subject.model.forward).parameters
        super().__init__(
            pretrained=Borrowed(subject),
            tokenizer=copy.deepcopy(subject.tokenizer),
            backend="causal",
            batch_size=GENERATION_BATCH,
            max_length=subject.longest,
            softmax_dtype="float32" if subject.dtype in ("bfloat16", "float16") else None,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the answer, whether it is what the model would write) of every request.

        Raises ValueError for an answer that the model cannot hold, and for a log-likelihood that is not a number.
        """
        self._check(requests)
        answers: dict[int, tuple[float, bool]] = {}
        size: int = self.batch_size
        try:
            for batch, keep in self._batches(requests):
                self._settings = {"logits_to_keep": keep} if self._can_keep else {}
                self.batch_size_per_gpu = len(batch)
                found = super()._loglikelihood_tokens([requests[at] for at in batch], disable_tqdm=True)
                answers.update(zip(batch, found, strict=True))
                self._check_numbers(answers[at][0] for at in batch)
                self.progress(len(answers), len(requests))
        finally:
            self.batch_size_per_gpu, self._settings = size, {}
        return [answers[at] for at in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [batch, positions, vocabulary] at the last positions that the batch asks for, or at all."""
        logits: Tensor = self.subject.model(input_ids=inps, use_cache=False, **self._settings).logits
        return logits

    def _batches(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], int]]:
        """Requests of like length, by number, and the positions at the end of their logits that hold all answers."""
        on_cpu = self.device.type == "cpu"
        tokens = BATCH_TOKENS if on_cpu else ACCELERATOR_BATCH_TOKENS
        positions = max(1, LOGIT_BYTES // (4 * max(len(self.tokenizer), 1)))
        # Input positions, and the first that predicts a token of the answer.
        lengths = [min(len(context) + len(answer), self.max_length + 1) - 1 for _, context, answer in requests]
        starts = [length - len(answer) for length, (_, _, answer) in zip(lengths, requests, strict=True)]
        batch: list[int] = []
        for at in sorted(range(len(requests)), key=lambda at: (-lengths[at], requests[at][1:])):
            longest = lengths[batch[0]] if batch else lengths[at]
            keep = longest - min(starts[member] for member in (*batch, at))
            kept = keep if self._can_keep else longest
            if batch and ((len(batch) + 1) * longest > tokens or (len(batch) + 1) * kept > positions):
                yield batch, longest - min(starts[member] for member in batch)
                batch = []
            batch.append(at)
        if batch:
            yield batch, lengths[batch[0]] - min(starts[member] for member in batch)

    def _check(self, requests: Sequence[Request]) -> None:
        for text, context, answer in requests:
            if not answer:
                raise ValueError(f"a task has an answer with no token in it, after {(text or ('',))[0][-60:]!r}")
            if len(answer) > self.max_length:
                raise ValueError(
                    f"a task has an answer of {len(answer)} tokens, more than {self.subject.name} can read "
                    f"({self.max_length}); leave the task out"
                )
            if text is not None and len(context) + len(answer) > self.max_length + 1:
                self.truncated.add(text)

    def _check_numbers(self, log_likelihoods: Iterator[float]) -> None:
        if any(np.isnan(value) for value in log_likelihoods):
            raise ValueError(
                f"{self.subject.name} gives log-likelihoods that are not numbers, so it cannot answer; "
                "its weights or its dtype are at fault"
            )


def run_harness(model: HarnessModel, loaded: dict[str, Any], *, limit: int | None) -> dict[str, Any]:
    """The harness's results of tasks that it loaded, with every question. To be called with the model at rest."""
    results: dict[str, Any] = evaluate(
        lm=model, task_dict=loaded, limit=limit, bootstrap_iters=ERROR_RESAMPLES, log_samples=True
    )
    return results


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch from `seed` inside; their states are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def quiet() -> Iterator[Callable[..., Callable[..., None]]]:
    """Keep the bars, prints and log lines of the harness from the terminal, and its processes from being forked.

    Gives a function that makes another one heard: `heard(progress)` may print.
    """
    out, err = sys.stdout, sys.stderr
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "evaluate")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    alone = os.environ.get("DISABLE_MULTIPROC")  # a forked copy of a process with torch's threads can hang

    def heard(function: Callable[..., object]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                function(*arguments)

        return call

    try:
        os.environ["DISABLE_MULTIPROC"] = "1"
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield heard
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        if alone is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
