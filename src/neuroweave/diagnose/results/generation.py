"""The same prompts, continued by every model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from neuroweave.diagnose.results.records import Record


class Continuation(Record):
    """What one model wrote after a prompt. The lists hold one number per new token."""

    model: str
    text: str
    tokens: list[str] = Field(description="each new token as text of its own")
    shared_tokens: int = Field(description="leading tokens that are the base's as well")
    shared_characters: int
    confidence: list[float] = Field(description="probability of the top token where each token was chosen")
    state_cosine: list[float] = Field(
        description="cosine similarity of the last hidden states from which a token and the one before were chosen; "
        "one number fewer than tokens; empty where the model does not give its states"
    )


class Generated(Record):
    """One prompt and its continuations, the base's first."""

    prompt: str
    mode: Literal["greedy", "sampled"]
    continuations: list[Continuation]
