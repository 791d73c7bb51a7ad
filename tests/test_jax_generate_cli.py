"""`neuroweave generate --backend jax`: the tokens of the torch backend, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_llama import tiny_model, tiny_tokenizer

from neuroweave.cli.main import program
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM

PROMPT = "w5 w9 w5 w77"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = NeuroBlastConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_sensory_layers=2, num_associative_layers=2,
        num_motor_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        max_position_embeddings=64,
    )  # fmt: skip
    NeuroBlastForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(program, ["generate", *map(str, arguments)])


def told(model: Path, backend: str, *more: str) -> dict:
    done = run(model, "--prompt", PROMPT, "--raw", "--backend", backend, "--json", *more)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_greedy_tokens_and_facts_are_those_of_torch(model):
    ours, theirs = (told(model, backend, "--greedy", "--new-tokens", "30") for backend in ("jax", "torch"))
    assert ours["token_ids"] == theirs["token_ids"]
    assert len(set(ours["token_ids"])) > 1
    for name in ("text", "prompt_tokens", "new_tokens", "stopped", "settings"):
        assert ours[name] == theirs[name], name


def test_sampling_follows_its_seed_and_the_context_ends_it(model):
    options = ("--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--new-tokens", "200")
    first, again, other = (told(model, "jax", *options, "--seed", seed) for seed in ("1", "1", "2"))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    assert first["stopped"] in ("context", "end of text")
    assert first["prompt_tokens"] + first["new_tokens"] <= 64


def test_refusals(model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for arguments, message in (
        ((tmp_path,), "a llama model; the JAX backend runs NeuroBLAST models"),
        ((model, "--prompt-lookup", "2"), "--prompt-lookup is of the torch backend"),
        ((model, "--assistant", model), "--assistant is of the torch backend"),
        ((model, "--dtype", "float16"), "--dtype float16: the JAX backend takes auto, float32, bfloat16"),
        ((model, "--device", "cuda"), "--device cuda: JAX runs on cpu; JAX_PLATFORMS chooses another"),
    ):
        done = run(*arguments, "--prompt", PROMPT, "--backend", "jax")
        assert done.exit_code != 0
        assert message in str(done.exception) + done.output, message


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", "1e-40"),
        ("--greedy", "--repetition-penalty", "1e-45"),
    ],
)
def test_settings_too_small_for_float32_draw_no_token(model, options):
    done = run(model, "--prompt", PROMPT, "--raw", "--backend", "jax", "--new-tokens", "3", *options)
    assert done.exit_code != 0
    assert "its logits are not numbers, so no token can be drawn" in str(done.exception) + done.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0, and a number above 0 was expected; mend"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
        ({"do_sample": True, "temperature": 1e39}, "temperature is 1e+39"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0, and a number above 0, at most 1 was expected"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1, and a whole number, 0 or more was expected"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5"),
        ({"do_sample": True, "min_p": 2.0}, "min_p is 2.0, and a number from 0 to 1 was expected"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": "x"}, "repetition_penalty is 'x'"),
        ({"do_sample": "no"}, "do_sample is 'no'; true or false was expected"),
    ],
)
def test_settings_of_the_checkpoint_that_mean_nothing_are_refused_by_name(model, tmp_path, settings, message):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    done = run(folder, "--prompt", PROMPT, "--raw", "--backend", "jax", "--new-tokens", "3")
    assert done.exit_code != 0
    assert message in str(done.exception) + done.output
