"""Deltas as the input of a fuse, generated on the way from a bank and a seed: never written, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuroweave.surgery.fusion.fuse import DeltaInput
from neuroweave.surgery.neurons.bank import load_bank
from neuroweave.surgery.neurons.deltas import GeneratedDeltas, plan_deltas


def generated_deltas(model: str | Path, bank: str | Path, **parameters: Any) -> DeltaInput:
    """The deltas of the bank file for the checkpoint folder `model`; `parameters` as `plan_deltas` takes them.

    Raises ValueError as `load_bank` and `plan_deltas` do.
    """
    neurons = load_bank(bank)
    plan = plan_deltas(model, neurons, **parameters)
    description = {"kind": "bank", "generation": {"parameters": plan.parameters, "bank": plan.bank}}
    return DeltaInput(GeneratedDeltas(plan, neurons), description, {}, [neurons.sha256], (Path(bank),))
