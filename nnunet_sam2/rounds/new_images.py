"""New images by both sources of a finished run: SAM 2 from the run's supports, the student, and the run's own fusion.

Everything is done as for the run's unlabelled cases: an image that was one of them gets the run's own label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from nnunet_sam2.cohort.cohort import Addition, Case, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.explain.cases import class_names
from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.job import CONFIDENCE
from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.folder import measure_folder, read_folder
from nnunet_sam2.labelling.quality.record import read_estimates
from nnunet_sam2.labelling.quality.trust import spread_quality
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.context import RunContext, refuse_other_weights
from nnunet_sam2.rounds.device_memory import on_cpu_if_full
from nnunet_sam2.rounds.ledger import ReadLedger
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.pseudo_labels import FUSION_VERSION, fuse_by_sources, fusion_options
from nnunet_sam2.rounds.sources import SAM2, STUDENT, Sources
from nnunet_sam2.rounds.state import RunState
from nnunet_sam2.rounds.support_labels import calibration_on, checkable, label_stage
from nnunet_sam2.storage import file_hash, read_json, value_hash, write_json
from nnunet_sam2.support.library import PROBABILITIES, write_probabilities
from nnunet_sam2.volumes import read_volume, write_label, write_map
from nnunet_sam2.voxel_hashes import voxel_hash

QUALITY_FILE = "quality.json"
_FINISH = "finish/labels"
_LEAST, _MOST = 0.01, 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class BothSources:
    """Label new images as a finished run labelled its own."""

    run: RunContext
    finished: Mapping[str, Any]
    """What the ledger says of the run's final labels: how much its sources are worth, and how sure they may be."""
    least_quality: float
    """Estimated Dice below which nothing was learnt from a class: its voxels have no confidence."""
    prompted: Mapping[str, Any]
    """What it says of the SAM 2 labels that went into them: supports, and labels that people drew."""

    @classmethod
    def of(cls, folders: DatasetFolders, state: RunState, *, device: str, threads: int | None) -> BothSources:
        """Read a run; raise `InputError` where it has no final labels, whose fusion would be followed."""
        ledger = ReadLedger(state.folder)
        ended = [e for e in ledger.events if e["event"] == "done" and e["stage"] == _FINISH]
        if not ended:
            raise InputError(
                f"{state.folder} has no final labels yet, and --with-sam2 fuses by their rule; "
                "let the run end first, or leave out --with-sam2"
            )
        started = {e["key"]: e["inputs"] for e in ledger.events if e["event"] == "started"}
        inputs = started[ended[-1]["key"]]
        sam2 = [e for e in ledger.events if e["event"] == "done" and e["digest"] == inputs["supports"]]
        if not sam2:
            raise InputError(f"{ledger.path} lacks the SAM 2 labels of the run; restore the file")
        options = RunOptions.from_json(state.options, where=ledger.path)
        run = RunContext(
            folders=folders,
            cohort=Cohort.load(folders.raw).as_planned(),
            options=replace(options, device=device, threads=threads),
            ledger=ledger,
            folder=state.folder,
        )
        refuse_other_weights(run)
        return cls(
            run=run,
            finished=ended[-1]["info"],
            least_quality=float(inputs["least_quality"]),
            prompted={**started[sam2[-1]["key"]], "stage": sam2[-1]["stage"]},
        )

    @property
    def best_round(self) -> int:
        """Return the round whose model the fusion knows."""
        return int(self.finished["best_round"])

    def label(
        self, images: Mapping[str, Sequence[Path]], out: Path, *, save_probabilities: bool = False
    ) -> dict[str, Any]:
        """Write the fused labels of ``images`` and ``quality.json`` into ``out``; return what that holds.

        ``OUT/student`` holds the student's labels of them with probabilities. SAM 2's go to ``OUT/sam2``. What is done
        from the same inputs is not done again.
        """
        new = new_cases(self.run.cohort, images)
        prompts = with_cases(self._prompts, new)
        records, _ = label_stage(
            self.run,
            prompts,
            [case.case_id for case in new],
            self.prompted["supports"],
            self.run.options.strategy,
            out / SAM2,
            calibration=self._calibration,
        )
        quality = {name: {int(v): dice for v, dice in row.items()} for name, row in self.finished["quality"].items()}
        sources = Sources(
            probabilities={name: out / name / PROBABILITIES for name in (SAM2, STUDENT)},
            quality=quality,
            by_case={
                SAM2: {r["case"]: read_estimates(r) for r in records},
                STUDENT: self._spread(quality[STUDENT], new, out),
            },
            temperatures=self.finished.get("temperatures", {}),
        )
        estimates = self._fuse(new, sources, out, save_probabilities=save_probabilities)
        bounds = {record["case"]: (record["quality"] or {}).get("classes") or {} for record in records}
        written = self._quality(estimates, sources, bounds)
        write_json(out / QUALITY_FILE, written)
        return written

    @cached_property
    def _prompts(self) -> Cohort:
        """Return the cohort with the labels that prompted SAM 2, those that people drew among them."""
        drawn = {c: Addition.from_json(value) for c, value in self.prompted.get("drawn", {}).items()}
        return self.run.support_cohort(drawn)

    @cached_property
    def _calibration(self) -> Calibration:
        phase = self.prompted["stage"].split("/")[0]
        folder = (self.run.folder if phase == "setup" else self.run.folder / phase) / "sam2" / "labelled"
        checked = checkable(self.run.cohort, self._prompts, self.prompted["supports"])
        return calibration_on(self.run.cohort, folder, checked)

    def _spread(self, level: Mapping[int, float], new: Sequence[Case], out: Path) -> dict[str, DiceTable]:
        """Look at the student's labels as the run did, and spread its quality over the new cases.

        The level is that of the run's unlabelled cases, so that an estimate does not hang on what else is predicted.
        """
        student, names = out / STUDENT, [case.case_id for case in new]
        cohort = with_cases(self.run.support_cohort(), new)
        on_cpu_if_full(
            self.run,
            lambda backend: measure_folder(
                cohort,
                names,
                support_ids=self.run.support_ids,
                backend=backend,
                labels=student,
                out=student / "quality",
            ),
        )
        of_run = self.run.round_folder(self.best_round) / "student" / "quality"
        known = read_folder(of_run, [c.case_id for c in self.run.cohort.unlabelled])
        return spread_quality(level, read_folder(student / "quality", names), self._calibration, among=known)

    def _fuse(
        self, new: Sequence[Case], sources: Sources, out: Path, *, save_probabilities: bool
    ) -> dict[str, DiceTable]:
        """Fuse case by case; a case whose record names the same inputs and whose files are whole is passed by."""
        cohort, options = self.run.cohort, fusion_options(self.run.cohort)
        estimates: dict[str, DiceTable] = {}
        for case in track(new, what="fusing labels"):
            name = case.case_id
            label = out / f"{name}{cohort.file_ending}"
            files = [label, out / CONFIDENCE / label.name]
            if save_probabilities:
                files.append(out / PROBABILITIES / f"{name}.npz")
            record, key = out / "records" / f"{name}.json", _key(sources, name, options, self.least_quality)
            known = read_json(record) if record.is_file() else {}
            if known.get("key") != key or known.get("hashes") != _hashes(out, files):
                fused = fuse_by_sources(sources, name, cohort.class_values, options, least_quality=self.least_quality)
                record.unlink(missing_ok=True)
                write_label(label, fused.label_zyx, case.geometry)
                write_map(files[1], fused.confidence_zyx, case.geometry)
                if save_probabilities:
                    write_probabilities(files[2], fused.prob_czyx)
                known = {"key": key, "hashes": _hashes(out, files), "estimate": fused.estimate}
                write_json(record, known)
            estimates[name] = {int(value): dice for value, dice in known["estimate"].items()}
        return estimates

    def _quality(
        self, estimates: Mapping[str, DiceTable], sources: Sources, bounds: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        calibration = self._calibration
        cases: dict[str, Any] = {}
        for name, table in estimates.items():
            cases[name] = {}
            for value, dice in table.items():
                of_sam2 = bounds[name].get(str(value), {})
                cases[name][str(value)] = {
                    "dice": _rounded(dice),
                    "lower": _rounded(carried_bound(dice, of_sam2.get("dice"), of_sam2.get("lower"))),
                    SAM2: {key: of_sam2.get(key) for key in ("dice", "lower", "coverage", "proven")},
                    STUDENT: {"dice": _rounded(sources.by_case[STUDENT][name].get(value))},
                }
        return {
            "run": self.run.folder.name,
            "model": self.run.options.round_configuration(self.best_round),
            "calibrated": calibration.calibrated,
            "calibration_patients": sorted({pair.patient_id for pair in calibration.pairs}),
            "held_out_patients": self.finished.get("held_out", 0),
            "classes": class_names(self.run.cohort),
            "cases": cases,
        }


def with_cases(cohort: Cohort, new: Sequence[Case]) -> Cohort:
    """Return the cohort with new cases; what it had under their names gives way, and so do its test cases."""
    names = {case.case_id for case in new}
    kept = [case for case in cohort.cases if case.case_id not in names and case.role is not Role.TEST]
    return replace(cohort, cases=(*kept, *new))


def new_cases(cohort: Cohort, images: Mapping[str, Sequence[Path]]) -> tuple[Case, ...]:
    """Return images from elsewhere as unlabelled cases of a cohort.

    A new case is a patient of its own, unless the cohort knows one of its name. Raises `InputError` for one with the
    name of a labelled case, whose human label would be a support of itself.
    """
    labelled = {case.case_id for case in cohort.labelled}
    patients = {case.case_id: case.patient for case in cohort.cases}
    for name in images:
        if name in labelled:
            raise InputError(f"{name} is a labelled case of {cohort.name}: SAM 2 learns from it; rename the image")
    new = []
    for name, paths in images.items():
        volume = read_volume(paths)
        new.append(
            Case(
                case_id=name,
                role=Role.UNLABELLED,
                patient=patients.get(name, name),
                images=tuple(str(path.resolve()) for path in paths),
                label=None,
                geometry=volume.geometry,
                voxel_hash=voxel_hash(volume.array_czyx),
            )
        )
    return tuple(new)


def carried_bound(dice: float | None, sam2: float | None, lower: float | None) -> float | None:
    """Return a lower bound of a fused label's Dice: as far below its estimate, in logits, as SAM 2's bound lies.

    SAM 2's bound is calibrated on patients that it had not seen; a network has no such patients but the few held out.
    """
    if dice is None or sam2 is None or lower is None:
        return None
    start, high, low = (float(logit(np.clip(x, _LEAST, _MOST))) for x in (dice, sam2, lower))
    return min(dice, float(expit(start - (high - low))))


def _key(sources: Sources, name: str, options: FusionOptions, least_quality: float) -> str:
    return value_hash(
        {
            "probabilities": {s: file_hash(folder / f"{name}.npz") for s, folder in sources.probabilities.items()},
            "quality": sources.quality,
            "by_case": {s: table.get(name) for s, table in sources.by_case.items()},
            "temperatures": dict(sources.temperatures),
            "single": list(options.single_component_classes),
            "least_quality": least_quality,
            "version": FUSION_VERSION,
        }
    )


def _hashes(out: Path, files: Sequence[Path]) -> dict[str, str] | None:
    if not all(path.is_file() for path in files):
        return None
    return {path.relative_to(out).as_posix(): file_hash(path) for path in files}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
