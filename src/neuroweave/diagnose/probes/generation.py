"""The same prompts continued by every model, greedily and sampled, and how far each goes along with the base.

The loop is transformers' `generate` with the KV cache. What a model is sure of and where its hidden states go is read
at every step, so no more than one step's logits are kept. To be called with the models at rest (`subject.at_rest`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from neuroweave.diagnose.results.generation import Continuation, Generated
from neuroweave.diagnose.results.plan import Plan, SamplingPlan
from neuroweave.diagnose.results.records import Record
from neuroweave.diagnose.subject import Subject
from neuroweave.text.sample import encode

Mode = Literal["greedy", "sampled"]


class Written(Record):
    """What one model wrote after a prompt, before it is laid beside the base's. One number per new token."""

    model: str
    prompt: str
    mode: Mode
    token_ids: list[int]
    text: str = Field(description="without special tokens")
    tokens: list[str] = Field(description="each new token as text of its own")
    confidence: list[float]
    state_cosine: list[float] = Field(description="one fewer than tokens, or empty")


class Watch(LogitsProcessor):
    """Notes at every step of `generate` the probability of the top token and how far the last hidden state turned.

    Reads the model's own logits, before anything that sampling does to them; changes nothing. Raises
    FloatingPointError for logits that give no probabilities, before a token is drawn from them.
    """

    def __init__(self) -> None:
        self.confidence: list[float] = []
        self.state_cosine: list[float] = []
        self._logits: Tensor | None = None
        self._state: Tensor | None = None
        self._state_before: Tensor | None = None

    def see_logits(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Forward hook of the model: `output.logits` [1, tokens, vocabulary]."""
        self._logits = output.logits[0, -1]

    def see_state(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Forward pre-hook of the output head, which is given the last hidden states [1, tokens, hidden size]."""
        if arguments and isinstance(arguments[0], Tensor):
            self._state = arguments[0].flatten(0, -2)[-1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self._logits is not None
        logits = self._logits.double()
        total = logits.logsumexp(0)
        if not bool(torch.isfinite(total)):
            raise FloatingPointError
        self.confidence.append(float((logits.max() - total).exp()))
        if self._state is not None and self._state_before is not None:
            self.state_cosine.append(cosine(self._state_before, self._state))
        self._logits, self._state, self._state_before = None, None, self._state
        return scores


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two vectors, exactly 1 for equal ones; 0 where one of them is 0."""
    if torch.equal(a, b):
        return 1.0
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    return max(-1.0, min(1.0, float(a @ b) / norms)) if norms else 0.0


def continue_prompts(
    subjects: Sequence[Subject],
    prompts: Sequence[str],
    plan: Plan,
    *,
    after_prompt: Callable[[], object] = lambda: None,
) -> list[Generated]:
    """Each prompt with one continuation per model and mode; the first subject is the base. No chat template.

    `after_prompt` is called after each continuation. Raises ValueError as `continue_prompt` does.
    """
    plan = plan.model_copy(update={"prompts": tuple(prompts)})
    written = [write_all(subject, plan, after_prompt=after_prompt) for subject in subjects]
    return join_written(written, subjects[0].tokenizer)


def modes(plan: Plan) -> tuple[Mode, ...]:
    return ("greedy", "sampled") if plan.sampling else ("greedy",)


def write_all(subject: Subject, plan: Plan, *, after_prompt: Callable[[], object] = lambda: None) -> list[Written]:
    """One model's continuations of all prompts of the plan: greedy ones first, then sampled ones."""
    written = []
    for mode in modes(plan):
        for prompt in plan.prompts:
            written.append(continue_prompt(subject, prompt, plan, mode))
            after_prompt()
    return written


def continue_prompt(subject: Subject, prompt: str, plan: Plan, mode: Mode) -> Written:
    """Up to `plan.new_tokens` tokens after `prompt`; fewer where the model ends its text.

    Sampling starts from the plan's seed for every model and prompt, and leaves torch's random state as it was.
    Raises ValueError for a model that cannot generate, a prompt that does not fit, and logits that are not numbers.
    """
    model: Any = subject.model
    if not callable(getattr(model, "generate", None)):
        raise ValueError(
            f"{subject.name} ({type(model).__name__}) has no generate(), so it cannot continue prompts; "
            "compare a causal language model, or give no prompts"
        )
    ids = torch.tensor([encode(subject.tokenizer, prompt, special=True)], device=subject.device)
    check_length(subject, prompt, ids.shape[1], plan.new_tokens)
    watch = Watch()
    try:
        with watching(model, watch), seeded(subject.device, (plan.sampling or SamplingPlan()).seed):
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings(subject, plan, mode),
                logits_processor=LogitsProcessorList([watch]),
            )
    except FloatingPointError as error:
        raise ValueError(
            f"{subject.name}: after the prompt {shown(prompt)} and {len(watch.confidence)} new tokens ({mode}) the "
            "logits give no probabilities (not finite)"
        ) from error
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{subject.name} ({type(model).__name__}): generate() does not work on this model: {error}"
        ) from error
    return describe_written(subject, prompt, mode, ids[0].tolist(), output[0, ids.shape[1] :].tolist(), watch)


def describe_written(
    subject: Subject, prompt: str, mode: Mode, prompt_ids: Sequence[int], token_ids: list[int], watch: Watch
) -> Written:
    count = len(token_ids)  # generate may run a step more than it needs before it looks for an end
    whole = len(watch.state_cosine) >= count - 1
    return Written(
        model=subject.name,
        prompt=prompt,
        mode=mode,
        token_ids=token_ids,
        text=decode(subject.tokenizer, token_ids),
        tokens=token_texts(subject.tokenizer, prompt_ids[-1], token_ids),
        confidence=watch.confidence[:count],
        state_cosine=watch.state_cosine[: max(count - 1, 0)] if whole else [],
    )


def check_length(subject: Subject, prompt: str, tokens: int, new_tokens: int) -> None:
    """Raise ValueError for a prompt without a token, or one that leaves too little room for what is to be written."""
    if tokens == 0:
        raise ValueError(f"the prompt {shown(prompt)} holds no token for {subject.name}; give it one with text in it")
    if subject.longest is not None and tokens + new_tokens > subject.longest:
        raise ValueError(
            f"the prompt {shown(prompt)} ({tokens} tokens) and {new_tokens} new tokens are more than {subject.name} "
            f"can read ({subject.longest}); shorten the prompt, or write fewer tokens"
        )


def settings(subject: Subject, plan: Plan, mode: Mode) -> GenerationConfig:
    """The decoding of the plan, whatever the model's own generation config prefers; its end tokens are kept."""
    own = getattr(subject.model, "generation_config", None)
    end = own.eos_token_id if own is not None and own.eos_token_id is not None else subject.tokenizer.eos_token_id
    pad = end[0] if isinstance(end, list) else end
    drawn: dict[str, Any] = {"do_sample": False}
    if mode == "sampled":
        off = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
        sampling = plan.sampling or SamplingPlan()
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, **off}
    return GenerationConfig(
        use_cache=True,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=plan.new_tokens,
        eos_token_id=end,
        pad_token_id=0 if pad is None else pad,
        **drawn,
    )


@contextmanager
def watching(model: Any, watch: Watch) -> Iterator[None]:
    """The hooks of `watch` on the model and, where it has one, on its output head; taken off at the end."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hooks = [model.register_forward_hook(watch.see_logits)]
    if isinstance(head, nn.Module):
        hooks.append(head.register_forward_pre_hook(watch.see_state))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Sampling from `seed` inside; afterwards torch's random states are as before, those of CUDA too."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator
        for place in devices:
            torch.cuda.set_rng_state(torch.Generator(place).manual_seed(seed).get_state(), place)
        yield


def token_texts(tokenizer: PreTrainedTokenizerBase, before: int, token_ids: Sequence[int]) -> list[str]:
    """Each token as text of its own, special tokens too; `before` is the token ahead of the first.

    Tokenizers that mark words decode a lone token without its space, so each is decoded with the one before it.
    """
    found = []
    for previous, token in zip([before, *token_ids], token_ids, strict=False):
        alone, pair = (decode(tokenizer, ids, special=True) for ids in ([previous], [previous, token]))
        joined = pair.startswith(alone) and len(pair) > len(alone)
        found.append(pair[len(alone) :] if joined else decode(tokenizer, [token], special=True))
    return found


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=not special))


def join_written(written_by_model: Sequence[Sequence[Written]], tokenizer: PreTrainedTokenizerBase) -> list[Generated]:
    """What the models wrote, prompt by prompt; the first model is the base, `tokenizer` is everyone's.

    Raises ValueError if the models were not given the same prompts in the same order.
    """
    if len({tuple((written.prompt, written.mode) for written in model) for model in written_by_model}) > 1:
        raise ValueError("the models were not given the same prompts in the same order; let them write again")
    return [
        Generated(
            prompt=same[0].prompt,
            mode=same[0].mode,
            continuations=[continuation(written, same[0], tokenizer) for written in same],
        )
        for same in zip(*written_by_model, strict=True)
    ]


def continuation(written: Written, base: Written, tokenizer: PreTrainedTokenizerBase) -> Continuation:
    """What was written, and how much of it at the start is the base's."""
    shared = 0
    for ours, theirs in zip(base.token_ids, written.token_ids, strict=False):
        if ours != theirs:
            break
        shared += 1
    same = decode(tokenizer, written.token_ids[:shared])
    # A character can span tokens, so the shared tokens may end in half a character: count what both texts show.
    characters = next(
        (at for at, (a, b) in enumerate(zip(written.text, same, strict=False)) if a != b),
        min(len(written.text), len(same)),
    )
    return Continuation(
        model=written.model,
        text=written.text,
        tokens=written.tokens,
        shared_tokens=shared,
        shared_characters=characters,
        confidence=written.confidence,
        state_cosine=written.state_cosine,
    )


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt with nothing in it."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; a model needs something to continue")


def shown(prompt: str, length: int = 40) -> str:
    return repr(prompt if len(prompt) <= length else f"{prompt[: length - 1]}…")
