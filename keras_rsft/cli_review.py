"""The command `review`: opens a run's page in the browser, or serves it.

Like `cli.py`, imports nothing heavy until the command runs; TensorFlow not even then.
"""

from __future__ import annotations

import argparse
import json
import webbrowser
from pathlib import Path

from keras_rsft._storage import REPORT_FILE
from keras_rsft.cli_options import add_output_options, parsed
from keras_rsft.errors import InvalidArgument


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
        "--port", type=port_number, help="of --serve; default: the run's own"
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
    add_output_options(review)


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
        _serve(folder, arguments)
        return
    page = folder / REPORT_FILE
    if arguments.rebuild or not page.is_file():
        from keras_rsft.report import write_report

        page = write_report(folder)
    page = page.absolute()
    if arguments.json:
        _print_document(folder, page=page, url=page.as_uri())
    else:
        print(page)
    if arguments.browser:
        webbrowser.open(page.as_uri())


def _print_document(folder: Path, *, page: Path | None, url: str) -> None:
    from keras_rsft.cli_documents import json_value, review_document

    document = json_value(review_document(folder.absolute(), page=page, url=url))
    print(json.dumps(document, ensure_ascii=False, indent=2), flush=True)


def _serve(folder: Path, arguments: argparse.Namespace) -> None:
    from keras_rsft.report.run_record import read_run
    from keras_rsft.report.server import ReviewServer, own_port

    record = read_run(folder)
    if record.is_search:
        raise InvalidArgument(
            f"{folder} is a search, which has no samples to review. Leave out "
            "`--serve` to see its report."
        )
    for_person = not (arguments.quiet or arguments.json)
    with ReviewServer(record, port=arguments.port) as server:
        try:  # From the first word on, or an early Ctrl-C looks like a failure.
            if arguments.json:
                _print_document(folder, page=None, url=server.url)
            else:
                note = "  (Ctrl-C stops the server)" if for_person else ""
                print(f"{server.url}{note}", flush=True)
            own = own_port(record)
            if for_person and arguments.port is None and server.server_port != own:
                print(
                    f"Port {own} is taken, so what you decided there is not seen here.",
                    flush=True,
                )
            if arguments.browser:
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            if for_person:
                print("Stopped.")
