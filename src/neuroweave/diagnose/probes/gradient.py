"""The norm of the loss gradient of every parameter: one backward pass a window (`backward.py`), no step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from neuroweave.diagnose.bootstrap import LEAST_UNITS, Bootstrap
from neuroweave.diagnose.probes.anatomy import find_anatomy, layers_and_families
from neuroweave.diagnose.probes.backward import backward, prepared, taken_off
from neuroweave.diagnose.probes.head import Head
from neuroweave.diagnose.probes.signal import quotient
from neuroweave.diagnose.results.gradient import FamilyGradient, FamilyRatio, Gradient, GradientDifference
from neuroweave.diagnose.results.plan import GradientPlan
from neuroweave.diagnose.subject import Subject
from neuroweave.text.sample import Window


@dataclass(eq=False)
class GradientTally:
    """One model's gradients. Parameters are in the order of the result: the down projection's, then the model's."""

    families: list[str]
    layers: list[int | None]
    sizes: list[int]  # numbers in each parameter
    losses: list[float] = field(default_factory=list)  # nats per token, by window
    norms: list[np.ndarray] = field(default_factory=list)  # [parameters], by window

    @classmethod
    def empty(cls, model: nn.Module) -> GradientTally:
        """Nothing measured yet; `parameters_of(model)` is the order."""
        places = places_of(model)
        named = [(*places[name], parameter.numel()) for name, parameter in parameters_of(model)]
        layers, families, sizes = (list(column) for column in zip(*named, strict=True))
        return cls(families, layers, sizes)

    def arrays(self) -> dict[str, np.ndarray]:
        """The complete state, to be given to `from_arrays`."""
        return {
            "families": np.array(self.families),
            "layers": np.array([-1 if layer is None else layer for layer in self.layers], dtype=np.int64),
            "sizes": np.array(self.sizes, dtype=np.int64),
            "losses": np.array(self.losses, dtype=np.float64),
            "norms": np.array(self.norms, dtype=np.float64).reshape(len(self.norms), len(self.families)),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> GradientTally:
        return cls(
            families=[str(family) for family in arrays["families"]],
            layers=[None if layer < 0 else int(layer) for layer in arrays["layers"]],
            sizes=[int(size) for size in arrays["sizes"]],
            losses=[float(loss) for loss in arrays["losses"]],
            norms=list(np.array(arrays["norms"], dtype=np.float64)),
        )

    @property
    def by_family(self) -> dict[str, list[int]]:
        """Family to the indices of its parameters, in the order of layers."""
        found: dict[str, list[int]] = {}
        for index, family in enumerate(self.families):
            found.setdefault(family, []).append(index)
        return found

    def layers_of(self, family: str) -> list[int | None]:
        return [self.layers[index] for index in self.by_family.get(family, [])]


def measure_gradients(
    subject: Subject,
    windows: Sequence[Window],
    plan: GradientPlan,
    *,
    head: Head | None = None,
    tally: GradientTally | None = None,
    after_window: Callable[[], object] = lambda: None,
) -> GradientTally:
    """Norms of the gradient of the mean negative log-likelihood, for `plan.windows` windows spread over `windows`.

    `head`: last hidden states [tokens, width] to logits [tokens, vocabulary]; without one, a window's logits are held
    whole. `tally`: of an interrupted run on the same windows; it is gone on with, in place. `after_window` is called
    after each window. Afterwards parameters, their gradients and the model's mode are as before.
    Raises ValueError for a model that cannot give gradients, and when the loss or a gradient is not finite.
    """
    check_differentiable(subject)
    model = subject.model
    tally = GradientTally.empty(model) if tally is None else tally
    parameters = dict(parameters_of(model))
    if [parameter.numel() for parameter in parameters.values()] != tally.sizes:
        raise ValueError(f"the stored gradients are not of {subject.name}; measure again from the start")
    with torch.inference_mode(False), torch.enable_grad(), prepared(model):
        for number, window in list(enumerate(spread(windows, plan.windows)))[len(tally.losses) :]:
            ids = torch.tensor([window.token_ids[: plan.tokens]], device=subject.device)
            with taken_off(parameters) as collector:
                loss = backward(subject, ids, head, collector)
            check_finite(subject, number, loss, collector.norms, tally, list(parameters))
            tally.losses.append(loss)
            tally.norms.append(np.array([collector.norms.get(name, 0.0) for name in parameters]))
            after_window()
    return tally


def parameters_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter once (tied weights under their first name), those of the down projections first."""
    first, places = find_anatomy(model).down_family, places_of(model)
    # Sorting is stable: all else stays in the order of the model.
    return sorted(model.named_parameters(), key=lambda named: places[named[0]][1] != first)


def places_of(model: nn.Module) -> dict[str, tuple[int | None, str]]:
    """Layer and family of every parameter, by name."""
    return layers_and_families([name for name, _ in model.named_parameters()], stacks=find_anatomy(model).stacks)


def spread(windows: Sequence[Window], count: int) -> list[Window]:
    """`count` windows at even distances, in their order; all of them where there are no more."""
    if len(windows) <= count:
        return list(windows)
    return [windows[int((turn + 0.5) * len(windows) / count)] for turn in range(count)]


def check_differentiable(subject: Subject) -> None:
    """Raise ValueError for a model whose loss has no gradient of its weights."""
    model: Any = subject.model
    method = getattr(model, "quantization_method", None)
    named = list(model.named_parameters())
    reason = ""
    packed = next((name for name, parameter in named if not parameter.is_floating_point()), None)
    placed = next((name for name, parameter in named if parameter.is_meta), None)
    frozen = next((name for name, parameter in named if parameter.is_inference()), None)
    if getattr(model, "is_quantized", False) or method is not None:
        reason = f"its weights are quantized ({getattr(method, 'value', method) or 'method not stated'})"
    elif not named:
        reason = "it has no parameters"
    elif packed is not None:
        dtype = str(dict(named)[packed].dtype).removeprefix("torch.")
        reason = f"{packed!r} holds {dtype}, as quantized weights do"
    elif placed is not None:
        reason = f"{placed!r} is not in memory (offloaded)"
    elif frozen is not None:
        reason = f"{frozen!r} was made in inference mode"
    if reason:
        raise ValueError(
            f"{subject.name} cannot give gradients: {reason}; load it unquantized, whole, in float32 or bfloat16 and "
            "outside of torch.inference_mode, or leave the gradients out"
        )


def check_finite(
    subject: Subject, number: int, loss: float, norms: Mapping[str, float], tally: GradientTally, names: Sequence[str]
) -> None:
    """Raise ValueError when the loss or a gradient is not finite, naming the first family that is to blame."""
    places = {name: at for at, name in enumerate(names)}

    def in_words(name: str) -> str:
        layer = tally.layers[places[name]]
        return tally.families[places[name]] + ("" if layer is None else f" of layer {layer}")

    if not np.isfinite(loss):
        weights = subject.model.named_parameters()
        broken = next((name for name, weight in weights if not torch.isfinite(weight.detach()).all()), None)
        cause = "all weights are finite" if broken is None else f"the first weight that is not is {in_words(broken)}"
        raise ValueError(f"{subject.name}: the loss of window {number} of the gradients is {loss}; {cause}")
    first = next((name for name, norm in norms.items() if not np.isfinite(norm)), None)
    if first is not None:
        raise ValueError(
            f"{subject.name}: the gradient of {in_words(first)} is not finite in window {number}, the first on the way "
            "back from the loss; try float32"
        )


# ------------------------------------------------------------------------------------------------------------ results


def gradient_result(tally: GradientTally, *, resamples: int, seed: int) -> Gradient:
    """Means over windows, with intervals over windows. Raises ValueError if no window was measured."""
    bootstrap = Bootstrap(len(tally.losses), resamples=resamples, seed=seed, least=LEAST_UNITS)
    ones = np.ones((len(tally.losses), 1))
    norms = bootstrap.statistic(np.divide, np.array(tally.norms), ones)
    families = [
        FamilyGradient(
            family=family,
            layers=tally.layers_of(family),
            parameters=[tally.sizes[index] for index in indices],
            norm=[norms[index] for index in indices],
        )
        for family, indices in tally.by_family.items()
    ]
    [loss], [total] = (
        bootstrap.statistic(np.divide, each, ones) for each in (np.array(tally.losses)[:, None], totals(tally))
    )
    return Gradient(windows=len(tally.losses), loss=loss, total=total, families=families)


def gradient_difference(base: GradientTally, other: GradientTally, *, resamples: int, seed: int) -> GradientDifference:
    """Mean norms of other over base, paired over windows. A family with other layers counts as another family.

    Raises ValueError if the two have not measured the same number of windows.
    """
    if len(base.losses) != len(other.losses):
        raise ValueError(
            f"the gradients are of {len(base.losses)} and {len(other.losses)} windows; measure both models on the same"
        )
    bootstrap = Bootstrap(len(base.losses), resamples=resamples, seed=seed, least=LEAST_UNITS)
    shared = [family for family in base.by_family if base.layers_of(family) == other.layers_of(family)]
    ours, theirs = ([index for family in shared for index in tally.by_family[family]] for tally in (base, other))
    ratios = iter(bootstrap.statistic(quotient, np.array(other.norms)[:, theirs], np.array(base.norms)[:, ours]))
    [total] = bootstrap.statistic(quotient, totals(other), totals(base))
    families = []
    for family in shared:
        layers = base.layers_of(family)
        families.append(FamilyRatio(family=family, layers=layers, ratio=[next(ratios) for _ in layers]))
    return GradientDifference(
        total=total,
        families=families,
        only_base=[family for family in base.by_family if family not in shared],
        only_other=[family for family in other.by_family if family not in shared],
    )


def totals(tally: GradientTally) -> Float[np.ndarray, "windows 1"]:
    """Norm over all parameters, by window."""
    return np.linalg.norm(np.array(tally.norms), axis=1, keepdims=True)
