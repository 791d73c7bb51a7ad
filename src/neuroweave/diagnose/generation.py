"""The same prompts continued by every model, greedily, and how far each goes along with the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from neuroweave.diagnose.comparison import Continuation, Generated
from neuroweave.diagnose.passages import encode
from neuroweave.diagnose.speed import generate
from neuroweave.diagnose.subject import Subject


def continue_prompts(
    subjects: Sequence[Subject],
    prompts: Sequence[str],
    new_tokens: int,
    *,
    after_prompt: Callable[[], object] = lambda: None,
) -> list[Generated]:
    """Each prompt with one continuation per model; the first subject is the base. Plain text, no chat template.

    To be called with the models at rest. `after_prompt` is called after each model's continuation.
    """
    generated = []
    for prompt in prompts:
        written: list[list[int]] = []
        for subject in subjects:
            ids = torch.tensor([encode(subject.tokenizer, prompt, special=True)], device=subject.device)
            written.append(generate(subject, ids, new_tokens)[0, ids.shape[1] :].tolist())
            after_prompt()
        continuations = [
            continuation(subject, tokens, written[0]) for subject, tokens in zip(subjects, written, strict=True)
        ]
        generated.append(Generated(prompt=prompt, continuations=continuations))
    return generated


def continuation(subject: Subject, tokens: Sequence[int], base_tokens: Sequence[int]) -> Continuation:
    """What `tokens` say, and how many of them at the start are the base's."""
    shared = 0
    for ours, theirs in zip(base_tokens, tokens, strict=False):
        if ours != theirs:
            break
        shared += 1
    text, same = (
        str(subject.tokenizer.decode(list(part), skip_special_tokens=True)) for part in (tokens, tokens[:shared])
    )
    # A character can span tokens, so the shared tokens may end in half a character: count what both texts show.
    characters = next(
        (at for at, (a, b) in enumerate(zip(text, same, strict=False)) if a != b), min(len(text), len(same))
    )
    return Continuation(model=subject.name, text=text, shared_tokens=shared, shared_characters=characters)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt with nothing in it."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; a model needs something to continue")
