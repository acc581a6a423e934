"""Serves a run's page on this machine alone."""

from __future__ import annotations

import functools
import hmac
import http.server
import json
import os
import re
import secrets
import sys
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

from keras_rsft import _storage
from keras_rsft.config import IMAGES
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.report._live import Decided, LiveAudit
from keras_rsft.report._page import rendered
from keras_rsft.report._record import RunRecord

ADDRESS = "127.0.0.1"
# From here on no port belongs to a service.
_FIRST_PRIVATE_PORT = 49152
_PICTURE = re.compile(r"/(thumbnails|photos)/(\d{1,9})", re.ASCII)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
PHOTO_SIDE = 1024
_MAX_PHOTO_BYTES = 200_000_000
# Decisions about a million samples.
_MAX_QUESTION_BYTES = 100_000_000
TOKEN_HEADER = "X-Review-Token"  # noqa: S105 -- The name of it.


def own_port(record: RunRecord) -> int:
    """Returns a run's port, in [49152, 65535]: the same one each time."""
    ports = range(_FIRST_PRIVATE_PORT, 2**16)
    return ports[int(record.identity, 16) % len(ports)]


# Photos -------------------------------------------------------------------------------


class Photos:
    """The user's own files that a run lists, decoded and encoded again."""

    def __init__(self, record: RunRecord):
        source = Path(str(record.config.get("data") or ""))
        self._root = source if source.is_dir() else source.parent
        known = record.kind == IMAGES and (source.is_dir() or source.is_file())
        listed = record.folder / _storage.SAMPLES_FILE
        rows = _storage.read_csv(listed) if known and listed.exists() else ()
        self._listed = frozenset(row["id"] for row in rows)
        # Each decoded photo takes up to 300 MB: one after the other.
        self._turn = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._listed)

    def jpeg(self, sample_id: str) -> bytes | None:
        """Returns a photo of at most 1,024 pixels, or None where it cannot be had."""
        if sample_id not in self._listed:
            return None
        try:
            encoded = read_below(self._root, sample_id)
        except (OSError, ValueError):
            return None
        import tensorflow as tf

        from keras_rsft.data._images import shrunk_jpeg

        with self._turn:
            try:
                return shrunk_jpeg(encoded, PHOTO_SIDE)
            except tf.errors.OpError:
                return None


def read_below(root: Path, name: str) -> bytes:
    """Reads a file below a folder; follows no link that is below it."""
    *folders, last = name.split("/")
    if {"", ".", ".."} & {*folders, last} or "\0" in name:
        raise ValueError(name)
    follow_none = getattr(os, "O_NOFOLLOW", 0)
    place = os.open(root, os.O_RDONLY)
    try:
        for folder in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | follow_none
            inner = os.open(folder, flags, dir_fd=place)
            os.close(place)
            place = inner
        with _storage.open_regular(last, most=_MAX_PHOTO_BYTES, dir_fd=place) as file:
            return file.read(_MAX_PHOTO_BYTES)
    finally:
        os.close(place)


# Server -------------------------------------------------------------------------------


class ReviewServer(http.server.ThreadingHTTPServer):
    """Serves one run; the page is rendered once, when the server is made."""

    daemon_threads = True

    def __init__(self, record: RunRecord, *, port: int | None = None):
        self.record = record
        self.token = secrets.token_urlsafe(32)
        self.live_error: str | None = None
        try:
            self._live: LiveAudit | None = LiveAudit(record)
        except DataError as error:
            self._live = None
            self.live_error = f"The order stays as it is: {error}"
        self._turn = threading.Lock()
        page = rendered(
            record,
            served=True,
            token=None if self._live is None else self.token,
            message=self.live_error,
        )
        self.page = page.encode("utf-8")
        record.thumbnail_index  # noqa: B018 -- Read before threads ask for it.
        record.preview_index  # noqa: B018
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

    @property
    def missing(self) -> list[str]:
        """Says what the review has to do without."""
        found = [] if self.live_error is None else [self.live_error]
        if self.record.kind == IMAGES and not self.photos:
            data = self.record.config.get("data")
            found.append(f"No files of {data} are found here: thumbnails are shown.")
        return found

    @functools.cached_property
    def photos(self) -> Photos:
        return Photos(self.record)

    def order(self, question: Any) -> dict[str, Any]:
        """Answers what is left to review, by the decisions of a page."""
        decided = self._decided(question)
        if self._live is None:
            return {"message": self.live_error}
        with self._turn:
            try:
                return self._live(decided)
            except (DataError, OSError, ValueError) as error:
                return {"message": f"The labels could not be audited again: {error}"}

    def _decided(self, question: Any) -> Decided:
        ids, classes = set(self.record.ledger.ids), len(self.record.class_names)
        decided: Decided = {}
        for sample_id, label in question["decided"].items():
            whole = isinstance(label, int) and not isinstance(label, bool)
            if label is not None and not (whole and 0 <= label < classes):
                raise ValueError(label)
            if sample_id in ids:
                decided[sample_id] = label
        return decided

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
        if not self._is_own_host():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"Unknown host.\n")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif (picture := self._picture()) is not None:
            self._answer(HTTPStatus.OK, "image/jpeg", picture)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"Not found.\n")

    do_HEAD = do_GET  # noqa: N815 -- The names that the library asks for.

    def do_POST(self) -> None:
        """Sorts the samples anew; nothing on this machine is changed."""
        self.close_connection = True  # What was not read must not be the next request.
        if self.path != "/order":
            self._answer(HTTPStatus.NOT_IMPLEMENTED, "text/plain", b"Not here.\n")
        elif not self._is_own_page():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"Unknown page.\n")
        elif (question := self._question()) is None:
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", b"Not understood.\n")
        else:
            try:
                answer = self.server.order(question)
            except (LookupError, TypeError, ValueError, AttributeError):
                self._answer(HTTPStatus.BAD_REQUEST, "text/plain", b"Not understood.\n")
                return
            body = json.dumps(answer, allow_nan=False).encode()
            self._answer(HTTPStatus.OK, "application/json", body)

    def _is_own_host(self) -> bool:
        own = [f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")]
        return self.headers.get("Host") in own

    def _is_own_page(self) -> bool:
        """Whether this server's own page asks: it alone knows the token."""
        token = self.headers.get(TOKEN_HEADER, "").encode("utf-8", "replace")
        origin = self.headers.get("Origin")
        return (
            self._is_own_host()
            and origin in (None, f"http://{self.headers['Host']}")
            and hmac.compare_digest(token, self.server.token.encode())
        )

    def _question(self) -> Any:
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get("Content-Type")
        short = length.isascii() and length.isdigit() and len(length) < 10
        if not short or int(length) > _MAX_QUESTION_BYTES or kind != "application/json":
            return None
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None

    def _picture(self) -> bytes | None:
        match, record = _PICTURE.fullmatch(self.path), self.server.record
        ids = record.ledger.ids
        if match is None or int(match[2]) >= len(ids):
            return None
        sample_id = ids[int(match[2])]
        if match[1] == "thumbnails":
            return record.thumbnail(sample_id)
        photo = self.server.photos.jpeg(sample_id)
        return photo or record.preview(sample_id) or record.thumbnail(sample_id)

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
