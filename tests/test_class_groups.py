"""Labels from supports that were annotated in part: each class from those that answer for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.class_groups import GroupLabeller, GroupProbe, class_groups, joined
from nnunet_sam2.labelling.explain.cases import as_text, find_case
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member, PseudoLabel
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.rounds.ending.signs import human_signs
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.storage import file_hash
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.volumes import Volume, write_label

LIVER, KIDNEY = 1, 2
VALUES = (LIVER, KIDNEY)
OPTIONS = {"decoder": "off", "check_slices": "0"}
GRID = Geometry(shape_zyx=(6, 64, 64), spacing_xyz_mm=(1.0, 1.0, 4.0))


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=128, threads=1)


def _case(
    name: str, shift: tuple[int, int], sam2: Any, annotated: tuple[int, ...] | None, shown: Sequence[int]
) -> Support:
    """A body with a large bright organ and a small dark one; only the classes that are ``shown`` are labelled."""
    z, y, x = np.indices(GRID.shape_zyx)
    dy, dx = shift
    body = ((y - 32) / 28) ** 2 + ((x - 32) / 30) ** 2 < 1
    liver = ((y - 26 - dy) / 12) ** 2 + ((x - 20 - dx) / 11) ** 2 < 1
    kidney = (((y - 42 - dy) / 9) ** 2 + ((x - 46 - dx) / 9) ** 2 < 1) & (z > 0)
    noise = np.random.default_rng(sum(map(ord, name))).normal(0, 4, GRID.shape_zyx)
    image = (60.0 * body + 90 * liver - 50 * kidney + noise).astype(np.float32)
    label = np.where(liver, LIVER, np.where(kidney, KIDNEY, 0)).astype(np.uint8)
    frames = Frames.from_volume(Volume(array_czyx=image[None], geometry=GRID), size=128, slice_axis=0)
    return Support(
        case_id=name,
        frames=frames,
        embeddings=sam2.embed(frames),
        label_zyx=np.where(np.isin(label, shown), label, 0).astype(np.uint8),
        geometry=GRID,
        annotated=annotated,
    )


@pytest.fixture(scope="module")
def query(backend: Any) -> Support:
    return _case("query", (0, 0), backend, None, VALUES)


def _partly(sam2: Any, *, listed: bool) -> list[Support]:
    return [
        _case("liver", (1, -1), sam2, (LIVER,) if listed else None, [LIVER]),
        _case("kidney", (-1, 1), sam2, (KIDNEY,) if listed else None, [KIDNEY]),
    ]


def _labelled(strategy: str, case: Support, supports: list[Support], sam2: Any, options: dict[str, Any]) -> PseudoLabel:
    labeller = GroupLabeller(make_strategy(strategy, options), supports, VALUES)
    labeller.prepare(sam2)
    return labeller.label(case.as_query(), supports, sam2, np.random.default_rng(0), FusionOptions())


@pytest.mark.parametrize("strategy", ["transfer", "auto"])
def test_organs_that_were_annotated_in_different_cases_are_both_found(
    strategy: str, query: Support, backend: Any
) -> None:
    with_list = _labelled(strategy, query, _partly(backend, listed=True), backend, OPTIONS)
    without = _labelled(strategy, query, _partly(backend, listed=False), backend, OPTIONS)
    found = dice_by_class(with_list.label_zyx, query.label_zyx, VALUES)
    suppressed = dice_by_class(without.label_zyx, query.label_zyx, VALUES)
    assert min(d or 0 for d in found.values()) > 0.8
    # Each support's empty voxels are evidence against the other's organ then.
    assert max(d or 0 for d in suppressed.values()) < 0.7
    np.testing.assert_allclose(with_list.prob_czyx.sum(axis=0), 1.0, atol=1e-4)
    answers = [tuple(member["answers_for"]) for member in with_list.record["members"]]
    assert set(answers) == {(LIVER,), (KIDNEY,)}


@pytest.mark.parametrize("strategy", ["transfer", "guided"])
def test_with_everything_annotated_nothing_changes(strategy: str, query: Support, backend: Any) -> None:
    supports = [_case("a", (1, 1), backend, None, VALUES), _case("b", (-1, 0), backend, None, VALUES)]
    options = OPTIONS if strategy == "transfer" else {}
    plain = make_strategy(strategy, options)
    plain.prepare(supports, VALUES, backend)  # type: ignore[attr-defined]  # these check something
    members = plain.members(query.as_query(), supports, VALUES, backend, np.random.default_rng(0))
    expected = fuse(members, VALUES, FusionOptions())
    for known in (None, VALUES):
        given = [dataclasses.replace(support, annotated=known) for support in supports]
        pseudo = _labelled(strategy, query, given, backend, options)
        assert pseudo.label_zyx.tobytes() == expected.label_zyx.tobytes()
        assert pseudo.prob_czyx.tobytes() == expected.prob_czyx.tobytes()
        assert pseudo.record == expected.record


def test_a_class_of_which_nobody_was_asked_is_nowhere_and_said_to_be_unanswered(query: Support, backend: Any) -> None:
    supports = _partly(backend, listed=True)
    labeller = GroupLabeller(make_strategy("transfer", OPTIONS), supports, VALUES)
    labeller.prepare(backend)
    pseudo = labeller.label(query.as_query(), supports[1:], backend, np.random.default_rng(0), FusionOptions())
    assert pseudo.record["unanswered"] == [LIVER]
    assert set(np.unique(pseudo.label_zyx)) == {0, KIDNEY}


def test_classes_are_grouped_by_the_supports_that_answer_for_them(backend: Any) -> None:
    whole = _case("whole", (0, 0), backend, None, VALUES)
    liver, kidney = _partly(backend, listed=True)
    assert class_groups([whole, whole], VALUES) == [VALUES]
    assert class_groups([whole, liver], VALUES) == [(LIVER,), (KIDNEY,)]
    assert class_groups([liver, kidney], VALUES) == [(LIVER,), (KIDNEY,)]


def _sure(values: tuple[int, ...], *probs: float) -> PseudoLabel:
    prob_kzyx = np.array(probs, np.float32).reshape(-1, 1, 1, 1)
    return fuse([Member(name="m", prob_kzyx=prob_kzyx, background_zyx=1 - prob_kzyx.sum(axis=0))], values)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.6,), (0.1, 0.1), LIVER),  # it beats the background in its own group
        ((0.45,), (0.3, 0.2), 0),  # no class does
        ((0.8,), (0.0, 0.9), 3),  # both claim it: the higher odds
        ((1.0,), (1.0, 0.0), LIVER),  # both are certain: shared, the lower value is first
    ],
)
def test_groups_are_joined_by_odds_against_the_background(
    first: tuple[float, ...], second: tuple[float, ...], expected: int, query: Support
) -> None:
    one = Query(case_id="q", frames=query.frames, embeddings=query.embeddings, geometry=Geometry(shape_zyx=(1, 1, 1)))
    found = {(1,): _sure((1,), *first), (2, 3): _sure((2, 3), *second)}
    pseudo = joined(found, one, (1, 2, 3), FusionOptions(components="none"))
    assert pseudo.label_zyx.item() == expected
    assert pseudo.prob_czyx.sum() == pytest.approx(1.0)


def test_quality_is_seen_with_the_cases_that_answer_for_a_class(query: Support, backend: Any) -> None:
    supports = _partly(backend, listed=True)
    pseudo = _labelled("transfer", query, supports, backend, OPTIONS)
    seen = GroupProbe(VALUES, QualityOptions()).measure(query.as_query(), pseudo, supports)
    assert set(seen[LIVER].reverse) == {"liver"}
    assert set(seen[KIDNEY].agreement) == {"kidney"}
    assert seen[LIVER].shown_in == seen[KIDNEY].shown_in == 1.0
    unlisted = GroupProbe(VALUES, QualityOptions()).measure(query.as_query(), pseudo, _partly(backend, listed=False))
    assert unlisted[LIVER].shown_in == 0.5


def test_points_that_find_one_foreground_are_refused_for_groups_of_one_class(query: Support, backend: Any) -> None:
    with pytest.raises(InputError, match="several classes"):
        GroupLabeller(make_strategy("chain", {"seeds": "points"}), _partly(backend, listed=True), VALUES)


@pytest.fixture
def partly(cohort: Cohort) -> Cohort:
    """The tiny cohort, of whose first two labelled cases one is annotated with each class alone."""
    known = {case.case_id: (value,) for case, value in zip(cohort.labelled, cohort.class_values, strict=False)}
    cases = tuple(dataclasses.replace(case, annotated=known.get(case.case_id)) for case in cohort.cases)
    return dataclasses.replace(cohort, cases=cases)


def test_a_class_that_was_not_annotated_has_no_dice(partly: Cohort, backend: Any, tmp_path: Path) -> None:
    ids = [case.case_id for case in partly.labelled]
    (record,) = label_cases(
        cohort=partly,
        case_ids=ids[:1],
        support_ids=ids,
        strategy=make_strategy("transfer", OPTIONS),
        backend=backend,
        out=tmp_path,
        seed=1,
        quality=QualityOptions(),
    )
    known, other = (str(value) for value in partly.class_values)
    assert record["dice_with_human_label"][other] is None
    assert record["dice_with_human_label"][known] is not None
    assert {key: seen["shown_in"] for key, seen in record["quality"]["features"].items()} == {known: 1.0, other: 1.0}
    text = as_text(find_case(partly, ids[0], tmp_path, dataset="501"), partly)
    assert f"nearest locations of {ids[2]};" in text
    assert f"nearest locations of {ids[1]}, {ids[2]};" in text


def test_the_same_bytes_come_out_where_every_case_is_annotated_with_all(
    cohort: Cohort, backend: Any, tmp_path: Path
) -> None:
    every = tuple(dataclasses.replace(case, annotated=cohort.class_values) for case in cohort.cases)
    hashes, keys = [], []
    for one in (cohort, dataclasses.replace(cohort, cases=every)):
        out = tmp_path / str(len(hashes))
        case = one.unlabelled[0].case_id
        (record,) = label_cases(
            cohort=one,
            case_ids=[case],
            support_ids=[support.case_id for support in one.labelled],
            strategy=make_strategy("transfer", OPTIONS),
            backend=backend,
            out=out,
            seed=1,
        )
        hashes.append([file_hash(out / f"{case}{one.file_ending}"), file_hash(out / "confidence" / f"{case}.nii.gz")])
        keys.append(record["input_key"])
    assert hashes[0] == hashes[1]
    assert keys[0] != keys[1]


def test_volumes_that_are_to_be_expected_come_from_the_annotated_cases(partly: Cohort, tmp_path: Path) -> None:
    case = partly.labelled[0]
    write_label(tmp_path / case.label, np.zeros(case.geometry.shape_zyx, np.uint8), case.geometry)
    alone = dataclasses.replace(partly, root=tmp_path, cases=(case,))
    signs = human_signs(alone)
    assert signs.empty_share == {partly.class_values[0]: 1.0}
