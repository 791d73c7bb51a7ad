"""What can be found wrong before a weight is read, so that no hours of measuring end in it: folders that are no models,
models that cannot be compared, prompts that do not fit, benchmarks that do not load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from neuroweave.diagnose.probes.generation import check_length
from neuroweave.diagnose.probes.task_files import find_tasks
from neuroweave.diagnose.probes.tasks import check_limit, load_tasks, require_tasks_extra
from neuroweave.diagnose.results.plan import DEFAULT_PROMPTS, Plan, TaskPlan
from neuroweave.diagnose.subject import Subject, check_comparable, check_vocabulary
from neuroweave.text.sample import draw_sample, encode
from neuroweave.text.tokens import NamedText

WEIGHTS = ("*.safetensors", "*.bin")


def outline(source: str, name: str) -> Subject:
    """The model without its weights: name, config and tokenizer. Raises ValueError for a folder that is no model."""
    from transformers import AutoConfig

    from neuroweave.checkpoint.loading import check_source, check_weights, load_tokenizer

    check_source(source)
    folder = Path(source)
    check_weights(folder)
    if folder.is_dir() and not any(file.is_file() for kind in WEIGHTS for file in folder.glob(kind)):
        raise ValueError(f"{source}: no weights in this folder; expected model.safetensors, or shards with an index")
    empty: Any = nn.Module()
    try:
        empty.config = AutoConfig.from_pretrained(source)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{source}: its config.json is not a model's ({error})") from error
    return Subject(name, empty, load_tokenizer(source), source)


def check_models(outlines: Sequence[Subject], documents: Iterable[NamedText], plan: Plan) -> None:
    """Raise ValueError where the others cannot be compared with the base, the first, on this text and these prompts."""
    base, *others = outlines
    sample = draw_sample(documents, base.tokenizer, tokens=plan.tokens, window=plan.window, passage=plan.passage)
    for other in others:
        check_comparable(base, other, sample, plan.window)
        check_vocabulary((base.name, vocabulary(base)), (other.name, vocabulary(other)))
    if plan.prompts == DEFAULT_PROMPTS:  # where those do not fit, only the continuations are missing
        return
    for subject in outlines:
        for prompt in plan.prompts:
            tokens = len(encode(subject.tokenizer, prompt, special=True))
            check_length(subject, prompt, tokens, plan.new_tokens)


def vocabulary(subject: Subject) -> int | None:
    """Entries that the model predicts over, where its config says so."""
    config = subject.config.get_text_config() if hasattr(subject.config, "get_text_config") else subject.config
    return getattr(config, "vocab_size", None)


def check_tasks(plan: TaskPlan, *, seed: int) -> None:
    """Load the benchmarks and let them go. Raises as `run_tasks`, whatever the model."""
    wanted = find_tasks(plan.names)
    require_tasks_extra()
    from neuroweave.diagnose.probes.harness import own_randomness, quiet

    with tempfile.TemporaryDirectory(prefix="neuroweave-tasks-") as folder, quiet(), own_randomness(seed):
        check_limit(load_tasks(wanted, Path(folder), seed=seed)["tasks"], plan.limit)
