"""Patched and NeuroBLAST checkpoints in vLLM against transformers: greedy tokens and log-probabilities.

    python benchmarks/vllm_equality.py VLLM_PYTHON [--only NAME ...] [--real PATCHED_MODEL] [--write docs/vllm.md]

VLLM_PYTHON: the python of an environment with vLLM and neuroweave (docs/vllm.md). Each row is a tiny random checkpoint
(vllm_cases.py), or the real one of --real, whose prompts of mixed length an engine in a process of its own continues,
as `vllm serve` has it. All log-probabilities that vLLM gives back (the five largest at each new token; each token of a
prompt, and the largest there) are compared with those of one forward pass in transformers, and each token with the
largest there. `unpatched`: how far the same weights without the recipe are away, which a dropped activation would show.
The real model's tokens are those of `neuroweave generate` as well, and it is asked through vLLM's server, too.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_cases import Case

LENGTHS = (1, 40, 2, 7, 64, 3, 17, 31, 5, 90, 12, 4)
TOLERANCE = 1e-3
EAGER = {"dtype": "float32", "enforce_eager": True}
TEXTS = (
    "Gravity is",
    "The capital of France is Paris. The capital of Italy is",
    "A recipe for bread: take 500 g of flour, 320 g of water, 10 g of salt and a little yeast. Mix them, let the dough "
    "rest for an hour, fold it, and let it rise over night in a cold place. The next morning",
    "def add(a, b):\n    return",
    "Once upon a time there was a small robot who lived at the edge of a forest. Every day it",
    "1, 2, 3, 5, 8,",
)
REAL_TOKENS = 32
MARKS = ("<!-- vllm_equality: begin -->", "<!-- vllm_equality: end -->")
Output = dict[str, Any]  # tokens; new, prompt: for each position the log-probabilities by token id


# ---------------------------------------------------------------------------------------------------- in vLLM's python


def worker(job_file: str, result_file: str) -> None:
    """Run one job (a JSON file) in an engine, and write what came out."""
    job = json.loads(Path(job_file).read_text())
    started = time.monotonic()
    from vllm import LLM, SamplingParams

    settings = EAGER | {"skip_tokenizer_init": True, "disable_log_stats": False} | job["engine"]
    engine = LLM(job["model"], **settings)
    ready = time.monotonic() - started
    same: dict[str, Any] = {"temperature": 0, "logprobs": 5, "prompt_logprobs": 1, "ignore_eos": True}
    sampling = [SamplingParams(max_tokens=new, detokenize=False, **same) for new in job["new"]]
    done = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    outputs = [
        {
            "tokens": list(each.outputs[0].token_ids),
            "new": [plain(at) for at in each.outputs[0].logprobs],
            "prompt": [plain(at) for at in each.prompt_logprobs],
        }
        for each in done
    ]
    preemptions = sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
    Path(result_file).write_text(json.dumps({"ready": ready, "preemptions": preemptions, "outputs": outputs}))


def plain(at: Any) -> dict[str, float]:
    return {} if at is None else {str(token): entry.logprob for token, entry in at.items()}


# ------------------------------------------------------------------------------------------------------------ the rows


@dataclass(frozen=True)
class Row:
    """`verdict`: equal, refused, or what is wrong. `difference`: the largest of all log-probabilities compared."""

    name: str
    verdict: str
    tokens: int | None = None
    difference: float | None = None
    unpatched: float | None = None
    preemptions: int | None = None
    ready: float | None = None

    def __str__(self) -> str:
        formats = (("tokens", "d"), ("difference", ".1e"), ("unpatched", ".2f"), ("preemptions", "d"), ("ready", ".0f"))
        cells = ("" if getattr(self, name) is None else format(getattr(self, name), kind) for name, kind in formats)
        return f"| {self.name} | {self.verdict} | {' | '.join(cells)} |"

    @property
    def good(self) -> bool:
        return self.verdict == "equal" or self.verdict.startswith("refused")


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:4])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm_python", type=Path)
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these")
    parser.add_argument("--real", type=Path, help="a patched checkpoint with a tokenizer")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    parser.add_argument("--keep", type=Path, help="a folder where checkpoints and logs stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        for found in all_rows(options, options.keep or Path(temporary)):
            print(found, flush=True)
            rows.append(found)
    if options.write:
        write_table(options.write, rows, options.vllm_python)
    return 0 if all(found.good for found in rows) else 1


def all_rows(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    from vllm_cases import CASES

    for case in CASES:
        if options.only is None or any(part in case.name for part in options.only):
            place = folder / "".join(letter if letter.isalnum() else "-" for letter in case.name)
            yield tiny_row(case, options.vllm_python, place)
    if options.real:
        yield from real_rows(options.real, options.vllm_python, folder)


def tiny_row(case: Case, python: Path, place: Path) -> Row:
    model = place / "model"
    case.build(model)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(length)] for length in LENGTHS]
    new = [case.new - 3 * (number % 3) for number in range(len(prompts))]  # they end at different steps
    outcome = run_worker(python, place, {"model": str(model), "engine": case.engine, "prompts": prompts, "new": new})
    if isinstance(outcome, str):
        expected = case.refused and case.refused in outcome
        return Row(case.name, f"refused: {outcome}" if expected else f"ERROR: {outcome}")
    if case.refused:
        return Row(case.name, "NOT REFUSED")
    found = judged(case.name, model, prompts, outcome)
    return Row(case.name, "NOT PREEMPTED") if case.preempted and not found.preemptions else found


def run_worker(python: Path, place: Path, job: dict[str, Any]) -> dict[str, Any] | str:
    """What the worker wrote, or the line that says why it did not."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "job.json").write_text(json.dumps(job))
    settings = engine_environment(job["engine"])
    with (place / "log.txt").open("w") as log:
        command = [python, __file__, "--worker", place / "job.json", place / "result.json"]
        code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | settings)
    if code == 0:
        return json.loads((place / "result.json").read_text())  # type: ignore[no-any-return]
    lines = [line for line in (place / "log.txt").read_text().splitlines() if "rror" in line and " File " not in line]
    ours = [line for line in lines if "not served by vLLM: " in line]
    causes = [line for line in lines if "neuroweave" in line.lower()]
    said = (ours or causes or lines or [f"exit code {code}"])[-1]
    said = said.partition("not served by vLLM: ")[2] or said.partition("Error: ")[2] or said
    return said.partition(" [type=")[0]


def engine_environment(engine: dict[str, Any]) -> dict[str, str]:
    """Small caches for small models, and a core for each rank where there are several."""
    ranks = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"} | cores


def judged(name: str, folder: Path, prompts: list[list[int]], outcome: dict[str, Any]) -> Row:
    import torch
    from transformers import AutoModelForCausalLM

    import neuroweave
    from neuroweave.surgery.modeling import PatchedModel

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs = outcome["outputs"]
    texts = [prompt + output["tokens"] for prompt, output in zip(prompts, outputs, strict=True)]
    wanted = [log_probabilities(model, text) for text in texts]
    greedy, difference = True, 0.0
    for prompt, output, expected in zip(prompts, outputs, wanted, strict=True):
        for position, at in enumerate(output["prompt"] + output["new"]):  # of the token there, given those before
            for token, value in at.items():
                difference = max(difference, abs(value - float(expected[position - 1, int(token)])))
        largest = expected.argmax(-1).tolist()[len(prompt) - 1 : -1]
        greedy = greedy and largest == output["tokens"]
    unpatched = None
    if isinstance(model, PatchedModel):
        neuroweave.unpatch(model)
        unpatched = max(
            float((each - log_probabilities(model, text)).abs().max()) for each, text in zip(wanted, texts, strict=True)
        )
    verdict = "equal" if greedy and difference < TOLERANCE else "DIFFERENT"
    tokens = sum(len(output["tokens"]) for output in outputs)
    return Row(name, verdict, tokens, difference, unpatched, int(outcome["preemptions"]), outcome["ready"])


def log_probabilities(model: Any, text: list[int]) -> Any:
    """[T, V]: of each next token; the text alone and in one pass."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([text]), use_cache=False).logits[0].double().log_softmax(-1)


# -------------------------------------------------------------------------------------------------------- a real model


def real_rows(model: Path, python: Path, folder: Path) -> Iterator[Row]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    written = [generated(model, text) for text in TEXTS]
    job = {"model": str(model), "engine": {"max_model_len": 512, "max_num_seqs": 4}, "prompts": prompts}
    outcome = run_worker(python, folder / "real", job | {"new": [REAL_TOKENS] * len(prompts)})
    with serving(model, python, folder / "serve.txt") as (address, ready), ThreadPoolExecutor(len(prompts)) as pool:
        outputs = list(pool.map(lambda ids: completed(address, model, ids), prompts))
    for name, found in (("engine", outcome), ("server", {"outputs": outputs, "preemptions": 0, "ready": ready})):
        if isinstance(found, str):
            yield Row(f"{model.name}, {name}", f"ERROR: {found}")
            continue
        row = judged(f"{model.name}, {name}", model, prompts, found)
        same = all(
            output["tokens"][: len(tokens)] == tokens for output, tokens in zip(found["outputs"], written, strict=True)
        )
        yield row if same else Row(row.name, "OTHER TOKENS than neuroweave generate", row.tokens, row.difference)


def generated(model: Path, text: str) -> list[int]:
    """The tokens of `neuroweave generate`."""
    command = [sys.executable, "-m", "neuroweave", "generate", str(model), "--prompt", text, "--raw", "--greedy"]
    options = ["--repetition-penalty", "1", "--new-tokens", str(REAL_TOKENS), "--dtype", "float32", "--json"]
    printed = subprocess.run(command + options, check=True, capture_output=True, text=True).stdout
    return json.loads(printed)["token_ids"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def serving(model: Path, python: Path, log_file: Path) -> Iterator[tuple[str, float]]:
    """vLLM's server on a free port: its address and how many seconds it took to be ready.

    The module that `vllm serve` runs: the command of vllm-cpu 0.32.0 stops, looking for a package called vllm.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    started = time.monotonic()
    with log_file.open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--max-model-len", "512", "--dtype", "float32", "--enforce-eager"],
            stdout=log, stderr=subprocess.STDOUT, env=os.environ | engine_environment({}),
        )  # fmt: skip
        try:
            while not answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() - started > 900:
                    raise RuntimeError(f"the server did not come up: {log_file.read_text()[-2000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}", time.monotonic() - started
        finally:
            server.terminate()
            server.wait(60)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def completed(address: str, model: Path, ids: list[int]) -> Output:
    """One request to /v1/completions, in the form of the worker's outputs."""
    body = {
        "model": str(model), "prompt": ids, "max_tokens": REAL_TOKENS, "temperature": 0, "logprobs": 5,
        "prompt_logprobs": 1, "ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=600) as response:
        [choice] = json.load(response)["choices"]
    new = [
        {key.removeprefix("token_id:"): value for key, value in at.items()} for at in choice["logprobs"]["top_logprobs"]
    ]
    prompt = [
        {} if at is None else {key: value["logprob"] for key, value in at.items()} for at in choice["prompt_logprobs"]
    ]
    return {"tokens": choice["token_ids"], "new": new, "prompt": prompt}


# ----------------------------------------------------------------------------------------------------------- the page


def write_table(page: Path, rows: list[Row], python: Path) -> None:
    """Put the rows between the page's marks, with date, machine and versions."""
    code = (
        "import sys, importlib.metadata as of; print(', '.join(f'{name} {of.version(name)}' for name in sys.argv[1:]))"
    )
    packages = ("vllm-cpu", "transformers", "torch")
    versions = subprocess.run(
        [python, "-c", code, *packages], check=True, capture_output=True, text=True
    ).stdout.strip()
    import transformers

    lines = [
        f"{datetime.date.today()}, {machine()}; {versions}, float32; compared with transformers "
        f"{transformers.__version__}.",
        "",
        "| row | verdict | new tokens | largest difference | unpatched | preemptions | ready, s |",
        "|---|---|---|---|---|---|---|",
        *map(str, rows),
    ]
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def machine() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        facts = dict(
            line.split(":", 1) for line in subprocess.check_output("lscpu", text=True).splitlines() if ":" in line
        )
        return f"{facts['Model name'].strip()}, {facts['CPU(s)'].strip()} cores"
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
