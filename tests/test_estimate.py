"""What a run will take: sizes as nnU-Net counts them, costs that add up, refusals with numbers, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.machine import Memory
from nnunet_sam2.orientation import Turn
from nnunet_sam2.review.take_in import take_in
from nnunet_sam2.rounds.disk import RESERVE, run_size
from nnunet_sam2.rounds.estimate import estimate as module
from nnunet_sam2.rounds.estimate import selfbench
from nnunet_sam2.rounds.estimate.costs import Cost
from nnunet_sam2.rounds.estimate.labelling_costs import LabellingCosts
from nnunet_sam2.rounds.estimate.nnunet_costs import NnunetCosts
from nnunet_sam2.rounds.estimate.nnunet_probe import smaller_patch
from nnunet_sam2.rounds.estimate.sizes import preprocessed_shape, tiles
from nnunet_sam2.rounds.estimate.stages import RunEstimator
from nnunet_sam2.rounds.ledger import Ledger
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import run_folder
from nnunet_sam2.storage import write_json

SECOND = {"seconds": 1.0, "cpu_seconds": 0.5}
GB = 10**9

LABELLING: dict[str, Any] = {
    **dict.fromkeys(("start", "encoding", "reading", "prepare", "labels", "labels_again", "labels_from_fewer"), SECOND),
    **dict.fromkeys(("quality", "writing", "refine_prepare", "refine"), SECOND),
    "image_size": 64,
    "encoded_slices": 48,
    "encoded_bytes": 48 * 30_000,
    "support_slices": 24,
    "fewer_slices": 12,
    "query_shapes_zyx": [[12, 40, 40]],
    "refined_shape_zyx": [12, 40, 40],
    "written_voxels": 12 * 40 * 40,
    "start_memory_bytes": GB // 2,
    "memory_bytes": GB,
    "gpu_bytes": 0,
}
NNUNET: dict[str, Any] = {
    **dict.fromkeys(("planning", "start", "preprocessing", "segmentation", "training_start", "training_step"), SECOND),
    **dict.fromkeys(("validation_step", "checkpoint", "tile", "prediction"), SECOND),
    "configuration": {
        "patch_size": [12, 40, 40],
        "probed_patch_size": [12, 40, 40],
        "spacing": [8.0, 2.8, 2.8],
    },
    "transpose_forward": [0, 1, 2],
    "preprocessed_shape": [12, 40, 40],
    "probed_voxels": 12 * 40 * 40,
    "start_memory_bytes": GB,
    "training_memory_bytes": 2 * GB,
    "training_gpu_bytes": 0,
}

Estimator = Callable[..., RunEstimator]


@pytest.fixture
def estimator(cohort: Cohort) -> Estimator:
    """An estimator of the tiny cohort from measurements of one second each."""

    def make(*, done: tuple[str, ...] = (), planned: bool = False, **options: Any) -> RunEstimator:
        validation, supports = cohort.labelled[:1], cohort.labelled[1:]
        return RunEstimator(
            cohort=cohort,
            options=RunOptions(profile="cpu", device="cpu", **options),
            validation=validation,
            supports=supports,
            labelling=LabellingCosts(
                answer=LABELLING, slice_axis=0, several_views=False, supports=supports, classes=2, memory_entries=40_960
            ),
            nnunet=NnunetCosts(answer=NNUNET, heads=3),
            size=run_size(cohort, validation_ids=(validation[0].case_id,), light=True),
            planned=planned,
            unprepared=() if planned else cohort.unlabelled,
            done=done,
        )

    return make


def test_costs_add_and_scale() -> None:
    cost = Cost(seconds=2, cpu_seconds=1) * 3 + Cost(seconds=1)
    assert cost == Cost(seconds=7, cpu_seconds=3)
    assert cost.less(Cost(seconds=10, cpu_seconds=1)) == Cost(seconds=0, cpu_seconds=2)
    assert Cost.total([cost, cost]) == cost * 2


def test_slices_are_counted_as_they_are_shown_however_a_file_is_stored(estimator: Estimator) -> None:
    costs = estimator().labelling
    case = costs.supports[0]
    stored = Turn(axes=(2, 0, 1), flips=(True, False, True)).geometry(case.geometry)
    assert stored.shape_zyx[costs.slice_axis] != case.geometry.shape_zyx[costs.slice_axis]
    turned = replace(case, geometry=stored)
    assert costs.encode(turned) == costs.encode(case)
    assert costs.label(turned, [turned, turned]) == costs.label(case, [case, case])


@pytest.mark.parametrize(
    ("shape", "spacing", "target", "patch"),
    [
        ((35, 51, 35), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (40, 56, 40)),
        ((120, 300, 280), (2.5, 0.8, 0.8), (1.25, 0.9, 0.9), (64, 128, 96)),
        ((30, 256, 200), (5.0, 1.4, 1.4), (1.2, 1.2), (192, 160)),
    ],
)
def test_shapes_and_tiles_are_those_that_nnunet_counts(
    shape: tuple[int, ...], spacing: tuple[float, ...], target: tuple[float, ...], patch: tuple[int, ...]
) -> None:
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    found = preprocessed_shape(shape, spacing, target)
    full = list(target) if len(target) == 3 else [spacing[0], *target]
    assert list(found) == [int(n) for n in compute_new_shape(shape, spacing, full)]
    sides = found[-len(patch) :]
    padded = tuple(max(n, p) for n, p in zip(sides, patch, strict=True))
    count = found[0] if len(patch) == 2 else 1
    for steps in compute_steps_for_sliding_window(padded, patch, 0.5):
        count *= len(steps)
    assert tiles(found, patch) == count


def test_a_patch_is_halved_only_as_far_as_the_network_can_take_it() -> None:
    architecture = {"arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]}}
    assert smaller_patch([128, 128, 128], architecture, 128 * 1024) == [32, 64, 64]
    assert smaller_patch([128, 128, 128], architecture, 1) == [32, 32, 32]
    assert smaller_patch([40, 56, 40], architecture, 128 * 1024) == [40, 56, 40]


def test_stages_are_those_of_a_run_in_their_order(estimator: Estimator) -> None:
    stages = [stage.stage for stage in estimator(round_limit=2).stages()]
    assert stages == [
        "setup/plan",
        "setup/sam2_quality",
        "setup/sam2",
        *("r00/data", "r00/train", "r00/predict", "r00/quality"),
        *("r01/fuse", "r01/data", "r01/train", "r01/predict", "r01/quality"),
        *("r02/refine", "r02/fuse", "r02/data", "r02/train", "r02/predict", "r02/quality"),
        "finish/labels",
    ]
    without = [stage.stage for stage in estimator(round_limit=1, skip_baseline=True, final_epochs=2).stages()]
    assert [name for name in without if name.startswith("r")] == [
        *("r01/fuse", "r01/data", "r01/train", "r01/predict", "r01/quality"),
        *("r02/refine", "r02/fuse", "r02/data", "r02/train", "r02/predict", "r02/quality"),
    ]


def test_time_follows_iterations_and_cases_and_a_done_stage_takes_none(estimator: Estimator) -> None:
    def seconds(made: RunEstimator) -> dict[str, float]:
        return {stage.stage: stage.cost.seconds for stage in made.stages()}

    short = seconds(estimator(num_epochs=1, num_iterations_per_epoch=10))
    long = seconds(estimator(num_epochs=1, num_iterations_per_epoch=110))
    assert long["r01/train"] - short["r01/train"] == pytest.approx(100)
    assert long["setup/sam2"] == short["setup/sam2"]
    # two cases of the probe's size: encoded (24 of 48 probed slices), labelled, judged, written; supports found again
    assert short["setup/sam2"] == pytest.approx(2 * (12 / 48 + 1 + 1 + 1) + 1 + 0.5, abs=0.01)
    finished = estimator(done=("setup/plan", "setup/sam2")).stages()
    assert [stage.cost.seconds for stage in finished if stage.done] == [0, 0]
    assert [stage.disk_bytes for stage in finished if stage.done] == [0, 0]


def test_a_second_run_preprocesses_nothing_and_writes_nothing_of_it(estimator: Estimator) -> None:
    first, second = (estimator(planned=planned).stages()[0] for planned in (False, True))
    assert first.stage == second.stage == "setup/plan"
    # What is left is to start nnU-Net and to see that all is there.
    assert (second.cost.seconds, second.disk_bytes) == (0.5, 0)
    assert first.cost.seconds > 2
    assert first.disk_bytes > 0


def test_cases_that_another_run_preprocessed_are_not_counted(fresh_dataset: DatasetFolders) -> None:
    cohort, name = Cohort.load(fresh_dataset.raw), "nnUNetPlans_3d_fullres"
    plans = {"configurations": {"3d_fullres": {"data_identifier": name}}}
    write_json(fresh_dataset.preprocessed / "nnUNetPlans.json", plans)
    first, *others = cohort.unlabelled
    (fresh_dataset.preprocessed / f"{name}_un" / first.case_id).mkdir(parents=True)
    assert module._unprepared(fresh_dataset, cohort, RunOptions()) == tuple(others)


def test_more_supports_cost_more_until_the_memory_is_full(cohort: Cohort) -> None:
    answer = {**LABELLING, "labels_again": {"seconds": 2.0, "cpu_seconds": 2.0}}

    def label(memory_entries: int | None, image_size: int) -> float:
        costs = LabellingCosts(
            answer={**answer, "image_size": image_size},
            slice_axis=0,
            several_views=False,
            supports=cohort.labelled,
            classes=2,
            memory_entries=memory_entries,
        )
        return costs.label(cohort.unlabelled[0], cohort.labelled * 4).seconds

    # 12 support slices more cost a second more; 144 slices are 120 more than were probed
    assert label(None, 512) == pytest.approx(11)
    assert label(40_960, 256) == pytest.approx(11)
    assert label(40_960, 512) == pytest.approx(1 + 16 / 12)


@pytest.mark.parametrize(
    ("strategy", "settings", "image_size", "entries"),
    [
        ("transfer", {}, 256, 40_960),
        ("transfer", {"memory_entries": 5000}, 256, 5000),
        ("auto", {}, 256, 16_384),
        ("auto", {}, 512, 40_960),
        ("insert", {}, 256, None),
    ],
)
def test_the_bound_on_the_memory_is_the_strategys_own(
    strategy: str, settings: dict[str, Any], image_size: int, entries: int | None
) -> None:
    options = RunOptions(strategy=strategy, strategy_options=settings)
    assert module.memory_entries(options, image_size) == entries


def test_features_without_room_are_warned_of_and_those_that_lie_there_take_no_more(
    monkeypatch: pytest.MonkeyPatch, fresh_dataset: DatasetFolders
) -> None:
    cohort, options = Cohort.load(fresh_dataset.raw), RunOptions(strategy="transfer")
    monkeypatch.setattr(module, "free_bytes", lambda path: 10**13)
    needed, warnings = module.features_to_keep(fresh_dataset, cohort, options, 256)
    assert (needed > 10**6, warnings) == (True, ())
    kept = fresh_dataset.results / "nnunet_sam2" / "embeddings" / "ab" / "abc.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(10**6))
    assert module.features_to_keep(fresh_dataset, cohort, options, 256) == (needed - 10**6, ())
    monkeypatch.setattr(module, "free_bytes", lambda path: RESERVE)
    none, (warning,) = module.features_to_keep(fresh_dataset, cohort, options, 256)
    assert (none, "encoded again" in warning) == (0, True)


def _fit(monkeypatch: pytest.MonkeyPatch, folders: DatasetFolders, made: RunEstimator, **limits: int) -> Any:
    memory = Memory(total=limits.get("memory", 64 * GB), available=limits.get("available", 60 * GB), limit=None)
    monkeypatch.setattr(module, "free_bytes", lambda path: limits.get("disk", 10**13))
    nnunet = {**NNUNET, "gpu_total_bytes": limits.get("gpu", 0)}
    measured = selfbench.Measured(labelling=LABELLING, nnunet=nnunet, kept=True, busy=0.0, seconds=30)
    return module._fit(folders, made.stages(), measured, memory)


def test_what_cannot_fit_is_refused_with_numbers_and_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tiny_dataset: DatasetFolders, estimator: Estimator
) -> None:
    made = estimator()
    assert _fit(monkeypatch, tiny_dataset, made) == ((), ())
    (memory,), _ = _fit(monkeypatch, tiny_dataset, made, memory=2 * GB)
    assert "2.5 GB, more than the 2.0 GB that this machine has; take -c 3d_lowres" in memory
    (disk,), _ = _fit(monkeypatch, tiny_dataset, made, disk=10**8)
    assert "100.0 MB are free; make room" in disk
    _, (warning,) = _fit(monkeypatch, tiny_dataset, made, available=GB)
    assert "end other programs" in warning


def test_an_accelerator_that_is_too_small_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_dataset: DatasetFolders, estimator: Estimator
) -> None:
    monkeypatch.setitem(NNUNET, "training_gpu_bytes", 9 * GB)
    (obstacle,), _ = _fit(monkeypatch, tiny_dataset, estimator(), gpu=8 * GB)
    assert obstacle.startswith("accelerator: r00/train needs about 9.0 GB, more than its 8.0 GB")


def test_sam2_keeps_its_memory_of_an_accelerator_while_nnunet_trains(
    monkeypatch: pytest.MonkeyPatch, estimator: Estimator
) -> None:
    monkeypatch.setitem(NNUNET, "training_gpu_bytes", 7 * GB)
    monkeypatch.setitem(LABELLING, "gpu_bytes", 2 * GB)
    taken = {stage.stage: stage.gpu_bytes for stage in estimator().stages()}
    assert (taken["setup/sam2"], taken["r00/train"], taken["setup/plan"]) == (2 * GB, 9 * GB, 0)


def test_json_and_again_go_with_a_dry_run_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-d", "501", "--json"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_dry_run_measures_once_writes_nothing_and_refuses_what_cannot_fit(
    fresh_dataset: DatasetFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("NNUNET_SAM2_CACHE", str(cache))
    command = ["run", "-d", "501", "--sam2", "untrained", "--strategy", "transfer", "--image-size", "64"]
    command += ["--device", "cpu", "--threads", "1", "--rounds", "2", "--dry-run"]
    roots = [fresh_dataset.raw.parent, fresh_dataset.preprocessed.parent, fresh_dataset.results.parent]
    before = sorted(path for root in roots for path in root.rglob("*"))

    assert main(command) == 0
    text = capsys.readouterr().out
    assert "r02/train" in text
    assert "2 rounds, the limit" in text
    assert "measured just now" in text
    assert sorted(path for root in roots for path in root.rglob("*")) == before
    measured = {path: path.read_bytes() for path in cache.rglob("*.json")}
    assert len(measured) == 2

    # The same again, with another schedule, is answered from the cache: no probe is started.
    monkeypatch.setattr(selfbench, "_run_probe", lambda *anything: pytest.fail("measured again"))
    assert main([*command, "--json", "--epochs", "2", "--iterations", "5"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] is True
    assert value["sum"]["seconds"] > 0
    training = next(stage for stage in value["stages"] if stage["stage"] == "r01/train")
    assert training["cpu_seconds"] > 0
    assert training["memory_bytes"] > 10**8

    little = Memory(total=10**8, available=10**8, limit=10**8)
    monkeypatch.setattr(module, "read_memory", lambda: little)
    assert main(command) == 2
    assert "does not fit: memory" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in cache.rglob("*.json")} == measured


def test_labels_that_people_drew_before_the_run_count_as_supports(
    fresh_dataset: DatasetFolders, generated_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Cohort.load(fresh_dataset.raw).unlabelled[0].case_id
    take_in(fresh_dataset.raw, [generated_folder / HIDDEN_LABELS / f"{drawn}.nii.gz"])
    asked: list[str] = []

    def stop(*_: Any, support_ids: tuple[str, ...], **__: Any) -> None:
        asked.extend(support_ids)
        raise InputError("enough")

    monkeypatch.setattr(module, "measure", stop)
    with pytest.raises(InputError, match="enough"):
        module.estimate_run(fresh_dataset, RunOptions(profile="cpu", device="cpu", sam2="untrained"))
    assert asked[-1] == drawn
    assert len(asked) == 3


def test_a_dry_run_refuses_the_options_that_the_run_would_refuse(fresh_dataset: DatasetFolders) -> None:
    options = RunOptions(profile="cpu", device="cpu", final_epochs=2)
    ledger = Ledger(run_folder(fresh_dataset, options.run_name))
    ledger.append("run", options=options.to_json())
    with pytest.raises(InputError, match="--seed: 12345 -> 2"):
        module.estimate_run(fresh_dataset, replace(options, seed=2))
    ledger.append("stopped", reason="converged", best_round=1)
    with pytest.raises(InputError, match="has had its final training"):
        module.estimate_run(fresh_dataset, replace(options, round_limit=9))


def test_a_probe_that_fails_shows_its_last_lines(
    fresh_dataset: DatasetFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NNUNET_SAM2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfbench.sys, "executable", "/bin/false")
    command = ["run", "-d", "501", "--sam2", "untrained", "--strategy", "transfer", "--device", "cpu", "--dry-run"]
    assert main(command) == 1
    assert "self-benchmark of labelling failed (exit status 1)" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.json"))
