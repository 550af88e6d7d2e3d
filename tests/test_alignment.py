"""Strategy auto: places that mean anatomy although scans show different parts of the body."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.explain.members import explain_member
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member, PseudoLabel
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.auto.alignment import Alignment, Part
from nnunet_sam2.labelling.strategies.auto.bending import Aligned
from nnunet_sam2.labelling.strategies.auto.even_odds import at_even_odds, best_threshold
from nnunet_sam2.labelling.strategies.auto.field_of_view import place_along_axis, shared_axis
from nnunet_sam2.labelling.strategies.auto.groups import expected_box, read_in, thin_groups
from nnunet_sam2.labelling.strategies.auto.scan import Scan, bodies_correspond, body_box
from nnunet_sam2.labelling.strategies.auto.zoom import Box
from nnunet_sam2.labelling.strategies.transfer.memory import Place, SupportMemory, slice_descriptors, slice_features
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.volumes import Volume

SPACING_MM = 5.0
ORGAN, VESSEL = 1, 2


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("embedded", device="cpu", image_size=128, threads=1)


def _torso(
    backend: MetaSam2Backend, case_id: str, *, slices: int, first_mm: float, left: int = 20, table: bool = False
) -> Support:
    """A body seen from ``first_mm`` of its length on; an organ at 100 to 160 mm, a vessel beside it."""
    rng = np.random.default_rng(len(case_id))
    z, y, x = np.mgrid[:slices, :96, :96].astype(float)
    mm = first_mm + (z + 0.5) * SPACING_MM
    body = ((y - 48) / 34) ** 2 + ((x - left - 30) / 28) ** 2 < 1
    organ = ((y - 44) / 12) ** 2 + ((x - left - 20) / 11) ** 2 + ((mm - 130) / 30) ** 2 < 1
    vessel = ((y - 58) ** 2 + (x - left - 38) ** 2 < 9) & (abs(mm - 130) < 40)
    # Lungs above, hips below and a spine that comes and goes tell one height from another.
    spine = ((y - 66) ** 2 + (x - left - 30) ** 2 < 30 + 25 * np.sin(mm / 23.0)) & body
    high, low = np.clip((mm - 170) / 50, 0, 1), np.clip((70 - mm) / 50, 0, 1)
    lung = ((y - 44) / 22) ** 2 + ((abs(x - left - 30) - 13) / 10) ** 2 < high
    hip = ((y - 54) / 12) ** 2 + ((abs(x - left - 30) - 18) / 7) ** 2 < low
    image = 0.35 * body + 0.25 * organ + 0.4 * vessel + 0.5 * spine - 0.3 * lung + 0.6 * hip
    if table:
        image = image + 0.6 * (abs(y - 91) < 1.5)
    image = np.clip(image, 0, None) + rng.normal(0, 0.01, image.shape).clip(0)
    geometry = Geometry(shape_zyx=image.shape, spacing_xyz_mm=(3.0, 3.0, SPACING_MM))
    frames = Frames.from_volume(Volume(array_czyx=image[None].astype(np.float32), geometry=geometry), size=128)
    return Support(
        case_id=case_id,
        frames=frames,
        embeddings=backend.embed(frames),
        label_zyx=np.where(vessel, VESSEL, np.where(organ, ORGAN, 0)).astype(np.uint8),
        geometry=geometry,
    )


@pytest.fixture(scope="module")
def abdomens(backend: MetaSam2Backend) -> list[Support]:
    return [
        _torso(backend, "a", slices=32, first_mm=55.0),
        _torso(backend, "bb", slices=32, first_mm=65.0, left=12),
    ]


@pytest.fixture(scope="module")
def long_scan(backend: MetaSam2Backend) -> Support:
    return _torso(backend, "long", slices=70, first_mm=-60.0, left=25, table=True)


def _scan(support: Support) -> Scan:
    return Scan.of(support.frames, support.embeddings)


def test_table_and_air_are_taken_off_the_body(long_scan: Support) -> None:
    box = body_box(long_scan.frames)

    assert box.start_zyx == pytest.approx((0, 14, 27), abs=4)
    assert box.stop_zyx == pytest.approx((70, 82, 83), abs=4)


def test_a_body_that_fills_the_slices_is_not_cut() -> None:
    image = np.random.default_rng(0).uniform(0.5, 1.0, (3, 64, 64)).astype(np.float32)
    geometry = Geometry(shape_zyx=image.shape)
    frames = Frames.from_volume(Volume(array_czyx=image[None], geometry=geometry), size=64)

    assert body_box(frames) == Box(start_zyx=(0, 0, 0), stop_zyx=(3, 64, 64))


def test_bodies_are_compared_only_where_every_scan_shows_its_outline(abdomens: list[Support]) -> None:
    scans = [_scan(support) for support in abdomens]
    filled = Scan(
        body=Box(start_zyx=(0, 0, 0), stop_zyx=(32, 96, 96)),
        fills=True,
        spacing_mm=SPACING_MM,
        descriptions_nf=scans[0].descriptions_nf,
    )

    assert bodies_correspond(scans, abdomens, (ORGAN, VESSEL))
    assert not bodies_correspond([scans[0], filled], abdomens, (ORGAN, VESSEL))


def test_a_long_scan_is_brought_to_the_part_that_the_supports_show(abdomens: list[Support], long_scan: Support) -> None:
    offsets = shared_axis(abdomens, (ORGAN, VESSEL))
    shift = place_along_axis(_scan(long_scan), [_scan(support) for support in abdomens], offsets)

    # The long scan begins 115 and 125 mm before the others, whose own millimetres differ by 10.
    assert offsets[1] - offsets[0] == pytest.approx(10.0, abs=2.0)
    assert shift == pytest.approx(offsets[0] - 115.0, abs=2 * SPACING_MM)


def test_scans_of_the_same_part_are_left_as_they_are(backend: MetaSam2Backend, abdomens: list[Support]) -> None:
    same = _torso(backend, "same", slices=32, first_mm=55.0, left=16)
    supports = abdomens[:1]

    assert place_along_axis(_scan(same), [_scan(s) for s in supports], shared_axis(supports, (ORGAN, VESSEL))) is None


def test_slices_beyond_what_the_supports_show_are_background(
    backend: MetaSam2Backend, abdomens: list[Support], long_scan: Support
) -> None:
    values = (ORGAN, VESSEL)

    def labelled(alignment: str) -> PseudoLabel:
        strategy = make_strategy("auto", {"alignment": alignment, "check_slices": 0})
        members = strategy.members(long_scan.as_query(), abdomens, values, backend, np.random.default_rng(0))
        return fuse(members, values)

    aligned, as_it_is = labelled("on"), labelled("off")
    dice = {
        name: dice_by_class(p.label_zyx, long_scan.label_zyx, values)
        for name, p in (("on", aligned), ("off", as_it_is))
    }

    assert not aligned.label_zyx[:15].any()
    assert not aligned.label_zyx[60:].any()
    assert min(dice["on"][v] or 0.0 for v in values) > 0.95
    assert min(dice["off"][v] or 0.0 for v in values) < 0.9, "places that mean anatomy must matter here"
    record = aligned.record["members"][0]
    assert record["ground"]["shift_mm"] is not None
    said = " ".join(explain_member("auto", record, str(VESSEL)).made)
    assert "another part of the body" in said
    assert "too thin to be seen with all others" in said
    # Boxes count from the whole scan's first voxel, which shows nothing that is labelled.
    assert record["box_zyx"][0][0] > 15
    assert record["groups"][0]["box_zyx"][0][0] > 15


def test_labels_that_fill_the_slices_are_bent_and_looked_at_in_groups_all_the_same(
    backend: MetaSam2Backend, abdomens: list[Support]
) -> None:
    body, values = 3, (ORGAN, VESSEL, 3)

    def filled(support: Support) -> Support:
        inside_zyx = np.stack([support.frames.plane(n) > 0.2 for n in range(len(support.frames))])
        label_zyx = np.where((support.label_zyx == 0) & inside_zyx, body, support.label_zyx).astype(np.uint8)
        return replace(support, label_zyx=label_zyx)

    query = filled(_torso(backend, "query", slices=32, first_mm=60.0, left=16))
    strategy = make_strategy("auto", {"check_slices": 0})
    supports = [filled(support) for support in abdomens]
    members = list(strategy.members(query.as_query(), supports, values, backend, np.random.default_rng(0)))

    assert not any("box_zyx" in member.record for member in members)
    assert [group["classes"] for group in members[0].record["groups"]] == [[VESSEL]]
    dice = dice_by_class(fuse(members, values).label_zyx, query.label_zyx, values)
    assert min(dice[value] or 0.0 for value in values) > 0.8


def test_cells_of_equal_scans_lie_where_they_are(abdomens: list[Support]) -> None:
    support = abdomens[0]
    cells = Alignment().cells(Part(), Part(), slice_axis=0, slices=32, grid=8)

    for n in (0, 31):
        assert torch.allclose(cells[n], slice_features(support.embeddings, n)[:, -3:], atol=1e-6)


def test_cells_of_parts_lie_in_proportion_along_every_axis() -> None:
    alignment = Alignment(scale_zyx=(0.5, 1.0, 1.0), offset_zyx=(0.25, 0.0, 0.1))
    part = Part.of(Box(start_zyx=(2, 0, 0), stop_zyx=(4, 10, 10)), (8, 10, 10))
    within = Part.of(Box(start_zyx=(0, 0, 5), stop_zyx=(4, 10, 10)), (4, 10, 10))

    for axis in range(3):
        cells = alignment.cells(part, within, slice_axis=axis, slices=2, grid=2)
        # The first cell's centre: depth 0.25 + 0.25 * 0.25, row 0.25, column 0.25, sent and held against the part.
        sent = {0: 0.5 * 0.3125 + 0.25, 1: 0.25, 2: (0.35 - 0.5) / 0.5}
        rows_and_columns = [a for a in range(3) if a != axis]
        expected = [sent[a] for a in (*rows_and_columns, axis)]
        assert cells[0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_support_is_bent_onto_what_was_found(abdomens: list[Support]) -> None:
    support, query = abdomens
    found = PseudoLabel(
        label_zyx=query.label_zyx,
        confidence_zyx=np.ones(query.label_zyx.shape, np.float32),
        prob_czyx=np.stack([query.label_zyx == v for v in (0, ORGAN, VESSEL)]).astype(np.float32),
    )
    start = Aligned(supports=[support], alignments=[Alignment()], query=query.as_query())
    bent = start.bent(found, (ORGAN, VESSEL))

    def apart(alignment: Alignment) -> float:
        shape = np.array(support.label_zyx.shape)
        places = torch.from_numpy((np.argwhere(support.label_zyx == ORGAN) + 0.5) / shape).float()
        truth = (np.argwhere(query.label_zyx == ORGAN) + 0.5) / shape
        return float(np.abs(alignment.send(places).numpy().mean(axis=0) - truth.mean(axis=0)).max())

    assert apart(Alignment()) > 0.05
    assert apart(bent.alignments[0]) < 0.4 * apart(Alignment())
    again = start.bent(found, (ORGAN, VESSEL)).alignments[0].displacement_3zyx
    assert again is not None
    assert torch.equal(again, bent.alignments[0].displacement_3zyx)  # type: ignore[arg-type]


def test_placed_memory_keeps_features_and_takes_other_places(abdomens: list[Support]) -> None:
    memory = SupportMemory(abdomens, (ORGAN, VESSEL))
    cells = Alignment(offset_zyx=(0.5, 0.0, 0.0)).cells(Part(), Part(), slice_axis=0, slices=32, grid=8)
    placed = memory.placed([cells, cells], 4.0)
    before, labels = memory.rows([0, 40])
    after, same_labels = placed.rows([0, 40])

    assert torch.equal(before[:, :-3], after[:, :-3])
    assert torch.equal(labels, same_labels)
    assert torch.allclose(after[:, -1], before[:, -1] + 0.5)
    assert torch.equal(memory.rows([0, 40])[0], before)
    # Slices are chosen by where they lie now: nothing lies in the query's first half.
    descriptor = slice_descriptors(abdomens[0].embeddings)[0]
    assert min(placed.choose(descriptor, 0.5, 64 * 4)) in range(64)
    query = normalize(torch.ones(1, before.shape[1]), dim=1)
    assert placed.search_among([0], query, Place(position_weight=1.0, slice_weight=1.0), 3)[0].shape == (1, 3)


def test_thin_neighbours_make_a_group_and_thick_classes_do_not(abdomens: list[Support]) -> None:
    assert thin_groups(abdomens, (ORGAN, VESSEL)) == [(VESSEL,)]


def test_a_class_is_expected_where_its_supports_are_sent(abdomens: list[Support]) -> None:
    support = abdomens[0]
    nothing = np.zeros(support.label_zyx.shape, bool)
    box = expected_box([VESSEL], [support], [Alignment()], nothing, margin=0.0)

    assert box is not None
    inside = support.label_zyx[box.part] == VESSEL
    assert inside.sum() > 0.85 * (support.label_zyx == VESSEL).sum()
    assert expected_box([9], [support], [Alignment()], nothing, margin=0.0) is None


def test_a_nearer_look_changes_its_classes_and_keeps_the_others_in_proportion() -> None:
    base = Member(
        name="all",
        prob_kzyx=np.array([0.4, 0.2, 0.1], np.float32).reshape(3, 1, 1, 1),
        background_zyx=np.full((1, 1, 1), 0.3, np.float32),
    )
    nearer = Member(name="near", prob_kzyx=np.array([0.0, 0.8, 0.0], np.float32).reshape(3, 1, 1, 1))
    found = read_in(base, nearer, Box(start_zyx=(0, 0, 0), stop_zyx=(1, 1, 1)), [1], 0.5)

    assert found.prob_kzyx.ravel() == pytest.approx([0.25, 0.5, 0.0625], abs=1e-4)
    assert found.background_zyx is not None
    assert found.background_zyx.item() == pytest.approx(0.1875, abs=1e-4)


def test_a_rough_class_is_drawn_where_the_expected_dice_is_highest() -> None:
    prob = np.zeros((1, 40, 40), np.float32)
    prob[0, 10:20, 10:20] = 0.3
    prob[0, 12:18, 12:18] = 0.42

    def dice(threshold: float) -> float:
        taken = prob >= threshold
        return float(2 * prob[taken].sum() / (taken.sum() + prob.sum()))

    threshold = best_threshold(prob)
    assert dice(threshold) == pytest.approx(max(dice(t) for t in np.linspace(0.02, 0.5, 200)), abs=1e-6)
    # A sure class with a faint surrounding is not drawn into it.
    sure = np.zeros((1, 40, 40), np.float32)
    sure[0, 5:35, 5:35] = 0.1
    sure[0, 10:20, 10:20] = 0.97
    assert best_threshold(sure) > 0.1
    member = Member(name="m", prob_kzyx=np.stack([prob[None][0], prob[None][0] * 0.2]), background_zyx=1 - 1.2 * prob)
    assert not fuse([member], (1, 2)).label_zyx.any()
    drawn = fuse(at_even_odds([member], (1, 2), rough=[1]), (1, 2)).label_zyx
    assert (drawn == 1).sum() >= 36
    assert not (drawn == 2).any()
