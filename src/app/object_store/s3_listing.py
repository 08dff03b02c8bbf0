"""Listings of a bucket: entries parsed without the SDK, pages compared by digest, and several folders at once.

What it earns (docs/benchmarks.md, /analytics): 12 µs of CPU an object where the SDK's parser takes 220, and 6 µs an
object in a refresh of known pages, which decides how soon /analytics sees a new object. Without `take_entries` the SDK
parses every page, and all else here works the same.

Invariants: only the entries of a page are taken, as bytes; tokens, folders, refusals and whatever looks unusual stay
the SDK's, with its retries; a page that cannot be read is an error and never fewer objects. Nothing here relies on the
order in which a store lists.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET

from app.core.errors import Transient
from app.object_store.port import ListingBatch, ObjectInfo

STYLE_HINT = "check S3_ENDPOINT_URL, and set S3_ADDRESSING_STYLE to path or virtual as the store asks"
TEXT_LIMIT = 400
TAKEN = "HeadwaterEntries"
FIRST, LAST = b"<Contents>", b"</Contents>"
ROOT = re.compile(rb"<ListBucketResult\b[^>]*>")
ENCODED = b"<EncodingType>url</EncodingType>"
OTHERS = (b"<!--", b"<![CDATA[", b"IsTruncated", b"ContinuationToken", b"CommonPrefixes", b"EncodingType")
TEXT = r"[^<&\x00-\x1f]*"
MORE = "".join(f"(?:<{name}>[A-Z0-9_]*</{name}>)*" for name in ("ChecksumAlgorithm", "ChecksumType", "StorageClass"))
PLAIN = re.compile(
    f"<Contents><Key>({TEXT})</Key><LastModified>({TEXT})</LastModified><ETag>({TEXT})</ETag>"
    rf"{MORE}<Size>(\d+)</Size>{MORE}"
)
AT_ONCE = 8
WIDE_PAGES = 8
FOLDERS_A_PAGE = 2
PARTS = 4096

Fields = Sequence[str]
"""Key, time of change, ETag and size of an entry, in text."""

ListQuery = Mapping[str, str]
Ask = Callable[[ListQuery], Mapping[str, Any]]
"""One ListObjectsV2 as the SDK answers it, its exceptions translated."""


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of one page as they came. `head`: all up to the root element's first tag; `encoded`: as in a URL."""

    head: bytes
    entries: bytes
    encoded: bool

    @property
    def digest(self) -> bytes:
        """Equal for equal entries."""
        return sha256(b"%s%d%s" % (self.head, self.encoded, self.entries)).digest()

    def infos(self) -> Sequence[ObjectInfo]:
        """The objects. Raises Transient for what is not of S3's form."""
        read = _unquoted if self.encoded else str
        with _readable():
            fields = self._plain() or self._parsed()
            return [ObjectInfo(read(key), int(size), etag, _instant(modified)) for key, modified, etag, size in fields]

    def _plain(self) -> Sequence[Fields]:
        """Nothing unless all of it is in the one form that S3 itself writes: a tenth of the parser's cost."""
        if not self.entries.isascii():
            return ()
        *entries, rest = self.entries.decode("ascii").replace("&quot;", '"').split(LAST.decode())
        matches = [match.groups() for match in map(PLAIN.fullmatch, entries) if match]
        return matches if len(matches) == len(entries) and not rest else ()

    def _parsed(self) -> Sequence[Fields]:
        root = ET.fromstring(self.head + self.entries + b"</ListBucketResult>")  # noqa: S314 - holds no DTD
        space = root.tag.removesuffix("ListBucketResult")
        entry_tag = f"{space}Contents"
        tags = [space + name for name in ("Key", "LastModified", "ETag", "Size")]
        found = []
        for entry in root:
            if entry.tag != entry_tag:
                raise ValueError(entry.tag)
            fields = {field.tag: field.text or "" for field in entry}
            found.append(tuple(fields[tag] for tag in tags))
        return found


def take_entries(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """A handler for botocore's `before-parse`: the entries are put aside as bytes, all else is the SDK's as ever.

    An answer of another form is left alone, so that the SDK reads it or says what is wrong with it.
    """
    body = response_dict["body"]
    begin, end = body.find(FIRST), body.rfind(LAST) + len(LAST)
    if response_dict["status_code"] != HTTPStatus.OK or not 0 <= begin < end:
        return
    head, entries, tail = body[:begin], body[begin:end], body[end:]
    root = ROOT.search(head)
    if root is None or b"<!" in head or any(other in entries for other in OTHERS):
        return
    encoded = ENCODED in head or ENCODED in tail
    customized_response_dict[TAKEN] = Entries(head[: root.end()], entries, encoded)
    response_dict["body"] = head + tail


def infos_of(page: Mapping[str, Any]) -> Sequence[ObjectInfo]:
    """The objects of a page, whether its entries were put aside or the SDK read them."""
    taken = page.get(TAKEN)
    with _readable():
        read = [info_of(entry["Key"], entry["Size"], entry) for entry in page.get("Contents", ())]
    return [*taken.infos(), *read] if taken else read


def info_of(key: str, size_bytes: int, found: Mapping[str, Any]) -> ObjectInfo:
    """An entry of a listing or the head of an object, as the SDK reads it."""
    return ObjectInfo(key, size_bytes, found["ETag"], found["LastModified"].astimezone(UTC))


def listed(ask: Ask, prefix: str) -> Iterator[ObjectInfo]:
    """Every object below `prefix`, page after page."""
    query: ListQuery | None = {"Prefix": prefix}
    while query is not None:
        page = ask(query)
        yield from _below(prefix, infos_of(page))
        query = following(page, query)


def batches(ask: Ask, prefix: str, pages: int) -> Iterator[ListingBatch]:
    """Every object below `prefix`, a page at a time in no order. Where about so many `pages` are expected and not many
    more folders, the folders are listed side by side.
    """
    queries: Sequence[ListQuery] = [{"Prefix": prefix}]
    if pages >= WIDE_PAGES:
        top = ask({"Prefix": prefix, "Delimiter": "/"})
        folders = [one["Prefix"] for one in top.get("CommonPrefixes", ()) if one["Prefix"].startswith(prefix)]
        if not _truncated(top) and 1 < len(folders) <= FOLDERS_A_PAGE * pages:
            yield _batch(prefix, top)
            queries = [{"Prefix": folder} for folder in folders]
    for query, page in _side_by_side(ask, queries):
        yield _batch(query["Prefix"], page)


def following(page: Mapping[str, Any], query: ListQuery) -> ListQuery | None:
    """What to ask for the next page; None after the last. Raises Transient when the store does not say how."""
    if not _truncated(page):
        return None
    token = page.get("NextContinuationToken")
    if not token or token == query.get("ContinuationToken"):
        what = f"listing of {query['Prefix']!r}"
        raise Transient(f"{what}: the store says that there is more, and not how to get it", STYLE_HINT)
    return {**query, "ContinuationToken": token}


def _truncated(page: Mapping[str, Any]) -> bool:
    with _readable():
        return bool(page["IsTruncated"])


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (ET.ParseError, KeyError, ValueError, OverflowError) as error:
        raise Transient(f"a page of a listing is not S3's: {error!r}"[:TEXT_LIMIT], STYLE_HINT) from error


def _side_by_side(ask: Ask, queries: Sequence[ListQuery]) -> Iterator[tuple[ListQuery, Mapping[str, Any]]]:
    """All pages of all queries as they come; the next ones are on their way while the caller looks at one."""
    waiting = deque(queries)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="listing") as pool:
        running: dict[Any, ListQuery] = {}
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                query = waiting.popleft()
                running[pool.submit(ask, query)] = query
            done = wait(running, return_when=FIRST_COMPLETED).done.pop()
            query, page = running.pop(done), done.result()
            further = following(page, query)
            if further is not None:
                running[pool.submit(ask, further)] = further
            yield query, page


def _batch(prefix: str, page: Mapping[str, Any]) -> ListingBatch:
    """Without a digest where the SDK read entries."""
    taken = page.get(TAKEN)
    digest = b"" if taken is None or page.get("Contents") else taken.digest
    return ListingBatch(digest, lambda: _below(prefix, infos_of(page)))


def _below(prefix: str, infos: Sequence[ObjectInfo]) -> Sequence[ObjectInfo]:
    """SeaweedFS takes `a//` for `a/`."""
    return [info for info in infos if info.key.startswith(prefix)]


def _unquoted(key: str) -> str:
    """Folder and name apart, since both are the same again and again."""
    folder, slash, name = key.rpartition("/")
    return f"{_part(folder)}{slash}{_part(name)}"


@lru_cache(PARTS)
def _part(text: str) -> str:
    return unquote_plus(text)


def _instant(text: str) -> datetime:
    """S3's form directly, others as the SDK reads them."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        from botocore.utils import parse_timestamp

        at = parse_timestamp(text)
    return at if at.tzinfo is UTC else at.astimezone(UTC)
