"""What `neuroweave neurons show` says of a bank and of a neuron, as lines and as JSON."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from neuroweave.cli.console import counted
from neuroweave.surgery.neurons.bank import Bank, Neuron
from neuroweave.surgery.neurons.curves import curve_of, defined_curve, fires_on, sparkline, text_plot, visible

COLUMNS = (
    "neuron",
    "kind",
    "origin",
    "gate",
    "up",
    "down",
    "mean |h|",
    "contribution",
    "kurtosis",
    "open",
    "curve",
    "fires on",
)
MATRICES = ("gate", "up", "down")
BEFORE, TOKENS_WIDTH = 38, 30


def find_neuron(bank: Bank, name: str) -> Neuron:
    """The neuron of that name. Raises ValueError with the nearest name there is."""
    for neuron in bank.neurons:
        if neuron.name == name:
            return neuron
    close = difflib.get_close_matches(name, [neuron.name for neuron in bank.neurons], n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"the bank has no neuron named {name!r}{hint} (--limit 0 lists all)")


def norms(bank: Bank, neuron: Neuron) -> dict[str, float]:
    """Lengths of the neuron's three directions."""
    index = next(at for at, other in enumerate(bank.neurons) if other is neuron)
    return {name: float(np.linalg.norm(getattr(bank, name)[index].astype(np.float64))) for name in MATRICES}


# ------------------------------------------------------------------------------------------------------- the bank


def about_bank(bank: Bank, title: str) -> list[str]:
    """Size, and what the provenance says, part by part."""
    kinds = {kind: sum(neuron.kind == kind for neuron in bank.neurons) for kind in ("source", "derivative")}
    parts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    head = f"{title}: {counted(len(bank), 'neuron')} ({parts or 'none'}), hidden size {bank.hidden_size}"
    return [head, f"sha256 {bank.sha256}", *provenance_lines(bank.provenance)]


def provenance_lines(provenance: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """One `key: value` a line; what is nested in it is indented, long lists and hashes are cut short."""
    for key, value in provenance.items():
        if isinstance(value, Mapping) and set(value) <= {"bytes", "sha256"}:
            yield f"{indent}{key}: " + ", ".join(f"{name} {entry}" for name, entry in value.items())
        elif isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from provenance_lines(value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            for number, part in enumerate(value, start=1):
                yield f"{indent}{key} {number} of {len(value)}:"
                yield from provenance_lines(part, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{key}: {listed(value)}"
        elif value is not None:
            yield f"{indent}{key}: {value}"


def listed(values: Sequence[Any], most: int = 6) -> str:
    if len(values) <= most:
        return ", ".join(map(str, values))
    return f"{', '.join(map(str, values[: most - 2]))}, ..., {values[-1]} ({len(values)})"


def table(bank: Bank, neurons: Sequence[Neuron]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, of those `COLUMNS` that have anything in them."""
    found = rows(bank, neurons)
    used = [at for at in range(len(COLUMNS)) if any(row[at] for row in found)]
    return [COLUMNS[at] for at in used], [[row[at] for at in used] for row in found]


def rows(bank: Bank, neurons: Sequence[Neuron]) -> list[tuple[str, ...]]:
    """The cells in the order of `COLUMNS`; empty where something is not known."""
    found = []
    for neuron in neurons:
        lengths = norms(bank, neuron)
        known = neuron.statistics
        numbers = [number(known.get(name)) for name in ("mean_absolute", "contribution", "kurtosis")]
        share = f"{100 * known['open_share']:.0f} %" if "open_share" in known else ""
        curve = curve_of(neuron)
        found.append(
            (
                neuron.name,
                neuron.kind,
                origin_text(neuron.origin),
                *(number(lengths[name]) for name in MATRICES),
                *numbers,
                share,
                sparkline(curve) if curve else "",
                fires_on(neuron, length=TOKENS_WIDTH),
            )
        )
    return found


def number(value: float | None) -> str:
    """Three digits, without a power of ten where it can be avoided; nothing for what is not known."""
    if value is None:
        return ""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def origin_text(origin: Mapping[str, Any]) -> str:
    """Where a neuron comes from, in a table's cell."""
    if "parent" in origin:
        return f"{origin.get('operation', 'derived')} {origin['parent']}"
    if "layer" in origin:
        return f"layer {origin['layer']}"
    return str(origin.get("spec", ""))


# ------------------------------------------------------------------------------------------------------ one neuron


def about_neuron(bank: Bank, neuron: Neuron) -> list[str]:
    """Everything that the bank knows of one neuron."""
    lengths = norms(bank, neuron)
    lines = [f"{neuron.name}  ({neuron.kind})", "", "origin"]
    lines += [f"  {line}" for line in provenance_lines(neuron.origin)]
    lines += ["", "length of the directions", "  " + "  ".join(f"{name} {lengths[name]:.4g}" for name in MATRICES)]
    if neuron.behaviour:
        lines += ["", "defined as", *(f"  {line}" for line in provenance_lines(neuron.behaviour))]
        lines += ["", *(f"  {line}" for line in text_plot(defined_curve(neuron.behaviour)))]
    if neuron.statistics:
        width = max(map(len, neuron.statistics))
        measured = " (h = act(gate·x)·(up·x) is the activation, gate·x the input)" * ("peak" in neuron.statistics)
        whose = f" of {neuron.origin['parent']}" if neuron.origin.get("statistics") == "inherited" else ""
        lines += ["", f"statistics{whose}{measured}"]
        lines += [f"  {name.replace('_', ' '):<{width}}  {value:.6g}" for name, value in neuron.statistics.items()]
    if neuron.response and (curve := curve_of(neuron)):
        lines += ["", "response: mean of h in bins of gate·x (●), one standard deviation (░)", ""]
        lines += [f"  {line}" for line in text_plot(curve)]
    if neuron.fired:
        lines += ["", "strongest moments", *moment_lines(neuron)]
    return lines


def moment_lines(neuron: Neuron) -> list[str]:
    """One line a moment: the value of h, and the text with the token marked and in one column."""
    values = [f"{moment['value']:+.4g}" for moment in neuron.fired]
    width = max(map(len, values))
    lines = []
    for value, moment in zip(values, neuron.fired, strict=True):
        text, token = str(moment["text"]), str(moment["token"])
        start = int(moment.get("start", max(text.find(token), 0)))
        end = start + len(token)
        start += len(token) - len(token.lstrip(" "))  # the space that many tokens begin with
        before, after = visible(text[:start])[-BEFORE:], visible(text[end:])
        marked = f"{before:>{BEFORE}}»{visible(text[start:end])}«{after}"
        lines.append(f"  {value:>{width}}  {marked.rstrip()}  ({moment.get('document', '?')})")
    return lines


# ------------------------------------------------------------------------------------------------------------ JSON


def as_json(bank: Bank, neurons: Sequence[Neuron]) -> dict[str, Any]:
    """The bank's description with the neurons that are shown; directions are given by their lengths."""
    return {
        "sha256": bank.sha256,
        "count": len(bank),
        "hidden_size": bank.hidden_size,
        "provenance": bank.provenance,
        "neurons": [asdict(neuron) | {"norms": norms(bank, neuron)} for neuron in neurons],
    }
