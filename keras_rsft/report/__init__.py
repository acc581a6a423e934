"""A run, as a page to look at and to mend the labels with.

`run_record.py` reads a run folder, `outcome.py` says what came out, `charts.py` turns
numbers into drawings, `gallery.py` picks the samples to show, `page.py` fills the
templates, `server.py` shows the page with all samples on this machine alone.

Everything is made from the run folder: neither TensorFlow nor the images are needed.
"""

from keras_rsft.report.page import write_report

__all__ = ["write_report"]
