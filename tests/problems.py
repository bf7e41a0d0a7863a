"""Inputs for layers, and how far a pruned layer is off."""

import numpy as np


def inputs(rows, n, seed=0):
    """Correlated inputs with features of very different size, float64."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) / np.arange(1, n + 1)[None, :] ** 0.7
    return rng.standard_normal((rows, n)) @ mix.T * np.exp(0.5 * rng.standard_normal(n))


def error(x, w, new):
    return np.sum((x @ (np.asarray(new, np.float64) - w)) ** 2) / np.sum((x @ w) ** 2)
