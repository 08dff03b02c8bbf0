"""Which rows the objects of open windows have, as far as this process wrote them: then they need not be read again."""

import threading
from collections import OrderedDict
from datetime import datetime
from typing import Any


class KnownRows:
    """Which rows the objects of open windows have, as far as this process wrote them: a memory that may be lost at any
    time. Bounded: the windows that were written longest ago are forgotten first. From any thread.
    """

    def __init__(self, max_bytes: int = 48 << 20) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._known: OrderedDict[tuple[str, datetime], tuple[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, slot: tuple[str, datetime], version: str, identities: Any) -> None:
        """The object of a window has these rows in this version; None forgets what is known."""
        with self._lock:
            _, before = self._known.pop(slot, ("", None))
            self._size_bytes -= getattr(before, "nbytes", 0)
            if identities is None:
                return
            self._known[slot] = (version, identities)
            self._size_bytes += getattr(identities, "nbytes", 0)
            while self._size_bytes > self._max_bytes:
                _, (_, oldest) = self._known.popitem(last=False)
                self._size_bytes -= getattr(oldest, "nbytes", 0)

    def of(self, slot: tuple[str, datetime], version: str) -> Any:
        """The identities of that very version, None when they are not known."""
        known, identities = self._known.get(slot, ("", None))
        return identities if known == version else None
