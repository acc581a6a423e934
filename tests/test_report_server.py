"""The local server: all samples, and nothing else, to nobody else."""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from made_run import made_run, write_features
from PIL import Image

from keras_rsft.cli import main
from keras_rsft.errors import InvalidArgument
from keras_rsft.report._record import read_run
from keras_rsft.report._server import ReviewServer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("served") / "run")


@contextlib.contextmanager
def serving(record):
    with ReviewServer(record) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(run_folder):
    with serving(read_run(run_folder)) as server:
        yield server


def post(server, question, **changed):
    """Asks as the page does, but for the headers that are changed or left out."""
    body = json.dumps(question).encode()
    own = f"127.0.0.1:{server.server_port}"
    headers = {
        "Host": own, "Origin": f"http://{own}", "X-Review-Token": server.token,
        "Content-Type": "application/json", "Content-Length": str(len(body)),
    } | changed  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/order", skip_host=True)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def ask(server, path, *, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host=True)
        if host != "":
            connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_the_page_and_every_picture(server, run_folder):
    status, headers, body = ask(server, "/")
    assert status == 200
    assert headers["X-Frame-Options"] == "DENY"
    assert b"All 40 samples" in body
    record = read_run(run_folder)
    for row, name in enumerate(record.samples.ids):
        status, headers, body = ask(server, f"/thumbnails/{row}")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        assert body == record.thumbnail(name)


def test_head_has_no_body(server):
    status, headers, body = ask(server, "/", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    "path",
    [
        "/thumbnails/40",
        "/thumbnails/-1",
        "/thumbnails/0x1",
        "/thumbnails/%30",
        "/thumbnails/../ledger.csv",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/ledger.csv",
        "/model.keras",
        "/?x",
        "http://example.com/",
    ],
)
def test_nothing_else_is_there(server, path):
    assert ask(server, path)[0] in (400, 404)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "[::1]"],
)
def test_a_foreign_host_is_refused(server, host):
    for path in ("/", "/thumbnails/0"):
        status, _, body = ask(server, path, host=host.format(port=server.server_port))
        assert status == 403
        assert b"training" not in body


def test_localhost_is_this_machine(server):
    assert ask(server, "/", host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(server, method):
    assert ask(server, "/", method=method)[0] == 501


def test_a_visitor_who_leaves_early_is_no_error(server, capfd):
    for _ in range(5):
        visitor = socket.create_connection(("127.0.0.1", server.server_port), timeout=5)
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        host = f"Host: 127.0.0.1:{server.server_port}"
        visitor.sendall(f"GET / HTTP/1.1\r\n{host}\r\n\r\n".encode())
        visitor.close()  # With a reset, while the page is being written.
    assert ask(server, "/")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


class TestPhotos:
    """The user's own files: those listed, no link, decoded and encoded again."""

    @pytest.fixture(scope="class")
    @classmethod
    def photos(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("photos")
        ids = (
            "cat/big.png",
            "cat/link.jpg",
            "linked/in.png",
            "cat/no.png",
            "../up.png",
        )
        ids += ("cat/pipe.png", "cat/unlisted.png", "/etc/x.png", "cat//big.png")
        folder = made_run(root / "run", ids=ids, count=12)
        data = root / "data"
        (data / "cat").mkdir(parents=True)
        picture = Image.new("RGB", (2000, 1000), (200, 30, 30))
        for path in (
            data / "cat" / "big.png",
            data / "cat" / "unlisted.png",
            root / "up.png",
            root / "out" / "in.png",
        ):
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        (data / "cat" / "no.png").write_bytes(b"no picture")
        (data / "cat" / "link.jpg").symlink_to(data / "cat" / "big.png")
        (data / "linked").symlink_to(root / "out")
        os.mkfifo(data / "cat" / "pipe.png")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"data": str(data)}))
        rows = (folder / "samples.csv").read_text().splitlines()
        kept = [row for row in rows if "unlisted" not in row]
        (folder / "samples.csv").write_text("\n".join(kept) + "\n")
        with serving(read_run(folder)) as server:
            yield server

    def test_a_photo_is_made_small_and_new(self, photos):
        row = photos.record.ledger.ids.index("cat/big.png")
        status, headers, body = ask(photos, f"/photos/{row}")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        image = Image.open(io.BytesIO(body))
        assert (image.format, image.size) == ("JPEG", (1024, 512))
        assert np.abs(np.array(image)[0, 0] - np.array([200, 30, 30])).max() < 8

    @pytest.mark.parametrize(
        "name",
        ["cat/link.jpg", "linked/in.png", "cat/no.png", "../up.png", "cat/pipe.png",
         "cat/unlisted.png", "/etc/x.png", "cat//big.png", "000000.png"],
    )  # fmt: skip
    def test_else_the_thumbnail_is_shown(self, photos, name):
        row = photos.record.ledger.ids.index(name)
        status, _, body = ask(photos, f"/photos/{row}")
        assert (status, body) == (200, photos.record.thumbnail(name))

    def test_it_says_what_is_missing(self, photos, server):
        assert len(photos.missing) == 1  # The features.
        assert server.missing[0].startswith("The order stays as it is")
        assert server.missing[1] == (
            "No files of <b>photos</b> are found here: thumbnails are shown."
        )

    def test_a_foreign_host_sees_none(self, photos):
        assert ask(photos, "/photos/0", host="evil.example")[0] == 403
        assert ask(photos, "/photos/12")[0] == 404


class TestOrder:
    """The one question that a page may ask."""

    @pytest.fixture(scope="class")
    @classmethod
    def live(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("live")
        folder = made_run(root / "run", count=90)
        write_features(folder, root / "cache")
        with serving(read_run(folder)) as server:
            yield server

    def test_what_is_left_comes_back_in_order(self, live):
        decided = {live.record.ledger.ids[0]: 1, "unknown": 0}
        status, headers, body = post(live, {"decided": decided})
        assert (status, headers["Content-Type"]) == (200, "application/json")
        answer = json.loads(body)
        assert sorted(answer["samples"]["row"]) == list(range(1, 90))
        assert answer["expected"] > 5

    @pytest.mark.parametrize(
        "changed",
        [
            {"X-Review-Token": None},
            {"X-Review-Token": "x" * 43},
            {"X-Review-Token": "\u00e9"},
            {"Host": "evil.example"},
            {"Host": "localhost:1"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "https://127.0.0.1"},
        ],
    )
    def test_another_page_is_refused(self, live, changed):
        status, headers, body = post(live, {"decided": {}}, **changed)
        assert (status, body) == (403, b"Unknown page.\n")
        assert "Access-Control-Allow-Origin" not in headers

    @pytest.mark.parametrize(
        "question, changed",
        [
            ({}, {}),
            ([], {}),
            ({"decided": [1]}, {}),
            ({"decided": {"000000.png": 3}}, {}),
            ({"decided": {"000000.png": -1}}, {}),
            ({"decided": {"000000.png": True}}, {}),
            ({"decided": {"000000.png": "1"}}, {}),
            ({"decided": {}}, {"Content-Type": "text/plain"}),
            ({"decided": {}}, {"Content-Length": "999999999999"}),
            ({"decided": {}}, {"Content-Length": "-1"}),
            ({"decided": {}}, {"Content-Length": None}),
        ],
    )
    def test_what_is_no_question(self, live, question, changed):
        assert post(live, question, **changed)[0] == 400

    def test_the_page_has_the_token_and_may_ask(self, live):
        page = ask(live, "/")[2].decode()
        assert live.token in page
        assert "connect-src &#39;self&#39;" in page

    def test_features_that_are_gone_leave_the_order(self, server):
        page = ask(server, "/")[2].decode()
        assert "The order stays as it is" in page
        assert server.token not in page
        assert "connect-src" not in page
        status, _, body = post(server, {"decided": {}})
        assert (status, "stays as it is" in json.loads(body)["message"]) == (200, True)


def test_only_this_machine_can_reach_it(server):
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use(server, run_folder):
    with pytest.raises(InvalidArgument, match="--port"):
        ReviewServer(read_run(run_folder), port=server.server_port)


def test_ctrl_c_stops_it_cleanly(run_folder):
    command = [sys.executable, "-m", "keras_rsft.cli", "review", str(run_folder)]
    process = subprocess.Popen(
        [*command, "--serve", "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A shell's background jobs ignore it, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "Stopped." in out


class TestCommand:
    def test_it_prints_where_the_page_is(self, tmp_path, capsys):
        folder = made_run(tmp_path / "run")
        assert main(["review", str(folder), "--no-browser"]) == 0
        page = folder / "report.html"
        assert capsys.readouterr().out.strip() == str(page)
        whole = page.read_text(encoding="utf-8")
        page.write_text(f"{whole}<script>theirs()</script>", encoding="utf-8")
        assert main(["review", str(folder), "--no-browser"]) == 0
        assert page.read_text(encoding="utf-8") == whole

    def test_a_folder_that_cannot_be_written_to(self, tmp_path, capsys, monkeypatch):
        def refused(*_):
            raise OSError(errno.EROFS, "Read-only file system")

        folder = made_run(tmp_path / "run")
        monkeypatch.setattr("keras_rsft._storage._file_beside", refused)
        assert main(["review", str(folder), "--no-browser"]) == 2
        assert "Use `--serve`" in capsys.readouterr().err

    def test_for_programs(self, tmp_path, capsys):
        folder = made_run(tmp_path / "a run")
        page = folder / "report.html"
        assert main(["review", str(folder), "--no-browser", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "command": "review",
            "folder": str(folder),
            "page": str(page),
            "url": page.as_uri(),
        }
        assert main(["review", str(folder), "--no-browser", "--quiet"]) == 0
        assert capsys.readouterr().out == f"{page}\n"

    def test_the_server_for_programs(self, run_folder):
        command = [sys.executable, "-m", "keras_rsft.cli", "review", str(run_folder)]
        process = subprocess.Popen(
            [*command, "--serve", "--no-browser", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        lines = [process.stdout.readline() for _ in range(6)]
        answer = json.loads("".join(lines))
        port = int(answer["url"].removesuffix("/").rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err, answer["page"]) == (0, "", "", None)

    def test_the_browser_is_opened(self, tmp_path, monkeypatch):
        opened = []
        monkeypatch.setattr("webbrowser.open", opened.append)
        folder = made_run(tmp_path / "run")
        assert main(["review", str(folder)]) == 0
        assert opened == [(folder / "report.html").as_uri()]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "Expected a run folder"),
            (["--port", "8000"], "`--port` goes with `--serve`"),
        ],
    )
    def test_refused(self, tmp_path, capsys, arguments, message):
        assert main(["review", str(tmp_path), "--no-browser", *arguments]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("port", ["70000", "x", "-1"])
    def test_no_port(self, tmp_path, port):
        with pytest.raises(SystemExit) as stopped:
            main(["review", str(tmp_path), "--serve", "--port", port])
        assert stopped.value.code == 2
