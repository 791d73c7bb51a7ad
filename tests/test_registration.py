"""`import neuroweave` alone lets transformers know patched and NeuroBLAST checkpoints, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import neuroweave
from transformers import {first}
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(CONFIG_MAPPING["neuroblast"].__name__, CONFIG_MAPPING["neuroweave"].__name__)
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING["neuroblast"]].__name__)
"""


@pytest.mark.parametrize("first", ["AutoConfig", "AutoTokenizer", "AutoProcessor", "PreTrainedModel", "LlamaConfig"])
def test_registered_whatever_comes_first(first):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(first=first)], capture_output=True, text=True)
    assert done.stdout.split() == ["NeuroBlastConfig", "NeuroweaveConfig", "NeuroBlastForCausalLM"], done.stderr


def test_neuroweave_imports_neither_torch_nor_transformers():
    heavy = "('torch', 'transformers', 'numpy')"
    script = f"import neuroweave, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
