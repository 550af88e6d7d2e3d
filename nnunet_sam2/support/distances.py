"""What the matching metrics share: images at one size, distances between many vectors.

Shape letters: N library slices, Q query slices, F numbers of a description, S model size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

_COLUMNS = 4096
"""Numbers that a float32 product sums at once; over the half million of LPIPS it would lose two digits."""


def resized(image_3ss: np.ndarray, size: int) -> torch.Tensor:
    """Return an image (3, S, S) as a tensor at another size, bilinear, antialiased where it shrinks."""
    image = torch.from_numpy(np.ascontiguousarray(image_3ss, np.float32))
    if image.shape[-1] == size:
        return image
    return interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0]


def squared_distances(query_qf: np.ndarray, library_nf: np.ndarray, *, exact: bool = False) -> np.ndarray:
    """Compute the squared Euclidean distances of Q vectors to N others, (Q, N) float64.

    By matrix products, or, with ``exact``, by the differences themselves: slower, and right in the last digits of
    small distances.
    """
    if exact:
        return np.stack([np.square(library_nf - query_f).sum(axis=1, dtype=np.float64) for query_f in query_qf])
    query, library = torch.from_numpy(query_qf), torch.from_numpy(library_nf)
    squares = [torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).square() for v in (query, library)]
    products = torch.zeros(len(query), len(library), dtype=torch.float64)
    for start in range(0, query.shape[1], _COLUMNS):
        stop = start + _COLUMNS
        products += (query[:, start:stop] @ library[:, start:stop].T).double()
    return np.asarray((squares[0][:, None] + squares[1][None] - 2.0 * products).clamp_min(0.0).numpy())
