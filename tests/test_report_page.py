"""What the report says and how it is written, without a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from report_data import block_of, make_account, make_case, make_pictures, make_round, pictures_of

from nnunet_sam2.cohort.cohort import Role
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.report.account import RoundAccount
from nnunet_sam2.report.charts import Series, line_chart
from nnunet_sam2.report.page import Pictures, duration, render
from nnunet_sam2.report.pictures import CasePictures, encode, unpack
from nnunet_sam2.report.verdict import Level, judge_run
from nnunet_sam2.report.view import choose_view, upright
from nnunet_sam2.report.words import Said
from nnunet_sam2.report.write import LIMIT_BYTES, block_budget

GOOD = (make_case("case_a", 0.9, 0.8), make_case("case_b", 0.85, 0.75))
INJECTED = '</script><script>window.hit=1</script><img src=x onerror="window.hit=1">'


def test_a_run_that_converged_and_gained_is_good() -> None:
    verdict = judge_run(make_account(GOOD))
    assert verdict.level is Level.GOOD
    assert verdict.headline == "Converged after 2 rounds"
    assert "0.050 Dice over labelled-only" in verdict.answer


def test_a_final_training_before_a_later_round_is_no_round() -> None:
    rounds = (make_round(0), make_round(1), make_round(2), make_round(3, final=True), make_round(4, change=0.001))
    account = make_account(GOOD, rounds=rounds)
    assert judge_run(account).headline == "Converged after 3 rounds"
    assert "of 3 rounds" in render(account, Pictures())


def test_a_run_that_has_not_been_validated_yet_is_not_said_to_hold_nothing_out() -> None:
    running = {"rounds": (), "best_round": None, "stop_reason": None}
    assert "no round has been validated" in render(make_account(GOOD, **running), Pictures())
    assert "no human label was held out" in render(make_account(GOOD, **running, validation_cases=0), Pictures())


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        (
            {"stop_reason": "round limit", "rounds": (make_round(0), make_round(1), make_round(2, change=0.2))},
            "look",
            "still moved",
        ),
        ({"stop_reason": "validation Dice fell"}, "bad", "Validation fell"),
        (
            {"rounds": (make_round(1, dice=None), make_round(2, dice=None, change=0.001)), "validation_cases": 0},
            "look",
            "No human validation",
        ),
        ({"best_round": 0}, "look", "No gain"),
        ({"calibrated": False}, "look", "uncalibrated"),
        (
            {"cases": (make_case("case_a", 0.9, 0.4), make_case("case_b", 0.9, 0.5))},
            "look",
            "Low estimates: small_organ",
        ),
        (
            {"cases": (*GOOD, make_case("case_c", 0.1, 0.2, left_out="its estimate is below 0.3"))},
            "look",
            "1 of 3 cases left out",
        ),
        ({"stop_reason": None, "running_stage": "r02/train"}, "note", "Not finished yet, in stage r02/train"),
        ({"stop_reason": "small_organ collapsed"}, "bad", "Stopped after 2 rounds: small_organ collapsed"),
        ({"stop_reason": "nothing to label", "rounds": (make_round(0),)}, "bad", "Nothing to label"),
    ],
)
def test_what_speaks_against_a_run_is_said_at_the_top(changes: dict[str, object], level: str, said: str) -> None:
    verdict = judge_run(make_account(**{"cases": GOOD, **changes}))  # type: ignore[arg-type]
    assert verdict.level.value == level
    assert said in verdict.headline + " ".join(f"{f.title} {f.text}" for f in verdict.findings)


def test_patients_count_in_what_lower_bounds_promise_and_what_is_proven_is_said() -> None:
    findings = judge_run(make_account(GOOD, calibration_patients=3)).findings
    (found,) = (f for f in findings if f.title == "Estimated quality")
    assert "calibrated on 8 labelled cases of 3 patients" in found.text
    assert "Lower bounds hold in 75% of new patients' cases as a rule; 50% is proven." in found.text


@pytest.mark.parametrize(("human", "title"), [(52.0, "Volumes steady"), (67.5, "Volumes unlike the human labels'")])
def test_volumes_are_not_called_steady_where_they_are_unlike_the_human_labels(human: float, title: str) -> None:
    rounds = (make_round(1), make_round(2))
    findings = judge_run(make_account(GOOD, rounds=rounds, human_volumes={1: human})).findings
    found = next(finding for finding in findings if finding.title.startswith("Volumes"))
    assert found.title == title
    assert (found.level is Level.GOOD) == (human < 60)
    assert f"{52.0 / human - 1:+.0%})" in found.text


def test_volumes_that_drift_are_pointed_out_with_the_human_ones() -> None:
    rounds = (make_round(1), RoundAccount(number=2, configuration="r02", volumes={1: 30.0, 2: 10.0}))
    findings = judge_run(make_account(GOOD, rounds=rounds, human_volumes={1: 52.0})).findings
    (found,) = (f for f in findings if f.title == "Volumes drifted")
    assert "large_organ -41% to 30 mL (human labels 52 mL, -42%)" in found.text


def test_cases_to_look_at_first_are_those_left_out_and_then_the_lowest_estimates() -> None:
    account = make_account((*GOOD, make_case("case_c", 0.99, 0.95, left_out="empty"), make_case("case_d", 0.9, 0.2)))
    assert [case.case_id for case in account.look_first(3)] == ["case_c", "case_d", "case_b"]


def test_cases_that_people_have_decided_about_are_not_to_be_looked_at_but_have_their_pictures() -> None:
    settled = {"said": Said.ACCEPTED}
    low = make_case("accepted", 0.1, 0.1, **settled)
    accepted = replace(low, classes=tuple(replace(q, settled=True) for q in low.classes))
    first_class = replace(low, case_id="in_part", said=Said.PARTLY, classes=(accepted.classes[0], low.classes[1]))
    absent = replace(low, case_id="absent", classes=(accepted.classes[0], replace(low.classes[1], voxels=0)))
    out = make_case("out", 0.1, 0.1, said=Said.TAKEN_OUT, left_out="a person took it out")
    cases = (*GOOD, accepted, first_class, absent, out, make_case("empty", None, None, left_out="empty"))
    account = make_account(cases)
    assert [case.case_id for case in account.look_first(9)] == ["empty", "in_part", "case_b", "case_a"]
    assert {case.case_id for case in account.by_urgency()[4:]} == {"accepted", "absent", "out"}


def test_the_reason_to_look_at_a_case_is_of_a_class_that_nobody_has_settled() -> None:
    case = make_case("case_c", 0.1, 0.4, said=Said.PARTLY)
    case = replace(case, classes=(replace(case.classes[0], settled=True), case.classes[1]))
    assert case.worst == case.classes[1]
    assert "small_organ: estimated Dice 0.40" in render(make_account((case,)), Pictures())


def test_the_head_says_how_many_cases_people_drew_accepted_and_took_out() -> None:
    said = [Said.TAKEN_OUT, Said.ACCEPTED, Said.DRAWN, Said.PARTLY, Said.ACCEPTED]
    cases = tuple(make_case(f"case_{n}", 0.9, 0.9, said=one) for n, one in enumerate(said))
    page = html.unescape(render(make_account((*GOOD, *cases), waiting=2), Pictures()))
    head = page[page.index('<dl class="tiles">') :].split("</dl>")[0]
    assert "Cases with people" in head
    assert "5 of 7" in head
    told = "1 drawn by hand, 2 accepted, 1 accepted in part, 1 taken out, word on 2 waits for the next round"
    assert told in head
    assert "Cases with people" not in render(make_account(GOOD), Pictures())


def test_where_people_have_decided_about_every_case_it_is_not_said_that_none_has_been_labelled() -> None:
    page = render(make_account((make_case("out", 0.1, 0.1, said=Said.TAKEN_OUT),)), Pictures())
    assert "People have decided about every case." in page
    assert "No case has been labelled yet" not in page


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_whatever_a_case_is_called_stays_text() -> None:
    account = make_account((make_case(INJECTED, 0.9, 0.2, left_out=INJECTED), *GOOD), dataset=INJECTED)
    page = render(account, Pictures(problems={INJECTED: INJECTED}))
    assert "<script>window.hit" not in page
    seen = _Seen()
    seen.feed(page)
    assert not [tag for tag, attrs in seen.tags if tag == "img" or "onerror" in attrs]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data
    assert json.loads(data[1])["cases"][0]["id"] == INJECTED


def test_the_page_names_no_address_to_load_from_and_its_policy_allows_its_own_scripts_alone() -> None:
    page = render(make_account(GOOD), pictures_of("case_a"))
    seen = _Seen()
    seen.feed(page)
    assert not [value for _, attrs in seen.tags for name, value in attrs.items() if name in ("src", "srcset")]
    assert {attrs["href"] for tag, attrs in seen.tags if "href" in attrs} == {"#cases", "data:,"}
    policy = next(
        attrs["content"] or "" for tag, attrs in seen.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for body in re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.S):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_page_holds_reasons_options_and_hashes() -> None:
    page = html.unescape(render(make_account((*GOOD, make_case("case_c", 0.1, 0.1, left_out="too low"))), Pictures()))
    for text in ("too low", "Converged after 2 rounds", "nnU-Net training", "99 %", "abababab", "1 h 31 min", "seed"):
        assert text in page


def test_a_run_without_estimates_labels_or_rounds_has_a_page() -> None:
    page = render(make_account((), rounds=(), best_round=None, stop_reason=None, calibrated=None, costs=()), Pictures())
    assert "Not finished yet" in page
    assert "No case has been labelled yet" in page


def test_pictures_come_back_as_they_were_but_for_the_images_loss() -> None:
    case = make_pictures(human=True, story="how it was made")
    header, parts = unpack(encode(case, 1_000_000))
    assert header["planes"] == ["first", "last", "human", "confidence"]
    assert header["letters"] == ["R", "L", "A", "P"]
    rows, cols = header["size"]
    maps = np.frombuffer(parts["maps"], np.uint8).reshape(4, len(header["slices"]), rows, cols)
    both = (case.maps["first"] > 0) | (case.maps["last"] > 0)
    shown = maps[0] > 0
    assert shown.sum() == (case.maps["first"] > 0).sum()
    assert (maps[:2] > 0).any(axis=0).sum() == both.sum()
    assert set(np.unique(maps[3])) == set(range(8))
    assert parts["story"].decode() == "how it was made"
    volume = np.frombuffer(parts["volume"], np.uint8).reshape(3, *header["surface"]["shape"])
    assert (volume[0] == volume[2]).all()
    assert set(np.unique(volume)) == {0, 1, 2}


@pytest.mark.parametrize("budget", [24_000, 80_000])
def test_pictures_are_thinned_and_shrunk_until_they_fit_and_say_so(budget: int) -> None:
    case = make_pictures((60, 200, 220), noise=60.0)
    block = encode(case, budget)
    header, _ = unpack(block)
    assert len(block) <= budget
    assert header["step"] > 1
    assert header["shrunk"]
    assert header["slices"] == sorted(set(header["slices"]))


def test_pictures_of_many_cases_stay_within_the_files_limit() -> None:
    for cases in (1, 100, 1000):
        block = block_budget(cases, cases)
        assert cases * (block * 4 / 3 + 300) + 1_000_000 + 700 * cases < LIMIT_BYTES


def test_a_case_without_any_label_is_shown_whole() -> None:
    shape = (4, 16, 20)
    case = CasePictures(
        image_czyx=np.random.default_rng(0).random((1, *shape), np.float32),
        maps={"last": np.zeros(shape, np.uint8)},
        geometry=Geometry(shape_zyx=shape),
        class_values=(1,),
    )
    header, _ = unpack(encode(case, 50_000))
    assert header["whole"]
    assert header["surface"] is None
    assert header["slices"] == [0, 1, 2, 3]


def test_a_colour_picture_keeps_its_colours_and_has_no_sides() -> None:
    shape = (1, 30, 40)
    case = CasePictures(
        image_czyx=np.stack([np.full(shape, v, np.float32) for v in (200, 100, 0)]),
        maps={"first": np.ones(shape, np.uint8)},
        geometry=Geometry(shape_zyx=shape),
        class_values=(1,),
        picture=True,
    )
    header, parts = unpack(encode(case, 50_000))
    assert header["letters"] is None
    assert header["surface"] is None
    pixel = Image.open(BytesIO(parts["image"])).convert("RGB").getpixel((5, 5))
    assert np.allclose(pixel, (200, 100, 0), atol=6)


@pytest.mark.parametrize(
    ("direction", "spacing_xyz", "plane", "letters"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), (1, 1, 5), "axial", ["R", "L", "A", "P"]),
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), (1, 1, 1), "axial", ["R", "L", "A", "P"]),
        ((0, 0, 1, 1, 0, 0, 0, -1, 0), (1, 1, 4), "sagittal", ["A", "P", "S", "I"]),
        ((1, 0, 0, 0, 0, 1, 0, -1, 0), (1, 1, 4), "coronal", ["R", "L", "S", "I"]),
    ],
)
def test_slices_lie_as_radiologists_look_at_them(
    direction: tuple[float, ...], spacing_xyz: tuple[float, float, float], plane: str, letters: list[str]
) -> None:
    geometry = Geometry(shape_zyx=(4, 5, 6), spacing_xyz_mm=spacing_xyz, direction=direction)
    view = choose_view(geometry)
    assert (view.plane, list(view.letters or ())) == (plane, letters)
    # A volume that holds its own physical coordinate along an axis must grow towards the letter's side.
    matrix = np.reshape(direction, (3, 3)) @ np.diag(spacing_xyz)
    z, y, x = np.indices(geometry.shape_zyx)
    grows = {"L": 0, "P": 1, "S": 2}
    for physical in range(3):
        value = matrix[physical, 0] * x + matrix[physical, 1] * y + matrix[physical, 2] * z
        shown = view.apply(value)
        for low, high, axis in ((letters[0], letters[1], 2), (letters[2], letters[3], 1)):
            if grows.get(high) == physical:
                assert (np.diff(shown, axis=axis) > 0).all()
            if grows.get(low) == physical:
                assert (np.diff(shown, axis=axis) < 0).all()
        turned, _ = upright(value, geometry)
        assert (np.diff(turned, axis=2 - physical) > 0).all()


def test_curves_name_their_ends_and_stay_inside() -> None:
    drawn = line_chart(
        [Series(name="a<b", values=[0.1, None, 0.3], style="k1"), Series(name="none", values=[None] * 3, style="k2")],
        ["0", "1", "2"],
        title="t",
        show=lambda v: f"{v:.2f}",
    )
    assert "a&lt;b 0.30" in drawn
    assert "a<b" not in drawn
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert len(heights) == 2
    assert all(10 <= y <= 210 for y in heights)


def test_the_names_of_very_many_curves_stay_beside_the_chart() -> None:
    many = [Series(name=f"class {n}", values=[0.5 + n / 1000, 0.6], style="k1") for n in range(100)]
    drawn = line_chart(many, ["0", "1"], title="t", show=lambda v: f"{v:.2f}")
    heights = [float(y) for y in re.findall(r'<text class="name k1" x="[\d.]+" y="([-\d.]+)"', drawn)]
    assert len(heights) == 100
    assert all(10 <= y <= 236 for y in heights)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (150, "2 min"), (7500, "2 h 05 min"), (200_000, "2 d 7 h")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_blocks_are_small_for_small_images() -> None:
    assert len(block_of(shape_zyx=(10, 24, 24))) < 8_000


def test_labelled_cases_are_not_among_those_to_look_at() -> None:
    account = make_account((*GOOD, make_case("human", 0.1, 0.1, role=Role.LABELLED)))
    assert "human" not in [case.case_id for case in account.look_first(5)]


def test_a_collapse_is_told_with_its_evidence_and_a_second_attempt_with_its_cause() -> None:
    verdict = judge_run(
        make_account(
            GOOD,
            stop_reason="labels oscillate",
            evidence="labels are 0.210 from the last round's but only 0.020 from those before",
            retries=("r01/train: the GPU ran out of memory; tried once more with memory segments that can grow",),
        )
    )
    assert verdict.level is Level.BAD
    assert verdict.headline == "Stopped after 2 rounds: labels oscillate"
    told = {finding.title: finding.text for finding in verdict.findings}
    assert told["Labels oscillate"].startswith("Labels are 0.210 from the last round's but only 0.020")
    assert "ran out of memory" in told["A stage was tried again once"]
