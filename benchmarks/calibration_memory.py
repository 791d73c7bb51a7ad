"""The most memory that `neuroweave calibrate` takes on a model of 7B shape, by number of layers.

    python benchmarks/calibration_memory.py WORK TOKENIZER --layers 2 4 --tokens 2048

Writes Llama checkpoints of random weights (hidden size 4,096, 14,336 neurons, vocabulary 32,000, bfloat16; 0.9 GB and
0.44 GB a layer) into the folder WORK, patches them, calibrates each in a process of its own and prints the peak of that
process's own memory (not of files that are mapped), which must not grow with the layers. Needs three times the
checkpoint's size on the disk.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from neuroweave.diagnose.environment import describe_environment
from neuroweave.surgery.on_disk import patch_checkpoint

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a folder with a tokenizer of at most 49,152 words")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    machine = describe_environment()
    print(f"{machine.cpu}, {machine.threads} threads, {machine.date}; {options.tokens:,} tokens\n")
    print("| layers | checkpoint, GB | own memory at the peak, GB | with mapped files, GB | seconds |")
    print("|---|---|---|---|---|")
    for layers in options.layers:
        print(row(options.work, options.tokenizer, layers, options.tokens), flush=True)


def row(work: Path, tokenizer: Path, layers: int, tokens: int) -> str:
    base, patched, out = (work / f"{name}-{layers}" for name in ("base", "patched", "out"))
    if not base.is_dir():
        write_model(base, tokenizer, layers)
    patch_checkpoint(base, patched, {"sites": [{"site": "mlp", "activation": "relu|silu"}]}, overwrite=True)
    command = [sys.executable, "-m", "neuroweave", "calibrate", patched, "--teacher", base, "--output", out]
    began = time.perf_counter()
    with subprocess.Popen([*map(str, command), "--tokens", str(tokens), "--overwrite"]) as process:
        peaks = watch(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"calibrate ended with {process.returncode}")
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e9
    for folder in (base, patched, out):
        shutil.rmtree(folder)
    return f"| {layers} | {size:.1f} | {peaks['RssAnon']:.1f} | {peaks['VmRSS']:.1f} | {seconds:.0f} |"


def write_model(folder: Path, tokenizer: Path, layers: int) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=len(words), tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def watch(process: subprocess.Popen) -> dict[str, float]:
    """The largest values, in GB, that the kernel told of the process until it ended."""
    peaks = {"RssAnon": 0.0, "VmRSS": 0.0}
    ended = threading.Event()
    while not ended.wait(0.2):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, rest = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(rest.split()[0]) / 1e6)
        if process.poll() is not None:
            ended.set()
    return peaks


if __name__ == "__main__":
    main()
