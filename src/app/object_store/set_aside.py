"""Rows set aside by runs, kept next to the data: one object per window or unit and reason, below a folder `_set_aside`.

Invariants: the same rows get the same name, so a repeat writes nothing; no object grows beyond the limit, the rest is
only counted; a store that cannot be written never fails the run. The leading underscore of the folder keeps pandas,
Spark and DuckDB from reading these objects as data.
"""

import hashlib
import io
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import BinaryIO
from urllib.parse import quote

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.core.ledger import KeptFile, SetAside, sampled
from app.core.runs import Run
from app.object_store.port import ObjectInfo, ObjectStore, PutRequest

FOLDER = "_set_aside"
LINES = "text/plain; charset=utf-8"
NDJSON = "application/x-ndjson"
CSV = "text/csv; charset=utf-8"
JSON = "application/json"
ZIP = "application/zip"
SUFFIXES = {LINES: ".txt", NDJSON: ".ndjson", CSV: ".csv", JSON: ".json", ZIP: ".zip"}
BY_LINE = (LINES, NDJSON)

MAX_BYTES = 16 << 20
MAX_PART_CHARACTERS = 120
MAX_NAME_CHARACTERS = 500
READ_BYTES = 1 << 20
ATTEMPTS = 3
REST_SECONDS = 30.0
CLOCKS_APART = timedelta(seconds=2)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SetAsideResult:
    """The result of setting rows aside: `number` in total, `new` of them for the first time.

    `key` names the object that holds them; "" = the store could not be written: they are only counted, and all count as
    new since that cannot be checked.
    """

    reason: str
    number: int
    new: int
    sample: str
    key: str

    @property
    def entry(self) -> SetAside:
        """The ledger entry for this."""
        return SetAside(self.reason, self.number, self.new, sampled(self.sample))


@dataclass(frozen=True, slots=True)
class _Content:
    """The bytes to keep. `digest` covers the whole content, `is_cut` when `body` is only its beginning."""

    body: bytes
    digest: str
    is_cut: bool


def folder_of(start: str) -> str:
    """The folder below `start`, an export's prefix or a pipeline's name; "" = at the store's root."""
    return f"{start}/{FOLDER}" if start else FOLDER


class SetAsideStore:
    """One pipeline's folder. Thread-safe. `monotonic` gives seconds."""

    def __init__(
        self,
        store: ObjectStore,
        folder: str,
        max_bytes: int = MAX_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if folder.rpartition("/")[2] != FOLDER:
            raise ValueError(f"{folder!r} does not end with {FOLDER}: a sweep would delete other objects")
        self._store = store
        self._folder = folder
        self._max_bytes = max_bytes
        self._monotonic = monotonic
        self._resting_until = float("-inf")

    def keep(
        self,
        name: str | tuple[str, ...],
        content: bytes | BinaryIO,
        *,
        content_type: str,
        reason: str,
        number: int,
        sample: str = "",
    ) -> SetAsideResult:
        """Keep `content`: `number` values, in the ledger's unit, that were set aside for `reason`.

        `name` identifies the window or unit, in one or several parts; it may contain any text. `reason` is one of a few
        fixed texts. LINES and NDJSON are kept line by line: existing lines stay, only missing lines are added, and
        those count as new. Content of other types replaces the object. Raises only what reading `content` raises. After
        a failure the store is not used for half a minute, so that an unresponsive store does not delay the run at each
        window.
        """
        key = self.key_of(name, content_type=content_type, reason=reason)
        given = _read(content, self._max_bytes, by_line=content_type in BY_LINE)
        # An unresponsive store would cost its timeout at each window, so it is skipped for a while after a failure.
        if self._monotonic() >= self._resting_until:
            try:
                return SetAsideResult(
                    reason, number, self._write(key, given, content_type, reason, number), sample, key
                )
            except (Transient, Permanent, Rejected) as error:
                self._resting_until = self._monotonic() + REST_SECONDS
                log.warning("%s cannot be written: rows set aside (%s) are only counted: %s", key, reason, error)
        return SetAsideResult(reason, number, number, sample, "")

    def holds(self, name: str) -> bool:
        """True when something is kept under a name whose first part is `name`. Raises what the store raises."""
        part = _shortened(_encoded(name), MAX_PART_CHARACTERS)
        return any(True for _ in self._store.list(f"{self._folder}/{part}/"))

    def key_of(self, name: str | tuple[str, ...], *, content_type: str, reason: str) -> str:
        """The key of the object that `keep` writes. Different names have different keys."""
        parts = (name,) if isinstance(name, str) else name
        path = "/".join(_shortened(_encoded(part), MAX_PART_CHARACTERS) for part in parts)
        why = re.sub(r"[^a-z0-9]+", "-", reason.lower()).strip("-")
        suffix = SUFFIXES.get(content_type, ".bin")
        return f"{self._folder}/{_shortened(path, MAX_NAME_CHARACTERS)}.{why[:MAX_PART_CHARACTERS]}{suffix}"

    def sweep(self, before: datetime) -> int:
        """Delete the folder's objects last modified before `before`; returns how many. Raises what the store raises."""
        old = [info.key for info in self._store.list(f"{self._folder}/") if info.modified_at < before]
        for key in old:
            self._store.delete(key)
        return len(old)

    def kept_by(self, run: Run) -> Sequence[KeptFile]:
        """The objects last written during a run, by key. Raises what the store raises."""
        since, start = run.started_at - CLOCKS_APART, len(self._folder) + 1
        until = (run.ended_at or datetime.max.replace(tzinfo=UTC) - CLOCKS_APART) + CLOCKS_APART
        infos = self._store.list(f"{self._folder}/")
        return [KeptFile(i.key[start:], i.size_bytes, i.key) for i in infos if since <= i.modified_at <= until]

    def _write(self, key: str, given: _Content, content_type: str, reason: str, number: int) -> int:
        """Write what the object does not hold yet; returns how much is new. Raises what the store raises."""
        attempts_left = ATTEMPTS
        while True:
            there = self._store.head(key)
            if there is not None and there.metadata.get("digest") == given.digest:
                return 0
            try:
                if there is not None and content_type in BY_LINE:
                    return self._add(there, given, PutRequest(content_type), reason, number)
                expected, before = (there.etag, there.number("number") or 0) if there else ("", 0)
                put = PutRequest(content_type, _metadata(given, reason, number), expected)
                self._store.put(key, io.BytesIO(given.body), put)
                return max(number - before, 0)
            except Conflict:  # another process keeps rows of the same window: merge with what it wrote
                attempts_left -= 1
                if not attempts_left:
                    raise

    def _add(self, there: ObjectInfo, given: _Content, put: PutRequest, reason: str, number: int) -> int:
        """Add the lines that the object lacks, in their order; returns how much is new."""
        with self._store.open(there.key, there.etag) as stream:
            held = b"" if stream is None else _ended(stream.read())
        added = _lines_beyond(held, given.body)
        was_cut = there.metadata.get("cut") == "yes"  # then the lines beyond the cut are unknown
        before = there.number("number") or 0
        new = min(max(number - before, 0 if was_cut else len(added)), number)
        if new:
            body = _cut(held + b"".join(added), max(self._max_bytes, len(held)), by_line=True)
            is_cut = was_cut or given.is_cut or len(body) < len(held) + sum(map(len, added))
            united = _Content(body, given.digest, is_cut)
            metadata = _metadata(united, reason, before + new)
            self._store.put(there.key, io.BytesIO(united.body), replace(put, metadata=metadata, expected=there.etag))
        return new


def _read(content: bytes | BinaryIO, max_bytes: int, *, by_line: bool) -> _Content:
    """Keep the first bytes, but read all of them for the digest."""
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    first = stream.read(max_bytes + 1)
    digest = hashlib.sha256(first)
    while more := stream.read(READ_BYTES):
        digest.update(more)
    first = _ended(first) if by_line else first
    body = _cut(first, max_bytes, by_line=by_line)
    return _Content(body, digest.hexdigest(), len(body) < len(first))


def _ended(lines: bytes) -> bytes:
    return lines if not lines or lines.endswith(b"\n") else lines + b"\n"


def _cut(body: bytes, max_bytes: int, *, by_line: bool) -> bytes:
    """The beginning of `body`, cut at the end of a line if there is one."""
    if len(body) <= max_bytes:
        return body
    end = body.rfind(b"\n", 0, max_bytes) + 1 if by_line else max_bytes
    return body[: end or max_bytes]


def _lines_beyond(held: bytes, given: bytes) -> list[bytes]:
    """The lines of `given` that `held` lacks, or has fewer times."""
    if given.startswith(held):
        return list(io.BytesIO(given[len(held) :]))
    left = Counter(io.BytesIO(held))
    added = []
    for line in io.BytesIO(given):
        if left[line] > 0:
            left[line] -= 1
        else:
            added.append(line)
    return added


def _metadata(content: _Content, reason: str, number: int) -> dict[str, str]:
    """What `keep` and readers need to know without reading the object."""
    said = reason.encode("ascii", "backslashreplace").decode().strip()
    cut = {"cut": "yes"} if content.is_cut else {}
    return {"reason": said[:MAX_PART_CHARACTERS], "number": str(number), "digest": content.digest, **cut}


def _encoded(part: str) -> str:
    """A reversible encoding: letters, digits and `_.-=` stay as they are. No segment is empty, `.` or `..`."""
    quoted = quote(part.encode("utf-8", "surrogatepass"), safe="=").replace("~", "%7E")
    return (quoted.replace(".", "%2E") if not quoted.strip(".") else quoted) or "%"


def _shortened(text: str, limit: int) -> str:
    """`text`, or its beginning plus a digest of it; only shortened text contains `~`."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    beginning = re.sub(r"%.?$", "", text[: limit - len(digest) - 1])
    return f"{beginning}~{digest}"
