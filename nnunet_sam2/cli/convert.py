"""``nnunet_sam2 convert``: a source folder becomes an nnU-Net raw dataset."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.cohort.labels import parse_labels
from nnunet_sam2.cohort.layouts.file_names import add_suffix_argument
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.nifti_placement import MOST_DEGREES
from nnunet_sam2.files.repairs import ERROR, FORM_CHOICES, NONFINITE_CHOICES, ReadPolicy
from nnunet_sam2.folders import new_dataset_folders
from nnunet_sam2.progress import say
from nnunet_sam2.trainers.discovery import require_nnunet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder with images/ and labels/, or an MSD task; or a .zip or .tar(.gz) of one",
    )
    parser.add_argument("-d", dest="dataset_id", type=int, required=True, help="dataset id, 1 to 999")
    parser.add_argument("-n", dest="name", required=True, help="dataset name, as in DatasetXXX_NAME")
    parser.add_argument("--layout", default="auto", help="auto, folder, msd or images2d (default: auto)")
    parser.add_argument("--test", type=Path, metavar="DIR", help="folder of test cases (default: SOURCE/test)")
    parser.add_argument("--labelled", type=int, metavar="N", help="keep N labels, hide the rest; drawn by patient")
    parser.add_argument("--unlabelled", type=int, metavar="N", help="keep at most N unlabelled cases")
    parser.add_argument("--test-cases", type=int, metavar="N", help="hold out N labelled cases as test; by patient")
    parser.add_argument("--seed", type=int, default=0, help="seed of these draws (default: 0)")
    parser.add_argument("--channels", metavar="NAME,...", help="channel names in order, for example CT or T1,T2")
    add_suffix_argument(parser)
    parser.add_argument(
        "--labels",
        metavar="TABLE",
        help="NAME=VALUE,... (a region is NAME=1+2), JSON, or a JSON file such as dataset.json",
    )
    parser.add_argument(
        "--annotated",
        type=Path,
        metavar="FILE",
        help='JSON list of the classes that are annotated in each case, as in {"case_01": ["liver"], "case_02": '
        '["spleen"], "*": ["liver", "spleen"]}; what is not annotated is unknown, not background (default: labels.json '
        "beside the labels, else all classes)",
    )
    parser.add_argument("--regions-class-order", metavar="V,...", help="with regions: nnU-Net's regions_class_order")
    parser.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="what of a case id names its patient (first group); default: as names make plain (p1_frame01 and "
        "p1_frame12 are one's); '^(.*)$' makes each case a patient",
    )
    parser.add_argument("--test-as-unlabelled", action="store_true", help="use test images without label as unlabelled")
    parser.add_argument("--allow-empty", action="store_true", help="accept labelled cases without foreground")
    parser.add_argument(
        "--nan",
        choices=NONFINITE_CHOICES,
        default=ERROR,
        help="NaN and infinite voxels of images: refuse them, or set them to zero or to the file's least finite value, "
        "counted in cohort.json (default: error)",
    )
    parser.add_argument(
        "--fix-geometry",
        action="store_true",
        help=f"put axes that are not at right angles at the nearest ones, up to {MOST_DEGREES:g} degrees; the angle is "
        "printed and kept in cohort.json",
    )
    parser.add_argument(
        "--form",
        choices=FORM_CHOICES,
        help="which placement to believe where a NIfTI file's qform and sform contradict each other (default: refuse)",
    )
    parser.add_argument(
        "--one-hot",
        action="store_true",
        help="labels are 4D with a volume of 0 and 1 for each class, in the order of --labels' values (one more: the "
        "first is the background): merge them; volumes that overlap are refused",
    )
    parser.add_argument(
        "--unpack-to",
        type=Path,
        metavar="DIR",
        help="new folder in which an archive's files stay (default: they are removed once the dataset is written)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset if this command made it before")


def run(args: argparse.Namespace) -> int:
    """Convert and say what came out."""
    folders = new_dataset_folders(args.dataset_id, args.name)
    require_nnunet()
    labels, order = parse_labels(args.labels) if args.labels else (None, None)
    if args.regions_class_order:
        order = _numbers(args.regions_class_order)
    options = ConvertOptions(
        layout=args.layout,
        test=args.test,
        labelled=args.labelled,
        unlabelled=args.unlabelled,
        test_cases=args.test_cases,
        seed=args.seed,
        channels=tuple(part.strip() for part in args.channels.split(",")) if args.channels else None,
        suffix=args.suffix,
        labels=labels,
        annotated=args.annotated,
        regions_class_order=tuple(order) if order else None,
        patient_pattern=args.patient_pattern,
        test_as_unlabelled=args.test_as_unlabelled,
        allow_empty=args.allow_empty,
        overwrite=args.overwrite,
        policy=ReadPolicy(nonfinite=args.nan, fix_geometry=args.fix_geometry, form=args.form, one_hot=args.one_hot),
        unpack_to=args.unpack_to,
    )
    cohort = convert(args.source, folders, options)
    classes = ", ".join(f"{name}={value}" for name, value in cohort.labels.items() if name != "background")
    say(
        f"{cohort.name}: {len(cohort.labelled)} labelled, {len(cohort.unlabelled)} unlabelled, {len(cohort.test)} test "
        f"cases; channels {', '.join(cohort.channels)}; labels {classes}"
    )
    partly = sum(case.annotated is not None for case in cohort.cases)
    if partly:
        say(f"{partly} cases are annotated in part: classes that their list leaves out are unknown there")
    say(f"written to {cohort.root}")
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--regions-class-order {text!r} must be whole numbers, as in 1,2,3") from None
