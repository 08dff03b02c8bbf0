"""The one shape of every error that the API answers: `{"error": {"message", "hint", "field"?}}`.

Invariant: no answer shows a stack trace or the text of an unexpected exception; what a caller can do stands in `hint`.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.core.errors import AppError, Conflict, Permanent, Rejected, Transient

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_SECONDS = 5
BROKEN = "something went wrong inside Headwater"
BROKEN_HINT = "the log of the service around this moment says what; please report it"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer. `fault` is the field that is wrong, "" when it is not about one."""

    status: int
    message: str
    hint: str
    fault: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> Mapping[str, Any]:
        """The JSON body."""
        error = {"message": self.message, "hint": self.hint}
        return {"error": {**error, "field": self.fault} if self.fault else error}


class Refused(Exception):
    """Raised by a route to answer with a refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def refusal_of(error: AppError) -> Refusal:
    """Rejected is the caller's to mend, Transient passes, Permanent needs a person who looks after the service."""
    if isinstance(error, Conflict):
        return Refusal(409, error.message, error.hint)
    if isinstance(error, Transient):
        seconds = error.retry_after_seconds or RETRY_SECONDS
        return Refusal(503, error.message, error.hint, headers={"Retry-After": str(round(seconds + 0.5))})
    if isinstance(error, Rejected):
        return Refusal(400, error.message, error.hint)
    return Refusal(502 if isinstance(error, Permanent) else 500, error.message, error.hint)


async def send_json(send: Send, status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    """A whole JSON answer, without any framework."""
    content = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """A whole error answer, without any framework."""
    await send_json(send, refusal.status, refusal.body, refusal.headers)


def install(api: "FastAPI") -> None:
    """Let every error of `api` be answered in the one shape."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(refusal: Refusal) -> "Response":
        return JSONResponse(dict(refusal.body), refusal.status, headers=dict(refusal.headers))

    async def refused(_: "Request", error: Exception) -> "Response":
        return answer(error.refusal if isinstance(error, Refused) else _foreign(error))

    async def invalid(_: "Request", error: Exception) -> "Response":
        return answer(_invalid(error.errors() if isinstance(error, RequestValidationError) else ()))

    async def http(_: "Request", error: Exception) -> "Response":
        return answer(_plain(error) if isinstance(error, HTTPException) else _foreign(error))

    api.add_exception_handler(Refused, refused)
    api.add_exception_handler(AppError, refused)
    api.add_exception_handler(RequestValidationError, invalid)
    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(Exception, refused)


def _foreign(error: Exception) -> Refusal:
    return refusal_of(error) if isinstance(error, AppError) else Refusal(500, BROKEN, BROKEN_HINT)


def _invalid(errors: Any) -> Refusal:
    first = next(iter(errors), {"loc": (), "msg": "the request cannot be read"})
    where = ".".join(str(part) for part in first["loc"])
    others = f" (and {len(errors) - 1} more faults)" if len(errors) > 1 else ""
    return Refusal(422, f"{where}: {first['msg']}{others}", "correct the request; /docs shows its shape", where)


def _plain(error: Any) -> Refusal:
    hints = {404: "see /docs for what there is", 405: "see /docs for the methods of this path"}
    hint = hints.get(error.status_code, "correct the request; /docs shows its shape")
    return Refusal(error.status_code, str(error.detail), hint, headers=error.headers or {})
