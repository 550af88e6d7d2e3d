"""Strategy auto: close-ups of the part that the labels fill."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.explain.members import explain_member
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.auto import strategy as auto_module
from nnunet_sam2.labelling.strategies.auto.strategy import ONE_VIEW, Auto, AutoOptions
from nnunet_sam2.labelling.strategies.auto.views import Views
from nnunet_sam2.labelling.strategies.auto.zoom import Box, box_around, close_up, labelled_part, put_back
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.volumes import Volume

SIZE = 64
SHAPE = (5, 96, 96)
RING = 1


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


def _case(backend: MetaSam2Backend, case_id: str, centre: tuple[int, int], *, shown: bool = True) -> Support:
    """A thick-sliced volume with a small ring: four voxels thick, where a cell of the embedding covers 24."""
    rng = np.random.default_rng(centre[0])
    _, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    radius = np.hypot(y - centre[0], x - centre[1])
    ring = (radius >= 6) & (radius < 10) if shown else np.zeros(SHAPE, bool)
    image = ring * 1.0 + 0.5 * (radius < 6) + rng.normal(0, 0.03, SHAPE)
    geometry = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.0, 1.0, 6.0))
    frames = Frames.from_volume(Volume(array_czyx=image[None].astype(np.float32), geometry=geometry), size=SIZE)
    return Support(
        case_id=case_id,
        frames=frames,
        embeddings=backend.embed(frames),
        label_zyx=ring.astype(np.uint8),
        geometry=geometry,
    )


@pytest.fixture(scope="module")
def cases(backend: MetaSam2Backend) -> list[Support]:
    return [_case(backend, f"case_{n}", centre) for n, centre in enumerate([(40, 44), (52, 40), (44, 56)])]


def _members(strategy: Auto, query: Support, supports: list[Support], backend: MetaSam2Backend) -> list[Member]:
    return list(strategy.members(query.as_query(), supports, (RING,), backend, np.random.default_rng(0)))


def test_a_box_holds_the_labels_and_a_margin_and_stays_within_the_volume() -> None:
    mask = np.zeros((4, 40, 40), bool)
    mask[1:3, 10:30, 30:39] = True
    assert box_around(mask, margin=0.1) == Box(start_zyx=(0, 8, 29), stop_zyx=(4, 32, 40))
    assert box_around(np.zeros_like(mask), margin=0.1) is None
    assert Box(start_zyx=(0, 10, 0), stop_zyx=(4, 30, 20)).share_of_slice((4, 40, 40), 0) == 0.25


def test_crumbs_do_not_open_the_box_but_second_pieces_do() -> None:
    label = np.zeros((3, 40, 40), np.uint8)
    label[1, 5:15, 5:15] = label[1, 30:33, 30:33] = 1
    label[1, 39, 39] = 1
    prob = np.zeros((3, *label.shape), np.float32)
    prob[2, 1, 20:22, 20:22] = 0.3
    kept = labelled_part(label, prob, (1, 2))
    assert kept[1, 31, 31]
    assert not kept[1, 39, 39]
    assert not kept[1, 20, 20]
    # A class that all supports show and that wins nowhere is looked for where it is least unlikely.
    assert labelled_part(label, prob, (1, 2), expected={2})[1, 20, 20]


def test_a_close_up_is_the_same_place_in_space_with_the_same_intensities(
    cases: list[Support], backend: MetaSam2Backend
) -> None:
    box = Box(start_zyx=(1, 30, 20), stop_zyx=(4, 60, 70))
    part = close_up(cases[0], box, backend)
    assert part.geometry.origin_xyz_mm == (20.0, 30.0, 6.0)
    assert part.frames.windows == cases[0].frames.windows
    assert np.array_equal(part.label_zyx, cases[0].label_zyx[1:4, 30:60, 20:70])
    assert len(part.embeddings) == 3
    assert part.embeddings.key != cases[0].embeddings.key
    member = Member(name="m", prob_kzyx=np.full((1, 3, 30, 50), 0.75, np.float32))
    whole = put_back(member, box, cases[0].as_query())
    assert whole.background_zyx is not None
    assert whole.prob_kzyx.sum() == pytest.approx(0.75 * 3 * 30 * 50)
    np.testing.assert_allclose(whole.prob_kzyx[0] + whole.background_zyx, 1.0)


def test_what_is_small_in_the_slice_is_drawn_better_from_near(cases: list[Support], backend: MetaSam2Backend) -> None:
    dice = {}
    for zoom in ("on", "off"):
        members = _members(Auto(AutoOptions(zoom=zoom, check_slices=0)), cases[0], cases[1:], backend)
        assert len(members) == (len(ONE_VIEW) if zoom == "on" else 1)
        label = fuse(members, (RING,)).label_zyx
        dice[zoom] = dice_by_class(label, cases[0].label_zyx, (RING,))[RING] or 0.0
        said = " ".join(explain_member("auto", {"name": members[0].name, **members[0].record}, str(RING)).made)
        assert ("seen from near: voxels z 0-4" in said) == (zoom == "on")
    assert dice["on"] > dice["off"] + 0.1
    assert dice["on"] > 0.7


def test_supports_that_show_no_class_give_no_close_up_and_without_any_whole_slices_are_taken(
    cases: list[Support], backend: MetaSam2Backend
) -> None:
    empty = _case(backend, "empty", (48, 48), shown=False)
    strategy = Auto(AutoOptions(check_slices=0))
    near = _members(strategy, cases[0], [cases[1], empty], backend)
    assert {tuple(m.record["supports"]) for m in near} == {("case_1",)}
    (whole,) = _members(strategy, cases[0], [empty], backend)
    assert "box_zyx" not in whole.record
    assert not (whole.prob_kzyx > 0.5).any()


def test_labels_that_fill_the_slices_are_not_looked_at_twice(cases: list[Support], backend: MetaSam2Backend) -> None:
    filled = [dataclasses.replace(case, label_zyx=np.ones_like(case.label_zyx)) for case in cases]
    (member,) = _members(Auto(AutoOptions(check_slices=0)), filled[0], filled[1:], backend)
    assert "box_zyx" not in member.record


def test_close_ups_that_do_worse_on_labelled_cases_are_left_out(
    cases: list[Support], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = Auto(AutoOptions(check_slices=0))
    for whole, near, looks in ((0.9, 0.8, 1), (0.8, 0.9, len(ONE_VIEW)), (None, None, len(ONE_VIEW))):
        values = {True: whole, False: near}
        monkeypatch.setattr(Views, "checked_dice", lambda views, *_, v=values, **__: v[views is strategy._whole])
        members = _members(strategy, cases[0], cases[1:], backend)
        assert len(members) == looks
        assert ("box_zyx" in members[0].record) == (looks > 1)


@pytest.mark.parametrize("decoder", ["checked", "off"])
def test_what_was_chosen_has_a_checked_dice_without_the_querys_own(
    cases: list[Support], backend: MetaSam2Backend, decoder: str
) -> None:
    boxes = [box_around(case.label_zyx > 0, margin=0.25) for case in cases]
    near = [close_up(case, box, backend) for case, box in zip(cases, boxes, strict=True) if box is not None]
    strategy = Transfer(TransferOptions(check_slices=9, decoder=decoder))
    assert strategy.checked_dice((RING,)) == {RING: None}
    strategy.prepare(near, (RING,), backend)
    every, without = strategy.checked_dice((RING,))[RING], strategy.checked_dice((RING,), without={"case_0"})[RING]
    assert every is not None
    assert without is not None
    assert 0.5 < every <= 1
    assert every != without


def test_close_ups_that_are_little_nearer_share_the_vote_with_the_first_look(
    cases: list[Support], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all("box_zyx" in m.record for m in _members(Auto(AutoOptions(check_slices=0)), cases[0], cases[1:], backend))
    monkeypatch.setattr(auto_module, "LITTLE_NEARER", 0.01)
    *near, first = _members(Auto(AutoOptions(check_slices=0)), cases[0], cases[1:], backend)
    assert len(near) == len(ONE_VIEW)
    assert "box_zyx" not in first.record
    assert first.weight_k is not None
    assert first.weight_k.tolist() == [float(len(near))]
