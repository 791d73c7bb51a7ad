"""Benchmarks against plain forward passes of transformers, NumPy and SciPy; models and machine left alone."""

from __future__ import annotations

import copy
import json
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from lm_eval import tasks as harness_tasks
from tiny_llama import WORDS, changed, subject, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroweave.diagnose.probes import harness, tasks
from neuroweave.diagnose.probes.tasks import TaskRun, run_tasks, task_differences
from neuroweave.diagnose.results.plan import TaskPlan
from neuroweave.diagnose.subject import Subject, at_rest
from neuroweave.text import documents

ROOT = Path(__file__).parents[1]
SHIPPED = "neuroweave_continuation"
SHIPPED_DATA = ROOT / "src/neuroweave/diagnose/tasks/continuation.jsonl"
CHOICE = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "passage",
    "doc_to_choice": "ends",
    "doc_to_target": "label",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    "metadata": {"version": 3},
}


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def questions(count: int, *, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Passages of random words with ends of 1, 1, 2 and 7 words."""
    draw = random.Random(seed)
    return [
        {
            "passage": words(draw, draw.randint(1, longest)),
            "ends": [words(draw, length) for length in (1, 1, 2, 7)],
            "label": draw.randrange(4),
        }
        for _ in range(count)
    ]


def write_task(folder: Path, records: list[dict[str, Any]] | None = None, **entries: Any) -> Path:
    """A task file in `folder` and the data beside it."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(record) for record in records if records] if records else []
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump({"task": "words", **CHOICE, **entries}), encoding="utf-8")
    return file


def plan(*names: str | Path, limit: int | None = None) -> TaskPlan:
    return TaskPlan(names=tuple(str(name) for name in names), limit=limit)


def log_likelihood(model: torch.nn.Module, context: list[int], answer: list[int]) -> float:
    """Of the answer, from one plain forward pass over both, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0].double().numpy()
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return float(sum(logits[len(context) - 1 + at, token] for at, token in enumerate(answer)))


def answers(model: torch.nn.Module, tokenizer: Any, records: list[dict[str, Any]]) -> np.ndarray:
    """Log-likelihood of each end of each question."""
    found = []
    for record in records:
        context = tokenizer(record["passage"])["input_ids"]
        both = [tokenizer(f"{record['passage']} {end}")["input_ids"] for end in record["ends"]]
        found.append([log_likelihood(model, ids[: len(context)], ids[len(context) :]) for ids in both])
    return np.array(found)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    records = questions(7)
    return write_task(tmp_path_factory.mktemp("seven"), records), records


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TaskRun], list[TaskRun]]:
    """Two models on 123 questions."""
    file = write_task(tmp_path_factory.mktemp("many"), questions(123, seed=3))
    model = tiny_model()
    both = [run_tasks(subject("any", each), plan(file)) for each in (model, changed(model, 0.5))]
    return both[0], both[1]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError(f"the network was asked for: {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("count", [1, 7])
def test_scores_are_those_of_plain_forward_passes(tmp_path: Path, no_network: None, count: int) -> None:
    records, tokenizer, model = questions(count, seed=count), tiny_tokenizer(start=True), tiny_model()
    (run,) = run_tasks(subject("tiny", model, tokenizer), plan(write_task(tmp_path / "t", records)))
    found = answers(model, tokenizer, records)
    lengths = np.array([[len(end) for end in record["ends"]] for record in records])
    labels = np.array([record["label"] for record in records])
    for metric, values in (("acc", found), ("acc_norm", found / lengths)):
        right = (values.argmax(1) == labels).astype(float)
        assert run.questions[metric] == tuple(right)
        (score,) = [score for score in run.scores if score.metric == metric]
        assert score.value == pytest.approx(right.mean())
        error = scipy.stats.sem(right) if count > 1 else None
        assert score.standard_error == (None if error is None else pytest.approx(error))
        assert (score.questions, score.higher_is_better, score.version) == (count, True, "3")
    assert (run.task, run.truncated, run.shots) == ("words", 0, 0)
    assert TaskRun.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize("logit_bytes", [1, 1 << 27])
@pytest.mark.parametrize("can_keep", [True, False])
def test_log_likelihoods(monkeypatch: pytest.MonkeyPatch, logit_bytes: int, can_keep: bool) -> None:
    """Batches of one or of many, logits at the last positions or at all; contexts too long lose their start."""
    monkeypatch.setattr(harness, "LOGIT_BYTES", logit_bytes)
    model, tokenizer, draw = tiny_model(max_position_embeddings=32), tiny_tokenizer(), random.Random(5)
    pairs = [(words(draw, length), " " + words(draw, end)) for length in (1, 3, 31, 32, 60) for end in (1, 2, 9)]
    pairs += [(pairs[0][0], " w5"), (pairs[0][0], " w6")]
    done: list[tuple[int, int]] = []
    reader = harness.HarnessModel(subject("tiny", model, tokenizer), progress=lambda *counts: done.append(counts))
    reader._can_keep = can_keep
    with at_rest(model):
        found = reader.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    for (context, answer), (value, greedy) in zip(pairs, found, strict=True):
        ids, wanted = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        ids = ids[max(len(ids) + len(wanted) - 33, 0) :]
        assert value == pytest.approx(log_likelihood(model, ids, wanted), abs=1e-4)
        with torch.no_grad():
            likeliest = model(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
        assert greedy == (likeliest == wanted)
    assert reader.truncated == {pair for pair in pairs if len(" ".join(pair).split()) > 33}
    assert done[-1] == (len(pairs), len(pairs))


def test_shipped_task_on_a_real_model(smollm2: Path, no_network: None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    (run,) = run_tasks(Subject("SmolLM2", model, tokenizer), plan(SHIPPED, limit=2))
    records = [json.loads(line) for line in SHIPPED_DATA.read_text(encoding="utf-8").splitlines()[:2]]
    right = answers(model, tokenizer, records).argmax(1) == [record["label"] for record in records]
    assert run.questions["acc"] == tuple(right.astype(float))
    assert [score.metric for score in run.scores] == ["acc", "acc_norm"]


def test_shipped_questions_are_as_built() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "build_task.py", "--check"], check=True, capture_output=True)
    texts = {document.name: " ".join(document.text.split()) for document in documents("evaluation")}
    records = [json.loads(line) for line in SHIPPED_DATA.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 203
    assert SHIPPED_DATA.stat().st_size < 150_000
    for record in records:
        follows = [f"{record['passage']} {end}" in texts[record["document"]] for end in record["ends"]]
        assert follows.index(True) == record["label"]
        assert sum(follows) == 1
        assert len(set(record["ends"])) == 4
        assert {len(end.split()) for end in record["ends"]} == {6}


def test_a_model_against_itself_is_exactly_equal(many: tuple[list[TaskRun], list[TaskRun]]) -> None:
    for difference in task_differences(many[0], many[0], resamples=300, seed=1):
        estimate = difference.difference
        assert (estimate.value, estimate.low, estimate.high, difference.changed) == (0, 0, 0, 0)


def test_differences_are_paired_over_questions(many: tuple[list[TaskRun], list[TaskRun]]) -> None:
    base, other = many
    found = task_differences(base, other, resamples=4000, seed=1)
    assert [difference.metric for difference in found] == ["acc", "acc_norm"]
    for difference in found:
        ours, theirs = (np.array(side[0].questions[difference.metric]) for side in (base, other))
        assert difference.difference.value == pytest.approx(theirs.mean() - ours.mean(), abs=1e-12)
        assert difference.changed == np.count_nonzero(ours - theirs) > 0
        assert difference.questions == 123
        reference = scipy.stats.bootstrap(
            (theirs, ours), lambda a, b, axis: (a - b).mean(axis), paired=True, method="percentile", n_resamples=4000
        ).confidence_interval
        # Two draws of 4,000 differ by about a question in 123; unpaired intervals are wider by several.
        assert difference.difference.low == pytest.approx(reference.low, abs=1.5 / 123)
        assert difference.difference.high == pytest.approx(reference.high, abs=1.5 / 123)


def test_differences_need_the_same_questions(
    tmp_path: Path, seven: tuple[Path, list[dict[str, Any]]], many: tuple[list[TaskRun], list[TaskRun]]
) -> None:
    tiny = subject("tiny", tiny_model())
    runs = run_tasks(tiny, plan(seven[0]))
    mirrored = [{**record, "label": 3 - record["label"]} for record in seven[1]]
    for others in ([], many[0], run_tasks(tiny, plan(write_task(tmp_path / "t", mirrored)))):
        with pytest.raises(ValueError, match="task words: the models were not asked the same questions"):
            task_differences(runs, others, resamples=100, seed=0)


def test_the_model_and_the_process_are_left_as_they_were(
    seven: tuple[Path, list[dict[str, Any]]], capfd: pytest.CaptureFixture[str]
) -> None:
    """The harness would tie the untied weights again, switch dropout off and give the tokenizer a padding token."""
    model = tiny_model(tie_word_embeddings=True, attention_dropout=0.5)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    settings, hooks = copy.deepcopy(vars(model.config)), [len(module._forward_hooks) for module in model.modules()]
    folder, cache = set(Path(tempfile.gettempdir()).iterdir()), Path(datasets.config.HF_DATASETS_CACHE)
    cached = set(cache.rglob("*"))
    states = np.random.get_state()[1].tolist(), torch.get_rng_state()
    heard: list[int] = []

    def progress(done: int, total: int) -> None:
        heard.append(done)
        print(f"{done} of {total}")

    run_tasks(subject("tiny", model, tokenizer), plan(seven[0]), progress=progress)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert vars(model.config) == settings
    assert tokenizer.pad_token is None
    assert np.random.get_state()[1].tolist() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert set(Path(tempfile.gettempdir()).iterdir()) - folder == set()
    assert set(cache.rglob("*")) == cached
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines() == [f"{done} of 28" for done in heard]
    assert heard[-1] == 28


def test_random_numbers_from_the_seed_and_the_states_back() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    drawn = []
    for seed in (4, 4, 5):
        with harness.own_randomness(seed):
            drawn.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    assert all(first != last for first, last in zip(drawn[0], drawn[2], strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_bars_of_other_users_are_back_afterwards(seven: tuple[Path, list[dict[str, Any]]]) -> None:
    out = sys.stdout
    assert not datasets.are_progress_bars_disabled()
    with pytest.raises(ValueError, match=r"limit of 8 questions is more than there are \(words has 7\)"):
        run_tasks(subject("tiny", tiny_model()), plan(seven[0], limit=8))
    assert not datasets.are_progress_bars_disabled()
    assert sys.stdout is out


def test_limit_takes_the_first_questions(seven: tuple[Path, list[dict[str, Any]]]) -> None:
    tiny = subject("tiny", tiny_model())
    (whole,), (part,) = (run_tasks(tiny, plan(seven[0], limit=limit)) for limit in (None, 3))
    assert part.questions["acc"] == whole.questions["acc"][:3]
    assert {score.questions for score in part.scores} == {3}


def test_folder_with_a_group_and_an_include(tmp_path: Path) -> None:
    """The group's score is the mean over all questions; its members are not run twice."""
    write_task(tmp_path / "t", questions(5))
    (tmp_path / "t" / "task.yaml").rename(tmp_path / "t" / "words.yaml")
    (tmp_path / "t" / "more.yml").write_text("include: words.yaml\ntask: more\ndescription: 'w1 w2 '\n")
    members = {"group": "both", "task": ["words", "more"]}
    aggregate = {"aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]}
    (tmp_path / "t" / "group.yaml").write_text(yaml.safe_dump(members | aggregate))
    runs = {run.task: run for run in run_tasks(subject("tiny", tiny_model()), plan(tmp_path / "t"))}
    assert list(runs) == ["both", "words", "more"]
    both = [*runs["words"].questions["acc"], *runs["more"].questions["acc"]]
    assert runs["both"].scores[0].value == pytest.approx(np.mean(both))
    assert runs["both"].questions == {}
    assert runs["words"].sha256 != runs["more"].sha256
    (tmp_path / "t" / "group.yaml").write_text(yaml.safe_dump(members))
    assert [run.task for run in run_tasks(subject("tiny", tiny_model()), plan(tmp_path / "t"))] == ["words", "more"]


def test_metrics_that_are_no_mean_have_an_error_and_no_pairs(tmp_path: Path) -> None:
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ]
    records = [{**record, "end": f" {record['ends'][3]}"} for record in questions(9)]
    entries = {"output_type": "loglikelihood", "doc_to_target": "end", "doc_to_choice": None, "metric_list": metrics}
    model, tokenizer = tiny_model(initializer_range=0.05), tiny_tokenizer()  # a spread that a bootstrap can measure
    (run,) = run_tasks(subject("tiny", model, tokenizer), plan(write_task(tmp_path / "t", records, **entries)))
    found = answers(model, tokenizer, records)[:, 3]
    scores = {score.metric: score for score in run.scores}
    assert scores["perplexity"].value == pytest.approx(np.exp(-found.mean()), rel=1e-4)
    assert not scores["perplexity"].higher_is_better
    spread = np.exp(-np.random.default_rng(0).choice(found, (2000, 9)).mean(1)).std()
    assert scores["perplexity"].standard_error == pytest.approx(spread, rel=0.15)
    assert run.questions.keys() == {"acc"}


def test_written_answers(tmp_path: Path) -> None:
    """Half of the right answers are what the model writes."""
    model, tokenizer, draw = tiny_model(), tiny_tokenizer(), random.Random(2)
    records: list[dict[str, Any]] = []
    for number in range(6):
        passage = words(draw, 5 + number)
        ids = tokenizer(passage, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        records.append({"passage": passage, "end": tokenizer.decode(written) if number % 2 else "w0 w0 w0"})
    entries = {
        "output_type": "generate_until",
        "doc_to_target": "end",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (run,) = run_tasks(subject("tiny", model, tokenizer), plan(write_task(tmp_path / "t", records, **entries)))
    assert run.questions["exact_match"] == (0, 1, 0, 1, 0, 1)


def test_examples_before_questions_are_drawn_with_the_seed(tmp_path: Path) -> None:
    file = write_task(tmp_path / "t", questions(12, longest=3), num_fewshot=2)
    tiny = subject("tiny", tiny_model())
    runs = [run_tasks(tiny, plan(file, limit=5), seed=seed)[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].sha256 != runs[2].sha256
    assert [run.shots for run in runs] == [2, 2, 2]


def test_a_model_that_gives_no_numbers(seven: tuple[Path, list[dict[str, Any]]]) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="broken gives log-likelihoods that are not numbers"):
        run_tasks(subject("broken", model), plan(seven[0]))
    assert not torch.is_inference_mode_enabled()


def test_an_answer_longer_than_the_model_reads(tmp_path: Path) -> None:
    record = {"passage": "w1", "ends": ["w1", words(random.Random(0), 70)], "label": 0}
    with pytest.raises(ValueError, match=r"an answer of 70 tokens, more than tiny can read \(64\)"):
        run_tasks(subject("tiny", tiny_model()), plan(write_task(tmp_path / "t", [record])))


BAD_FILES = {
    "task: [1": "not YAML that can be read",
    "- task": "holds list, not the entries of a task",
    "dataset_path: json": "no `task` .its name. in this file",
    "task: 3\ndataset_path: json": "`task` is 3; expected the task's name",
    "task: words": "no `dataset_path` in this task",
    "task: words\ninclude: other.yaml": "includes other.yaml, which is not there",
    "task: words\ninclude: task.yaml": "includes itself",
    "task: words\ndataset_path: json\ndataset_kwargs: 3": "`dataset_kwargs` is 3",
    "task: words\ndataset_path: json\ndataset_kwargs: {data_files: 3}": "a data file is 3; expected a path",
    "task: words\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}": "data file gone.jsonl is not there",
    "task: words\ndataset_path: json\nwrong: 1\ndataset_kwargs: {data_files: data.jsonl}": "cannot load it.*wrong",
    "task: words\ndataset_path: json\ntest_split: a\noutput_type: multiple_choice\n"
    "dataset_kwargs: {data_files: {test: data.jsonl}}": "cannot load it: KeyError: 'a'",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_task_files(tmp_path: Path, no_network: None, text: str) -> None:
    write_task(tmp_path / "t", questions(2)).write_text(text)
    with pytest.raises(ValueError, match=f"(?s)task.yaml.*{BAD_FILES[text]}"):
        run_tasks(subject("tiny", tiny_model()), plan(tmp_path / "t" / "task.yaml"))


def test_bad_data(tmp_path: Path) -> None:
    file = write_task(tmp_path / "t", questions(2))
    (tmp_path / "t" / "data.jsonl").write_text("{not json")
    with pytest.raises(ValueError, match=r"task words \(.*task.yaml\): lm-evaluation-harness cannot load it"):
        run_tasks(subject("tiny", tiny_model()), plan(file))


@pytest.fixture
def short_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its own tasks, which take it long to list."""
    manager = harness_tasks.TaskManager
    monkeypatch.setattr(
        harness_tasks, "TaskManager", lambda **settings: manager(**{**settings, "include_defaults": False})
    )


def test_names_that_stand_for_nothing(
    tmp_path: Path, short_list: None, monkeypatch: pytest.MonkeyPatch, seven: tuple[Path, list[dict[str, Any]]]
) -> None:
    tiny = subject("tiny", tiny_model())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, said in {
        "neuroweave_continuations": f"not known; did you mean {SHIPPED}[?]",
        "mine": r"'mine' is not known; .* \./mine for the folder that is here",
        "./mine": "mine: no YAML file in this folder defines a task",
        "./gone.yaml": "gone.yaml: no such file or folder",
    }.items():
        with pytest.raises(ValueError, match=said):
            run_tasks(tiny, plan(name))
    with pytest.raises(ValueError, match="no task was given"):
        run_tasks(tiny, TaskPlan(names=()))
    double = write_task(tmp_path / "t", questions(2))
    with pytest.raises(ValueError, match="defines 'words' as well; rename one"):
        run_tasks(tiny, plan(double, seven[0]))


def test_a_task_of_the_hub_without_a_network(tmp_path: Path, short_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/words' on the Hub")

    file = write_task(tmp_path / "t", questions(2), dataset_path="someone/words", dataset_kwargs=None)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=rf"words: its data is on the Hugging Face hub.*such as {SHIPPED}"):
        run_tasks(subject("tiny", tiny_model()), plan(file))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'benchmarks need lm_eval and accelerate: pip install "neuroweave\[eval\]"'):
        run_tasks(subject("tiny", tiny_model()), plan(SHIPPED))


def test_the_harness_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, neuroweave.diagnose.probes.tasks; assert not {'lm_eval', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
