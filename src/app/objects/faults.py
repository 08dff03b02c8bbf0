"""What is wrong with a request to /s3, as the caller is told."""

from collections.abc import Mapping

from app.core.errors import Rejected


class NotServed(Rejected):
    """A request that cannot be served: `status` is the HTTP status, `fault` the field or parameter, "" for none."""

    def __init__(
        self, status: int, message: str, hint: str, *, fault: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.fault = fault
        self.headers = headers or {}


def missing(key: str) -> NotServed:
    """There is no such object."""
    return NotServed(404, f"there is no object {key!r}", "list what there is: GET /s3/objects?prefix=", fault="key")
