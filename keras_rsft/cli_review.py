"""The command `review`: opens a run's page in the browser, or serves it.

Like `cli.py`, imports nothing heavy until the command runs; TensorFlow not even then.
"""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from keras_rsft.cli_options import parsed
from keras_rsft.errors import InvalidArgument
from keras_rsft.run_files import REPORT_FILE


def add_review(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    review = commands.add_parser(
        "review", help="look at a run and mend its labels in the browser"
    )
    review.add_argument("run", metavar="RUN", help="folder of a run or of a search")
    review.add_argument(
        "--serve",
        action="store_true",
        help="show all samples, from a server that only this machine can reach",
    )
    review.add_argument(
        "--port", type=port_number, help="of --serve; default: a free one"
    )
    review.add_argument(
        "--rebuild", action="store_true", help="write report.html anew if it is there"
    )
    review.add_argument(
        "--no-browser",
        dest="browser",
        action="store_false",
        help="open nothing; print where the page is",
    )


def port_number(text: str) -> int:
    """Parses a port."""
    return parsed(
        text, int, lambda value: 0 <= value < 2**16, "a whole number in [0, 65535]"
    )


def run_review(arguments: argparse.Namespace) -> None:
    """Opens the page of a run.

    Raises:
        InvalidArgument: If the folder is not a run's, or options do not fit.
        DataError: If a file of the run cannot be understood.
    """
    if arguments.port is not None and not arguments.serve:
        raise InvalidArgument("`--port` goes with `--serve`. Add it, or leave it out.")
    folder = Path(arguments.run)
    if arguments.serve:
        _serve(folder, port=arguments.port or 0, browser=arguments.browser)
        return
    page = folder / REPORT_FILE
    if arguments.rebuild or not page.is_file():
        from keras_rsft.report import write_report

        page = write_report(folder)
    print(page.absolute())
    if arguments.browser:
        webbrowser.open(page.absolute().as_uri())


def _serve(folder: Path, *, port: int, browser: bool) -> None:
    from keras_rsft.report.run_record import read_run
    from keras_rsft.report.server import ReviewServer

    record = read_run(folder)
    if record.is_search:
        raise InvalidArgument(
            f"{folder} is a search, which has no samples to review. Leave out "
            "`--serve` to see its report."
        )
    with ReviewServer(record, port=port) as server:
        try:  # From the first word on, or an early Ctrl-C looks like a failure.
            print(f"{server.url}  (Ctrl-C stops the server)", flush=True)
            if browser:
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            print("Stopped.")
