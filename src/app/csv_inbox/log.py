"""The inbox's own log file, as documented: rotating at 1 MB, five kept, at its own level, on the console if wanted.

Invariant: the file is open only while a run goes on; warnings always reach the log of the service as well.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler

from app.csv_inbox.config import InboxConfig

NAME = "app.csv_inbox"
FILE_BYTES, FILES_KEPT = 1_000_000, 5
LINE = "%(asctime)s.%(msecs)03dZ - %(levelname)s - %(message)s"
TIME = "%Y-%m-%dT%H:%M:%S"


class _Onward(logging.Handler):
    """Hands records on to the log of the service: all of them, or what is unexpected."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().handle(record)


@contextmanager
def logged(config: InboxConfig) -> Iterator[None]:
    """Records of the inbox go to its file until the end of the block. Raises OSError when the file cannot be opened."""
    log = logging.getLogger(NAME)
    config.log_file.parent.mkdir(parents=True, exist_ok=True)
    file = RotatingFileHandler(
        config.log_file, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8", delay=True
    )
    lines = logging.Formatter(LINE, TIME)
    lines.converter = time.gmtime  # names in the archive are UTC as well
    file.setFormatter(lines)
    onward = _Onward(logging.NOTSET if config.log_to_console else logging.WARNING)
    held = log.level, log.propagate
    log.setLevel(config.log_level)
    log.propagate = False
    log.addHandler(file)
    log.addHandler(onward)
    try:
        yield
    finally:
        log.setLevel(held[0])
        log.propagate = held[1]
        for handler in (file, onward):
            log.removeHandler(handler)
            handler.close()
