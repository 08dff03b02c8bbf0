"""Whether a bucket keeps old versions of its objects for ever: each replacement of an object would then be paid for.

Source: the S3 API reference, GetBucketVersioning and GetBucketLifecycleConfiguration.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from app.core.errors import Permanent
from app.stores.s3 import S3Store
from app.stores.s3_client import code_of, status_of

NO_RIGHT = "whether old versions are kept cannot be seen: allow s3:GetBucketVersioning and s3:GetLifecycleConfiguration"
KEPT = "old versions are kept for ever: add a lifecycle rule with NoncurrentVersionExpiration"


def note_of_versions(store: S3Store, prefix: str) -> str:
    """A warning for a bucket with versions that no lifecycle rule removes below `prefix`; "" when all is well.

    Raises Transient. A store that knows no versions has none.
    """
    try:
        if not _keeps_versions(store):
            return ""
        return "" if removes_old_versions(_rules(store), prefix) else KEPT
    except Permanent:
        return NO_RIGHT


def removes_old_versions(rules: Sequence[Mapping[str, Any]], prefix: str) -> bool:
    """True when one of a bucket's lifecycle rules removes old versions of everything below `prefix`."""
    for rule in rules:
        only = rule.get("Filter") or {"Prefix": rule.get("Prefix", "")}
        is_for_all = set(only) <= {"Prefix"} and f"{prefix}/".lstrip("/").startswith(only.get("Prefix", ""))
        if rule.get("Status") == "Enabled" and is_for_all and "NoncurrentVersionExpiration" in rule:
            return True
    return False


def _keeps_versions(store: S3Store) -> bool:
    answer = _answer(store, "get_bucket_versioning", HTTPStatus.NOT_IMPLEMENTED)
    return answer.get("Status") == "Enabled"


def _rules(store: S3Store) -> Sequence[Mapping[str, Any]]:
    rules: Sequence[Mapping[str, Any]] = _answer(store, "get_bucket_lifecycle_configuration", HTTPStatus.NOT_FOUND).get(
        "Rules", ()
    )
    return rules


def _answer(store: S3Store, method: str, nothing: HTTPStatus) -> Mapping[str, Any]:
    """What the store says of its bucket; nothing where it answers with this status."""
    from botocore.exceptions import ClientError

    with store.translated(f"bucket {store.target.bucket!r}"):
        try:
            found: Mapping[str, Any] = getattr(store.client(), method)(Bucket=store.target.bucket)
        except ClientError as error:
            if status_of(error) != nothing or code_of(error) == "NoSuchBucket":
                raise
            return {}
    return found
