"""What a part of the demo does again and again from a thread of its own.

Invariant: what is under way when it is closed is finished before `close` returns, and nothing follows.
"""

from collections.abc import Callable
from threading import Event, Thread


class Repeating:
    """Runs `act` each `interval_seconds` from `start` to `close`; the first time one interval after `start`."""

    def __init__(self, name: str, act: Callable[[], object], interval_seconds: float) -> None:
        self._name = f"demo-{name}"
        self._act = act
        self._interval_seconds = interval_seconds
        self._closing = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; nothing when it does not run."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        while not self._closing.wait(self._interval_seconds):
            self._act()
