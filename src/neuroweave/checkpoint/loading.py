"""Load a model and its tokenizer, in a dtype that this machine can compute with."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    source: str | Path, *, dtype: str = "auto", device: str = "auto", **options: Any
) -> tuple[PreTrainedModel, str]:
    """The causal language model in `source`, in eval mode, and one line that says which dtype and device were chosen.

    `source`: a folder or a hub id, patched or not. `dtype`: one of `DTYPES`; `auto` keeps the checkpoint's own unless
    that is slow here (see `choose_dtype`). `options` go to `from_pretrained`.
    Raises ValueError when the folder or the dtype is not usable.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_source(source)
    check_weights(Path(source))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(source)
    stored = getattr(config.get_text_config(), "dtype", None) or config.dtype or torch.float32
    chosen, reason = choose_dtype(dtype, stored, device)
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=chosen, **options)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a decorator that hides its type
    return model.eval(), f"{device}, {str(chosen).removeprefix('torch.')}{reason}"


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `source`, a checkpoint or a tokenizer's own folder. Raises ValueError when there is none."""
    from transformers import AutoTokenizer

    if not (Path(source) / "tokenizer_config.json").is_file():
        check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: no tokenizer could be loaded ({error})") from error


def check_source(source: str | Path) -> None:
    """Refuse what is plainly neither a checkpoint folder nor a hub id, before a hub is asked."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "_CHECKPOINT_METADATA").is_file():
                raise ValueError(
                    f"{source}: what a JAX training run goes on from, no model; that is {path.parent / 'model'}"
                )
            raise ValueError(f"{source}: no config.json in this folder; is it a checkpoint?")
    elif path.is_file():
        raise ValueError(f"{source}: a file; give a checkpoint folder (neuroweave import turns a GGUF file into one)")
    elif path.is_absolute() or len(path.parts) != 2 or str(source).startswith("."):
        raise ValueError(f"{source}: no such folder, and not a hub id of the form owner/name")


def check_weights(folder: Path) -> None:
    """Refuse a local folder whose safetensors headers or index are damaged, naming the file and the damage."""
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        Checkpoint(folder, allow_orphans=True).close()


def choose_dtype(dtype: str, stored: torch.dtype | str, device: str) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why, as a text to append (empty when it is simply what was asked for).

    A CPU without AVX-512 BF16 or AMX multiplies bf16 matrices some 300 times slower than float32 ones, so there
    `auto` means float32.
    """
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; choose from {', '.join(DTYPES)}")
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    if dtype != "auto":
        return getattr(torch, dtype), ""
    if device.startswith("cpu") and stored in (torch.bfloat16, torch.float16) and not cpu_multiplies_bfloat16():
        name = str(stored).removeprefix("torch.")
        return torch.float32, f" (stored as {name}; this CPU has no fast {name} products, so float32 was chosen)"
    return stored, ""


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU says it has bf16 dot products (AVX-512 BF16, AMX, or Arm's)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.machine() == "arm64"
    flags = cpuinfo.read_text(errors="replace")
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
