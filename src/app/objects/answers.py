"""What /s3 answers, as JSON and as headers."""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

from app.object_store.port import MARK, ObjectInfo, Page, Question, Stored
from app.objects.links import disposition
from app.objects.requests import ByteSpan

PARQUET_WARNING = (
    "a Parquet file ends with offsets of its own content: bytes that move or change can make it unreadable"
)


def instant(at: datetime) -> str:
    """Whole seconds with Z, as S3's own listings are shown."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def listed(question: Question, page: Page) -> Mapping[str, Any]:
    """A page of a listing."""
    objects = [
        {"Key": info.key, "LastModified": instant(info.modified_at), "Size": info.size_bytes, "ETag": info.etag}
        for info in page.objects
    ]
    answer: dict[str, Any] = {"prefix": question.prefix, "objects": objects, "count": len(objects)}
    if question.delimiter:
        answer["common_prefixes"] = list(page.prefixes)
    if page.continuation:
        answer["continuation"] = page.continuation
    return answer


def info(key: str, held: ObjectInfo | None) -> Mapping[str, Any]:
    """An object's properties."""
    if held is None:
        return {"key": key, "exists": False, "size": None}
    return {
        "key": key,
        "exists": True,
        "size": held.size_bytes,
        "etag": held.etag,
        "last_modified": instant(held.modified_at),
        "content_type": held.content_type,
        "metadata": {name: value for name, value in held.metadata.items() if name != MARK},
    }


def stored(key: str, done: Stored) -> Mapping[str, Any]:
    """An upload."""
    answer = {"key": key, "etag": done.etag, "version_id": done.version_id, "size": done.size_bytes}
    return answer if done.guarded else {**answer, "guarded": False}


def patched(key: str, done: Stored, offset: int) -> Mapping[str, Any]:
    """A patch."""
    answer = {**stored(key, done), "offset": offset, "guarded": done.guarded}
    return {**answer, "warning": PARQUET_WARNING} if key.lower().endswith(".parquet") else answer


def headers(held: ObjectInfo, span: ByteSpan) -> Mapping[str, str]:
    """Of a download. A cache may keep it, and asks each time whether it is still right."""
    fields = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": disposition(held.key),
        "Content-Length": str(span.count),
        "Content-Type": held.content_type,
        "ETag": held.etag,
        "Last-Modified": format_datetime(held.modified_at.astimezone(UTC), usegmt=True),
    }
    if span.part:
        fields["Content-Range"] = f"bytes {span.first}-{span.first + span.count - 1}/{held.size_bytes}"
    return fields
