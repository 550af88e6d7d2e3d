"""How a cohort's images are shown to SAM 2: in which orientation, which channels, and in which windows of intensity.

Shape letters: C channels, K classes (background first), V voxels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import CT, Case, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames, default_channels
from nnunet_sam2.geometry import Geometry, choose_slice_axis, single_slice_axis
from nnunet_sam2.orientation import Turn, common_direction, orientation_note, turn_to
from nnunet_sam2.planes import intensity_window
from nnunet_sam2.volumes import Volume, read_label, read_volume

PERCENTILES = (0.5, 99.5)
"""Percentiles of the classes' intensities between which nnU-Net clips CT."""

_SAMPLES = 10_000
"""Values taken of each case (as in nnU-Net's fingerprint), so that a large organ does not outweigh the other cases."""

_PLANES = 3
_LEAST_VARIANCE = 1e-4
"""Variance that a class has in every channel at least (windowed values, 0 to 1): a constant one does not decide."""


def cohort_direction(cohort: Cohort) -> tuple[float, ...]:
    """Return the direction cosines next to which all cases of a cohort are brought."""
    return common_direction(case.geometry for case in cohort.labelled or cohort.cases)


def cohort_slice_axis(cohort: Cohort) -> int:
    """Choose one slice axis for the whole cohort: the one that most labelled cases would choose, the first in a tie.

    It counts in the shown order of axes. Supports and queries must show the same plane; a few volumes with another
    spacing must not turn theirs.
    """
    direction, cases = cohort_direction(cohort), cohort.labelled or cohort.cases
    counts = Counter(choose_slice_axis(shown_geometry(case.geometry, direction)) for case in cases)
    return min(counts, key=lambda axis: (-counts[axis], axis))


def shown_geometry(geometry: Geometry, direction: Sequence[float]) -> Geometry:
    """Return the grid of a case as it is shown."""
    return turn_to(geometry, direction).geometry(geometry)


def told_orientations(cohort: Cohort) -> str | None:
    """Return what there is to say of how a cohort's files are stored, in one line; see `orientation_note`."""
    return orientation_note({case.case_id: case.geometry for case in cohort.cases}, cohort_direction(cohort))


@dataclass(frozen=True, kw_only=True, eq=False)
class Showing:
    """Say which channels SAM 2 sees of a cohort's images, and in which windows: found on the supports when first asked.

    All cases of a job, the supports among them, are shown alike: what is chosen here is chosen once, by all supports.
    """

    cohort: Cohort
    support_ids: tuple[str, ...]

    @cached_property
    def direction(self) -> tuple[float, ...]:
        """Return the direction next to which all cases are brought."""
        return cohort_direction(self.cohort)

    def turn(self, case: Case) -> Turn:
        """Return what brings a case's arrays to the order of axes that all are shown in."""
        return turn_to(case.geometry, self.direction)

    def identity(self, case: Case) -> list[Any]:
        """Return what decides, beside images and labels, how a case and the supports are shown: a JSON value."""
        cases = [case, *(self.cohort.case(case_id) for case_id in self.support_ids)]
        return [list(self.cohort.channels), *([*turn.axes, *turn.flips] for turn in map(self.turn, cases))]

    def frames(self, volume: Volume, *, size: int, slice_axis: int) -> Frames:
        """Return the frames of a volume that was turned; one slice alone is shown as it is, whatever the others do."""
        single = single_slice_axis(volume.geometry)
        return Frames.from_volume(
            volume,
            size=size,
            slice_axis=slice_axis if single is None else single,
            channels=self.channels,
            windows=self.windows,
        )

    @cached_property
    def channels(self) -> tuple[int, int, int]:
        """Return the channels that become red, green and blue: up to three as they are, of more those that tell most.

        Those are the three by which the supports' classes and their background are told apart best by intensity alone
        (`class_separation`), in the cohort's order.
        """
        count = len(self.cohort.channels)
        if count <= _PLANES or not self.support_ids:
            return default_channels(count)
        values_vc, classes_v = zip(*self._samples(), strict=True)
        found = {
            chosen: class_separation(np.concatenate(values_vc)[:, chosen], np.concatenate(classes_v))
            for chosen in combinations(range(count), _PLANES)
        }
        best = max(found, key=lambda chosen: found[chosen])
        return (best[0], best[1], best[2])

    @cached_property
    def windows(self) -> dict[int, tuple[float, float]]:
        """Return the windows of channels of known units (CT), by channel: the range of the classes' intensities.

        It is what nnU-Net clips CT to (`PERCENTILES` of the voxels of all classes, as many of each case), with limits
        rounded outwards, so that a support more or less seldom changes them, and with them all embeddings.
        """
        known = [c for c, name in enumerate(self.cohort.channels) if name.casefold() == CT]
        by_case = list(self._foreground(known)) if known else []
        if not by_case:
            return {}
        low_c, high_c = np.percentile(np.concatenate(by_case, axis=1), PERCENTILES, axis=1)
        return {
            channel: rounded_window(float(low), float(high))
            for channel, low, high in zip(known, low_c, high_c, strict=True)
            if high > low
        }

    def record(self, frames: Frames, turn: Turn) -> dict[str, Any]:
        """Return how a case was shown, as a JSON value."""
        return {
            "channels": [self.cohort.channels[c] for c in frames.channels],
            "windows": [[round(v, 6) for v in frames.windows[c]] for c in frames.channels],
            "slice_axis": frames.slice_axis,
            "turned": {"axes_zyx": list(turn.axes), "flips_zyx": list(turn.flips)} if turn.changes else None,
        }

    def _foreground(self, channels: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield `_SAMPLES` values of each support's classes, (C, V): evenly spaced among them in order."""
        for array_czyx, label_zyx in self._labelled():
            inside_cv = array_czyx[channels][:, np.isin(label_zyx, self.cohort.class_values)]
            if inside_cv.shape[1]:
                order = np.linspace(0, inside_cv.shape[1] - 1, _SAMPLES).round().astype(int)
                yield np.sort(inside_cv, axis=1)[:, order]

    def _samples(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield windowed values (V, C) of each support with their classes (V,): evenly spaced through each class."""
        for array_czyx, label_zyx in self._labelled():
            windows = [
                self.windows.get(channel) or intensity_window(array_zyx, *PERCENTILES)
                for channel, array_zyx in enumerate(array_czyx)
            ]
            # Where every channel is at its minimum nothing was scanned.
            scanned_zyx = (array_czyx > array_czyx.min(axis=(1, 2, 3), keepdims=True)).any(axis=0)
            places, classes = [], []
            for value in (0, *self.cohort.class_values):
                found = np.flatnonzero((label_zyx == value) & scanned_zyx)
                places.append(found[:: max(1, len(found) // _SAMPLES)])
                classes.append(np.full(len(places[-1]), value))
            values_cv = array_czyx.reshape(len(array_czyx), -1)[:, np.concatenate(places)]
            lows, highs = (np.array(ends)[:, None] for ends in zip(*windows, strict=True))
            width = np.where(highs > lows, highs - lows, 1.0)
            yield np.clip((values_cv - lows) / width, 0, 1).T, np.concatenate(classes)

    def _labelled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for case_id in self.support_ids:
            case = self.cohort.case(case_id)
            paths, label = self.cohort.image_paths(case), self.cohort.label_path(case)
            array_czyx, (label_zyx, _) = read_volume(paths).array_czyx, read_label(label)
            if array_czyx.shape[1:] != label_zyx.shape:
                raise InputError(f"{label} and its image differ in shape; resample one of them")
            yield array_czyx, label_zyx


def class_separation(values_vc: np.ndarray, classes_v: np.ndarray) -> float:
    """Return how well classes are told apart by values of several channels, 0 to 1: the mean over pairs of classes.

    ``values_vc`` is (V, C), of about 0 to 1. A pair counts by half its Jeffries-Matusita distance, by which bands of
    satellite images are chosen: 1 - exp(-B), B the Bhattacharyya distance of normal distributions (Kailath, IEEE Trans.
    Communication Technology 1967). It saturates, so that a class which shows well already does not draw a second
    channel to itself while another shows in none.
    """
    found = []
    for value in np.unique(classes_v):
        members_vc = values_vc[classes_v == value]
        covariance = np.cov(members_vc, rowvar=False, bias=True) + _LEAST_VARIANCE * np.eye(values_vc.shape[1])
        found.append((members_vc.mean(axis=0), covariance))
    return float(np.mean([1 - np.exp(-_bhattacharyya(*one, *other)) for one, other in combinations(found, 2)] or [0.0]))


def _bhattacharyya(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray) -> float:
    both, apart = (cov + other_cov) / 2, mean - other_mean
    logs = [np.linalg.slogdet(matrix)[1] for matrix in (both, cov, other_cov)]
    return float(apart @ np.linalg.solve(both, apart) / 8 + (logs[0] - (logs[1] + logs[2]) / 2) / 2)


def rounded_window(low: float, high: float) -> tuple[float, float]:
    """Return a window with its limits rounded outwards, by less than a tenth of its width."""
    step = 10.0 ** np.floor(np.log10(high - low) - 1)
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)
