import numpy as np
import pytest

from adaptermesh.artifact.ordered_product import kron_sum, matmul


@pytest.mark.parametrize(("left", "right"), [((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 1)), ((1, 1), (1, 1))])
def test_a_product_is_that_of_numpy(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in (left, right))
    found = matmul(a, b)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, a @ b, rtol=1e-5, atol=1e-6)


def test_a_sum_of_kronecker_products_is_that_of_numpy() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 2, 4), (3, 5, 2)))
    found = kron_sum(a, b)
    assert found.shape == (10, 8)
    expected = np.sum([np.kron(one, other) for one, other in zip(a, b, strict=True)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_sum_is_that_of_the_axis() -> None:
    big = np.float32(2.0**60)
    left = np.array([[big, 1.0, -big]], np.float32)
    assert matmul(left, np.ones((3, 1), np.float32))[0, 0] == 0.0
    assert matmul(left[:, [0, 2, 1]], np.ones((3, 1), np.float32))[0, 0] == 1.0
