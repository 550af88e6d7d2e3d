"""An approximate index of a large memory, where comparing a slice with every entry would take too long.

Shape letters: M entries, P locations of a slice, F features, C channels (background first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from nnunet_sam2.errors import InputError

_LISTS_PER_ROOT = 4
_ENTRIES_PER_LIST = 64
"""What the lists' centres are learnt from; faiss asks for 39 at least."""

_LEAST_PROBED = 16
_PROBED_SHARE = 1 / 12
"""Part of the lists that a search reads: with it more than 9 of 10 neighbours are the exact ones; see the tests."""


def require_faiss() -> Any:
    """Return the module faiss, or raise `InputError` with the way to get it."""
    try:
        import faiss
    except ImportError:
        raise InputError(
            "index_above needs faiss, which is not installed: pip install 'nnunet_sam2[index]', or leave the option out"
        ) from None
    return faiss


class ApproximateNearest:
    """Find neighbours among many entries by an inverted file of 16-bit vectors (faiss), reading a part of its lists."""

    def __init__(self, parts: Callable[[], Iterable[torch.Tensor]], entries: int) -> None:
        """Build the index from parts (m, F) that come in the order in which entries are numbered, M in all.

        They are asked for twice, so that they never lie in memory together: a sample teaches the lists' centres first.
        """
        faiss = require_faiss()
        faiss.omp_set_num_threads(torch.get_num_threads())
        lists = max(1, min(round(_LISTS_PER_ROOT * entries**0.5), entries // _ENTRIES_PER_LIST))
        step = max(1, entries // (lists * _ENTRIES_PER_LIST))
        sample_mf = np.concatenate([_rows(part)[::step] for part in parts()])
        self._index = faiss.index_factory(sample_mf.shape[1], f"IVF{lists},SQfp16")
        self._index.train(sample_mf)
        for part in parts():
            self._index.add(_rows(part))
        self._index.nprobe = min(lists, max(_LEAST_PROBED, round(_PROBED_SHARE * lists)))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def nearest(self, query_pf: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return squared distances beyond the nearest entry's and the entries' numbers, like `nearest` does."""
        distance_pk, number_pk = self._index.search(_rows(query_pf), min(count, len(self)))
        numbers, distances = torch.from_numpy(number_pk), torch.from_numpy(distance_pk)
        # Where the lists that were read held too few, the nearest entry stands in, as far away as the farthest.
        missing = numbers < 0
        excess = (distances - distances[:, :1]).masked_fill(missing, 0.0)
        farthest_p1 = excess.amax(dim=1, keepdim=True)
        return torch.where(missing, farthest_p1, excess), torch.where(missing, numbers[:, :1], numbers)


def _rows(part_mf: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(part_mf.numpy(), dtype=np.float32)
