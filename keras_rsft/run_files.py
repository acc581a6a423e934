"""The names of the files in a run folder, for those who write and who read them.

Imports nothing, so that a run can be looked at without loading TensorFlow.
"""

MODEL_FILE = "model.keras"
HEAD_FILE = "head.keras"
CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"
CLASSES_FILE = "classes.json"
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.csv"
LEDGER_FILE = "ledger.csv"
ACCEPTANCE_FILE = "acceptance_by_class.csv"
HISTOGRAMS_FILE = "loss_histograms.csv"
NEAR_DUPLICATES_FILE = "near_duplicates.csv"
THUMBNAILS_FILE = "thumbnails.bin"
THUMBNAILS_INDEX_FILE = "thumbnails.csv"
TEXTS_FILE = "texts.jsonl"
CORRECTIONS_FILE = "corrections.csv"
REPORT_FILE = "report.html"
SEARCH_FILE = "search.json"
