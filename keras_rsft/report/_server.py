"""Serves a run's page on this machine alone."""

from __future__ import annotations

import http.server
import re
import sys
from http import HTTPStatus
from typing import Any

from keras_rsft.errors import InvalidArgument
from keras_rsft.report._page import render_page
from keras_rsft.report._record import RunRecord

ADDRESS = "127.0.0.1"
# From here on no port belongs to a service.
_FIRST_PRIVATE_PORT = 49152
_THUMBNAIL = re.compile(r"/thumbnails/(\d{1,9})", re.ASCII)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


def own_port(record: RunRecord) -> int:
    """Returns a run's port, in [49152, 65535]: the same one each time."""
    ports = range(_FIRST_PRIVATE_PORT, 2**16)
    return ports[int(record.identity, 16) % len(ports)]


class ReviewServer(http.server.ThreadingHTTPServer):
    """Serves one run; the page is rendered once, when the server is made."""

    daemon_threads = True

    def __init__(self, record: RunRecord, *, port: int | None = None):
        self.record = record
        self.page = render_page(record, served=True).encode("utf-8")
        record.thumbnail_index  # noqa: B018 -- Read before threads ask for it.
        try:
            first = own_port(record) if port is None else port
            super().__init__((ADDRESS, first), _Handler)
        except (OSError, OverflowError) as error:
            if port is not None:
                raise InvalidArgument(
                    f"The port {port} cannot be used: {error}. Choose another "
                    "`--port`, or leave it out."
                ) from error
            super().__init__((ADDRESS, 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that turns a page before all pictures have come is no error.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ReviewServer
    server_version, sys_version = "keras_rsft", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        own = [f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")]
        if self.headers.get("Host") not in own:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"Unknown host.\n")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif (picture := self._picture()) is not None:
            self._answer(HTTPStatus.OK, "image/jpeg", picture)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"Not found.\n")

    do_HEAD = do_GET  # noqa: N815 -- The names that the library asks for.

    def _picture(self) -> bytes | None:
        match = _THUMBNAIL.fullmatch(self.path)
        ids = self.server.record.ledger.ids
        if match is None or int(match[1]) >= len(ids):
            return None
        return self.server.record.thumbnail(ids[int(match[1])])

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        caching = "max-age=3600" if kind == "image/jpeg" else "no-store"
        self.send_header("Cache-Control", caching)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        del format, arguments  # A terminal full of requests helps nobody.
