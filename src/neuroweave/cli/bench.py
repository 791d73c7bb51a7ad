"""`neuroweave bench`: how fast a model reads and writes, way by way, beside what memory allows."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import click

from neuroweave.cli.console import json_option, note, print_json, print_table

if TYPE_CHECKING:
    from neuroweave.diagnose.speed import Measured, Way
    from neuroweave.runtime.sparsity import Skipping


@click.command(
    "bench",
    help="""Measure how fast MODEL decodes, in several ways of running it, paired in one run.

    Each way runs in each round, after one run to warm up; the baseline is transformers' eager generate with its cache.
    The roofline is what memory allows: bandwidth, measured here, by the bytes of weights that a token needs.

    \b
    neuroweave bench MODEL
    neuroweave bench ORIGINAL --against PATCHED --weights float32,int8
    neuroweave bench MODEL --perplexity 4000 --compiled --rounds 7""",
)
@click.argument("model")
@click.option("--against", metavar="OTHER", help="A second model, in the same rounds.")
@click.option("--weights", default="float32,int8,int4", show_default=True, help="Formats of the fast runtime.")
@click.option(
    "--sparse",
    metavar="SHARES",
    help="Also with these shares of the MLPs' neurons skipped, such as 0,0.4; 0: those that are exactly zero.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=16), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(min=2), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1, 256), help="[default: as torch has them]")
@click.option("--no-cache", "uncached", is_flag=True, help="Also transformers without its cache.")
@click.option("--compiled", is_flag=True, help="Also transformers' compiled step, which takes minutes to compile.")
@click.option(
    "--perplexity", type=click.IntRange(min=100), metavar="TOKENS", help="Also of each way, on shipped prose."
)
@json_option
def command(
    model: str, against: str | None, weights: str, sparse: str | None, prompt_tokens: int, new_tokens: int, rounds: int,
    threads: int | None, uncached: bool, compiled: bool, perplexity: int | None, as_json: bool,
) -> None:  # fmt: skip
    import torch

    from neuroweave.diagnose.environment import describe_environment
    from neuroweave.diagnose.speed import BASELINE, formats_of, measure_ways, memory_bandwidth

    formats, shares = formats_of(weights), shares_of(sparse)
    torch.set_num_threads(threads or torch.get_num_threads())
    labels = [model] if against is None else [model, against]
    ways: list[Way] = []
    losses: dict[tuple[str, str], float] = {}
    prompt: list[int] = []
    for label in labels:
        found, prompt, of_texts = prepare(
            label, formats, shares, prompt_tokens, new_tokens, uncached, compiled, perplexity
        )
        ways += found
        losses |= of_texts
    say = (lambda line: None) if as_json else note
    bandwidth = memory_bandwidth(torch.get_num_threads())
    measured = measure_ways(ways, prompt, new_tokens, rounds, say)
    bandwidth = max(bandwidth, memory_bandwidth(torch.get_num_threads()))
    machine = describe_environment()
    own = {each.model: each.timings[0].tokens for each in measured if each.name == BASELINE}
    facts = [facts_of(each, own[each.model], bandwidth, losses) for each in measured]
    setting = {
        "cpu": machine.cpu, "threads": machine.threads, "date": machine.date, "prompt_tokens": len(prompt),
        "new_tokens": new_tokens, "rounds": rounds, "bandwidth_bytes_per_second": bandwidth,
    }  # fmt: skip
    if as_json:
        print_json({"setting": setting, "ways": facts})
        return
    show(facts, setting, several=len(labels) > 1)


def prepare(
    source: str, formats: list[str], shares: list[float], prompt_tokens: int, new_tokens: int, uncached: bool,
    compiled: bool, perplexity: int | None,
) -> tuple[list[Way], list[int], dict[tuple[str, str], float]]:  # fmt: skip
    """(the ways to run a model, the prompt, the loss of each way by model and way)."""
    from neuroweave.diagnose.decoding_loss import decoding_loss, prose_windows
    from neuroweave.diagnose.speed import BASELINE, COMPILED, UNCACHED, runtime_way, transformers_way
    from neuroweave.runtime.lowering import UnsupportedModelError
    from neuroweave.runtime.sparsity import thresholds_on_prose
    from neuroweave.runtime.writing import load_causal

    model, tokenizer, _ = load_causal(source, "float32", "cpu")
    names = [UNCACHED] * uncached + [BASELINE] + [COMPILED] * compiled
    ways = [transformers_way(source, name, model) for name in names]
    positions = prompt_tokens + new_tokens
    hows: list[tuple[str, Skipping | None]] = []
    try:
        skips = [None, *(thresholds_on_prose(model, tokenizer, share) for share in shares)]
        for format, skipping in [(format, skipping) for format in formats for skipping in skips]:
            ways.append(runtime_way(source, model, positions, format=format, skipping=skipping))
            hows.append((format, skipping))
    except UnsupportedModelError as error:
        note(f"{source}: {error}")
    windows = prose_windows(tokenizer, max(perplexity or 0, 2 * prompt_tokens))
    prompt = [token for window in windows for token in window][:prompt_tokens]
    losses = {}
    if perplexity:
        note(f"{source}: perplexity of transformers and of {', '.join(formats)}")
        losses[source, BASELINE] = decoding_loss(model, windows)
        for way, (format, skipping) in zip(ways[len(names) :], hows, strict=True):
            thresholds = skipping.worth_it() if skipping else None
            losses[source, way.name] = decoding_loss(model, windows, format=format, thresholds=thresholds)
    return ways, prompt, losses


def shares_of(text: str | None) -> list[float]:
    """Raises ValueError for what is no share below 1."""
    found = []
    for part in (text or "").split(","):
        if not part.strip():
            continue
        try:
            share = float(part)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            raise ValueError(f"--sparse takes shares from 0 to below 1, such as 0,0.4; got {part.strip()!r}")
        found.append(share)
    return found


def facts_of(
    each: Measured, expected: list[int], bandwidth: float, losses: dict[tuple[str, str], float]
) -> dict[str, Any]:
    rates = sorted(each.decode_rates())
    loss = losses.get((each.model, each.name))
    tokens = each.timings[0].tokens
    roofline = bandwidth / each.bytes_a_token
    return {
        "model": each.model,
        "way": each.name,
        "decode_tokens_per_second": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
        "ratio": statistics.median(each.ratios),
        "ratio_lowest": min(each.ratios),
        "ratio_highest": max(each.ratios),
        "first_token_seconds": each.first_token_seconds(),
        "bytes_per_token": each.bytes_a_token,
        "weight_bytes": each.weight_bytes,
        "roofline_tokens_per_second": roofline,
        "share_of_roofline": statistics.median(rates) / roofline,
        "same_tokens": tokens == expected[: len(tokens)],
        "joules_per_token": each.joules_a_token(),
        "perplexity": None if loss is None else math.exp(loss),
    }


def show(facts: list[dict[str, Any]], setting: dict[str, Any], *, several: bool) -> None:
    rows = []
    for each in facts:
        perplexity = "" if each["perplexity"] is None else f"{each['perplexity']:.3f}"
        rows.append(
            ([each["model"]] if several else [])
            + [
                each["way"],
                f"{each['decode_tokens_per_second']:.1f} ({each['slowest']:.1f} to {each['fastest']:.1f})",
                f"{each['ratio']:.2f} ({each['ratio_lowest']:.2f} to {each['ratio_highest']:.2f})",
                f"{each['first_token_seconds'] * 1e3:.0f} ms",
                f"{each['bytes_per_token'] / 1e6:.0f} MB",
                f"{each['roofline_tokens_per_second']:.0f}",
                f"{each['share_of_roofline']:.0%}",
                "yes" if each["same_tokens"] else "no",
                perplexity,
            ]
        )
    head = ["way", "decode tokens/s", "times baseline", "first token", "read a token", "roofline", "share"]
    head += ["same tokens", "perplexity"]
    print_table((["model"] if several else []) + head, rows)
    joules = [each["joules_per_token"] for each in facts]
    if any(value is not None for value in joules):
        click.echo("joules a token: " + ", ".join("?" if value is None else f"{value:.2f}" for value in joules))
    click.echo(
        f"{setting['cpu']}, {setting['threads']} threads, {setting['date'][:10]}; {setting['prompt_tokens']} tokens of "
        f"prompt, {setting['new_tokens']} new, {setting['rounds']} rounds, medians (lowest to highest); memory read at "
        f"{setting['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s at best"
    )
