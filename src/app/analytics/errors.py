"""What goes wrong in DuckDB and on its disk, told as what the caller should do.

Invariant: only what may be an object's fault is UnreadableObject, which costs a listing and another run; a report that
is wrong, and a disk that is full, are told at once.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from app.core.errors import AppError, Permanent, Transient

MESSAGE_CHARACTERS = 300
RETRY_HINT = "nothing to do: it is read again; if it stays so, look at the object that is named"
FULL = (errno.ENOSPC, errno.EDQUOT)
# By its text, since the class is lost where pyarrow hands an error on.
WRONG = re.compile(
    r"(Binder|Catalog|Parser|Syntax|Permission|Not implemented|Conversion|Out of Range|Divide by Zero|Mismatch Type"
    r"|Invalid type|Invalid Input|Expression|Sequence|Parameter Not \w+) Error: "
)
# What is said of objects' bytes: names of objects end in .parquet, and where none is named, one of these words is.
OF_OBJECTS = re.compile(r"parquet|csv error|corrupt|unicode|string encoding|bitpacked|stats size", re.IGNORECASE)


class UnreadableObject(Transient):
    """An object could not be read, or changed while it was: list again, then read again."""


class Wrong(Permanent):
    """What was to be run cannot be, over whole objects: the report is wrong."""


class TooLarge(Permanent):
    """More memory or disk is needed than there may be."""


class Unbound(Wrong):
    """A name or a type does not fit. Unless objects that changed since they were listed do not fit together."""


@contextmanager
def translated(seconds: float | None) -> Iterator[None]:
    """Every exception of DuckDB as what the caller should do; `seconds` is the limit that holds for it."""
    import duckdb

    try:
        yield
    except (duckdb.Error, UnicodeDecodeError, OSError) as error:
        # UnicodeDecodeError: a message that quotes bytes of a torn read; OSError: what pyarrow makes of DuckDB's errors
        raise _error(error, seconds) from error


@contextmanager
def written() -> Iterator[None]:
    """A disk that is full, told as such; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(str(error)) from error
        raise


def _full(text: str) -> Transient:
    return Transient(f"the disk is full: {text}"[:MESSAGE_CHARACTERS], "make room in DATA_DIR")


def _error(error: Exception, seconds: float | None) -> AppError:
    import duckdb

    said = str(error).split("\n\nLINE ", 1)[0]  # what follows quotes the statement
    text = said.split("\n", 1)[0][:MESSAGE_CHARACTERS]
    if isinstance(error, duckdb.InterruptException) or text.startswith("INTERRUPT"):
        hint = "narrow its parameters, or raise ANALYTICS_TIMEOUT_SECONDS"
        return Transient(f"the report took longer than {seconds or 0:g} s", hint)
    if getattr(error, "errno", None) in FULL or any(os.strerror(number) in said for number in FULL):
        return _full(text)
    if isinstance(error, duckdb.OutOfMemoryException) or text.startswith("Out of Memory"):
        hint = "narrow its parameters, or raise ANALYTICS_MEMORY_MB"
        return TooLarge(f"needs more memory or disk: {text}", hint)
    if isinstance(error, UnicodeDecodeError):
        return UnreadableObject("an object changed while it was read", RETRY_HINT)
    if not WRONG.match(text) or OF_OBJECTS.search(said):
        return UnreadableObject(text, RETRY_HINT)
    return (Unbound if text.startswith("Binder") else Wrong)(text, "correct its SQL file")
