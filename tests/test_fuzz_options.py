"""Whatever stands in options and in files of settings: reading it ends in our own errors or in values that hold."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_sam2.cohort.cohort import COHORT_FILE, Cohort, Role
from nnunet_sam2.cohort.convert import ConvertOptions
from nnunet_sam2.cohort.labels import make_label_table, parse_labels, table_from_json
from nnunet_sam2.cohort.layouts import find
from nnunet_sam2.errors import InputError, NnunetSam2Error
from nnunet_sam2.files.repairs import ReadPolicy
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.registry import STRATEGIES, make_strategy, options_json, parse_settings
from nnunet_sam2.rounds.ledger import LEDGER_FILE, Ledger, read_events
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.storage import read_json

# The same examples each time: a failure in CI is one that can be repeated.
QUICK = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}

ODD_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "0",
        "1",
        "-1",
        "1e9",
        "nan",
        "inf",
        "none",
        "true",
        "a,b",
        "1,2",
        "../x",
        "/etc/passwd",
        "a=b",
        "\0",
        "é",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | st.sampled_from([0.5, 1e300, -0.1]) | ODD_TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXTS, inner, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def folder():
    """A folder in memory where there is one."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        yield Path(name)


def _outcome(call: Callable[[], Any], seen: Counter[str]) -> Any:
    """Return what a call gives, or None for one of our own errors, which is one line."""
    try:
        result = call()
    except NnunetSam2Error as error:
        seen["refused"] += 1
        told = str(error)
    else:
        seen["taken"] += 1
        return result
    assert told
    assert "\n" not in told
    return None


RUN_VALUES = {
    "fold": st.sampled_from(["0", "4", "all", "-1", "x", "", "²", "0/../1"]),
    "profile": st.sampled_from(["gpu", "cpu", "tpu"]),
    "supports": st.sampled_from(["train", "all", "none"]),
    "branch": st.none() | ODD_TEXTS,
    "round_limit": st.integers(-1, 9),
    "mean_change": st.sampled_from([0, 0.01, 1, -0.1, 2, float("nan"), float("inf")]),
    "worst_tenth_change": st.sampled_from([0, 1, float("nan")]),
    "validation_drop": st.sampled_from([0, 1, float("nan")]),
    "least_quality": st.sampled_from([0, 0.3, 1.5, float("nan")]),
    "pseudo_per_batch": st.sampled_from([0, 0.5, 1, float("nan")]),
    "num_epochs": st.none() | st.integers(-1, 3),
    "num_iterations_per_epoch": st.none() | st.integers(-1, 3),
    "final_epochs": st.none() | st.integers(-2, 3),
    "threads": st.none() | st.integers(-1, 3),
    "seed": st.integers(-2, 5),
    "configuration": st.sampled_from(["2d", "3d_fullres", "../x", "", "a/b", "a b"]),
}


def test_run_options_are_refused_or_hold_and_name_a_folder_of_their_own() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400, **QUICK)
    @given(given_options=st.fixed_dictionaries({}, optional=RUN_VALUES))
    def check(given_options: dict[str, Any]) -> None:
        options = _outcome(lambda: RunOptions(**given_options), seen)
        if options is None:
            return
        assert "/" not in options.run_name
        assert not options.run_name.startswith(".")
        assert options.fold == "all" or int(options.fold) >= 0
        assert 0 <= options.mean_change <= 1
        assert 0 < options.pseudo_per_batch < 1
        assert options.round_limit >= 1
        assert json.loads(json.dumps(options.to_json(), allow_nan=False))

    check()
    assert seen["taken"] > 30, seen


@settings(max_examples=100, **QUICK)
@given(items=st.lists(st.one_of(ODD_TEXTS, st.builds("{}={}".format, ODD_TEXTS, ODD_TEXTS)), max_size=4))
def test_settings_from_the_command_line_are_pairs_or_refused(items: list[str]) -> None:
    found = _outcome(lambda: parse_settings(items), Counter())
    assert found is None or (len(found) == len(items) and all(found))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategys_settings_are_refused_or_of_their_kind(name: str) -> None:
    known = sorted(options_json(make_strategy(name).options))
    seen: Counter[str] = Counter()

    @settings(max_examples=60, **QUICK)
    @given(asked=st.dictionaries(st.sampled_from([*known, "preset", "unknown"]), ODD_TEXTS, min_size=1, max_size=2))
    def check(asked: dict[str, str]) -> None:
        strategy = _outcome(lambda: make_strategy(name, asked), seen)
        if strategy is not None:
            json.dumps(options_json(strategy.options), allow_nan=False)

    check()
    assert seen["refused"] > 5


@settings(max_examples=150, **QUICK)
@given(
    value=st.fixed_dictionaries({}, optional={"labels": VALUES, "regions_class_order": VALUES, "x": VALUES}) | VALUES
)
def test_a_label_table_is_refused_or_one_that_nnunet_takes(value: Any) -> None:
    found = _outcome(lambda: table_from_json(value, "dataset.json"), Counter())
    table = None if found is None else _outcome(lambda: make_label_table(*found), Counter())
    if table is not None:
        assert table.labels["background"] == 0
        used = {v for entry in table.labels.values() for v in (entry if isinstance(entry, list) else [entry])}
        assert used == set(range(len(used)))


@settings(max_examples=100, **QUICK)
@given(text=st.text('ab=1,+{}"[]:0 -', max_size=14))
def test_labels_from_the_command_line_are_a_table_or_refused(text: str) -> None:
    found = _outcome(lambda: parse_labels(text), Counter())
    assert found is None or all(isinstance(name, str) for name in found[0])


@settings(max_examples=150, **QUICK)
@given(
    value=st.fixed_dictionaries({}, optional=dict.fromkeys(("modality", "channel_names", "labels", "training"), VALUES))
)
def test_any_dataset_json_of_a_task_is_refused_or_read(folder: Path, value: Any) -> None:
    task = folder / "task"
    (task / "imagesTr").mkdir(parents=True, exist_ok=True)
    (task / "imagesTr" / "a_0000.nii.gz").write_bytes(b"")
    for layout in ("msd", "folder"):
        (task / "dataset.json").write_text(json.dumps(value))
        (task / "images").mkdir(exist_ok=True)
        (task / "images" / "a.nii.gz").write_bytes(b"")
        found = _outcome(lambda layout=layout: find(task, layout), Counter())
        assert found is None or all(task in case.images[0].parents for case in found.cases)


def _changed(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove or add one thing somewhere in a JSON value."""
    whole = part = copy.deepcopy(value)
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        key = draw(st.sampled_from(keys))
        if not isinstance(part[key], (dict, list)) or not part[key] or draw(st.integers(0, 3)) == 0:
            break
        part = part[key]
    action = draw(st.sampled_from(["replace", "replace", "remove", "twice"]))
    if action == "remove":
        del part[key]
    elif action == "twice" and isinstance(part, list):
        part.append(copy.deepcopy(part[key]))
    else:
        part[key] = draw(VALUES)
    return whole


def test_any_cohort_file_is_refused_or_is_a_cohort_within_its_folder(
    tiny_dataset: DatasetFolders, folder: Path
) -> None:
    sound = read_json(tiny_dataset.raw / COHORT_FILE)
    seen: Counter[str] = Counter()

    @settings(max_examples=300, **QUICK)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        value = data.draw(st.composite(lambda draw: _changed(draw, sound))())
        (folder / COHORT_FILE).write_text(json.dumps(value))
        cohort = _outcome(lambda: Cohort.load(folder), seen)
        if cohort is None:
            return
        for case in cohort.cases:
            for path in cohort.image_paths(case):
                assert folder in path.resolve().parents
            assert min(case.geometry.shape_zyx) >= 1
        ids = [case.case_id.lower() for case in cohort.cases]
        assert len(set(ids)) == len(ids)
        tested = {case.patient for case in cohort.test}
        assert not tested & {case.patient for case in cohort.cases if case.role is not Role.TEST}

    check()
    assert seen["refused"] > 60, seen
    assert seen["taken"] > 20, seen


@settings(max_examples=200, **QUICK)
@given(
    lines=st.lists(
        st.one_of(
            VALUES.map(json.dumps),
            st.fixed_dictionaries(
                {"version": st.just(1), "event": st.sampled_from(["started", "done", "stopped"])},
                optional={"stage": VALUES, "key": VALUES, "files": VALUES, "info": VALUES},
            ).map(json.dumps),
            st.sampled_from(["{", '{"event":', "null", "[]", '{"version": 2}', "\0", "NaN"]),
        ),
        max_size=4,
    ),
    cut=st.integers(0, 30),
)
def test_any_ledger_is_refused_or_a_list_of_events(folder: Path, lines: list[str], cut: int) -> None:
    path = folder / LEDGER_FILE
    text = "".join(line + "\n" for line in lines)
    path.write_text(text[: len(text) - cut] if cut < len(text) else text)
    events = _outcome(lambda: read_events(path), Counter())
    if events is None:
        return
    assert all(isinstance(event, dict) and isinstance(event["event"], str) for event in events)
    ledger = _outcome(lambda: Ledger(folder), Counter())
    if ledger is not None:
        _outcome(lambda: ledger.done("x", "y"), Counter())


@settings(max_examples=100, **QUICK)
@given(
    asked=st.fixed_dictionaries(
        {},
        optional={
            "labelled": st.integers(-1, 3),
            "seed": st.integers(-1, 3),
            "test_cases": st.integers(-1, 3),
            "channels": st.lists(ODD_TEXTS, max_size=3).map(tuple),
        },
    ),
    nan=ODD_TEXTS,
    form=st.none() | ODD_TEXTS,
)
def test_convert_options_are_refused_or_hold(asked: dict[str, Any], nan: str, form: str | None) -> None:
    options = _outcome(lambda: ConvertOptions(**asked), Counter())
    assert options is None or json.dumps(options.to_json())
    with pytest.raises(InputError):
        ReadPolicy(nonfinite=nan, form=form)
