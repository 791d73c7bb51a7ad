"""What a checkpoint is, from headers alone: right for every family, fast on 60 GB, without torch."""

import json
import os
import re
import resource
import subprocess
import sys

import families
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from neuroweave import patch_checkpoint
from neuroweave.checkpoint import ShardWriter, TensorSpec, describe_checkpoint, plan_shards
from neuroweave.checkpoint.describe import layer_groups
from neuroweave.checkpoint.header import build_header
from neuroweave.checkpoint.sealed import seal
from neuroweave.checkpoint.writer import write_index

_PRINT = "import sys; from neuroweave.cli.main import main\ntry: main({arguments!r})\nfinally:\n    {then}"
_NO_HEAVY_IMPORTS = (
    "assert not {'torch', 'transformers', 'jax', 'numpy', 'safetensors'} & set(sys.modules), sorted(sys.modules)"
)


def run_inspect(*arguments):
    code = _PRINT.format(arguments=["inspect", *map(str, arguments)], then=_NO_HEAVY_IMPORTS)
    start = _child_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done, _child_seconds() - start


def _child_seconds():
    """Processor time of finished children: unlike the clock's, it does not depend on what else runs here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sparse_checkpoint(folder, shards, config):
    """Files with true headers and holes for data."""
    folder.mkdir(exist_ok=True)
    for shard in shards:
        raw, header = build_header(shard.tensors, shard.metadata)
        with (folder / shard.file).open("wb") as file:
            file.write(raw)
            file.truncate(header.data_start + header.data_bytes)
    if len(shards) > 1:
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
        write_index(folder / "model.safetensors.index.json", weight_map, total, total // 2)
    (folder / "config.json").write_text(json.dumps(config))


def gemma4_31b_specs():
    """The text decoder of Gemma 4 31B by its published sizes, and a look-alike of its vision tower."""
    hidden, wide = 5376, 21504
    specs = [TensorSpec("model.language_model.embed_tokens.weight", "BF16", (262144, hidden))]
    for layer in range(60):
        prefix = f"model.language_model.layers.{layer}"
        full = layer % 6 == 5
        query, key = (32 * 512, 4 * 512) if full else (32 * 256, 16 * 256)
        shapes = {
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "input_layernorm.weight": (hidden,),
            "layer_scalar": (1,),
        }
        if not full:
            shapes["self_attn.v_proj.weight"] = (key, hidden)
        specs += [TensorSpec(f"{prefix}.{name}", "BF16", shape) for name, shape in shapes.items()]
    for layer in range(27):
        prefix = f"model.vision_tower.encoder.layers.{layer}.mlp"
        specs += [
            TensorSpec(f"{prefix}.{name}.linear.weight", "BF16", (4304, 1152)) for name in ("gate_proj", "up_proj")
        ]
        specs.append(TensorSpec(f"{prefix}.down_proj.linear.weight", "BF16", (1152, 4304)))
    return specs


GEMMA4_CONFIG = {
    "model_type": "gemma4",
    "architectures": ["Gemma4ForConditionalGeneration"],
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": 1,
        "sliding_window": 1024,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(60)],
    },
    "vision_config": {"hidden_act": "relu"},
}


def test_sixty_gigabytes_in_under_a_second(tmp_path):
    shards = plan_shards(gemma4_31b_specs(), "50GB")
    sparse_checkpoint(tmp_path / "m", shards, GEMMA4_CONFIG)
    assert sum(path.stat().st_size for path in (tmp_path / "m").iterdir()) > 55e9
    runs = [run_inspect(tmp_path / "m", "--json") for _ in range(3)]
    assert runs[0][0].returncode == 0, runs[0][0].stderr
    assert min(seconds for _, seconds in runs) < 1.0
    found = json.loads(runs[0][0].stdout)
    assert len(found["shards"]) == 2
    assert found["dtypes"] == {"bfloat16": found["parameters"]}
    assert (found["stack"], len(found["layers"])) == ("model.language_model.layers", 60)
    assert found["other_stacks"]["model.vision_tower.encoder.layers"]["layers"] == 27
    for number, layer in enumerate(found["layers"]):
        assert layer["mlp"] == [{"kind": "gated", "hidden": 5376, "intermediate": 21504, "experts": 0}]
        assert layer["activation"] == "gelu_pytorch_tanh"
        assert layer["attention"] == ("full attention" if number % 6 == 5 else "sliding attention (1024)")


def test_people_see_groups_of_equal_layers(smollm2, gemma3):
    done, _ = run_inspect(smollm2)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "llama  134.5 M parameters  float32  538 MB  272 tensors in 1 file",
        "hidden 576  vocabulary 49152  output head tied to the embedding",
        "",
        "layers  mlp                  activation  attention",
        "  0-29  gated MLP 576->1536  silu        full attention",
    ]
    rows = [re.split(r" {2,}", line.strip()) for line in run_inspect(gemma3)[0].stdout.splitlines()[4:]]
    assert [row[0] for row in rows] == ["0-4", "5", "6-10", "11", "12-16", "17"]
    assert {tuple(row[1:3]) for row in rows} == {("gated MLP 640->2048", "gelu_pytorch_tanh")}
    assert [row[3] for row in rows] == ["sliding attention (512)", "full attention"] * 3


def llama_specs(layers=4):
    specs = [TensorSpec("model.embed_tokens.weight", "F32", (99, 32))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        specs += [TensorSpec(f"{prefix}.mlp.{name}_proj.weight", "F32", (40 + layer, 32)) for name in ("gate", "up")]
        specs.append(TensorSpec(f"{prefix}.mlp.down_proj.weight", "F32", (32, 40 + layer)))
        specs.append(TensorSpec(f"{prefix}.self_attn.q_proj.weight", "F32", (32, 32)))
    return specs


LLAMA_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "intermediate_size": 7,
}


def test_sizes_are_the_tensors_own(tmp_path):
    sparse_checkpoint(tmp_path / "m", plan_shards(llama_specs()), LLAMA_CONFIG)
    found = describe_checkpoint(tmp_path / "m")
    assert [layer["mlp"][0]["intermediate"] for layer in found["layers"]] == [40, 41, 42, 43]


def test_recipes_are_shown(tmp_path):
    families.tiny_model("llama").save_pretrained(tmp_path / "original")
    sites = [
        {"site": "mlp", "activation": "phantom"},
        {"site": "mlp", "activation": "relu|silu", "layers": [1]},
        {"site": "head", "activation": "silu_tanh"},
    ]
    patch_checkpoint(tmp_path / "original", tmp_path / "m", {"name": "mine", "sites": sites})
    found, original = describe_checkpoint(tmp_path / "m"), describe_checkpoint(tmp_path / "original")
    assert (found["model_type"], found["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert found["base_activation"] == original["base_activation"] == "silu"
    assert found["recipe"]["name"] == "mine"
    assert [layer["activation"] for layer in original["layers"]] == ["silu", "silu"]
    assert [layer["activation"] for layer in found["layers"]] == ["phantom", {"segments": ["relu", "silu"]}]
    lines = run_inspect(tmp_path / "m")[0].stdout.splitlines()
    assert "recipe mine, applied to a model with silu:" in lines
    assert "  mlp: phantom (layers: all)" in lines
    assert "  mlp: relu|silu (layers: 1)" in lines
    assert "  head: silu_tanh (layers: all)" in lines


def test_nested_fields_are_restored(tmp_path):
    plain = GEMMA4_CONFIG | {"neuroweave": {"version": 1, "base": {"model_type": "gemma4", "architectures": ["G"]}}}
    config = seal(plain, {"gelu_pytorch_tanh"})
    assert "gelu_pytorch_tanh" not in json.dumps(config["text_config"])
    sparse_checkpoint(tmp_path / "m", plan_shards(gemma4_31b_specs()[:9], "50GB"), config)
    assert describe_checkpoint(tmp_path / "m")["base_activation"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    "entry", [{"version": 1}, {"version": 2, "base": {}}, [], {"version": 1, "base": {"fields": {"a.b": 1}}}]
)
def test_a_broken_entry_is_an_error(tmp_path, entry):
    sparse_checkpoint(
        tmp_path / "m", plan_shards(gemma4_31b_specs()[:9], "50GB"), GEMMA4_CONFIG | {"neuroweave": entry}
    )
    with pytest.raises(ValueError, match=r"config\.json: (patched in format|the 'neuroweave' entry)"):
        describe_checkpoint(tmp_path / "m")


# family: (MLPs of each layer, in a row for every kind of layer); sizes are those of `families`
EXPECTED = {
    "llama": {"gated MLP 32->40"},
    "qwen2": {"gated MLP 32->40"},
    "phi3": {"fused gate-up MLP 32->40"},
    "glm4": {"fused gate-up MLP 32->40"},
    "gpt2": {"plain MLP 32->40"},
    "opt": {"plain MLP 32->40"},
    "falcon": {"plain MLP 32->40"},
    "gpt_neox": {"plain MLP 32->40"},
    "bloom": {"plain MLP 32->128"},
    "lfm2": {"gated MLP 32->256"},
    "mixtral": {"4 experts gated 32->40"},
    "gpt_oss": {"4 experts fused gate-up 32->40"},
    "granitemoe": {"4 experts fused gate-up 32->40"},
    "gemma4_text": {"gated MLP 32->40 + 4 experts fused gate-up 32->24"},
    "qwen3_moe": {"gated MLP 32->40", "4 experts gated 32->24"},
    "mamba": {"no MLP"},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_families_by_structure(family, tmp_path):
    families.tiny_model(family).save_pretrained(tmp_path)
    found = describe_checkpoint(tmp_path)
    assert {row[1] for row in layer_groups(found["layers"])} == EXPECTED[family]
    assert found["parameters"] == sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert found["tied_head"] == bool(AutoConfig.from_pretrained(tmp_path).tie_word_embeddings)
    assert len(found["layers"]) == AutoConfig.from_pretrained(tmp_path).num_hidden_layers


def test_nearly_every_family_shows_its_mlps(tmp_path):
    """On the meta device: every decoder family but the few whose feed-forward parts have names of their own."""
    from neuroweave.checkpoint.layers import find_embedding, find_mlps, find_stacks

    without = []
    for family in families.DECODER_FAMILIES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(families.tiny_config(family))
        specs = [TensorSpec(name, "F32", tuple(value.shape)) for name, value in model.state_dict().items()]
        embedding, stacks = find_embedding(specs), find_stacks(specs)
        if not any(find_mlps(layer, embedding.shape[-1] if embedding else 0) for layer in stacks[0].layers.values()):
            without.append(family)
    assert set(without) <= {
        "cpmant", "ctrl", "falcon_mamba", "mamba", "mamba2", "reformer", "rwkv", "xlstm",
    }, without  # fmt: skip


def test_orphans_are_noted_not_refused(tmp_path):
    shards = plan_shards(llama_specs(2), "16KB")
    sparse_checkpoint(tmp_path / "m", shards, LLAMA_CONFIG)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    done, _ = run_inspect(tmp_path / "m")
    assert done.returncode == 0
    assert "1 tensors are in a shard but not in the index: model.layers.0.mlp.up_proj.weight" in done.stderr


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.rmdir(), "no such folder, and not a hub id of the form owner/name"),
        (lambda folder: None, "no model.safetensors and no model.safetensors.index.json in this folder"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\0"),
            "1 bytes is too short for a safetensors file",
        ),
        (lambda folder: write_empty(folder), "no config.json in this folder; is it a checkpoint?"),
        (lambda folder: write_empty(folder, "{"), "the configuration is not valid JSON"),
    ],
)
def test_refusals_are_one_line_and_exit_2(tmp_path, prepare, message):
    folder = tmp_path / "m"
    folder.mkdir()
    prepare(folder)
    done, _ = run_inspect(folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("neuroweave: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def write_empty(folder, config=None):
    with ShardWriter(folder, plan_shards([TensorSpec("a", "F32", (1,))])) as writer:
        writer.write("a", bytes(4))
    if config is not None:
        (folder / "config.json").write_text(config)


def test_reads_no_tensor_data(tmp_path):
    """Nothing behind the header is read: the bytes read by the process do not grow with the data."""
    sparse_checkpoint(tmp_path / "m", plan_shards([TensorSpec("model.layers.0.x", "U8", (1 << 30,))]), LLAMA_CONFIG)
    before = _bytes_read()
    describe_checkpoint(tmp_path / "m")
    assert _bytes_read() - before < 100_000


def _bytes_read():
    with open(f"/proc/{os.getpid()}/io", encoding="ascii") as file:
        return int(re.search(r"rchar: (\d+)", file.read())[1])
