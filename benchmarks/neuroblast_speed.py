"""NeuroBLAST against its published form: training step, greedy decoding, time per token, memory of the cache.

    python benchmarks/neuroblast_speed.py train [--vocabulary 65536] [--batch 2] [--tokens 1280]
    python benchmarks/neuroblast_speed.py decode [--new-tokens 256]
    python benchmarks/neuroblast_speed.py context [--compiled] [--lengths 64 256 1024 2048 4096]
    python benchmarks/neuroblast_speed.py cache

The model is a preset with random weights. The published form is the same model with the same weights in two-dimensional
convolutions and written-out attention; for decoding it passes over the whole sequence for every token, which is the
published way that gives right tokens. Losses and tokens are compared. What is compared runs in turn, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from neuroblast_convolution import machine_line, ratio, spread
from published_neuroblast import decode_without_cache, published_twin
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, StaticCache
from whole_process import print_rows

from neuroweave.neuroblast.configuration import PRESETS, NeuroBlastConfig
from neuroweave.neuroblast.layer_plan import plan_layers
from neuroweave.neuroblast.modeling import NeuroBlastConvolutionLayer, NeuroBlastForCausalLM

TRAINING_GOAL, DECODING_GOAL = 1.3, 8.0
CACHED = "here, dynamic cache"
STEPS = 32  # timed steps at a context
PARTS_OF_A_STEP = ("attention", "convolution layers", "head")


def build(preset: str, vocabulary: int, device: str = "cpu") -> NeuroBlastForCausalLM:
    """A preset with random weights, wide enough (0.05) that greedy tokens change from step to step."""
    torch.manual_seed(0)
    settings = {**PRESETS[preset][0], "vocab_size": vocabulary, "initializer_range": 0.05}
    return NeuroBlastForCausalLM(NeuroBlastConfig(**settings)).to(device)


def random_tokens(vocabulary: int, batch: int, tokens: int) -> Tensor:
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1))


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------------- training


def training_step(model: NeuroBlastForCausalLM, ids_BT: Tensor) -> Callable[[], float]:
    """Forward, backward and AdamW; gives the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def train(arguments: argparse.Namespace) -> None:
    """Steps from equal weights on equal tokens, in turn."""
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        ours = build(arguments.preset, arguments.vocabulary).train()
        convolutions = published_twin(ours, attention=False)
        models = {"published": published_twin(ours), "published convolutions": convolutions, "here": ours}
        ids_BT = random_tokens(arguments.vocabulary, arguments.batch, arguments.tokens)
        times, loss = timed_steps({name: training_step(model, ids_BT) for name, model in models.items()}, arguments)
        ratios = (spread(ratio(times["here"], times[name]), 2) for name in list(models)[:2])
        rows.append((str(threads), *(spread(each, 0) for each in times.values()), f"{loss:.4f}", *ratios))
        live, whole = (sum(p.numel() for p in model.parameters()) for model in (ours, convolutions))
    print(
        f"\n{arguments.preset}, vocabulary {arguments.vocabulary}, batch {arguments.batch}, T {arguments.tokens}; "
        f"{live:,} parameters, published {whole:,}; milliseconds a step\n"
    )
    print_rows(("threads", *models, "loss of all", "published / here", "published convolutions / here"), rows)
    print(f"\nGoal: at least {TRAINING_GOAL}.")


def timed_steps(
    steps: dict[str, Callable[[], float]], arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of the steps, and the last loss. The losses must stay together: dead weights get no gradient."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for number in range(arguments.rounds + 1):
        for name in steps if number % 2 == 0 else reversed(steps):
            start = time.perf_counter()
            losses[name] = steps[name]()
            if number:  # the first makes the optimizer's state
                times[name].append(1000 * (time.perf_counter() - start))
        assert max(losses.values()) - min(losses.values()) < 1e-4 * losses["here"], losses
    return times, losses["here"]


# -------------------------------------------------------------------------------------------------------- decoding


def decode(arguments: argparse.Namespace) -> None:
    """Greedy decoding from a prompt; all ways must give the same tokens."""
    rows = []
    prompt_BT = random_tokens(arguments.vocabulary, 1, arguments.prompt)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        ways = decoding_ways(build(arguments.preset, arguments.vocabulary).eval(), prompt_BT)
        ways = {name: way for name, way in ways.items() if name == CACHED or name in (arguments.ways or ways)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(arguments.rounds + 1):
            tokens = {}
            for name in ways if number % 2 == 0 else reversed(ways):
                start = time.perf_counter()
                tokens[name] = ways[name](arguments.new_tokens if number else 8)
                if number:
                    times[name].append(time.perf_counter() - start)
            assert all(torch.equal(found, tokens[CACHED]) for found in tokens.values()), "the tokens differ"
        different = len(tokens[CACHED][0, arguments.prompt :].unique())
        for name, found in times.items():
            each, many = 1000 * statistics.median(found) / arguments.new_tokens, ratio(times[CACHED], found)
            shown = spread(found, 2) if len(found) > 1 else f"{found[0]:.2f}"
            rows.append((str(threads), name, shown, f"{each:.1f}", f"{statistics.median(many):.1f}"))
    print(
        f"\n{arguments.preset}, vocabulary {arguments.vocabulary}, {arguments.new_tokens} tokens after "
        f"{arguments.prompt}; all ways gave the same tokens, {different} different ones among them\n"
    )
    print_rows(("threads", "way", "seconds", "ms a token", "times here with cache"), rows)
    print(f"\nGoal: at least {DECODING_GOAL:g}.")


def decoding_ways(ours: NeuroBlastForCausalLM, prompt_BT: Tensor) -> dict[str, Callable[[int], Tensor]]:
    """From a number of new tokens to all tokens."""
    twin, convolutions = published_twin(ours), published_twin(ours, attention=False)

    def cached(count: int) -> Any:
        return ours.generate(prompt_BT, max_new_tokens=count, do_sample=False)

    return {
        "published, all logits": lambda count: decode_without_cache(twin, prompt_BT, count, all_logits=True),
        "published, last logits": lambda count: decode_without_cache(twin, prompt_BT, count),
        "published convolutions": lambda count: decode_without_cache(convolutions, prompt_BT, count),
        "here, no cache": lambda count: decode_without_cache(ours, prompt_BT, count),
        CACHED: cached,
    }


class Stopwatch:
    """Seconds by part. Parts lie apart from each other: what runs in one of them runs in no other."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*positional: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*positional, **named)
            finally:
                self.spent[part] += time.perf_counter() - start

        return timed

    def watch(self, module: nn.Module, part: str) -> None:
        module.forward = self.around(part, module.forward)  # type: ignore[method-assign]


@contextmanager
def divided(model: NeuroBlastForCausalLM, cache: Any, watch: Stopwatch) -> Iterator[None]:
    """Time what grows with the context apart: keys and values joined and attended to; and the convolution layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, NeuroBlastConvolutionLayer)]
    for layer in layers:
        watch.watch(layer, "convolution layers")
    watch.watch(model.lm_head, "head")
    attend = AttentionInterface()["sdpa"]
    AttentionInterface.register("timed", watch.around("attention", attend))
    model.config._attn_implementation, before = "timed", model.config._attn_implementation
    cache.update = watch.around("attention", cache.update)
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for module in (*layers, model.lm_head):
            del module.__dict__["forward"]
        del cache.update


def context(arguments: argparse.Namespace) -> None:
    """Milliseconds of a decoding step after so many tokens, as a whole and by part."""
    torch.set_num_threads(arguments.threads[0])
    model = build(arguments.preset, arguments.vocabulary).eval()
    kinds: dict[str, Callable[[int], Any]] = {
        "dynamic": lambda length: DynamicCache(config=model.config),
        "static": lambda length: StaticCache(config=model.config, max_cache_len=length + 2 * STEPS + 8),
    }
    forwards: dict[str, Any] = dict.fromkeys(kinds, model)
    if arguments.compiled:
        forwards["static, compiled"] = torch.compile(model, dynamic=False)
        kinds["static, compiled"] = kinds["static"]
    print(
        f"\n{arguments.preset}, vocabulary {arguments.vocabulary}, batch 1, {arguments.threads[0]} threads, ms a step\n"
    )
    header = ("cache", "context", "step", *PARTS_OF_A_STEP, "the rest")
    rows = []
    with torch.no_grad():
        for name, make in kinds.items():
            for length in arguments.lengths:
                rows.append(step_row(name, length, model, forwards[name], make(length)))
                print("  " + "  ".join(rows[-1]), flush=True)
    print()
    print_rows(header, rows)


def step_row(name: str, length: int, model: NeuroBlastForCausalLM, forward: Any, cache: Any) -> tuple[str, ...]:
    """One line: the whole step's median and middle half, and the medians of its parts in steps with a stopwatch."""
    model(random_tokens(model.config.vocab_size, 1, length), past_key_values=cache, logits_to_keep=1)
    token = torch.tensor([[7]])

    def step() -> None:
        forward(token, past_key_values=cache)

    for _ in range(4):
        step()
    whole = [1000 * seconds(step) for _ in range(STEPS)]
    if forward is not model:
        return (name, str(length), spread(whole), "", "", "", "")
    watch, parts = Stopwatch(), defaultdict(list)
    with divided(model, cache, watch):
        for _ in range(STEPS):
            watch.spent.clear()
            total = seconds(step)
            for part in PARTS_OF_A_STEP:
                parts[part].append(1000 * watch.spent[part])
            parts["rest"].append(1000 * (total - sum(watch.spent.values())))
    return (name, str(length), spread(whole), *(f"{statistics.median(each):.1f}" for each in parts.values()))


# ---------------------------------------------------------------------------------------------------------- memory


def cache_size(config: NeuroBlastConfig, element: int) -> tuple[int, int]:
    """Bytes of the cache for each token, and once for each sequence; `element`: bytes of a number.

    A token: attention layers * 2 * num_key_value_heads * head_dim. A sequence: (kernel_size - 1) * dilation columns of
    hidden_size for each convolution.
    """
    planned = plan_layers(config)
    attention = sum(not layer.is_convolution for layer in planned)
    columns = sum(max((config.kernel_size - 1) * layer.dilation, 1) for layer in planned if layer.dilation)
    return (
        attention * 2 * config.num_key_value_heads * config.head_dim * element,
        columns * config.hidden_size * element,
    )


def held_bytes(cache: DynamicCache) -> int:
    """Bytes of all tensors that a cache holds."""
    found = 0
    for layer in cache.layers:
        tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        tensors += (getattr(layer, "conv_states", None) or {}).values()
        found += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return found


def cache(arguments: argparse.Namespace) -> None:
    """The formula for the presets; that of the small ones against caches that hold tokens."""
    rows = []
    for preset in PRESETS:
        config = NeuroBlastConfig(**PRESETS[preset][0])
        for dtype in (torch.float32, torch.bfloat16):
            each, once = cache_size(config, dtype.itemsize)
            measured = "by formula"
            if preset != "default":
                model, held = build(preset, 128).to(dtype).eval(), DynamicCache(config=config)
                for tokens in (arguments.prompt, 1, 5):
                    with torch.no_grad():
                        model(random_tokens(128, 1, tokens), past_key_values=held)
                seen = arguments.prompt + 6
                assert held_bytes(held) == each * seen + once, (held_bytes(held), each * seen + once)
                measured = f"{held_bytes(held):,} after {seen} tokens, as the formula"
            names = (preset, str(dtype).removeprefix("torch."))
            rows.append((*names, f"{each:,}", f"{once:,}", f"{(each * 4096 + once) / 2**20:.1f} MiB", measured))
    print_rows(("preset", "dtype", "bytes a token", "bytes a sequence", "at 4,096 tokens", "measured"), rows)


PARTS = {"train": train, "decode": decode, "context": context, "cache": cache}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of training steps, or of decoded texts")
    parser.add_argument("--batch", type=int, default=2, help="of a training step")
    parser.add_argument("--tokens", type=int, default=1280, help="of a training step")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--ways", nargs="+", help="of decoding, besides the cache: the names in the table")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096])
    parser.add_argument("--compiled", action="store_true", help="also a compiled step with the static cache")
    arguments = parser.parse_args()
    print(machine_line(), flush=True)
    PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
