"""Patched and NeuroBLAST checkpoints in vLLM against transformers: greedy tokens and log-probabilities.

    python benchmarks/vllm_equality.py VLLM_PYTHON [--only NAME ...] [--real PATCHED_MODEL] [--write docs/vllm.md]

VLLM_PYTHON: the python of an environment with vLLM and neuroweave (see docs/vllm.md). Each row is a tiny random
checkpoint, or the real one given with --real, whose prompts of mixed length an engine in a process of its own
continues, as `vllm serve` has it. All log-probabilities that vLLM gives back (the five largest at each new token,
each token of a prompt and the largest there) are compared with one forward pass in transformers. The column
`unpatched` is how far the model without its recipe is away: what a dropped activation would show.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LENGTHS = (1, 40, 2, 7, 64, 3, 17, 31, 5, 90, 12, 4)
NEW_TOKENS = 24
TOLERANCE = 1e-3
ENGINE = {"max_model_len": 256, "max_num_seqs": 4, "block_size": 32}
CHUNKED = ENGINE | {"max_num_batched_tokens": 16, "max_num_seqs": 8}


# ---------------------------------------------------------------------------------------------- in vLLM's python


def worker(job_file: str, result_file: str) -> None:
    """Run one job (a JSON file) in an engine and write what came out; this runs in vLLM's environment."""
    job = json.loads(Path(job_file).read_text())
    started = time.monotonic()
    from vllm import LLM, SamplingParams

    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "disable_log_stats": False}
    engine = LLM(job["model"], **settings | job["engine"])
    ready = time.monotonic() - started
    sampling = [
        SamplingParams(temperature=0, max_tokens=new, logprobs=5, prompt_logprobs=1, detokenize=False, ignore_eos=True)
        for new in job["new"]
    ]
    done = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    result = {
        "ready": ready,
        "preemptions": sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions"),
        "outputs": [
            {
                "tokens": list(each.outputs[0].token_ids),
                "new": [plain(at) for at in each.outputs[0].logprobs],
                "prompt": [plain(at) for at in each.prompt_logprobs],
            }
            for each in done
        ],
    }
    Path(result_file).write_text(json.dumps(result))


def plain(at: Any) -> dict[str, float]:
    return {} if at is None else {str(token): entry.logprob for token, entry in at.items()}


# ------------------------------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Case:
    """`build`: writes a checkpoint into a folder. `refused`: what the error says, where vLLM must refuse it."""

    name: str
    build: Callable[[Path], None]
    engine: dict[str, Any] = field(default_factory=lambda: ENGINE)
    new: int = NEW_TOKENS
    refused: str = ""
    preempted: bool = False


def llama(**settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": 211,
            "hidden_size": 128,
            "intermediate_size": 186,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.08,
        }
        | settings
    )


def family(model_type: str, **settings: Any) -> Callable[[], Any]:
    """A tiny configuration of any family, by the field names that most of them have."""

    def build() -> Any:
        from transformers import AutoConfig

        sizes = {
            "vocab_size": 211, "hidden_size": 128, "intermediate_size": 186, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.08,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        known = AutoConfig.for_model(model_type)
        return AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if hasattr(known, k)} | settings)

    return build


def neuroblast(**settings: Any) -> Any:
    from neuroweave.neuroblast import NeuroBlastConfig

    return NeuroBlastConfig(
        **{
            "vocab_size": 211,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_sensory_layers": 5,
            "num_associative_layers": 6,
            "num_motor_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "initializer_range": 0.08,
        }
        | settings
    )


def checkpoint(config: Any, *sites: dict[str, Any]) -> Callable[[Path], None]:
    """A function that writes a random model of this configuration, patched; learned mixtures have chosen at random."""

    def build(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import neuroweave
        from neuroweave.activations.mixtures import NeuronMixture

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config() if callable(config) else config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter += 0.1 * torch.randn_like(parameter)
            if sites:
                neuroweave.patch(model, {"name": "tried", "sites": list(sites)})
            for module in model.modules():
                if isinstance(module, NeuronMixture):
                    for parameter in module.parameters(recurse=False):
                        parameter.copy_(1 + torch.randn_like(parameter))
        model.save_pretrained(folder)

    return build


def site(names: str | list[str], activation: Any, layers: Any = "all") -> dict[str, Any]:
    return {"site": names, "activation": activation, "layers": layers}


MIXTURE = {"mixture": ["original", "relu", "gelu", "swish_beta"]}
ON_PROJECTIONS = {"mixture": ["identity", "tanh", "swish_beta"]}
PROJECTIONS = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
EVERYWHERE = site("everywhere", "phantom")
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 48},
    "qwen2": {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 48, "query_pre_attn_scalar": 64},
    "gemma3_text": {"sliding_window": 48, "query_pre_attn_scalar": 64, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": {"sliding_window": None},
    "gpt2": {"n_embd": 128, "n_inner": 186, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 48},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.5},
    "glm": {},
    "glm4": {},
    "helium": {},
    "nemotron": {},
}
TIGHT = ENGINE | {"num_gpu_blocks_override": 9, "max_num_seqs": 8}
CASES = (
    Case("llama", checkpoint(llama)),
    Case("llama, mlp: relu", checkpoint(llama, site("mlp", "relu"))),
    Case("llama, mlp: segments in layer 1", checkpoint(llama, site("mlp", "relu|silu|gelu|tanh", [1]))),
    Case("llama, mlp: learned mixture", checkpoint(llama, site("mlp", MIXTURE))),
    Case("llama, embedding: tanh", checkpoint(llama, site("embedding", "tanh"))),
    Case("llama, head: tanh", checkpoint(llama, site("head", "tanh"))),
    Case("llama, projections: segments", checkpoint(llama, site(PROJECTIONS, "relu|tanh", "every 2nd"))),
    Case("llama, projections: learned mixture", checkpoint(llama, site(PROJECTIONS, ON_PROJECTIONS, [1]))),
    Case("llama, everywhere: phantom", checkpoint(llama, EVERYWHERE)),
    Case("llama, everywhere: phantom, chunked prefill", checkpoint(llama, EVERYWHERE), CHUNKED),
    Case("llama, everywhere: phantom, preempted", checkpoint(llama, EVERYWHERE), TIGHT, 60, preempted=True),
    *(
        Case(f"{name}, {what}", checkpoint(family(name, **settings), *sites))
        for name, settings in FAMILIES.items()
        for what, sites in (("mlp: segments", [site("mlp", "relu|tanh")]), ("everywhere: phantom", [EVERYWHERE]))
    ),
    Case("neuroblast", checkpoint(neuroblast)),
    Case("neuroblast, chunked prefill", checkpoint(neuroblast), CHUNKED),
)


# ----------------------------------------------------------------------------------------------------------- comparing


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm_python", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose names hold one of these")
    parser.add_argument("--keep", type=Path, help="a folder for checkpoints and logs, kept")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.only or any(part in case.name for part in options.only)]
    with tempfile.TemporaryDirectory() as temporary:
        for case in chosen:
            print(row(compare(case, options.vllm_python, options.keep or Path(temporary))), flush=True)


@dataclass(frozen=True)
class Row:
    name: str
    verdict: str
    tokens: int = 0
    difference: float = 0.0
    unpatched: float | None = None
    preemptions: int = 0
    ready: float = 0.0


def row(found: Row) -> str:
    unpatched = "" if found.unpatched is None else f"{found.unpatched:.2f}"
    return (
        f"| {found.name} | {found.verdict} | {found.tokens} | {found.difference:.1e} | {unpatched} "
        f"| {found.preemptions} | {found.ready:.0f} |"
    )


def compare(case: Case, python: Path, folder: Path) -> Row:
    place = folder / case.name.replace(", ", "-").replace(": ", "-").replace(" ", "-")
    model = place / "model"
    case.build(model)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(length)] for length in LENGTHS]
    new = [case.new - 3 * (number % 3) for number in range(len(prompts))]  # they end at different steps
    job = {"model": str(model), "engine": case.engine, "prompts": prompts, "new": new}
    (place / "job.json").write_text(json.dumps(job))
    outcome = run_worker(python, place)
    if isinstance(outcome, str):
        return Row(case.name, f"refused: {outcome}" if case.refused and case.refused in outcome else f"ERROR {outcome}")
    return judged(case, model, prompts, outcome)


def run_worker(python: Path, place: Path) -> dict[str, Any] | str:
    """What the worker wrote, or the last line that says why it did not."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with (place / "log.txt").open("w") as log:
        code = subprocess.call(
            [python, __file__, "--worker", place / "job.json", place / "result.json"],
            stdout=log, stderr=log, env=os.environ | settings,
        )  # fmt: skip
    if code == 0:
        return json.loads((place / "result.json").read_text())
    lines = (place / "log.txt").read_text().splitlines()
    said = [line for line in lines if "not served by vLLM" in line] or [line for line in lines if "Error: " in line]
    return said[-1] if said else f"exit code {code}"


def judged(case: Case, folder: Path, prompts: list[list[int]], outcome: dict[str, Any]) -> Row:
    import torch
    from transformers import AutoModelForCausalLM

    import neuroweave
    from neuroweave.surgery.modeling import PatchedModel

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [prompt + output["tokens"] for prompt, output in zip(prompts, outcome["outputs"], strict=True)]
    wanted = [log_probabilities(model, text) for text in texts]
    greedy, difference = True, 0.0
    for prompt, output, expected in zip(prompts, outcome["outputs"], wanted, strict=True):
        found = output["prompt"] + output["new"]  # of the token at each position, given those before it
        for position, at in enumerate(found):
            for token, value in at.items():
                difference = max(difference, abs(value - float(expected[position - 1, int(token)])))
        for position, token in enumerate(output["tokens"], len(prompt)):
            greedy = greedy and int(expected[position - 1].argmax()) == token
    unpatched = None
    if isinstance(model, PatchedModel):
        neuroweave.unpatch(model)
        others = [log_probabilities(model, text) for text in texts]
        unpatched = max(float((a - b).abs().max()) for a, b in zip(wanted, others, strict=True))
    equal = greedy and difference < TOLERANCE and (outcome["preemptions"] > 0 or not case.preempted)
    return Row(
        case.name,
        "equal" if equal else "DIFFERENT" if not greedy or difference >= TOLERANCE else "NOT PREEMPTED",
        sum(len(output["tokens"]) for output in outcome["outputs"]),
        difference,
        unpatched,
        int(outcome["preemptions"]),
        outcome["ready"],
    )


def log_probabilities(model: Any, text: list[int]) -> Any:
    """[T, V]: of each next token, in transformers, the whole text in one pass and alone."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([text]), use_cache=False).logits[0].double().log_softmax(-1)


if __name__ == "__main__":
    main()
