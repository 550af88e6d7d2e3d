"""The review as it is served: decisions reach the disk, and nobody but its own page may make them."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_run import add_labels, fused_record
from loop_command import heed_ctrl_c
from review_client import Client

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.report.page import Pictures
from nnunet_sam2.review import session
from nnunet_sam2.review.app import MOST_BYTES
from nnunet_sam2.review.take_in import take_in
from nnunet_sam2.rounds.decisions.record import (
    Decision,
    DecisionFile,
    accepted_path,
    decisions_path,
    read_decisions,
    standing,
)
from nnunet_sam2.rounds.ledger import Ledger
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import write_label

Run = tuple[DatasetFolders, Path]


def _lines(run: Path) -> int:
    return len(read_decisions(decisions_path(run)))


def test_decisions_are_on_disk_when_they_are_answered_and_undone_one_by_one(client: Client) -> None:
    used, left_out = client.state()["cases"]
    assert {used, left_out} == {"subject_003", "subject_004"}
    status, state = client.decide("subject_003", "accept", 1)
    assert status == 200
    assert state["cases"]["subject_003"]["accepted"] == [1]
    client.decide("subject_003", "reject", 2)
    client.decide("subject_004", "take out")
    stands = standing(read_decisions(decisions_path(client.run)))
    assert (list(stands["subject_003"].accepted), list(stands["subject_003"].rejected)) == ([1], [2])
    assert stands["subject_004"].taken_out
    assert client.state()["undo"] == "take out subject_004"
    assert client.ask("POST", "undo", body={})[1]["case"] == "subject_004"
    client.ask("POST", "undo", body={})
    state = client.ask("POST", "undo", body={})[1]
    assert not any(case["accepted"] or case["rejected"] or case["taken_out"] for case in state["cases"].values())
    status, answer, _ = client.ask("POST", "undo", body={})
    assert (status, "no decision to take back" in answer["error"]) == (409, True)


def test_an_accepted_label_is_kept_as_it_was_seen(client: Client) -> None:
    label = client.state()["cases"]["subject_003"]["label"]
    assert client.decide("subject_003", "accept", 1)[0] == 200
    assert file_hash(accepted_path(client.run, "subject_003", label, ".nii.gz")) == label


def test_a_label_that_cannot_be_kept_is_not_accepted_and_the_page_is_told_why(client: Client) -> None:
    (client.run / "review" / "accepted").write_text("in the way")
    status, answer = client.decide("subject_003", "accept", 1)
    assert (status, "accepted" in answer["error"]) == (500, True)
    assert _lines(client.run) == 0


def test_what_is_open_comes_first_and_what_is_decided_last_with_the_reasons(client: Client) -> None:
    cases = client.state()["cases"]
    # Of subject_004, class 2 is missing; subject_003 has an estimate of 0.25.
    assert list(cases) == ["subject_004", "subject_003"]
    assert cases["subject_004"]["why"][0].endswith("every labelled case shows it, this label does not")
    client.decide("subject_004", "reject", 1, 2)
    cases = client.state()["cases"]
    assert list(cases) == ["subject_003", "subject_004"]
    assert cases["subject_004"]["open"] == {}


def test_a_rejected_class_is_shown_again_when_a_round_has_made_a_newer_label(client: Client, run: Run) -> None:
    seen = client.state()["cases"]["subject_003"]["label"]
    client.decide("subject_003", "reject", 1, 2)
    assert client.state()["newer"] is False
    cohort = Cohort.load(run[0].raw)
    Ledger(client.run).append("started", stage="r03/train", key="", inputs={})
    assert client.state()["newer"] is False  # the run goes on, but its labels are the same
    add_labels(Ledger(client.run), cohort, 3, fused_record("subject_003", "subject_004", 3))
    assert client.state()["newer"] is True
    status, answer = client.decide("subject_003", "accept", 1, label="ab" * 32)
    assert (status, "another label than the one that you saw" in answer["error"]) == (409, True)
    assert client.ask("GET", "")[0] == 200
    case = client.state()["cases"]["subject_003"]
    assert case["label"] != seen
    assert case["again"] == [1, 2]
    assert case["why"] == ["large_organ: rejected before, and this is a newer label"]
    assert client.decide("subject_003", "reject", 1, 2)[0] == 200
    assert client.state()["cases"]["subject_003"]["open"] == {}


def test_a_rejected_class_that_was_drawn_by_hand_since_is_settled(client: Client, run: Run, tmp_path: Path) -> None:
    client.decide("subject_003", "reject", 1)
    cohort = Cohort.load(run[0].raw)
    geometry = cohort.case("subject_003").geometry
    mine = np.zeros(geometry.shape_zyx, np.uint8)
    mine[3:8, 8:20, 8:20] = 1
    write_label(tmp_path / "subject_003.nii.gz", mine, geometry)
    take_in(run[0].raw, [tmp_path / "subject_003.nii.gz"], classes=["1"])
    add_labels(Ledger(client.run), cohort, 3, fused_record("subject_003", "subject_004", 3))
    assert client.ask("GET", "")[0] == 200
    case = client.state()["cases"]["subject_003"]
    assert (case["drawn"], case["rejected"], case["again"]) == ([1], [], [])
    assert set(case["open"]) == {"2"}


@pytest.mark.parametrize(("classes", "drawn"), [(["large_organ"], [1]), (None, [1, 2])])
def test_a_class_that_was_drawn_by_hand_is_neither_accepted_nor_rejected_but_its_case_may_be_taken_out(
    client: Client, run: Run, tmp_path: Path, classes: list[str] | None, drawn: list[int]
) -> None:
    geometry = Cohort.load(run[0].raw).case("subject_003").geometry
    mine = np.zeros(geometry.shape_zyx, np.uint8)
    mine[3:8, 8:20, 8:20] = 1
    write_label(tmp_path / "subject_003.nii.gz", mine, geometry)
    take_in(run[0].raw, [tmp_path / "subject_003.nii.gz"], classes=classes)
    for decision in ("accept", "reject"):
        for wanted in ([1], [1, 2]):
            status, answer = client.decide("subject_003", decision, *wanted)
            assert status == 409
            assert answer["error"].startswith("a person drew large_organ")
            assert f"nothing to {decision}" in answer["error"]
            assert len(answer["error"].splitlines()) == 1
    assert _lines(client.run) == 0
    assert not (client.run / "review" / "accepted").exists()
    assert client.state()["cases"]["subject_003"]["drawn"] == drawn
    assert client.decide("subject_003", "take out")[0] == 200
    assert client.decide("subject_003", "clear", 1, 2)[0] == 200
    status, state = client.decide("subject_003", "clear")
    assert (status, state["cases"]["subject_003"]["taken_out"]) == (200, False)
    assert client.decide("subject_003", "accept", 2)[0] == (200 if drawn == [1] else 409)


def test_two_tabs_see_each_others_decisions_and_an_old_one_cannot_decide_about_a_changed_label(client: Client) -> None:
    other = Client(f"http://{client.host}{client.base}", client.run)
    client.decide("subject_003", "accept", 1)
    status, state = other.decide("subject_003", "reject", 2)
    assert status == 200
    assert (state["cases"]["subject_003"]["accepted"], state["cases"]["subject_003"]["rejected"]) == ([1], [2])
    for name in ("subject_003", "subject_004"):
        path = client.run / "r02" / "labels" / f"{name}.nii.gz"
        path.write_bytes(path.read_bytes() + b"\0")
    # Of the one there is a copy from when it was accepted, as it was seen.
    assert client.decide("subject_003", "accept", 2)[0] == 200
    status, answer = client.decide("subject_004", "accept", 2)
    assert (status, "changed since it was shown" in answer["error"]) == (409, True)


CHANGED: tuple[tuple[dict[str, str | None], int], ...] = (
    ({"Host": "evil.example"}, 403),
    ({"Host": "evil.example:80"}, 403),
    ({"Host": ""}, 403),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": None}, 403),
    ({"Origin": "https://{host}"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Content-Type": "text/plain"}, 415),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content-Type": None}, 415),
)


def test_pictures_are_made_again_for_newer_labels_alone_and_decisions_do_not_wait_for_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, folder = run
    begun, go_on = threading.Event(), threading.Event()
    made: list[int] = []

    def slow(*arguments: Any) -> Pictures:
        made.append(len(made))
        begun.set()
        assert len(made) == 1 or go_on.wait(20)
        return Pictures(blocks={}, problems={}, note="")

    monkeypatch.setattr(session, "pictures_of", slow)
    with DecisionFile(folder) as decisions:
        reviewed = session.ReviewSession(folders, folder, decisions)
        ledger = Ledger(folder)
        ledger.note_retry("no memory", "again")
        reviewed.page()
        assert len(made) == 1
        cohort = Cohort.load(folders.raw)
        first, second = cohort.unlabelled
        add_labels(ledger, cohort, 3, fused_record(first.case_id, second.case_id, 3))
        begun.clear()
        page = threading.Thread(target=reviewed.page)
        page.start()
        assert begun.wait(20)
        label = reviewed.state()["cases"][first.case_id]["label"]
        reviewed.decide(case_id=first.case_id, decision="reject", classes=[1], label=label, seen=0)
        assert page.is_alive()
        go_on.set()
        page.join(20)
    assert len(made) == 2
    assert standing(read_decisions(decisions_path(folder)))[first.case_id].rejected == {1: label}


def test_a_request_of_another_page_or_under_another_name_decides_nothing(client: Client) -> None:
    label = client.state()["cases"]["subject_003"]["label"]
    body = {"case": "subject_003", "decision": "take out", "classes": [], "label": label, "seen": 0}
    for change, status in CHANGED:
        filled = {name: value and value.format(host=client.host) for name, value in change.items()}
        headers = {name: value for name, value in {**client.own, **filled}.items() if value is not None}
        answered, _, sent = client.ask("POST", "decide", headers=headers, body=body)
        assert answered == status, change
        assert "Access-Control-Allow-Origin" not in sent
    assert _lines(client.run) == 0
    assert client.ask("POST", "decide", body=body)[0] == 200


def test_without_the_token_nothing_is_shown_and_nothing_is_done(client: Client) -> None:
    token = client.base.strip("/")
    assert len(token) >= 43
    wrong = [
        "/", "//", "/state", "/decide", f"/{token[:-1]}/", f"/{token}x/", f"/{token.swapcase()}/", "/%00/", "/../",
        f"/x/../{token}/", f"/{token[:-1]}%{ord(token[-1]) + 1:02x}/", "/\xff/",
    ]  # fmt: skip
    for path in wrong:
        quoted = path.encode("latin-1").decode("latin-1").replace("\xff", "%ff")
        for method in ("GET", "POST"):
            status, _, headers = client.ask(method, "", path=quoted, body={} if method == "POST" else None)
            assert status in (400, 403), (method, path)
            assert headers.get("Content-Type", "").startswith(("application/json", "text/plain"))
    assert _lines(client.run) == 0


def test_there_are_no_files_to_be_had(client: Client) -> None:
    wanted = (
        "../cohort.json",
        "..%2f..%2fetc/passwd",
        "%2e%2e/ledger.jsonl",
        "state/../../x",
        "/etc/passwd",
        "review.js",
    )
    for route in wanted:
        status, answer, _ = client.ask("GET", route)
        assert status in (400, 403, 404), route
        assert "error" in answer


NOT_SENT: tuple[tuple[Any, int], ...] = (
    ({"case": "nobody", "decision": "take out", "classes": [], "label": "", "seen": 99}, 409),
    ({"case": "subject_000", "decision": "take out", "classes": [], "label": "", "seen": 99}, 409),
    ({"case": "subject_003", "decision": "accept", "classes": [7], "label": "", "seen": 99}, 409),
    ({"case": "subject_003", "decision": "accept", "classes": [], "label": "", "seen": 99}, 409),
    ({"case": "subject_003", "decision": "take out", "classes": [1], "label": "", "seen": 99}, 409),
    ({"case": "subject_003", "decision": "undo", "classes": [1], "label": "", "seen": 99}, 409),
    ({"case": "subject_003", "decision": "delete", "classes": [1], "label": "", "seen": 99}, 409),
    ({"case": "subject_003", "decision": "accept", "classes": [1], "label": "old", "seen": 99}, 409),
    ({"case": "subject_003", "decision": "accept", "classes": [True], "label": "", "seen": 99}, 400),
    ({"case": "subject_003", "decision": "accept", "classes": "1", "label": "", "seen": 99}, 400),
    ({"case": ["subject_003"], "decision": "accept", "classes": [1], "label": "", "seen": 99}, 400),
    ({"decision": "accept"}, 400),
    ([], 400),
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 60_000, 400),
    (b" " * (MOST_BYTES + 1), 413),
)


def test_what_the_page_would_not_send_is_refused_and_decides_nothing(client: Client) -> None:
    for body, status in NOT_SENT:
        answered, answer, _ = client.ask("POST", "decide", body=body)
        assert answered == status, body if len(body) < 100 else len(body)
        assert answered == 413 or "error" in answer
    assert _lines(client.run) == 0


def test_the_page_may_talk_to_its_own_server_and_to_nothing_else_and_is_kept_by_nobody(client: Client) -> None:
    status, page, headers = client.ask("GET", "")
    assert status == 200
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "connect-src &#39;self&#39;" in policy[1]
    assert "default-src &#39;none&#39;" in policy[1]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert client.ask("PUT", "decide", body={})[0] == 405
    assert client.ask("OPTIONS", "decide", headers={"Origin": "http://evil.example"})[0] in (403, 405)


def test_a_second_review_of_the_same_run_is_refused(client: Client) -> None:
    with pytest.raises(InputError, match="being reviewed by another process"):
        DecisionFile(client.run)


def test_the_command_prints_the_address_and_ends_with_an_interrupt(run: Run) -> None:
    argv = [sys.executable, "-m", "nnunet_sam2.cli.main", "review", "-d", "501", "--no-browser", "--pictures", "0"]
    pipe, heeds = subprocess.PIPE, heed_ctrl_c if sys.platform != "win32" else None
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, preexec_fn=heeds) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/\S+/", line)
        try:
            assert found, line
            assert Client(found[0], run[1]).decide("subject_004", "take out")[0] == 200
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert _lines(run[1]) == 1


def test_a_review_that_is_killed_has_every_decision_that_it_answered_and_goes_on(run: Run) -> None:
    argv = [sys.executable, "-m", "nnunet_sam2.cli.main", "review", "-d", "501", "--no-browser", "--pictures", "0"]
    answered = 0
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/\S+/", process.stdout.readline())
            assert found
            client = Client(found[0], run[1])
            label = client.state()["cases"]["subject_003"]["label"]
            threading.Timer(0.3, process.kill).start()
            with suppress(OSError, http.client.HTTPException):
                while client.decide("subject_003", ("accept", "reject")[answered % 2], 1, label=label)[0] == 200:
                    answered += 1
        finally:
            process.kill()
    assert answered > 0
    assert answered <= _lines(run[1]) <= answered + 1
    with DecisionFile(run[1]) as decisions:
        decisions.append(Decision.TAKE_OUT, case_id="subject_003")
    assert standing(read_decisions(decisions_path(run[1])))["subject_003"].taken_out


def test_a_decision_made_before_another_tab_decided_about_the_case_is_refused_with_what_is_newer(
    client: Client,
) -> None:
    seen = client.state()["seen"]
    assert client.decide("subject_003", "accept", 1)[0] == 200
    status, answer = client.decide("subject_003", "reject", 1, seen=seen)
    assert status == 409
    assert "decided elsewhere since you saw it (accept large_organ)" in answer["error"]
    status, answer, _ = client.ask("POST", "undo", body={"seen": seen})
    assert (status, "decided elsewhere" in answer["error"]) == (409, True)
    assert client.decide("subject_004", "reject", 1, seen=seen)[0] == 200  # nobody decided about this one
    assert client.ask("GET", "seen")[1] == {"seen": client.state()["seen"]}
    assert client.state()["cases"]["subject_003"]["accepted"] == [1]


def test_connections_that_say_nothing_do_not_keep_the_page_from_answering(client: Client) -> None:
    host, port = client.host.split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        assert client.state()["seen"] == 0
    finally:
        for connection in idle:
            connection.close()
