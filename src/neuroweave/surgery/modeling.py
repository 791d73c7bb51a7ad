"""Patched models as transformers sees them: a config and model classes of their own, made for each family.

A patched checkpoint says `model_type: neuroweave`, `architectures: [NeuroweaveForCausalLM]`, `hidden_act: neuroweave`
and keeps what it was, the recipe and its plan under the key `neuroweave`. Engines that know nothing of a recipe meet
names that they refuse; transformers finds `NeuroweaveConfig` (registered by `import neuroweave`, or loaded from the
checkpoint's own copy of this code with trust_remote_code), which builds the original family's config and model classes
with the plan applied. Those classes are subclasses made here: the library's own stay as they are.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from neuroweave.activations.mixtures import NeuronMixture
from neuroweave.checkpoint.sealed import ARCHITECTURE, KEY, MODEL_TYPE, MODELING_FILE, seal, unseal
from neuroweave.surgery.apply import ActivatedProjection, Undo, apply_plan, once

# ---------------------------------------------------------------------------------------------------------- config


class PatchedConfig:
    """Mixed into a family's config class: reads and writes the sealed form."""

    neuroweave: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if KEY in config_dict:
            return NeuroweaveConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        plain = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        if KEY not in plain:  # a default instance, made by transformers to compare with
            return json.dumps(plain)
        return json.dumps(seal(plain, ACT2CLS), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / MODELING_FILE).write_text(modeling_source(self.neuroweave["base"]["model_type"]))


class NeuroweaveConfig(PreTrainedConfig):
    """The way in: `from_dict` gives the original family's config, as a subclass that carries recipe and plan."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if KEY not in config_dict:
            raise ValueError(f"model_type is {MODEL_TYPE!r}, but config.json has no {KEY!r} entry: not a patched model")
        plain = unseal(config_dict)
        try:
            base = CONFIG_MAPPING[plain["model_type"]]
        except KeyError:
            raise ValueError(
                f"the patched model is a {plain['model_type']!r}, which this version of transformers does not know"
            ) from None
        result = base.from_dict(plain, **kwargs)
        adopt(result[0] if isinstance(result, tuple) else result, config_dict[KEY])
        return result


def adopt(config: PreTrainedConfig, entry: dict[str, Any]) -> None:
    """Make a family's config object that of a patched model, in place (submodules hold references to it)."""
    base = type(config)
    config.__class__ = config_class(base)
    vars(config).pop("model_type", None)  # the class says it; as the family's, Liger would take the model for its own
    config.neuroweave = copy.deepcopy(entry)
    config.architectures = [ARCHITECTURE]
    register_family(base, entry["base"]["class"])


def release(config: PreTrainedConfig) -> None:
    """Undo `adopt`."""
    config.architectures = config.neuroweave["base"]["architectures"]
    del config.neuroweave
    config.__class__ = type(config).__mro__[2]


@once
def config_class(base: type[Any]) -> type[Any]:
    names = {"model_type": MODEL_TYPE, "__module__": __name__}
    return type(f"Neuroweave{base.__name__}", (PatchedConfig, base), names)


# ----------------------------------------------------------------------------------------------------------- model


class PatchedModel:
    """Mixed into a family's model class: builds the family's model, then applies the config's plan to this instance."""

    _neuroweave_undo: list[Undo]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self._neuroweave_undo = apply_plan(self, *plan_for(self, config.neuroweave))  # type: ignore[arg-type]

    @classmethod
    def _family_config(cls, config: Any) -> Any:
        """The config that the family's class is built from: of a multimodal one, the text model's part."""
        if config is None or isinstance(config, cls.__mro__[2].config_class):  # type: ignore[attr-defined]
            return config
        text, entry = config.get_text_config(), copy.deepcopy(config.neuroweave)
        entry["base"]["model_type"] = type(text).model_type
        adopt(text, entry)
        return text

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return super()._from_config(cls._family_config(config), **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        kwargs["config"] = cls._family_config(kwargs.get("config"))
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        ours = {
            name for name, module in model.named_modules() if isinstance(module, NeuronMixture | ActivatedProjection)
        }
        missing = sorted(key for key in info["missing_keys"] if key.rpartition(".")[0] in ours)
        if missing:
            raise ValueError(
                f"{source}: {missing[0]} and {len(missing) - 1} more weights that the patch needs are missing; "
                f"the checkpoint is incomplete"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: weights are renamed and initialised exactly as in the family's own class."""
        return False

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's: resizing makes a new output projection, so the patch is lifted and laid again."""
        for undo in self._neuroweave_undo:
            undo()
        try:
            return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        finally:
            plan = plan_for(self, self.config.neuroweave)  # type: ignore[attr-defined, arg-type]
            self._neuroweave_undo = apply_plan(self, *plan)  # type: ignore[arg-type]


def plan_for(model: PreTrainedModel, entry: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The plan, and the path prefix to take off: none for the class it was made on, else the base model's.

    Raises ValueError for a plan that a model without output projection would drop.
    """
    if type(model).__mro__[2].__name__ == entry["base"]["class"]:
        return entry["plan"], ""
    prefix = entry["base"]["prefix"]
    outside = [edit["path"] for edit in entry["plan"] if not edit["path"].startswith(prefix)]
    if outside:
        raise ValueError(
            f"the recipe changes {outside[0]!r}, which {type(model).__mro__[2].__name__} does not have; "
            f"load the model with AutoModelForCausalLM"
        )
    return entry["plan"], prefix


@once
def model_class(base: type[Any], config: type[Any]) -> type[Any]:
    """The patched class of a family's model class; weights are renamed on loading and saving as in the family's."""
    name = f"Neuroweave{base.__name__}"
    family = config.__mro__[2].model_type  # type: ignore[attr-defined]
    conversions = get_checkpoint_conversion_mapping(base.__name__) or get_checkpoint_conversion_mapping(family)
    if conversions is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return type(name, (PatchedModel, base), {"config_class": config, "__module__": __name__})


@once
def register_family(base: type[Any], class_name: str) -> None:
    """Tell the Auto classes which patched classes belong to a family's patched config.

    `class_name`: the family's class that was patched, for text models that AutoModelForCausalLM itself does not list.
    """
    config = config_class(base)
    for auto in (AutoModel, AutoModelForCausalLM):
        family_class = family_model(auto, base)
        if family_class is None and auto is AutoModelForCausalLM:
            family_class = getattr(transformers, class_name, None)
        if family_class is not None:
            auto.register(config, model_class(family_class, config), exist_ok=True)


def family_model(auto: type, config: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """The class that an Auto class would use for a family's config, or None."""
    mapping = auto._model_mapping  # type: ignore[attr-defined]
    found = mapping.get(config, None)
    return found[0] if isinstance(found, tuple) else found


class NeuroweaveModel:
    """The name that `auto_map` gives for AutoModel; hands over to the family's patched class."""

    auto: type = AutoModel

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            config = NeuroweaveConfig.from_pretrained(source)
        return cls.auto.from_pretrained(source, *args, config=config, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls.auto.from_config(config, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: `config.save_pretrained` writes the code and the auto_map."""


class NeuroweaveForCausalLM(NeuroweaveModel):
    """The name that `auto_map` gives for AutoModelForCausalLM."""

    auto: type = AutoModelForCausalLM


def modeling_source(model_type: str) -> str:
    """The text of the self-contained modelling file: this file itself when it is one, else bundled from the package.

    `model_type`: of the model that was patched.
    """
    if Path(__file__).name == MODELING_FILE:
        return Path(__file__).read_text()
    try:  # inside `try`, transformers does not count the import as a requirement of a checkpoint's code
        from neuroweave.surgery.bundle import bundle
    except ImportError as error:
        raise ImportError(f"{MODELING_FILE} cannot be written without the neuroweave package") from error
    return bundle(model_type)


def register() -> None:
    """Let AutoConfig know patched checkpoints."""
    AutoConfig.register(MODEL_TYPE, NeuroweaveConfig, exist_ok=True)


def __getattr__(name: str) -> Any:
    """Families' patched classes by name (`NeuroweaveLlamaForCausalLM`), so that pickles find them again."""
    base: Any = getattr(transformers, name.removeprefix("Neuroweave"), None) if name.startswith("Neuroweave") else None
    if base is None or not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, PreTrainedConfig):
        return config_class(base)
    family: Any = base
    return model_class(family, config_class(family.config_class))


if __name__ == "neuroweave.surgery.modeling":  # not in a checkpoint's copy: that one speaks for its checkpoint alone
    register()
