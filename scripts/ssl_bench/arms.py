"""The arms: what a training learns from and with what, each for the same number of iterations in all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scoring import predict_test

from nnunet_sam2.cohort.cohort import TEST_LABELS, Cohort
from nnunet_sam2.evaluation import evaluate
from nnunet_sam2.labelling.job import CONFIDENCE
from nnunet_sam2.labelling.largest import single_classes, write_largest
from nnunet_sam2.rounds import nnunet
from nnunet_sam2.rounds.nnunet import light
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.orchestrator import run_loop
from nnunet_sam2.rounds.state import read_state
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.support.library import PROBABILITIES
from ssl_bench.protocol import Cohorts, Protocol

FOLD = "all"
"""Nothing is held out: with three labelled patients each of them counts."""
ROUNDS = 2
PARTS = (1, 1, 1, 3)
"""How the loop divides its iterations: labelled only, two rounds, the last training."""


INGREDIENTS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"ema_decay": 0.99, "copy_paste": 0.5, "soft_targets": True},
    "gpu": {"ema_decay": 0.999, "copy_paste": 0.5, "soft_targets": True},
}
"""What the student learns with, by the length of the schedule."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Say what is trained on and how, where it is not as the loop does it."""

    labels: str
    """``human``: of the labelled cases alone; ``sam2``: SAM 2's for the others, once; ``rounds``: the loop; ``last``:
    what the loop's last training learns from, learnt from the start; ``all``: human ones for all cases."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    longest_side: int | None = None


WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "averaged weights": {"ema_decay": None},
    "copy-paste": {"copy_paste": 0.0},
    "soft targets": {"soft_targets": False},
}
"""Ingredients of the student, and the setting without each."""

ARMS = {
    "labelled only": Arm(labels="human"),
    "labelled only, patch 128": Arm(labels="human", longest_side=128),
    "SAM 2 once": Arm(labels="sam2"),
    "loop": Arm(labels="rounds"),
    "last labels": Arm(labels="last"),
    **{f"last labels less {name}": Arm(labels="last", settings=setting) for name, setting in WITHOUT.items()},
    "last labels, patch 128": Arm(labels="last", longest_side=128),
    "human labels for all": Arm(labels="all"),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Hold what every arm may use."""

    iterations: int
    profile: str
    device: str
    threads: int
    seed: int

    def options(self, protocol: Protocol) -> RunOptions:
        """Return the loop's options: its trainings have the budget together."""
        epoch = 40 if self.profile == "cpu" else 250
        epochs = [max(1, round(self.iterations * part / sum(PARTS) / epoch)) for part in PARTS]
        return RunOptions(
            configuration=protocol.configuration,
            fold=FOLD,
            profile=self.profile,
            round_limit=ROUNDS,
            num_epochs=epochs[0],
            final_epochs=epochs[-1],
            num_iterations_per_epoch=epoch,
            seed=12345 + self.seed,
            branch=f"i{self.iterations}s{self.seed}",
            device=self.device,
            threads=self.threads,
            **INGREDIENTS[self.profile],
        )


def run_arm(arm: Arm, name: str, protocol: Protocol, cohorts: Cohorts, budget: Budget, out: Path) -> dict[str, Any]:
    """Train one arm, as far as it is not trained, and score it on the test cases."""
    cohort, options = Cohort.load(cohorts.folders.raw), budget.options(protocol)
    whole, light.LONGEST_SIDE_2D = light.LONGEST_SIDE_2D, arm.longest_side or light.LONGEST_SIDE_2D
    try:
        if arm.labels == "rounds":
            return _loop(cohorts, cohort, options, budget, out)
        configuration, iterations, seconds = _train(arm, name, cohorts, cohort, options, budget, out)
    finally:
        light.LONGEST_SIDE_2D = whole
    return {
        **_scored(cohorts, cohort, configuration, budget, out),
        "iterations": iterations,
        "seconds": seconds,
        "configuration": configuration,
    }


def _loop(cohorts: Cohorts, cohort: Cohort, options: RunOptions, budget: Budget, out: Path) -> dict[str, Any]:
    state = run_loop(cohorts.folders, options)
    last = state.rounds[-1]
    labels = {
        "SAM 2": state.folder / "sam2" / "unlabelled",
        **{f"round {r.number}": state.folder / f"r{r.number:02d}" / "labels" for r in state.rounds if r.number},
        "end": state.folder / "labels",
    }
    return {
        **_scored(cohorts, cohort, last.configuration, budget, out),
        "iterations": sum(r.iterations or 0 for r in state.rounds),
        "seconds": sum(r.seconds or 0.0 for r in state.rounds),
        "configuration": last.configuration,
        "labels": {key: _short(evaluate(cohorts.truth, folder, class_values=cohort.class_values))
                   for key, folder in labels.items()},
        "rounds": {r.configuration: _scored(cohorts, cohort, r.configuration, budget, out) for r in state.rounds[:-1]},
    }  # fmt: skip


def _train(
    arm: Arm, name: str, cohorts: Cohorts, cohort: Cohort, options: RunOptions, budget: Budget, out: Path
) -> tuple[str, int, float]:
    """Train on given labels for the whole budget; return configuration, iterations and seconds."""
    out.mkdir(parents=True, exist_ok=True)
    nnunet.plan_and_preprocess(cohorts.folders, cohort, options.configuration, log=out / "plan.log")
    nnunet.write_splits(cohorts.folders, cohort)
    configuration = f"{options.configuration}_{options.branch}_{''.join(c for c in name if c.isalnum())}"
    plans = nnunet.read_plans(cohorts.folders)
    settings = options.training(nnunet.light_settings(plans, options.configuration), final=True)
    epochs = max(1, budget.iterations // settings.num_iterations_per_epoch)
    settings = replace(settings, num_epochs=epochs, seed=options.seed)
    labels, beside, pseudo = _learnt(arm.labels, cohorts, cohort, options)
    if arm.labels in ("sam2", "last"):
        settings = replace(settings, pseudo_per_batch=options.pseudo_per_batch)
    settings = replace(settings, **{"soft_targets": settings.soft_targets and beside, **arm.settings})
    nnunet.make_round_configuration(
        cohorts.folders,
        cohort,
        base_configuration=options.configuration,
        name=configuration,
        settings=settings,
        pseudo_cases=pseudo,
        labels=labels,
        confidence=labels / CONFIDENCE if labels and beside else None,
        probabilities=labels / PROBABILITIES if labels and settings.soft_targets else None,
        overrides=nnunet.light_configuration(plans, options.configuration) if budget.profile == "cpu" else None,
    )
    started, seconds_file = time.monotonic(), out / f"{configuration}_seconds.json"
    log = out / f"{configuration}_train.log"
    nnunet.train(cohorts.folders, configuration, FOLD, device=budget.device, log=log, threads=budget.threads)
    if not seconds_file.is_file():
        write_json(seconds_file, round(time.monotonic() - started, 1))
    iterations = settings.num_epochs * settings.num_iterations_per_epoch
    return configuration, iterations, float(read_json(seconds_file))


def _learnt(labels: str, cohorts: Cohorts, cohort: Cohort, options: RunOptions) -> tuple[Path | None, bool, list[str]]:
    """Return the unlabelled cases' labels, whether maps lie beside them, and which of the cases are learnt from."""
    everyone = [case.case_id for case in cohort.unlabelled]
    if labels == "human":
        return None, False, []
    if labels == "all":
        return cohorts.truth, False, everyone
    state = read_state(cohorts.folders, options.run_name)
    if labels == "sam2":
        return state.folder / "sam2" / "unlabelled", True, everyone
    if state.stop_reason is None:
        raise SystemExit(f"{state.folder} has not ended; run the arm 'loop' first, whose labels this one learns from")
    last = state.rounds[-1]
    folder = state.folder / f"r{last.number:02d}" / "labels"
    return folder, True, [case for case in everyone if case not in last.left_out]


def _scored(cohorts: Cohorts, cohort: Cohort, configuration: str, budget: Budget, out: Path) -> dict[str, Any]:
    """Score a model on the test cases, with each class whole and with its largest piece alone where it is one piece."""
    made = out / configuration
    predict_test(
        cohorts.folders,
        cohort,
        configuration,
        FOLD,
        cohort.test,
        threads=budget.threads,
        out=made,
        device=budget.device,
    )
    largest = out / f"{configuration}_largest"
    write_largest(made, largest, [f"{c.case_id}{cohort.file_ending}" for c in cohort.test], single_classes(cohort))
    truth, values = cohort.root / TEST_LABELS, cohort.class_values
    scores = _short(evaluate(truth, made, class_values=values))
    return {**scores, "largest": _short(evaluate(truth, largest, class_values=values))}


def _short(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dice": scores["mean"]["dice"],
        "hd95": scores["mean"]["hd95"],
        "classes": {name: values["dice"] for name, values in scores["classes"].items()},
        "cases": len(scores["cases"]),
    }
