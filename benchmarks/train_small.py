"""A small NeuroBLAST from nothing: a tokenizer and a model on the shipped prose, against n-gram models.

    python benchmarks/train_small.py [--steps 600] [--run DIR] [--figure docs/images/train_small.svg]

The n-gram models are estimated on the model's own training tokens and measured on the same held-out tokens: documents
that the run held out, and the evaluation split, whose works are in no other split. Losses are nats per token. Then the
model continues a prompt, and the loss curve is drawn.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from neuroweave.text import documents
from neuroweave.training.configuration import build_configuration
from neuroweave.training.metrics import METRICS_FILE, read_metrics
from neuroweave.training.packing import packed_documents
from neuroweave.training.rows import held_out_rows
from neuroweave.training.sources import Source
from neuroweave.training.token_store import TokenStore
from neuroweave.training.tokenizer import train_tokenizer
from neuroweave.training.torch_loop import RowDataset, stack_rows
from neuroweave.training.train import train

VOCABULARY, LENGTH, BATCH = 1024, 256, 8
SOURCES = [{"path": "shipped:training"}, {"path": "shipped:calibration"}]
SHAPE = {
    "hidden_size": 192, "intermediate_size": 512, "num_sensory_layers": 4, "num_associative_layers": 4,
    "num_motor_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32, "dropout": 0.1,
    "max_position_embeddings": 1024,
}  # fmt: skip


def configuration(folder: Path, steps: int) -> Any:
    return build_configuration(
        {
            "model": {"preset": "tiny", "settings": SHAPE},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"sources": SOURCES, "sequence_length": LENGTH, "held_out": 0.1},
            "training": {
                "steps": steps, "batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": 3e-3,
                "warmup_steps": steps // 20, "decay_steps": steps // 3, "weight_decay": 0.1, "adam_beta2": 0.95,
            },
            "metrics": {"log_every": 10, "evaluate_every": max(5, steps // 15)},
            "output": {"folder": str(folder / "run"), "save_every": max(1, steps // 3)},
        }
    )  # fmt: skip


class NGrams:
    """Add-one unigrams, and bigrams interpolated with them by Witten and Bell's weights."""

    def __init__(self, store: TokenStore) -> None:
        tokens = store.tokens_at(0, store.tokens).astype(np.int64)
        ones = np.bincount(tokens, minlength=VOCABULARY) + 1.0
        self.unigram = ones / ones.sum()
        inside = np.ones(len(tokens) - 1, dtype=bool)
        inside[store.starts_between(0, store.tokens) - 1] = False  # the last token of a document predicts nothing
        pairs = np.zeros((VOCABULARY, VOCABULARY))
        np.add.at(pairs, (tokens[:-1][inside], tokens[1:][inside]), 1.0)
        kinds = (pairs > 0).sum(1, keepdims=True)  # how many different tokens follow
        counts = pairs.sum(1, keepdims=True)
        weight = np.divide(counts, counts + kinds, out=np.zeros_like(counts), where=counts > 0)
        seen = np.divide(pairs, counts, out=np.zeros_like(pairs), where=counts > 0)
        self.bigram = weight * seen + (1 - weight) * self.unigram

    def losses(self, rows: RowDataset) -> dict[str, float]:
        """Nats per token of both, on every token of the rows that has a label."""
        before, after = [], []
        for index in range(len(rows)):
            labels, ids = (rows[index][name].numpy() for name in ("labels", "input_ids"))
            predicted = labels[1:] != -100
            before.append(ids[:-1][predicted])
            after.append(ids[1:][predicted])
        one, other = np.concatenate(before), np.concatenate(after)
        assert np.allclose(self.bigram.sum(1), 1)
        return {
            "unigram": float(-np.log(self.unigram[other]).mean()),
            "bigram": float(-np.log(self.bigram[one, other]).mean()),
        }


@torch.no_grad()
def loss_of(model: Any, rows: RowDataset) -> float:
    """Nats per token of the model, on the same tokens."""
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = stack_rows([rows[index] for index in range(start, min(start + BATCH, len(rows)))])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, use_cache=False).loss) * tokens
        count += tokens
    return total / count


def draw(metrics: Path, grams: dict[str, float], figure: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "train_small"
    from matplotlib import pyplot

    entries = read_metrics(metrics)
    training = [(entry["tokens"] / 1e6, entry["loss"]) for entry in entries if "loss" in entry]
    per_step = BATCH * LENGTH / 1e6
    held_out = [(entry["step"] * per_step, entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    image, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*training, strict=True), color="#8fb4d9", linewidth=1, label="training")
    axes.plot(*zip(*held_out, strict=True), color="#1f4e79", marker="o", markersize=3, label="held-out documents")
    for name, value in grams.items():
        axes.axhline(value, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(f"{name} {value:.2f}", (training[-1][0], value), ha="right", va="bottom", color="#555555")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    image.tight_layout()
    figure.parent.mkdir(parents=True, exist_ok=True)
    image.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--run", type=Path, help="keep everything here; the same command goes on")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--prompt", default="The old man looked at the sea and")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = options.run or Path(tempfile.mkdtemp())
    began = time.perf_counter()
    if not (folder / "tokenizer").is_dir():
        train_tokenizer(folder / "tokenizer", [Source(**source) for source in SOURCES], vocab_size=VOCABULARY)
    chosen = configuration(folder, options.steps)
    done = train(chosen, report=print)
    seconds = time.perf_counter() - began
    tokenizer, model = AutoTokenizer.from_pretrained(done.model), AutoModelForCausalLM.from_pretrained(done.model)
    store = TokenStore.open(folder / "run" / "data")
    end = [tokenizer.eos_token_id]
    texts = [
        tokenizer(document.text, add_special_tokens=False)["input_ids"] + end for document in documents("evaluation")
    ]
    evaluation = packed_documents(texts, LENGTH)
    sets = {
        "held-out documents": RowDataset(*held_out_rows(store.held_out, chosen, tokenizer.pad_token_id)),
        "evaluation split": RowDataset(evaluation, len(evaluation)),
    }
    grams = NGrams(store)
    print(f"{datetime.date.today()}: {done.plan.parameters:,} parameters, {done.plan.tokens:,} tokens, {seconds:.0f} s")
    print("| nats per token on | tokens | unigram | bigram | model |\n|---|---|---|---|---|")
    for name, rows in sets.items():
        assert rows is not None
        found = grams.losses(rows) | {"model": loss_of(model, rows)}
        count = sum(int((rows[index]["labels"][1:] != -100).sum()) for index in range(len(rows)))
        print(f"| {name} | {count:,} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |")
        if found["model"] > found["bigram"]:
            print(f"  the model is worse than the bigram model on the {name}")
    torch.manual_seed(0)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=60, do_sample=True, top_k=40, temperature=0.8)
    print(repr(tokenizer.decode(out[0], skip_special_tokens=True)))
    if options.figure:
        draw(folder / "run" / METRICS_FILE, grams.losses(sets["held-out documents"]), options.figure)


if __name__ == "__main__":
    main()
