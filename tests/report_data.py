"""Accounts and pictures of runs that never were, for the tests of the report."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np

from nnunet_sam2.cohort.cohort import Role
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.report.account import CaseAccount, ClassQuality, Cost, Provenance, RoundAccount, RunAccount
from nnunet_sam2.report.page import Pictures
from nnunet_sam2.report.pictures import CasePictures, encode

CLASSES = {1: "large_organ", 2: "small_organ"}


def make_round(
    number: int, *, dice: float | None = 0.8, change: float | None = None, final: bool = False
) -> RoundAccount:
    return RoundAccount(
        number=number,
        configuration="3d_fullres_final" if final else f"3d_fullres_r{number:02d}",
        final=final,
        change_mean=change,
        change_worst_tenth=None if change is None else 2 * change,
        validation_dice=dice,
        validation_by_class={} if dice is None else {"large_organ": dice + 0.05, "small_organ": dice - 0.05},
        volumes={} if number == 0 else {1: 50.0 + number, 2: 10.0},
        confidence=None if number == 0 else 0.7,
        confident=None if number == 0 else 0.6,
        iterations=600,
        seconds=120.0,
    )


def make_case(case_id: str, *dices: float | None, role: Role = Role.UNLABELLED, **values: object) -> CaseAccount:
    classes = tuple(
        ClassQuality(
            value=value,
            estimate=dice,
            sam2=dice,
            lower=dice and dice - 0.1,
            coverage=0.75,
            proven=0.5,
            voxels=100 * value,
        )
        for value, dice in zip(CLASSES, dices, strict=True)
    )
    return CaseAccount(case_id=case_id, role=role, **{"classes": classes, "confidence": 0.7, **values})  # type: ignore[arg-type]


def make_account(cases: tuple[CaseAccount, ...], **values: object) -> RunAccount:
    return RunAccount(
        **{  # type: ignore[arg-type]
            "dataset": "Dataset501_Toy",
            "run": "3d_fullres_fold0",
            "folder": "/data/results/Dataset501_Toy/nnunet_sam2/3d_fullres_fold0",
            "class_names": CLASSES,
            "rounds": (make_round(0, dice=0.8), make_round(1, dice=0.84), make_round(2, dice=0.85, change=0.008)),
            "cases": cases,
            "stop_reason": "converged",
            "best_round": 2,
            "mean_change_limit": 0.01,
            "worst_tenth_limit": 0.05,
            "least_quality": 0.3,
            "round_limit": 6,
            "validation_cases": 3,
            "calibration_cases": 8,
            "calibrated": True,
            "costs": (
                Cost(name="nnU-Net training", seconds=5400, stages=3),
                Cost(name="planning", seconds=60, stages=1),
            ),
            "started": datetime(2026, 3, 1, 20, 0, tzinfo=timezone.utc),
            "ended": datetime(2026, 3, 2, 6, 0, tzinfo=timezone.utc),
            "provenance": Provenance(options={"seed": 7}, inputs=(("case_a", "unlabelled", "p1", "ab" * 32, ""),)),
            **values,
        }
    )


def make_pictures(
    shape_zyx: tuple[int, int, int] = (12, 40, 48), *, noise: float = 20.0, human: bool = False, story: str = ""
) -> CasePictures:
    """Two balls in noise; the last label is the first one, moved by two voxels."""
    rng = np.random.default_rng(3)
    z, y, x = np.indices(shape_zyx) / np.reshape(shape_zyx, (3, 1, 1, 1)) - 0.5
    label = np.zeros(shape_zyx, np.uint8)
    label[(z**2 + y**2 + (x + 0.15) ** 2) < 0.05] = 1
    label[(z**2 + y**2 + (x - 0.2) ** 2) < 0.015] = 2
    maps = {"first": label, "last": np.roll(label, 2, axis=2), "confidence": rng.random(shape_zyx, np.float32)}
    return CasePictures(
        image_czyx=(100.0 * label + rng.normal(0, noise, shape_zyx))[None].astype(np.float32),
        maps={**maps, "human": label} if human else maps,
        geometry=Geometry(shape_zyx=shape_zyx, spacing_xyz_mm=(1.0, 1.0, 3.0)),
        class_values=tuple(CLASSES),
        story=story,
    )


def block_of(budget: int = 200_000, **values: object) -> bytes:
    return encode(make_pictures(**values), budget)  # type: ignore[arg-type]


def pictures_of(*case_ids: str) -> Pictures:
    block = block_of(story="two supports made this")
    return Pictures(blocks=dict.fromkeys(case_ids, block))
