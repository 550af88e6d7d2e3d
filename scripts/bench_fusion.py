"""Fuse the sources of real rounds anew, offline, and write how SAM 2, student and fused labels score.

Each round of a run has kept SAM 2's and the student's probabilities. They are fused by the present rule and by the
former one, and scored against the hidden labels. Usage: bench_fusion.py [--work DIR] [--loop NAME ...] [--table].
``--loop`` runs the loops first; without it, the runs in DIR are taken as far as they have come.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import PROJECT, SETS, BenchSet, converted
from former_fusion import former_fusion, former_student_dice
from marked_table import replace_marked
from scipy.ndimage import binary_dilation, binary_erosion

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Cohort
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable, dice_by_class, estimated_quality, mean_dice
from nnunet_sam2.labelling.quality.folder import read_folder
from nnunet_sam2.labelling.quality.record import calibration_of, read_estimates
from nnunet_sam2.labelling.quality.trust import spread_quality
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.labelling.temperature import fit_temperature
from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.orchestrator import run_loop
from nnunet_sam2.rounds.pseudo_labels import FusedCase, fuse_case
from nnunet_sam2.rounds.sources import SAM2, STUDENT, StudentLabels, mean_dice_by_class, weigh_sources
from nnunet_sam2.rounds.state import run_folder
from nnunet_sam2.rounds.support_labels import SupportLabels
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.support.library import PROBABILITIES, read_probabilities
from nnunet_sam2.volumes import read_label, read_map

RESULTS = PROJECT / "docs" / "benchmarks" / "fusion.json"

SHORT: dict[str, dict[str, Any]] = {
    "acdc": {"n_labelled": 4, "n_unlabelled": 12, "n_test": 1, "iterations_per_epoch": 20},
    "chaos_t2_mr": {"n_labelled": 3, "n_unlabelled": 5, "n_test": 1, "iterations_per_epoch": 12},
    "hippocampus": {"n_labelled": 6, "n_unlabelled": 10, "n_test": 1, "iterations_per_epoch": 25},
}
"""What differs from the loop's bench, so that rounds take minutes: here labels are judged and not models."""

SKIP_BASELINE = ("chaos_t2_mr",)
"""Sets whose first student learns from SAM 2's labels."""

FORMER, FUSED = "former", "fused"


def main() -> None:
    """Replay the runs that are there and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=PROJECT / "bench_work")
    parser.add_argument("--loop", nargs="+", choices=sorted(SHORT), default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON")
    args = parser.parse_args()
    if not args.table:
        results = read_json(RESULTS) if RESULTS.is_file() else {}
        for name in SHORT:
            bench = replace(SETS[name], **SHORT[name])
            found = list(_rounds(bench, args.seed, args.work.resolve(), loop=name in args.loop))
            if found:
                cut = {**vars(bench), "skip_baseline": name in SKIP_BASELINE}
                results[f"{name}/{args.seed}"] = {
                    "set": cut,
                    "rounds": found,
                    "finished": time.strftime("%Y-%m-%d"),
                }
                write_json(RESULTS, dict(sorted(results.items())))
    replace_marked(PROJECT / "docs" / "benchmarks.md", "fusion", table(read_json(RESULTS)))


def _rounds(bench: BenchSet, seed: int, work: Path, *, loop: bool) -> Iterator[dict[str, Any]]:
    """Yield the scores of every round of a set's run whose student has labelled the unlabelled cases."""
    name = f"{bench.name}-seed{seed}"
    if not loop and not (work / "nnUNet_raw" / f"Dataset{bench.dataset_id + seed:03d}_{name}").is_dir():
        return
    folders = converted(bench, seed, work, name)
    options = RunOptions(
        configuration=bench.configuration,
        fold=bench.fold,
        profile="cpu",
        round_limit=2,
        num_iterations_per_epoch=bench.iterations_per_epoch,
        skip_baseline=bench.name in SKIP_BASELINE,
        seed=seed,
        device="cpu",
        threads=1,
    )
    if loop:
        run_loop(folders, options)
    run = Run(cohort=Cohort.load(folders.raw).as_planned(), folder=run_folder(folders, options.run_name))
    for student in run.students():
        yield run.replay(student)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Read what a run has kept."""

    cohort: Cohort
    folder: Path
    done: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        events = read_events(self.folder / LEDGER_FILE)
        object.__setattr__(self, "done", {e["stage"]: e for e in events if e["event"] == "done"})

    def students(self) -> list[int]:
        """Return the rounds whose student's labels were judged."""
        return sorted(int(stage[1:3]) for stage in self.done if stage.endswith("/quality"))

    @property
    def held_out(self) -> list[str]:
        """Return the labelled cases of the fold's validation."""
        fold = self.done["setup/plan"]["info"]["folds"]
        number = self.folder.name.split("fold")[1].split("_")[0]
        return [] if number == "all" else list(fold[int(number)]["val"])

    def sam2(self) -> SupportLabels:
        """Return SAM 2's labels from the supports."""
        labelled, folder = self.folder / "sam2" / "labelled", self.folder / "sam2" / "unlabelled"
        checked = tuple(c.case_id for c in self.cohort.labelled if record_path(labelled, c.case_id).is_file())
        records = [read_json(record_path(labelled, case_id)) for case_id in checked]
        values = self.cohort.class_values
        return SupportLabels(
            folder=folder,
            labelled=labelled,
            checked=checked,
            quality={v: d for v, d in estimated_quality(records, values).items() if d is not None},
            estimates={
                c.case_id: read_estimates(read_json(record_path(folder, c.case_id))) for c in self.cohort.unlabelled
            },
            calibration=calibration_of(records, values),
            digest="",
        )

    def student(self, number: int) -> StudentLabels:
        """Return a round's predictions, and what SAM 2 made of them where the next round asked it to."""
        folder, refined = self.folder / f"r{number:02d}" / "student", self.folder / f"r{number + 1:02d}" / "prompted"
        return StudentLabels(
            folder=folder,
            probabilities=(refined if f"r{number + 1:02d}/refine" in self.done else folder) / PROBABILITIES,
            held_out=self.held_out,
            seen=read_folder(folder / "quality", [c.case_id for c in self.cohort.unlabelled]),
        )

    def replay(self, number: int) -> dict[str, Any]:
        """Fuse the sources with the student of round ``number`` and score them."""
        cohort, values = self.cohort, self.cohort.class_values
        sam2, student = self.sam2(), self.student(number)
        sources = weigh_sources(cohort, sam2, student)
        former = self._former_quality(number, sam2, student)
        human = [read_label(cohort.label_path(case))[0] for case in cohort.labelled]
        options = FusionOptions(single_component_classes=single_component_classes(human, values), confidence="margin")
        rows: dict[str, list[DiceTable]] = {name: [] for name in (SAM2, STUDENT, FORMER, FUSED)}
        expected: list[DiceTable] = []
        fits: dict[str, list[float]] = {SAM2: [], STUDENT: []}
        sure: dict[str, list[float]] = {}
        for case in cohort.unlabelled:
            name = f"{case.case_id}{cohort.file_ending}"
            truth, _ = read_label(cohort.root / HIDDEN_LABELS / name)
            maps = {s: read_probabilities(f / f"{case.case_id}.npz") for s, f in sources.probabilities.items()}
            fused = fuse_case(
                maps,
                values,
                quality=_of_case(sources.quality, sources.by_case, case.case_id),
                temperatures=sources.temperatures,
                options=options,
                judged=True,
            )
            labels = {
                SAM2: read_label(sam2.folder / name)[0],
                STUDENT: read_label(student.folder / name)[0],
                FORMER: former_fusion(maps, values, _of_case(*former, case.case_id), options),
                FUSED: fused.label_zyx,
            }
            for source, label_zyx in labels.items():
                rows[source].append(dice_by_class(label_zyx, truth, values))
            expected.append(fused.estimate)
            channels = np.searchsorted([0, *values], truth).astype(np.int32)
            for source, array in maps.items():
                fits[source].append(fit_temperature(normalised(as_probability(array)), channels))
            for key, share in _sureness(fused, truth).items():
                sure.setdefault(key, []).append(share)
            before = self.folder / f"r{number + 1:02d}" / "labels" / "confidence" / name
            if before.is_file():
                confidence, _ = read_map(before)
                organ = read_label(before.parent.parent / name)[0] > 0
                sure.setdefault("run_inside", []).append(float(confidence[organ].mean()))
                sure.setdefault("run_background", []).append(float(confidence[~organ].mean()))
        return {
            "student": number,
            "held_out_patients": sources.held_out,
            "dice": {name: _mean(tables, values) for name, tables in rows.items()},
            "classes": {name: _rounded(mean_dice(tables, values)) for name, tables in rows.items()},
            "estimated": {
                SAM2: _rounded(mean_dice(sam2.estimates.values(), values)),
                STUDENT: _rounded(sources.quality[STUDENT]),
                FUSED: _rounded(mean_dice(expected, values)),
                "former_student": _rounded(former[0][STUDENT]),
            },
            "sam2_right": {"estimated": _rounded(sources.right), "true": _rounded(_true_share(cohort, sam2, student))},
            "temperatures": {
                s: {"used": round(sources.temperatures[s], 3), "true": round(float(np.exp(np.mean(np.log(f)))), 3)}
                for s, f in fits.items()
            },
            "confidence": {key: round(float(np.mean(found)), 3) for key, found in sure.items()},
        }

    def _former_quality(
        self, number: int, sam2: SupportLabels, student: StudentLabels
    ) -> tuple[dict[str, dict[int, float]], dict[str, Mapping[str, DiceTable]]]:
        values = self.cohort.class_values
        agreement = mean_dice_by_class(self.cohort, self.cohort.unlabelled, student.folder, reference=sam2.folder)
        info = self.done[f"r{number:02d}/train"]["info"]
        validation = {int(name.strip("(),")): dice for name, dice in info["validation_by_class"].items()}
        quality = {v: sam2.quality.get(v, 0.5) for v in values}
        guess = {
            v: former_student_dice(quality[v], agreement.get(v, 0.0), validation.get(v), len(self.held_out))
            for v in values
        }
        by_case = {SAM2: sam2.estimates, STUDENT: spread_quality(guess, student.seen, sam2.calibration)}
        return {SAM2: quality, STUDENT: guess}, by_case


def _of_case(
    quality: Mapping[str, Mapping[int, float]], by_case: Mapping[str, Mapping[str, DiceTable]], case_id: str
) -> dict[str, DiceTable]:
    return {name: {**table, **by_case.get(name, {}).get(case_id, {})} for name, table in quality.items()}


def _true_share(cohort: Cohort, sam2: SupportLabels, student: StudentLabels) -> dict[int, float]:
    shares: dict[int, list[float]] = {}
    for case in cohort.unlabelled:
        name = f"{case.case_id}{cohort.file_ending}"
        truth, mine, theirs = (
            read_label(folder / name)[0] for folder in (cohort.root / HIDDEN_LABELS, sam2.folder, student.folder)
        )
        for value in cohort.class_values:
            differ = (mine == value) != (theirs == value)
            if differ.any():
                shares.setdefault(value, []).append(float(((mine == value) == (truth == value))[differ].mean()))
    return {value: float(np.mean(found)) for value, found in shares.items()}


def _sureness(fused: FusedCase, truth: np.ndarray) -> dict[str, float]:
    """Return mean confidence by place, and at the borders what it promises and holds."""
    organ = fused.label_zyx > 0
    found = {"inside": organ, "background": ~organ}
    found["border_inside"] = organ & ~binary_erosion(organ, iterations=2)
    found["border_outside"] = binary_dilation(organ, iterations=2) & ~organ
    means = {key: float(fused.confidence_zyx[mask].mean()) for key, mask in found.items() if mask.any()}
    border = found["border_inside"] | found["border_outside"]
    if border.any():
        means["border_promised"] = float((0.5 + 0.5 * fused.confidence_zyx[border]).mean())
        means["border_right"] = float((fused.label_zyx == truth)[border].mean())
    return means


def _mean(tables: list[DiceTable], values: tuple[int, ...]) -> float:
    return round(float(np.mean([dice for dice in mean_dice(tables, values).values() if dice is not None])), 4)


def _rounded(row: Mapping[int, float | None]) -> dict[str, float | None]:
    return {str(value): None if dice is None else round(float(dice), 4) for value, dice in row.items()}


def table(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [
        "| run, student of | SAM 2 | student | fused before | fused | fused - better source | student estimated "
        "(before), true | SAM 2 right where they differ: estimated, true | temperatures used (true): SAM 2, student |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sure = [
        "| run, student of | inside | background | border inside | border outside | label at borders right: promised, "
        "true | before: inside | before: background |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains = []
    for name, result in results.items():
        for entry in result["rounds"]:
            dice, estimated = entry["dice"], entry["estimated"]
            gain = dice[FUSED] - max(dice[SAM2], dice[STUDENT])
            gains.append(gain)
            temperatures = ", ".join(f"{t['used']:.2f} ({t['true']:.2f})" for t in entry["temperatures"].values())
            title = f"{name.replace('/', ', seed ')}, round {entry['student']}"
            lines.append(
                f"| {title} | {dice[SAM2]:.3f} | {dice[STUDENT]:.3f} | {dice[FORMER]:.3f} | **{dice[FUSED]:.3f}** | "
                f"{gain:+.3f} | {_average(estimated[STUDENT]):.3f} ({_average(estimated['former_student']):.3f}), "
                f"{dice[STUDENT]:.3f} | {_average(entry['sam2_right']['estimated']):.2f}, "
                f"{_average(entry['sam2_right']['true']):.2f} | {temperatures} |"
            )
            found = entry["confidence"]
            cells = [f"{found[k]:.2f}" for k in ("inside", "background", "border_inside", "border_outside")]
            cells.append(f"{found['border_promised']:.2f}, {found['border_right']:.2f}")
            cells += [f"{found[k]:.2f}" if k in found else "" for k in ("run_inside", "run_background")]
            sure.append(f"| {title} | {' | '.join(cells)} |")
    told = [_cut(name, result) for name, result in results.items()]
    said = f"Fused less the better source: mean {np.mean(gains):+.3f}, lowest {min(gains):+.3f}."
    return "\n".join([*lines, "", said, "", "Confidence of the fused labels:", "", *sure, "", *told])


def _cut(name: str, result: Mapping[str, Any]) -> str:
    cut = result["set"]
    start = "the first student learns from SAM 2's labels" if cut["skip_baseline"] else "round 0 from human labels"
    held_out = result["rounds"][0]["held_out_patients"]
    return (
        f"- {name.split('/')[0]}: {cut['n_labelled']} labelled ({held_out} held out), {cut['n_unlabelled']} others, "
        f"`-c {cut['configuration']} -f {cut['fold']} --profile cpu --iterations {cut['iterations_per_epoch']}`, "
        f"{start}. {result['finished']}."
    )


def _average(row: Mapping[str, float | None]) -> float:
    return float(np.mean([value for value in row.values() if value is not None]))


if __name__ == "__main__":
    main()
