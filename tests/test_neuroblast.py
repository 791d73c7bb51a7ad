"""NeuroBLAST against the published model's vectors; causality, chunks and padding over random configurations."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from neuroweave.checkpoint.layers import STAGES as STAGE_LISTS
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM, plan_layers
from neuroweave.neuroblast.convolution import METHODS, CausalConvolution
from neuroweave.neuroblast.layer_plan import STAGES
from neuroweave.neuroblast.weight_map import tensor_shapes

DATA = Path(__file__).parent / "data" / "neuroblast"
CASES = ("scale1_k5", "scale2_gated", "scale05_proj", "tied", "rightpad_b3")
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
}


def published_folder(case: str, folder: Path, **changed: object) -> Path:
    """The vectors' weights as the published checkpoint that they come from."""
    stored = load_file(DATA / f"{case}.safetensors")
    config = json.loads((DATA / f"{case}.json").read_text())["config"]
    folder.mkdir()
    weights = {name.removeprefix("state."): tensor for name, tensor in stored.items() if name.startswith("state.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "model_type": "neuroblast",
        "architectures": ["NeuroBLASTForCausalLM"],
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "energy_dim": 128,
        "attention_every": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def random_model(seed: int = 0, **config: object) -> NeuroBlastForCausalLM:
    """A small model whose weights are large enough that every mistake shows."""
    model = NeuroBlastForCausalLM(NeuroBlastConfig(**(SIZES | config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.3, generator=generator)
    return model


stages = st.fixed_dictionaries(
    {
        "num_sensory_layers": st.integers(0, 5),
        "num_associative_layers": st.integers(0, 5),
        "num_motor_layers": st.integers(0, 3),
    }
).filter(lambda counts: any(counts.values()))
random_configurations = st.builds(
    lambda counts, more: counts | more,
    stages,
    st.fixed_dictionaries(
        {
            "kernel_size": st.sampled_from([1, 3, 5, 7]),
            "scale": st.sampled_from([1.0, 2.0, 0.5, 0.1]),
            "max_dilation": st.sampled_from([1, 4, 8]),
            "bridges": st.booleans(),
            "alternating_rotary": st.booleans(),
            "convolutions": st.booleans(),
        }
    ),
)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ------------------------------------------------------------------------------------------------------- the vectors


@pytest.mark.parametrize("case", CASES)
def test_published_vectors(case, tmp_path):
    """Logits, hidden states, bridge terms and loss within 1e-4, gradients within 1e-5 relative."""
    stored = load_file(DATA / f"{case}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(published_folder(case, tmp_path / "published")).eval()
    assert type(model) is NeuroBlastForCausalLM
    bridges = {}
    for name in ("sensory_to_associative", "sensory_to_motor"):
        module = model.model.get_submodule(name)
        module.register_forward_hook(lambda _, __, output, name=name: bridges.update({name: output}))
    result = model(
        input_ids=stored["input_ids"],
        attention_mask=stored["attention_mask"],
        labels=stored["labels"],
        output_hidden_states=True,
    )
    real = stored["attention_mask"].bool()
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(result.logits[real], stored["logits"][real], **close)
    torch.testing.assert_close(torch.stack(result.hidden_states)[:, real], stored["hidden_states"][:, real], **close)
    torch.testing.assert_close(result.hidden_states[-1][real], stored["last_hidden_state"][real], **close)
    for name, term in bridges.items():
        torch.testing.assert_close(term[real], stored[f"tap.bridge_{name}"][real], **close)
    torch.testing.assert_close(result.loss, stored["loss"].squeeze(), **close)
    result.loss.backward()
    gradients = {name: tensor for name, tensor in stored.items() if name.startswith("grad.")}
    assert len(gradients) > 10
    for name, expected in gradients.items():
        found = model.get_parameter(name.removeprefix("grad.")).grad
        if found.ndim < expected.ndim:  # of a published kernel only the live row has a gradient
            live = expected[:, :, expected.shape[2] // 2] if found.ndim == 3 else expected[:, :, 0, 0]
            assert live.count_nonzero() == expected.count_nonzero()
            expected = live
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_the_published_one(case):
    facts = json.loads((DATA / f"{case}.json").read_text())
    planned = plan_layers(NeuroBlastConfig(**facts["config"]))
    for stage in STAGES:
        layers = [layer for layer in planned if layer.stage == stage]
        assert [layer.dilation for layer in layers if layer.is_convolution] == facts["dilations"].get(stage, [])
        assert [None if layer.is_convolution else layer.rotary for layer in layers] == facts["use_rope"][stage]
    assert tuple(f"{stage}_layers" for stage in STAGES) == STAGE_LISTS


def test_default_configuration_is_the_published_size():
    config = NeuroBlastConfig()
    shapes = tensor_shapes(config)
    live = sum(int(np.prod(shape)) for shape in shapes.values())
    dead = sum(int(np.prod(shape)) * (shape[-1] - 1) for name, shape in shapes.items() if name.endswith("conv.weight"))
    assert (live + dead, dead) == (563_171_840, 146_800_640)
    assert len(plan_layers(config)) == 72
    assert max(layer.dilation or 0 for layer in plan_layers(config)) == 8


@few
@given(random_configurations)
def test_tensor_table_is_the_models(configuration):
    with torch.device("meta"):
        model = NeuroBlastForCausalLM(NeuroBlastConfig(**(SIZES | configuration)))
    shapes = tensor_shapes(model.config)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == shapes
    assert list(shapes) == [name for name, _ in model.named_parameters()]


# ------------------------------------------------------------------------------------------------- the convolution


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("taps", "dilation", "tokens"), [(1, 1, 7), (3, 8, 1), (5, 4, 123), (7, 2, 17)])
def test_convolution_is_the_middle_row_of_the_published_one(method, taps, dilation, tokens):
    torch.manual_seed(1)
    kernel = torch.randn(11, 5, taps, taps, dtype=torch.float64)
    x = torch.randn(2, 5, tokens, dtype=torch.float64)
    reach = (taps - 1) * dilation
    flat = functional.pad(x[:, :, None], (reach, 0, taps // 2, taps // 2))
    expected = functional.conv2d(flat, kernel, dilation=(1, dilation))[:, :, 0].transpose(1, 2)
    found = METHODS[method](functional.pad(x, (reach, 0)), kernel[:, :, taps // 2], dilation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_packed_sequences_do_not_meet_in_a_convolution():
    torch.manual_seed(2)
    convolution = CausalConvolution(5, 6, kernel_size=3, dilation=4)
    torch.nn.init.normal_(convolution.weight)
    x = torch.randn(1, 5, 30)
    sequences = torch.tensor([[0] * 13 + [1] * 17])
    alone = [convolution(part, part.shape[-1]) for part in (x[..., :13], x[..., 13:])]
    torch.testing.assert_close(convolution(x, 30, sequences), torch.cat(alone, dim=1))


def test_initial_weights_have_the_published_bounds():
    torch.manual_seed(3)
    config = NeuroBlastConfig(**(SIZES | {"hidden_size": 64, "scale": 0.5}))
    block = NeuroBlastForCausalLM(config).model.sensory_layers[1]
    for weight, fan_in in ((block.conv.weight, 64 * 5 * 5), (block.proj_back.weight, 32)):
        bound = fan_in**-0.5
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert NeuroBlastForCausalLM(config).lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


# -------------------------------------------------------------------------------------------- causal, chunks, padding


@few
@given(random_configurations, st.integers(0, 39))
def test_causality(configuration, changed):
    model = random_model(**configuration)
    ids = torch.arange(40)[None] % 53
    other = ids.clone()
    other[0, changed] = 52 - ids[0, changed]
    before, after = model(ids).logits[0], model(other).logits[0]
    torch.testing.assert_close(after[:changed], before[:changed], rtol=0, atol=1e-5)
    assert not torch.equal(after[changed], before[changed]) or ids[0, changed] == other[0, changed]


@few
@given(random_configurations, st.sets(st.integers(1, 49), max_size=12))
def test_any_split_into_chunks_gives_the_logits_of_one_pass(configuration, cuts):
    model = random_model(**configuration)
    ids = torch.randint(53, (2, 50), generator=torch.Generator().manual_seed(4))
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    edges = [0, *sorted(cuts), 50]
    parts = [
        model(ids[:, start:end], past_key_values=cache, position_ids=torch.arange(start, end)[None]).logits
        for start, end in itertools.pairwise(edges)
    ]
    scale = whole.abs().max()
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5 * scale


@few
@given(random_configurations, st.sampled_from(["left", "right"]), st.integers(1, 23))
def test_padding_changes_no_real_token(configuration, side, length):
    model = random_model(**configuration)
    rows = [torch.arange(24) % 53, torch.arange(7, 7 + length) % 53]
    ids, mask = torch.full((2, 24), 51), torch.zeros(2, 24, dtype=torch.long)
    for row, tokens in enumerate(rows):
        where = slice(24 - len(tokens), 24) if side == "left" else slice(0, len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batched = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, tokens in enumerate(rows):
        alone = model(tokens[None]).logits[0]
        assert (batched[row][mask[row].bool()] - alone).abs().max() <= 1e-4 * alone.abs().max().clamp(min=1)


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
def test_generation_in_a_left_padded_batch_is_generation_alone(scale):
    model = random_model(num_sensory_layers=4, num_associative_layers=4, num_motor_layers=2, scale=scale)
    rows = [torch.arange(3, 3 + length) % 53 for length in (17, 4, 9)]
    ids, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, 17 - len(tokens) :], mask[row, 17 - len(tokens) :] = tokens, 1
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batched = model.generate(ids, attention_mask=mask, **options)[:, 17:]
    for row, tokens in enumerate(rows):
        alone = model.generate(tokens[None], use_cache=False, **options)[0, len(tokens) :]
        assert torch.equal(batched[row], alone)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"scale": 1.5}, "scale must be 2, 1 or between 0 and 1, got 1.5"),
        ({"scale": 3}, "scale must be 2, 1 or between 0 and 1, got 3"),
        ({"scale": 0}, "scale must be 2, 1 or between 0 and 1, got 0"),
        ({"num_sensory_layers": -1}, "num_sensory_layers must be a whole number of at least 0, got -1"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        (
            {"num_sensory_layers": 0, "num_associative_layers": 0, "num_motor_layers": 0},
            "all stages have 0 layers",
        ),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but the stages have 72"),
        ({"layer_types": ["conv"] * 72}, "layer_types is .* but the stages make it"),
        ({"attention_every": 2}, "attention_every has no effect on the published model and none here"),
        ({"use_sliding_window": True}, "use_sliding_window needs a sliding_window of at least 1, got None"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be"),
    ],
)
def test_what_cannot_be_built_is_refused_at_configuration(settings_, message):
    with pytest.raises(ValueError, match=message):
        NeuroBlastConfig(**(SIZES | settings_))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_with_other_tensors_is_refused_by_name(change, tmp_path):
    folder = published_folder("scale1_k5", tmp_path / "published")
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["model.motor_layers.1.mlp.up_proj.weight"]
    elif change == "extra":
        weights["model.motor_layers.9.mlp.up_proj.weight"] = torch.ones(3)
    else:
        weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    name = {"missing": "motor_layers.1.mlp.up", "extra": "motor_layers.9.mlp.up", "shape": "model.norm.weight"}[change]
    with pytest.raises(ValueError, match=name):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_published_checkpoint_is_saved_in_this_layout(tmp_path):
    folder = published_folder("scale05_proj", tmp_path / "published")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == tensor_shapes(model.config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(30)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    shutil.rmtree(tmp_path / "saved")
