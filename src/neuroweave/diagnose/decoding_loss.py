"""The loss of a model as it decodes: token by token through the runtime that is asked about, on shipped prose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neuroweave.runtime.engine import Engine
from neuroweave.runtime.lowering import lower
from neuroweave.text.documents import documents
from neuroweave.text.passages import PASSAGE
from neuroweave.text.sample import draw_sample

WINDOW = 256


def prose_windows(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[tuple[int, ...]]:
    """Windows of the evaluation prose, about so many tokens in all."""
    sample = draw_sample(documents("evaluation"), tokenizer, tokens=tokens, window=WINDOW, passage=PASSAGE)
    return [window.token_ids for window in sample.windows]


@torch.no_grad()
def decoding_loss(model: Any, windows: Sequence[tuple[int, ...]], **how: Any) -> float:
    """Nats a token. `how`: as `lower` takes it, and the runtime decodes; nothing: the model's own forward pass."""
    total, count = 0.0, 0
    engine = Engine(lower(model, check=False, **how), positions=WINDOW) if how else None
    for window in windows:
        if engine is None:
            ids = torch.tensor([window], device=model.device)
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
            total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        else:
            engine.reset()
            logits = engine.read_prompt([window[0]])
            for token in window[1:]:
                total -= float(logits[token] - logits.logsumexp(0))
                logits = engine.step(token)
        count += len(window) - 1
    return total / count
