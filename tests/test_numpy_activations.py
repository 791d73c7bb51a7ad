"""The NumPy binding of the formulas against NumPy and SciPy."""

import numpy as np
import pytest
from test_activations import REFERENCE, X

from neuroweave.activations import FORMULAS
from neuroweave.activations.numpy import PRIMITIVES


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("f8", 1e-14), ("f4", 2e-6)])
def test_formula_equals_the_reference_and_keeps_the_dtype(name, dtype, tolerance):
    found = FORMULAS[name](X.astype(dtype), PRIMITIVES)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_allclose(found, REFERENCE[name](X.astype(dtype).astype("f8")), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 1, 3)])
def test_any_shape(shape):
    x = np.full(shape, 0.5)
    for name, formula in FORMULAS.items():
        found = np.asarray(formula(x, PRIMITIVES))
        assert found.shape == shape, name
        np.testing.assert_allclose(found, REFERENCE[name](x), rtol=1e-14)
