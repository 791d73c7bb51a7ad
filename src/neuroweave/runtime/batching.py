"""Many texts continued at once: the model runs over all of them together, a token each at a time.

New texts are read in pieces, between the steps of those that are being written, so nobody waits for a long prompt.
A text that ends or is cancelled leaves its place to the next in line; what was read of it is kept for texts that begin
alike. Letters: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from neuroweave.runtime.batch_cache import check_layers, disagreement, join, keep
from neuroweave.runtime.model_thread import ModelThread, fulfil
from neuroweave.runtime.prefix_cache import PrefixCache

PIECE = 256  # tokens of a prompt that are read between two steps


@dataclass(frozen=True)
class Token:
    """A token of a text. `logprob`: of the model's own distribution. `likeliest`: (token, logprob) of the best few.
    `last`: why the text ends with it: "stop", "length"; None: it goes on."""

    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    last: str | None = None


@dataclass(eq=False)
class Job:
    """A text to continue. `choose`: (the text so far, logits [V]) -> the next token. `tell`: gets every Token, or the
    exception that ended the text; called from the model's thread. `likeliest`: how many of the best are told.
    `owner`: whoever has more texts in the batch waits for those who have fewer. `known`: tokens of a kept text, which
    were not read again. `salt`: see `PrefixCache`."""

    ids: list[int]
    new_tokens: int
    ends: frozenset[int]
    choose: Callable[[list[int], Tensor], int]
    tell: Callable[[Token | Exception], object]
    likeliest: int = 0
    owner: object = None
    salt: str = ""
    cancelled: bool = False
    written: int = 0
    read: int = 0
    known: int = 0
    cache: DynamicCache | None = None

    def cancel(self) -> None:
        """Its place is given away before the next step; nothing more is told."""
        self.cancelled = True


@dataclass(eq=False)
class Batch:
    """The texts that are being written: row i of the cache is `jobs[i]`, whose last token is not in the cache yet."""

    jobs: list[Job] = field(default_factory=list)
    cache: DynamicCache | None = None

    def lengths(self) -> list[int]:
        return [len(job.ids) - 1 for job in self.jobs]


class ClosedError(RuntimeError):
    """The batcher writes no more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Batcher:
    """A model and its texts. `thread`: that runs it; one of its own by default. `slots`: how many texts are written
    together; `why_single`: why it is one for a model whose texts cannot be. `kept_tokens`: see `PrefixCache`."""

    def __init__(
        self, model: Any, *, slots: int = 8, source: str = "the model", thread: ModelThread | None = None,
        kept_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.source, self.why_single = model, source, ""
        self.thread = thread or ModelThread()
        self.slots = slots
        if slots > 1:
            self.why_single = self.thread.run(functools.partial(why_not_together, model)).result()
            self.slots = 1 if self.why_single else slots
        self.prefixes = self.thread.run(functools.partial(PrefixCache, model, tokens=kept_tokens)).result()
        self.waiting: deque[Job] = deque()
        self.reading: Job | None = None
        self.batch = Batch()
        self.errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.wake = self.thread.wake
        self.closing = False
        self.closed = threading.Event()
        self.thread.add(self)

    def submit(self, job: Job) -> None:
        """Raises ValueError for an empty text, and ClosedError."""
        if not job.ids:
            raise ValueError(f"there is no token for {self.source} to continue")
        with self.wake:
            self._check_open()
            self.waiting.append(job)
            self.wake.notify()

    def run(self, function: Callable[[], Any]) -> Future[Any]:
        """Call something that uses the model, on its thread, between two steps. Raises ClosedError."""
        future: Future[Any] = Future()
        with self.wake:
            self._check_open()
            self.errands.append((function, future))
            self.wake.notify()
        return future

    def logits(self, ids: Sequence[int], first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(place, logits [T, V] in float32) after the tokens at place, place + 1, ..., from `first` on: in pieces,
        between the steps of what is being written. Raises ClosedError."""
        cache = DynamicCache(config=self.model.config)
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]
            kept = min(len(piece), max(1, start + len(piece) - first))
            rows = self.run(functools.partial(self._rows, piece, cache, start, kept)).result()
            if start + len(piece) > first:
                yield start + len(piece) - kept, rows

    def _rows(self, piece: Sequence[int], cache: DynamicCache, start: int, kept: int) -> Tensor:
        ids = torch.tensor([list(piece)], device=self.model.device)
        positions = torch.arange(start, start + len(piece), device=self.model.device)[None]
        output = self.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=kept
        )
        return output.logits[0, -kept:].float().cpu()

    def _check_open(self) -> None:
        if self.closing:
            raise ClosedError

    def load(self) -> tuple[int, int]:
        """(texts being written or read, texts that wait)"""
        return len(self.batch.jobs) + (self.reading is not None), len(self.waiting)

    def close(self) -> None:
        """End the work; texts that are not finished are told so."""
        with self.wake:
            self.closing = True
            self.wake.notify()
        self.closed.wait()

    # ------------------------------------------------------------------------------------------------- the thread

    def has_work(self) -> bool:
        """Called with `wake` held."""
        if self.closed.is_set():
            return False
        return bool(self.closing or self.waiting or self.errands or self.batch.jobs or self.reading)

    @torch.inference_mode()
    def turn(self) -> None:
        """One step of all texts, and one piece of a new one."""
        if self.closing:
            self._end()
            return
        with self.wake:
            errands = list(self.errands)
            self.errands.clear()
        for function, future in errands:
            fulfil(future, function)
        cancelled = [job for job in self.batch.jobs if job.cancelled]
        self._keep_texts(cancelled)
        self._leave(cancelled)
        self._read_a_piece()
        if self.batch.jobs:
            self._step()

    def _end(self) -> None:
        for job in [*self.batch.jobs, *([self.reading] if self.reading else []), *self.waiting]:
            job.tell(ClosedError())
        for _, future in self.errands:
            future.set_exception(ClosedError())
        self.batch, self.reading = Batch(), None
        self.prefixes.clear()
        self.waiting.clear()
        self.closed.set()
        self.thread.remove(self)

    def _read_a_piece(self) -> None:
        if self.reading is None:
            self.reading = self._next()
        job = self.reading
        if job is None:
            return
        if job.cancelled:
            self.reading = None
            if job.read:
                assert job.cache is not None
                self.prefixes.put(job.ids[: job.read], job.cache, salt=job.salt)
            return
        try:
            if job.cache is None:
                job.known, job.cache = self.prefixes.begin(job.ids, salt=job.salt)
                job.read = job.known
            piece = job.ids[job.read : job.read + PIECE]
            logits = self._forward([piece], job.cache, [job.read], None)
            job.read += len(piece)
            if job.read < len(job.ids):
                return
            self.reading = None
            if self._choose(job, logits[0]):
                self._join(job)
            else:
                self.prefixes.put(job.ids[: job.read], job.cache, salt=job.salt)
        except Exception as error:  # of this text alone; the others go on
            if isinstance(error, RuntimeError) and self.prefixes.kept and not job.written:  # memory has run out?
                self.prefixes.clear()
                job.read, job.known, job.cache, self.reading = 0, 0, None, job
                return
            self.reading = None
            job.tell(error)

    def _next(self) -> Job | None:
        if len(self.batch.jobs) >= self.slots:
            return None
        with self.wake:
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            if not self.waiting:
                return None
            texts = Counter(id(job.owner) for job in self.batch.jobs)
            place = min(range(len(self.waiting)), key=lambda at: texts[id(self.waiting[at].owner)])
            job = self.waiting[place]
            del self.waiting[place]
            return job

    def _join(self, job: Job) -> None:
        new, job.cache = job.cache, None
        assert new is not None
        if self.batch.cache is None:
            self.batch.cache = new
        else:
            join(self.batch.cache, new)
        self.batch.jobs.append(job)

    def _step(self) -> None:
        batch = self.batch
        lengths = batch.lengths()
        try:
            mask = mask_of(lengths) if len(set(lengths)) > 1 else None
            logits = self._forward([job.ids[-1:] for job in batch.jobs], batch.cache, lengths, mask)
        except Exception as error:
            for job in batch.jobs:
                job.tell(error)
            self.batch = Batch()
            self.prefixes.clear()  # of memory, if that has run out
            return
        ended, failed = [], []
        for row, job in enumerate(batch.jobs):
            try:
                if not self._choose(job, logits[row]):
                    ended.append(job)
            except Exception as error:
                job.tell(error)
                failed.append(job)
        self._keep_texts(ended)
        self._leave([*ended, *failed])

    def _forward(self, tokens: list[list[int]], cache: Any, seen: list[int], mask: Tensor | None) -> Tensor:
        """Logits [B, V] in float32 after the last of `tokens`, which follow the `seen` ones."""
        device = self.model.device
        ids = torch.tensor(tokens, device=device)
        positions = torch.tensor(seen, device=device)[:, None] + torch.arange(ids.shape[1], device=device)
        output = self.model(
            input_ids=ids,
            attention_mask=None if mask is None else mask.to(device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float().cpu()

    def _choose(self, job: Job, logits: Tensor) -> bool:
        """Write the next token; whether the text goes on."""
        token = job.choose(job.ids, logits)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(job.likeliest) if job.likeliest else None
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
        job.ids.append(token)
        job.written += 1
        last = "stop" if token in job.ends else "length" if job.written >= job.new_tokens else None
        if not job.cancelled:
            job.tell(Token(token, float(logprobs[token]), likeliest, last))
        return last is None

    def _keep_texts(self, jobs: Sequence[Job]) -> None:
        assert self.batch.cache is not None or not jobs
        for job in jobs:
            self.prefixes.put(job.ids[:-1], self.batch.cache, row=self.batch.jobs.index(job), salt=job.salt)

    def _leave(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        rows = [row for row, job in enumerate(self.batch.jobs) if job not in jobs]
        kept = [self.batch.jobs[row] for row in rows]
        if not kept:
            self.batch = Batch()
            return
        cache = self.batch.cache
        assert cache is not None
        self.batch = Batch(kept, cache)
        keep(cache, rows, drop=cache.get_seq_length() - max(self.batch.lengths()))


def mask_of(lengths: Sequence[int]) -> Tensor:
    """[B, T + 1]: 1 where a row has a token, the one that is read now included; rows end together."""
    columns = torch.arange(max(lengths) + 1)
    return (columns[None] >= max(lengths) - torch.tensor(list(lengths))[:, None]).long()


@torch.inference_mode()
def why_not_together(model: Any) -> str:
    """Why texts of different lengths do not give this model's own logits when they are in one batch; "" if they do."""
    texts = [[3, 5, 7, 4, 6, 8, 5], [4, 6, 3]]
    try:
        caches = [DynamicCache(config=model.config) for _ in texts]
        check_layers(caches[0])
        alone = []
        for text, cache in zip(texts, caches, strict=True):
            device = model.device
            model(input_ids=torch.tensor([text[:-1]], device=device), past_key_values=cache, use_cache=True)
            alone.append(model(input_ids=torch.tensor([text], device=device)).logits[0, -1])
        lengths = [len(text) - 1 for text in texts]
        join(caches[0], caches[1])
        together = model(
            input_ids=torch.tensor([[text[-1]] for text in texts], device=model.device),
            attention_mask=mask_of(lengths).to(model.device),
            position_ids=torch.tensor(lengths, device=model.device)[:, None],
            past_key_values=caches[0],
            use_cache=True,
        ).logits[:, -1]
    except Exception as error:  # whatever a model that is built otherwise says to this
        return f"{type(error).__name__}: {error}".splitlines()[0]
    off = disagreement(together, torch.stack(alone))
    return f"a text in a batch gives other logits than alone ({off:.2g} of their spread)" if off else ""
