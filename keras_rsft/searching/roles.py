"""Which part a process has in a search: alone, chief or worker.

Keras Tuner's own environment variables say so. Imports nothing heavy, so that a
mistake in them is told before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from keras_rsft.errors import InvalidArgument

TUNER_ID = "KERASTUNER_TUNER_ID"
ORACLE_HOST = "KERASTUNER_ORACLE_IP"
ORACLE_PORT = "KERASTUNER_ORACLE_PORT"
# Tells a worker which process started it, and that it must not outlive it.
PARENT_VARIABLE = "KERAS_RSFT_PARENT"


@dataclasses.dataclass(frozen=True)
class Role:
    """The part of one process.

    Attributes:
        tuner_id: Its name; the chief's contains "chief". None: it searches alone.
        host: Where the chief listens. Default: this machine.
        port: The chief's port; 0: any that is free.
    """

    tuner_id: str | None = None
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def is_chief(self) -> bool:
        """Whether it hands out the trials and keeps their results."""
        return self.tuner_id is not None and "chief" in self.tuner_id

    @property
    def is_worker(self) -> bool:
        """Whether it trains what the chief hands out."""
        return self.tuner_id is not None and not self.is_chief

    @property
    def address(self) -> str:
        """The chief's host and port."""
        return f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Crew:
    """Workers that a chief starts on its own machine.

    Attributes:
        count: How many, at least 1.
        command: Program and arguments of one of them; the environment says which.
    """

    count: int
    command: tuple[str, ...]


def role_of(environment: Mapping[str, str] = os.environ) -> Role:
    """Returns the part that the environment asks for.

    Raises:
        InvalidArgument: If only some of the three variables are set, or the port is
            no port.
    """
    names = (ORACLE_HOST, ORACLE_PORT, TUNER_ID)
    given = {name: environment.get(name, "") for name in names}
    if ORACLE_HOST not in environment and ORACLE_PORT not in environment:
        return Role()
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise InvalidArgument(
            "The environment says that this process is one of several, but does not "
            f"set {' and '.join(missing)}. A search with chief and workers needs "
            f"{', '.join(names)}; a search alone none of them."
        )
    port = given[ORACLE_PORT]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InvalidArgument(
            f"{ORACLE_PORT} must be a port, from 1 to 65535. Received: {port!r}."
        )
    return Role(given[TUNER_ID], given[ORACLE_HOST], int(port))
