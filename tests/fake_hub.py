"""A Hugging Face hub of one repository on this machine, whose faults are switched on one by one."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO, FILE = "someone/tiny-sam2", "tiny.pt"
PAGE = b"<!DOCTYPE html><html><body>Please sign in to the guest network</body></html>"


@dataclass
class Request:
    """One request as it came, and how many bytes of a body were sent for it."""

    method: str
    path: str
    asked_range: str | None
    authorization: str | None
    host: str
    sent: int = 0


@dataclass
class FakeHub:
    """Answer for one file; what the fields say holds for every request from then on."""

    content: bytes = b""
    commit: str = "c0ffee" + 34 * "0"
    stored_by_hash: bool = True
    """As large files are: the ETag is the sha256. Otherwise it is a git hash, of which nothing follows."""
    error: tuple[int, str] | None = None
    """Status and X-Error-Code of every answer."""
    hub_headers: bool = True
    page_instead: bool = False
    """A web page in answer to every download."""
    flip_a_byte: bool = False
    ignore_range: bool = False
    announce_more: int = 0
    """Bytes by which the announced size exceeds the file's."""
    breaks: list[int] = field(default_factory=list)
    """After how many bytes the next downloads break off, one entry each."""
    elsewhere: bool = False
    """Send downloads on to another host, as the hub does with large files."""
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, "HEAD")

            def do_GET(self) -> None:
                hub.answer(self, "GET")

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def downloads(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and request.sent]

    @property
    def bytes_sent(self) -> int:
        return sum(request.sent for request in self.downloads)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        headers = handler.headers
        request = Request(method, handler.path, headers["Range"], headers["Authorization"], headers["Host"])
        self.requests.append(request)
        if self.error is not None:
            self._reply(handler, self.error[0], {"X-Error-Code": self.error[1], "Content-Length": "0"})
        elif self.elsewhere and handler.path.startswith(f"/{REPO}/"):
            self._reply(
                handler,
                302,
                {
                    **self._named("X-Linked-"),
                    "Location": f"http://localhost:{self.port}/storage/{FILE}",
                    "Content-Length": "0",
                },
            )
        elif handler.path not in (f"/{REPO}/resolve/{rev}/{FILE}" for rev in ("main", self.commit)) and not (
            handler.path.startswith("/storage/")
        ):
            self._reply(handler, 404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
        elif method == "HEAD":
            named = self._named("") if self.hub_headers else {}
            self._reply(handler, 200, {"Content-Length": str(len(self.content) + self.announce_more), **named})
        else:
            self._send_file(handler, request)

    def _named(self, prefix: str) -> dict[str, str]:
        kind = hashlib.sha256 if self.stored_by_hash else hashlib.sha1
        size = {f"{prefix}Size": str(len(self.content) + self.announce_more)} if prefix else {}
        return {"X-Repo-Commit": self.commit, f"{prefix}ETag": f'"{kind(self.content).hexdigest()}"', **size}

    def _send_file(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        body, status, headers = self.content, 200, self._named("")
        if self.flip_a_byte:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if self.page_instead:
            body, headers = PAGE, {"Content-Type": "text/html"}
        elif request.asked_range and not self.ignore_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", request.asked_range)[1])
            if start >= len(body):
                self._reply(handler, 416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        self._reply(handler, status, {**headers, "Content-Length": str(len(body))})
        stop = self.breaks.pop(0) if self.breaks else len(body)
        handler.wfile.write(body[:stop])
        request.sent = min(stop, len(body))
        if stop < len(body):
            handler.wfile.flush()
            handler.close_connection = True

    def _reply(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
