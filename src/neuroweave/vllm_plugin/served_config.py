"""The config of a patched model as vLLM gets it: the family's own, but no engine can take it for the unpatched model.

`NeuroweaveConfig` gives back the family's fields as they were, `hidden_act: silu` among them. In vLLM another class
can be chosen by name (`--hf-overrides`, `--model-impl`), which would then compute the unpatched model without a word.
So the fields that name an activation stay sealed until our own classes read them.
"""

from __future__ import annotations

import copy
import copyreg
from typing import Any

from neuroweave.checkpoint.sealed import KEY, MODEL_TYPE
from neuroweave.surgery.modeling import NeuroweaveConfig, config_class, register_family
from neuroweave.vllm_plugin.decisions import architecture_of


class ServedConfig(NeuroweaveConfig):
    """What `AutoConfig` gives in vLLM's processes for `model_type: neuroweave`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for name in activation_fields(config):
            setattr(config, name, MODEL_TYPE)
        config.architectures = [architecture_of(config)]
        copyreg.pickle(type(config), reduce)
        return result


def activation_fields(config: Any) -> dict[str, str]:
    """Field -> the activation of the unpatched model, for those that stay sealed."""
    fields = getattr(config, KEY)["base"]["fields"]
    return {name: value for name, value in fields.items() if isinstance(value, str) and "." not in name}


def opened(config: Any) -> Any:
    """A copy whose fields name the family's activations again, for a class that applies the plan.

    The Auto classes of this process know it afterwards (a config that was unpickled they do not).
    """
    config = copy.deepcopy(config)
    for name, value in activation_fields(config).items():
        setattr(config, name, value)
    register_family(type(config).__mro__[2], getattr(config, KEY)["base"]["class"])
    return config


def reduce(config: Any) -> tuple[Any, ...]:
    """For pickle: the class of a patched family's config is made at run time, so it is made again."""
    return restore, (type(config).__mro__[2], vars(config))


def restore(family: type, state: dict[str, Any]) -> Any:
    config = object.__new__(config_class(family))
    vars(config).update(state)
    copyreg.pickle(type(config), reduce)
    return config
