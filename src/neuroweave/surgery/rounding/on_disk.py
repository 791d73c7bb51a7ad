"""Round a checkpoint folder's matrices to few bits, layer by layer on text, and write it as another folder.

The result is an ordinary float32 checkpoint whose weights lie on the grid of the fast runtime's format: any tool loads
it, `neuroweave compare` says what the rounding did, and `--fast --weights int4` packs it without a further loss.
Letters: N windows, T tokens of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuroweave import __version__
from neuroweave.checkpoint.loading import check_source, check_weights, load_tokenizer
from neuroweave.checkpoint.resaving import load_stored, save_like
from neuroweave.checkpoint.staging import check_free_space, check_output, staged_folder
from neuroweave.runtime.weights import layer_format, pack
from neuroweave.surgery.calibration.on_disk import draw_calibration_windows
from neuroweave.surgery.calibration.stream import LayerStream, listening
from neuroweave.surgery.rounding.four_bits import round_to_four_bits
from neuroweave.text.tokens import NamedText, token_ids_sha256

TOKENS, WINDOW = 16_384, 512
RECORD = "rounding.json"
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Rounding:
    """What was done. `matrices`: their number by format; `errors`: of a layer's matrices, relative, mean."""

    tokens: int
    window: int
    text_sha256: str
    matrices: dict[str, int]
    errors: list[float]


def round_checkpoint(
    source: str | Path,
    out: str | Path,
    documents: Sequence[NamedText],
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Rounding:
    """Write `out`: the folder `source` with its layers' matrices rounded to 4 bits (some to int8: `layer_format`).

    Embedding and head stay as they are (the runtime holds them in int8). Raises ValueError, before anything is written,
    for folders and texts that do not fit.
    """
    source = Path(source)
    check_source(source)
    check_weights(source)
    check_output(out, overwrite=overwrite, sources=[source])
    windows_NT = draw_calibration_windows(documents, load_tokenizer(source), tokens=tokens, window=window, seed=seed)
    model = load_stored(source)
    with staged_folder(out, overwrite=overwrite, sources=[source]) as folder:
        hidden = model.config.get_text_config(decoder=True).hidden_size
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        check_free_space(folder, weights + 8 * windows_NT.numel() * hidden)
        done = round_layers(model, windows_NT, folder=folder, progress=progress)
        model.float()
        model.config.dtype = torch.float32
        save_like(model, source, folder)
        entry = {"neuroweave": __version__, "format": "int4", **asdict(done)}
        (folder / RECORD).write_text(json.dumps(entry, indent=2) + "\n")
    return done


def round_layers(
    model: PreTrainedModel, windows_NT: Tensor, *, folder: Path, progress: Progress | None = None
) -> Rounding:
    """Round every layer's matrices in place, each on the inputs that the rounded layers before it give."""
    counts: dict[str, int] = {}
    errors: list[float] = []
    with LayerStream(model, windows_NT, folder=folder) as stream:
        while stream.at < len(stream.layers):
            matrices = matrices_of(stream.layer)
            if not matrices:
                raise ValueError(f"{stream.paths[stream.at]}: no linear layer in it that could be rounded")
            grams = grams_of(stream, list(matrices.values()))
            found = []
            for name, module in matrices.items():
                format = layer_format("int4", name.rpartition(".")[2], last=stream.at == len(stream.layers) - 1)
                counts[format] = counts.get(format, 0) + 1
                found.append(round_matrix(module, grams[module], format))
            errors.append(sum(found) / len(found))
            original = stream.layers[stream.at]
            if original is not stream.layer:
                original.load_state_dict(stream.layer.state_dict(), assign=True)
            stream.advance()
            if progress is not None:
                progress(stream.at, len(stream.layers))
    return Rounding(windows_NT.numel(), windows_NT.shape[1], token_ids_sha256(windows_NT.tolist()), counts, errors)


def matrices_of(layer: nn.Module) -> dict[str, Any]:
    """The linear layers within, by name; of a projection with activations around it, the projection."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        inner = getattr(module, "projection", module)
        if isinstance(inner, nn.Linear):
            found[name] = inner
    return found


@torch.no_grad()
def grams_of(stream: LayerStream, modules: list[Any]) -> dict[Any, Tensor]:
    """inputs^T inputs of each module over all windows, in float64 between batches."""
    grams: dict[Any, Tensor] = {}
    for rows in stream.batches():
        with listening(modules) as seen:
            stream.run(rows)
        for module in modules:
            x = seen[module][0].flatten(0, -2).float()
            part = (x.T @ x).double()
            grams[module] = grams[module] + part if module in grams else part
    return grams


@torch.no_grad()
def round_matrix(module: Any, gram: Tensor, format: str) -> float:
    """Round in place; what changed of its outputs, relative."""
    weight = module.weight
    made = pack(weight, "int8").whole() if format == "int8" else round_to_four_bits(weight, gram)
    change, whole = (made - weight).double(), weight.double()
    weight.copy_(made)
    sizes = [float((each @ gram * each).sum().clamp_min(0)) for each in (change, whole)]
    return (sizes[0] / sizes[1]) ** 0.5 if sizes[1] > 0 else 0.0
