"""What killed uploads left in a bucket: parts that nobody sees and everybody pays for.

Invariant: an upload is aborted only when it is old and its key is one of ours; one that ends meanwhile is none.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from app.core.errors import Permanent
from app.stores.s3 import S3Store
from app.stores.s3_parts import abort_upload

SWEEP_HINT = (
    "let the key list and abort multipart uploads (s3:ListBucketMultipartUploads, s3:AbortMultipartUpload), "
    "or set S3_SWEEP_HOURS=0"
)


def sweep(store: S3Store, before: datetime, ours: Callable[[str], bool]) -> int:
    """Abort multipart uploads that were begun before under keys that are `ours`; how many there were."""
    try:
        old = [
            (upload["Key"], upload["UploadId"])
            for upload in _uploads(store)
            if upload["Initiated"].astimezone(UTC) < before and ours(upload["Key"])
        ]
        return sum(abort_upload(store, key, upload_id) for key, upload_id in old)
    except Permanent as error:
        raise Permanent(error.message, SWEEP_HINT) from error


def _uploads(store: S3Store) -> Iterator[Any]:
    asked: dict[str, str] = {}
    while True:
        with store.translated("listing of multipart uploads"):
            page = store.client().list_multipart_uploads(Bucket=store.target.bucket, **asked)
            uploads, more = page.get("Uploads", ()), page.get("IsTruncated", False)
            marks = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
        yield from uploads
        if not more or not any(marks.values()) or marks == asked:
            return
        asked = {name: value for name, value in marks.items() if value}
