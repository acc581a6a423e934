"""Results as a page, in a notebook and as tables, made from folders and results alone.

`run_record.py` reads a run folder, `summary.py` turns results into tables, `charts.py`
numbers into drawings, `gallery.py` picks the samples to show, `page.py` says what came
out and fills the templates, `server.py` shows the page with all samples on this machine
alone, `notebook.py` is for notebooks. Neither TensorFlow nor the images are needed.
"""

from keras_rsft.report.page import write_report

__all__ = ["write_report"]
