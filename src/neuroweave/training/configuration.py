"""What a person writes to train a model: a YAML file of typed fields, with presets for what it does not say.

preset: laptop                        # or published; fields below win over it
tokenizer: {path: my-tokenizer}
data: {sources: [{path: texts/}]}
output: {folder: runs/first}
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuroweave.training.sources import Source

# Sample i and the model are the same whatever these say, so a resumed run may change them.
FREE = (
    "preset", "metrics.", "output.", "data.store", "training.steps", "training.epochs", "training.decay_steps",
    "training.micro_batch_size", "training.workers", "training.gradient_checkpointing", "training.compile", "jax.",
)  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """Which model is trained."""

    path: str | None = Field(None, description="A model to go on with: a folder or a hub id. Else a fresh NeuroBLAST.")
    preset: Literal["default", "small", "tiny"] = Field("small", description="Size of a fresh NeuroBLAST.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Fields of NeuroBlastConfig that differ from the preset (docs/neuroblast.md)."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if self.path is not None and self.settings:
            raise ValueError("settings are of a fresh model; leave them out, or leave out model.path")
        return self


class TokenizerSection(Section):
    """How text becomes tokens."""

    path: str | None = Field(None, description="A folder or a hub id. Default: the one that comes with model.path.")


class DataSection(Section):
    """What the model reads."""

    sources: list[Source] = Field(
        default_factory=lambda: [Source(path="shipped:training")],
        min_length=1,
        description="Text, jsonl, parquet or a hub dataset, each {path: ...} (docs/training_data.md).",
    )
    sequence_length: int = Field(512, ge=2, description="Tokens of a row.")
    packing: bool = Field(
        True, description="Put several documents in a row, shut off from each other. false: a document a row, padded."
    )
    held_out: float = Field(
        0.01, ge=0, lt=1, description="Fraction of the documents that is kept for evaluation; 0: no evaluation."
    )
    store: str | None = Field(None, description="Folder of the tokenised text. Default: `data` in output.folder.")
    streaming: bool = Field(False, description="Tokenise while training, prepare nothing (docs/training_data.md).")
    end_of_document: bool = Field(True, description="Put the tokenizer's end token after each document.")


class TrainingSection(Section):
    """How the weights are found."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps. Give this or epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data. Give this or steps.")
    batch_size: int = Field(16, ge=1, description="Rows of an optimizer step, over all processes.")
    micro_batch_size: int = Field(4, ge=1, description="Rows of one pass on one device; the rest is accumulated.")
    learning_rate: float = Field(1e-3, gt=0, description="At its highest.")
    schedule: Literal["wsd", "cosine", "linear", "constant"] = Field(
        "wsd", description="wsd: warm up, stay, decay. cosine, linear: decay all the time. constant: after the warmup."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps in which the learning rate rises from 0.")
    decay_steps: int | None = Field(
        None, ge=0, description="Steps in which it falls at the end (wsd only). Default: a fifth of all."
    )
    decay_shape: Literal["cosine", "linear", "1-sqrt"] = Field("cosine", description="Of the decay of wsd.")
    final_learning_rate: float = Field(0.0, ge=0, le=1, description="What is left at the end, as a fraction (wsd).")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW; norms and biases have none.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Of AdamW: memory of the gradient.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Of AdamW: memory of its square.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Of AdamW: keeps the division finite.")
    parts: Literal["all", "mlp", "mixtures"] = Field(
        "all", description="Which weights are trained. mixtures: gating_logits and beta of learned mixtures alone."
    )
    gate_entropy: float = Field(
        0.0, ge=0, description="Weight of the mean entropy of mixtures' gates in the loss: makes neurons decide."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target that is spread over all tokens.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0: not clipped.")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Of the arithmetic; weights stay in float32. auto: bfloat16 where the hardware has it."
    )
    tf32: bool = Field(True, description="Let NVIDIA GPUs multiply float32 matrices in TF32.")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention", "splash"] = Field(
        "auto", description="Implementation of attention. auto: transformers' choice; with JAX, splash on TPUs."
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations twice to hold fewer of them.")
    compile: bool = Field(False, description="Run the model through torch.compile.")
    workers: int = Field(0, ge=0, description="Processes that read rows ahead. Rows are cheap: 0 is mostly best.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the fresh weights, the order of the rows and dropout.")

    @model_validator(mode="after")
    def _adds_up(self) -> TrainingSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; give one of them")
        if self.steps is None and self.epochs is None:
            raise ValueError("neither steps nor epochs is given; give one of them")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def accumulation(self, places: int, *, called: str = "processes") -> int:
        """Passes of a step, over `places` that each take other rows. Raises ValueError when it cannot be divided."""
        passes, rest = divmod(self.batch_size, self.micro_batch_size * places)
        if rest or not passes:
            raise ValueError(
                f"training.batch_size {self.batch_size} cannot be divided among {places} {called} of "
                f"{self.micro_batch_size} rows (micro_batch_size); make it a multiple of "
                f"{self.micro_batch_size * places}, or micro_batch_size smaller"
            )
        return passes

    def decay(self, steps: int) -> int:
        """Steps of the decay at the end of `steps`. Raises ValueError when warmup and decay do not fit."""
        decay = steps // 5 if self.decay_steps is None else self.decay_steps
        if self.warmup_steps + (decay if self.schedule == "wsd" else 0) > steps:
            raise ValueError(
                f"training.warmup_steps {self.warmup_steps} and decay_steps {decay} are more than the {steps} steps; "
                f"make them smaller"
            )
        return decay


class JaxSection(Section):
    """How the JAX backend lays the model over devices; the torch backend does not look at it (docs/jax.md)."""

    data: int | None = Field(
        None, ge=1, strict=True, description="Groups of devices that each hold the model. Default: as many as fit."
    )
    fsdp: int = Field(1, ge=1, strict=True, description="Devices that share the weights and take other rows.")
    tensor: int = Field(1, ge=1, strict=True, description="Devices that share the weights and the rows.")
    remat: Literal["auto", "none", "dots", "full"] = Field(
        "auto",
        description="What is computed twice: all but matrix products, or all. auto: training.gradient_checkpointing.",
    )

    @property
    def shards(self) -> int:
        """Devices that share one copy of the weights."""
        return self.fsdp * self.tensor


class MetricsSection(Section):
    """What is measured and where it is told; `metrics.jsonl` is always written."""

    log_every: int = Field(10, ge=1, description="Steps between two lines.")
    evaluate_every: int | None = Field(
        None, ge=1, description="Steps between evaluations. Default: as output.save_every."
    )
    held_out_rows: int = Field(256, ge=1, description="At most so many rows are evaluated.")
    report_to: list[str] = Field(default_factory=list, description="tensorboard, trackio, wandb: also tell these.")


class OutputSection(Section):
    """What is written."""

    folder: str = Field(description="The run's folder: checkpoints, metrics, and in `model` the trained model.")
    save_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="How many checkpoints stay.")


class TrainConfiguration(Section):
    """All of it."""

    preset: Literal["published", "laptop"] | None = Field(None, description="Defaults for what is not said here.")
    model: ModelSection = Field(default_factory=ModelSection, description=str(ModelSection.__doc__))
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection, description=str(TokenizerSection.__doc__))
    data: DataSection = Field(default_factory=DataSection, description=str(DataSection.__doc__))
    training: TrainingSection = Field(description=str(TrainingSection.__doc__))
    jax: JaxSection = Field(default_factory=JaxSection, description=str(JaxSection.__doc__))
    metrics: MetricsSection = Field(default_factory=MetricsSection, description=str(MetricsSection.__doc__))
    output: OutputSection = Field(description=str(OutputSection.__doc__))

    @model_validator(mode="after")
    def _has_a_tokenizer(self) -> TrainConfiguration:
        if self.tokenizer.path is None and self.model.path is None:
            raise ValueError(
                "tokenizer.path is missing: a fresh model needs one (neuroweave tokenizer train makes one)"
            )
        return self

    def what_shapes_the_run(self) -> dict[str, Any]:
        """The fields that a resumed run must share with its beginning, by dotted name; the others may change."""
        flat = dict(flatten(self.model_dump(mode="json")))
        return {name: value for name, value in flat.items() if not name.startswith(FREE)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What shapes a run that says nothing: what a field meant before there was such a field."""
        least = {"tokenizer": {"path": "none"}, "training": {"steps": 1}, "output": {"folder": "none"}}
        return cls.model_validate(least).what_shapes_the_run()

    def what_all_hosts_share(self) -> dict[str, Any]:
        """Every field, by dotted name: the hosts of one run must agree on all of them."""
        return dict(flatten(self.model_dump(mode="json")))

    def fingerprint(self) -> str:
        text = json.dumps(self.what_shapes_the_run(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


PRESETS: dict[str, dict[str, Any]] = {
    "published": {  # NeuroBLAST V3 as it was trained
        "model": {"preset": "default"},
        "tokenizer": {"path": "PleIAs/Baguettotron"},
        "data": {
            "sources": [{"path": "PleIAs/SYNTH", "kind": "hub", "chat": "synth"}],
            "sequence_length": 1280,
            "held_out": 0.0005,
        },
        "training": {
            "steps": 195_312,
            "batch_size": 64,
            "micro_batch_size": 2,
            "learning_rate": 4e-3,
            "decay_steps": 20_000,
            "seed": 3407,
        },
        "metrics": {"evaluate_every": 2000},
        "output": {"save_every": 2000},
    },
    "laptop": {  # an hour or two on a few CPU cores, minutes on a GPU
        "model": {"preset": "small"},
        "data": {"sequence_length": 256, "held_out": 0.02},
        "training": {"steps": 1000, "batch_size": 16, "micro_batch_size": 8, "warmup_steps": 50, "decay_steps": 300},
        "output": {"save_every": 200},
    },
}


def read_configuration(path: str | Path, settings: Sequence[str] = ()) -> TrainConfiguration:
    """The configuration in a YAML file; `settings` such as `training.steps=10` win over it. Raises ValueError."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file; neuroweave train --init laptop prints one to begin with")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping of sections was expected, such as `training: {{steps: 100}}`")
    for setting in settings:
        put_setting(content, setting)
    return build_configuration(content, where=str(path))


def build_configuration(content: dict[str, Any], *, where: str = "configuration") -> TrainConfiguration:
    """The configuration of a dictionary, its preset filled in. Raises ValueError that names every bad field."""
    preset = content.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"{where}: preset {preset!r} is not known; choose from {', '.join(PRESETS)}")
    merged = merge(PRESETS[preset], content) if preset else content
    try:
        return TrainConfiguration.model_validate(merged)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from error


def merge(defaults: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """`said` over `defaults`, section by section; steps and epochs exclude each other."""
    merged = dict(defaults)
    for name, value in said.items():
        below = merged.get(name)
        merged[name] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    if "epochs" in said and "steps" not in said:
        merged.pop("steps", None)
    if "path" in said and said["path"] is not None:
        merged.pop("preset", None) if "settings" not in said else None
    return merged


def put_setting(content: dict[str, Any], setting: str) -> None:
    """Put `a.b=value` into nested dictionaries; the value is read as YAML. Raises ValueError."""
    name, equals, text = setting.partition("=")
    *sections, last = (part.strip() for part in name.split("."))
    if not equals or not last or not all(sections):
        raise ValueError(f"--set takes SECTION.FIELD=VALUE, such as training.steps=100, got {setting!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {setting}: the value is no YAML ({' '.join(str(error).split())})") from error
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"--set {setting}: {section} is no section")
    content[last] = value


def explain(error: ValidationError) -> str:
    """Every problem in one line; an unknown field with the nearest known one."""
    return "; ".join(explain_one(problem) for problem in error.errors())


def explain_one(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = fields_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{place} is no field" + (f" (did you mean {close[0]!r}?)" if close else f"; known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{place} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool | None) else ""
    return f"{place}: {message}{shown}" if place else message


def fields_at(place: Iterable[Any]) -> list[str]:
    """The names of the fields of the section at a place such as ("data", "sources", 0)."""
    section: Any = TrainConfiguration
    for part in place:
        if isinstance(part, int):
            section = Source
        elif part in getattr(section, "model_fields", {}):
            section = section.model_fields[part].annotation
    return list(getattr(section, "model_fields", {}))


def flatten(section: dict[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """("training.steps", 10) and so on; lists and a model's settings stay whole."""
    for name, value in section.items():
        if isinstance(value, dict) and name != "settings":
            yield from flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def commented_configuration(preset: str) -> str:
    """A YAML text with every field, its description and the value that the preset gives it."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not known; choose from {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    lines = [f"preset: {preset}  # the values below are the preset's: what you leave out stays so"]
    for section, field in TrainConfiguration.model_fields.items():
        if section == "preset":
            continue
        lines += ["", f"{section}:  # {field.description}"]
        for name, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            default = None if inner.is_required() else inner.get_default(call_default_factory=True)
            value = chosen.get(section, {}).get(name, default)
            if name == "sources":
                value = [
                    Source.model_validate(source).model_dump(mode="json", exclude_defaults=True) for source in value
                ]
            value = "runs/first" if (section, name) == ("output", "folder") else value
            value = "my-tokenizer" if (section, name) == ("tokenizer", "path") and value is None else value
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"  {name}: {text}  # {inner.description}")
    return "\n".join(lines) + "\n"
