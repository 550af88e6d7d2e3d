"""From features to an estimated Dice with a lower bound, calibrated on cases that were labelled from other patients.

Shape letters: i rows (a case and a class each), j columns of features, v classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.optimize import lsq_linear
from scipy.special import expit, logit

from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.quality.features import CaseFeatures, Features
from nnunet_sam2.labelling.quality.options import QualityOptions

COLUMNS = (
    "reverse_least",
    "reverse_best",
    "agreement",
    "inside",
    "stability",
    "smoothness",
    "core",
    "supports",
    "members",
    "sam_iou",
)

_PRIOR_SHARES = {"sam_iou": 0.25, "reverse_least": 0.25, "reverse_best": 0.25, "agreement": 0.5, "stability": 0.5}
"""Shares of the prior slope, 1 where not named. On real images SAM's own IoU said least. Reverse propagation and second
opinions find failures, but the better the labels, the more they tell the labelled cases apart and not the labels."""

_TYPICAL = {"smoothness": 1.7, "core": 1.4}
"""Logits that a label's shape counts with where it is like that of the labelled cases' own labels."""

_PRIOR_INTERCEPT = 0.2
"""How far, in logits, the Dice lies above its features, whose cells are coarser than voxels; seen on real images."""

_LEAST, _MOST = 0.02, 0.98
_CASE_SHARE = 0.15
"""Part of the case's mean over its classes in each feature."""

_PULL_SLOPES, _PULL_CLASSES, _PULL_INTERCEPT = 5.0, 5.0, 0.1
"""Strength of the pull to the prior, in observations: few labelled cases move the slopes little, the level a lot."""

_FULL_TRUST = 2
"""Labelled patients from which on there is something to calibrate with."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Hold a labelled case that was labelled from other patients: what was seen of the label, what it was worth."""

    case_id: str
    features: CaseFeatures
    dice: DiceTable
    patient: str | None = None
    """Whose scan it is; None where the case is all there is of its patient."""

    @property
    def patient_id(self) -> str:
        """Return whose scan it is, by a name that no other patient has."""
        return self.patient or self.case_id


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Hold what is expected of one class of one pseudo-label."""

    dice: float | None
    """Estimated Dice; None where the class was not found and some labelled cases lack it too."""
    lower: float | None = None
    """Dice that ``coverage`` of the cases reach, as a rule; None where nothing could be calibrated."""
    coverage: float | None = None
    proven: float | None = None
    """Share of the cases that is sure to reach it, where new patients are drawn as the labelled ones were."""
    calibrated: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Estimate Dice from features by a linear model in logits.

    ``logit(Dice) = level + level of the class + sum of slopes x logit(feature)``, by least squares with a pull to equal
    slopes that sum to one and with slopes that are never negative, so that no feature can come to speak against what
    it stands for. A part of each feature (0.15) is its mean over the case's classes: what went wrong with one class of
    a case went wrong with others. With fewer than two labelled patients the pull is all there is; estimates then say
    that they are not calibrated.

    Lower bounds are jackknife+ (Barber et al., Annals of Statistics 2021), one-sided, for each class from its own
    residuals: every labelled case is predicted by a model without its patient. Cases of one patient share the weight of
    one residual (Lee, Barber & Willett, "Distribution-free inference with hierarchical data", arXiv 2306.06342). The
    bounds hold for a case of a new patient who is drawn like the labelled ones; with n of them the highest coverage is
    n / (n + 1), which is taken where more was asked for. What is proven allows for twice the misses.
    """

    class_values: tuple[int, ...]
    pairs: tuple[Pair, ...] = ()
    options: QualityOptions = field(default_factory=QualityOptions)

    @property
    def calibrated(self) -> bool:
        """Say whether there are enough labelled patients to calibrate with."""
        return len({row.patient for row in self._rows}) >= _FULL_TRUST

    def estimate(self, features: CaseFeatures) -> dict[int, Estimate]:
        """Estimate every class of one pseudo-label."""
        found: dict[int, Estimate] = {}
        table = columns_of(features, relative=not self.calibrated)
        for value, seen in features.items():
            if not seen.voxels:
                # Every labelled case shows the class, so it was missed; or nobody can tell from an empty label.
                missed = seen.shown_in == 1.0
                found[value] = Estimate(dice=0.0 if missed else None, calibrated=self.calibrated)
                continue
            dice = float(expit(self._model.predict(table[value], value)))
            lower, coverage = self._lower(table[value], value)
            found[value] = Estimate(
                dice=dice,
                lower=None if lower is None else min(lower, dice),
                coverage=None if coverage is None else round(coverage, 4),
                proven=None if coverage is None else round(proven_coverage(coverage), 4),
                calibrated=self.calibrated,
            )
        return found

    def leave_one_out(self) -> dict[str, dict[int, Estimate]]:
        """Estimate every labelled case by a calibration on the other patients."""
        return {
            pair.case_id: Calibration(
                class_values=self.class_values,
                pairs=tuple(other for other in self.pairs if other.patient_id != pair.patient_id),
                options=self.options,
            ).estimate(pair.features)
            for pair in self.pairs
        }

    def slopes(self) -> dict[str, float]:
        """Return the slope of every feature, for records."""
        return {name: round(float(slope), 4) for name, slope in zip(COLUMNS, self._model.slopes_j, strict=True)}

    def shift(self, features: CaseFeatures) -> dict[int, float]:
        """Return the slopes' part of the prediction for each class that was found, in logits: no level, only order."""
        table = columns_of(features, relative=not self.calibrated)
        return {v: self._model.slopes_part(table[v]) for v, seen in features.items() if seen.voxels}

    @cached_property
    def _rows(self) -> list[_Row]:
        rows = []
        for pair in self.pairs:
            table = columns_of(pair.features)
            for value, seen in pair.features.items():
                dice = pair.dice.get(value)
                if seen.voxels and dice is not None:
                    rows.append(_Row(patient=pair.patient_id, value=value, columns=table[value], dice=dice))
        return rows

    @cached_property
    def _model(self) -> _Model:
        return _fit(self._rows if self.calibrated else [], self.class_values)

    @cached_property
    def _without(self) -> dict[str, _Model]:
        patients = dict.fromkeys(row.patient for row in self._rows)
        return {p: _fit([row for row in self._rows if row.patient != p], self.class_values) for p in patients}

    def _lower(self, columns: Mapping[str, float | None], value: int) -> tuple[float | None, float | None]:
        rows = [row for row in self._rows if row.value == value]
        count_of = Counter(row.patient for row in rows)
        if not self.calibrated or len(count_of) < _FULL_TRUST:
            return None, None
        candidates = []
        for row in rows:
            model = self._without[row.patient]
            # A Dice of nothing lies at minus infinity in logits: the bound it stands for is nothing.
            residual = -math.inf if row.dice <= _LEAST else _logit(row.dice) - model.predict(row.columns, value)
            candidates.append((model.predict(columns, value) + residual, 1.0 / count_of[row.patient]))
        lower, held = bound_among(candidates, len(count_of), self.options.coverage)
        return float(expit(lower)), held


def bound_rank(patients: int, coverage: float) -> int:
    """Return which of the ascending candidates of ``patients`` with a case each is the lower bound; at least 1."""
    # The small number keeps 0.1 x 10 from being counted as 0.
    return max(1, math.floor((1.0 - coverage) * (patients + 1) + 1e-9))


def bound_among(candidates: Sequence[tuple[float, float]], patients: int, coverage: float) -> tuple[float, float]:
    """Return the highest candidate that ``coverage`` of new cases reach, and the share that does; at least the lowest.

    ``candidates`` come with their parts of their patient, which add up to 1 for each of the ``patients``. Below a
    candidate lie those lower than it and, as one patient more, the new one: with one case a patient the k-th lowest of
    n holds in 1 - k / (n + 1), see `bound_rank`.
    """
    ranked = sorted(candidates)
    bound, missed, share = ranked[0][0], 1.0, 1.0
    for candidate, part in ranked:
        if share <= (1.0 - coverage) * (patients + 1) + 1e-9:
            bound, missed = candidate, share
        share += part
    return bound, 1.0 - missed / (patients + 1)


def proven_coverage(coverage: float) -> float:
    """Return the share of cases that jackknife+ guarantees at a coverage of 1 - a, which is 1 - 2a; at least 0."""
    return max(0.0, 2.0 * coverage - 1.0)


def columns_of(features: CaseFeatures, *, relative: bool = False) -> dict[int, dict[str, float | None]]:
    """Return each found class's columns in logits, with a part of the mean over the case's found classes.

    ``relative``: shape is held against that of the labelled cases' own labels, for where no level of the class is
    calibrated that would say how much of a thin structure is core.
    """
    own = {value: _logits(seen, relative=relative) for value, seen in features.items() if seen.voxels}
    table: dict[int, dict[str, float | None]] = {value: {} for value in own}
    for name in COLUMNS:
        known = [columns[name] for columns in own.values() if columns[name] is not None]
        for value, columns in own.items():
            mine = columns[name]
            table[value][name] = (
                None if mine is None else (1.0 - _CASE_SHARE) * mine + _CASE_SHARE * float(np.mean(known))  # type: ignore[arg-type]
            )
    return table


@dataclass(frozen=True, kw_only=True)
class _Row:
    patient: str
    value: int
    columns: Mapping[str, float | None]
    dice: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Model:
    intercept: float
    levels: Mapping[int, float]
    used: tuple[str, ...] | None
    """Columns that the model was fitted with; None takes those that a row has."""
    slopes_j: np.ndarray

    def predict(self, columns: Mapping[str, float | None], value: int) -> float:
        """Return the expected logit of the Dice."""
        return self.intercept + self.levels.get(value, 0.0) + self.slopes_part(columns)

    def slopes_part(self, columns: Mapping[str, float | None]) -> float:
        used = self.used or tuple(name for name in COLUMNS if columns[name] is not None)
        slopes_j = self.slopes_j if self.used else _prior(used)
        x_j = _filled(columns, used)
        return float(sum(slopes_j[COLUMNS.index(name)] * x for name, x in zip(used, x_j, strict=True)))


def _fit(rows: Sequence[_Row], class_values: Sequence[int]) -> _Model:
    # A column that most rows lack, such as members of strategies with one, is left out.
    used = tuple(name for name in COLUMNS if 2 * sum(row.columns[name] is not None for row in rows) > len(rows))
    if not used:
        return _Model(intercept=_PRIOR_INTERCEPT, levels={}, used=None, slopes_j=_prior(COLUMNS))
    prior_j = _prior(used)[[COLUMNS.index(name) for name in used]]
    classes = tuple(class_values)
    x_ij = np.array([_filled(row.columns, used) for row in rows])
    member_iv = np.array([[float(row.value == value) for value in classes] for row in rows])
    design = np.hstack([np.ones((len(rows), 1)), member_iv, x_ij])
    start = np.concatenate([[_PRIOR_INTERCEPT], np.zeros(len(classes)), prior_j])
    pull = np.sqrt([_PULL_INTERCEPT, *[_PULL_CLASSES] * len(classes), *[_PULL_SLOPES] * len(used)])
    target = np.array([_logit(row.dice) for row in rows])
    least = np.concatenate([np.full(1 + len(classes), -np.inf), np.zeros(len(used))])
    solved = lsq_linear(
        np.vstack([design, np.diag(pull)]), np.concatenate([target, pull * start]), bounds=(least, np.inf)
    ).x
    slopes_j = np.zeros(len(COLUMNS))
    slopes_j[[COLUMNS.index(name) for name in used]] = solved[1 + len(classes) :]
    levels = dict(zip(classes, solved[1 : 1 + len(classes)].tolist(), strict=True))
    return _Model(intercept=float(solved[0]), levels=levels, used=used, slopes_j=slopes_j)


def _prior(used: Sequence[str]) -> np.ndarray:
    shares_j = np.array([_PRIOR_SHARES.get(name, 1.0) if name in used else 0.0 for name in COLUMNS])
    return np.asarray(shares_j / max(shares_j.sum(), 1e-12))


def _filled(columns: Mapping[str, float | None], used: Sequence[str]) -> list[float]:
    """Return the used columns; what a row lacks takes the mean of what it has, or 0 where it has nothing."""
    known = [x for name in used if (x := columns[name]) is not None]
    mean = float(np.mean(known)) if known else 0.0
    return [mean if (x := columns[name]) is None else x for name in used]


def _logits(seen: Features, *, relative: bool) -> dict[str, float | None]:
    found = {name: None if x is None else _logit(x) for name, x in seen.columns.items()}
    for name, typical in seen.typical.items() if relative else ():
        x = found[name]
        found[name] = None if x is None else x - _logit(typical) + _TYPICAL[name]
    return found


def _logit(share: float) -> float:
    return float(logit(min(max(share, _LEAST), _MOST)))
