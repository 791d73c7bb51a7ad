"""The model card: it parses back, holds the numbers, shows no path of this machine, and breaks on no name."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from made_comparison import made_comparison
from safetensors.torch import save_file

from neuroweave.checkpoint.manifest import read_manifest, write_manifest
from neuroweave.diagnose.report.card import Wording, model_card, write_card
from neuroweave.diagnose.report.differences import rows
from neuroweave.diagnose.report.verdict import sentences
from neuroweave.diagnose.results.comparison import Comparison, Failure, Measured, Other
from neuroweave.diagnose.results.records import Estimate

MANIFEST: dict[str, Any] = {
    "format": 1,
    "neuroweave": "0.1.0",
    "operation": "fuse",
    "parameters": {"alpha": 0.02, "bank": "/home/someone/banks/bank.json", "layers": None},
    "inputs": {
        "model": {
            "files": {"model.safetensors": {"bytes": 538090408, "sha256": "1" * 64}},
            "manifest": {"operation": "import", "inputs": {"source": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct"}}},
        },
        "deltas": {"files": {"deltas.safetensors": {"bytes": 7, "header_sha256": "2" * 64}}},
    },
    "outputs": {"model.safetensors": {"bytes": 538090408, "sha256": "3" * 64}, "config.json": {"bytes": 9}},
}


def card_of(comparison: Comparison, **options: Any) -> ModelCard:
    return ModelCard(model_card(comparison, comparison.others[0], **options))


def with_model(comparison: Comparison, **fields: Any) -> Comparison:
    other = comparison.others[0]
    return comparison.model_copy(
        update={"others": [other.model_copy(update={"model": other.model.model_copy(update=fields)})]}
    )


def with_base(comparison: Comparison, **fields: Any) -> Comparison:
    return comparison.model_copy(update={"base": comparison.base.model_copy(update=fields)})


def cells(line: str) -> list[str]:
    """One row of a Markdown table as a reader sees it; only bars without a backslash part cells."""
    inner = line.removeprefix("| ").removesuffix(" |").replace("\\|", "\0").split(" | ")
    return [html.unescape(cell.replace("\0", "|").replace("\\", "")) for cell in inner]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_front_matter_is_what_the_hub_reads() -> None:
    comparison = with_base(made_comparison(), source="HuggingFaceTB/SmolLM2-135M-Instruct")
    other = comparison.others[0]
    text = model_card(comparison, other)
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["neuroweave", "activation-swap"]
    results = ModelCard(text).data.eval_results
    found = {(r.dataset_name, r.metric_type): r for r in results}
    perplexity = found["a.txt, b.txt", "perplexity"]
    assert perplexity.metric_value == other.model.perplexity.value
    assert perplexity.metric_args == {"interval_95": [other.model.perplexity.low, other.model.perplexity.high]}
    assert perplexity.dataset_revision == comparison.text.sha256
    kl = found["a.txt, b.txt", "kl_divergence"]
    assert kl.metric_value == other.difference.kl.value
    assert kl.metric_args == {
        "interval_95": [other.difference.kl.low, other.difference.kl.high],
        "base": comparison.base.name,
    }
    task = found["arithmetic_small", "acc_norm"]
    assert (task.metric_value, task.metric_args["questions"]) == (other.model.tasks[1].value, 200)
    assert len(results) == 6
    assert ModelCard(text).content == text  # nothing is lost or put in another order on the way


@pytest.mark.parametrize("intervals", [True, False])
@pytest.mark.parametrize("amount", [0.0, 0.3])
def test_text_holds_verdict_and_table(amount: float, intervals: bool) -> None:
    comparison = made_comparison(("base", "other"), amounts=[amount], intervals=intervals)
    other = comparison.others[0]
    text = card_of(comparison).text
    measured = section(text, "What was measured")
    table = [cells(line) for line in measured.splitlines() if line.startswith("| ")]
    assert table[0] == ["measure", "base", "other", "difference", "95 % interval", "reading"]
    assert table[1] == ["---"] * 6
    expected = [[r.metric, r.base, r.other, r.difference, r.interval, r.reading] for r in rows(comparison.base, other)]
    assert table[2:] == expected
    wording = Wording({})
    for sentence in sentences(comparison, other)[1:]:
        assert f"- {wording.markdown(sentence)}\n" in f"{measured}\n"
    assert wording.markdown(sentences(comparison, other)[0]) in section(text, "What was changed")


def test_how_it_was_measured_and_limits() -> None:
    comparison = made_comparison()
    failure = Failure(model="base", part="gradient", message="no gradients in 4 bits")
    comparison = comparison.model_copy(update={"failures": [failure]})
    text = card_of(comparison).text
    how = section(text, "How it was measured")
    for part in (
        "a.txt, b.txt; 8,000 predictions in 16 windows of up to 512 tokens",
        comparison.text.sha256,
        "paired bootstrap over 31 units",
        "a processor, 2 cores, 1 threads, accelerator none, Linux",
        "torch 2.13.0",
        "2026-01-02T03:04:05+00:00",
        "128 prompt tokens, 24 new tokens, batch 1, 6 runs per model in turns, KV cache on",
    ):
        assert part in how
    limits = section(text, "Limits")
    assert "A note on &lt;this&gt;." in limits
    assert "Not measured (gradient, base): no gradients in 4 bits" in limits
    assert "Speed:" not in card_of(made_comparison(without=("speed",))).text


def test_many_documents_are_counted() -> None:
    comparison = made_comparison()
    text = comparison.text.model_copy(update={"documents": [f"/data/own/{n}.txt" for n in range(9)]})
    result = card_of(comparison.model_copy(update={"text": text})).data.eval_results[0]
    assert result.dataset_name == "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more"


def test_recipe_and_manifest_are_yaml() -> None:
    recipe = {
        "version": 1,
        "recipe": {"name": "phantom", "sites": [{"site": "mlp", "bank": "/home/someone/own bank.json"}]},
        "plan": [{"path": "model.layers.0.mlp"}],
    }
    card = card_of(with_model(made_comparison(), recipe=recipe), manifest=MANIFEST)
    changed = section(card.text, "What was changed")
    first, second = (yaml.safe_load(block.split("\n```")[0]) for block in changed.split("```yaml\n")[1:])
    assert first == {"name": "phantom", "sites": [{"site": "mlp", "bank": "own bank.json"}]}
    assert second == {"operation": "fuse", "parameters": {"alpha": 0.02, "bank": "bank.json", "layers": None}}
    assert card.data.tags == ["neuroweave", "activation-swap", "neuron-fusion"]
    assert ["hidden_act", "silu", "relu <&>"] in [cells(line) for line in changed.splitlines()]


def test_lineage_names_every_recorded_file() -> None:
    text = card_of(made_comparison(), manifest=MANIFEST).text
    lines = [cells(line) for line in section(text, "Lineage").splitlines() if line.startswith("| ")]
    assert lines[2:] == [
        ["input", "model", "model.safetensors", "538,090,408", "1" * 64],
        ["input", "deltas", "deltas.safetensors", "7", "2" * 64 + " (of its header)"],
        ["output", "", "model.safetensors", "538,090,408", "3" * 64],
        ["output", "", "config.json", "9", ""],
    ]
    assert "## Lineage" not in card_of(made_comparison()).text


def test_lineage_of_a_patched_folder_is_in_its_config() -> None:
    recipe = {"recipe": {}, "source": {"files": {"model.safetensors": {"bytes": 5, "header_sha256": "4" * 64}}}}
    text = card_of(with_model(made_comparison(), recipe=recipe)).text
    assert f"| input | model | model.safetensors | 5 | {'4' * 64} (of its header) |" in text


@pytest.mark.parametrize(
    ("source", "recipe", "manifest", "expected"),
    [
        ("owner/name", None, None, "owner/name"),
        ("/models/owner/name", None, None, None),
        ("", {"base": {"model_type": "llama"}, "base_model": "owner/in-recipe"}, None, "owner/in-recipe"),
        ("/models/x", None, {"inputs": [{"model": {"repository": "owner/in-manifest"}}]}, "owner/in-manifest"),
        ("", None, {"parameters": {"targets": "gate/down"}}, None),
    ],
)
def test_base_model_is_named_where_one_is_known(
    source: str, recipe: dict[str, Any] | None, manifest: dict[str, Any] | None, expected: str | None
) -> None:
    comparison = with_model(with_base(made_comparison(), source=source), recipe=recipe)
    assert card_of(comparison, manifest=manifest).data.base_model == expected


def test_how_to_load() -> None:
    patched = section(card_of(made_comparison()).text, "How to load it")
    assert "import neuroweave" in patched
    assert "trust_remote_code=True" in patched
    plain = section(card_of(with_model(made_comparison(), recipe=None)).text, "How to load it")
    assert "neuroweave" not in plain
    code = plain.split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("other")' in code


NAMES = ("a|b", "*x* _y_ `z`", "<script>alert(1)</script>", "[a](http://x)", "# h", "a\n---\nb: 1", "né 模型", 'q"\\n"')


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_the_card(name: str) -> None:
    comparison = made_comparison(("base", name))
    recipe = {"recipe": {"name": name, "note": f"```\n{name}\n````"}}
    comparison = with_model(comparison, recipe=recipe)
    card = card_of(comparison)
    shown = " ".join(name.split())
    assert card.data.model_name == shown
    body = card.text
    prose = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "```" not in prose
    assert "<script>" not in prose
    assert "](http" not in prose.replace("\\]", "")
    assert body.count("\n## ") == 5
    lines = section(body, "What was measured").splitlines()
    header = next(line for line in lines if line.startswith("| measure"))
    assert {len(cells(line)) for line in lines if line.startswith("| ")} == {6}
    assert Wording({}).markdown(name) in header
    block = section(body, "What was changed").split("`````yaml\n")[1].split("\n`````")[0]
    assert yaml.safe_load(block)["name"] == shown
    code = section(body, "How to load it").split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")


def test_no_path_of_this_machine_is_shown() -> None:
    secret = "/home/someone/private models"
    comparison = made_comparison((f"{secret}/one/model", f"{secret}/two/model"))
    comparison = with_base(comparison, source=f"{secret}/one/model")
    recipe = {"name": "r", "bank": f"{secret}/bank", "windows": "C:\\Users\\someone\\bank", "note": f"from {secret}/x"}
    comparison = with_model(comparison, source=f"{secret}/two/model", recipe=recipe)
    failure = Failure(
        model=f"{secret}/two/model",
        part="tasks",
        message="/root/someone/tasks/a.yaml: no such file (file:///home/someone/b)",
    )
    settings = {"path": ["/var/someone/a", "~/someone/b"], "kept": ["a/b", "https://x.org/someone-public/c"]}
    difference = comparison.others[0].difference.model_copy(update={"changed_settings": settings})
    comparison = comparison.model_copy(
        update={
            "others": [Other(model=comparison.others[0].model, difference=difference)],
            "failures": [failure],
            "notes": ["see /mnt/someone/notes.txt, please"],
        }
    )
    text = model_card(comparison, comparison.others[0], manifest=MANIFEST)
    assert "someone" not in text.replace("someone-public", "")
    assert "private" not in text.split("note: from")[0]
    assert ModelCard(text).data.model_name == "model (changed)"
    assert "compared with model (base)." in text
    assert "see notes.txt, please" in text
    assert "a.yaml: no such file (b)" in text
    assert "https://x.org/someone-public/c" in text
    assert "| kept | a/b |" in text


def test_names_that_begin_alike_are_told_apart() -> None:
    comparison = made_comparison(("/models/m", "/models/m-patched"))
    assert "compared with m." in (text := card_of(comparison).text)
    assert "# m-patched\n" in text
    comparison = made_comparison(("m", "/models/m"))
    assert "This card describes m (changed), compared with m." in card_of(comparison).text


def test_infinite_numbers_stay_out_of_the_front_matter() -> None:
    broken = Estimate(value=math.inf)
    comparison = with_model(made_comparison(without=("tasks",)), perplexity=broken)
    kinds = [result.metric_type for result in card_of(comparison).data.eval_results]
    assert kinds == ["accuracy", "perplexity_ratio", "kl_divergence"]


def folder_with_weights(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"w": torch.full((7,), value)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"value": value}))
    return folder


def measured_in(comparison: Comparison, base: Path, other: Path) -> Comparison:
    return with_model(with_base(comparison, source=str(base)), source=str(other), recipe=None)


@pytest.mark.parametrize("hashed", [True, False])
def test_write_card_hashes_folders_without_a_manifest(tmp_path: Path, hashed: bool) -> None:
    base, other = folder_with_weights(tmp_path / "base", 1.0), tmp_path / "other"
    other.mkdir()
    os.link(base / "model.safetensors", other / "model.safetensors")
    (other / "config.json").write_text("{}")
    comparison = measured_in(made_comparison(), base, other)
    write_card(comparison, comparison.others[0], other / "README.md", hashed=hashed)
    text = (other / "README.md").read_text(encoding="utf-8")
    found = [cells(line)[:5] for line in section(text, "Lineage").splitlines() if line.startswith("| ")][2:]
    expected = []
    for role, of, path in (("input", "base", base), ("output", "", other)):
        for name in ("config.json", "model.safetensors"):
            content = (path / name).read_bytes()
            expected.append([role, of, name, str(len(content)), hashlib.sha256(content).hexdigest() if hashed else ""])
    assert found == expected
    assert sorted(path.name for path in other.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_write_card_reads_the_manifest(tmp_path: Path) -> None:
    base, other = (folder_with_weights(tmp_path / name, n) for n, name in enumerate(("base", "other")))
    keys = ("operation", "parameters", "inputs", "outputs")
    write_manifest(other, **{key: MANIFEST[key] for key in keys})
    comparison = measured_in(made_comparison(), base, other)
    write_card(comparison, comparison.others[0], tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == model_card(
        comparison, comparison.others[0], manifest=read_manifest(other)
    )
    (other / "neuroweave_manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="manifest format None; this version reads format 1"):
        write_card(comparison, comparison.others[0], tmp_path / "card.md")


def test_a_card_that_somebody_wrote_is_not_replaced(tmp_path: Path) -> None:
    comparison = with_model(with_base(made_comparison(), source=""), source="", recipe=None)
    other, path = comparison.others[0], tmp_path / "README.md"
    heads = ("tags: [llama]", "tags: neuroweave", "[: ")
    for own in ("# My model\n", "", *(f"---\n{head}\n---\n# Mine\n" for head in heads)):
        path.write_text(own)
        with pytest.raises(ValueError, match=r"README\.md: not a card that neuroweave wrote.*MODEL_CARD\.md"):
            write_card(comparison, other, path)
        assert path.read_text() == own
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a card that neuroweave wrote"):
        write_card(comparison, other, path)
    write_card(comparison, other, path, overwrite=True)
    first = path.read_text(encoding="utf-8")
    path.write_text(first + "\nmore\n", encoding="utf-8")
    write_card(comparison, other, path)  # one of ours
    assert path.read_text(encoding="utf-8") == first


def test_write_card_of_a_model_in_memory(tmp_path: Path) -> None:
    comparison = with_base(made_comparison(), source="")
    comparison = with_model(comparison, source="", recipe=None)
    write_card(comparison, comparison.others[0], tmp_path / "card.md")
    assert isinstance(comparison.base, Measured)
    assert "## Lineage" not in (tmp_path / "card.md").read_text(encoding="utf-8")
