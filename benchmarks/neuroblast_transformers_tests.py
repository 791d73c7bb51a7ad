"""transformers' own model and generation tests, pointed at NeuroBLAST.

    python benchmarks/neuroblast_transformers_tests.py TREE [--select EXPRESSION] [--workers N]

TREE: a source tree of the installed transformers with its whole `tests` folder (a git checkout of the tag; the source
distribution lacks tests/generation, tests/exporters and tests/causal_lm_tester.py). Needs pytest and parameterized.
Prints every test that failed or was skipped, grouped by its reason, and the counts; exits with 1 when a test fails that
is not in `EXPECTED`. Nothing of TREE is changed.

Run by pytest, this file is the test module: a class as transformers' `tests/models/lfm2/test_modeling_lfm2.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Any

# Tests that cannot pass on this model, and why.
EXPECTED = {
    "test_attention_outputs": "expects an attention of every layer; convolutions have none (lfm2 overrides it, too)",
    "test_sliding_window_mask": "pairs the attentions with all layers, convolutions included",
    "test_num_layers_is_small": "allows two layers; a model with every kind of layer has five",
    "test_base_model_prefix_loads_base_weights": "loads a checkpoint without a head; refused likewise",
    "test_correct_missing_keys": "loads a checkpoint without a head; NeuroBLAST refuses missing tensors by name",
    "test_model_weights_reload_no_missing_tied_weights": "loads a checkpoint of one tensor; refused likewise",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--select", default="", help="a pytest -k expression")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    if not (options.tree / "tests" / "causal_lm_tester.py").exists():
        raise SystemExit(f"{options.tree} has no tests/causal_lm_tester.py; give a checkout of transformers")
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, tests of {options.tree.name}\n")
    found = run_tests(options.tree.resolve(), options.select, options.workers)
    print_table(found)
    raise SystemExit(1 if any(outcome == "failed" for outcome, _ in found) else 0)


def run_tests(tree: Path, select: str, workers: int) -> dict[tuple[str, str], list[str]]:
    """Names of tests by (outcome, reason)."""
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        report, settings = Path(folder) / "report.xml", Path(folder) / "pytest.ini"
        settings.write_text("[pytest]\naddopts =\n")
        command = [
            sys.executable,
            "-m",
            "pytest",
            __file__,
            "-q",
            "-c",
            str(settings),
            "--tb=short",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-W", "ignore", f"--junitxml={report}", *(["-k", select] if select else [])]
        command += ["-n", str(workers)] if workers > 1 else []
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, check=False)
        return read_report(report)


def read_report(report: Path) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name, outcome, reason = case.get("name") or "", "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = re.sub(r"\s+", " ", child.get("message") or "")
        if outcome == "failed" and name in EXPECTED:
            outcome, reason = "cannot pass", EXPECTED[name]
        # one line for all tasks of the pipelines, whose names stand in their reasons
        reason = re.sub(r"^NeuroBlastModelTest::\S+ is skipped: `[\w-]+` is not", "the task is not", reason)
        reason = re.sub(r"^NeuroBlastModelTest::\S+ is skipped: (.*) for `.*", r"\1", reason)
        found[outcome, reason[:160]].append(name)
    return found


def print_table(found: dict[tuple[str, str], list[str]]) -> None:
    print("\n| outcome | tests | reason | which |\n|---|---|---|---|")
    for (outcome, reason), names in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        if outcome != "passed":
            print(f"| {outcome} | {len(names)} | {reason} | {', '.join(sorted(names))} |")
    print()
    for outcome in ("passed", "cannot pass", "failed", "skipped"):
        print(f"{outcome}: {sum(len(names) for (kind, _), names in found.items() if kind == outcome)}")


if __name__ == "__main__":
    main()
else:
    from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM, NeuroBlastModel
    from tests import test_fsdp_mixin, test_tensor_parallel_mixin

    # the tests tell a base model from one with a head, and where labels go, by the names of transformers' own classes
    MODEL_MAPPING_NAMES["neuroblast"] = "NeuroBlastModel"
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["neuroblast"] = "NeuroBlastForCausalLM"
    # the distributed tests run for a list of transformers' own models only
    for kind, mixin in (("FSDP", test_fsdp_mixin), ("TP", test_tensor_parallel_mixin)):
        setattr(mixin, f"{kind}_DISTRIBUTED_TEST_MODEL_TYPES", None)

    class NeuroBlastTester(CausalLMModelTester):
        """A tiny model with every kind of layer."""

        config_class = NeuroBlastConfig
        base_model_class = NeuroBlastModel
        causal_lm_class = NeuroBlastForCausalLM

        def __init__(self, parent: Any) -> None:
            stages = {"num_sensory_layers": 2, "num_associative_layers": 2, "num_motor_layers": 1}
            super().__init__(parent, **stages, num_hidden_layers=5, kernel_size=3, scale=0.5)

    class NeuroBlastModelTest(CausalLMModelTest, unittest.TestCase):
        model_tester_class = NeuroBlastTester
        _torch_compile_train_cls = NeuroBlastForCausalLM

        def _get_conv_state_shape(self, batch_size: int, config: NeuroBlastConfig) -> tuple[int, ...]:
            return batch_size, config.hidden_size, config.kernel_size - 1

        def test_reverse_loading_mapping(self) -> None:
            # a published checkpoint differs in the shape of the convolutions, not in their names
            super().test_reverse_loading_mapping(check_keys_were_modified=False)
