"""A transformers model as a program: Llama and its kin, patched or not, and NeuroBLAST.

Which families: those whose decoder layers are made of the parts below and nothing else, listed in `FAMILIES`. The
program is compared with the model itself before it is handed out, so a variant that computes something else is refused
and not run wrongly. Letters: C hidden size, M neurons of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuroweave.activations.neuron_functions import NeuronSegment, neuron_segments
from neuroweave.neuroblast.layer_plan import BRIDGES
from neuroweave.runtime.operations import (
    Activate,
    Add,
    Attend,
    Embed,
    Gather,
    Glu,
    Linear,
    Multiply,
    Norm,
    Operation,
    Place,
    Program,
    Rotate,
    SoftmaxGate,
    SparseGlu,
    empty_caches,
)
from neuroweave.runtime.reference import read, run_reference
from neuroweave.runtime.weights import PackedMatrix, layer_format, pack

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "neuroblast")
CLOSE = 2e-3  # of the largest logit: float32 in another order is 1e-5 of it, a wrong formula 1e-1


class UnsupportedModelError(ValueError):
    """The fast runtime has no program for this model; the message says why."""


def lower(model: Any, *, format: str = "float32", head_format: str | None = None, positions: int | None = None,
          thresholds: dict[int, Tensor] | None = None, check: bool = True) -> Program:  # fmt: skip
    """The program of a model. `format`: of its matrices; `head_format`: of embedding and head, if another; with int4
    embedding and head are int8, and what `layer_format` says.

    `positions`: the longest text, the model's own by default. `thresholds` [M] by layer: neurons below them are
    skipped; a layer that is not named runs dense. Raises UnsupportedModelError.
    """
    head_format = head_format or {"int4": "int8"}.get(format, format)
    return Lowering(model, format, head_format, positions, thresholds or {}).run(check=check)


class Lowering:
    def __init__(
        self, model: Any, format: str, head_format: str, positions: int | None, thresholds: dict[int, Tensor]
    ) -> None:
        self.model, self.config = model, model.config.get_text_config()
        self.format, self.head_format, self.thresholds = format, head_format, thresholds
        family = (getattr(model.config, "neuroweave", None) or {}).get("base", {}).get("model_type")
        self.family = family or self.config.model_type
        if self.family not in FAMILIES:
            raise UnsupportedModelError(f"the fast runtime knows {', '.join(FAMILIES)}; this model is {self.family!r}")
        own = int(self.config.max_position_embeddings)
        self.positions = own if positions is None else min(own, positions)
        self.operations: list[Operation] = []
        self.buffers: dict[str, int] = {}
        self.packed: dict[int, PackedMatrix] = {}
        self.tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self.eps = float(self.config.rms_norm_eps)

    @torch.no_grad()
    def run(self, *, check: bool) -> Program:
        core, config = self.model.model, self.config
        if hasattr(core, "language_model"):
            core = core.language_model
        width = config.hidden_size
        self.h, self.x, self.y = (self.buffer(name, width) for name in ("h", "x", "y"))
        self.embed(core)
        bridges = self.bridges(core)
        if bridges:
            self.e = self.buffer("e", width)
            self.operations.append(Add(self.h, self.e))
        layers = decoder_layers(self.model)
        self.last = len(layers) - 1
        for sign_and_norm in bridges.get(-1, []):
            self.bridge(*sign_and_norm)
        for number, layer in enumerate(layers):
            self.number = number
            try:
                self.layer(layer)
            except (AttributeError, ValueError) as error:
                raise UnsupportedModelError(f"layer {number} ({type(layer).__name__}): {error}") from error
            for sign_and_norm in bridges.get(number, []):
                self.bridge(*sign_and_norm)
        head = len(self.operations)
        self.norm(core.norm, self.h, self.x)
        logits = self.buffer("logits", int(self.head_weight().shape[0]))
        cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self.project(self.model.lm_head, self.x, logits, cap=cap, format=self.head_format)
        program = Program(self.operations, self.buffers, logits, self.positions, head)
        if check:
            self.compare(program)
        return program

    # ------------------------------------------------------------------------------------------------------- parts

    def buffer(self, name: str, size: int) -> Place:
        self.buffers[name] = max(size, self.buffers.get(name, 0))
        return Place(name, 0, size)

    def pack(self, weight: Tensor, bias: Tensor | None = None, format: str | None = None) -> PackedMatrix:
        format = format or self.format
        key = weight.data_ptr()
        if bias is not None:
            return pack(weight, format, bias)
        if key not in self.packed or self.packed[key].format != format:
            self.packed[key] = pack(weight, format)
        return self.packed[key]

    def head_weight(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def embed(self, core: Any) -> None:
        table = core.embed_tokens
        scale: Any = getattr(table, "embed_scale", 1.0)
        matrix = self.pack(table.weight, format=self.head_format)
        self.operations.append(Embed(self.h, matrix, float(scale)))

    def norm(self, module: Any, source: Place, out: Place, size: int | None = None) -> None:
        """RMSNorm, found out by what it does to a vector: some families store the weight less 1."""
        weight = module.weight.detach().float()
        probe = torch.linspace(-1, 1, len(weight)) + 0.1
        plain = probe * torch.rsqrt(probe.square().mean() + self.eps)
        found = module(probe.to(module.weight.dtype)).float()
        for scale in (weight, 1 + weight):
            if torch.allclose(plain * scale, found, rtol=1e-3, atol=1e-4 * float(found.abs().max())):
                self.operations.append(Norm(source, out, size or source.size, self.eps, scale.contiguous()))
                return
        raise ValueError(f"{type(module).__name__} is no RMSNorm that is known here")

    def project(self, module: Any, source: Place, out: Place, *, accumulate: bool = False, scale: float = 1.0,
                cap: float = 0.0, format: str | None = None) -> None:  # fmt: skip
        """A linear layer, and the activations that a patch put around it."""
        inner, before, after = unwrapped(module)
        if before is not None:
            acted = self.buffer(f"acted.{source.size}", source.size)
            self.activate(before, source, acted)
            source = acted
        plain = not after
        made = out if plain else self.buffer(f"made.{out.size}", out.size)
        matrix = self.pack(inner.weight, getattr(inner, "bias", None), format)
        self.operations.append(
            Linear(source, made, matrix, scale if plain else 1.0, accumulate and plain, cap if plain else 0.0)
        )
        if plain:
            return
        if cap:
            raise ValueError("activations on logits that are capped")
        for activation in after:
            self.activate(activation, made, made)
        self.operations.append(Add(made, out, scale, out if accumulate else None))

    def activate(self, module: nn.Module, source: Place, out: Place) -> None:
        self.operations.append(Activate(source, out, part_segments(module, source.size)))

    # ------------------------------------------------------------------------------------------------------ layers

    def layer(self, layer: Any) -> None:
        if hasattr(layer, "input_activation"):
            self.activate(layer.input_activation, self.h, self.h)
        if hasattr(layer, "conv"):
            self.convolution(layer)
            return
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        self.norm(layer.input_layernorm, self.h, self.x)
        self.attention(layer, self.y if sandwich else self.h, accumulate=not sandwich)
        if sandwich:
            self.norm(layer.post_attention_layernorm, self.y, self.y)
            self.operations.append(Add(self.h, self.h, 1.0, self.y))
            self.norm(layer.pre_feedforward_layernorm, self.h, self.x)
        else:
            self.norm(layer.post_attention_layernorm, self.h, self.x)
        self.mlp(layer.mlp, self.y if sandwich else self.h, accumulate=not sandwich)
        if sandwich:
            self.norm(layer.post_feedforward_layernorm, self.y, self.y)
            self.operations.append(Add(self.h, self.h, 1.0, self.y))

    def attention(self, layer: Any, out: Place, *, accumulate: bool) -> None:
        module, config = layer.self_attn, self.config
        size = int(getattr(module, "head_dim", None) or config.head_dim)
        sizes = [unwrapped(getattr(module, f"{name}_proj"))[0].weight.shape[0] for name in "qkv"]
        whole = self.buffer("qkv", sum(sizes))
        query, key, value = (whole.part(sum(sizes[:i]), each) for i, each in enumerate(sizes))
        for name, place in zip("qkv", (query, key, value), strict=True):
            self.project(getattr(module, f"{name}_proj"), self.x, place, format=self.own_format(f"{name}_proj"))
        if isinstance(getattr(module, "q_norm", None), nn.Module):
            self.norm(module.q_norm, query, query, size)
            self.norm(module.k_norm, key, key, size)
        if self.rotates(layer):
            cosines, sines = self.rotary(module)
            self.operations.append(Rotate(whole.part(0, sizes[0] + sizes[1]), size, cosines, sines))
        attended = self.buffer("attended", sizes[0])
        own = module if hasattr(module, "sliding_window") else config
        window = int(getattr(own, "sliding_window", None) or 0)
        cap = float(getattr(module, "attn_logit_softcapping", None) or 0.0)
        scale = float(getattr(module, "scaling", None) or size**-0.5)
        self.operations.append(Attend(query, key, value, attended, size, scale, window, cap))
        self.project(module.o_proj, attended, out, accumulate=accumulate, format=self.own_format("o_proj"))

    def own_format(self, projection: str) -> str:
        return layer_format(self.format, projection, last=self.number == self.last)

    def rotates(self, layer: Any) -> bool:
        module = layer.self_attn
        if self.family == "neuroblast":
            return bool(module.rotary)
        return bool(getattr(module, "use_rope", True))

    def rotary(self, module: Any) -> tuple[Tensor, Tensor]:
        """The model's own cosines and sines of every position."""
        core = self.model.model
        core = getattr(core, "language_model", core)
        kind = getattr(module, "layer_type", None) if self.family == "gemma3_text" else None
        if kind not in self.tables:
            positions = torch.arange(self.positions)[None]
            probe = torch.zeros(1, 1, 1, dtype=torch.float32)
            given = (probe, positions) if kind is None else (probe, positions, kind)
            cosines, sines = core.rotary_emb(*given)
            self.tables[kind] = cosines[0].float().contiguous(), sines[0].float().contiguous()
        return self.tables[kind]

    def mlp(self, module: Any, out: Place, *, accumulate: bool) -> None:
        gate, up, down = (getattr(module, f"{name}_proj") for name in ("gate", "up", "down"))
        neurons = int(unwrapped(gate)[0].weight.shape[0])
        segments = part_segments(module.act_fn, neurons)
        bare = all(not unwrapped(each)[1] and not unwrapped(each)[2] for each in (gate, up, down))
        if bare and self.number in self.thresholds:
            plain = [getattr(each, "bias", None) is None for each in (gate, up, down)]
            if all(plain) and accumulate:
                format = "float32" if self.format == "float32" else "int8"
                turned = pack(down.weight.T.contiguous(), format)
                own = self.own_format("gate_proj")
                matrices = self.pack(gate.weight, None, own), self.pack(up.weight, None, own), turned
                least = self.thresholds[self.number].float().contiguous()
                self.operations.append(SparseGlu(self.x, out, *matrices, segments, least))
                return
        gated = self.buffer("gated", neurons)
        formats = {name: self.own_format(f"{name}_proj") for name in ("gate", "up", "down")}
        if not bare:
            upper = self.buffer("upper", neurons)
            self.project(gate, self.x, gated, format=formats["gate"])
            self.operations.append(Activate(gated, gated, segments))
            self.project(up, self.x, upper, format=formats["up"])
            self.operations.append(Multiply(gated, upper, gated))
            self.project(down, gated, out, accumulate=accumulate, format=formats["down"])
            return
        packed = [self.pack(each.weight, getattr(each, "bias", None), formats["gate"]) for each in (gate, up)]
        self.operations.append(Glu(self.x, gated, packed[0], packed[1], segments))
        self.project(down, gated, out, accumulate=accumulate, format=formats["down"])

    # -------------------------------------------------------------------------------------------------- NeuroBLAST

    def bridges(self, core: Any) -> dict[int, list[tuple[float, Any]]]:
        """(sign of the embedding, norm) of what is added after each layer, by its number; -1: before the first."""
        found: dict[int, list[tuple[float, Any]]] = {}
        if self.family != "neuroblast" or not self.config.bridges:
            return found
        ended = 0
        for stage, name in BRIDGES.items():
            ended += sum(layer.stage == stage for layer in core.planned)
            found.setdefault(ended - 1, []).append((1.0 if stage == "sensory" else -1.0, core.get_submodule(name)))
        return found

    def bridge(self, sign: float, norm: Any) -> None:
        """h + norm(silu(+-e))"""
        silu = [NeuronSegment(0, self.y.size, (("silu", None),))]
        self.operations += [Add(self.e, self.y, sign), Activate(self.y, self.y, silu)]
        self.norm(norm, self.y, self.y)
        self.operations.append(Add(self.h, self.h, 1.0, self.y))

    def convolution(self, layer: Any) -> None:
        conv: Any = layer.conv
        outputs, channels, taps = conv.weight.shape
        self.norm(layer.norm_in, self.h, self.x)
        unfolded = self.buffer("unfolded", taps * channels)
        self.operations.append(Gather(self.x, unfolded, taps, int(conv.dilation)))
        weight = conv.weight.permute(0, 2, 1).reshape(outputs, -1)
        convolved = self.buffer("convolved", outputs)
        self.operations.append(Linear(unfolded, convolved, pack(weight, self.format, getattr(conv, "bias", None))))
        if layer.gated:
            self.operations.append(SoftmaxGate(convolved, self.y))
        elif hasattr(layer, "proj_back"):
            self.project(layer.proj_back, convolved, self.y)
        else:
            self.operations.append(Add(convolved, self.y))
        self.norm(layer.norm_out, self.y, self.y)
        self.operations.append(Add(self.h, self.h, 1.0, self.y))

    # ----------------------------------------------------------------------------------------------------- compare

    def compare(self, program: Program) -> None:
        """Run a few tokens both ways. Raises UnsupportedModelError where logits differ by more than rounding."""
        skipping = any(bool((least > 0).any()) for least in self.thresholds.values())
        if skipping or any(matrix.format != "float32" for matrix in program.matrices()):
            return
        tokens = torch.arange(3, 3 + min(12, self.positions)) % self.head_weight().shape[0]
        expected = self.model(tokens[None].to(self.model.device)).logits[0, -1].float().cpu()
        state = run_reference(program, empty_caches(program, len(tokens)), tokens.tolist(), 0)
        found = read(state, program.logits)[0]
        if not torch.isfinite(expected).all():
            raise UnsupportedModelError("its logits are not numbers; neuroweave verify looks at the weights")
        if not torch.allclose(found, expected, rtol=0, atol=CLOSE * float(expected.abs().max())):
            off = float((found - expected).abs().max() / expected.abs().max())
            raise UnsupportedModelError(
                f"this model computes something that the fast runtime does not (logits are off by {off:.1%}): leave "
                f"--fast out"
            )


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a decoder, in the order in which they run. Raises UnsupportedModelError for other models."""
    core: Any = getattr(model, "model", None)
    core = getattr(core, "language_model", core)
    if hasattr(core, "planned"):
        return [core.get_submodule(each.name) for each in core.planned]
    if not hasattr(core, "layers"):
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder layers where Llama and its kin have them")
    return list(core.layers)


def unwrapped(module: Any) -> tuple[Any, nn.Module | None, list[nn.Module]]:
    """(the projection, what a patch put before it or None, what it put after it)."""
    inner = getattr(module, "projection", None)
    if inner is None:
        if not hasattr(module, "weight") or module.weight.ndim != 2:
            raise ValueError(f"{type(module).__name__} is no plain projection")
        return module, None, []
    return inner, module._modules.get("activation_before"), list(module.activation_after)


def part_segments(module: Any, neurons: int) -> list[NeuronSegment]:
    """As `neuron_segments`; an activation on a part of a projection leaves the rest as it is."""
    if not hasattr(module, "start"):
        return neuron_segments(module, neurons)
    inner = [shifted(each, module.start) for each in neuron_segments(module.activation, module.stop - module.start)]
    rest = [(0, module.start), (module.stop, neurons)]
    found = inner + [NeuronSegment(a, b, (("identity", None),)) for a, b in rest if a < b]
    return sorted(found, key=lambda each: each.start)


def shifted(segment: NeuronSegment, by: int) -> NeuronSegment:
    return NeuronSegment(segment.start + by, segment.stop + by, segment.members, segment.weights, segment.beta)
