"""What two models share, tensor by tensor: against NumPy and SciPy, from files and from memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from tiny_llama import changed, subject, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from neuroweave.diagnose.probes import weights as probe
from neuroweave.diagnose.probes.weights import compare_weights, largest_singular_values
from neuroweave.diagnose.results.weights import TensorChange, Weights
from neuroweave.diagnose.subject import Subject


class Held(nn.Module):
    """A model that is nothing but its tensors."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return self.tensors


def held(name: str, tensors: dict[str, Any]) -> Subject:
    return Subject(name, Held(tensors), tiny_tokenizer())


def stored(name: str, folder: Path, tensors: dict[str, Tensor]) -> Subject:
    """A subject whose model is empty and whose folder holds `tensors`."""
    path = folder / name
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return Subject(name, Held({}), tiny_tokenizer(), str(path))


def pair(where: str, folder: Path, a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[Subject, Subject]:
    if where == "files":
        return stored("base", folder, a), stored("other", folder, b)
    return held("base", a), held("other", b)


def named(weights: Weights) -> dict[str, TensorChange]:
    return {change.name: change for change in weights.tensors}


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


both = pytest.mark.parametrize("where", ["files", "memory"])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_figures_match_numpy(tmp_path: Path, where: str, dtype: torch.dtype) -> None:
    """Cosine, relative change, counts and singular values, with sizes of 1, 7 and 123."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"wide": (7, 123), "tall": (123, 7), "row": (1, 123), "one": (1, 1), "vector": (123,)}
    a = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    b = {name: (value + 0.1 * torch.randn(value.shape, generator=draw)).to(dtype) for name, value in a.items()}
    b["tall"][:, 3:] = a["tall"][:, 3:]
    weights = compare_weights(*pair(where, tmp_path, a, b))
    assert weights.source == where
    assert weights.parameters == sum(value.numel() for value in a.values())
    assert weights.equal_bytes == 0
    assert weights.equal_values == sum(int((a[name] == b[name]).sum()) for name in a)
    assert weights.equal_values >= 123 * 4
    for name, change in named(weights).items():
        ours, theirs = as_numpy(a[name]).ravel(), as_numpy(b[name]).ravel()
        assert change.cosine == pytest.approx(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs), rel=1e-12)
        relative = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
        assert change.relative_change == pytest.approx(relative, rel=1e-12)
        assert (change.equal_bytes, change.equal_values) == (False, False)
        assert change.shape == list(shapes[name])
        for tensor, found in ((a[name], change.singular_base), (b[name], change.singular_other)):
            expected = scipy.linalg.svdvals(as_numpy(tensor))[:4] if tensor.ndim == 2 else []
            assert found == pytest.approx(expected, rel=1e-9)


@both
def test_a_model_against_itself_gives_exactly_nothing(tmp_path: Path, where: str) -> None:
    tensors = {name: value.clone() for name, value in tiny_model().state_dict().items()}
    base, other = pair(where, tmp_path, tensors, {name: value.clone() for name, value in tensors.items()})
    weights = compare_weights(base, other)
    assert weights.equal_bytes == weights.equal_values == weights.parameters > 0
    assert [change.relative_change for change in weights.tensors] == [0.0] * len(tensors)
    assert [change.cosine for change in weights.tensors] == [1.0] * len(tensors)
    assert all(change.equal_bytes and change.equal_values for change in weights.tensors)
    assert all(change.singular_base == change.singular_other for change in weights.tensors)
    assert all(len(change.singular_base) == 4 for change in weights.tensors if len(change.shape) == 2)
    assert (weights.only_base, weights.only_other, weights.other_shape) == ([], [], [])
    assert compare_weights(base, other) == weights  # no chance in the singular values


def test_a_changed_model_is_changed_where_it_was() -> None:
    """In memory, from real models: only the MLP's down projections, every layer of them."""
    base = tiny_model(tie_word_embeddings=True)
    other = changed(base, 0.1)
    calls: list[None] = []
    state = torch.get_rng_state()
    weights = compare_weights(subject("base", base), subject("other", other), after_tensor=lambda: calls.append(None))
    assert torch.equal(torch.get_rng_state(), state)
    moved = [change for change in weights.tensors if not change.equal_bytes]
    assert [(change.layer, change.family) for change in moved] == [(n, "mlp.down_proj.weight") for n in range(3)]
    assert weights.equal_bytes == weights.parameters - 3 * 32 * 48
    assert len(calls) == len(weights.tensors)


def test_tied_weights_count_once() -> None:
    base = tiny_model(tie_word_embeddings=True)
    weights = compare_weights(subject("base", base), subject("other", tiny_model(tie_word_embeddings=True)))
    assert weights.parameters == sum(parameter.numel() for parameter in base.parameters())
    assert "lm_head.weight" not in named(weights)


def test_untied_head_of_one_model_is_its_own() -> None:
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model(tie_word_embeddings=False)
    weights = compare_weights(subject("base", tied), subject("other", untied))
    assert (weights.only_base, weights.only_other) == ([], ["lm_head.weight"])


@both
def test_names_and_shapes_that_only_one_side_has(tmp_path: Path, where: str) -> None:
    a = {"both": torch.ones(3), "mine": torch.ones(2), "grown": torch.ones(2, 3)}
    b = {"both": torch.ones(3), "yours": torch.ones(2), "grown": torch.ones(3, 2)}
    weights = compare_weights(*pair(where, tmp_path, a, b))
    assert (weights.only_base, weights.only_other, weights.other_shape) == (["mine"], ["yours"], ["grown"])
    assert [change.name for change in weights.tensors] == ["both"]
    assert (weights.parameters, weights.equal_bytes, weights.equal_values) == (11, 3, 3)


@both
def test_the_same_values_in_another_dtype(tmp_path: Path, where: str) -> None:
    value = torch.randn(7, 123, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = compare_weights(*pair(where, tmp_path, {"w": value}, {"w": value.float()}))
    change = weights.tensors[0]
    assert (change.equal_bytes, change.equal_values) == (False, True)
    assert (change.cosine, change.relative_change) == (1.0, 0.0)
    assert change.dtypes == ["BF16", "F32"]
    assert (weights.equal_bytes, weights.equal_values) == (0, 7 * 123)
    assert change.singular_base == change.singular_other


@both
def test_awkward_tensors(tmp_path: Path, where: str) -> None:
    broken = torch.ones(5, 5)
    broken[2, 2] = torch.nan
    infinite = torch.ones(5, 5)
    infinite[0, 0] = torch.inf
    a = {
        "broken": torch.ones(5, 5),
        "broken.both": broken,
        "infinite": infinite,
        "empty": torch.zeros(0, 3),
        "zero": torch.zeros(4, 4),
        "from.zero": torch.zeros(4, 4),
        "experts": torch.ones(3, 4, 5),
        "codes": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
        "flags": torch.tensor([[True, False]]),
        "eight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.0),
    }
    b = {name: value.clone() for name, value in a.items()}
    b |= {
        "broken": broken,
        "infinite": torch.ones(5, 5),
        "from.zero": torch.ones(4, 4),
        "experts": 2 * torch.ones(3, 4, 5),
        "codes": torch.arange(12, dtype=torch.uint8).reshape(3, 4) + torch.eye(3, 4, dtype=torch.uint8),
    }
    found = named(compare_weights(*pair(where, tmp_path, a, b)))
    facts = {name: (c.equal_values, c.cosine, c.relative_change, len(c.singular_base)) for name, c in found.items()}
    codes, moved = as_numpy(a["codes"]).ravel(), as_numpy(b["codes"]).ravel()
    cosine, relative = codes @ moved / np.sqrt(codes @ codes * (moved @ moved)), np.sqrt(3 / (codes @ codes))
    assert facts.pop("codes") == (False, pytest.approx(cosine), pytest.approx(relative), 0)
    assert facts == {
        "broken": (False, None, None, 4),
        "broken.both": (True, None, 0.0, 0),
        "infinite": (False, None, None, 0),
        "empty": (True, None, 0.0, 0),
        "zero": (True, None, 0.0, 4),
        "from.zero": (False, None, None, 4),
        "experts": (False, pytest.approx(1.0, abs=1e-15), 1.0, 0),
        "flags": (True, 1.0, 0.0, 0),
        "eight": (True, 1.0, 0.0, 0),
        "scalar": (True, 1.0, 0.0, 0),
    }
    assert found["broken"].singular_other == []
    assert found["zero"].singular_base == [0.0] * 4
    assert found["from.zero"].singular_other == pytest.approx([4, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (123, 7), (300, 123), (123, 300)])
def test_singular_values_of_small_matrices(rows: int, columns: int) -> None:
    """Also of a spectrum over six orders of magnitude, far from 1 in scale."""
    random = np.random.default_rng(0)
    side = min(rows, columns)
    left, right = (np.linalg.qr(random.normal(size=(size, side)))[0] for size in (rows, columns))
    for spectrum in (np.ones(side), 1e6 * np.logspace(0, -6, side), 1e-20 / np.arange(1, side + 1)):
        matrix = torch.tensor(left * spectrum @ right.T, dtype=torch.float64)
        found = largest_singular_values(matrix, float(matrix.abs().max()))
        expected = scipy.linalg.svdvals(matrix.numpy())[: min(4, side)]
        # the third of three values is a millionth of the first, and float64 squares it
        assert found == pytest.approx(expected, rel=1e-3 if side == 3 else 1e-8, abs=0)


@pytest.mark.parametrize("shape", [(1100, 1200), (1200, 1100)])
def test_singular_values_of_large_matrices(shape: tuple[int, int]) -> None:
    """The Krylov space: a flat spectrum, a falling one, and low ranks, where it runs out of directions."""
    random = np.random.default_rng(0)
    normal = random.normal(size=shape)
    low = random.normal(size=(shape[0], 3)) @ random.normal(size=(3, shape[1]))
    spike = np.zeros(shape)
    spike[5, 7] = -2e30
    falling = normal / np.arange(1, shape[1] + 1)
    for matrix, tolerance in ((normal, 2e-5), (falling, 2e-6), (low, 2e-6), (spike, 2e-6)):
        tensor = torch.tensor(matrix, dtype=torch.float32)
        found = largest_singular_values(tensor, float(tensor.abs().max()))
        expected = np.sqrt(np.maximum(scipy.linalg.eigvalsh(matrix @ matrix.T)[:-5:-1], 0))
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-6 * expected[0])


def test_the_krylov_space_is_the_same_every_time() -> None:
    matrix = torch.randn(1030, 1031, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(largest_singular_values(matrix, 5.0))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def test_blocks_of_rows_give_the_same_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(1230, 7, generator=torch.Generator().manual_seed(0))
    whole = largest_singular_values(matrix, 4.0)
    monkeypatch.setattr(probe, "_BLOCK_ELEMENTS", 7 * 123 + 5)
    assert largest_singular_values(matrix, 4.0) == pytest.approx(whole, rel=1e-12)


def test_files_under_other_names_are_left_for_the_models(tmp_path: Path) -> None:
    """Two naming conventions share no name, which says nothing about the weights; the models in memory do."""
    value = torch.ones(3)
    base = stored("base", tmp_path, {"model.w": value})
    other = stored("other", tmp_path, {"w": value})
    models = [Held({"w": value}), Held({"w": value})]
    weights = compare_weights(
        Subject("base", models[0], tiny_tokenizer(), base.source),
        Subject("other", models[1], tiny_tokenizer(), other.source),
    )
    assert (weights.source, weights.equal_bytes) == ("memory", 3)


def test_files_only_where_both_have_them(tmp_path: Path) -> None:
    base = stored("base", tmp_path, {"w": torch.zeros(3)})
    base = Subject("base", Held({"w": torch.ones(3)}), tiny_tokenizer(), base.source)
    for source in ("", "owner/name", str(tmp_path)):
        other = Subject("other", Held({"w": torch.ones(3)}), tiny_tokenizer(), source)
        weights = compare_weights(base, other)
        assert (weights.source, weights.equal_bytes) == ("memory", 3)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(3, device="meta"), "other: w is not in memory; compare the weights of checkpoint folders instead"),
        (torch.ones(2, 2).to_sparse(), "other: w is kept as Tensor; compare the weights of checkpoint folders"),
        (torch.ones(2, dtype=torch.complex128), "other: w cannot be compared: dtype 'complex128' cannot be stored"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_weights(held("base", {"w": torch.ones(3)}), held("other", {"w": tensor}))


def test_what_is_no_tensor_is_left_out() -> None:
    weights = compare_weights(held("base", {"w": torch.ones(3), "_extra_state": b"x"}), held("o", {"w": torch.ones(3)}))
    assert (weights.parameters, weights.only_base) == (3, [])
