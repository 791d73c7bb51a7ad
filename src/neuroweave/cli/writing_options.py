"""What the commands that write text share: options of the model and of how tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from neuroweave.checkpoint.loading import check_source
from neuroweave.cli.console import require_jax

if TYPE_CHECKING:
    from neuroweave.runtime.writing import Writer

SEEDS = 2**32
OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="At most so many."),
    click.option("--greedy", is_flag=True, help="Always the likeliest token."),
    click.option("--temperature", type=click.FloatRange(min=0), help="Sample; 0 means --greedy."),
    click.option("--top-k", type=click.IntRange(min=0), help="Sample from the K likeliest; 0 means all."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from this share of probability."),
    click.option(
        "--min-p", type=click.FloatRange(0, 1), help="Sample what has this share of the likeliest's probability."
    ),
    click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Above 1: repeat less."),
    click.option("--seed", type=click.IntRange(0, SEEDS - 1), help="The same again.  [default: another each time]"),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
    ),
    click.option("--fast", is_flag=True, help="Llama and its kin, NeuroBLAST: compiled for this CPU; the same tokens."),
    click.option(
        "--weights",
        type=click.Choice(["float32", "int8", "int4"]),
        help="With --fast: round the weights; faster, less exact.",
    ),
    click.option(
        "--sparse",
        type=click.FloatRange(0, 1, max_open=True),
        metavar="SHARE",
        help="With --fast: skip this share of MLP neurons, those that add least; less exact. 0: exact zeros alone.",
    ),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, ..."),
)


def writing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `OPTIONS` to a command, in that order."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def loader_of(backend: str, *, fast: bool, weights: str | None, sparse: float | None) -> Callable[..., Writer]:
    """What loads a model to write with; what is heavy is imported then. Raises ValueError for what does not fit
    together, and where the backend is not installed."""
    for name, value in (("weights", weights), ("sparse", sparse)):
        if value is not None and not fast:
            raise ValueError(f"--{name} {value} is of the fast runtime; give --fast too")
    if fast and backend != "torch":
        raise ValueError(f"--fast and --backend {backend} are two ways to make tokens; give one of them")
    if backend == "jax":
        require_jax()

    def load(source: str, **how: Any) -> Writer:
        check_source(source)
        if fast:
            from neuroweave.runtime.fast_writing import FastWriter

            return FastWriter.load(source, weights=weights or "float32", sparse=sparse, **how)
        if backend == "jax":
            from neuroweave.runtime.jax_writing import JaxWriter

            return JaxWriter.load(source, **how)
        from neuroweave.runtime.writing import Writer

        return Writer.load(source, **how)

    return load


def decoding(
    *, greedy: bool, repetition_penalty: float | None, prompt_lookup: int | None = None, **sampling: int | float | None
) -> dict[str, Any]:
    """What the options say to transformers' generation config; nothing where they say nothing."""
    given = {name: value for name, value in sampling.items() if value is not None}
    numbers = given if repetition_penalty is None else given | {"repetition_penalty": repetition_penalty}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a finite number")
    chosen: dict[str, Any] = {}
    if greedy and given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--greedy takes the likeliest token and has no use for {named}; leave one of them out")
    if greedy or given.get("temperature") == 0:
        chosen["do_sample"] = False
    elif given:
        chosen |= {"do_sample": True, **given}
    if repetition_penalty is not None:
        chosen["repetition_penalty"] = repetition_penalty
    if prompt_lookup is not None:
        chosen["prompt_lookup_num_tokens"] = prompt_lookup
    return chosen
