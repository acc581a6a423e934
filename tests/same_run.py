"""Says whether two runs are equal: weights, optimizers, tables and thumbnails."""

import numpy as np

FILES = (
    "metrics.csv", "ledger.csv", "acceptance_by_class.csv", "samples.csv",
    "loss_histograms.csv", "near_duplicates.csv", "thumbnails.bin", "thumbnails.csv",
)  # fmt: skip


def assert_same_run(one, other):
    for mine, theirs in ((one.model, other.model), (one.head, other.head)):
        for a, b in zip(mine.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
    slots = zip(
        one.head.optimizer.variables, other.head.optimizer.variables, strict=True
    )
    for a, b in slots:
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert one.history.keys() == other.history.keys()
    for name, values in one.history.items():  # NaN is equal to NaN.
        np.testing.assert_array_equal(values, other.history[name], err_msg=name)
    assert one.against_plain == other.against_plain
    for name in FILES:
        contents = [(run.folder / name).read_bytes() for run in (one, other)]
        assert contents[0] == contents[1], name
