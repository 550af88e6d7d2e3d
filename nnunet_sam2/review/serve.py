"""Serve a review on this machine until it is ended."""

from __future__ import annotations

import secrets
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import say
from nnunet_sam2.review.app import HOST, MOST_BYTES, ReviewApp
from nnunet_sam2.review.session import ReviewSession
from nnunet_sam2.rounds.decisions.record import DecisionFile, decisions_path

_TOKEN_BYTES = 32
_THREADS = 4
_MOST_CONNECTIONS = 500
_IDLE_SECONDS = 10


def serve_review(
    folders: DatasetFolders, run: Path, *, port: int = 0, browser: bool = True, most_pictures: int | None = None
) -> None:
    """Serve the review of the run in the folder ``run`` on 127.0.0.1 until Ctrl-C; decisions are on disk at once."""
    with DecisionFile(run) as decisions:
        session = ReviewSession(folders, run, decisions, most_pictures=most_pictures)
        with open_server(session, port=port) as (server, address):
            say(f"review of {run.name}: {address}")
            say(f"decisions are kept in {decisions_path(run)}; end with Ctrl-C")
            if browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            with suppress(KeyboardInterrupt):  # the one way in which it ends
                server.run()
        say(f"{len(decisions.lines)} entries in {decisions_path(run)}")


@contextmanager
def open_server(session: ReviewSession, *, port: int = 0) -> Iterator[tuple[Any, str]]:
    """Bind a server of 127.0.0.1 and yield it, not yet running, with the page's address; port 0 is any free one."""
    from waitress import create_server

    from nnunet_sam2.errors import InputError

    app = ReviewApp(session, token=secrets.token_urlsafe(_TOKEN_BYTES))
    try:
        server = create_server(
            app,
            host=HOST,
            port=port,
            threads=_THREADS,
            ident=None,
            # Connections that say nothing are ended before they can use up what there is; the page opens new ones.
            connection_limit=_MOST_CONNECTIONS,
            channel_timeout=_IDLE_SECONDS,
            cleanup_interval=_IDLE_SECONDS // 2,
            asyncore_use_poll=True,
            max_request_body_size=MOST_BYTES,
            max_request_header_size=MOST_BYTES,
        )
    except OSError as error:
        raise InputError(f"--port {port} cannot be had ({error}); leave it out for any free one") from None
    app.port = int(server.effective_port)
    try:
        yield server, app.address
    finally:
        server.task_dispatcher.shutdown(timeout=2)
        server.close()
