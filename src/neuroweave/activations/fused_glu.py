"""act(gate) * up as one operation: nothing but gate and up is kept for the backward pass, and each is read once.

`neuroweave::glu` is the operation: on CPUs in float32 generated C++ (`fused_glu_native`), on GPUs Triton
(`fused_glu_triton`), else PyTorch. `NEUROWEAVE_FUSED=0` turns all of it off. Letters: n neurons, K members.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuroweave.activations import fused_glu_native
from neuroweave.activations.expressions import Expression
from neuroweave.activations.formulas import FORMULAS
from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture
from neuroweave.activations.native import gradient_results
from neuroweave.activations.neuron_functions import Member, NeuronSegment, member_of
from neuroweave.activations.torch import PRIMITIVES

SWITCH = "NEUROWEAVE_FUSED"  # 0: everything runs as plain PyTorch
UNDIVIDED = 32767  # elements; PyTorch divides elementwise work above that among threads
Gradients = tuple[Tensor, Tensor, list[Tensor | None], list[Tensor | None]]


def fused_glu(gate: Float[Tensor, "*rows n"], up: Float[Tensor, ...], activation: Any) -> Float[Tensor, "*rows n"]:
    """act(gate) * up, `activation` any module of this project or one of transformers' that has a formula here.

    Gradients go to gate, up, and the `gating_logits` and `beta` of mixtures; those two are summed over rows in an order
    that threads do not change. Raises ValueError for unequal shapes, dtypes or devices, and for an activation that is
    not made of known formulas.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate is {list(gate.shape)} {gate.dtype} on {gate.device}, "
            f"up {list(up.shape)} {up.dtype} on {up.device}: they must be alike"
        )
    plan = plan_of(activation, gate.shape[-1])
    return planned_glu(gate, up, activation, plan) if enabled() else plain_glu(gate, up, activation)


def plain_glu(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The same in plain PyTorch, as models write it."""
    return activation(gate) * up


def enabled() -> bool:
    return os.environ.get(SWITCH) != "0"


def planned_glu(gate: Tensor, up: Tensor, activation: Any, plan: str) -> Tensor:
    dtype = torch.promote_types(gate.dtype, torch.float32)
    learned = list(mixtures_of(activation))
    weights = [member_weights(each, dtype) for each in learned]
    beta = [each.beta.to(dtype) for each in learned if each.beta is not None]
    return glu(gate, up, weights, beta, plan)


def member_weights(mixture: NeuronMixture, dtype: torch.dtype) -> Float[Tensor, "K n"]:
    """`mixture.weights()` by member.

    On CPUs a softmax over K neighbours is slow (1.5 ms for 4 of 14,336, forward and backward), and over contiguous rows
    its bits depend on the threads; so here it is written out, in pieces that PyTorch does not divide among threads.
    """
    logits = mixture.gating_logits
    if mixture.hard or logits.device.type != "cpu":
        return mixture.weights().T.to(dtype).contiguous()
    pieces = [softmax_by_member(each.T.to(dtype)) for each in logits.split(max(1, UNDIVIDED // logits.shape[1]))]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def softmax_by_member(logits: Float[Tensor, "K n"]) -> Float[Tensor, "K n"]:
    logits = logits.contiguous()
    e = torch.exp(logits - logits.detach().amax(dim=0))
    total: Any = sum(e.unbind())
    return e / total


# ------------------------------------------------------------------------------------------------------------ plans
# A plan is text, so that graphs and caches can hold it: "start,stop,weights,beta,silu|swish_beta=beta;..." Numbers of
# weights and beta are places in the operation's lists, -1 for none.


def mixtures_of(module: Any) -> Iterator[NeuronMixture]:
    """The neuron mixtures of an activation in the order of their neurons."""
    if isinstance(module, SegmentMixture):
        for member in module.members:
            yield from mixtures_of(member)
    elif isinstance(module, NeuronMixture):
        yield module


def plan_of(module: Any, n: int) -> str:
    """The plan of an activation on n neurons. Raises ValueError for one that is not made of known formulas."""
    learned = list(mixtures_of(module))
    with_beta = [each for each in learned if each.beta is not None]
    return ";".join(parts_of(module, 0, n, [id(m) for m in learned], [id(m) for m in with_beta]))


def parts_of(module: Any, start: int, stop: int, learned: list[int], with_beta: list[int]) -> Iterator[str]:
    if isinstance(module, SegmentMixture):
        for member, size in zip(module.members, module.segment_sizes(stop - start), strict=True):
            if size:
                yield from parts_of(member, start, start + size, learned, with_beta)
            start += size
    elif isinstance(module, NeuronMixture):
        if len(module.gating_logits) != stop - start:
            raise ValueError(f"a mixture of {len(module.gating_logits)} neurons stands where {stop - start} are")
        names = [text_of(member_of(each), k == module.swish) for k, each in enumerate(module.members)]
        beta = -1 if module.beta is None else with_beta.index(id(module))
        yield f"{start},{stop},{learned.index(id(module))},{beta},{'|'.join(names)}"
    else:
        yield f"{start},{stop},-1,-1,{text_of(member_of(module), False)}"


def text_of(member: Member, own_beta: bool) -> str:
    name, beta = member
    return f"{name}=beta" if own_beta else name if beta is None else f"{name}={beta!r}"


@functools.lru_cache(maxsize=1024)
def read_plan(plan: str) -> tuple[tuple[NeuronSegment, int, int], ...]:
    """Segments without their tensors, each with the places of its weights and beta."""
    found = []
    for part in plan.split(";"):
        *numbers, names = part.split(",")
        start, stop, weights, beta = map(int, numbers)
        members: list[Member] = []
        for text in names.split("|"):
            name, _, value = text.partition("=")
            members.append((name, None if not value else value if value == "beta" else float(value)))
        found.append((NeuronSegment(start, stop, tuple(members)), weights, beta))
    return tuple(found)


def segments_of(plan: str, weights: Sequence[Tensor], beta: Sequence[Tensor]) -> list[NeuronSegment]:
    return [
        replace(segment, weights=weights[w] if w >= 0 else None, beta=beta[b] if b >= 0 else None)
        for segment, w, b in read_plan(plan)
    ]


# -------------------------------------------------------------------------------------------------------- operations

ARGUMENTS = "Tensor gate, Tensor up, Tensor[] weights, Tensor[] beta, str plan"


def glu_forward(gate: Tensor, up: Tensor, weights: list[Tensor], beta: list[Tensor], plan: str) -> Tensor:
    segments = segments_of(plan, weights, beta)
    made = None
    if fused_glu_native.supports(gate):
        made = fused_glu_native.forward(gate, up, segments)
    elif triton_supports(gate) and triton_agrees(plan, gate.dtype, gate.device):
        from neuroweave.activations import fused_glu_triton

        made = fused_glu_triton.forward(gate, up, segments)
    return twin_forward(gate, up, segments) if made is None else made


def glu_gradients(
    dout: Tensor, gate: Tensor, up: Tensor, weights: list[Tensor], beta: list[Tensor], plan: str
) -> list[Tensor]:
    """Gradients of gate, up, each of `weights`, each of `beta`."""
    segments = segments_of(plan, weights, beta)
    made: Gradients | None = None
    if fused_glu_native.supports(gate):
        made = fused_glu_native.backward(dout, gate, up, segments)
    elif triton_supports(gate) and triton_agrees(plan, gate.dtype, gate.device):
        from neuroweave.activations import fused_glu_triton

        made = fused_glu_triton.backward(dout, gate, up, segments)
    dgate, dup, dweights, dbeta = twin_backward(dout, gate, up, segments) if made is None else made
    found: dict[int, Tensor] = {}
    for (_, w, b), dw, db in zip(read_plan(plan), dweights, dbeta, strict=True):
        if dw is not None:
            found[w] = dw
        if db is not None:
            found[len(weights) + b] = db
    missing = {place: each for place, each in enumerate((*weights, *beta)) if place not in found}  # of no neurons
    found |= {place: torch.zeros_like(each) for place, each in missing.items()}
    return [dgate, dup, *(found[place] for place in range(len(found)))]


glu: Any = torch.library.custom_op("neuroweave::glu", glu_forward, mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
glu_backward: Any = torch.library.custom_op(
    "neuroweave::glu_backward", glu_gradients, mutates_args=(), schema=f"(Tensor dout, {ARGUMENTS}) -> Tensor[]"
)


@glu.register_fake
def glu_shape(gate: Any, up: Any, weights: Any, beta: Any, plan: Any) -> Any:
    return gate.new_empty(gate.shape)


@glu_backward.register_fake
def glu_backward_shapes(dout: Any, gate: Any, up: Any, weights: Any, beta: Any, plan: Any) -> Any:
    return [each.new_empty(each.shape) for each in (gate, up, *weights, *beta)]


def keep_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, weights, beta, ctx.plan = inputs
    ctx.weights = len(weights)
    ctx.save_for_backward(gate, up, *weights, *beta)


def glu_autograd(ctx: Any, dout: Any) -> Any:
    gate, up, *learned = ctx.saved_tensors
    K = ctx.weights
    dgate, dup, *found = glu_backward(dout, gate, up, learned[:K], learned[K:], ctx.plan)
    return dgate, dup, found[:K], found[K:], None


glu.register_autograd(glu_autograd, setup_context=keep_inputs)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_supports(tensor: Tensor) -> bool:
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return tensor.device.type == "cuda" and tensor.dtype in floats and has_triton()


@functools.lru_cache(maxsize=256)
def triton_agrees(plan: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine's kernels of a plan give what the twin gives, tried once on three rows; a warning if not."""
    from neuroweave.activations import fused_glu_triton

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    segments = [
        replace(
            each,
            weights=drawn(len(each.members), each.stop - each.start) if w >= 0 else None,
            beta=drawn(each.stop - each.start) + 0.5 if b >= 0 else None,
        )
        for each, w, b in read_plan(plan)
    ]
    gate, up, dout = ((6 * drawn(3, segments[-1].stop) - 3).to(dtype) for _ in range(3))
    wanted = [twin_forward(gate, up, segments), *flat(twin_backward(dout, gate, up, segments))]
    try:
        found = [
            fused_glu_triton.forward(gate, up, segments),
            *flat(fused_glu_triton.backward(dout, gate, up, segments)),
        ]
        limit = CLOSE.get(dtype, 3e-2)
        for a, b in zip(found, wanted, strict=True):
            off = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30))
            if not off <= limit:
                raise ValueError(f"they are {off:.2g} of the largest value off")
    except Exception as error:  # whatever a compiler or driver says, training goes on without it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"the Triton kernels of {plan!r} are not used on {device}: {reason}", stacklevel=2)
        return False
    return True


def flat(gradients: Gradients) -> list[Tensor]:
    dgate, dup, dweights, dbeta = gradients
    return [dgate, dup, *(each for each in (*dweights, *dbeta) if each is not None)]


# -------------------------------------------------------------------------------------------------------------- twin


def twin_forward(gate: Tensor, up: Tensor, segments: Sequence[NeuronSegment]) -> Tensor:
    """As the modules compute it, in gate's dtype; each segment writes its own columns."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for each in segments:
        place = slice(each.start, each.stop)
        torch.mul(member_sum(gate[..., place], each), up[..., place], out=out[..., place])
    return out


def member_sum(x: Tensor, segment: NeuronSegment) -> Tensor:
    total: Any = 0
    for k, (name, beta) in enumerate(segment.members):
        value = segment.beta.to(x.dtype) if isinstance(beta, str) and segment.beta is not None else beta
        part = FORMULAS[name](x, PRIMITIVES) if value is None else FORMULAS[name](x, PRIMITIVES, beta=value)
        if segment.weights is None:
            return part
        total = total + segment.weights[k].to(x.dtype) * part
    return total


def twin_backward(dout: Tensor, gate: Tensor, up: Tensor, segments: Sequence[NeuronSegment]) -> Gradients:
    """From the formulas' expressions, in float32 at least."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    dweights: list[Tensor | None] = []
    dbeta: list[Tensor | None] = []
    for each in segments:
        place = slice(each.start, each.stop)
        x, u, d = (t[..., place].to(dtype) for t in (gate, up, dout))
        variables = {"x": x} | ({} if each.beta is None else {"beta": each.beta.to(dtype)})
        if each.weights is not None:
            variables |= {f"w{k}": weight.to(dtype) for k, weight in enumerate(each.weights)}
        value = Evaluation(variables)
        results = {name: value(expression) for name, expression in gradient_results(each.kernel)}
        dup[..., place] = d * results["y"]
        g = d * u
        dgate[..., place] = g * results["dx"]
        rows = tuple(range(g.ndim - 1))

        def summed(name: str, g: Tensor = g, rows: tuple[int, ...] = rows, results: Any = results) -> Tensor:
            product = g * results[name]
            return product.sum(rows) if rows else product

        weighted = each.weights is not None
        found = [summed(f"m{k}") for k in range(len(each.members))] if weighted else []
        dweights.append(torch.stack(found).to(each.weights.dtype) if each.weights is not None else None)
        dbeta.append(summed("dbeta").to(each.beta.dtype) if each.beta is not None else None)
    return dgate, dup, dweights, dbeta


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "+": torch.add,
    "*": torch.mul,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "normal_cdf": torch.special.ndtr,
    "normal_pdf": lambda x: torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    "sin": torch.sin,
    "cos": torch.cos,
    "relu": torch.relu,
    "step": lambda x: (x > 0).to(x.dtype),
}


@dataclass
class Evaluation:
    """Expressions of tensors, what they share computed once."""

    variables: dict[str, Tensor]
    known: dict[Expression, Tensor] = field(default_factory=dict)

    def __call__(self, expression: Expression) -> Tensor:
        if expression.operation == "variable":
            return self.variables[expression.name]
        if expression not in self.known:
            parts = [self(part) for part in expression.parts]
            number = expression.operation == "number"
            x = self.variables["x"]
            self.known[expression] = (
                x.new_tensor(expression.value) if number else FUNCTIONS[expression.operation](*parts)
            )
        return self.known[expression]


# ------------------------------------------------------------------------------------------------------------ models

FORM = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest output; else 3e-2


@dataclass
class FusedMlps:
    """What `fuse_glu` did; calling it puts every MLP back. `fused`: their paths; `left`: path -> why not."""

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    blocks: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)

    def __call__(self) -> None:
        for block, old_class in self.blocks:
            block.__class__ = old_class
            del block.fused_plan
        self.blocks.clear()


def fuse_glu(model: nn.Module, *, without_weights: bool = False) -> FusedMlps:
    """Run every gated MLP of this model instance, `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, in the fused form.

    An MLP that is written in another way, was wrapped, has an activation without formula, or gives another output on a
    probe stays as it is. `without_weights`: those on the meta device are fused without that probe. Patch first: an
    activation that is replaced later runs unfused. What comes back undoes it. With `NEUROWEAVE_FUSED=0` nothing is
    changed.
    """
    done = FusedMlps()
    for path, block in list(model.named_modules()):
        if not all(isinstance(getattr(block, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
            continue
        try:
            fuse_block(block, done, without_weights=without_weights)
            done.fused.append(path)
        except ValueError as error:
            done.left[path] = str(error)
    return done


def fuse_block(block: Any, done: FusedMlps, *, without_weights: bool = False) -> None:
    """Raises ValueError, and leaves the block as it was, where it cannot be fused."""
    old_class: Any = type(block)
    if not enabled():
        raise ValueError(f"{SWITCH} is 0")
    if hasattr(block, "fused_plan"):
        raise ValueError("it is fused already")
    if "forward" in vars(block):
        raise ValueError("its forward was wrapped")
    if not has_form(old_class):
        raise ValueError(f"the forward of {old_class.__name__} is not {FORM}")
    n, C = block.gate_proj.out_features, block.gate_proj.in_features
    plan = plan_of(block.act_fn, n)
    unseen = without_weights and all(each.device.type == "meta" for each in block.parameters())
    before = None if unseen else probe(block, C)
    block.fused_plan = (block.act_fn, n, plan)  # in a tuple, or the activation would be a second child
    block.__class__ = with_fused_glu(old_class)
    if before is not None:
        limit = CLOSE.get(before.dtype, 3e-2) * float(before.abs().max())
        if not float((probe(block, C) - before).abs().max()) <= limit:
            block.__class__ = old_class
            del block.fused_plan
            raise ValueError("the fused form gave another output")
    done.blocks.append((block, old_class))


@torch.no_grad()
def probe(block: Any, C: int) -> Tensor:
    """The output on three fixed rows. Raises ValueError where it cannot be computed."""
    place = next((each for each in block.parameters() if each.is_floating_point()), None)
    if place is None or place.device.type == "meta":
        raise ValueError("it has no weights to try it with")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, C, generator=generator).to(place.device, place.dtype)
    devices = [place.device] if place.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # dropout of adapters
            found = block(x)
    except RuntimeError as error:
        raise ValueError(f"it cannot be tried: {error}") from error
    return found


@functools.cache
def has_form(block_class: Any) -> bool:
    """Whether a class's forward is `FORM` of its one argument and nothing else."""
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(block_class.forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or len(tree.args.args) != 2:
        return False
    lines = [line for line in tree.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    wanted = ast.unparse(ast.parse(FORM.replace("(x)", f"({tree.args.args[1].arg})")))
    match lines:
        case [ast.Return(value=made)] if made is not None:
            return ast.unparse(made) == wanted
        case [ast.Assign(targets=[ast.Name(id=name)], value=made), ast.Return(value=ast.Name(id=given))]:
            return name == given and ast.unparse(made) == wanted
    return False


@functools.cache
def with_fused_glu(block_class: Any) -> Any:
    """A subclass of an MLP's class (same name) whose forward is fused; plain again under hooks on the activation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        activation, n, plan = self.fused_plan
        if self.act_fn is not activation or not enabled() or hooked(activation):
            return block_class.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.shape != up.shape or gate.shape[-1] != n or gate.dtype != up.dtype or gate.device != up.device:
            return self.down_proj(plain_glu(gate, up, activation))
        return self.down_proj(planned_glu(gate, up, activation, plan))

    def reduce(self: Any, _: Any) -> tuple[Any, ...]:  # the class is made here, so pickle cannot find it by its name
        return blank_block, (block_class,), vars(self)

    names: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce}
    names |= {"__module__": block_class.__module__, "__qualname__": block_class.__qualname__}
    return type(block_class.__name__, (block_class,), names)


def blank_block(block_class: Any) -> nn.Module:
    return object.__new__(with_fused_glu(block_class))


def hooked(activation: Any) -> bool:
    """Whether somebody watches the activation or a part of it, and so must see it called."""
    if not isinstance(activation, nn.Module):
        return False
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in activation.modules()
    )
