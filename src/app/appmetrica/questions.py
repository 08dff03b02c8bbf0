"""What AppMetrica is asked for. The question is the name of the file upstream, so it is made once and kept as it is.

Invariant: the same wish gives the same text, and the text alone is enough to ask again, after a restart or elsewhere.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from app.core.window import Window

FILE = Path(__file__).with_name("resources.toml")
SECOND = timedelta(seconds=1)
LOCAL = "%Y-%m-%d %H:%M:%S"
COLUMN = re.compile(r"[a-z][a-z0-9_]{0,80}")


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of rows. `received` "" = its rows do not say when they were received."""

    name: str
    columns: tuple[str, ...]
    received: str


@lru_cache(maxsize=1)
def resources() -> Mapping[str, Resource]:
    """All that can be asked for, by name."""
    listed = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: Resource(name, tuple(each["columns"].split()), each.get("received", "")) for name, each in listed.items()
    }


@dataclass(frozen=True, slots=True)
class Wish:
    """Rows of a resource between two instants of the application's own clock, both included."""

    application_id: int
    resource: str
    since: str
    until: str
    columns: Sequence[str]
    by_receipt: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A wish as it is kept. `span`: the hours that it is for, None when a person asked."""

    path: str
    span: Window | None = None

    @property
    def text(self) -> str:
        """What is kept."""
        span = [self.span.start.isoformat(), self.span.end.isoformat()] if self.span else None
        return json.dumps({"path": self.path, "span": span})

    @property
    def resource(self) -> str:
        """What is asked for."""
        return self.path.partition(".csv")[0].rpartition("/")[2]

    @property
    def columns(self) -> Sequence[str]:
        """The columns, in the order of the answer."""
        return self.path.rpartition("&fields=")[2].split(",")

    def part(self, number: int, count: int) -> str:
        """The path of one of several parts; of a file in one piece, the path itself."""
        return self.path if count == 1 else f"{self.path}&parts_count={count}&part_number={number}"


def question(wish: Wish, span: Window | None = None) -> Question:
    """The question of a wish. `fields` is last, since it is what an answer is read by."""
    given = {
        "application_id": wish.application_id,
        "date_since": wish.since,
        "date_until": wish.until,
        "date_dimension": "receive" if wish.by_receipt else "default",
        "use_utf8_bom": "false",
        "fields": ",".join(wish.columns),
    }
    query = urlencode(given, quote_via=quote, safe=",:")
    return Question(f"/logs/v1/export/{wish.resource}.csv?{query}", span)


def question_of(text: str) -> Question:
    """What was kept."""
    held = json.loads(text)
    span = held["span"]
    return Question(held["path"], Window(*(datetime.fromisoformat(each) for each in span)) if span else None)


def received_in(application_id: int, resource: Resource, span: Window, zone: ZoneInfo) -> Question:
    """All rows that were received in whole hours, and perhaps more: where clocks go back, two hours have one name."""
    since, until = local(span.start, zone), local(span.end - SECOND, zone)
    return question(Wish(application_id, resource.name, since, until, resource.columns, by_receipt=True), span)


def local(instant: datetime, zone: ZoneInfo) -> str:
    """An instant as the application's clock shows it."""
    return instant.astimezone(UTC).astimezone(zone).strftime(LOCAL)
