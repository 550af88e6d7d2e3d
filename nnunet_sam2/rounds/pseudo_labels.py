"""A round's labels: SAM 2 and student fused by their quality, held against the labels of the round before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.job import CONFIDENCE
from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.pooling import fuse_sources
from nnunet_sam2.labelling.quality.trust import fused_estimate, judge, trusted_confidence
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.decisions.holds import CaseHold, Holds
from nnunet_sam2.rounds.decisions.labels import decide
from nnunet_sam2.rounds.ending.convergence import Change, class_change, summarise_change
from nnunet_sam2.rounds.sources import Sources
from nnunet_sam2.storage import write_json
from nnunet_sam2.support.library import PROBABILITIES, read_probabilities, write_probabilities
from nnunet_sam2.volumes import read_label, write_label, write_map

CONFIDENT = 0.5
"""Confidence from which on a voxel is called confident: it weighs at least half as much as one of a human label."""

FUSION_VERSION = 2
"""Raised when the same sources give other labels than before, so that rounds do not mix two ways."""

_CERTAIN = 0.99


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Hold a round's pseudo-labels and how they came about."""

    folder: Path
    """Holds ``CASE<ending>``, ``confidence/CASE<ending>`` and, where kept, ``probabilities/CASE.npz``."""
    used_cases: tuple[str, ...]
    """Cases that the round trains on."""
    left_out: dict[str, str]
    """Cases that it does not train on, with the reason."""
    change: Change | None
    quality: dict[str, dict[int, float]]
    """Estimated Dice a source and class over the cohort, which weighted the fusion of cases without their own."""
    voxels: dict[str, dict[int, int]]
    confidence: dict[str, float]
    """Mean confidence of a case over the voxels that are not certain background."""
    confident: dict[str, float] = field(default_factory=dict)
    """Share of these voxels with a confidence of `CONFIDENT` or more."""
    estimates: dict[str, DiceTable] = field(default_factory=dict)
    """Estimated Dice of every case and class of the fused labels; None where nothing is known."""
    distrusted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes of used cases whose estimate is below the least: none of their voxels is learnt from."""
    human_cases: tuple[str, ...] = ()
    """Used cases whose whole label a person drew after the dataset was made; the trainer counts them as labelled."""
    drawn: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes that a person drew: every one where the whole label is a person's. The sources have no part in them."""
    accepted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes that stay as a person accepted them; the sources have no part in them either."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """What made each source as sure as it is right; above 1 it was too sure."""
    right: dict[int, float] = field(default_factory=dict)
    """Estimated share of each class's disagreement between the sources in which SAM 2 is right."""
    held_out: int = 0
    """Patients on whose human labels the student was measured."""
    digest: str = ""

    def files(self, file_ending: str) -> tuple[Path, ...]:
        """Return all label and confidence files, and those of probabilities that were kept."""
        cases = sorted([*self.used_cases, *self.left_out])
        names = [f"{case}{file_ending}" for case in cases]
        kept = [path for case in cases if (path := self.folder / PROBABILITIES / f"{case}.npz").is_file()]
        return (*(path for name in names for path in (self.folder / name, self.folder / CONFIDENCE / name)), *kept)

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON value; JSON wants text as keys."""
        change = self.change
        return {
            "used_cases": list(self.used_cases),
            "left_out": self.left_out,
            "change": change
            and {"mean": change.mean, "worst_tenth": change.worst_tenth, "by_case": _text_keys(change.by_case)},
            "quality": _text_keys(self.quality),
            "voxels": _text_keys(self.voxels),
            "confidence": self.confidence,
            "confident": self.confident,
            "estimates": _text_keys(self.estimates),
            "distrusted": {name: list(values) for name, values in self.distrusted.items()},
            "human_cases": list(self.human_cases),
            "drawn": {name: list(values) for name, values in self.drawn.items()},
            "accepted": {name: list(values) for name, values in self.accepted.items()},
            "temperatures": self.temperatures,
            "right": {str(value): share for value, share in self.right.items()},
            "held_out": self.held_out,
        }

    @classmethod
    def from_json(cls, folder: Path, value: Mapping[str, Any], *, digest: str) -> Fused:
        """Rebuild the record from `to_json`."""
        change = value["change"]
        return cls(
            folder=folder,
            used_cases=tuple(value["used_cases"]),
            left_out=dict(value["left_out"]),
            change=change
            and Change(by_case=_int_keys(change["by_case"]), mean=change["mean"], worst_tenth=change["worst_tenth"]),
            quality=_int_keys(value["quality"]),
            voxels=_int_keys(value["voxels"]),
            confidence=dict(value["confidence"]),
            confident=dict(value.get("confident", {})),
            estimates=_int_keys(value.get("estimates", {})),
            distrusted={name: tuple(values) for name, values in value.get("distrusted", {}).items()},
            human_cases=tuple(value.get("human_cases", ())),
            drawn={name: tuple(values) for name, values in value.get("drawn", {}).items()},
            accepted={name: tuple(values) for name, values in value.get("accepted", {}).items()},
            temperatures=dict(value.get("temperatures", {})),
            right={int(key): share for key, share in value.get("right", {}).items()},
            held_out=value.get("held_out", 0),
            digest=digest,
        )


@dataclass(frozen=True, kw_only=True)
class FusedCase:
    """Hold one case's label, and what follows for the training on it."""

    label_zyx: np.ndarray
    confidence_zyx: np.ndarray
    prob_czyx: np.ndarray
    estimate: DiceTable
    """Estimated Dice of each class; empty where no source has an estimate of its own for the case."""
    left_out: str | None = None
    distrusted: tuple[int, ...] = ()
    drawn: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def voxels(self, values: Sequence[int]) -> dict[int, int]:
        """Count the voxels of each class."""
        return {v: int(np.count_nonzero(self.label_zyx == v)) for v in values}


def fuse_case(
    prob_czyx: Mapping[str, np.ndarray],
    class_values: tuple[int, ...],
    *,
    quality: Mapping[str, DiceTable],
    temperatures: Mapping[str, float],
    options: FusionOptions,
    judged: bool,
    least_quality: float = 0.0,
) -> FusedCase:
    """Fuse the sources of one case and say how far the label is to be trusted.

    ``judged``: the case has estimates of its own. They then scale its confidence, a class below ``least_quality`` is
    not learnt from, and a case all of whose classes are so is left out.
    """
    fused = fuse_sources(prob_czyx, class_values, quality=quality, temperatures=temperatures, options=options)
    case = FusedCase(
        label_zyx=fused.label_zyx, confidence_zyx=fused.confidence_zyx, prob_czyx=fused.prob_czyx, estimate={}
    )
    if not judged:
        return case
    weights = {
        name: {int(value): weight for value, weight in source["weights"].items()}
        for name, source in fused.record["sources"].items()
    }
    agreement = {int(value): dice for value, dice in fused.record["source_agreement"].items()}
    verdict = judge(fused_estimate(quality, weights, agreement, case.voxels(class_values)), least_quality)
    return replace(
        case,
        confidence_zyx=trusted_confidence(fused.label_zyx, fused.prob_czyx, class_values, verdict),
        estimate={v: None if d is None else round(d, 4) for v, d in verdict.estimate.items()},
        left_out=verdict.reason,
        distrusted=verdict.failed,
    )


def fusion_options(cohort: Cohort) -> FusionOptions:
    """Return how a run's sources are fused: of classes that are one piece in every human label, one piece is kept."""
    human = [read_label(cohort.label_path(case))[0] for case in cohort.labelled]
    single = single_component_classes(human, cohort.class_values)
    return FusionOptions(single_component_classes=single, confidence="margin")


def fuse_by_sources(
    sources: Sources, name: str, class_values: tuple[int, ...], options: FusionOptions, *, least_quality: float = 0.0
) -> FusedCase:
    """Fuse one case by what is known of its sources: by its own estimates where there are such, else the cohort's."""
    return fuse_case(
        {s: read_probabilities(folder / f"{name}.npz") for s, folder in sources.probabilities.items()},
        class_values,
        quality={s: _of_case(sources.quality[s], sources.by_case.get(s, {}).get(name)) for s in sources.quality},
        temperatures=sources.temperatures,
        options=options,
        judged=any(name in table for table in sources.by_case.values()),
        least_quality=least_quality,
    )


def fuse_cases(
    cohort: Cohort,
    sources: Sources,
    *,
    out: Path,
    previous: Path | None,
    least_quality: float = 0.0,
    holds: Holds | None = None,
    run: Path | None = None,
    keep_probabilities: bool = False,
) -> Fused:
    """Fuse the sources of every unlabelled case into ``out`` and compare with the labels in ``previous``.

    Case by case as `fuse_by_sources` does. ``holds`` is people's word, which outranks all of this:
    `rounds.decisions.labels.decide` applies it to the fused label. ``run`` is the folder with the labels that were
    accepted. ``keep_probabilities`` writes what the labels were chosen by, for soft targets.
    """
    values, ending = cohort.class_values, cohort.file_ending
    options = fusion_options(cohort)
    changes: dict[str, dict[int, float]] = {}
    rows = _Rows()
    for case in track(cohort.unlabelled, what="fusing labels"):
        name, hold = case.case_id, (holds or {}).get(case.case_id, CaseHold())
        fused = fuse_by_sources(sources, name, values, options, least_quality=least_quality)
        # What the sources doubt is looked at, whatever people have said of it since.
        in_doubt_zyx = fused.confidence_zyx < _CERTAIN
        if hold != CaseHold():
            fused = _decided(case, hold, fused, cohort=cohort, run=run or out)
        # A person who has settled every class has seen that there is nothing.
        if not any(fused.voxels(values).values()) and not fused.left_out and not hold.settles(values):
            fused = replace(fused, left_out="its label is empty: nnU-Net would learn it as background")
        write_label(out / f"{name}{ending}", fused.label_zyx, case.geometry)
        write_map(out / CONFIDENCE / f"{name}{ending}", fused.confidence_zyx, case.geometry)
        if keep_probabilities:
            write_probabilities(out / PROBABILITIES / f"{name}.npz", fused.prob_czyx)
        rows.add(name, fused, values, fused.confidence_zyx[(fused.label_zyx > 0) | in_doubt_zyx])
        if previous is not None:
            before, _ = read_label(previous / f"{name}{ending}")
            changes[name] = class_change(before, fused.label_zyx, values)
    used = tuple(c.case_id for c in cohort.unlabelled if c.case_id not in rows.left_out)
    result = Fused(
        folder=out,
        used_cases=used,
        human_cases=tuple(name for name in used if (holds or {}).get(name, CaseHold()).whole_human),
        change=summarise_change(changes) if previous is not None else None,
        quality={name: dict(table) for name, table in sources.quality.items()},
        # In full: new images are fused by what is recorded here.
        temperatures=dict(sources.temperatures),
        right={value: round(share, 4) for value, share in sources.right.items()},
        held_out=sources.held_out,
        **vars(rows),
    )
    write_json(out / "round.json", result.to_json())
    return result


@dataclass
class _Rows:
    """Gather what is recorded of each case, under the names of `Fused`."""

    left_out: dict[str, str] = field(default_factory=dict)
    voxels: dict[str, dict[int, int]] = field(default_factory=dict)
    confidence: dict[str, float] = field(default_factory=dict)
    confident: dict[str, float] = field(default_factory=dict)
    estimates: dict[str, DiceTable] = field(default_factory=dict)
    distrusted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    drawn: dict[str, tuple[int, ...]] = field(default_factory=dict)
    accepted: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, name: str, fused: FusedCase, values: Sequence[int], confidence_n: np.ndarray) -> None:
        """Add a case; ``confidence_n`` are its voxels that are not certain background."""
        self.voxels[name] = fused.voxels(values)
        self.confidence[name] = round(float(confidence_n.mean()), 4) if confidence_n.size else 1.0
        self.confident[name] = round(float((confidence_n >= CONFIDENT).mean()), 4) if confidence_n.size else 1.0
        if fused.estimate:
            self.estimates[name] = fused.estimate
        if fused.left_out:
            self.left_out[name] = fused.left_out
        elif fused.distrusted:
            self.distrusted[name] = fused.distrusted
        if fused.drawn:
            self.drawn[name] = fused.drawn
        if fused.accepted:
            self.accepted[name] = fused.accepted


def _decided(case: Case, hold: CaseHold, fused: FusedCase, *, cohort: Cohort, run: Path) -> FusedCase:
    """Apply people's word to a fused case; where it changes label or confidence, the label is all that is probable."""
    decided = decide(
        case,
        hold,
        run=run,
        cohort=cohort,
        label_zyx=fused.label_zyx,
        confidence_zyx=fused.confidence_zyx,
        prob_czyx=fused.prob_czyx,
        estimate=fused.estimate,
        left_out=fused.left_out,
        distrusted=fused.distrusted,
    )
    changed_zyx = (decided.label_zyx != fused.label_zyx) | (decided.confidence_zyx != fused.confidence_zyx)
    drawn = () if hold.human is None else tuple(sorted(hold.human.classes or cohort.class_values))
    return replace(
        fused,
        label_zyx=decided.label_zyx,
        confidence_zyx=decided.confidence_zyx,
        prob_czyx=_settled(fused.prob_czyx, decided.label_zyx, changed_zyx, cohort.class_values),
        estimate=decided.estimate,
        left_out=decided.left_out,
        distrusted=decided.distrusted,
        drawn=drawn,
        accepted=tuple(sorted(set(hold.accepted) - set(drawn))),
    )


def _settled(
    prob_czyx: np.ndarray, label_zyx: np.ndarray, where_zyx: np.ndarray, class_values: Sequence[int]
) -> np.ndarray:
    """Return probabilities that are the label's alone in some voxels."""
    values = np.array([0, *class_values])
    return np.where(where_zyx[None], label_zyx[None] == values[:, None, None, None], prob_czyx).astype(np.float32)


def _of_case(cohort: Mapping[int, float], case: DiceTable | None) -> DiceTable:
    """Return a case's own estimates; classes that they do not name have the cohort's."""
    return {value: dice if case is None or value not in case else case[value] for value, dice in cohort.items()}


def _text_keys(table: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {str(key): item for key, item in row.items()} for name, row in table.items()}


def _int_keys(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    return {name: {int(key): item for key, item in row.items()} for name, row in table.items()}
