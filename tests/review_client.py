"""A review that is served from a thread, and somebody who talks to it."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waitress import wasyncore

from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.review.serve import open_server
from nnunet_sam2.review.session import ReviewSession
from nnunet_sam2.rounds.decisions.record import DecisionFile

Run = tuple[DatasetFolders, Path]


class Client:
    """Talk to a review as its page does, or as another page would."""

    def __init__(self, address: str, run: Path) -> None:
        self.run = run
        self.end: Callable[[], None] = lambda: None
        self.host, self.base = re.fullmatch(r"http://([^/]+)(/.+/)", address).groups()  # type: ignore[union-attr]
        self.own = {"Origin": f"http://{self.host}", "Content-Type": "application/json"}

    def ask(
        self,
        method: str,
        route: str,
        *,
        headers: dict[str, str] | None = None,
        body: Any = None,
        path: str | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        own = self.own if method == "POST" else {}
        connection.request(method, path or self.base + route, body=data, headers=own if headers is None else headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        kind = answer.headers.get("Content-Type", "")
        return answer.status, json.loads(text) if "json" in kind else text, dict(answer.headers)

    def decide(
        self, case: str, decision: str, *classes: int, label: str | None = None, seen: int | None = None
    ) -> tuple[int, Any]:
        state = self.state()
        label = label if label is not None else state["cases"][case]["label"]
        seen = state["seen"] if seen is None else seen
        body = {"case": case, "decision": decision, "classes": list(classes), "label": label, "seen": seen}
        return self.ask("POST", "decide", body=body)[:2]

    def state(self) -> Any:
        status, state, _ = self.ask("GET", "state")
        assert status == 200
        return state


@pytest.fixture
def client(run: Run) -> Iterator[Client]:
    """A review of a finished run, served from a thread."""
    folders, folder = run
    with DecisionFile(folder) as decisions, open_server(ReviewSession(folders, folder, decisions)) as (server, address):
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                wasyncore.loop(timeout=0.05, map=server._map, count=1)

        thread = threading.Thread(target=serve)
        thread.start()

        def end() -> None:
            ended.set()
            thread.join(timeout=10)
            wasyncore.close_all(server._map)

        talking = Client(address, folder)
        talking.end = end
        yield talking
        end()
