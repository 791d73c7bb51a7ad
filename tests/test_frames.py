"""Bases, frames, maps between sizes and random numbers, against SciPy, exact sums and float64 linear algebra."""

import hashlib
import math

import numpy as np
import pytest
import scipy.fft

from neuroweave.surgery.neurons.frames import (
    GRID,
    LARGEST,
    Frames,
    basis,
    carry_over,
    cosine_table,
    cosines,
    level,
    unit_directions,
)
from neuroweave.surgery.neurons.randomness import permutation, random_bits

SIZES = [1, 2, 3, 7, 123, 576]


def directions(count, size, seed=0):
    return unit_directions(np.random.default_rng(seed).normal(size=(count, size)))


def whole(size):
    return basis(size, np.arange(size), np.arange(size))


# Random numbers


def test_random_bits_are_philox_under_a_hashed_key():
    digest = hashlib.sha256(b'[42, "signs", 7]').digest()
    reference = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    found = random_bits(42, "signs", 7, count=1001)
    assert np.array_equal(found, reference.random_raw(1001))
    assert np.array_equal(random_bits(42, "signs", 7, count=3), found[:3])
    assert found[:2].tolist() == [3361875613882558371, 284645695144997171]


@pytest.mark.parametrize("other", [(43, "signs", 7), (42, "sign", 7), (42, "signs", "7"), (42, "signs", 7, 0)])
def test_another_seed_or_identity_is_another_stream(other):
    assert not np.intersect1d(random_bits(*other, count=1000), random_bits(42, "signs", 7, count=1000)).size


def test_blocks_are_far_apart_in_one_stream():
    digest = hashlib.sha256(b'[1, "x"]').digest()
    reference = np.random.Philox(key=int.from_bytes(digest[:16], "little")).advance(3 << 128)
    assert np.array_equal(random_bits(1, "x", count=5, block=3), reference.random_raw(5))


@pytest.mark.parametrize("count", [1, 2, 7, 123])
def test_permutation(count):
    found = permutation(1, "order", count=count)
    assert sorted(found.tolist()) == list(range(count))
    assert count < 7 or found.tolist() != list(range(count))


# The basis


@pytest.mark.parametrize("size", SIZES)
def test_the_basis_is_the_orthonormal_dct(size):
    reference = scipy.fft.dct(np.eye(size), type=2, norm="ortho", axis=0)
    np.testing.assert_allclose(whole(size), reference, rtol=0, atol=0.51 / GRID)
    assert np.array_equal(whole(size) * GRID, np.rint(whole(size).astype("f8") * GRID))


@pytest.mark.parametrize("size", [7, 123])
def test_any_rows_and_columns(size):
    rows, columns = np.array([size - 1, 0, 3, 3]), np.array([5, 1])
    assert np.array_equal(basis(size, rows, columns), whole(size)[np.ix_(rows, columns)])


def test_cosines_are_the_same_bits_everywhere():
    digest = hashlib.sha256(cosine_table(5376).tobytes()).hexdigest()
    assert digest == "e75a5bc9273eb7be90a66a2f887a4414fe96280e5d4f185bfccea03709ad3ca8"
    assert float(level(5376)) == round(GRID / math.sqrt(5376)) / GRID


@pytest.mark.parametrize("size", [0, -1, LARGEST + 1])
def test_a_size_that_is_none(size):
    with pytest.raises(ValueError, match=rf"hidden size {size}: expected 1 to {LARGEST}"):
        cosine_table(size)


# Directions


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 3e-30, 7e30])
def test_unit_directions(size, scale):
    vectors = np.random.default_rng(1).normal(size=(5, size)) * scale
    found = unit_directions(vectors)
    np.testing.assert_allclose(found, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1.1 / GRID)
    assert np.array_equal(found * GRID, np.rint(found.astype("f8") * GRID))
    assert np.array_equal(unit_directions(found[:1]), found[:1]) or size > 1


@pytest.mark.parametrize(("value", "message"), [(0.0, "zero"), (np.nan, "not finite"), (np.inf, "not finite")])
def test_no_direction(value, message):
    vectors = np.ones((3, 4))
    vectors[1] = value
    with pytest.raises(ValueError, match=f"direction 1 is {message}; it has no unit vector"):
        unit_directions(vectors)


def test_dot_products_are_exact_in_any_order():
    a, b = directions(4, 1234), directions(4, 1234, seed=1)
    exact = [math.fsum((x.astype("f8") * y.astype("f8")).tolist()) for x, y in zip(a, b, strict=True)]
    order = np.random.default_rng(2).permutation(1234)
    for x, y in ((a, b), (a[:, order], b[:, order])):
        assert np.diag(x.astype("f8") @ y.astype("f8").T).tolist() == exact
        assert (x.astype("f8") * y.astype("f8")).sum(axis=1).tolist() == exact


def test_cosines():
    a, b = directions(4, 123), directions(4, 123, seed=1)
    expected = (a.astype("f8") * b.astype("f8")).sum(axis=1)
    np.testing.assert_allclose(cosines(a, b), expected, atol=1e-6)
    assert cosines(a, a).tolist() == [1] * 4
    assert cosines(a, -a).tolist() == [-1] * 4


# Frames


def signs_of(frames, which):
    return np.where(frames.sign_bits(np.array([which]), slice(0, frames.size))[0], -1.0, 1.0)


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_is_orthonormal_and_starts_with_its_direction(size):
    around = directions(3, size)
    frames = Frames(around, 1, "test")
    for which in range(3):
        rows = frames.vectors(which, np.arange(size))
        assert np.array_equal(rows[0], around[which])
        np.testing.assert_allclose(rows.astype("f8") @ rows.T.astype("f8"), np.eye(size), atol=3e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1, 7, 123])
def test_a_frame_around_the_basis_vector_itself(size, sign):
    signs = signs_of(Frames(directions(1, size), 1, "test"), 0)
    around = (sign * signs[None] * level(size)).astype("f4")
    rows = Frames(around, 1, "test").vectors(0, np.arange(size)).astype("f8")
    np.testing.assert_allclose(rows @ rows.T, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("size", [3, 123, 576])
def test_a_frame_is_a_reflected_basis(size):
    frames = Frames(directions(3, size), 5, "test")
    for which in range(3):
        signed = scipy.fft.dct(np.eye(size), type=2, norm="ortho", axis=0) * signs_of(frames, which)
        c = frames.directions[which].astype("f8")
        v = signed[0] + c if signed[0] @ c >= 0 else signed[0] - c
        reflected = signed - 2 * np.outer(signed @ v, v) / (v @ v)
        np.testing.assert_allclose(np.abs(reflected[0] @ c), 1, atol=1e-6)
        np.testing.assert_allclose(frames.vectors(which, np.arange(size))[1:], reflected[1:], atol=1e-6)


def test_coefficients_come_from_exact_sums():
    size, rows = 1234, np.array([1, 2, 617, 1233])
    frames = Frames(directions(70, size), 5, "test")
    h = basis(size, rows, np.arange(size)).astype("f8")
    found = frames.coefficients(rows)
    for which in (0, 69):
        v = frames.reflectors(np.array([which]), slice(0, size))[0].astype("f8")
        exact = [-2 * math.fsum((v * row).tolist()) / math.fsum((v * v).tolist()) for row in h]
        assert found[:, which].tolist() == np.array(exact, "f4").tolist()
    assert np.array_equal(frames.coefficients(rows[2:], np.array([69, 3])), found[2:, [69, 3]])


def test_columns_of_reflectors_do_not_depend_on_the_cut():
    frames = Frames(directions(5, 123), 5, "test")
    which = np.array([4, 0, 4])
    everything = frames.reflectors(which, slice(0, 123))
    for begin, end in [(0, 1), (7, 9), (8, 16), (63, 123), (122, 123), (5, 5)]:
        assert np.array_equal(frames.reflectors(which, slice(begin, end)), everything[:, begin:end])


def test_frames_of_different_neurons_have_nothing_in_common():
    size = 576
    frames = Frames(directions(40, size), 5, "test")
    same_row = np.stack([frames.vectors(which, np.array([9]))[0] for which in range(40)]).astype("f8")
    cosines = (same_row @ same_row.T)[np.triu_indices(40, 1)]
    assert abs(cosines).max() < 5 / math.sqrt(size)
    assert 0.8 < cosines.std() * math.sqrt(size) < 1.2


# Other hidden sizes


@pytest.mark.parametrize(("old", "new"), [(7, 123), (123, 7), (1, 3), (65, 66), (576, 960)])
def test_the_map_is_semi_orthogonal(old, new):
    large, small = max(old, new), min(old, new)
    rows = permutation(3, "map", old, new, "rows", count=large)[:small]
    signs = 1 - 2 * (random_bits(3, "map", old, new, "signs", count=large) >> np.uint64(63)).astype("f8")
    m = scipy.fft.dct(np.eye(large), type=2, norm="ortho", axis=0)[rows] * signs
    np.testing.assert_allclose(m @ m.T, np.eye(small), atol=1e-12)
    vectors = directions(70, old)
    carried = vectors @ (m if new > old else m.T)
    if new > old:
        np.testing.assert_allclose(np.linalg.norm(carried, axis=1), 1, atol=1e-6)
    expected = carried / np.linalg.norm(carried, axis=1, keepdims=True)
    found = carry_over(vectors, new, 3)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    assert np.array_equal(carry_over(vectors[66:67], new, 3)[0], found[66])


def test_growing_keeps_angles():
    vectors = directions(20, 123)
    found = carry_over(vectors, 576, 9).astype("f8")
    np.testing.assert_allclose(found @ found.T, vectors.astype("f8") @ vectors.T.astype("f8"), atol=2e-6)


def test_the_same_size_is_left_alone():
    vectors = directions(3, 7)
    assert carry_over(vectors, 7, 1) is vectors
