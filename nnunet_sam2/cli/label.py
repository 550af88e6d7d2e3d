"""``nnunet_sam2 label``: SAM 2 labels for the unlabelled cases."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_sam2.labelling.registry import STRATEGIES, make_strategy, parse_settings
from nnunet_sam2.sam2.weights.registry import EMBEDDED

if TYPE_CHECKING:
    from nnunet_sam2.cohort.cohort import Cohort


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; nnU-Net's letters where nnU-Net has one."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    parser.add_argument(
        "--sam2",
        default=EMBEDDED,
        metavar="NAME_OR_FILE",
        help="SAM 2: a name (nnunet_sam2 weights list) or a checkpoint file; default: the %(default)s one",
    )
    parser.add_argument("--strategy", default="auto", choices=sorted(STRATEGIES), help="default: %(default)s")
    parser.add_argument(
        "-o", dest="out", type=Path, metavar="OUT", help="default: $nnUNet_results/DATASET/nnunet_sam2/labels_STRATEGY"
    )
    parser.add_argument(
        "--supports", metavar="N|IDS", help="labelled cases to learn from: the first N or a,b,c (default: all)"
    )
    parser.add_argument("--cases", metavar="IDS", help="cases to label: a,b,c (default: all unlabelled ones)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="label the supports as well, each from other patients, and show the Dice with their human labels",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the strategy, repeatable",
    )
    parser.add_argument(
        "--components",
        default="auto",
        choices=["auto", "largest", "confident", "none"],
        help="3D component to keep of each class; auto: the largest, of classes that are one piece in the supports",
    )
    parser.add_argument(
        "--student",
        type=Path,
        metavar="FOLDER",
        help="probabilities CASE.npz of a trained network, for 'prompted' and 'refine'",
    )
    parser.add_argument(
        "--quality",
        default="calibrated",
        choices=["calibrated", "plain", "off"],
        help="estimate each label's Dice: calibrated on up to eight supports (all with --check), which are labelled "
        "first, each from other patients; plain: without that; off: not at all (default: %(default)s)",
    )
    parser.add_argument("--image-size", type=int, help="SAM 2 input size in pixels (default: the checkpoint's)")
    parser.add_argument("--device", "-device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-probabilities", "--save_probabilities", action="store_true", help="write probabilities/CASE.npz as well"
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="embeddings (default: $nnUNet_results/DATASET/nnunet_sam2/embeddings)"
    )
    parser.add_argument(
        "--explain",
        metavar="CASE",
        help="label nothing; say which supports, prompts and members made the case's labels in OUT, a label folder or "
        "a run's (default: in all of the dataset)",
    )
    parser.add_argument("--json", action="store_true", help="with --explain: print the records as JSON")


def run(args: argparse.Namespace) -> int:
    """Label and say where everything lies, or explain the label of one case."""
    if args.explain is not None:
        return _explain(args)
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.errors import InputError
    from nnunet_sam2.folders import find_dataset
    from nnunet_sam2.labelling.fusion import FusionOptions
    from nnunet_sam2.labelling.labeller import label_cases
    from nnunet_sam2.labelling.leave_one_out import estimated_quality, mean_dice
    from nnunet_sam2.labelling.quality.options import QualityOptions
    from nnunet_sam2.labelling.quality.record import read_estimates
    from nnunet_sam2.progress import say
    from nnunet_sam2.sam2.backend import load_backend
    from nnunet_sam2.support.library import choose_supports
    from nnunet_sam2.support.showing import told_orientations

    folders = find_dataset(args.dataset)
    cohort = Cohort.load(folders.raw)
    strategy = make_strategy(args.strategy, parse_settings(args.settings))
    supports = choose_supports(cohort, args.supports)
    cases = [c for c in (args.cases or "").split(",") if c] or [case.case_id for case in cohort.unlabelled]
    if args.check:
        cases += [case_id for case_id in supports if case_id not in cases]
    if not cases:
        raise InputError(f"{cohort.name} has no unlabelled case; name cases with --cases, or use --check")
    home = folders.results / "nnunet_sam2"
    out = args.out or home / f"labels_{args.strategy}"
    backend = load_backend(
        args.sam2,
        device=args.device,
        image_size=args.image_size,
        cache_dir=args.cache_dir or home / "embeddings",
        threads=args.threads,
    )
    say(f"SAM 2: {backend.spec.origin}, {backend.spec.image_size} pixels")
    if stored := told_orientations(cohort):
        say(f"note: {stored}")
    quality = QualityOptions() if args.quality != "off" else None
    records = label_cases(
        cohort=cohort,
        case_ids=cases,
        support_ids=supports,
        strategy=strategy,
        backend=backend,
        out=out,
        seed=args.seed,
        save_probabilities=args.save_probabilities,
        student_probabilities=args.student,
        fusion=FusionOptions(components=args.components),
        quality=quality,
        calibrate_on=_calibrating(args, cohort, strategy, supports, cases) if args.quality == "calibrated" else (),
    )
    measured = estimated_quality(records, cohort.class_values)
    if any(dice is not None for dice in measured.values()):
        say(f"Dice with human labels, each case labelled from other patients: {_by_class(measured, cohort)}")
    judged = [record for record in records if read_estimates(record)]
    if judged:
        known = judged[0]["quality"]
        how = f"calibrated on {_counted(known)}" if known["calibrated"] else "uncalibrated"
        means = mean_dice([read_estimates(record) for record in judged], cohort.class_values)
        say(f"estimated Dice, mean of {len(judged)} cases ({how}): {_by_class(means, cohort)}")
    empty = [record["case"] for record in records if not any(record["voxels"].values())]
    if empty:
        say(f"nothing was found in {len(empty)} of {len(records)} cases: {', '.join(empty[:10])}")
    count = f"{len(records)} {'case' if len(records) == 1 else 'cases'}"
    say(f"labelled {count} from {len(supports)} {'support' if len(supports) == 1 else 'supports'}: {out}")
    return 0


def _calibrating(
    args: argparse.Namespace, cohort: Cohort, strategy: Any, supports: Sequence[str], cases: Sequence[str]
) -> Sequence[str]:
    """Return the supports to calibrate on, of as many patients as can be; none where there are no two patients."""
    from nnunet_sam2.labelling.quality.options import QualityOptions

    usable = list(supports)
    if getattr(strategy, "uses_student", False) and args.student is not None:
        usable = [case_id for case_id in supports if (args.student / f"{case_id}.npz").is_file()]
    first_of: dict[str, str] = {}
    for case_id in usable:
        first_of.setdefault(cohort.case(case_id).patient, case_id)
    if len(first_of) < 2:
        return ()
    if args.check:
        return [case_id for case_id in usable if case_id in set(cases)]
    if len(first_of) >= QualityOptions().calibration_cases:
        usable = list(first_of.values())
    most = min(len(usable), QualityOptions().calibration_cases)
    return [usable[round(i * (len(usable) - 1) / max(1, most - 1))] for i in range(most)]


def _counted(quality: Mapping[str, Any]) -> str:
    """Say what calibrated: patients count, and cases where they are more."""
    cases, patients = len(quality["calibration_cases"]), len(quality["calibration_patients"])
    return f"{cases} labelled cases" + (f" of {patients} patients" if patients < cases else "")


def _by_class(table: Mapping[int, float | None], cohort: Cohort) -> str:
    from nnunet_sam2.labelling.explain.cases import class_names

    names = class_names(cohort)
    return ", ".join(f"{names[str(v)]}: {'-' if dice is None else f'{dice:.3f}'}" for v, dice in table.items())


def _explain(args: argparse.Namespace) -> int:
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.folders import find_dataset
    from nnunet_sam2.labelling.explain.cases import as_text, find_case

    folders = find_dataset(args.dataset)
    cohort = Cohort.load(folders.raw)
    found = find_case(
        cohort, args.explain, args.out or folders.results / "nnunet_sam2", dataset=str(folders.dataset_id)
    )
    print(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if args.json else as_text(found, cohort))
    return 0
