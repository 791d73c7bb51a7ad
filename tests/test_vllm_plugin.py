"""The vLLM plugin without vLLM: what is served and what refused, its arithmetic, the sealed config, the entry point.

What needs an engine is in benchmarks/vllm_equality.py; `NEUROWEAVE_VLLM=PYTHON pytest -m slow` runs it.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import neuroweave
from neuroweave.activations.mixtures import NeuronMixture, build_activation
from neuroweave.activations.torch import Activation
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM
from neuroweave.neuroblast.convolution import CausalConvolution
from neuroweave.surgery.modeling import NeuroweaveConfig
from neuroweave.vllm_plugin.decisions import PATCHED_NEUROBLAST, Engine, architecture_of, refusal
from neuroweave.vllm_plugin.neuroblast_plan import PlannedActivations
from neuroweave.vllm_plugin.neuron_shards import WHOLE, Shard, on_shard
from neuroweave.vllm_plugin.packed_convolution import convolve, find_columns
from neuroweave.vllm_plugin.served_config import ServedConfig, opened

ROOT = Path(__file__).parents[1]
PHANTOM = {"name": "tried", "sites": [{"site": "everywhere", "activation": "phantom"}]}


def tiny_neuroblast(**settings: Any) -> NeuroBlastForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_sensory_layers": 4,
        "num_associative_layers": 3, "num_motor_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    return NeuroBlastForCausalLM(NeuroBlastConfig(**sizes | settings)).eval()


# ------------------------------------------------------------------------------------------------------- decisions


def test_the_entry_point_is_the_function_that_registers():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    entry = EntryPoint("neuroweave", declared["neuroweave"], "vllm.general_plugins")
    assert entry.load() is neuroweave.vllm_plugin.register


def patched(family: str = "llama", **engine: Any) -> str | None:
    model = tiny_model()
    neuroweave.patch(model, PHANTOM)
    model.config.neuroweave["base"]["model_type"] = family
    return refusal(model.config, Engine(**engine))


@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"speculative": True}])
def test_a_patched_llama_is_served(parallel):
    assert patched(**parallel) is None


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"quantization": "fp8"}, "quantization 'fp8' was not tried"),
        ({"lora": True}, "LoRA adapters were not tried"),
        ({"generates": False}, "it generates text"),
        ({"tensor_parallel": 4}, "its 2 heads of keys and values have to divide among the ranks"),
        ({"family": "mixtral"}, "it is a patched 'mixtral'; in vLLM, patched models were proven equal"),
    ],
)
def test_what_was_not_proven_is_refused(engine, reason):
    assert reason in (patched(**engine) or "")


@pytest.mark.parametrize(
    ("settings", "engine", "reason"),
    [
        ({}, {"pipeline_parallel": 2}, "its layers stay together"),
        ({}, {"speculative": True}, "cannot take back tokens"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {}, "'dynamic' depends on"),
        ({"convolutions": False}, {}, "no convolution layer"),
        ({"num_sensory_layers": 1, "num_associative_layers": 0}, {}, "no convolution layer"),
    ],
)
def test_neuroblast_is_refused_where_its_state_would_be_wrong(settings, engine, reason):
    config = tiny_neuroblast(**settings).config
    assert reason in (refusal(config, Engine(**engine)) or "")


def test_neuroblast_is_served_patched_or_not():
    model = tiny_neuroblast()
    assert refusal(model.config, Engine(tensor_parallel=2)) is None
    neuroweave.patch(model, PHANTOM)
    assert refusal(model.config, Engine(tensor_parallel=2)) is None
    assert architecture_of(model.config) == PATCHED_NEUROBLAST


# --------------------------------------------------------------------------------------------------- sealed config


@pytest.fixture
def served_auto_config():
    """AutoConfig as the plugin sets it up in vLLM's processes."""
    AutoConfig.register("neuroweave", ServedConfig, exist_ok=True)
    yield
    AutoConfig.register("neuroweave", NeuroweaveConfig, exist_ok=True)


@pytest.mark.parametrize("make", [tiny_model, tiny_neuroblast])
def test_the_config_stays_sealed_until_our_class_opens_it(make, tmp_path, served_auto_config):
    model = make()
    neuroweave.patch(model, PHANTOM)
    model.save_pretrained(tmp_path)
    config = pickle.loads(pickle.dumps(AutoConfig.from_pretrained(tmp_path)))  # as it comes into a worker process
    assert config.hidden_act == "neuroweave"
    assert config.architectures == [architecture_of(config)]
    with pytest.raises(KeyError, match="neuroweave"):  # a native class, were it chosen by name
        type(config).__mro__[2] is not None and type(model).__mro__[2](copy.deepcopy(config))
    assert opened(config).hidden_act == "silu"
    ids = torch.tensor([[5, 6, 7]])
    again = AutoModelForCausalLM.from_config(opened(config))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert config.hidden_act == "neuroweave"


# -------------------------------------------------------------------------------------------------- packed sequences


def in_chunks(convolution: CausalConvolution, texts: list[torch.Tensor], draw: torch.Generator) -> list[torch.Tensor]:
    """Each text's outputs, read in random chunks of random batches, a state kept for each text."""
    channels, dilation = texts[0].shape[1], convolution.dilation
    weight = convolution.weight.transpose(1, 2).contiguous()
    states = torch.full(
        (len(texts), convolution.reach, channels), 7.0, dtype=torch.float64
    )  # what a block holds before it is used
    at, outputs = [0] * len(texts), [[] for _ in texts]
    while any(place < len(text) for place, text in zip(at, texts, strict=True)):
        order = torch.randperm(len(texts), generator=draw).tolist()
        lengths = [int(torch.randint(0, 1 + min(5, len(texts[each]) - at[each]), (), generator=draw)) for each in order]
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        packed = torch.cat([texts[each][at[each] : at[each] + n] for each, n in zip(order, lengths, strict=True)])
        begins = torch.tensor([at[each] == 0 for each in order])
        columns = find_columns(starts, len(packed), convolution.kernel_size, dilation)
        past = states[order].masked_fill(begins[:, None, None], 0)
        y, states[order] = convolve(packed, weight, columns, past)
        for each, part in zip(order, y.split(lengths), strict=True):
            outputs[each].append(part)
            at[each] += len(part)
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (5, 4), (5, 8), (3, 123)])
@torch.no_grad()
def test_packed_chunks_with_states_are_the_convolution_of_each_text(taps, dilation):
    draw = torch.Generator().manual_seed(0)
    convolution = CausalConvolution(6, 7, taps, dilation).double()
    convolution.weight.normal_(generator=draw)
    texts = [torch.randn(length, 6, generator=draw, dtype=torch.float64) for length in (1, 40, 2, 7, 64, 3, 17)]
    for text, found in zip(texts, in_chunks(convolution, texts, draw), strict=True):
        wanted = convolution(text.T[None], len(text))[0]
        assert torch.allclose(found, wanted, atol=1e-12)


# ------------------------------------------------------------------------------------------------- tensor parallelism


@pytest.mark.parametrize(
    ("activation", "parts"),
    [
        ("phantom", 4),
        ({"segments": ["relu", "silu", "tanh"]}, 4),
        ({"segments": {"members": ["relu", "silu", "tanh"], "sizes": [1, 20, 3]}}, 2),
        ({"mixture": {"members": ["silu", "relu", "swish_beta"], "neutral": 0}}, 3),
        ({"mixture": {"members": ["silu", "relu", "swish_beta"], "neutral": 0, "hard": True}}, 2),
    ],
)
@torch.no_grad()
def test_the_shards_of_an_activation_side_by_side_are_the_activation(activation, parts):
    torch.manual_seed(0)
    neurons = 24
    whole = build_activation(activation, neurons=neurons)
    stored = {name: torch.randn_like(each) for name, each in whole.named_parameters()}
    whole.load_state_dict(stored)
    x = 3 * torch.randn(2, 5, neurons)
    pieces = []
    for index, part in enumerate(x.chunk(parts, dim=-1)):
        cut = on_shard(build_activation(activation, neurons=neurons), neurons, Shard(index, parts))
        for name, parameter in cut.named_parameters():
            parameter.weight_loader(parameter, stored[name])
        pieces.append(cut(part))
    assert torch.allclose(torch.cat(pieces, dim=-1), whole(x), atol=1e-6)


def test_a_shard_that_does_not_come_out_even_is_refused():
    segments = build_activation({"segments": ["relu", "silu"]})
    with pytest.raises(ValueError, match="25 neurons cannot be cut into 2 equal parts"):
        on_shard(segments, 25, Shard(1, 2))
    with pytest.raises(ValueError, match="unknown number of neurons"):
        on_shard(segments, None, Shard(1, 2))
    with pytest.raises(ValueError, match="GELU cannot be cut"):
        on_shard(nn.GELU(), 24, Shard(1, 2))
    assert on_shard(segments, None, WHOLE) is segments
    with pytest.raises(ValueError, match="24 in all, but there are 12"):
        on_shard(segments, 24, WHOLE)(torch.ones(2, 12))


# ---------------------------------------------------------------------------------------------- a patched NeuroBLAST


def test_every_place_of_a_neuroblast_plan_gets_its_activation_once():
    model = tiny_neuroblast()
    mixture = {"mixture": ["original", "relu"]}
    sites = [{"site": "everywhere", "activation": "phantom"}, {"site": "mlp", "activation": mixture, "layers": [2]}]
    neuroweave.patch(model, {"name": "tried", "sites": sites})
    planned = PlannedActivations(model.config)
    with pytest.raises(ValueError, match="the recipe changes it, but NeuroBLAST in vLLM has no such place"):
        planned.check_all_taken()
    for layer in model.model.planned:
        path = f"model.{layer.name}"
        phantom = layer.number == 0
        assert isinstance(planned.on_input(path), Activation if phantom else nn.Identity)
        if layer.is_convolution:
            continue
        names = [f"{path}.self_attn.{part}_proj" for part in "qkvo"]
        names += [f"{path}.mlp.{part}_proj" for part in ("gate", "up", "down")]
        assert [str(planned.after(name, 24, WHOLE)[0]) for name in names] == ["Activation(phantom)"] * len(names)
        built = planned.of_mlp(f"{path}.mlp.act_fn", 40, WHOLE)
        assert isinstance(built, NeuronMixture if layer.number == 2 else Activation)
    assert isinstance(planned.before_head(), Activation)
    planned.check_all_taken()


# ----------------------------------------------------------------------------------------------------------- an engine


@pytest.mark.slow
@pytest.mark.skipif("NEUROWEAVE_VLLM" not in os.environ, reason="NEUROWEAVE_VLLM names no python with vLLM")
@pytest.mark.parametrize("row", ["llama, all kinds, chunked prefill", "neuroblast, preempted"])
def test_an_engine_gives_the_log_probabilities_of_transformers(row):
    command = [sys.executable, ROOT / "benchmarks" / "vllm_equality.py", os.environ["NEUROWEAVE_VLLM"], "--only", row]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("| equal |") == 1
