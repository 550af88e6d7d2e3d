"""Draw the README's picture from a finished demo. Usage: make_figure.py WORK_DIR PICTURE.png"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Cohort
from nnunet_sam2.folders import find_dataset
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.rounds.state import read_state
from nnunet_sam2.volumes import read_label, read_map, read_volume

COLOURS = ("#ff7f2a", "#2ab7ff", "#7fdc3c", "#e64bd2")


def main() -> None:
    """Draw one unlabelled case (its way from support to label) and one test case (before and after)."""
    work, picture = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / f"nnUNet_{name}")
    folders = find_dataset(501)
    cohort = Cohort.load(folders.raw)
    state = read_state(folders)
    ending, values = cohort.file_ending, cohort.class_values

    support, query, test = cohort.labelled[0], cohort.unlabelled[0], cohort.test[0]
    query_truth = read_label(cohort.root / HIDDEN_LABELS / f"{query.case_id}{ending}")[0]
    test_truth = read_label(cohort.label_path(test))[0]
    sam2 = read_label(state.folder / "sam2" / "unlabelled" / f"{query.case_id}{ending}")[0]
    final = read_label(state.folder / "labels" / f"{query.case_id}{ending}")[0]
    confidence = read_map(state.folder / "labels" / "confidence" / f"{query.case_id}{ending}")[0]
    predictions = work / "test_predictions"
    before = read_label(predictions / state.configuration_of(0) / f"{test.case_id}{ending}")[0]
    after = read_label(predictions / state.configuration_of() / f"{test.case_id}{ending}")[0]

    def dice(label: np.ndarray, truth: np.ndarray) -> str:
        known = [d for d in dice_by_class(label, truth, values).values() if d is not None]
        return f"Dice {np.mean(known):.2f}"

    support_label = read_label(cohort.label_path(support))[0]
    panels = [
        ("labelled: a support", support, support_label, None, None),
        ("unlabelled: SAM 2's label, " + dice(sam2, query_truth), query, sam2, query_truth, None),
        ("the run's final label, " + dice(final, query_truth), query, final, query_truth, None),
        ("its confidence (dark: doubt)", query, None, None, confidence),
        ("test: labelled-only nnU-Net, " + dice(before, test_truth), test, before, test_truth, None),
        (f"test: round {state.best_round}, " + dice(after, test_truth), test, after, test_truth, None),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(10.2, 7.8), facecolor="white")
    for axis, panel in zip(axes.ravel(), panels, strict=True):
        title, case, label, truth, extra = panel
        reference = truth if truth is not None else (label if label is not None else query_truth)
        z = int(
            np.argmax(
                [
                    (reference[i] == min(values)).sum() + 3 * (reference[i] == max(values)).sum()
                    for i in range(len(reference))
                ]
            )
        )
        image = read_volume(cohort.image_paths(case)).array_czyx[0, z]
        if extra is not None:
            axis.imshow(extra[z], cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        else:
            axis.imshow(image, cmap="gray", interpolation="bicubic")
        for value, colour in zip(values, COLOURS, strict=False):
            if truth is not None and (truth[z] == value).any():
                axis.contour(truth[z] == value, [0.5], colors="white", linewidths=1.0, linestyles=":")
            if label is not None and (label[z] == value).any():
                axis.contour(label[z] == value, [0.5], colors=colour, linewidths=2.0)
        axis.set_title(title, fontsize=10.5)
        axis.axis("off")
    figure.text(
        0.5,
        0.012,
        "Lines: labels. Dotted white: truth, which no part of the run has seen.",
        ha="center",
        fontsize=9.5,
        color="#444444",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1), h_pad=2.0)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
