"""Measure: what did a change do to a model? Two or more models read the same tokens; every difference comes with a
paired bootstrap interval over passages of text, and a report says what is noise. Start with `compare`, which takes
models in memory; `write_report` needs `pip install "neuroweave[report]"`, nothing else here does."""

from __future__ import annotations

from neuroweave.diagnose.comparison import Comparison, Estimate, Plan, SpeedPlan
from neuroweave.diagnose.experiment import compare
from neuroweave.diagnose.report import require_report_extra, write_report
from neuroweave.diagnose.subject import Subject

__all__ = [
    "Comparison",
    "Estimate",
    "Plan",
    "SpeedPlan",
    "Subject",
    "compare",
    "require_report_extra",
    "write_report",
]
