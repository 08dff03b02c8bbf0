"""What an export is: a zip of gzip files of NDJSON, several for an hour, none for an hour without events.

Invariants: members come in the order of their hours, as numbers, whatever their names sort like; no name of a member is
ever used as a path; whatever is wrong with the file is one of our errors.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import BinaryIO, TypeVar, cast

from app.core.errors import Permanent, Transient
from app.core.window import Window

NAME = re.compile(r"_(\d{4})-(\d\d)-(\d\d)_(\d{1,2})#(\d+)\.json\.gz$")
HOUR = timedelta(hours=1)
T = TypeVar("T")
AGAIN = "nothing to do: the export is fetched again"


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One gzip file of the hour that starts at `hour_at`."""

    hour_at: datetime
    part: int
    name: str


class Archive:
    """An export that lies in a file. Use it inside `opened`."""

    def __init__(self, archive: zipfile.ZipFile, span: Window) -> None:
        self._archive = archive
        self.span = span

    def hours(self) -> Mapping[datetime, Sequence[Member]]:
        """Every hour of the span, oldest first, with its members in order. Permanent for a name of another form."""
        found: dict[datetime, list[Member]] = {}
        at = self.span.start
        while at < self.span.end:
            found[at] = []
            at += HOUR
        for member in sorted(_member(info.filename) for info in self._archive.infolist() if not info.is_dir()):
            if member.hour_at not in found:
                raise Permanent(
                    f"the export of {self.span} holds {member.name!r}, which is of another time",
                    "check AMPLITUDE_BASE_URL: the service does not answer what was asked",
                )
            found[member.hour_at].append(member)
        return found

    @contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        """The member's bytes, which are gzip; its checksum is compared at the end."""
        with read_errors(), readable(lambda: self._archive.open(member.name)) as stream:
            yield cast("BinaryIO", stream)


@contextmanager
def opened(file: BinaryIO, span: Window) -> Iterator[Archive]:
    """The export in `file`. Raises Transient when it is no zip, or not a whole one."""
    with read_errors():
        archive = readable(lambda: zipfile.ZipFile(file))
    with archive:
        yield Archive(archive, span)


@contextmanager
def read_errors() -> Iterator[None]:
    """What reading a broken zip raises, as ours."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise Transient(f"the export is no whole zip: {error or type(error).__name__}", AGAIN) from error


def readable(opening: Callable[[], T]) -> T:
    """What opening a zip or an entry of one gives. Raises Permanent for a kind of zip that zipfile lacks."""
    try:
        return opening()
    except RuntimeError as error:  # zipfile: of encryption, and of versions and methods of packing
        raise Permanent(f"the export is a zip of a kind that cannot be read: {error}", "please report it") from error


def _member(name: str) -> Member:
    found = NAME.search(name)
    try:
        year, month, day, hour, part = map(int, found.groups() if found else ())
        return Member(datetime(year, month, day, hour, tzinfo=UTC), part, name)
    except ValueError as error:
        raise Permanent(
            f"a member of the export is named {name[:120]!r}, which tells no hour",
            "days before 2014-11-12 cannot be exported; else please report it",
        ) from error
