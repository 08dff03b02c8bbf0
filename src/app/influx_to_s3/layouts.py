"""Which window length, format and date format hold when: a change of settings takes effect at the next UTC day.

Invariant: a window is cut and named by the layout of its start, so what was written under one layout is never sought
under another, and no window spans two layouts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from app.core.window import EPOCH, Window, next_midnight, windows_between
from app.stores.layouts import Layout


class LayoutStore(Protocol):
    """Where layouts are remembered."""

    def layouts(self, pipeline: str) -> Sequence[Layout]:
        """Oldest first."""

    def add_layout(self, pipeline: str, layout: Layout) -> None:
        """Idempotent; one that is to come is replaced."""


def next_layout(known: Sequence[Layout], wanted: Layout, now: datetime) -> Layout | None:
    """The layout that has to be added so that `wanted` holds from the next day on; None when it does already."""
    if not known:
        return replace(wanted, effective_at=EPOCH)
    if replace(known[-1], effective_at=EPOCH) == replace(wanted, effective_at=EPOCH):
        return None
    return replace(wanted, effective_at=next_midnight(now))


def layout_at(known: Sequence[Layout], instant: datetime) -> Layout:
    """The layout in force at `instant`."""
    return next(layout for layout in reversed(known) if layout.effective_at <= instant or layout is known[0])


def windows(known: Sequence[Layout], start: datetime, end: datetime) -> Iterator[Window]:
    """Every window that overlaps `[start, end)`, oldest first, each of the length in force at its start."""
    for layout, until in zip(known, [*(later.effective_at for later in known[1:]), end], strict=True):
        since = start if layout is known[0] else max(start, layout.effective_at)
        yield from windows_between(since, min(until, end), layout.window_seconds)


class Layouts:
    """The layouts of one pipeline, read at the start of each run and held for its length."""

    def __init__(self, store: LayoutStore, pipeline: str, wanted: Callable[[], Layout]) -> None:
        self._store = store
        self._pipeline = pipeline
        self._wanted = wanted
        self._known: Sequence[Layout] = ()

    def fresh(self) -> "Layouts":
        """The same, not read yet: for a look that must not depend on a run."""
        return Layouts(self._store, self._pipeline, self._wanted)

    def refresh(self, now: datetime, *, dry_run: bool = False) -> None:
        """Read what is known and add what the settings want. A dry run adds nothing, but shows a first layout."""
        known = list(self._store.layouts(self._pipeline))
        added = next_layout(known, self._wanted(), now)
        if added is not None and not dry_run:
            self._store.add_layout(self._pipeline, added)
            known = list(self._store.layouts(self._pipeline))
        self._known = known or ([added] if added else [])

    def at(self, instant: datetime) -> Layout:
        """See `layout_at`."""
        return layout_at(self._known, instant)

    def windows(self, start: datetime, end: datetime) -> Iterator[Window]:
        """See `windows`."""
        return windows(self._known, start, end)
