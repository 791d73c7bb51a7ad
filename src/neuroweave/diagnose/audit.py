"""Which nonlinearities a forward pass really runs: an operator-level trace, by module.

What is counted: every call of an ATen operator that is nonlinear by itself, as the dispatcher sees it (a fused kernel
counts once under its own name). `ACTIVATIONS` are the functions that a neuron or a gate can apply; `OTHERS` are listed
apart: the arithmetic of norms, of soft clipping and of rotary positions. An activation that is spelled out shows its
parts: GPT-2's `gelu_new` shows `tanh` and `pow`, `x * sigmoid(x)` shows `sigmoid`. A product of two computed tensors is
not listed (a gated MLP has one in every layer), nor are comparisons, rounding, and maxima of a whole tensor.

What cannot be seen: a kernel launched past the dispatcher (a Triton kernel called from Python). Operators that other
libraries register are seen but not seen into: they are reported as opaque, and a check that forbids something fails on
them. Compiled and scripted modules are refused: their kernels are fused, and their hooks may not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

# ATen operator (without overload, in-place mark and `_backward`): the name in the report.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "threshold": "threshold",
    "leaky_relu": "leaky_relu",
    "rrelu_with_noise": "leaky_relu",
    "_prelu_kernel": "prelu",
    "elu": "elu",
    "celu": "celu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "hardsigmoid": "hardsigmoid",
    "hardswish": "hardswish",
    "hardtanh": "hardtanh",
    "mish": "mish",
    "softplus": "softplus",
    "log_sigmoid_forward": "log_sigmoid",
    "log_sigmoid": "log_sigmoid",
    "softshrink": "softshrink",
    "hardshrink": "hardshrink",
    "glu": "glu",
    "sin": "sin",
    "cos": "cos",
    "sinc": "sinc",
    "sinh": "sinh",
    "cosh": "cosh",
    "tan": "tan",
    "atan": "atan",
    "asinh": "asinh",
    "erf": "erf",
    "erfc": "erf",
    "special_erfcx": "erf",
    "exp": "exp",
    "exp2": "exp",
    "expm1": "exp",
    "logaddexp": "softplus",
    "logaddexp2": "softplus",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_masked_softmax": "softmax",
    "_log_softmax": "log_softmax",
}
OTHERS = {
    "pow": "pow",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "reciprocal": "reciprocal",
    "log": "log",
    "log2": "log",
    "log10": "log",
    "log1p": "log",
    "logsumexp": "logsumexp",
    "abs": "abs",
    "sign": "sign",
    "sgn": "sign",
    "clamp": "clamp",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "maximum": "clamp",
    "minimum": "clamp",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_fused_rms_norm": "rms_norm",
}
GELU_TANH = "gelu_tanh"
FUSED_SOFTMAX = "softmax (fused attention)"
FUSED_ATTENTION = (
    "_scaled_dot_product",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention",
)
ROTARY = {"sin": "sin (rotary)", "cos": "cos (rotary)"}
# A name that --forbid takes: the names in the report that it stands for.
FAMILIES = {name: (name,) for name in [*ACTIVATIONS.values(), *OTHERS.values(), *ROTARY.values(), GELU_TANH]} | {
    "gelu": ("gelu", GELU_TANH),
    "softmax": ("softmax", FUSED_SOFTMAX),
    FUSED_SOFTMAX: (FUSED_SOFTMAX,),
}
# ATen operators that hide whole layers, and namespaces of operators that compute nothing nonlinear.
HIDING = ("lstm", "gru", "rnn_tanh", "rnn_relu", "_thnn_fused", "mkldnn_rnn", "miopen_rnn", "_cudnn_rnn",
          "_transformer_encoder", "_native_multi_head", "_addmm_activation", "_triton")  # fmt: skip
LINEAR = ("transformers::grouped_mm_fallback",)  # registered by transformers: products of matrices, nothing else
TRANSPARENT = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "c10d_functional", "inductor_prims")


@dataclass(frozen=True)
class Run:
    """`count` calls of `operation` directly inside one module; `module` is its path, empty for the model itself."""

    module: str
    module_class: str
    operation: str
    count: int
    kind: str  # "activation", "other" or "opaque"


@dataclass(frozen=True)
class AuditResult:
    """What ran, in the order in which each (module, operation) first ran."""

    runs: tuple[Run, ...]

    def totals(self, kind: str = "activation") -> dict[str, int]:
        """How often each operation of a kind ran in the whole model."""
        totals: Counter[str] = Counter()
        for run in self.runs:
            if run.kind == kind:
                totals[run.operation] += run.count
        return dict(totals)

    def forbidden(self, names: Iterable[str]) -> tuple[Run, ...]:
        """The runs that break a ban on `names`: those that are named, and all opaque ones, which could hide any.

        `gelu` stands for both flavours, `softmax` also for the one in fused attention. ValueError: see `families`.
        """
        banned = families(names)
        return tuple(run for run in self.runs if run.operation in banned or (banned and run.kind == "opaque"))

    def to_json(self) -> dict[str, Any]:
        """Totals by kind, and every run: plain dicts, lists, texts and numbers."""
        fields = ("module", "module_class", "operation", "count", "kind")
        return {
            "totals": {kind: self.totals(kind) for kind in ("activation", "other", "opaque")},
            "runs": [{field: getattr(run, field) for field in fields} for run in self.runs],
        }


def families(names: Iterable[str]) -> set[str]:
    """The names in a report that `names` stand for. Raises ValueError for an unknown one, with the nearest known."""
    reported: set[str] = set()
    for name in names:
        if name not in FAMILIES:
            near = get_close_matches(name, FAMILIES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(FAMILIES))}"
            raise ValueError(f"operation {name!r} is not known; {hint}")
        reported.update(FAMILIES[name])
    return reported


class Recorder(TorchDispatchMode):
    """Counts nonlinear operators, each under the module whose forward is running."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, str, bool]] = []  # path, class name, is it about rotary positions
        self.counts: Counter[tuple[str, str, str, str]] = Counter()

    @property
    def result(self) -> AuditResult:
        counted = self.counts.items()
        return AuditResult(tuple(Run(path, cls, name, count, kind) for (path, cls, name, kind), count in counted))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # flex attention, and what else takes functions
            self.count(f"higher_order::{func.name()}", "opaque")
            return func(*args, **kwargs)
        if arrives_whole(func, args):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        operation, kind = classify(func, args, kwargs, rotary=self.stack[-1][2] if self.stack else False)
        if kind:
            self.count(operation, kind)
        return result

    def count(self, operation: str, kind: str) -> None:
        path, class_name, _ = self.stack[-1] if self.stack else ("", "", False)
        self.counts[path, class_name, operation, kind] += 1


def arrives_whole(func: Any, args: Any) -> bool:
    """Whether PyTorch would now take the operator apart: a composite one without a kernel of its own for the device.

    In inference mode such operators get to the recorder before that is done.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return False
    devices = {value.device.type for value in args if isinstance(value, Tensor)}
    keys = (str(torch._C._dispatch_key_for_device(device)) for device in devices)
    return not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in keys)


def classify(func: Any, args: Any, kwargs: dict[str, Any], *, rotary: bool) -> tuple[str, str]:
    """The name and the kind of an operator call; an empty kind for one that is not listed."""
    full_name = func._schema.name
    if func.namespace not in TRANSPARENT:
        return (full_name, "opaque") if full_name not in LINEAR else ("", "")
    operator = full_name.split("::")[-1]
    if operator.startswith(FUSED_ATTENTION):
        return FUSED_SOFTMAX, "activation"
    if operator.startswith(HIDING):
        return f"aten::{operator}", "opaque"
    for ending in ("_backward_data", "_backward"):
        operator = operator.removesuffix(ending)
    if operator not in ACTIVATIONS and operator not in OTHERS:
        operator = operator.removesuffix("_")
    if not any(isinstance(value, Tensor) and value.dtype.is_floating_point for value in args):
        return "", ""  # positions and masks
    if rotary and operator in ROTARY:
        return ROTARY[operator], "other"
    if operator == "gelu" and "tanh" in (kwargs.get("approximate"), *args[1:]):
        return GELU_TANH, "activation"
    if operator in ACTIVATIONS:
        return ACTIVATIONS[operator], "activation"
    return (OTHERS[operator], "other") if operator in OTHERS else ("", "")


@contextmanager
def trace(model: nn.Module) -> Iterator[Recorder]:
    """Record what `model` runs inside the block; read `.result` after it. No hook is left behind, also on errors.

    Logits are bit-equal to those without the trace. A function under torch.compile runs uncompiled meanwhile, which
    can round differently.
    Raises ValueError for a model with compiled or scripted modules.
    """
    refuse_compiled(model)
    recorder = Recorder()
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)

    def enter(module: nn.Module, args: Any) -> None:
        name = type(module).__name__
        path = path_under(paths[module], recorder.stack[-1][0] if recorder.stack else "")
        recorder.stack.append((path, name, is_rotary(path, name)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.stack.pop()

    with ExitStack() as hooks:
        for module in paths:  # first in, last out: what other hooks of a module run belongs to the module
            hooks.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        with torch.compiler.set_stance("force_eager"), recorder:
            yield recorder


def audit(model: nn.Module, input_ids: Int[Tensor, "batch tokens"]) -> AuditResult:
    """One forward pass of `model` without gradients, and every nonlinearity that ran in it. See `trace`."""
    with torch.no_grad(), trace(model) as recorder:
        model(input_ids)
    return recorder.result


def path_under(paths: list[str], parent: str) -> str:
    """Of the paths of a shared module the one below the module that called it; else its first."""
    return next((path for path in paths if path.startswith(f"{parent}.")), paths[0])


def is_rotary(path: str, class_name: str) -> bool:
    """Whether a module computes rotary or sinusoidal positions: its class, or its own name, says so."""
    names = (class_name.lower(), path.rpartition(".")[2].lower())
    return any(word in name for name in names for word in ("rotary", "rope", "sinusoidal"))


def refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            kind = "compiled (torch.compile)"
        elif isinstance(module, torch.jit.ScriptModule):
            kind = "scripted (torch.jit)"
        else:
            continue
        raise ValueError(
            f"{path or 'the model'} is {kind}, so its operators are fused and cannot be told apart; audit the model "
            "before it is compiled"
        )
