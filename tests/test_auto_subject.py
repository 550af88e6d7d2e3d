"""Strategy auto in single pictures: the subject stands in for a transfer that went astray, and only then."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.auto.strategy import Auto, AutoOptions
from nnunet_sam2.labelling.strategies.auto.subject import subject_dice, subject_member, transfer_went_astray
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.volumes import Volume

SHAPE = (1, 60, 50)


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=64, threads=1)


def _picture(
    backend: MetaSam2Backend, case_id: str, centre_yx: tuple[int, int], *, core: bool = False, seed: int = 0
) -> Support:
    """A bright disc on black; its label is the disc, or a core of it that looks like the rest."""
    _, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    distance = np.hypot(y - centre_yx[0], x - centre_yx[1])
    image = 0.7 * (distance < 14) + np.random.default_rng(seed).normal(0, 0.02, SHAPE)
    geometry = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.0, 1.0, 1.0))
    frames = Frames.from_volume(Volume(array_czyx=image[None].astype(np.float32), geometry=geometry), size=64)
    return Support(
        case_id=case_id,
        frames=frames,
        embeddings=backend.embed(frames),
        label_zyx=(distance < (6 if core else 14)).astype(np.uint8),
        geometry=geometry,
    )


def test_the_subject_is_outlined_on_the_pictures_own_grid(backend: MetaSam2Backend) -> None:
    picture = _picture(backend, "a", (20, 30))
    assert subject_member(picture.as_query()).prob_kzyx.shape == (1, *SHAPE)
    assert subject_dice([picture], 1)["a"] > 0.9


def test_a_transfer_that_contradicts_the_subject_more_than_any_human_label_did_went_astray() -> None:
    labelled = {"a": 0.96, "b": 0.91, "query": 0.2}
    assert transfer_went_astray(0.5, labelled, without={"query"})
    assert not transfer_went_astray(0.88, labelled, without={"query"})
    assert not transfer_went_astray(0.5, {"query": 0.96}, without={"query"})
    assert not transfer_went_astray(0.1, {"a": 0.3, "b": 0.4}, without={"query"})


class _Astray(Auto):
    """Auto whose transfer puts every label into the same corner."""

    def _looks(self, query: Query, *args: object) -> Iterator[Member]:
        prob_kzyx = np.zeros((1, *SHAPE), np.float32)
        prob_kzyx[..., :20, :20] = 1.0
        yield Member(name="corner", prob_kzyx=prob_kzyx, background_zyx=1.0 - prob_kzyx[0])


@pytest.mark.parametrize(("setting", "saved"), [("checked", True), ("off", False)])
def test_a_picture_whose_transfer_went_astray_takes_its_subject_for_the_label(
    backend: MetaSam2Backend, setting: str, saved: bool
) -> None:
    support, query = _picture(backend, "a", (16, 16)), _picture(backend, "b", (44, 34), seed=1)
    strategy = _Astray(AutoOptions(subject=setting))
    strategy.prepare([support], (1,), backend)
    members = list(strategy.members(query.as_query(), [support], (1,), backend, np.random.default_rng(0)))
    dice = dice_by_class(fuse(iter(members), (1,)).label_zyx, query.label_zyx, (1,))[1] or 0.0
    assert (members[0].name == "auto:subject") is saved
    assert (dice > 0.9) is saved


def test_where_labels_are_not_the_subject_it_has_no_say(backend: MetaSam2Backend) -> None:
    supports = [_picture(backend, name, (20 + n, 24), core=True, seed=n) for n, name in enumerate("ab")]
    query = _picture(backend, "c", (44, 34), core=True, seed=5)
    strategy = make_strategy("auto")
    strategy.prepare(supports, (1,), backend)  # type: ignore[attr-defined]
    names = [m.name for m in strategy.members(query.as_query(), supports, (1,), backend, np.random.default_rng(0))]
    assert "auto:subject" not in names
