"""A tokenizer trained on the shipped prose: bytes a token on the evaluation prose, and do its two forms agree?

    python benchmarks/tokenizer.py [--vocab-size 8192] [--fuzz 200000]

Text: the training and calibration splits; measured on the evaluation split, which shares no work with them. Beside it
SmolLM2's tokenizer (49,152 tokens) and Gemma 3's (262,144). The last columns count fuzzed texts on which sentencepiece
and another form of the same file give different tokens: our tokenizer.json, and what transformers makes of
tokenizer.model by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer
from whole_process import print_rows

from neuroweave.checkpoint import embedded_gguf
from neuroweave.checkpoint.gguf import read_gguf_header
from neuroweave.checkpoint.gguf_tokenizer import gguf_tokenizer
from neuroweave.text import documents
from neuroweave.training.sources import Source
from neuroweave.training.tokenizer import MODELS, NORMALIZATIONS, TrainedTokenizer, train_tokenizer
from neuroweave.training.tokenizer_forms import SPACE, fuzz_texts

TEXT = [Source(path="shipped:training"), Source(path="shipped:calibration")]


def rate(encode: Callable[[str], Sequence[int]]) -> str:
    """Bytes a token on the evaluation prose."""
    texts = [document.text for document in documents("evaluation")]
    return f"{sum(len(text.encode()) for text in texts) / sum(len(encode(text)) for text in texts):.3f}"


def differences(made: TrainedTokenizer, count: int) -> tuple[int, int]:
    """Of `count` fuzzed texts, those on which tokenizer.json, and those on which transformers' conversion, differs."""
    folder = Path(made.folder)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    alone = folder.parent / f"{folder.name}-alone"
    alone.mkdir()
    shutil.copyfile(folder / "tokenizer.model", alone / "tokenizer.model")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (alone / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = (AutoTokenizer.from_pretrained(each).backend_tokenizer for each in (folder, alone))
    pieces = [slow.id_to_piece(at).replace(SPACE, " ") for at in range(len(slow)) if not slow.is_byte(at)]
    wrong = [0, 0]
    for text in fuzz_texts(pieces, list(made.tokens), count=count, seed=2026):
        tokens = slow.encode(text)
        for at, form in enumerate((ours, theirs)):
            wrong[at] += form.encode(text).ids != tokens
    return wrong[0], wrong[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--fuzz", type=int, default=200_000)
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            for normalization in NORMALIZATIONS:
                start = time.perf_counter()
                made = train_tokenizer(
                    Path(folder, f"{model}-{normalization}"), TEXT, vocab_size=options.vocab_size, model=model,
                    normalization=normalization, chat_template="chatml", tokens=["<think>", "</think>"],
                )  # fmt: skip
                seconds = time.perf_counter() - start
                slow = sentencepiece.SentencePieceProcessor(model_file=str(Path(made.folder, "tokenizer.model")))
                ours, theirs = differences(made, options.fuzz)
                name, size, same = f"{model}, {normalization}", f"{made.vocab_size:,}", f"{ours} of {options.fuzz:,}"
                rows.append((name, size, rate(slow.encode), f"{seconds:.1f}", same, f"{theirs}"))
    for name in ("smollm2", "gemma3"):
        backend = gguf_tokenizer(read_gguf_header(embedded_gguf(name)).metadata).backend
        encode = partial(backend.encode, add_special_tokens=False)
        rows.append((name, f"{backend.get_vocab_size():,}", rate(encode), "", "", ""))
    print_rows(["tokenizer", "tokens", "bytes a token", "s to train", "ours differs", "transformers' differs"], rows)


if __name__ == "__main__":
    main()
