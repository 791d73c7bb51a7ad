"""Tokens per second of several models under the same settings, measured in turns: A B C, A B C, ...

Machines drift (heat, neighbours), so models are timed in turns and compared run by run: the ratio of two models is
the median of the ratios within each turn, and its interval comes from the order of those ratios. Prefill reads the
prompt and chooses the first token; decode is every token after it, one by one with the KV cache. Both are timed inside
one `generate`, as a user would run it, by a stopping criterion that never stops and looks at the clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from neuroweave.diagnose.results.comparison import Rate, Speed
from neuroweave.diagnose.results.plan import SpeedPlan
from neuroweave.diagnose.results.records import Estimate
from neuroweave.diagnose.subject import Subject


class Clock(StoppingCriteria):
    """Notes the time at which each new token was there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure_speed(
    subjects: Sequence[Subject],
    token_ids: Sequence[int],
    plan: SpeedPlan,
    *,
    after_run: Callable[[], object] = lambda: None,
) -> list[Speed]:
    """Each model's rates for the same prompt, `token_ids` repeated or cut to the plan's length.

    To be called with the models at rest. `after_run` is called after each run, warm-ups included.
    """
    prompt = [token_ids[at % len(token_ids)] for at in range(plan.prompt_tokens)]
    prefills: list[list[float]] = [[] for _ in subjects]
    decodes: list[list[float]] = [[] for _ in subjects]
    for turn in range(plan.warmups + plan.repeats):
        for number, subject in enumerate(subjects):
            prefill, decode = time_once(subject, prompt, plan)
            if turn >= plan.warmups:
                prefills[number].append(plan.batch * plan.prompt_tokens / prefill)
                decodes[number].append(plan.batch * (plan.new_tokens - 1) / decode)
            after_run()
    return [Speed(prefill=rate(p), decode=rate(d)) for p, d in zip(prefills, decodes, strict=True)]


def time_once(subject: Subject, prompt: Sequence[int], plan: SpeedPlan) -> tuple[float, float]:
    """Seconds until the first token, and from there to the last."""
    ids = torch.tensor([list(prompt)] * plan.batch, device=subject.device)
    clock = Clock()
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    begin = time.perf_counter()
    generate(subject, ids, plan.new_tokens, at_least=plan.new_tokens, stopping=StoppingCriteriaList([clock]))
    return clock.times[0] - begin, clock.times[-1] - clock.times[0]


def generate(
    subject: Subject, ids: Tensor, new_tokens: int, *, at_least: int = 0, stopping: StoppingCriteriaList | None = None
) -> Tensor:
    """Greedy continuation of `ids` [batch, tokens], with the KV cache: [batch, tokens + new tokens]."""
    own = getattr(subject.model, "generation_config", None)
    end = own.eos_token_id if own is not None and own.eos_token_id is not None else subject.tokenizer.eos_token_id
    pad = end[0] if isinstance(end, list) else end
    greedy = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=new_tokens,
        min_new_tokens=at_least,
        eos_token_id=end,
        pad_token_id=0 if pad is None else pad,
    )
    model: Any = subject.model
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=greedy, stopping_criteria=stopping
    )


def rate(runs: Sequence[float]) -> Rate:
    return Rate(median=statistics.median(runs), low=min(runs), high=max(runs), runs=list(runs))


def speed_ratio(base: Rate, other: Rate) -> Estimate:
    """The median over turns of other / base, with its interval."""
    return median_interval([theirs / ours for ours, theirs in zip(base.runs, other.runs, strict=True)])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median with the narrowest symmetric pair of order statistics that covers it at `confidence`, whatever the
    distribution: the k-th least and k-th largest of n cover the median with 1 - 2 P(Binomial(n, 1/2) < k).

    No interval for fewer than six values, where even the extremes cover less than 95 %.
    """
    ordered = sorted(values)
    n = len(ordered)
    best = 0
    for k in range(1, n // 2 + 1):
        outside = 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
        if 1 - outside >= confidence:
            best = k
    median = statistics.median(ordered)
    return Estimate(value=median, low=ordered[best - 1], high=ordered[n - best]) if best else Estimate(value=median)
