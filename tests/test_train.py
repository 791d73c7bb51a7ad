"""`neuroweave train` from the configuration to the model; packing, schedules and refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import tiny_model, tiny_tokenizer
from tiny_training import losses, make_trainer, tiny_neuroblast
from training_runs import content, written
from transformers import AutoModelForCausalLM, AutoTokenizer, get_wsd_schedule

from neuroweave.training.arguments import checkpointing_field
from neuroweave.training.configuration import (
    build_configuration,
    commented_configuration,
    read_configuration,
)
from neuroweave.training.model_to_train import check_packing, choose_precision, packing_leak
from neuroweave.training.packing import TokensInMemory
from neuroweave.training.safe_checkpoints import newest_complete
from neuroweave.training.separate_rows import SeparateRows
from neuroweave.training.torch_loop import stack_rows
from neuroweave.training.train import prepare, train


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neuroweave", "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


# ------------------------------------------------------------------------------------------------------ end to end


def test_a_run_from_configuration_to_model(corpus: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    configuration = build_configuration(content(corpus, tmp_path / "run"))
    done = train(configuration, report=lines.append)
    assert [line.split("  ")[0] for line in lines] == ["step 1/6", "step 2/6", "step 3/6", "step 3/6", "step 4/6",
                                                       "step 5/6", "step 6/6", "step 6/6"]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(done.model)
    assert len(AutoTokenizer.from_pretrained(done.model)) == model.config.vocab_size == 123
    assert model.config.use_cache
    record = json.loads((Path(done.model) / "training.json").read_text())
    assert record["configuration"]["training"]["steps"] == 6
    assert record["loss"] == losses(tmp_path / "run")[6] == done.loss
    assert done.plan.tokens == 6 * 4 * 32
    again = train(build_configuration(content(corpus, tmp_path / "again")))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    assert again.held_out_loss == done.held_out_loss
    model = AutoModelForCausalLM.from_pretrained(again.model, dtype=torch.float32)
    assert done.held_out_loss == pytest.approx(held_out_loss(configuration, model), rel=1e-5)


def held_out_loss(configuration: Any, model: Any) -> float:
    """Of a model, in float64 and without the trainer."""
    rows = prepare(configuration).held_out
    batch = stack_rows([rows[index] for index in range(len(rows))])
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    logits, targets = out.logits[:, :-1].double().flatten(0, 1), batch["labels"][:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(logits, targets))


def test_longer_and_resumed_is_the_same_as_longer_at_once(corpus: Path, tmp_path: Path) -> None:
    constant = {"schedule": "constant"}
    train(build_configuration(content(corpus, tmp_path / "parts", training=constant)))
    longer = constant | {"steps": 9}
    train(build_configuration(content(corpus, tmp_path / "parts", training=longer)))
    train(build_configuration(content(corpus, tmp_path / "whole", training=longer)))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_going_on_with_another_model(corpus: Path, tmp_path: Path) -> None:
    """A Llama of transformers, with the tokenizer beside it."""
    tiny_model(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    value = content(corpus, tmp_path / "run")
    value |= {"model": {"path": str(tmp_path / "model")}, "tokenizer": {}}
    train(build_configuration(value))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.model_type == "llama"
    before = tiny_model(max_position_embeddings=64)
    assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


def test_streamed_runs_resume_exactly(corpus: Path, tmp_path: Path) -> None:
    streamed, part = {"streaming": True}, {"steps": 3, "schedule": "constant"}
    whole = part | {"steps": 6}
    train(build_configuration(content(corpus, tmp_path / "whole", data=streamed, training=whole)))
    train(build_configuration(content(corpus, tmp_path / "parts", data=streamed, training=part)))
    train(build_configuration(content(corpus, tmp_path / "parts", data=streamed, training=whole)))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_settings_of_a_run_cannot_change(corpus: Path, tmp_path: Path) -> None:
    train(build_configuration(content(corpus, tmp_path / "run")))
    file = tmp_path / "run" / "run.json"
    began = json.loads(file.read_text())
    del began["configuration"]["training.label_smoothing"], began["backend"]  # as runs of before had none
    file.write_text(json.dumps(began))
    smooth = build_configuration(content(corpus, tmp_path / "run", training={"label_smoothing": 0.1}))
    with pytest.raises(ValueError, match=r"training.label_smoothing was 0.0, is 0.1"):
        train(smooth)
    train(build_configuration(content(corpus, tmp_path / "run")))
    other = build_configuration(content(corpus, tmp_path / "run", training={"learning_rate": 0.5}))
    with pytest.raises(
        ValueError, match=r"other settings \(training.learning_rate was 0.001, is 0.5\); --fresh starts"
    ):
        train(other)
    train(other, resume=False)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------------- killed, stopped


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    script = Path(__file__).parent / "tiny_training.py"

    def start(**settings: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), json.dumps([settings])]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    killed = start(folder=str(tmp_path / "parts"), dropout=0.1, kill_at=7)
    assert killed.returncode == -signal.SIGKILL
    assert start(folder=str(tmp_path / "parts"), dropout=0.1, resume=True).returncode == 0
    assert start(folder=str(tmp_path / "whole"), dropout=0.1).returncode == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    files = ("checkpoint-10/model.safetensors", "checkpoint-10/rng_state.pth")
    assert all((tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    """The kernel refuses to write beyond a limit, as on a full disk, in the midst of the weights."""
    settings = {"folder": str(tmp_path), "file_limit": 20_000, "limit_at": 7}
    command = [sys.executable, str(Path(__file__).parent / "tiny_training.py"), json.dumps([settings])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert "checkpoint-10: could not be saved" in done.stderr
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-5'}; make room and resume" in done.stderr
    assert not (tmp_path / "checkpoint-10").exists()
    good = newest_complete(tmp_path)
    assert good == tmp_path / "checkpoint-5"
    AutoModelForCausalLM.from_pretrained(good)


def test_ctrl_c_on_the_command_line(corpus: Path, tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", content(corpus, tmp_path / "run", training={"steps": 100_000}))
    command = [sys.executable, "-m", "neuroweave", "train", str(config), "--set", "output.save_every=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "is saved; the same command goes on from there" in errors
    saved = newest_complete(tmp_path / "run")
    assert saved is not None
    last = int(saved.name.removeprefix("checkpoint-"))
    assert max(losses(tmp_path / "run")) == last


# ----------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("family", ["llama", "neuroblast"])
@pytest.mark.parametrize(("first", "second"), [(1, 16), (7, 10), (16, 1)])
def test_packed_documents_do_not_see_each_other(family: str, first: int, second: int) -> None:
    """The summed loss of a packed row is that of its documents alone."""
    model = (tiny_model() if family == "llama" else tiny_neuroblast()).eval()
    draw = np.random.RandomState(3)
    documents = [draw.randint(3, 123, length) for length in (first, second)]
    ids = torch.from_numpy(np.concatenate(documents))[None]
    positions = torch.cat((torch.arange(first), torch.arange(second)))[None]

    def total(ids: torch.Tensor, positions: torch.Tensor) -> float:
        labels = ids.masked_fill(positions == 0, -100)
        one = torch.tensor(1.0)
        out = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False, num_items_in_batch=one)
        return float(out.loss.detach())

    alone = sum(total(torch.from_numpy(document)[None], torch.arange(len(document))[None]) for document in documents)
    assert total(ids, positions) == pytest.approx(alone, rel=1e-5, abs=1e-5)
    if min(first, second) > 1:
        assert abs(total(ids, torch.arange(17)[None]) - alone) > 0.1  # numbered through, they do see each other


def test_the_probe_finds_a_leak() -> None:
    for model in (tiny_model(), tiny_neuroblast()):
        assert packing_leak(model) < 1e-4
        check_packing(model, rows=4)
    leaky = tiny_model()
    forward = leaky.forward

    def numbered_through(input_ids: Any, position_ids: Any, **options: Any) -> Any:
        return forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **options)

    leaky.forward = numbered_through
    with pytest.raises(ValueError, match=r"see each other in this model .*LlamaForCausalLM.* set data.packing: false"):
        check_packing(leaky, rows=4)


def test_rows_of_one_document_each() -> None:
    documents = [list(range(10, 17)), [20], list(range(30, 43)), list(range(50, 55))]
    rows = SeparateRows(TokensInMemory(documents), 5, pad_token=99)
    found = [rows.row(index) for index in range(len(rows))]
    assert [row.input_ids.tolist() for row in found] == [
        [10, 11, 12, 13, 14], [15, 16, 99, 99, 99], [20, 99, 99, 99, 99], [30, 31, 32, 33, 34],
        [35, 36, 37, 38, 39], [40, 41, 42, 99, 99], [50, 51, 52, 53, 54],
    ]  # fmt: skip
    assert found[1].labels.tolist() == [-100, 16, -100, -100, -100]
    assert all(row.position_ids.tolist() == [0, 1, 2, 3, 4] for row in found)
    shuffled = SeparateRows(TokensInMemory(documents), 5, seed=3)
    epochs = [sorted(int(shuffled.row(at + 7 * epoch).input_ids[0]) for at in range(7)) for epoch in (0, 1)]
    assert epochs[0] == epochs[1] == sorted(int(row.input_ids[0]) for row in found)
    assert [shuffled.row(at).input_ids[0] for at in range(7)] != [shuffled.row(at + 7).input_ids[0] for at in range(7)]


def test_a_run_without_packing(corpus: Path, tmp_path: Path) -> None:
    done = train(
        build_configuration(content(corpus, tmp_path / "run", data={"packing": False, "sequence_length": 100}))
    )
    assert done.plan.rows + done.plan.held_out_rows == 60


# ------------------------------------------------------------------------------------------------- schedule, memory


def test_warmup_stable_decay_is_transformers_own(corpus: Path, tmp_path: Path) -> None:
    configuration = build_configuration(
        content(corpus, tmp_path / "run", training={"steps": 20, "warmup_steps": 5, "decay_steps": 7,
                                                    "final_learning_rate": 0.1, "decay_shape": "linear"})
    )  # fmt: skip
    train(configuration)
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in entries if "loss" in entry]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule = get_wsd_schedule(optimizer, 5, 7, num_training_steps=20, decay_type="linear", min_lr_ratio=0.1)
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, rel=1e-9)
    assert expected[5:13] == [1e-3] * 8  # what it is: up, level, down
    assert expected[4] < 1e-3
    assert expected[14] < 1e-3


@pytest.mark.parametrize("family", ["llama", "neuroblast"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_model() if family == "llama" else tiny_neuroblast(dropout=0.0)
        calls = []
        block = next(module for name, module in model.named_modules() if name.endswith(".mlp"))
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer = make_trainer(
            tmp_path / str(checkpointing), model=model, steps=1, learning_rate=1e-12,
            **{checkpointing_field(): checkpointing}, max_grad_norm=0.0,
        )  # fmt: skip
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():

            def keep(p: torch.Tensor, name: str = name, gradients: dict[str, torch.Tensor] = gradients) -> None:
                gradients[name] = p.grad.clone()

            parameter.register_post_accumulate_grad_hook(keep)
        trainer.train()
        found.append(gradients)
        assert len(calls) == (4 if checkpointing else 2)  # two passes of a step, each run again in the backward
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-7)


def test_precision() -> None:
    assert choose_precision("float32", "cpu") == torch.float32
    assert choose_precision("auto", "cpu") in (torch.float32, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_tokenizer_that_does_not_match_the_model(corpus: Path, tmp_path: Path) -> None:
    tiny_model(vocab_size=60).save_pretrained(tmp_path / "small")
    value = content(corpus, tmp_path / "run") | {"model": {"path": str(tmp_path / "small")}}
    with pytest.raises(ValueError, match=r"tokenizer has 123 tokens, .* an embedding of 60 rows; give the tokenizer"):
        train(build_configuration(value))
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(words=[f"w{119 - at}" for at in range(120)]).save_pretrained(tmp_path / "model")
    value["model"] = {"path": str(tmp_path / "model")}
    with pytest.raises(ValueError, match=r"does not match the model .*: 120 of the 123 tokens of the model's own"):
        train(build_configuration(value))
    assert not (tmp_path / "run").exists()


REFUSED = [
    ({"training": {"stepps": 3}}, "training.stepps is no field (did you mean 'steps'?)"),
    ({"training": {"epochs": 2}}, "training: steps and epochs are both given; give one of them"),
    ({"training": {"batch_size": 5}}, "training: batch_size 5 is not a multiple of micro_batch_size 2"),
    ({"training": {"learning_rate": "fast"}}, "training.learning_rate: Input should be a valid number"),
    ({"model": {"path": "x/y"}}, "model: settings are of a fresh model; leave them out"),
    ({"data": {"sources": [{"paht": "x"}]}}, "data.sources.0.paht is no field (did you mean 'path'?)"),
    ({"data": {"held_out": 1.0}}, "data.held_out: Input should be less than 1"),
    ({"output": {"folder": None}}, "output.folder: Input should be a valid string"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_refused_configurations(corpus: Path, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the message is compared below
        build_configuration(content(corpus, tmp_path, **sections))
    assert message in str(refused.value)


def test_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    cases = [
        ({"training": {"decay_steps": 5}}, "warmup_steps 2 and decay_steps 5 are more than the 6 steps"),
        ({"metrics": {"report_to": ["wandbb"]}}, "report_to: 'wandbb' is not known"),
        ({"model": {"settings": {"vocab_size": 7}}}, "model.settings: vocab_size: the tokenizer decides"),
        ({"data": {"streaming": True, "packing": False}}, "data.streaming needs data.packing: true"),
    ]
    for sections, message in cases:
        with pytest.raises(ValueError, match=message):
            train(build_configuration(content(corpus, tmp_path / "run", **sections)))
        assert not list(tmp_path.glob("run/checkpoint*"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, but no run; choose another output.folder"):
        train(build_configuration(content(corpus, tmp_path)))
    with pytest.raises(ValueError, match="no complete checkpoint to resume; leave out --resume"):
        train(build_configuration(content(corpus, tmp_path / "run")), resume=True)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("preset", ["laptop", "published"])
def test_the_printed_configuration_is_the_preset(tmp_path: Path, preset: str) -> None:
    text = commented_configuration(preset)
    (tmp_path / "c.yaml").write_text(text)
    said = {"preset": preset, "output": {"folder": "runs/first"}}
    if preset == "laptop":
        said["tokenizer"] = {"path": "my-tokenizer"}
    assert read_configuration(tmp_path / "c.yaml") == build_configuration(said)
    assert all("#" in line for line in text.splitlines() if line)


def test_examples_are_valid() -> None:
    for file in (Path(__file__).parent.parent / "examples" / "train").glob("*.yaml"):
        read_configuration(file)


def test_dry_run_and_errors_on_the_command_line(corpus: Path, tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", content(corpus, tmp_path / "run"))
    done = run(config, "--dry-run", "--json", "--set", "training.steps=50")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"] == 50
    assert plan["tokens"] == 50 * 4 * 32
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    done = run(config, "--set", "training.learning_rat=1")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"neuroweave: {config}: training.learning_rat is no field (did you mean 'learning_rate'?)"
    )


def test_published_defaults() -> None:
    """The numbers of the reference."""
    training = build_configuration({"preset": "published", "output": {"folder": "x"}}).training
    assert (training.learning_rate, training.weight_decay, training.clip, training.seed) == (4e-3, 0.0, 1.0, 3407)
    assert (training.schedule, training.decay_steps, training.batch_size, training.micro_batch_size) == (
        "wsd", 20_000, 64, 2,
    )  # fmt: skip
    assert math.isclose(training.accumulation(1), 32)
