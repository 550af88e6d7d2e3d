"""How sure a source may be: one temperature, found on labels that it has not learnt from.

Shape letters: C channels (background first), n voxels, z y x voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_dilation
from scipy.special import logsumexp

LEAST_PROBABILITY = 1.0 / 510.0
"""What a stored probability of nothing stands for, all classes together: half a step of its 255."""

DOUBTED = 0.1
"""Probability of foreground from which on a voxel is in doubt."""

LEAST, MOST = 0.25, 4.0
"""Bounds of a temperature: beyond, a few gross errors speak and not the source's own doubt."""

_GRID = np.geomspace(LEAST, MOST, 49)
_RIM = 2
"""Voxels around a border that are looked at: inside and far outside sources are certain, right, and no measure of
doubt."""

_MOST_VOXELS = 20_000


def fit_temperature(prob_czyx: np.ndarray, target_zyx: np.ndarray, *, sure_czyx: np.ndarray | None = None) -> float:
    """Find the temperature that makes a source's probabilities most likely in one case (Guo et al., ICML 2017).

    ``prob_czyx`` sums to one; at temperature T it is its power 1 / T, normalised: above 1 less sure, below 1 surer.
    ``target_zyx`` holds the right channel of each voxel, -1 where nobody judged. With ``sure_czyx`` the target is not
    certain and each channel counts by its probability. The likelihood is that of the voxels around the borders of
    either side, where labels are decided. 1 where there is none.
    """
    here = _in_question(prob_czyx, target_zyx)
    if not here.size:
        return 1.0
    channels = len(prob_czyx)
    log_prob_cn = log_probability(prob_czyx.reshape(channels, -1)[:, here].astype(np.float64))
    if sure_czyx is None:
        said_n = log_prob_cn[target_zyx.ravel()[here], np.arange(here.size)]
    else:
        said_n = (log_prob_cn * sure_czyx.reshape(channels, -1)[:, here]).sum(axis=0)
    losses = [float((logsumexp(log_prob_cn / t, axis=0) - said_n / t).mean()) for t in _GRID]
    return float(_GRID[int(np.argmin(losses))])


def shrunk_temperature(found: Sequence[float], default: float = 1.0) -> float:
    """Return the geometric mean of what patients gave, with ``default`` as one patient more."""
    return float(np.exp((np.log(found).sum() + np.log(default)) / (len(found) + 1)))


def at_temperature(prob_czyx: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities at a temperature, summing to one over the channels."""
    return softmax(log_probability(prob_czyx.copy()) / np.asarray(temperature, prob_czyx.dtype))


def log_probability(prob_czyx: np.ndarray) -> np.ndarray:
    """Turn probabilities into their logarithms, in place; nothing counts as what was too little to be stored."""
    np.maximum(prob_czyx, LEAST_PROBABILITY / max(len(prob_czyx) - 1, 1), out=prob_czyx)
    return np.log(prob_czyx, out=prob_czyx)


def in_doubt(seen_zyx: np.ndarray) -> np.ndarray:
    """Return how far a temperature acts: in full where foreground has `DOUBTED`, not at all where it has nothing.

    Far from every organ it is certain that nothing is there, and there is much of that: a little doubt in each of its
    voxels would outweigh the organs.
    """
    return np.asarray(np.minimum(seen_zyx / np.float32(DOUBTED), 1.0))


def softmax(log_czyx: np.ndarray) -> np.ndarray:
    """Turn log-odds into probabilities, in place."""
    log_czyx -= log_czyx.max(axis=0, keepdims=True)
    np.exp(log_czyx, out=log_czyx)
    log_czyx /= log_czyx.sum(axis=0, keepdims=True)
    return log_czyx


def _in_question(prob_czyx: np.ndarray, target_zyx: np.ndarray) -> np.ndarray:
    """Return the flat indices of judged voxels around both labels' borders, at most `_MOST_VOXELS`, evenly spread."""
    border_zyx = _border(prob_czyx.argmax(axis=0)) | _border(target_zyx)
    near_zyx = binary_dilation(border_zyx, iterations=_RIM) if border_zyx.any() else border_zyx
    here = np.flatnonzero(near_zyx & (target_zyx >= 0))
    return here[:: -(-here.size // _MOST_VOXELS)] if here.size else here


def _border(label_zyx: np.ndarray) -> np.ndarray:
    """Return the voxels on both sides of every border."""
    found_zyx = np.zeros(label_zyx.shape, bool)
    for axis in range(label_zyx.ndim):
        along, found = np.moveaxis(label_zyx, axis, 0), np.moveaxis(found_zyx, axis, 0)
        differ = along[1:] != along[:-1]
        found[1:] |= differ
        found[:-1] |= differ
    return found_zyx
