"""Read what a report says of a run from its ledger and records; no picture, no torch, nothing written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.files.checks import PICTURE_ENDINGS
from nnunet_sam2.provenance import provenance
from nnunet_sam2.report.account import CaseAccount, ClassQuality, Cost, Provenance, RoundAccount, RunAccount
from nnunet_sam2.report.run_files import Json, RunFiles
from nnunet_sam2.rounds.ledger import HASH, PREVIOUS, REVIEWED
from nnunet_sam2.rounds.state import RoundState
from nnunet_sam2.storage import read_json
from nnunet_sam2.volumes import read_label

_KINDS = {
    "plan": "planning, preprocessing",
    "sam2_quality": "SAM 2 labels labelled cases",
    "sam2": "SAM 2 labels unlabelled cases",
    "refine": "SAM 2, prompted by nnU-Net",
    "data": "round data",
    "train": "nnU-Net training",
    "predict": "nnU-Net prediction",
    "quality": "judging labels",
    "fuse": "fusing labels",
    "signs": "fusing labels",
    "labels": "fusing labels",
}
"""Last part of a stage's name to what the report calls it."""

_KNOWN_EVENTS = ("run", "started", "done", "stopped", "machine", REVIEWED)

_MOST_HUMAN_LABELS = 24
"""Human label files that are read for the mean volumes of classes."""


def gather(files: RunFiles) -> RunAccount:
    """Gather the account of a run."""
    state, options, cohort = files.state, files.options, files.cohort
    records = {c.case_id: record for c in _shown(cohort) if (record := files.record(c)) is not None}
    calibration = next((r["quality"] for r in records.values() if (r.get("quality") or {}).get("classes")), None)
    picture = cohort.file_ending in PICTURE_ENDINGS
    return RunAccount(
        dataset=files.folders.name,
        run=files.folder.name,
        folder=f"$nnUNet_results/{files.folder.relative_to(files.folders.results.parent)}",
        class_names=files.class_names,
        rounds=tuple(_rounds(files)),
        cases=tuple(_cases(files, records)),
        stop_reason=state.stop_reason,
        evidence=state.evidence.get("text", ""),
        retries=tuple(f"{r['stage']}: {r['cause']}; tried once more {r['remedy']}" for r in state.retries),
        running_stage=state.running_stage,
        best_round=state.best_round,
        mean_change_limit=options.mean_change,
        worst_tenth_limit=options.worst_tenth_change,
        least_quality=options.least_quality,
        round_limit=options.round_limit,
        validation_cases=len(files.validation_ids),
        calibration_cases=len(calibration["calibration_cases"]) if calibration else 0,
        calibration_patients=len(calibration.get("calibration_patients", calibration["calibration_cases"]))
        if calibration
        else 0,
        calibrated=None if calibration is None else bool(calibration["calibrated"]),
        volume_unit="pixels" if picture else "mL",
        human_volumes=_human_volumes(cohort),
        costs=tuple(_costs(files.events)),
        started=_time(files.events[0]),
        ended=_time(files.events[-1]),
        test_cases=len(cohort.test),
        waiting=files.waiting,
        provenance=_provenance(files, records),
    )


def _shown(cohort: Cohort) -> tuple[Case, ...]:
    return (*cohort.unlabelled, *cohort.labelled)


def _rounds(files: RunFiles) -> Iterator[RoundAccount]:
    for state in files.state.rounds:
        if state.number < 0:
            continue
        fuse = files.done.get(f"r{state.number:02d}/fuse", {}).get("info", {})
        yield RoundAccount(
            number=state.number,
            configuration=state.configuration,
            final=state.final,
            finished=state.finished,
            change_mean=state.change_mean,
            change_worst_tenth=state.change_worst_tenth,
            validation_dice=state.validation_dice,
            validation_by_class=_by_name(state, files.cohort),
            volumes=_mean_volumes(fuse.get("voxels", {}), files.cohort),
            confidence=_mean(fuse.get("confidence", {}).values()),
            confident=_mean(fuse.get("confident", {}).values()),
            left_out=len(state.left_out),
            distrusted=state.distrusted,
            iterations=state.iterations,
            seconds=state.seconds,
        )


def _by_name(state: RoundState, cohort: Cohort) -> dict[str, float]:
    """Name the classes of nnU-Net's validation: ``1``, or ``(1, 2)`` for a region."""
    names = {}
    for key, dice in state.validation_by_class.items():
        values = [int(part) for part in key.strip("()").split(",") if part.strip()]
        wanted = [value if isinstance(value, list) else [value] for value in cohort.labels.values()]
        named = [name for name, found in zip(cohort.labels, wanted, strict=True) if found == values]
        names[named[0] if named else key] = dice
    return names


def _mean_volumes(voxels: Mapping[str, Mapping[str, int]], cohort: Cohort) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for case_id, row in voxels.items():
        size = voxel_size(cohort, cohort.case(case_id))
        for value, count in row.items():
            found.setdefault(int(value), []).append(count * size)
    return {value: sum(sizes) / len(sizes) for value, sizes in sorted(found.items())}


def _human_volumes(cohort: Cohort) -> dict[int, float]:
    labelled = cohort.labelled
    step = max(1, -(-len(labelled) // _MOST_HUMAN_LABELS))
    found: dict[str, dict[str, int]] = {}
    for case in labelled[::step]:
        label_zyx, _ = read_label(cohort.label_path(case))
        found[case.case_id] = {
            str(value): int((label_zyx == value).sum()) for value in cohort.class_values if case.answers_for(value)
        }
    return _mean_volumes(found, cohort)


def voxel_size(cohort: Cohort, case: Case) -> float:
    """Return the volume of a voxel in mL; 1 for a pixel of a picture."""
    if cohort.file_ending in PICTURE_ENDINGS:
        return 1.0
    x, y, z = case.geometry.spacing_xyz_mm
    return x * y * z / 1000.0


def _cases(files: RunFiles, records: Mapping[str, Json]) -> Iterator[CaseAccount]:
    newest = files.newest[1] if files.newest else {}
    changes: Mapping[str, Any] = {}
    for stage, event in files.done.items():
        if stage.endswith("/fuse") and event["info"].get("change"):
            changes = event["info"]["change"]["by_case"]
    student = _student_dice(files)
    for case in _shown(files.cohort):
        name = case.case_id
        record = records.get(name, {})
        voxels = newest.get("voxels", {}).get(name) or record.get("voxels", {})
        measured = {**(record.get("dice_with_human_label") or {}), **student.get(name, {})}
        estimates = newest.get("estimates", {}).get(name, {})
        quality = record.get("quality") or {}
        rejected = files.holds[name].rejected if name in files.holds else ()
        word = files.words.get(name)
        label = files.newest_label(case) if word else None
        classes = []
        for value in files.cohort.class_values:
            key = str(value)
            own = (quality.get("classes") or {}).get(key, {})
            classes.append(
                ClassQuality(
                    value=value,
                    estimate=estimates.get(key, own.get("dice")),
                    sam2=own.get("dice"),
                    lower=own.get("lower"),
                    coverage=own.get("coverage"),
                    proven=own.get("proven"),
                    measured=measured.get(key) if case.role is Role.LABELLED else None,
                    change=changes.get(name, {}).get(key),
                    voxels=voxels.get(key, 0),
                    expected=((quality.get("features") or {}).get(key) or {}).get("shown_in") == 1.0,
                    distrusted=value in newest.get("distrusted", {}).get(name, []) and value not in rejected,
                    settled=word is not None and word.settles(value, label and label[1]),
                )
            )
        account = CaseAccount(
            case_id=name,
            role=case.role,
            classes=tuple(classes),
            held_out=name in files.validation_ids,
            left_out=newest.get("left_out", {}).get(name),
            confidence=newest.get("confidence", {}).get(name),
            confident=newest.get("confident", {}).get(name),
            word=_word(files, name),
        )
        yield replace(account, said=word.said(account.shown) if word else None)


def _student_dice(files: RunFiles) -> dict[str, dict[str, float | None]]:
    """Read the best round's Dice on the held-out cases, by case and label value, from nnU-Net's own validation."""
    best = files.state.best_round
    event = files.done.get(f"r{best:02d}/train") if best is not None and files.validation_ids else None
    if event is None:
        return {}
    path = files.folders.results / event["info"]["checkpoint"]
    path = path.parent / "validation" / "summary.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, float | None]] = {}
    for case in read_json(path)["metric_per_case"]:
        name = Path(case["prediction_file"]).name.removesuffix(files.cohort.file_ending)
        # A region's Dice belongs to no single value.
        found[name] = {k: _finite(m["Dice"]) for k, m in case["metrics"].items() if k.isdigit()}
    return found


def _costs(events: Sequence[Json]) -> list[Cost]:
    """Add up the seconds of all finished stages by kind, those that ran again included; the longest first."""
    seconds: dict[str, list[float]] = {}
    for event in events:
        if event["event"] == "done":
            kind = event["stage"].rsplit("/", 1)[-1]
            seconds.setdefault(_KINDS.get(kind, kind), []).append(float(event["seconds"]))
    costs = [Cost(name=name, seconds=sum(found), stages=len(found)) for name, found in seconds.items()]
    return sorted(costs, key=lambda cost: -cost.seconds)


def _provenance(files: RunFiles, records: Mapping[str, Json]) -> Provenance:
    started = [e for e in files.events if e["event"] == "started" and e["stage"] == "setup/plan"]
    inputs: Json = started[-1]["inputs"] if started else {}
    labels = inputs.get("labels", {})
    return Provenance(
        options=files.state.options,
        sam2=next((record["sam2"] for record in records.values()), {}),
        machines=tuple(event["machine"] for event in files.events if event["event"] == "machine"),
        report_machine=provenance(),
        inputs=tuple(
            (name, role, patient, voxels, labels.get(name, ""))
            for name, (role, patient, voxels) in inputs.get("cases", {}).items()
        ),
        source=files.cohort.provenance,
        notes=(
            *_reviews(files),
            *(_note(event) for event in files.events if event["event"] not in _KNOWN_EVENTS),
        ),
    )


def _word(files: RunFiles, case_id: str) -> str:
    """Say what people said of a case: ``accepted: liver; rejected: spleen``."""
    hold = files.holds.get(case_id)
    if hold is None or hold.taken_out:
        return ""  # why a case is left out stands with it
    names = files.class_names
    drawn = () if hold.human is None else (hold.human.classes or ("every class",))
    parts = {"drawn by hand": drawn, "accepted": hold.accepted, "rejected": hold.rejected}
    return "; ".join(
        f"{what}: {', '.join(names.get(v, str(v)) if isinstance(v, int) else v for v in values)}"
        for what, values in parts.items()
        if values
    )


def _reviews(files: RunFiles) -> Iterator[str]:
    names = files.class_names
    for event in files.events:
        if event["event"] != REVIEWED:
            continue
        told = [
            f"{d['decision']} {d['case']} {', '.join(names.get(v, str(v)) for v in d['classes'])}".strip()
            for d in event["decisions"]
        ]
        cases = len(event["holds"])
        shown = "; ".join(told[:20]) + (f" and {len(told) - 20} more" if len(told) > 20 else "")
        yield (
            f"{_time(event):%Y-%m-%d %H:%M} from round {event['round']} on people's word on {cases} cases holds"
            + (f": {shown}" if shown else "")
        )


def _note(event: Json) -> str:
    shown = {k: v for k, v in event.items() if k not in ("version", "event", "time", PREVIOUS, HASH)}
    return f"{_time(event):%Y-%m-%d %H:%M} {event['event']}: " + ", ".join(f"{k} {v}" for k, v in shown.items())


def _time(event: Json) -> datetime:
    return datetime.fromtimestamp(event["time"], tz=timezone.utc).astimezone()


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None
