"""Benchmarks: questions of lm-evaluation-harness put to a model in memory, and differences paired over the questions.

Needs `pip install "neuroweave[eval]"`. Tasks whose data is on this machine run without a network.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from neuroweave.diagnose.bootstrap import LEAST_UNITS, Bootstrap
from neuroweave.diagnose.probes.task_files import Wanted, find_tasks, shipped_tasks, write_for_harness
from neuroweave.diagnose.results.plan import TaskPlan
from neuroweave.diagnose.results.records import Record
from neuroweave.diagnose.results.tasks import TaskDifference, TaskScore
from neuroweave.diagnose.subject import Subject, at_rest


class TaskRun(Record):
    """What one model made of one task. Of a group that the harness sums up: its scores only."""

    task: str
    version: str
    harness: str = Field(description="version of lm-evaluation-harness")
    shots: int = Field(description="solved examples before each question")
    seed: int = Field(description="of the choice of those examples, and of sampled answers")
    sha256: str = Field(description="of all questions, prompts and right answers, in order")
    truncated: int = Field(description="questions of which the model could not hold the whole context")
    scores: tuple[TaskScore, ...]
    questions: dict[str, tuple[float, ...]] = Field(
        description="by metric: the score of every question, for metrics that are their mean"
    )


def require_tasks_extra() -> None:
    """Raise ImportError, saying what to install, unless lm-evaluation-harness is there."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'benchmarks need {" and ".join(missing)}: pip install "neuroweave[eval]"')


def run_tasks(
    subject: Subject,
    plan: TaskPlan,
    *,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[TaskRun]:
    """The model's scores on every task of the plan, in the order of the plan. The model is left as it was.

    `progress`: called with the answers so far and how many there are in all; may begin again for another kind of task.
    Raises ImportError without the `eval` extra, and ValueError for a task that is not known or cannot be loaded, a
    limit beyond every task, and a model that gives no numbers.
    """
    wanted = find_tasks(plan.names)
    require_tasks_extra()
    from neuroweave.diagnose.probes.harness import HarnessModel, own_randomness, quiet, run_harness

    with (
        tempfile.TemporaryDirectory(prefix="neuroweave-tasks-") as folder,
        quiet() as heard,
        own_randomness(seed),
        at_rest(subject.model),
    ):
        loaded = load_tasks(wanted, Path(folder), seed=seed)
        check_limit(loaded["tasks"], plan.limit)
        model = HarnessModel(subject, progress=heard(progress))
        results = run_harness(model, loaded, limit=plan.limit)
        runs = [task_run(name, results, model.truncated, seed=seed) for name in (*loaded["groups"], *loaded["tasks"])]
    return [run for run in runs if run.scores]  # most groups are not summed up


def load_tasks(wanted: Wanted, folder: Path, *, seed: int) -> dict[str, Any]:
    """The harness's tasks and groups, by name, with their data. Raises ValueError for what cannot be loaded."""
    from lm_eval.tasks import TaskManager

    definitions = folder / "definitions"
    definitions.mkdir()
    write_for_harness(wanted.files, definitions, cache=folder / "data")
    # Its own 14,683 tasks (0.4.13) take the harness 9 seconds to list: only when one of them is asked for.
    manager = TaskManager(include_path=str(definitions), include_defaults=not wanted.only_files)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in wanted.names:
        if name not in manager.task_index:
            raise ValueError(unknown_task(name, manager.all_tasks))
        try:
            found = manager.load([name])
        except Exception as error:
            raise ValueError(unloadable(name, wanted, error)) from error
        twice = loaded["tasks"].keys() & found["tasks"].keys()
        if twice:
            raise ValueError(f"task {min(twice)} is asked for twice, once as part of {name}; name it once")
        loaded["tasks"] |= found["tasks"]
        loaded["groups"] |= found.get("groups", {})
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def unknown_task(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, [*shipped_tasks(), *known], n=3)
    like = f"did you mean {' or '.join(close)}?" if close else f"shipped is {', '.join(shipped_tasks())};"
    here = f" ./{name} for the folder that is here," if Path(name).is_dir() else ""
    return f"task {name!r} is not known; {like} give{here} a name of lm-evaluation-harness or the path of a YAML file"


def unloadable(name: str, wanted: Wanted, error: Exception) -> str:
    """Why a task could not be loaded: its data is elsewhere, or its definition is wrong."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ConnectionError):
        return (
            f"task {name}: its data is on the Hugging Face hub, which cannot be reached ({said}); run it once with a "
            f"network, or take a task whose data is on this machine, such as {', '.join(shipped_tasks())}"
        )
    path = next((f" ({file.path})" for file in wanted.files if file.name == name), "")
    return f"task {name}{path}: lm-evaluation-harness cannot load it: {type(error).__name__}: {said}"


def check_limit(tasks: Mapping[str, Any], limit: int | None) -> None:
    """Raise ValueError for a limit that is beyond every task; a task that has fewer questions is asked all of them."""
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    if limit is not None and limit > max(sizes.values()):
        said = ", ".join(f"{name} has {size}" for name, size in list(sizes.items())[:5])
        raise ValueError(f"a limit of {limit} questions is more than there are ({said}); give a lower one, or none")


def task_run(name: str, results: Mapping[str, Any], truncated: set[tuple[str, str]], *, seed: int) -> TaskRun:
    """The harness's results of one task or group, in our own form."""
    import lm_eval

    samples = sorted(results["samples"].get(name, []), key=lambda sample: (sample["filter"], sample["doc_id"]))
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    asked = next(iter(by_filter.values()), [])
    scores, questions = [], {}
    for key, value in results["results"].get(name, {}).items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not is_number(value):
            continue
        label = metric if kind == "none" else f"{metric} ({kind})"
        scores.append(task_score(name, metric, kind, results, label=label))
        each = [sample.get(metric) for sample in by_filter.get(kind, [])]
        if each and all(is_number(one) for one in each):
            numbers = tuple(float(one) for one in each if one is not None)
            if math.isclose(sum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12):
                questions[label] = numbers
    return TaskRun(
        task=name,
        version=str(results["versions"].get(name)),
        harness=lm_eval.__version__,
        shots=int(results["n-shot"].get(name) or 0),
        seed=seed,
        sha256=questions_sha256(asked),
        truncated=sum(
            # What is to be written has settings in the place of an answer.
            any(isinstance(request[-1], str) and tuple(request) in truncated for request in sample["arguments"])
            for sample in asked
        ),
        scores=tuple(scores),
        questions=questions,
    )


def task_score(name: str, metric: str, kind: str, results: Mapping[str, Any], *, label: str) -> TaskScore:
    found = results["results"][name]
    error = found.get(f"{metric}_stderr,{kind}")
    better = (results["higher_is_better"].get(name) or {}).get(metric)
    return TaskScore(
        task=name,
        version=str(results["versions"].get(name)),
        metric=label,
        higher_is_better=better is not False,
        value=float(found[f"{metric},{kind}"]),
        standard_error=float(error) if is_number(error) and math.isfinite(error) else None,
        questions=int(found.get("sample_len", 0)),
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating))


def questions_sha256(samples: Sequence[Mapping[str, Any]]) -> str:
    """Of what was asked, prompts with their examples included, and what would have been right."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample['doc_id']} {sample['doc_hash']} {sample['target_hash']}\n".encode())
        digest.update(repr([str(request[0]) for request in sample["arguments"]]).encode())
    return digest.hexdigest()


def task_differences(
    base: Sequence[TaskRun], other: Sequence[TaskRun], *, resamples: int, seed: int
) -> list[TaskDifference]:
    """Other minus base for every metric that is a mean over questions, with a bootstrap over the questions.

    Both are resampled together, so equal models differ by exactly 0. Raises ValueError when the two did not answer the
    same questions.
    """
    theirs = {run.task: run for run in other}
    differences = []
    for run in base:
        if run.task not in theirs or theirs[run.task].sha256 != run.sha256:
            raise ValueError(f"task {run.task}: the models were not asked the same questions; run both again")
        for score in run.scores:
            if score.metric not in run.questions:
                continue
            pairs = (run.questions[score.metric], theirs[run.task].questions[score.metric])
            differences.append(paired(score, pairs, resamples=resamples, seed=seed))
    return differences


def paired(
    score: TaskScore, pairs: tuple[Sequence[float], Sequence[float]], *, resamples: int, seed: int
) -> TaskDifference:
    """`pairs`: the base's and the other's score of every question."""
    ours, theirs = (np.asarray(side, dtype=np.float64) for side in pairs)
    bootstrap = Bootstrap(len(ours), resamples=resamples, seed=seed, least=LEAST_UNITS)
    return TaskDifference(
        task=score.task,
        metric=score.metric,
        higher_is_better=score.higher_is_better,
        difference=bootstrap.estimate(theirs - ours, np.ones(len(ours))),
        questions=len(ours),
        changed=int((theirs != ours).sum()),
    )
