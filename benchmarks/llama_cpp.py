"""Decoding in llama.cpp (F32, Q8_0, Q4_0), in the fast runtime (float32, int8, int4) and in transformers, in one run.

    pip install --target DIR llama-cpp-cffi==0.4.42
    neuroweave round MODEL --output ROUNDED
    python benchmarks/llama_cpp.py MODEL --llama-cpp DIR [--rounded ROUNDED] [--new 64] [--rounds 5] [--threads 2]

llama.cpp runs in processes of its own, one for each file that `neuroweave export --gguf` writes, and reads the same
token ids; `--rounded` gives our int4 its weights. Prints medians of the rates, of the ratios to transformers in a
round, and how many tokens are those of transformers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

PRELOAD = '#include <exception>\nextern "C" void __cxa_call_terminate(void*) noexcept { std::terminate(); }\n'
TYPES = {"f32": "llama.cpp, F32", "q8_0": "llama.cpp, Q8_0", "q4_0": "llama.cpp, Q4_0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="where llama-cpp-cffi is installed")
    parser.add_argument("--rounded", type=Path, help="the output of `neuroweave round`, for int4")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    compare(options)


def compare(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from neuroweave.checkpoint.gguf_export import export_gguf
    from neuroweave.checkpoint.loading import load_tokenizer
    from neuroweave.diagnose import speed
    from neuroweave.diagnose.environment import describe_environment
    from neuroweave.text.documents import documents

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = documents("evaluation")[0].text
    prompt = load_tokenizer(options.model)(text, add_special_tokens=False)["input_ids"][: options.prompt_tokens]
    positions = len(prompt) + options.new
    ways = [speed.transformers_way("model", speed.BASELINE, model)]
    ways += [speed.runtime_way("model", model, positions, format=each) for each in ("float32", "int8")]
    if options.rounded:
        rounded = AutoModelForCausalLM.from_pretrained(options.rounded, dtype=torch.float32).eval()
        ways.append(speed.runtime_way("model", rounded, positions, format="int4"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        library = Path(folder, "preload.so")
        build_preload(library)
        for kind, name in TYPES.items():
            file = Path(folder, f"{kind}.gguf")
            export_gguf(options.model, file, type=kind)
            ask = stack.enter_context(worker(file, options, library))

            def run(ids: list[int], count: int, ask: Any = ask) -> speed.Timing:
                found = ask({"ids": ids, "new": count})
                return speed.Timing(found["tokens"], found["prefill"], found["decode"])

            ways.append(speed.Way("model", name, run, file.stat().st_size, file.stat().st_size))
        found = speed.measure_ways(ways, prompt, options.new, options.rounds, lambda line: print(line, file=sys.stderr))
    wanted = found[0].timings[0].tokens
    print(
        f"{describe_environment().cpu}, {options.threads} threads, {datetime.datetime.now(datetime.UTC):%d %B %Y}; "
        f"{options.model.name}, {len(prompt)} tokens of prompt, {options.new} new, {options.rounds} rounds\n"
    )
    print("| | tokens/s | times transformers | first token, ms | tokens as transformers' |\n|---|---|---|---|---|")
    for each in found:
        same = next(
            (i for i, (a, b) in enumerate(zip(each.timings[0].tokens, wanted, strict=True)) if a != b), len(wanted)
        )
        print(
            f"| {each.name} | {statistics.median(each.decode_rates()):.1f} | {statistics.median(each.ratios):.2f} "
            f"({min(each.ratios):.2f} to {max(each.ratios):.2f}) | {1000 * each.first_token_seconds():.0f} "
            f"| {'all' if same == len(wanted) else f'the first {same}'} |"
        )


def build_preload(library: Path) -> None:
    """The wheel asks for a symbol that the C++ runtimes of older systems do not have."""
    from neuroweave.native.build import find_compiler

    source = library.with_suffix(".cpp")
    source.write_text(PRELOAD)
    subprocess.run([find_compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)


@contextmanager
def worker(file: Path, options: argparse.Namespace, library: Path) -> Iterator[Any]:
    """A process that holds a GGUF file in llama.cpp and answers a line of JSON with a line of JSON."""
    environment = os.environ | {"PYTHONPATH": str(options.llama_cpp.resolve()), "LD_PRELOAD": str(library)}
    command = [sys.executable, __file__, "--worker", str(file), str(options.threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def ask(job: dict[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps(job), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"llama.cpp ended with {file.name}: status {process.wait()}")
            return json.loads(answer)

        try:
            yield ask
        finally:
            process.stdin.close()  # type: ignore[union-attr]


def serve(path: str, threads: int) -> None:
    """The worker: greedy decoding through llama.cpp's C interface, float32 cache."""
    import numpy as np
    from llama._llama_cpp_cpu import ffi, lib

    @ffi.callback("void(enum ggml_log_level, char *, void *)")
    def quiet(level: int, text: Any, data: Any) -> None:
        if level >= 4:
            print(ffi.string(text).decode(errors="replace"), end="", file=sys.stderr)

    lib.llama_log_set(quiet, ffi.NULL)
    lib.llama_backend_init()
    model_settings = lib.llama_model_default_params()
    model_settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), model_settings)
    if model == ffi.NULL:
        raise SystemExit(f"llama.cpp cannot load {path}")
    settings = lib.llama_context_default_params()
    settings.n_ctx = 1024
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = lib.GGML_TYPE_F32
    size = 4 * lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    for line in sys.stdin:
        job = json.loads(line)
        context = lib.llama_init_from_model(model, settings)

        def best(ids: list[int], context: Any = context) -> int:
            tokens = ffi.new("int32_t[]", ids)
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
                raise SystemExit("llama_decode failed")
            found = np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, -1), size), dtype=np.float32)
            return int(found.argmax())

        began = time.perf_counter()
        tokens = [best(job["ids"])]
        first = time.perf_counter()
        while len(tokens) < job["new"]:
            tokens.append(best(tokens[-1:]))
        ended = time.perf_counter()
        lib.llama_free(context)
        print(json.dumps({"tokens": tokens, "prefill": first - began, "decode": ended - first}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
