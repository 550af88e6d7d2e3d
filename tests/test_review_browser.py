"""The review as a person uses it: by clicks and keys in a real browser, with the decisions on disk afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import complaints, open_browser, requests, resize
from finished_run import add_labels, fused_record
from review_client import Client

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.decisions.record import CaseDecisions, decisions_path, read_decisions, standing
from nnunet_sam2.rounds.ledger import Ledger

NAME = "return document.getElementById('case-name').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(browser: Any, client: Client) -> Iterator[Any]:
    """Open the page on a wide screen, and look afterwards whether anything went wrong."""
    browser.get("about:blank")
    complaints(browser), requests(browser)
    resize(browser, 1440, 1000)
    browser.get(f"http://{client.host}{client.base}")
    _until(lambda: browser.execute_script("return document.getElementById('slice-name').textContent"))
    yield browser
    assert complaints(browser) == []
    assert [url for url in requests(browser) if not url.startswith(f"http://{client.host}{client.base}")] == []


def _until(true: Callable[[], Any], *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.05)


def _show_word(browser: Any) -> None:
    """Bring the panel of decisions into view: keys decide about nothing else."""
    browser.execute_script("window.scrollTo(0, 0)")


def _press(browser: Any, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


def _stands(run: Path) -> dict[str, CaseDecisions]:
    return standing(read_decisions(decisions_path(run)))


def _marked(browser: Any) -> int:
    return int(browser.execute_script("return document.querySelector('#word li.marked').dataset.value"))


def test_keys_accept_reject_and_take_out_and_lead_from_what_is_open_to_what_is_open(
    opened: Any, client: Client
) -> None:
    assert opened.execute_script(NAME) == "subject_004"
    assert "every labelled case shows it" in opened.execute_script("return document.getElementById('word').innerText")
    assert _marked(opened) == 2
    opened.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    _press(opened, "r")  # not in view: it is shown, and nothing is decided
    _until(
        lambda: "nothing was decided" in opened.execute_script("return document.getElementById('trouble').innerText")
    )
    assert not _stands(client.run)
    _press(opened, "r")
    _until(lambda: list(_stands(client.run).get("subject_004", CaseDecisions()).rejected) == [2])
    _until(lambda: "reject" in opened.execute_script("return document.getElementById('passing')?.innerText ?? ''"))
    _until(lambda: _marked(opened) == 1)
    _press(opened, "a")
    _until(lambda: list(_stands(client.run)["subject_004"].accepted) == [1])
    # Nothing of it is open any more: the next case opens by itself.
    _until(lambda: opened.execute_script(NAME) == "subject_003")
    _press(opened, "x")
    _until(lambda: _stands(client.run).get("subject_003", CaseDecisions()).taken_out)
    progress = "return document.getElementById('progress-text').textContent"
    _until(lambda: opened.execute_script(progress) == "2 of 2 cases decided")
    chips = "return [...document.querySelectorAll('#table .chip')].map(c => c.textContent).sort()"
    assert opened.execute_script(chips) == ["1 accepted, 1 rejected", "taken out"]
    _press(opened, "u")
    _until(lambda: "subject_003" not in _stands(client.run))
    _until(lambda: opened.execute_script(progress) == "1 of 2 cases decided")


def test_a_key_that_is_quicker_than_the_last_answer_is_for_the_next_class_and_for_no_other_case(
    opened: Any, client: Client
) -> None:
    _show_word(opened)
    keys = (
        "for (const key of arguments[0]) "
        "document.body.dispatchEvent(new KeyboardEvent('keydown', { key, repeat: arguments[1], bubbles: true }))"
    )
    opened.execute_script(keys, "rAa", False)  # a capital without shift: caps lock
    _until(lambda: opened.execute_script(NAME) == "subject_003")
    opened.execute_script(keys, "aAr", True)  # keys that are held
    _press(opened, "x")
    _until(lambda: "subject_003" in _stands(client.run))
    stands = _stands(client.run)
    assert (list(stands["subject_004"].rejected), list(stands["subject_004"].accepted)) == ([2], [1])
    assert stands["subject_003"] == CaseDecisions(taken_out=True)


def test_a_page_that_shows_an_older_label_cannot_decide_about_the_newer_one_of_another_tab(
    opened: Any, client: Client, run: tuple[DatasetFolders, Path]
) -> None:
    cohort = Cohort.load(run[0].raw)
    add_labels(Ledger(client.run), cohort, 3, fused_record("subject_003", "subject_004", 3))
    assert client.ask("GET", "")[0] == 200  # the other tab
    trouble = "const t = document.getElementById('trouble'); return t.hidden ? '' : t.textContent"
    opened.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
    _until(lambda: "newer labels than this page shows" in opened.execute_script(trouble))
    _show_word(opened)
    _press(opened, "a")
    _until(lambda: "another label than the one that you saw" in opened.execute_script(trouble))
    assert _stands(client.run) == {}
    # The browser itself complains about the answer 409.
    assert all("409" in text for text in complaints(opened))


def test_clicks_do_the_same_and_a_second_one_takes_it_back(opened: Any, client: Client) -> None:
    accept = "#word li[data-value='1'] [data-word=accept]"
    opened.find_element("css selector", accept).click()
    _until(lambda: list(_stands(client.run).get("subject_004", CaseDecisions()).accepted) == [1])
    pressed = f'return document.querySelector("{accept}").ariaPressed'
    _until(lambda: opened.execute_script(pressed) == "true")
    opened.find_element("css selector", accept).click()
    _until(lambda: _stands(client.run) == {})
    opened.find_element("css selector", "#word [data-word='take out']").click()
    _until(lambda: _stands(client.run).get("subject_004", CaseDecisions()).taken_out)
    opened.find_element("css selector", "#word [data-word=accept][data-all]").click()
    _until(lambda: list(_stands(client.run).get("subject_003", CaseDecisions()).accepted) == [1, 2])
    opened.refresh()
    _until(lambda: opened.execute_script("return document.querySelectorAll('#table .chip').length") == 2)
    assert opened.execute_script("return document.getElementById('undo').disabled") is False
    opened.find_element("id", "undo").click()
    _until(lambda: "subject_003" not in _stands(client.run))


def test_commas_and_points_mark_another_class_and_editing_by_hand_has_its_commands(opened: Any) -> None:
    assert _marked(opened) == 2
    _press(opened, ".")
    assert _marked(opened) == 1
    _press(opened, ",")
    assert _marked(opened) == 2
    text = opened.execute_script("return document.querySelector('#word-edit pre').textContent")
    assert text.splitlines() == [
        "nnunet_sam2 review -d 501 --run 3d_fullres_fold0 --export subject_004",
        "nnunet_sam2 review -d 501 --import FILE",
    ]


def test_it_fits_a_phone_and_a_wide_screen_with_a_case_open(opened: Any) -> None:
    opened.execute_script("document.getElementById('word-edit').open = true")
    for width, height in ((320, 640), (390, 844), (1000, 700), (1920, 1080)):
        resize(opened, width, height)
        wide = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide == [width, width]
        inside = "const v = document.getElementById('viewer'); return v.scrollWidth <= v.clientWidth"
        assert opened.execute_script(inside) is True


def test_a_decision_that_cannot_be_saved_is_said_to_be_none(opened: Any, client: Client) -> None:
    label = client.run / "r02" / "labels" / "subject_004.nii.gz"
    label.write_bytes(label.read_bytes() + b"\0")
    _show_word(opened)
    _press(opened, "a")
    trouble = "const t = document.getElementById('trouble'); return t.hidden ? '' : t.textContent"
    _until(lambda: "Not saved" in opened.execute_script(trouble))
    assert "changed since it was shown" in opened.execute_script(trouble)
    assert opened.execute_script("return document.querySelectorAll('#word [aria-pressed=true]').length") == 0
    assert _stands(client.run) == {}
    # The browser itself complains about the answer 409.
    assert all("409" in text for text in complaints(opened))


def test_a_review_that_was_ended_says_so_when_something_is_decided(browser: Any, client: Client) -> None:
    resize(browser, 1440, 1000)
    browser.get(f"http://{client.host}{client.base}")
    _until(lambda: browser.execute_script("return document.getElementById('slice-name').textContent"))
    client.end()
    _show_word(browser)
    _press(browser, "a")
    trouble = "const t = document.getElementById('trouble'); return t.hidden ? '' : t.textContent"
    _until(lambda: "Start it again with nnunet_sam2 review" in browser.execute_script(trouble))
    complaints(browser)
