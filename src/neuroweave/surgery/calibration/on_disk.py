"""Calibrate a patched checkpoint folder against its teacher's, and write the result as another folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neuroweave import __version__
from neuroweave.checkpoint.loading import check_source, check_weights, load_tokenizer
from neuroweave.checkpoint.manifest import fingerprints
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.resaving import load_stored, save_like
from neuroweave.checkpoint.sealed import KEY
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.surgery.calibration.calibrate import Calibration, CalibrationOptions, Progress, calibrate, check_enough
from neuroweave.text.tokens import NamedText, start_tokens, token_ids_sha256

TOKENS, WINDOW = 49_152, 512


def calibrate_checkpoint(
    patched: str | Path,
    teacher: str | Path,
    out: str | Path,
    documents: Sequence[NamedText],
    *,
    options: CalibrationOptions | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Write `out`: the folder `patched` with weights solved again so that it comes close to the folder `teacher`.

    `documents`: text that is not used for measuring later. `tokens`: how much of it, in windows of `window` tokens that
    are drawn by `seed`. The output keeps the recipe and the dtype; its config.json records what was done under
    `neuroweave.calibration`. Raises ValueError, before anything is written, for folders and texts that do not fit.
    """
    patched, teacher = Path(patched), Path(teacher)
    options = options or CalibrationOptions()
    for source in (patched, teacher):
        check_source(source)
        check_weights(source)
    check_output(out, overwrite=overwrite, sources=[patched, teacher])
    tokenizer = load_tokenizer(teacher)
    windows_NT = draw_calibration_windows(documents, tokenizer, tokens=tokens, window=window, seed=seed)
    check_enough(windows_NT, options)
    student, reference = load_stored(patched), load_stored(teacher)
    if KEY not in student.config.to_dict():
        raise ValueError(f"{patched}: not a patched model; calibrate brings a patched one back to what it was")
    context = getattr(reference.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and window > context:
        raise ValueError(f"a window of {window} tokens; this model reads {context} at most")
    stored = {name: parameter.dtype for name, parameter in student.named_parameters()}
    with staged_folder(out, overwrite=overwrite, sources=[patched, teacher]) as folder:
        # hidden states of two models, before and behind a layer, and then the weights
        hidden = reference.config.get_text_config(decoder=True).hidden_size
        weights = sum(parameter.nbytes for parameter in student.parameters())
        check_free_space(folder, weights + max(16 * windows_NT.numel() * hidden, weights))
        with tempfile.TemporaryDirectory(prefix="weights-", dir=folder, ignore_cleanup_errors=True) as finished:
            done = calibrate(
                student,
                reference,
                windows_NT,
                folder=folder,
                weights=Path(finished),
                options=options,
                progress=progress,
            )
            for name, parameter in student.named_parameters():
                parameter.data = parameter.data.to(stored[name])
            record(student, teacher, done, windows_NT)
            save_like(student, patched, folder)
    return done


def draw_calibration_windows(
    documents: Sequence[NamedText], tokenizer: PreTrainedTokenizerBase, *, tokens: int, window: int, seed: int
) -> Tensor:
    """About `tokens` token ids [N, window] in whole windows that do not overlap, documents and windows drawn by `seed`.

    Raises ValueError where no document has a whole window.
    """
    if window < 2 or tokens < window:
        raise ValueError(f"{tokens} tokens in windows of {window}; give at least one window of 2 tokens or more")
    start = list(start_tokens(tokenizer))
    body = window - len(start)
    generator = torch.Generator().manual_seed(seed)
    windows: list[list[int]] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        ids = tokenizer(documents[index].text, add_special_tokens=False, verbose=False)["input_ids"]
        windows += [start + list(ids[at : at + body]) for at in range(0, len(ids) - body + 1, body)]
        if len(windows) * window >= 4 * tokens:
            break
    if not windows:
        raise ValueError(
            f"no text of at least {body} tokens among {len(documents)} documents; give more, or a smaller window"
        )
    order = torch.randperm(len(windows), generator=generator)[: tokens // window]
    return torch.tensor([windows[index] for index in order.tolist()])


def record(student: PreTrainedModel, teacher: Path, done: Calibration, windows_NT: Tensor) -> None:
    with Checkpoint(teacher, allow_orphans=True) as checkpoint:
        files = fingerprints(checkpoint)
    entry: dict[str, Any] = student.config.neuroweave
    entry["calibration"] = {
        "neuroweave": __version__,
        "options": asdict(done.options),
        "tokens": done.tokens,
        "window": windows_NT.shape[1],
        "text_sha256": token_ids_sha256(windows_NT.tolist()),
        "teacher": {"files": files},
    }
