"""`neuroweave train --backend jax`: against the torch loop, over meshes of eight devices, stopped and resumed."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_models import twin
from tiny_training import losses, tiny_neuroblast
from training_runs import content, written
from transformers import AutoModelForCausalLM

from neuroweave.neuroblast.fresh import write_fresh_model
from neuroweave.training import jax_mesh
from neuroweave.training.configuration import JaxSection, build_configuration
from neuroweave.training.jax_loop import JaxRun, abstract_state, prepare_with_jax, train_with_jax
from neuroweave.training.jax_step import Loss, build_optimizer, evaluation_sums, initial_state, loss_sums, train_step
from neuroweave.training.metrics import read_metrics
from neuroweave.training.outcome import NotFiniteError
from neuroweave.training.train import train

SHAPE = {"hidden_size": 32, "num_sensory_layers": 2, "num_associative_layers": 2, "num_motor_layers": 1}
EIGHT = {"batch_size": 8, "micro_batch_size": 1}


def train_in_jax(corpus: Path, out: Path, **sections: dict[str, Any]) -> dict[int, float]:
    """Step -> loss of a run with one device's worth of rows on each of eight devices."""
    train_with_jax(build_configuration(content(corpus, out, **{"training": EIGHT} | sections)))
    return losses(out)


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to begin with, the same for both backends."""
    folder = tmp_path_factory.mktemp("model") / "begin"
    write_fresh_model(folder, preset="tiny", tokenizer=corpus / "tokenizer", settings=SHAPE)
    return folder


# ------------------------------------------------------------------------------------------------- the torch loop


def test_ten_steps_equal_the_torch_loop(corpus: Path, model: Path, tmp_path: Path) -> None:
    """Losses within 1e-4 and held-out losses too, with decay, smoothing, clipping, two passes, unequal token counts."""
    training = {
        "steps": 10, "batch_size": 16, "micro_batch_size": 1, "weight_decay": 0.1, "clip": 0.5, "label_smoothing": 0.1,
        "warmup_steps": 2, "decay_steps": 4, "learning_rate": 1e-2, "precision": "float32",
    }  # fmt: skip
    begin = {"model": {"path": str(model)}, "data": {"packing": False}}
    for folder, run in (("jax", train_with_jax), ("torch", train)):
        value = content(corpus, tmp_path / folder, **begin, training=training)
        value["model"].pop("preset"), value["model"].pop("settings")
        done = run(build_configuration(value))
        assert AutoModelForCausalLM.from_pretrained(done.model).config.vocab_size == 123
    for kind in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        ours, theirs = (
            [entry[kind] for entry in read_metrics(tmp_path / each / "metrics.jsonl") if kind in entry]
            for each in ("jax", "torch")
        )
        assert len(ours) == len(theirs) > 3
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=kind)
    assert max(losses(tmp_path / "jax").values()) - min(losses(tmp_path / "jax").values()) > 0.005
    written_by = [{path.name for path in (tmp_path / each / "model").iterdir()} for each in ("jax", "torch")]
    assert written_by[0] == written_by[1]


# --------------------------------------------------------------------------------------------------------- meshes


@pytest.fixture(scope="module")
def alone(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of the torch loop in one process."""
    folder = tmp_path_factory.mktemp("alone")
    value = content(corpus, folder, model={"path": str(model)}, training=EIGHT | {"clip": 0.3})
    value["model"].pop("preset"), value["model"].pop("settings")
    train(build_configuration(value))
    return folder


@pytest.mark.parametrize(
    "mesh", [{}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=["data 8", "fsdp 8", "fsdp 4, tensor 2"]
)
def test_any_mesh_gives_the_losses_of_one_device(corpus: Path, model: Path, alone: Path, tmp_path: Path, mesh) -> None:
    """Each device has rows of its own: losses equal only where gradients are averaged over all of them."""
    value = content(corpus, tmp_path, model={"path": str(model)}, training=EIGHT | {"clip": 0.3}, output={})
    value["model"].pop("preset"), value["model"].pop("settings")
    train_with_jax(build_configuration(value | {"jax": mesh}))
    ours, theirs = losses(tmp_path), losses(alone)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-5, rtol=0)


def test_gradients_are_averaged_over_devices() -> None:
    """Two devices with different rows: their step is that of one device on the joined batch, and of neither alone."""
    theirs = tiny_neuroblast(dropout=0.0)
    training = build_configuration(
        {"tokenizer": {"path": "x"}, "training": {"steps": 1}, "output": {"folder": "x"}}
    ).training
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 123, (1, 2, 17)).astype(np.int32)
    labels = np.where(np.arange(17) < draw.integers(5, 17, (1, 2, 1)), ids, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": np.broadcast_to(np.arange(17), ids.shape)}

    def after(devices: int, rows: Any) -> dict[str, np.ndarray]:
        mesh = jax_mesh.make_mesh(JaxSection(), jax.devices()[:devices])
        made, params = twin(theirs, sharding=jax_mesh.place_hidden(mesh))
        optimizer = build_optimizer(training, made.table)
        state = jax.device_put(initial_state(params, optimizer), jax_mesh.whole(mesh))
        placed = {name: jax.device_put(jnp.asarray(x[:, rows]), jax_mesh.place_rows(mesh)) for name, x in batch.items()}
        step = jax.jit(functools.partial(train_step, made, optimizer, Loss(), 0.0, 0))
        state, _ = step(state, placed, jnp.float32(1.0))
        moments = state["optimizer"][0].mu  # 0.1 times the gradient
        return {name: np.asarray(array) for name, array in moments.items()}

    both, joined = after(2, slice(0, 2)), after(1, slice(0, 2))
    first, second = after(1, slice(0, 1)), after(1, slice(1, 2))
    for name, array in joined.items():
        np.testing.assert_allclose(both[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)
    name = "model.embed_tokens.weight"
    assert not np.allclose(first[name], joined[name])
    assert not np.allclose(second[name], joined[name])
    counts = (labels[0, :, 1:] != -100).sum(-1)
    weighted = (first[name] * counts[0] + second[name] * counts[1]) / counts.sum()
    np.testing.assert_allclose(weighted, joined[name], rtol=0, atol=1e-6)


def compiled(passes: int, **settings: Any) -> Any:
    """The compiled step of a tiny model on `passes` x 2 rows, on one device."""
    mesh = jax_mesh.make_mesh(JaxSection(), jax.devices()[:1])
    made, _ = twin(tiny_neuroblast(**settings), sharding=jax_mesh.place_hidden(mesh))
    value = {"tokenizer": {"path": "x"}, "training": {"steps": 1}, "output": {"folder": "x"}}
    optimizer = build_optimizer(build_configuration(value).training, made.table)
    rows = jax.ShapeDtypeStruct((passes, 2, 40), jnp.int32, sharding=jax_mesh.place_rows(mesh))
    batch = dict.fromkeys(("input_ids", "labels", "position_ids"), rows)
    step = functools.partial(train_step, made, optimizer, Loss(), 1.0, 0)
    state = abstract_state(made.table, optimizer, mesh)
    return jax.jit(step, donate_argnums=0).lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)).compile()


def test_memory_does_not_grow_with_the_passes_and_the_state_is_donated() -> None:
    few, many = (compiled(passes).memory_analysis() for passes in (2, 16))
    assert many.temp_size_in_bytes <= few.temp_size_in_bytes * 1.02 + 16 * 3 * 2 * 40 * 4
    state = 12 * sum(parameter.numel() for parameter in tiny_neuroblast().parameters())
    assert few.alias_size_in_bytes >= state  # weights and both moments are written in place


# -------------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_drawn_by_its_keys_and_keeps_the_mean() -> None:
    """Convolutions and attention drop: another loss for another key, the same for the same; the mean stays close."""
    for settings in ({"dropout": 0.5, "attention_dropout": 0.0}, {"dropout": 0.0, "attention_dropout": 0.5}):
        made, params = twin(tiny_neuroblast(**settings))
        ids = jnp.asarray(np.random.default_rng(0).integers(3, 123, (2, 17)))
        batch = {"input_ids": ids, "labels": ids}

        run = jax.jit(
            lambda key, m=made, p=params, b=batch: loss_sums(m, p, b, Loss(packed=False), jax.random.split(key, 2))[0]
        )
        found = [float(run(jax.random.key(seed))) for seed in (0, 0, *range(1, 40))]
        assert found[0] == found[1] != found[2]
        still = float(loss_sums(made, params, batch, Loss(packed=False))[0])
        assert abs(np.mean(found) - still) < 0.15 * still
        assert np.std(found[1:]) > 1e-3 * still
        batch = {name: x[None] for name, x in batch.items()}
        assert float(evaluation_sums(made, Loss(packed=False), params, batch)[0]) == pytest.approx(still, rel=1e-6)


# ------------------------------------------------------------------------------------------------ stopped, resumed


def test_a_resumed_run_goes_on_with_the_next_sample_on_another_mesh(corpus: Path, tmp_path: Path) -> None:
    """Steps 4 to 6 after a restore: bit for bit on the same mesh; to rounding on another one, with dropout."""
    settings = {"model": {"settings": SHAPE | {"dropout": 0.2}}, "jax": {"fsdp": 2}}

    def configured(out: Path, mesh: dict[str, int], steps: int) -> Any:
        value = content(corpus, out, model=settings["model"], training=EIGHT | {"steps": steps, "schedule": "constant"})
        return build_configuration(value | {"jax": mesh})

    train_with_jax(configured(tmp_path / "whole", {"fsdp": 2}, 6))
    for folder, mesh in (("same", {"fsdp": 2}), ("other", {"fsdp": 4, "tensor": 2})):
        train_with_jax(configured(tmp_path / folder, {"fsdp": 2}, 3))
        train_with_jax(configured(tmp_path / folder, mesh, 6))
    whole = list(losses(tmp_path / "whole").values())
    assert list(losses(tmp_path / "same").values()) == whole
    np.testing.assert_allclose(list(losses(tmp_path / "other").values()), whole, atol=1e-5, rtol=0)


def test_a_streamed_run_goes_on_with_the_next_row(corpus: Path, tmp_path: Path) -> None:
    streamed, part = {"streaming": True}, EIGHT | {"steps": 3, "schedule": "constant"}
    for folder, steps in (("whole", (6,)), ("parts", (3, 6))):
        for count in steps:
            training = part | {"steps": count}
            train_with_jax(build_configuration(content(corpus, tmp_path / folder, data=streamed, training=training)))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(corpus: Path, tmp_path: Path) -> None:
    configuration = build_configuration(content(corpus, tmp_path, training=EIGHT))
    train_with_jax(configuration)
    before = losses(tmp_path)
    largest = max((tmp_path / "checkpoint-6" / "state").rglob("*"), key=lambda file: file.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1  # orbax itself would restore it without a word
    largest.write_bytes(raw)
    notes: list[str] = []
    train_with_jax(configuration, note=notes.append)
    assert any("checkpoint-6 is passed over" in note and "SHA-256 differs" in note for note in notes)
    assert losses(tmp_path) == before
    assert (tmp_path / "checkpoint-6" / "complete.json").is_file()


def test_when_every_checkpoint_is_damaged_nothing_is_thrown_away(corpus: Path, tmp_path: Path) -> None:
    """Neither with --resume nor without; --fresh begins anew, but not before all is checked."""
    configuration = build_configuration(content(corpus, tmp_path, training=EIGHT))
    train_with_jax(configuration)
    before = losses(tmp_path)
    for folder in tmp_path.glob("checkpoint-*"):
        next((folder / "state").rglob("manifest.ocdbt")).write_bytes(b"")
    for resume in (True, None):
        with pytest.raises(ValueError, match=r"no checkpoint can be resumed .*; --fresh starts anew"):
            train_with_jax(configuration, resume=resume)
    odd = build_configuration(content(corpus, tmp_path, training=EIGHT) | {"jax": {"fsdp": 3}})
    with pytest.raises(ValueError, match=r"all hosts together have 8, which is no multiple"):
        train_with_jax(odd, resume=False)
    assert losses(tmp_path) == before
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    train_with_jax(configuration, resume=False)
    assert losses(tmp_path) == before


def test_checkpoints_of_another_configuration_or_backend_are_refused(corpus: Path, tmp_path: Path) -> None:
    configuration = build_configuration(content(corpus, tmp_path, training=EIGHT))
    train_with_jax(configuration)
    with pytest.raises(ValueError, match="was begun with --backend jax, whose checkpoints torch does not read"):
        train(configuration)
    wider = build_configuration(content(corpus, tmp_path, training=EIGHT, model={"settings": SHAPE | {"head_dim": 8}}))
    with pytest.raises(ValueError, match=r"begun with other settings .*model.settings"):
        train_with_jax(wider)
    prepared = prepare_with_jax(wider)  # as when run.json was lost
    with jax.set_mesh(prepared.mesh), pytest.raises(ValueError, match=r"of another configuration: .*k_norm.weight is"):
        JaxRun(prepared, report=None, note=None).begin()


def test_a_loss_that_is_not_finite_stops_and_spares_the_weights(corpus: Path, tmp_path: Path) -> None:
    training = EIGHT | {"learning_rate": 1e30, "warmup_steps": 0, "steps": 9}
    with pytest.raises(NotFiniteError, match="not finite at step 2; training is stopped, the last good checkpoint is"):
        train_in_jax(corpus, tmp_path, training=training, output={"save_every": 1})
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# ------------------------------------------------------------------------------------------- processes of their own


def start(*arguments: Any, devices: int = 4, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "neuroweave", "train", *map(str, arguments), "--backend", "jax"]
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    environment = os.environ | {"XLA_FLAGS": flags} | more
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def two_hosts(config: Path, *more: str, port: int) -> list[subprocess.Popen[str]]:
    joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_COUNT": "2"}
    return [start(config, *more, **joined, JAX_PROCESS_INDEX=str(index)) for index in range(2)]


def test_two_hosts_of_four_devices_equal_one_process(corpus: Path, model: Path, alone: Path, tmp_path: Path) -> None:
    """Weights cut over devices of both hosts; their checkpoint goes on in one process."""
    from test_train_sharded import free_port

    value = content(corpus, tmp_path / "run", model={"path": str(model)}, training=EIGHT | {"clip": 0.3})
    value["model"].pop("preset"), value["model"].pop("settings")
    config = written(tmp_path / "c.yaml", value | {"jax": {"fsdp": 8}})
    hosts = two_hosts(config, "--set", "training.steps=3", "--set", "training.decay_steps=0", port=free_port())
    told = [host.communicate(timeout=240) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert "step 3/3" in told[0][0]
    assert "step" not in told[1][0]
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "complete.json").read_text())["processes"] == 2
    first = list(losses(tmp_path / "run").values())
    np.testing.assert_allclose(first, list(losses(alone).values())[:3], atol=1e-5, rtol=0)
    done = train_with_jax(build_configuration(value | {"training": value["training"] | {"decay_steps": 0}}))
    assert done.plan.processes == 1
    assert list(losses(tmp_path / "run").values())[:3] == first
    rest = list(losses(tmp_path / "run").values())[3:]  # the schedule's decay begins after step 5
    np.testing.assert_allclose(rest[:2], list(losses(alone).values())[3:5], atol=1e-5, rtol=0)


def test_hosts_that_disagree_and_a_coordinator_that_is_not_there(corpus: Path, tmp_path: Path) -> None:
    from test_train_sharded import free_port

    config = written(tmp_path / "c.yaml", content(corpus, tmp_path / "run", training=EIGHT))
    port = free_port()
    joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_COUNT": "2"}
    hosts = [
        start(config, "--set", f"training.learning_rate={rate}", JAX_PROCESS_INDEX=str(index), **joined)
        for index, rate in enumerate((0.001, 0.002))
    ]
    for host in hosts:
        _, error = host.communicate(timeout=240)
        assert host.returncode == 2
        assert "different settings (training.learning_rate is 0.001 on host 0, 0.002 on host 1)" in error
    port = free_port()
    alone = start(config, JAX_PROCESS_INDEX="1", JAX_INITIALIZATION_TIMEOUT="2",
                  JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_PROCESS_COUNT="2")  # fmt: skip
    _, error = alone.communicate(timeout=60)
    assert alone.returncode == 2
    assert f"JAX_COORDINATOR_ADDRESS=127.0.0.1:{port}: no coordinator answered within 2 s" in error


def test_ctrl_c_saves_and_the_same_command_goes_on(corpus: Path, tmp_path: Path) -> None:
    training = EIGHT | {"steps": 100_000}
    config = written(tmp_path / "c.yaml", content(corpus, tmp_path / "run", training=training))
    run = start(config, "--set", "output.save_every=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and (not metrics.is_file() or len(read_metrics(metrics)) < 3):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 130, error
    [folder] = (tmp_path / "run").glob("checkpoint-*")
    assert f"{folder.name} is saved; the same command goes on from there" in error
    step = int(folder.name.rpartition("-")[2])
    again = start(config, "--set", f"training.steps={step + 2}", "--set", "training.decay_steps=0")
    out, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert f"step {step + 1}/{step + 2}" in out
    assert f"step {step}/" not in out


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"jax": {"fsdp": 3}},
            "jax.fsdp 3 x jax.tensor 1 = 3 devices share the weights, but all hosts together have 8",
        ),
        ({"jax": {"fsdp": True}}, "jax.fsdp.*integer"),
        ({"jax": {"data": 4}}, "jax.data 4 x jax.fsdp 1 x jax.tensor 1 = 4 devices, but there are 8"),
        ({"training": {"batch_size": 12}}, r"training.batch_size 12 cannot be divided among 8 groups of devices"),
        ({"training": EIGHT | {"compile": True}}, "training.compile: True is of the torch backend"),
        ({"training": EIGHT | {"attention": "sdpa"}}, "the JAX backend takes auto, eager, splash, got sdpa"),
        ({"jax": {"fspd": 2}}, "jax.fspd is no field .did you mean 'fsdp'"),
    ],
)
def test_refusals(corpus: Path, tmp_path: Path, sections, message) -> None:
    value = content(corpus, tmp_path / "run", training=EIGHT)
    for name, section in sections.items():
        value[name] = value.get(name, {}) | section
    with pytest.raises(ValueError, match=message):
        train_with_jax(build_configuration(value))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_of_another_family_is_refused(corpus: Path, tmp_path: Path) -> None:
    from tiny_llama import tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    value = content(corpus, tmp_path / "run", training=EIGHT) | {"model": {"path": str(tmp_path / "llama")}}
    with pytest.raises(ValueError, match="a llama model; the JAX backend runs NeuroBLAST models"):
        train_with_jax(build_configuration(value))


def test_without_jax_the_error_names_what_to_install(corpus: Path, tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", content(corpus, tmp_path / "run"))
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.split('.')[0] in ('jax', 'optax', 'orbax') else real(name, *a)\n"
        "from neuroweave.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(config), "--backend", "jax"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        "--backend jax needs jax, optax, orbax.checkpoint, which is not installed; pip install 'neuroweave[jax]'"
        in done.stderr
    )
