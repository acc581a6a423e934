"""The errors that a user can cause; the command line tells them from bugs.

Their messages say what was expected, what was received, and what to do.
"""


class InvalidArgument(ValueError):
    """An option has a value that cannot be used (exit status 2)."""


class DataError(ValueError):
    """The data cannot be trained on as it is (exit status 1)."""


class WeightsUnavailable(RuntimeError):
    """Pretrained weights could not be read or downloaded (exit status 1)."""


class TrainingStalled(RuntimeError):
    """Training accepted nothing, so there is no trained model (exit status 1)."""


class WorkerLost(RuntimeError):
    """A worker is gone, so the others cannot continue (exit status 1)."""
