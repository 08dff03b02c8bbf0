"""The one shape of all API errors: `{"error": {"message", "hint", "field"?}}`.

Invariant: no response shows a stack trace or the text of an unexpected exception; `hint` says what the caller can do.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Answers = dict[int | str, dict[str, Any]]
"""`responses` of a FastAPI route: its answers by status."""

RETRY_SECONDS = 5
BROKEN = "something went wrong inside Headwater"
BROKEN_HINT = "report it with the service's log of this moment"


class ErrorDetail(BaseModel):
    """What is wrong, what the caller can do, and which field is at fault, where it is one."""

    message: str
    hint: str
    field: str = Field(default="", description="absent when the error is not about one field")


class ErrorAnswer(BaseModel):
    """Every error answer."""

    error: ErrorDetail


ERROR_SCHEMA = {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}


class Refusal(NamedTuple):
    """An error response. `fault` is the invalid field, "" when the error is not about one."""

    status: int
    message: str
    hint: str
    fault: str = ""
    headers: Mapping[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, an ErrorAnswer."""
        error = {"message": self.message, "hint": self.hint}
        return {"error": {**error, "field": self.fault} if self.fault else error}


class Refused(Rejected):
    """Raised to answer with a `Refusal`, which is built from the arguments."""

    def __init__(
        self, status: int, message: str, hint: str, fault: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, hint)
        self.refusal = Refusal(status, message, hint, fault, headers or {})


def faults(meanings: Mapping[int, str]) -> Answers:
    """Error responses for the `responses` of a route: status -> when it is sent.

    By reference, not by `model`: FastAPI would build a serializer for each of them, 700 in all.
    """
    content = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": meaning, "content": content} for status, meaning in meanings.items()}


def refusal_of(error: Exception) -> Refusal:
    """Rejected is for the caller to correct, Transient passes, Permanent needs an operator."""
    if isinstance(error, Refused):
        return error.refusal
    if not isinstance(error, AppError):
        return Refusal(500, BROKEN, BROKEN_HINT)
    if isinstance(error, Transient) and not isinstance(error, Conflict):
        seconds = error.retry_after_seconds or RETRY_SECONDS
        return Refusal(503, error.message, error.hint, headers={"Retry-After": str(round(seconds + 0.5))})
    statuses = {Conflict: 409, Rejected: 400, Permanent: 502, AppError: 500}
    status = next(status for kind, status in statuses.items() if isinstance(error, kind))
    return Refusal(status, error.message, error.hint)


async def send_json(send: Send, status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    """A whole JSON response, without any framework."""
    content = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """A whole error response, without any framework."""
    await send_json(send, refusal.status, refusal.body, refusal.headers)
