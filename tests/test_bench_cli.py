"""`neuroweave bench` and `generate --fast` on a small model: what is said is what was measured."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from test_runtime import native, needs_compiler, tiny  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import neuroweave
from neuroweave.cli.bench import shares_of
from neuroweave.cli.main import main, program
from neuroweave.diagnose.decoding_loss import decoding_loss
from neuroweave.diagnose.speed import BASELINE, formats_of, measure_ways, runtime_way, transformers_way
from neuroweave.native import build

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "of", "and", "a", "to", "in", "was", "it", "he", "that", "her", "she"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama with a tokenizer of single words."""
    path = tmp_path_factory.mktemp("bench") / "model"
    model = tiny("llama", attention_bias=False, mlp_bias=False, max_position_embeddings=512)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    words = {word: number for number, word in enumerate(WORDS)} | {f"w{n}": n for n in range(len(WORDS), 97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(path)
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_bench_says_what_it_measured(folder, tmp_path):
    needs_compiler()
    patched = tiny("llama", attention_bias=False, mlp_bias=False, max_position_embeddings=512)
    neuroweave.patch(patched, {"sites": [{"site": "mlp", "activation": "phantom"}]})
    other = tmp_path / "patched"
    patched.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    text = run("bench", str(folder), "--against", str(other), "--rounds", "2", "--new-tokens", "16", "--prompt-tokens",
               "8", "--weights", "float32,int8", "--no-cache", "--perplexity", "200", "--json")  # fmt: skip
    found = json.loads(text)
    ways = found["ways"]
    assert [each["way"] for each in ways[:4]] == [
        "transformers, eager, no cache", BASELINE, "fast runtime, float32", "fast runtime, int8",
    ]  # fmt: skip
    assert [each["model"] for each in ways] == [str(folder)] * 4 + [str(other)] * 4
    assert found["setting"]["prompt_tokens"] == 8
    assert all(each["same_tokens"] for each in [*ways[:3], *ways[4:7]])
    assert ways[1]["ratio"] == 1.0
    assert ways[2]["perplexity"] == pytest.approx(ways[1]["perplexity"], rel=1e-4)
    assert ways[3]["bytes_per_token"] < 0.5 * ways[2]["bytes_per_token"]
    for each in ways:
        share = each["decode_tokens_per_second"] * each["bytes_per_token"]
        assert each["share_of_roofline"] == pytest.approx(share / found["setting"]["bandwidth_bytes_per_second"])


@pytest.mark.parametrize("options", [["--greedy"], ["--temperature", "0.7", "--top-k", "9", "--seed", "4"],
                                     ["--temperature", "1.3", "--top-p", "0.8", "--seed", "5"],
                                     ["--greedy", "--repetition-penalty", "1.4"],
                                     ["--temperature", "1", "--min-p", "0.1", "--seed", "6"]])  # fmt: skip
def test_fast_chooses_the_tokens_that_transformers_chooses(folder, options, native):  # noqa: F811
    common = ("generate", str(folder), "--prompt", "the w20 of w30", "--raw", "--new-tokens", "24", "--json", *options)
    plain, fast = json.loads(run(*common)), json.loads(run(*common, "--fast"))
    assert fast["token_ids"] == plain["token_ids"]
    assert fast["settings"] == plain["settings"]


def test_rounded_and_sparse_options_run(folder, capsys):
    common = ["generate", str(folder), "--prompt", "the w20", "--raw", "--new-tokens", "8", "--greedy", "--verbose"]
    with pytest.raises(SystemExit) as ended:
        main([*common, "--fast", "--weights", "int4", "--sparse", "0.5"])
    assert not ended.value.code
    told = capsys.readouterr().err
    assert "weights int4, 50% of the neurons skipped, in 2 of 2 layers" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "int8"], "--weights int8 is of the fast runtime; give --fast too"),
        (["--sparse", "0.5"], "--sparse 0.5 is of the fast runtime; give --fast too"),
        (["--fast", "--backend", "jax"], "--fast and --backend jax are two ways to make tokens"),
        (["--fast", "--dtype", "bfloat16"], "--dtype bfloat16: the fast runtime computes in float32"),
        (["--fast", "--prompt-lookup", "3"], "--prompt-lookup is not for the fast runtime"),
        (["--fast", "--assistant", "x/y"], "--assistant is not for the fast runtime"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(folder), "--prompt", "the", "--raw", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_rounds_are_paired():
    model = tiny("llama", attention_bias=False, mlp_bias=False)
    ways = [transformers_way("m", BASELINE, model), runtime_way("m", model, 40, format="float32")]
    found = measure_ways(ways, [3, 4, 5], 12, rounds=3)
    for each in found:
        assert len(each.timings) == len(each.ratios) == 3
        assert all(len(timing.tokens) == 12 for timing in each.timings)
    for one, other, ratio in zip(found[0].decode_rates(), found[1].decode_rates(), found[1].ratios, strict=True):
        assert ratio == pytest.approx(other / one)
    assert found[0].timings[0].tokens == found[1].timings[0].tokens


def test_loss_of_decoding_is_that_of_the_forward_pass():
    model = tiny("llama", max_position_embeddings=256)
    windows = [tuple(torch.randint(3, 97, (30,)).tolist()) for _ in range(3)]
    expected = decoding_loss(model, windows)
    assert expected == pytest.approx(decoding_loss(model, windows, format="float32"), rel=1e-5)
    assert 1e-6 < abs(math.expm1(decoding_loss(model, windows, format="int4") - expected)) < 0.1


def test_formats_are_checked():
    assert formats_of("int8, float32") == ["int8", "float32"]
    with pytest.raises(ValueError, match="'int3'"):
        formats_of("int3")


def test_bench_of_sparse_neurons_reads_less_and_loses_more(folder):
    needs_compiler()
    text = run("bench", str(folder), "--rounds", "2", "--new-tokens", "16", "--prompt-tokens", "8", "--weights",
               "float32,int8,int4", "--sparse", "0,0.4", "--perplexity", "200", "--json")  # fmt: skip
    ways = {each["way"]: each for each in json.loads(text)["ways"]}
    assert list(ways) == [
        BASELINE, "fast runtime, float32", "fast runtime, float32, 0% skipped", "fast runtime, float32, 40% skipped",
        "fast runtime, int8", "fast runtime, int8, 0% skipped", "fast runtime, int8, 40% skipped",
        "fast runtime, int4", "fast runtime, int4, 0% skipped", "fast runtime, int4, 40% skipped",
    ]  # fmt: skip
    dense, none, sparse = (ways[name] for name in list(ways)[1:4])
    assert none["bytes_per_token"] == dense["bytes_per_token"] == sparse["weight_bytes"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    up_and_down = sum(8 * layer.mlp.up_proj.weight.numel() for layer in model.model.layers)
    assert dense["bytes_per_token"] - sparse["bytes_per_token"] == pytest.approx(0.4 * up_and_down, rel=0.02)
    assert none["perplexity"] == dense["perplexity"] != sparse["perplexity"]


@pytest.mark.parametrize("text", ["1", "-0.1", "half", "0.2,nan"])
def test_bench_refuses_what_is_no_share(text):
    with pytest.raises(ValueError, match=r"--sparse takes shares from 0 to below 1, such as 0,0\.4; got"):
        shares_of(text)
    assert shares_of(" 0, 0.4,") == [0, 0.4]


def test_a_library_that_was_cut_short_is_made_again(folder, tmp_path, monkeypatch, capsys):
    needs_compiler()
    monkeypatch.setenv("NEUROWEAVE_CACHE", str(tmp_path))
    build.built.cache_clear()
    words = ["generate", str(folder), "--prompt", "the", "--raw", "--fast", "--new-tokens", "4", "--greedy", "--json"]
    texts = []
    for _ in range(2):
        texts.append(json.loads(run(*words))["token_ids"])
        library = next((tmp_path / "native").glob("*.so"))
        whole = library.read_bytes()
        library.unlink()  # the one that is loaded stays as it is
        library.write_bytes(whole[: len(whole) // 2])
        build.built.cache_clear()
    assert texts[0] == texts[1]
    run(*words)
    assert len(library.read_bytes()) == len(whole)
    build.built.cache_clear()


def test_a_compiler_that_fails_is_said(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEUROWEAVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    build.built.cache_clear()
    main_and_end("generate", str(folder), "--prompt", "the", "--raw", "--fast", "--new-tokens", "4", "--greedy")
    assert "not compiled, so slower:" in capsys.readouterr().err
    monkeypatch.setenv("NEUROWEAVE_NATIVE", "0")  # asked for
    main_and_end("generate", str(folder), "--prompt", "the", "--raw", "--fast", "--new-tokens", "4", "--greedy")
    assert "not compiled" not in capsys.readouterr().err
    build.built.cache_clear()


def main_and_end(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert not ended.value.code


def test_what_cannot_be_written_is_refused(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    for source, prompt, message in [
        (broken, "the", "its logits are not numbers; neuroweave verify looks at the weights; leave --fast out"),
        (folder, "a\udcffb", "--prompt: not UTF-8 text (at character 1)"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(source), "--prompt", prompt, "--raw", "--fast", "--new-tokens", "4"])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
