"""How far one served model's predictions are from another's along a text: KL of each token's distribution."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from neuroweave.chat.answers import shown
from neuroweave.chat.prompts import as_text
from neuroweave.chat.protocol import ChatMessage, Text
from neuroweave.chat.served import Served

MOST = 2048  # tokens of an answer


class DivergenceRequest(BaseModel):
    """`answer`: what was said after `messages`; the models named read both."""

    model_config = ConfigDict(extra="forbid")
    model: str
    against: str
    messages: list[ChatMessage] = Field(min_length=1)
    answer: Text = Field(min_length=1)


def divergence(model: Served, against: Served, asked: DivergenceRequest) -> dict[str, Any]:
    """KL(against || model) in nats before each token of the answer, and the token's log-probability in both.

    Raises ValueError for models with other tokens and for a text that is too long.
    """
    tokenizer = model.writer.tokenizer
    if tokenizer.get_vocab() != against.writer.tokenizer.get_vocab():
        raise ValueError(f"{model.name} and {against.name} have other tokens; their predictions cannot be compared")
    prompt = model.encode_chat([message.for_template() for message in asked.messages])
    answer = as_text(tokenizer, asked.answer)
    if len(answer) > MOST:
        raise ValueError(f"the answer has {len(answer):,} tokens; at most {MOST:,} are compared")
    ids = prompt + answer
    for each in (model, against):
        each.writer.room(ids[:-1], 1)
    kl, logprobs, logprobs_against = [], [], []
    first = len(prompt) - 1
    pieces = (each.batcher.logits(ids[:-1], first) for each in (model, against))
    for (start, ours), (_, theirs) in zip(*pieces, strict=True):
        q, p = (rows.log_softmax(-1) for rows in (ours, theirs))
        kl += (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
        place = torch.tensor(ids[start + 1 : start + 1 + len(q)])[:, None]
        logprobs += q.gather(1, place)[:, 0].tolist()
        logprobs_against += p.gather(1, place)[:, 0].tolist()
    tokens = [
        {"token": shown(tokenizer, ids[at - 1 : at], ids[at]), "kl": k, "logprob": a, "logprob_against": b}
        for at, k, a, b in zip(range(len(prompt), len(ids)), kl, logprobs, logprobs_against, strict=True)
    ]
    return {"model": model.name, "against": against.name, "mean_kl": sum(kl) / len(kl), "tokens": tokens}
