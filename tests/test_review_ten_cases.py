"""Ten cases reviewed by keyboard in a real browser: nothing is decided about what was not in view."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from browser import complaints, open_browser, resize
from report_data import CLASSES, block_of, make_account, make_case
from waitress import wasyncore

from nnunet_sam2.report.page import Pictures, ReviewPage, render
from nnunet_sam2.review.serve import open_server

IDS = [f"case_{n:02d}" for n in range(10)]

# Each request to decide is sent with what stood on the screen at that moment.
WATCH = """
window.decided = [];
const send = window.fetch;
window.fetch = (route, options) => {
  if (route === "decide") {
    const inside = (id) => { const box = document.getElementById(id).getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight + 1 && box.height > 0; };
    decided.push({ ...JSON.parse(options.body), shown: document.getElementById("case-name").textContent,
      marked: Number(document.querySelector("#word li.marked").dataset.value), picture: inside("stage"), buttons: inside("word"), slice: document.getElementById("slice-name").textContent });
  }
  return send(route, options);
};
"""  # noqa: E501


class _TenCases:
    """Answer the page as a review does, of ten cases that are nowhere on disk."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, int]] = []

    def page(self) -> str:
        cases = tuple(make_case(name, 0.5, 0.6) for name in IDS)
        block = block_of(60_000)
        pictures = Pictures(blocks=dict.fromkeys(IDS, block))
        data = {**self.state(), "dataset": "501", "run": "3d_fullres_fold0"}
        return render(make_account(cases), pictures, ReviewPage(data=data, first=[(IDS[0], "")], notice="Saved."))

    def state(self) -> dict[str, Any]:
        cases = {}
        for name in IDS:
            accepted, rejected = ([v for n, d, v in self.said if (n, d) == (name, w)] for w in ("accept", "reject"))
            left = {str(v): 1 - v / 4 for v in CLASSES if v not in (*accepted, *rejected)}
            cases[name] = {
                "label": "x", "worth": max(left.values(), default=0), "why": ["low"], "open": left, "taken_out": False,
                "accepted": accepted, "rejected": rejected, "again": [], "drawn": [],
            }  # fmt: skip
        return {"cases": cases, "undo": "the last" if self.said else "", "seen": self.entries(), "newer": False}

    def entries(self) -> int:
        return len(self.said)

    def decide(self, *, case_id: str, decision: str, classes: list[int], label: str, seen: int) -> dict[str, Any]:
        self.said += [(case_id, decision, value) for value in classes]
        return self.state()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "height"), [(1400, 1000), (1920, 1080), (390, 844)])
def test_ten_cases_are_reviewed_by_keyboard_without_a_decision_about_what_is_not_in_view(
    browser: Any, width: int, height: int
) -> None:
    session = _TenCases()
    ended = threading.Event()
    with open_server(session) as (server, address):  # type: ignore[arg-type]
        thread = threading.Thread(target=lambda: _serve(server, ended))
        thread.start()
        try:
            resize(browser, width, height)
            browser.get(f"{address}#case={IDS[0]}")
            browser.execute_script(WATCH)
            for count in range(1, 2 * len(IDS) + 1):
                _until(lambda: browser.execute_script("return document.getElementById('slice').width > 100"))
                _press_until(browser, session, count, "a" if count % 3 else "r")
            decided = browser.execute_script("return decided")
            assert len(decided) == len(session.said) == 20
            assert [name for name, _, _ in session.said] == [name for name in IDS for _ in CLASSES]
            for one in decided:
                text = json.dumps(one)
                assert one["shown"] == one["case"], text
                assert one["classes"] == [one["marked"]], text
                assert one["picture"], text
                assert one["buttons"], text
            assert complaints(browser) == []
        finally:
            ended.set()
            thread.join(timeout=10)
            wasyncore.close_all(server._map)


def _press_until(browser: Any, session: _TenCases, count: int, key: str) -> None:
    """Press a key as a person does: once more where the page says that nothing was decided, and never ahead of it."""
    for _ in range(20):
        browser.switch_to.active_element.send_keys(key)
        end = time.monotonic() + 1.5
        trouble = "const t = document.getElementById('trouble'); return t.hidden ? '' : t.textContent"
        while time.monotonic() < end:
            if len(session.said) == count:
                name, shown = session.said[-1][0], IDS[min(count // 2, len(IDS) - 1)]
                both = "return [document.getElementById('passing')?.textContent ?? '', document.getElementById('case-name').textContent]"  # noqa: E501
                _until(partial(_is_there, browser, both, said=name, now=shown))
                return
            if "nothing was decided" in browser.execute_script(trouble):
                break
            time.sleep(0.03)
    raise AssertionError("the key never decided")


def _is_there(browser: Any, script: str, *, said: str, now: str) -> bool:
    texts = browser.execute_script(script)
    return said in texts[0] and texts[1] == now


def _serve(server: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        wasyncore.loop(timeout=0.05, map=server._map, count=1)


def _until(true: Any, *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.03)
