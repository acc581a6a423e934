"""The errors that a user can cause, so that the command line can tell them from bugs.

Owns the types only. Each room raises them with a message that says what was
expected, what came and what to do; `cli.py` turns them into an exit status.
"""


class InvalidArgument(ValueError):
    """An option has a value that cannot be used (exit status 2)."""


class DataError(ValueError):
    """The data cannot be trained on as it is (exit status 1)."""


class WeightsUnavailable(RuntimeError):
    """Pretrained weights could not be read or downloaded (exit status 1)."""


class TrainingStalled(RuntimeError):
    """Training accepted nothing, so there is no model to speak of (exit status 1)."""


class WorkerLost(RuntimeError):
    """A worker does not do its part, so the others cannot go on (exit status 1)."""
