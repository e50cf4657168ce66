"""Newton's method on many small convex problems at once: one per resample of a bootstrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bnfctl.tasks.statistics import Array

Problem = Callable[[Array], tuple[Array, Array, Array]]
"""Parameters [b, P] -> value [b], gradient [b, P], Hessian [b, P, P] (positive definite)."""

STEPS = 200
TOLERANCE = 1e-9


def minimise(problem: Problem, start: Array) -> Array:
    """The parameters [b, P] of the least value; for a logistic likelihood this is IRLS.

    A step that would raise a value is halved for that problem alone, so every one of them converges.
    """
    place = start
    value, gradient, hessian = problem(place)
    step = _newton_step(gradient, hessian)
    for _ in range(STEPS):
        trial_value, gradient, hessian = problem(place + step)
        # Rounding of a value near its least must not look like a rise.
        fell = trial_value <= value + 1e-12 * (1 + np.abs(value))
        place = np.where(fell[:, None], place + step, place)
        value = np.where(fell, trial_value, value)
        if (np.abs(step).max(1) < TOLERANCE).all():
            break
        # Where a trial was refused its Hessian may be anything, singular too, and is not used.
        usable = np.where(fell[:, None, None], hessian, np.eye(start.shape[1]))
        step = np.where(fell[:, None], _newton_step(gradient, usable), step / 2)
    return place


def _newton_step(gradient: Array, hessian: Array) -> Array:
    return -np.asarray(np.linalg.solve(hessian, gradient[:, :, None]), np.float64)[:, :, 0]
