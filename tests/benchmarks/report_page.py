"""How large a report is, how long it takes to make, and how long to open.

Runs of made samples, 100 classes, thumbnails as large as a photo's. Opening is timed
in an installed Chromium, from the request to the first picture drawn, for the file
and for the page of `keras-rsft review --serve`. Columns: megabytes of the file,
seconds to make it, seconds to open the file, seconds to open the served page.

    python tests/benchmarks/report_page.py [--counts 1000 50000 100000]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_run import made_run
from playwright.sync_api import Browser, sync_playwright

from keras_rsft.report._page import write_report
from keras_rsft.report._record import read_run
from keras_rsft.report._server import ReviewServer

CLASSES = tuple(f"class {number:03}" for number in range(100))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


def seconds_to_open(browser: Browser, url: str) -> float:
    """Returns the better of three tries, each in a fresh profile."""
    times = []
    for _ in range(3):
        context = browser.new_context()
        page = context.new_page()
        start = time.perf_counter()
        page.goto(url, wait_until="commit")
        picture = page.locator("#grid .card img").first
        picture.evaluate("image => { image.scrollIntoView(); return image.decode(); }")
        times.append(time.perf_counter() - start)
        context.close()
    return min(times)


def measure(browser: Browser, count: int, root: Path) -> list[float]:
    """Returns megabytes, and seconds to make, open, and open served."""
    folder = made_run(
        root / str(count), count=count, classes=CLASSES, epochs=30, picture_side=96
    )
    start = time.perf_counter()
    page = write_report(folder)
    made = time.perf_counter() - start
    opened = seconds_to_open(browser, page.as_uri())
    with ReviewServer(read_run(folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        served = seconds_to_open(browser, server.url)
        server.shutdown()
        thread.join()
    return [page.stat().st_size / 1e6, made, opened, served]


def main() -> None:
    """Prints a row for each number of samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 50000, 100000])
    counts = parser.parse_args().counts
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit(f"No browser is installed; looked for {', '.join(BROWSERS)}.")
    print(f"{'samples':>9}{'MB':>8}{'make s':>9}{'open s':>9}{'served s':>10}")
    with sync_playwright() as running, tempfile.TemporaryDirectory() as root:
        browser = running.chromium.launch(executable_path=found, args=list(OPTIONS))
        for count in counts:
            size, *times = measure(browser, count, Path(root))
            row = f"{count:>9,}{size:>8.2f}"
            print(row + "".join(f"{t:>9.2f}" for t in times), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
