"""Measure: what did a change do to a model? Two or more models read the same tokens; every difference comes with a
paired bootstrap interval over passages of text, and a report says what is noise. Start with `compare`, which takes
models in memory; `write_report` needs `pip install "neuroweave[report]"`, nothing else here does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroweave.diagnose.experiment import compare
    from neuroweave.diagnose.ledger import Ledger
    from neuroweave.diagnose.report.page import require_report_extra, write_report
    from neuroweave.diagnose.results.comparison import Comparison
    from neuroweave.diagnose.results.plan import GradientPlan, Plan, SamplingPlan, SpeedPlan, TaskPlan
    from neuroweave.diagnose.results.records import Estimate
    from neuroweave.diagnose.subject import Subject

__all__ = [
    "Comparison",
    "Estimate",
    "GradientPlan",
    "Ledger",
    "Plan",
    "SamplingPlan",
    "SpeedPlan",
    "Subject",
    "TaskPlan",
    "compare",
    "require_report_extra",
    "write_report",
]

# Imported on first use: a stored result is read without torch.
_PLACES = {
    "experiment": ("compare",),
    "ledger": ("Ledger",),
    "report.page": ("require_report_extra", "write_report"),
    "results.comparison": ("Comparison",),
    "results.plan": ("GradientPlan", "Plan", "SamplingPlan", "SpeedPlan", "TaskPlan"),
    "results.records": ("Estimate",),
    "subject": ("Subject",),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"neuroweave.diagnose.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
