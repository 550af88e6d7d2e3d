"""Whether a run's next stage has room on the disk, asked before it starts."""

from __future__ import annotations

from pathlib import Path

from nnunet_sam2.rounds import disk, nnunet
from nnunet_sam2.rounds.context import RunContext

_INTO_PREPROCESSED = ("plan", "data")


class Room:
    """Know what a run's stages write, and where."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def require(self, stage: str) -> None:
        """Raise `StageError` where there is no room for what a stage writes; nothing of it has been written then.

        Files that a killed stage left and will find again are not counted.
        """
        run, kind = self.run, stage.rsplit("/", 1)[-1]
        folder = run.folders.preprocessed if kind in _INTO_PREPROCESSED else run.folder
        there = sum(map(disk.folder_bytes, self._kept(stage)))
        disk.require_room(folder, max(0, disk.stage_bytes(stage, self.size) - there), what=f"stage {stage}")

    @property
    def size(self) -> disk.RunSize:
        """Return the numbers that a stage's bytes follow from; from nnU-Net's plans as soon as there are some."""
        run = self.run
        # Preprocessed data that somebody removed are made again: there are no plans then to ask.
        planned = nnunet.plans_path(run.folders, run.options.plans).is_file() and any(
            event["event"] == "done" and event["stage"] == "setup/plan" for event in run.ledger.events
        )
        return disk.run_size(
            run.cohort,
            validation_ids=tuple(run.validation_ids) if planned else (),
            plans=run.plans if planned else None,
            configuration=run.options.configuration,
            overrides=run.overrides if planned else None,
            light=run.options.profile == "cpu",
            averaged=run.options.ema_decay is not None,
            soft_targets=run.options.soft_targets,
        )

    def _kept(self, stage: str) -> list[Path]:
        run, (phase, kind) = self.run, stage.rsplit("/", 1)
        if kind == "plan":
            base = run.folders.preprocessed / f"{nnunet.PLANS}_{run.options.configuration}"
            return [base, Path(f"{base}_un")]
        if kind == "train":
            made = [e for e in run.ledger.events if e["event"] == "done" and e["stage"] == f"{phase}/data"]
            return [
                nnunet.fold_folder(run.folders, e["info"]["configuration"], run.fold, plans=run.options.plans)
                for e in made[-1:]
            ]
        folders = {
            "sam2_quality": "sam2/labelled",
            "sam2": "sam2/unlabelled",
            "predict": "student",
            "refine": "prompted",
        }
        if kind not in folders:
            return []
        return [(run.folder if phase == "setup" else run.folder / phase) / folders[kind]]
