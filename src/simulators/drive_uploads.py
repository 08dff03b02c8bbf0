"""Drive's three ways to send content: as it is, with metadata in one request, or in pieces that can be resumed.

Invariants: a piece counts up to where it was kept, which the answer says; a complete session
repeats its answer; nothing is a file before its last byte is here.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from threading import Lock
from typing import Any

from simulators.http import Answer, Request

PIECE_BYTES = 262_144
RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
Store = Callable[[Mapping[str, Any], bytes], Answer]


@dataclass(slots=True)
class Session:
    """An upload under way. `store` makes the file when all is here; `done` is its answer then."""

    metadata: Mapping[str, Any]
    store: Store
    content: bytearray = field(default_factory=bytearray)
    done: Answer | None = None


class Uploads:
    """Open sessions. `keep_bytes`: how much of the next piece is kept, None = all. `forget` loses all sessions."""

    def __init__(self) -> None:
        self.keep_bytes: int | None = None
        self._sessions: dict[str, Session] = {}
        self._numbers = count(1)
        self._lock = Lock()

    def begin(self, url: str, metadata: Mapping[str, Any], store: Store) -> Answer:
        """Open a session; its address is the answer's Location."""
        with self._lock:
            upload_id = f"xa{next(self._numbers)}"
            self._sessions[upload_id] = Session(metadata, store)
        return Answer(200, {"Location": f"{url}?uploadType=resumable&upload_id={upload_id}"})

    def forget(self) -> None:
        """Lose every session."""
        with self._lock:
            self._sessions.clear()

    def piece(self, request: Request) -> Answer:
        """A piece, or the question how much is here."""
        with self._lock:
            session = self._sessions.get(request.parameters["upload_id"])
            if session is None:
                return Answer(404)
            return session.done or self._taken(session, request)

    def _taken(self, session: Session, request: Request) -> Answer:
        found = RANGE.fullmatch(request.headers.get("content-range", ""))
        if found and found[1] is not None and int(found[1]) == len(session.content):
            kept, self.keep_bytes = self.keep_bytes, None
            session.content += request.body if kept is None else request.body[:kept]
        if found is None:
            session.content[:] = request.body
        total = len(session.content) if found is None else found[3]
        if str(len(session.content)) != str(total):
            held = {"Range": f"bytes=0-{len(session.content) - 1}"} if session.content else {}
            return Answer(308, held)
        session.done = session.store(session.metadata, bytes(session.content))
        return session.done


def parts_of(request: Request) -> tuple[Mapping[str, Any], bytes]:
    """Metadata and content of a multipart request, with either line end. Raises ValueError."""
    boundary = re.search(r'boundary="?([^";]+)"?', request.headers.get("content-type", ""))
    if boundary is None:
        raise ValueError("no boundary")
    pieces = request.body.split(b"--" + boundary[1].encode())[1:-1]
    bodies = [re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1] for piece in pieces]
    metadata, content = (re.sub(rb"\r?\n\Z", b"", body) for body in bodies)
    return json.loads(metadata), content
