"""What `insert` refuses by name, and what odd volumes it can serve."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.insert.plans import MODES
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.volumes import Volume

SIZE = 64


@pytest.fixture(scope="module")
def backend():
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


def case(backend, name, shape):
    rng = np.random.default_rng(len(name))
    volume = Volume(array_czyx=rng.normal(size=(1, *shape)).astype(np.float32), geometry=Geometry(shape_zyx=shape))
    frames = Frames.from_volume(volume, size=SIZE, slice_axis=0)
    return {"case_id": name, "frames": frames, "embeddings": backend.embed(frames), "geometry": volume.geometry}


def query(backend, shape, name="query"):
    return Query(**case(backend, name, shape))


def support(backend, shape, *, slices=None, classes=(1,), name="support"):
    label = np.zeros(shape, np.uint8)
    for value in classes:
        for m in range(shape[0]) if slices is None else slices:
            label[m, 4 * value : 4 * value + 6, 4:14] = value
    return Support(**case(backend, name, shape), label_zyx=label)


def run(backend, asked, supports, classes=(1,), **options):
    strategy = make_strategy("insert", options)
    return list(strategy.members(asked, supports, classes, backend, np.random.default_rng(0)))


@pytest.mark.parametrize("mode", ["la_to_un", "un_to_la", "chunk"])
def test_one_slice_volumes_are_labelled(backend, mode):
    (member,) = run(backend, query(backend, (1, 20, 24)), [support(backend, (1, 22, 20))], mode=mode)
    assert member.prob_kzyx.shape == (1, 1, 20, 24)
    assert member.prob_kzyx.any()


def test_one_slice_volumes_are_refused_by_switch_which_has_no_half_to_exchange(backend):
    with pytest.raises(InputError, match=r"class 1 is on a single slice of each support \(support\).*mode=la_to_un"):
        run(backend, query(backend, (1, 20, 24)), [support(backend, (1, 20, 24))], mode="switch")


def test_more_insertions_than_slices_are_refused_by_name(backend):
    asked, labelled = query(backend, (3, 20, 24)), support(backend, (4, 20, 24))
    with pytest.raises(InputError, match=r"case query has 3 slices.*insertions=5.*--set insertions=3"):
        run(backend, asked, [labelled], preset="paper")
    with pytest.raises(InputError, match=r"support support and case query.*un_to_la at 3 places.*insertions=5"):
        run(backend, asked, [labelled], mode="un_to_la", insertions=5)
    assert len(run(backend, asked, [labelled], insertions=3)) == 3


def test_without_a_number_there_are_as_many_insertions_as_slices(backend):
    assert len(run(backend, query(backend, (2, 20, 24)), [support(backend, (4, 20, 24))])) == 2


def test_a_class_that_is_missing_in_every_support_is_refused_where_it_is_the_only_one(backend):
    asked, labelled = query(backend, (2, 20, 24)), support(backend, (2, 20, 24))
    with pytest.raises(InputError, match=r"no slice of the supports \(support\) shows a class"):
        run(backend, asked, [labelled], classes=(2,))
    (member,) = run(backend, asked, [labelled], classes=(1, 2), insertions=1)
    assert member.record["classes"]["2"] == {"absent_in_all_supports": True}
    assert member.prob_kzyx[0].any()
    assert not member.prob_kzyx[1].any()


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_support_that_is_larger_than_the_query_is_used(backend, mode):
    large = support(backend, (9, 40, 30), slices=range(2, 8))
    for member in run(backend, query(backend, (2, 20, 24)), [large], mode=mode):
        assert member.prob_kzyx.shape == (1, 2, 20, 24)
        assert all(slice_hw.any() for slice_hw in member.prob_kzyx[0])


def test_a_class_on_few_slices_takes_part_in_every_member(backend):
    labelled = support(backend, (5, 20, 24))
    labelled.label_zyx[2, 16:19, 4:14] = 3
    members = run(backend, query(backend, (3, 20, 24)), [labelled], classes=(1, 3), mode="un_to_la")
    assert len(members) == 3
    assert all(member.prob_kzyx[1].any() for member in members)
    assert len({str(m.record["classes"]["1"]["place"]) for m in members}) == 3
    assert len({str(m.record["classes"]["3"]["place"]) for m in members}) == 1
