"""Small robust regressions: the tables have ten columns, not thousands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from samullm_plugin.model.types import Floats

_REWEIGHTINGS = 20
_DIFFERENCE = 1e-4
"""Width of the forward differences."""


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """Return ``x >= 0`` that minimises ``|matrix @ x - target|``, whatever the columns' scales.

    Args:
        matrix: shape ``(n, k)``.
        target: shape ``(n,)``.

    Returns:
        Array of shape ``(k,)``; columns of zeros get 0.
    """
    from scipy.optimize import nnls

    scale = np.sqrt(np.einsum("ij,ij->j", matrix, matrix))
    scale[scale == 0] = 1.0
    return np.asarray(nnls(matrix / scale, target)[0] / scale, dtype=np.float64)


def least_absolute(matrix: Floats, target: Floats, *, floor: float) -> Floats:
    """Return ``x`` that about minimises the summed absolute residual (iterated reweighting).

    Args:
        matrix: shape ``(n, k)``.
        target: shape ``(n,)``.
        floor: residuals below it weigh alike; in units of ``target``.
    """
    weight = np.ones(len(target))
    x: Floats = np.zeros(matrix.shape[1])
    for _ in range(_REWEIGHTINGS):
        x = np.asarray(
            np.linalg.lstsq(matrix * weight[:, None], target * weight, rcond=None)[0],
            dtype=np.float64,
        )
        weight = 1 / np.sqrt(np.maximum(np.abs(matrix @ x - target), floor))
    return x


def levenberg_marquardt(
    residuals: Callable[[Floats], Floats],
    start: Floats,
    *,
    rounds: int = 40,
) -> Floats:
    """Return the parameters of least squared residuals near ``start``.

    Args:
        residuals: from parameters of shape ``(k,)`` to residuals of shape ``(n,)``.
        start: first guess, of about unit scale.
        rounds: most accepted or refused steps.
    """
    x = np.array(start, dtype=np.float64)
    r = residuals(x)
    cost, damping = float(r @ r), 1e-2
    for _ in range(rounds):
        jacobian = np.empty((len(r), len(x)))
        for j in range(len(x)):
            moved = x.copy()
            moved[j] += _DIFFERENCE
            jacobian[:, j] = (residuals(moved) - r) / _DIFFERENCE
        gram, gradient = jacobian.T @ jacobian, jacobian.T @ r
        improved = False
        for _ in range(6):
            damped = gram + damping * np.diag(np.diag(gram) + 1e-9)
            trial = x - np.linalg.solve(damped, gradient)
            trial_r = residuals(trial)
            trial_cost = float(trial_r @ trial_r)
            if trial_cost < cost:
                improved = True
                break
            damping *= 5
        if not improved:
            break
        gain = 1 - trial_cost / cost
        x, r, cost, damping = trial, trial_r, trial_cost, max(damping / 5, 1e-9)
        if gain < 1e-5:
            break
    return x
