"""`neuroweave generate`: continue a prompt with any checkpoint, the text on stdout as it comes."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import json_option, note, print_json
from neuroweave.cli.writing_options import SEEDS, decoding, loader_of, writing_options

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from neuroweave.runtime.writing import Continuation


@click.command(
    "generate",
    help="""Continue a prompt with MODEL, a checkpoint folder or a hub id, patched or not.

    The text goes to stdout as it is made, and nothing else does. A tokenizer with a chat template gets the prompt as a
    user's message; --raw continues the text itself. Without options, the checkpoint's own generation settings hold.

    \b
    neuroweave generate MODEL --prompt "Once upon a time" --raw
    neuroweave generate MODEL --prompt "What is a neuron?" --temperature 0.7 --seed 1
    cat notes.txt | neuroweave generate MODEL --prompt -""",
)
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="What to continue; - takes it from stdin, as a pipe without it does.")
@click.option("--file", metavar="FILE", type=click.Path(path_type=Path), help="A UTF-8 file to continue.")
@click.option("--chat/--raw", default=None, help="With or without the chat template.  [default: with it, if any]")
@click.option("--system", metavar="TEXT", help="The system message of the chat.")
@writing_options
@click.option("--prompt-lookup", type=click.IntRange(min=1), metavar="N", help="Draft N tokens from the text itself.")
@click.option("--assistant", metavar="MODEL", help="A smaller model that drafts for this one.")
@click.option(
    "--backend", type=click.Choice(["torch", "jax"]), default="torch", show_default=True, help="jax: NeuroBLAST models."
)
@click.option("--stats", is_flag=True, help="One line on stderr at the end: tokens and tokens per second.")
@click.option("--verbose", is_flag=True, help="Say on stderr how the model was loaded and how tokens are chosen.")
@json_option
def command(
    model: str, prompt: str | None, file: Path | None, chat: bool | None, system: str | None, new_tokens: int,
    seed: int | None, assistant: str | None, dtype: str, backend: str, fast: bool, weights: str | None,
    sparse: float | None, device: str,
    stats: bool, verbose: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    load = loader_of(backend, fast=fast, weights=weights, sparse=sparse)
    chosen = decoding(**options)
    if assistant and "prompt_lookup_num_tokens" in chosen:
        raise ValueError("--assistant and --prompt-lookup both draft tokens; give one of them")
    text = read_prompt(prompt, file)
    writer = load(model, assistant=assistant, dtype=dtype, device=device)
    ids, templated = writer.encode(text, chat=chat, system=system)
    limit = writer.room(ids, new_tokens)
    config = writer.settings(chosen, limit, chat=templated)
    seed = random.randrange(SEEDS) if seed is None else seed
    facts = {"chat": templated, "settings": in_use(config), "seed": seed}
    if writer.notice:
        note(f"{model}: {writer.notice}")
    if verbose:
        note(f"{model}: {writer.how}; {'chat template' if templated else 'raw text'}")
        note(", ".join(f"{name} {value}" for name, value in in_use(config).items()) + f", seed {seed}")
    with stdout(silent=as_json) as show:
        continuation = writer.write(ids, config, seed=seed, show=show)
    result = report(continuation, len(ids), cut=limit < new_tokens)
    if as_json:
        print_json({"model": model, "prompt": text, "runtime": writer.how, **result, **facts})
    if stats:
        note(summary(result))
    if result["stopped"] == "context" and not as_json:
        note(f"the context is full: {len(ids)} tokens of prompt and {limit} new ones")


@contextlib.contextmanager
def stdout(*, silent: bool) -> Iterator[Callable[[str], None]]:
    """What shows a text piece by piece, each flushed; at the end, the last line is ended."""
    ended = False

    def show(text: str) -> None:
        nonlocal ended
        ended = text.endswith("\n")
        if not silent:
            click.echo(text, nl=False)  # echo flushes

    yield show
    if not silent and not ended:
        click.echo()


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text to continue. A line break that ends a file or a pipe belongs to the file, not to the prompt.

    Raises ValueError when there is none, when it is empty, and for what is not UTF-8.
    """
    if prompt is not None and file is not None:
        raise ValueError("give the prompt with --prompt or with --file, not both")
    data: bytes | None = None
    if file is not None:
        origin, data = str(file), read_bytes(file)
    elif prompt == "-" or (prompt is None and sys.stdin is not None and not sys.stdin.isatty()):
        origin, data = "stdin", sys.stdin.buffer.read()
    elif prompt is not None:
        origin = "--prompt"
    else:
        raise ValueError("nothing to continue: give --prompt TEXT or --file FILE, or pipe a text in")
    if data is not None:
        try:
            prompt = data.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{origin}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    assert prompt is not None
    check_utf8(prompt, origin)
    if not prompt.strip():
        raise ValueError(f"{origin}: the prompt is empty; a model needs something to continue")
    return prompt


def check_utf8(text: str, origin: str) -> None:
    """Raise ValueError for an argument whose bytes were no UTF-8: Python hands them on as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{origin}: not UTF-8 text (at character {error.start})") from error


def read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: the prompt cannot be read ({error.strerror})") from error


def in_use(config: GenerationConfig) -> dict[str, Any]:
    """How tokens are chosen, in the names of transformers; where checkpoint and options are silent, its defaults."""
    names: dict[str, float | None] = {"repetition_penalty": 1.0}
    if config.do_sample:
        names |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
    values = {name: getattr(config, name, None) for name in names}
    return {"do_sample": bool(config.do_sample)} | {
        name: names[name] if value is None else value for name, value in values.items()
    }


def report(continuation: Continuation, prompt_tokens: int, *, cut: bool) -> dict[str, Any]:
    """What was written and how fast; seconds of reading the prompt (prefill) and of all tokens after the first."""
    prefill, decode = continuation.prefill_seconds, continuation.decode_seconds
    tokens, later = len(continuation.token_ids), continuation.decoded_tokens
    return {
        "text": continuation.text,
        "token_ids": continuation.token_ids,
        "prompt_tokens": prompt_tokens,
        "new_tokens": tokens,
        "stopped": "context" if cut and continuation.stopped == "length" else continuation.stopped,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "prefill_tokens_per_second": prompt_tokens / prefill if prefill > 0 else None,
        "decode_tokens_per_second": later / decode if later and decode > 0 else None,
    }


def summary(facts: dict[str, Any]) -> str:
    rates = [
        f"{part} {facts[f'{part}_tokens_per_second']:.1f} tokens/s"
        for part in ("prefill", "decode")
        if facts[f"{part}_tokens_per_second"] is not None
    ]
    counts = f"{facts['prompt_tokens']} tokens of prompt, {facts['new_tokens']} new"
    return ", ".join([counts, *rates, f"stopped: {facts['stopped']}"])
