"""Newton's method on many problems: an overshoot of one of them does not spoil it or the others."""

from __future__ import annotations

import numpy as np

from bnfctl.tasks.newton import minimise
from bnfctl.tasks.statistics import Array


def log_cosh(place: Array) -> tuple[Array, Array, Array]:
    """Least at 1 and -2; from further than 1.09 away a whole Newton step leads away for ever."""
    x = place - np.array([1.0, -2.0])
    hessian = np.zeros((len(x), 2, 2))
    hessian[:, range(2), range(2)] = 1 - np.tanh(x) ** 2
    return (np.logaddexp(x, -x) - np.log(2)).sum(1), np.tanh(x), hessian


def test_problems_far_from_and_near_to_their_least_value() -> None:
    start = np.array([[1.0, -2.0], [1.5, -2.5], [4.0, -2.0], [-3.0, 2.0]])
    np.testing.assert_allclose(minimise(log_cosh, start), [[1.0, -2.0]] * 4, atol=1e-8)


def test_one_step_for_a_parabola() -> None:
    calls = []

    def parabola(place: Array) -> tuple[Array, Array, Array]:
        calls.append(place)
        return (place**2).sum(1), 2 * place, np.broadcast_to(2 * np.eye(3), (len(place), 3, 3))

    found = minimise(parabola, np.ones((5, 3)))
    np.testing.assert_array_equal(found, np.zeros((5, 3)))
    assert len(calls) == 3
