"""Deltas of whole checkpoints: what is planned and refused, the written folder, and the command."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import namedtuple

import numpy as np
import pytest
from safetensors import safe_open
from test_inspect import GEMMA4_CONFIG, gemma4_31b_specs, sparse_checkpoint

from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.manifest import MANIFEST_FILE, read_manifest
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.sealed import seal
from neuroweave.checkpoint.writer import ShardWriter, plan_shards
from neuroweave.cli.main import main
from neuroweave.surgery.neurons import deltas as deltas_module
from neuroweave.surgery.neurons.bank import Bank, Neuron, save_bank
from neuroweave.surgery.neurons.delta_plan import check_parameters
from neuroweave.surgery.neurons.deltas import GeneratedDeltas, plan_deltas, write_deltas
from neuroweave.surgery.neurons.derive import derive_bank

HIDDEN = 12
BEHAVIOUR = {"knots": [0.0], "slopes": [1.0], "range": 4.0, "tolerance": 0.05}


def make_bank(*, size=HIDDEN, count=4, defined=True):
    """Numbers without a random generator, for the golden hash."""
    numbers = (np.arange(3 * count * size) * 7919 % 1009 - 500).astype("f4").reshape(3, count, size)
    neurons = [Neuron(f"n{i}", "source", {"layer": i, "index": 3}) for i in range(count)]
    if defined:
        neurons[-1] = Neuron("line", "source", {"spec": "s.yaml"}, BEHAVIOUR)
        numbers[1, -1] = numbers[0, -1]
    return Bank(*numbers, neurons, {"activation": "silu", "model": {"name": "m", "files": {"a": 1}}})


def mlp(prefix, number, width, dtype="BF16", hidden=HIDDEN):
    name = f"{prefix}.{number}.mlp"
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return [TensorSpec(f"{name}.{role}.weight", dtype, shape) for role, shape in shapes.items()]


def make_target(folder, specs, config=None, *, shard_size="1GB"):
    """A checkpoint of zeros; `config` is put over a small Llama's."""
    folder.mkdir(parents=True)
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (30, HIDDEN)), *specs]
    with ShardWriter(folder, plan_shards(specs, shard_size)) as writer:
        for spec in specs:
            writer.write(spec.name, bytes(spec.nbytes))
    plain = {"model_type": "llama", "hidden_act": "silu", "intermediate_size": 9}
    (folder / "config.json").write_text(json.dumps(plain | (config or {})))
    return folder


LAYERS = [*mlp("model.layers", 0, 20), *mlp("model.layers", 1, 41), *mlp("model.layers", 2, 20)]


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target", LAYERS)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# The plan


def test_plan_takes_sizes_from_the_tensors(target):
    plan = plan_deltas(target, make_bank(), seed=1)
    assert [(layer.layer, layer.neurons, layer.pairs, layer.activation, layer.kind) for layer in plan.layers] == [
        (0, 20, 10, "silu", "none"),
        (1, 41, 20, "silu", "none"),
        (2, 20, 10, "silu", "none"),
    ]
    assert list(plan.specs.values()) == LAYERS
    assert plan.nbytes == sum(spec.nbytes for spec in LAYERS)
    assert [(each.name, each.neurons) for each in plan.realised] == [("line", 1)]
    json.dumps(plan.to_dict())


@pytest.mark.parametrize("prefix", ["model.layers", "model.language_model.layers", "language_model.model.layers"])
def test_any_prefix_and_no_other_tower(tmp_path, prefix):
    vision = TensorSpec("model.vision_tower.encoder.layers.0.mlp.gate_proj.linear.weight", "BF16", (40, 6))
    folder = make_target(tmp_path / "t", [*mlp(prefix, 0, 8), vision], {"layer_types": ["sliding_attention"]})
    plan = plan_deltas(folder, make_bank(), seed=1)
    assert list(plan.specs.values()) == mlp(prefix, 0, 8)
    assert plan.layers[0].kind == "sliding attention"


def test_parameters_give_the_plan_again(target):
    plan = plan_deltas(target, make_bank(), seed=9, dtype="float32", neurons=8, layers=[2, 0, 2], gate_scale=0.5)
    assert plan.parameters["layers"] == [0, 2]
    again = plan_deltas(target, make_bank(), **json.loads(json.dumps(plan.parameters)))
    assert again.to_dict() == plan.to_dict()
    assert [spec.shape for spec in plan.layers[0].specs.values()] == [(8, 12), (8, 12), (12, 8)]
    assert {spec.dtype for spec in plan.specs.values()} == {"F32"}


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
    ],
)
def test_activations(tmp_path, stated, name):
    folder = make_target(tmp_path / "t", mlp("model.layers", 0, 8), {"hidden_act": stated})
    assert plan_deltas(folder, make_bank(), seed=1).layers[0].activation == name


def test_a_patched_checkpoint_has_activations_by_layer(tmp_path):
    path = "model.layers.{}.mlp.act_fn"
    edits = [
        {"op": "activation", "path": path, "layers": [layer], "activation": name}
        for layer, name in ((0, "gelu"), (2, "relu2"))
    ]
    entry = {"version": 1, "recipe": {"name": "r"}, "plan": edits, "base": {"model_type": "llama", "architectures": []}}
    sealed = seal({"model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "neuroweave": entry}, ["silu"])
    folder = make_target(tmp_path / "t", LAYERS, sealed)
    plan = plan_deltas(folder, make_bank(), seed=1, layers=[0, 1])
    assert [layer.activation for layer in plan.layers] == ["gelu", "silu"]
    assert [(each.activation, each.neurons) for each in plan.realised] == [("gelu", 1), ("silu", 1)]
    with pytest.raises(ValueError, match=r"layer 2 runs relu2; a pair's output is odd only for act"):
        plan_deltas(folder, make_bank(), seed=1)


def test_experts_and_fused_layers_are_left_out(tmp_path):
    experts = TensorSpec("model.layers.1.mlp.experts.gate_up_proj", "BF16", (2, 8, HIDDEN))
    fused = TensorSpec("model.layers.2.mlp.gate_up_proj.weight", "BF16", (16, HIDDEN))
    folder = make_target(tmp_path / "t", [*mlp("model.layers", 0, 8), experts, fused])
    plan = plan_deltas(folder, make_bank(), seed=1)
    assert [layer.layer for layer in plan.layers] == [0]
    assert plan.left_out == {1: "mixture-of-experts matrices (experts)", 2: "gate and up fused in one matrix"}
    with pytest.raises(ValueError, match=r"layer 1 can have no deltas: mixture-of-experts matrices \(experts\)"):
        plan_deltas(folder, make_bank(), seed=1, layers=[0, 1])
    only = make_target(tmp_path / "u", [experts])
    with pytest.raises(ValueError, match=r"no layer has a gated MLP with gate_proj, up_proj and down_proj \(mixture"):
        plan_deltas(only, make_bank(), seed=1)


@pytest.mark.parametrize(
    ("config", "specs", "settings", "message"),
    [
        ({"hidden_act": "relu"}, LAYERS, {}, r"layer 0 runs relu; a pair's output is odd only for act\(s\)"),
        ({"hidden_act": None}, LAYERS, {}, r"config.json states no activation \(hidden_act\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, LAYERS, {}, r"the model is quantized \(fp8\); deltas"),
        ({}, mlp("model.layers", 0, 8, "F8_E4M3"), {}, "gate_proj.weight is stored as float8_e4m3fn; deltas are for"),
        ({}, mlp("model.layers", 0, 8, "I8"), {}, "gate_proj.weight is stored as int8; deltas are for weights in"),
        ({}, LAYERS, {"layers": [0, 3]}, "layer 3 does not exist; the model has layers 0 to 2"),
        ({}, LAYERS, {"layers": []}, "no layers are chosen"),
        ({}, LAYERS, {"neurons": 21}, "21 neurons asked for, layer 0 has 20"),
        ({}, LAYERS, {"neurons": 0}, "0 neurons: expected 2 or more, which make a pair"),
        ({}, LAYERS, {"neurons": 1}, "1 neurons: expected 2 or more, which make a pair"),
        ({}, LAYERS, {"gate_scale": 1e-60}, "gain 1 at gate scale 1e-60 is too small for bfloat16; take a larger"),
        ({}, LAYERS, {"gate_scale": 1e-60, "dtype": "float32"}, "at gate scale 1e-60 is too small for float32"),
        ({}, mlp("model.layers", 0, 0), {}, "gate_proj.weight has 0 rows; a pair needs 2 neurons"),
        ({}, mlp("model.layers", 0, 1), {}, "gate_proj.weight has 1 rows; a pair needs 2 neurons"),
        ({}, LAYERS, {"dtype": "float64"}, "dtype 'float64': expected one of bfloat16, float16, float32"),
        ({}, LAYERS, {"gate_scale": 0.0}, "gate scale 0.0: expected a number above 0"),
        ({}, LAYERS, {"gate_scale": float("nan")}, "gate scale nan"),
        ({}, LAYERS, {"symmetry": "none"}, "symmetry 'none': expected one of signs, one-sided"),
        ({}, LAYERS, {"dtype": "float16", "gate_scale": 9e4}, "neuron 'line': gain .* does not fit float16"),
        ({}, LAYERS, {"dtype": "float16", "gate_scale": 1e-6}, "is too small for float16; take bfloat16 or float32"),
        ({}, [*mlp("model.layers", 0, 8), *mlp("model.layers", 1, 8, hidden=6)], {}, "layer 1 has hidden size 6"),
        ({}, mlp("model.layers", 0, 8, hidden=2), {}, "hidden size 2; deltas need 3 or more"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, config, specs, settings, message):
    folder = make_target(tmp_path / "t", specs, config)
    with pytest.raises(ValueError, match=message):
        plan_deltas(folder, make_bank(), **{"seed": 1} | settings)
    with pytest.raises(ValueError, match=message):
        write_deltas(folder, make_bank(), tmp_path / "out", **{"seed": 1} | settings)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_no_room_for_a_single_group(tmp_path):
    folder = make_target(tmp_path / "t", mlp("model.layers", 0, 2))
    with pytest.raises(ValueError, match="layer 0: 2 neurons have room for 1 pairs, and no neuron of the bank"):
        plan_deltas(folder, make_bank(count=1), seed=1)
    assert plan_deltas(folder, make_bank(count=2), seed=1).layers[0].pairs == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"seed": {}}, r"seed \{\}: expected an integer"),
        ({"seed": []}, r"seed \[\]: expected an integer"),
        ({"seed": True}, "seed True: expected an integer"),
        ({"layers": "12"}, "layers '12': expected a list of layer numbers"),
        ({"layers": [0, "1"]}, r"layers \[0, '1'\]: expected a list"),
        ({"layers": [True]}, r"layers \[True\]: expected a list"),
        ({"layers": 3}, "layers 3: expected a list"),
        ({"layers": []}, "no layers are chosen"),
        ({"neurons": True}, "True neurons: expected 2 or more"),
        ({"neurons": "8"}, "'8' neurons: expected 2 or more"),
        ({"gate_scale": "0.02"}, "gate scale '0.02': expected a number above 0"),
        ({"gate_scale": None}, "gate scale None: expected a number above 0"),
        ({"gate_scale": 10**400}, "gate scale <integer of 1329 bits>: expected a number above 0"),
        ({"dtype": ["bfloat16"]}, r"dtype \['bfloat16'\]: expected one of"),
        ({"symmetry": {}}, r"symmetry \{\}: expected one of"),
        (
            {"workers": 3},
            "'workers' is no parameter of deltas; known: seed, dtype, gate_scale, neurons, layers, symmetry",
        ),
        ([], r"the parameters of deltas are \[\]; expected names and values"),
    ],
)
def test_parameters_from_elsewhere(parameters, message):
    check = getattr(check_parameters, "__wrapped__", check_parameters)  # a recipe's types are checked by nobody else
    with pytest.raises(ValueError, match=message):
        check(parameters)


def test_parameters_that_are_in_order(target):
    parameters = {"seed": 3, "layers": [2], "neurons": None, "gate_scale": 1}
    assert check_parameters(parameters) == parameters
    assert plan_deltas(target, make_bank(), **check_parameters(parameters)).parameters["layers"] == [2]


def test_a_bank_without_neurons(target):
    with pytest.raises(ValueError, match="the bank has no neurons"):
        plan_deltas(target, Bank(*np.zeros((3, 0, HIDDEN), "f4"), [], {}), seed=1)


def test_a_second_mlp_of_a_layer_has_numbers_of_its_own(tmp_path):
    second = [
        TensorSpec(spec.name.replace("mlp", "mlp2"), spec.dtype, spec.shape) for spec in mlp("model.layers", 0, 20)
    ]
    alone = make_target(tmp_path / "one", mlp("model.layers", 0, 20))
    both = make_target(tmp_path / "two", [*second, *mlp("model.layers", 0, 20)])
    plan, before = plan_deltas(both, make_bank(), seed=1), plan_deltas(alone, make_bank(), seed=1)
    assert {layer.specs["gate"].name: layer.path for layer in plan.layers} == {
        "model.layers.0.mlp.gate_proj.weight": "",
        "model.layers.0.mlp2.gate_proj.weight": "mlp2",
    }
    deltas, first = GeneratedDeltas(plan, make_bank()), GeneratedDeltas(before, make_bank())
    for own, other in zip(mlp("model.layers", 0, 20), second, strict=True):
        rows = deltas.rows(own.name, 0, own.shape[0])
        assert rows.tobytes() == first.rows(own.name, 0, own.shape[0]).tobytes()
        assert rows.tobytes() != deltas.rows(other.name, 0, own.shape[0]).tobytes()


def test_a_behaviour_that_is_not_reached_is_named(target):
    bank = make_bank()
    bank.neurons[-1] = Neuron("line", "source", {}, BEHAVIOUR | {"tolerance": 0.001})
    with pytest.raises(ValueError, match=r"neuron 'line': up to 8 pairs of silu reach an error of 0\.01"):
        plan_deltas(target, bank, seed=1)


# The folder


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_folder(tmp_path, dtype):
    specs = [TensorSpec(spec.name, dtype, spec.shape) for spec in LAYERS]
    folder = make_target(tmp_path / "t", specs, shard_size="1500")
    bank = save_bank(make_bank(), tmp_path / "bank.safetensors")
    plan = write_deltas(folder, bank, tmp_path / "out", seed=5, max_shard_size="1500")
    generated = GeneratedDeltas(plan, bank)
    with Checkpoint(tmp_path / "out") as written:
        assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in written.values()} == {
            spec.name: (dtype, spec.shape) for spec in specs
        }
        assert len(written.shards) > 1
        for spec in specs:
            data = written.read_numpy(spec.name)
            assert generated.rows(spec.name, 0, spec.shape[0]).tobytes() == data.tobytes()
            assert generated.rows(spec.name, 3, 5).tobytes() == data[3:5].tobytes()
            assert data.astype("f4").any()
        for file in written.shards:
            with safe_open(tmp_path / "out" / file, "pt") as opened:  # the library's own checks
                assert opened.metadata() == {"format": "pt"}
    gate = generated.rows(specs[0].name, 0, 20).astype("f8")
    assert not (gate[0::2] + gate[1::2]).any()


def test_the_manifest(target, tmp_path):
    bank = save_bank(make_bank(), tmp_path / "bank.safetensors")
    write_deltas(target, bank, tmp_path / "out", seed=5, layers=[1])
    manifest = read_manifest(tmp_path / "out")
    assert manifest["operation"] == "deltas"
    assert manifest["parameters"]["seed"] == 5
    assert (
        manifest["inputs"]["bank"]["sha256"] == hashlib.sha256((tmp_path / "bank.safetensors").read_bytes()).hexdigest()
    )
    assert manifest["inputs"]["bank"]["provenance"] == {"activation": "silu", "model": {"name": "m"}}
    files = manifest["inputs"]["base_model"]["files"]
    assert files["config.json"]["sha256"] == hashlib.sha256((target / "config.json").read_bytes()).hexdigest()
    assert set(files) == {"config.json", "model.safetensors"}
    assert [layer["layer"] for layer in manifest["layers"]] == [1]
    assert manifest["realised"][0]["error"] <= manifest["realised"][0]["tolerance"]
    assert {name: entry["sha256"] for name, entry in manifest["outputs"].items()} == {
        name: digest for name, digest in digests(tmp_path / "out").items() if name != MANIFEST_FILE
    }


def test_bytes_do_not_depend_on_workers(target, tmp_path, monkeypatch):
    monkeypatch.setattr(deltas_module, "_BLOCK_BYTES", 100)
    for workers in (1, 3):
        write_deltas(target, make_bank(), tmp_path / str(workers), seed=5, workers=workers, max_shard_size="900")
    found = digests(tmp_path / "1")
    assert len(found) > 3
    assert digests(tmp_path / "3") == found
    write_deltas(target, make_bank(), tmp_path / "other", seed=6, max_shard_size="900")
    assert not set(digests(tmp_path / "other").values()) & {found[name] for name in found if "model-" in name}


def test_golden(target, tmp_path):
    """Fits included: another hash means other numbers for every user's seed."""
    write_deltas(target, derive_bank(make_bank(), seed=7), tmp_path / "out", seed=42)
    assert (
        digests(tmp_path / "out")["model.safetensors"]
        == "909777b6cdf33b3a91e09a868440224a971a087e0e07bef3f16d7040d96076c5"
    )


def test_a_bank_of_another_hidden_size(target, tmp_path):
    write_deltas(target, make_bank(size=7), tmp_path / "out", seed=5)
    with Checkpoint(tmp_path / "out") as written:
        gate = written.read_numpy(LAYERS[3].name).astype("f8")
    assert gate.shape == (41, HIDDEN)
    assert not gate[40].any()


def test_progress_counts_every_byte(target, tmp_path):
    seen = []
    plan = write_deltas(target, make_bank(), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (plan.nbytes, plan.nbytes)


def test_nothing_stays_after_a_failure(target, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(ShardWriter, "write_at", fail)
    with pytest.raises(OSError, match="disk full"):
        write_deltas(target, make_bank(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_room_on_disk_and_in_memory(target, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100))
        with pytest.raises(ValueError, match=r"are needed here, 0\.00 .B are free; make room"):
            write_deltas(target, make_bank(), tmp_path / "out")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 9 kB\n")
    monkeypatch.setattr(deltas_module, "_MEMORY", tmp_path / "meminfo")
    with pytest.raises(ValueError, match=r"GB of memory are needed, 0\.00 GB are available; take a smaller bank or"):
        write_deltas(target, make_bank(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "settings", "message"),
    [
        ("target", {}, "the output is the source itself"),
        ("target/in", {}, "the output lies inside the source"),
        ("out", {"workers": 0}, "0 workers: expected 1 or more"),
    ],
)
def test_outputs_that_are_refused(target, tmp_path, out, settings, message):
    before = digests(target)
    with pytest.raises(ValueError, match=message):
        write_deltas(target, make_bank(), tmp_path / out, **settings)
    assert digests(target) == before


def test_many_layers_stay_open_no_longer_than_needed(tmp_path):
    specs = [spec for number in range(7) for spec in mlp("model.layers", number, 9)]
    folder = make_target(tmp_path / "t", specs)
    generated = GeneratedDeltas(plan_deltas(folder, make_bank(), seed=1), make_bank())
    first = generated.rows(specs[0].name, 0, 9).tobytes()
    for spec in specs:
        generated.rows(spec.name, 0, 1)
    assert len(generated._open) == 4
    assert generated.rows(specs[0].name, 0, 9).tobytes() == first
    generated.close()


def test_the_size_of_gemma_4_31b(tmp_path):
    """Planned from headers over holes in seconds; any rows of any layer in little memory."""
    sparse_checkpoint(tmp_path / "m", plan_shards(gemma4_31b_specs(), "50GB"), GEMMA4_CONFIG)
    bank = make_bank(size=64, count=100)
    start = time.process_time()
    plan = plan_deltas(tmp_path / "m", bank, seed=1)
    assert time.process_time() - start < 3
    assert len(plan.specs) == 180
    assert plan.nbytes == 180 * 21504 * 5376 * 2
    assert [layer.layer for layer in plan.layers if layer.kind == "full attention"] == list(range(5, 60, 6))
    tracemalloc.start()
    generated = GeneratedDeltas(plan, bank)
    gate, down = (f"model.language_model.layers.59.mlp.{name}_proj.weight" for name in ("gate", "down"))
    rows = generated.rows(gate, 21000, 21200).astype("f4")
    columns = generated.rows(down, 5000, 5050).astype("f4")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
    assert not (rows[0::2] + rows[1::2]).any()
    assert not (columns[:, 0::2] + columns[:, 1::2]).any()
    plain = np.sqrt((rows**2).mean(axis=1))
    assert np.isclose(plain, 0.02, rtol=2e-3).mean() > 0.9  # the rest are pairs of the defined neuron


# The command


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["deltas", *map(str, words)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def bank_file(tmp_path):
    save_bank(make_bank(), tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def test_the_command_writes(capsys, target, tmp_path, bank_file):
    words = ("--base-model", target, "--bank", bank_file, "--output-dir", tmp_path / "out")
    code, out, err = run(capsys, *words, "--layers", 0, 2, "--seed", 5)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"6 tensors for 2 layers, 0.00 MB: written to {tmp_path / 'out'}",
        "",
        "layers  attention  activation  neurons  pairs  dtype    MB",
        "     0  none       silu             20     10  BF16   0.00",
        "     2  none       silu             20     10  BF16   0.00",
        "",
        "behaviour of  neurons  activation  pairs each   error  tolerance",
        "line                1  silu                 2  0.0474       0.05",
    ]
    write_deltas(target, make_bank(), tmp_path / "same", seed=5, layers=[0, 2])
    assert digests(tmp_path / "out")["model.safetensors"] == digests(tmp_path / "same")["model.safetensors"]
    code, _, err = run(capsys, *words)
    assert (code, "the output folder is not empty; choose another one, or add --overwrite" in err) == (2, True)
    assert run(capsys, *words, "--overwrite")[0] == 0


def test_a_dry_run_reads_no_data_and_writes_nothing(capsys, target, tmp_path, bank_file, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read_bytes", None)
    code, out, err = run(capsys, "--base-model", target, "--bank", bank_file, "--dry-run", "--json")
    found = json.loads(out)
    assert (code, err, found["output"]) == (0, "", None)
    assert [layer["neurons"] for layer in found["layers"]] == [20, 41, 20]
    assert found["bytes"] == sum(spec.nbytes for spec in LAYERS)
    assert found["layers"][0]["tensors"][LAYERS[2].name] == {"dtype": "bfloat16", "shape": [12, 20]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank.safetensors", "target"]


def test_left_out_layers_are_noted(capsys, tmp_path, bank_file):
    fused = [TensorSpec(f"model.layers.{n}.mlp.gate_up_proj.weight", "BF16", (16, HIDDEN)) for n in (1, 2)]
    folder = make_target(tmp_path / "t", [*mlp("model.layers", 0, 8), *fused])
    code, _, err = run(capsys, "--base-model", folder, "--bank", bank_file, "--dry-run")
    assert (code, err) == (0, "left out, gate and up fused in one matrix: layers 1, 2\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --output-dir, the folder to write, or --dry-run"),
        (["--dry-run", "--layers", "7"], "layer 7 does not exist; the model has layers 0 to 2"),
        (["--dry-run", "--dtype", "int8"], "'int8' is not one of"),
        (["--output-dir", "BANK"], "the output is the source itself"),
    ],
)
def test_slips(capsys, target, tmp_path, bank_file, words, message):
    words = [bank_file if word == "BANK" else word for word in words]
    code, out, err = run(capsys, "--base-model", target, "--bank", bank_file, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_torch_is_not_imported(target, bank_file):
    program = (
        "import sys; from neuroweave.cli.main import main\n"
        f"try: main(['deltas', '--base-model', {str(target)!r}, '--bank', {str(bank_file)!r}, '--dry-run'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
