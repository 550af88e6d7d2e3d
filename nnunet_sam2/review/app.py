"""The review as a web application for one person on this machine, and for nobody else.

Any page in the same browser can send requests to a port of this machine. So every request must know the token in the
address, must name this address as its host (a name that was rebound to 127.0.0.1 would name another), and one that
changes something must come from this page (its origin) and be JSON, which a form of another page cannot send.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterable
from typing import Any

from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge
from werkzeug.wrappers import Request, Response

from nnunet_sam2.errors import InputError, NnunetSam2Error, describe_os_error
from nnunet_sam2.review.session import ReviewSession

HOST = "127.0.0.1"
MOST_BYTES = 65_536
"""Of a request: a decision takes some hundreds."""

_MOST_CLASSES = 65_536

_HEADERS = {
    "Cache-Control": "no-store",
    # Beside the policy in the page, which cannot say this.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class ReviewApp:
    """Answer requests, as WSGI wants it; ``port`` is set when it is known."""

    def __init__(self, session: ReviewSession, *, token: str, port: int = 0) -> None:
        self.session = session
        self.token = token
        self.port = port

    @property
    def address(self) -> str:
        """Return the address of the page, token included."""
        return f"http://{HOST}:{self.port}/{self.token}/"

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        request = Request(environ, populate_request=False, shallow=False)
        request.max_content_length = MOST_BYTES
        try:
            response = self._answer(request)
        except RequestEntityTooLarge:
            response = _refusal(413, "the request is too large")
        except HTTPException as error:
            response = _refusal(error.code or 400, "the request is not what this page sends")
        except InputError as error:
            response = _refusal(409, str(error))
        except NnunetSam2Error as error:
            response = _refusal(500, str(error))
        except OSError as error:
            response = _refusal(500, describe_os_error(error))
        response.headers.extend(_HEADERS)
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        if request.environ.get("HTTP_HOST") not in (f"{HOST}:{self.port}", f"localhost:{self.port}"):
            return _refusal(403, f"ask for {HOST}:{self.port} by that name")
        if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return _refusal(403, "this page answers no other")
        given, _, route = request.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.token.encode()):
            return _refusal(403, "the address lacks the token that nnunet_sam2 review printed")
        if request.method in ("GET", "HEAD") and route == "":
            return Response(self.session.page(), mimetype="text/html")
        if request.method == "GET" and route == "state":
            return _json(self.session.state())
        if request.method == "GET" and route == "seen":
            return _json({"seen": self.session.entries()})
        if request.method == "POST" and route in ("decide", "undo"):
            if request.headers.get("Origin") != f"http://{request.environ['HTTP_HOST']}":
                return _refusal(403, "decisions come from this page alone")
            if request.mimetype != "application/json":
                return _refusal(415, "decisions are JSON")
            return _json(self._undo(request) if route == "undo" else self._decide(request))
        return _refusal(404 if request.method in ("GET", "HEAD", "POST") else 405, "there is nothing here")

    def _undo(self, request: Request) -> dict[str, Any]:
        try:
            seen = json.loads(request.get_data()).get("seen")
        except (ValueError, AttributeError, RecursionError):
            raise BadRequest from None
        if seen is not None and type(seen) is not int:
            raise BadRequest
        return self.session.undo(seen=seen)

    def _decide(self, request: Request) -> dict[str, Any]:
        try:
            value = json.loads(request.get_data())
            fields = ("case", "decision", "classes", "label", "seen")
            case_id, decision, classes, label, seen = (value[name] for name in fields)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadRequest from None
        texts = all(isinstance(text, str) for text in (case_id, decision, label))
        if not texts or not isinstance(classes, list) or len(classes) > _MOST_CLASSES:
            raise BadRequest
        if any(type(value) is not int for value in (*classes, seen)):
            raise BadRequest
        return self.session.decide(case_id=case_id, decision=decision, classes=classes, label=label, seen=seen)


def _json(value: Any) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), mimetype="application/json")


def _refusal(status: int, text: str) -> Response:
    return Response(json.dumps({"error": text}, ensure_ascii=False), status=status, mimetype="application/json")
