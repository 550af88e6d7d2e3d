"""``nnunet_sam2 check-submission``: are the predicted label files complete and as they should be?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path

from nnunet_sam2.cohort.layouts.file_names import add_suffix_argument
from nnunet_sam2.errors import InputError
from nnunet_sam2.geometry import Geometry

FAULTY_STATUS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("-d", dest="dataset", help="dataset id or DatasetXXX_Name: its test cases are wanted")
    wanted.add_argument(
        "-i", dest="images", type=Path, metavar="DIR", help="folder of images: a label for each is wanted"
    )
    parser.add_argument("-p", dest="submission", type=Path, required=True, metavar="PRED", help="folder, .zip or .tar")
    parser.add_argument(
        "--root", default="", metavar="DIR", help="folder that the label files must lie in, as in team/T1"
    )
    parser.add_argument(
        "--ending",
        help="file ending (default: that of the dataset; with -i .nii.gz, .png for pictures)",
    )
    parser.add_argument("--labels", metavar="TABLE", help="with -i: label table as for convert (default: any values)")
    add_suffix_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    """Check, print a line for each fault, and return 1 where there is one."""
    from nnunet_sam2.submission import BY_PRODUCT, check_submission

    cases, ending, allowed, names = _of_dataset(args) if args.dataset else _of_images(args)
    if not cases:
        raise InputError("there are no test cases to hold the submission against; name their images with -i")
    found = check_submission(
        args.submission, cases, ending=args.ending or ending, root=args.root.strip("/"), allowed=allowed, names=names
    )
    # What prediction itself puts into its folder is in nobody's way until it is packed.
    aside = [problem for problem in found if problem.kind == BY_PRODUCT and args.submission.is_dir()]
    problems = [problem for problem in found if problem not in aside]
    if args.json:
        print(
            json.dumps(
                {
                    "cases": len(cases),
                    "problems": [problem.to_json() for problem in problems],
                    "aside": [p.file for p in aside],
                },
                indent=1,
            )
        )
    else:
        for problem in problems:
            print(f"{problem.kind}: {problem.file}: {problem.text}")
        if aside:
            print(f"no labels, to be left out of a zip: {', '.join(problem.file for problem in aside)}")
        print(f"{len(cases)} cases wanted, {len(problems)} problems" if problems else f"{len(cases)} cases, all good")
    return FAULTY_STATUS if problems else 0


_Wanted = tuple[dict[str, Geometry], str, Collection[int] | None, dict[str, int] | None]


def _of_dataset(args: argparse.Namespace) -> _Wanted:
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.cohort.labels import single_values
    from nnunet_sam2.folders import find_dataset

    if args.labels:
        raise InputError("--labels goes with -i; with -d the dataset's own labels count")
    cohort = Cohort.load(find_dataset(args.dataset).raw)
    names = single_values(cohort.labels)
    return {case.case_id: case.geometry for case in cohort.test}, cohort.file_ending, cohort.class_values, names


def _of_images(args: argparse.Namespace) -> _Wanted:
    from nnunet_sam2.cohort.labels import parse_labels, single_values
    from nnunet_sam2.cohort.layouts import Hints, find
    from nnunet_sam2.files.checks import PICTURE_ENDINGS, file_ending
    from nnunet_sam2.volumes import read_geometry

    found = find(args.images, "folder", test=True, hints=Hints(suffix=args.suffix))
    allowed: set[int] | None = None
    names = None
    if args.labels:
        table, _ = parse_labels(args.labels)
        names = single_values(table)
        allowed = {v for value in table.values() for v in (value if isinstance(value, list) else [value])}
    # As nnU-Net writes them: what it predicts from pictures are pictures.
    pictures = all(file_ending(case.images[0]) in PICTURE_ENDINGS for case in found.cases)
    ending = ".png" if pictures else ".nii.gz"
    return {case.case_id: read_geometry(case.images[0]) for case in found.cases}, ending, allowed, names
