"""In-process Google Drive simulator: one shared drive, one My Drive, its own sign-in, with faults.

Invariants: the real client library talks to it unmodified over HTTP, as contracts/google-drive.md describes Drive v3;
it refuses what it does not understand. Without the shared-drive flags, files on shared drives are invisible; a service
account owns no storage, so it can create files on shared drives only; a fault applies to one request and is then used
up.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from simulators.drive_files import FOLDER_TYPE, Files, StoredFile
from simulators.google_oauth import JSON, Tokens
from simulators.http_server import Answer, CutHere, Request, Simulator

FILES = "/drive/v3/files"
UPLOAD = "/upload/drive/v3/files"
DEFAULT_FIELDS = frozenset({"kind", "id", "name", "mimeType"})
LIMIT_BYTES = 5_500_000
PAGE = 100
NOT_BINARY = "fileNotDownloadable"
RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
Store = Callable[[Mapping[str, Any], bytes], Answer]


@dataclass(slots=True)
class Session:
    """An upload in progress. `store` creates the file when all bytes have arrived; `done` is the final answer."""

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
        """Open a session; its URL is in the answer's Location header."""
        with self._lock:
            upload_id = f"xa{next(self._numbers)}"
            self._sessions[upload_id] = Session(metadata, store)
        return Answer(200, {"Location": f"{url}?uploadType=resumable&upload_id={upload_id}"})

    def forget(self) -> None:
        """Lose every session."""
        with self._lock:
            self._sessions.clear()

    def piece(self, request: Request) -> Answer:
        """Take a piece, or report how many bytes have arrived."""
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
    """Metadata and content of a multipart request, with CRLF or LF. Raises ValueError."""
    boundary = re.search(r'boundary="?([^";]+)"?', request.headers.get("content-type", ""))
    if boundary is None:
        raise ValueError("no boundary")
    pieces = request.body.split(b"--" + boundary[1].encode())[1:-1]
    bodies = [re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1] for piece in pieces]
    metadata, content = (re.sub(rb"\r?\n\Z", b"", body) for body in bodies)
    return json.loads(metadata), content


@dataclass(frozen=True, slots=True)
class DriveFault:
    """The fault of one request: an error instead of its effect, an error after it (`after`), or no answer (`cut`).

    The answer is delayed by `stall_seconds`; with `after`, the effect happens before the delay.
    """

    status: int = 500
    reason: str = "backendError"
    message: str = "Internal Error"
    after: bool = False
    cut: bool = False
    html: bool = False
    newer_style: bool = False
    stall_seconds: float = 0.0


@dataclass(slots=True)
class DriveState:
    """The simulator's configuration. `my_drive` and `shared_drive`: ids of root folders. `full`: no quota is left."""

    files: Files
    tokens: Tokens
    uploads: Uploads
    shared_drive: str = "0ADEMO"
    my_drive: str = "root"
    revoked: bool = False
    full: bool = False
    stale_lists: int = 0
    incomplete_lists: int = 0
    page_files: int = PAGE
    waiting: list[tuple[DriveFault, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    faults_taken: int = 0
    lock: Lock = field(default_factory=Lock)

    def take(self, what: str) -> DriveFault | None:
        """Remove and return the pending fault for `METHOD path`."""
        with self.lock:
            self.asked.append(what)
            for number, (fault, pattern) in enumerate(self.waiting):
                if re.search(pattern, what):
                    del self.waiting[number]
                    self.faults_taken += 1
                    return fault
        return None


class DriveRefusal(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.answer = refusal(DriveFault(status, reason, message))


def refusal(fault: DriveFault) -> Answer:
    """The error in Google's older or newer style, or a proxy's error page."""
    if fault.html:
        return Answer(fault.status, {"Content-Type": "text/html"}, b"<html><title>Error</title></html>")
    error: dict[str, Any] = {"code": fault.status, "message": fault.message}
    if fault.newer_style:
        detail = {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": fault.reason,
            "domain": "googleapis.com",
        }
        error |= {"status": "RESOURCE_EXHAUSTED", "details": [detail]}
    else:
        error["errors"] = [{"domain": "global", "reason": fault.reason, "message": fault.message}]
    return Answer(fault.status, JSON, json.dumps({"error": error}).encode())


class DriveSimulator(Simulator):
    """`state` is its configuration and faults. Files stay in `folder` for the next simulator; None = not kept."""

    def __init__(
        self,
        port: int = 0,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        folder: Path | None = None,
    ) -> None:
        super().__init__(port)
        self.state = DriveState(Files(clock, folder), Tokens(), Uploads())
        for root, drive_id in ((self.state.my_drive, ""), (self.state.shared_drive, self.state.shared_drive)):
            self._add_folder(root, drive_id, "")
        self.folder_id = "1demofolder"
        self._add_folder(self.folder_id, self.state.shared_drive, self.state.shared_drive)

    def add_fault(self, fault: DriveFault, when: str = "", times: int = 1) -> None:
        """Give the fault to the next `times` requests whose `METHOD path` contains the pattern `when`."""
        with self.state.lock:
            self.state.waiting.extend([(fault, when)] * times)

    def named(self, name: str) -> list[StoredFile]:
        """Every file of that name that is not in the trash."""
        return list(self.state.files.matching(lambda file: file.name == name and not file.trashed))

    def contents(self) -> dict[str, bytes]:
        """Name -> content of every file that is not in the trash. Raises ValueError for a duplicate name."""
        found = list(self.state.files.matching(lambda file: file.is_binary and not file.trashed))
        by_name = {file.name: file.content for file in found}
        if len(by_name) != len(found):
            raise ValueError(f"a name is given twice: {sorted(file.name for file in found)}")
        return by_name

    def _add_folder(self, file_id: str, drive_id: str, parent: str) -> None:
        if file_id not in self.state.files.held:
            of = {"id": file_id, "name": file_id, "parent": parent, "drive_id": drive_id, "mime_type": FOLDER_TYPE}
            self.state.files.add(of)

    def respond(self, request: Request) -> Answer:
        """The answer, with the pending fault applied. Raises CutHere to close the connection without an answer."""
        fault = self.state.take(f"{request.method} {request.path}")
        if fault is None:
            return self._answer(request)
        if fault.after:
            self._answer(request)
        self.wait(fault.stall_seconds)
        if fault.cut:
            raise CutHere
        return refusal(fault)

    def _answer(self, request: Request) -> Answer:
        if request.path in ("/token", "/o/oauth2/auth"):
            return self.state.tokens.respond(request)
        if "upload_id" in request.parameters:
            return self.state.uploads.piece(request)
        service = self.state.tokens.is_service(request.headers.get("authorization", ""))
        if service is None:
            return refusal(DriveFault(401, "authError", "Invalid Credentials"))
        try:
            return self._routed(request, service=service)
        except DriveRefusal as refused:
            return refused.answer

    def _routed(self, request: Request, *, service: bool) -> Answer:
        path = request.path.removeprefix("/upload")
        file_id = path.removeprefix(FILES).strip("/")
        match request.method, file_id:
            case "GET", "generateIds":
                made = {"kind": "drive#generatedIds", "space": "drive", "ids": [self.state.files.new_id()]}
                return _json_answer(made)
            case "GET", "":
                return self._list(request.parameters)
            case "GET", _:
                return self._get(request, file_id)
            case "POST", "":
                return self._received(request, lambda body, data: self._create(request, body, data, service=service))
            case "PATCH", _:
                self._visible(request.parameters, file_id)
                return self._received(request, lambda body, data: self._update(request, file_id, body, data))
            case "DELETE", _:
                self._visible(request.parameters, file_id)
                self.state.files.delete(file_id)
                return Answer(204)
        raise DriveRefusal(404, "notFound", "Not Found")

    def _received(
        self,
        request: Request,
        store: Callable[[Mapping[str, Any], bytes | None], Answer],
    ) -> Answer:
        kind = request.parameters.get("uploadType")
        if not request.path.startswith(UPLOAD):
            return store(json.loads(request.body or b"{}"), None)
        if kind == "resumable":

            def whole(metadata: Mapping[str, Any], content: bytes) -> Answer:
                try:
                    return store(metadata, content)
                except DriveRefusal as refused:
                    return refused.answer

            return self.state.uploads.begin(f"{self.url}{request.path}", json.loads(request.body or b"{}"), whole)
        if len(request.body) > LIMIT_BYTES:
            raise DriveRefusal(413, "uploadTooLarge", "use a resumable upload")
        if kind == "media":
            return store({}, request.body)
        try:
            return store(*parts_of(request))
        except ValueError as error:
            raise DriveRefusal(400, "badRequest", str(error)) from error

    def _list(self, parameters: Mapping[str, str]) -> Answer:
        flags = _flag(parameters, "supportsAllDrives") and _flag(parameters, "includeItemsFromAllDrives")
        known = parameters.get("driveId") == self.state.shared_drive and not self.state.revoked
        if parameters.get("corpora") == "drive" and not known:
            raise DriveRefusal(404, "notFound", f"Shared drive not found: {parameters.get('driveId')}")
        try:
            asked = parse_query(parameters.get("q", ""))
        except ValueError as error:
            raise DriveRefusal(400, "invalid", f"Invalid Value: {error}") from error
        with self.state.lock:
            is_stale, is_partial = self.state.stale_lists > 0, self.state.incomplete_lists > 0
            self.state.stale_lists -= is_stale
            self.state.incomplete_lists -= is_partial
        found = [
            file
            for file in self.state.files.matching(asked)
            if (flags and not self.state.revoked if file.drive_id else parameters.get("corpora") != "drive")
            and not (is_stale or is_partial)
        ]
        begin = int(parameters.get("pageToken", "0"))
        end = begin + min(int(parameters.get("pageSize", PAGE)), self.state.page_files)
        fields = parameters.get("fields", "")
        page: dict[str, Any] = {"kind": "drive#fileList", "incompleteSearch": is_partial}
        page["files"] = [_selected(file, fields) for file in found[begin:end]]
        if end < len(found):
            page["nextPageToken"] = str(end)
        return _json_answer(page)

    def _get(self, request: Request, file_id: str) -> Answer:
        file = self._visible(request.parameters, file_id)
        if request.parameters.get("alt") != "media":
            return _shown(file, request)
        if not file.is_binary:
            raise DriveRefusal(403, NOT_BINARY, "Only files with binary content can be downloaded.")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if asked is None or not file.content:
            return Answer(200, {"Content-Type": file.mime_type}, file.content)
        begin, end = int(asked[1]), min(int(asked[2]) + 1, len(file.content))
        span = {"Content-Range": f"bytes {begin}-{end - 1}/{len(file.content)}", "Content-Type": file.mime_type}
        return Answer(206, span, file.content[begin:end])

    def _create(self, request: Request, body: Mapping[str, Any], content: bytes | None, *, service: bool) -> Answer:
        folder = self._visible(request.parameters, (body.get("parents") or [self.state.my_drive])[0])
        if folder.mime_type != FOLDER_TYPE:
            message = "Insufficient permissions for the specified parent."
            raise DriveRefusal(403, "insufficientParentPermissions", message)
        if service and not folder.drive_id:
            raise DriveRefusal(403, "storageQuotaExceeded", "Service Accounts do not have storage quota.")
        self._check_quota()
        wanted = {
            "id": body.get("id") or self.state.files.new_id(),
            "name": body.get("name", "Untitled"),
            "parent": folder.file_id,
            "drive_id": folder.drive_id,
            "mime_type": body.get("mimeType", "application/octet-stream"),
            "properties": body.get("appProperties", {}),
        }
        try:
            made = self.state.files.add(wanted, content or b"")
        except KeyError as error:
            raise DriveRefusal(409, "fileIdInUse", "A file already exists with the provided ID.") from error
        if folder.trashed:
            made = self.state.files.change(made.file_id, trashed=True)
        return _shown(made, request)

    def _update(self, request: Request, file_id: str, body: Mapping[str, Any], content: bytes | None) -> Answer:
        held = self._visible(request.parameters, file_id)
        if content is not None and not held.is_binary:
            raise DriveRefusal(403, NOT_BINARY, "Only files with binary content can be changed.")
        if content is not None:
            self._check_quota()
        changes: dict[str, Any] = {name: body[name] for name in ("name", "trashed") if name in body}
        if content is not None:
            changes["content"] = content
        if "appProperties" in body:
            changes["properties"] = {**held.properties, **body["appProperties"]}
        if "addParents" in request.parameters:
            changes["parent"] = request.parameters["addParents"]
        return _shown(self.state.files.change(file_id, **changes), request)

    def _check_quota(self) -> None:
        if self.state.full:
            raise DriveRefusal(403, "storageQuotaExceeded", "The user's Drive storage quota has been exceeded.")

    def _visible(self, parameters: Mapping[str, str], file_id: str) -> StoredFile:
        """The file, if the caller may see it and set the shared-drive flags."""
        file = self.state.files.held.get(self.state.my_drive if file_id == "root" else file_id)
        hidden = (
            file is not None and file.drive_id and (self.state.revoked or not _flag(parameters, "supportsAllDrives"))
        )
        if file is None or hidden:
            raise DriveRefusal(404, "notFound", f"File not found: {file_id}.")
        return file


def _flag(parameters: Mapping[str, str], name: str) -> bool:
    return parameters.get(name, "").lower() == "true"


def _selected(file: StoredFile, fields: str) -> dict[str, Any]:
    wanted = frozenset(re.findall(r"\w+", fields)) or DEFAULT_FIELDS
    return {name: value for name, value in file.to_json().items() if name in wanted}


def _shown(file: StoredFile, request: Request) -> Answer:
    return _json_answer(_selected(file, request.parameters.get("fields", "")))


def _json_answer(document: Mapping[str, Any]) -> Answer:
    return Answer(200, JSON, json.dumps(document).encode())


TEXT = r"'((?:[^'\\]|\\.)*)'"
TERMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], StoredFile], bool]], ...] = (
    (re.compile(rf"name\s*=\s*{TEXT}"), lambda found, file: file.name == _plain(found[1])),
    # for names, `contains` matches prefixes of words only; here it matches the prefix of the whole name
    (re.compile(rf"name\s+contains\s+{TEXT}"), lambda found, file: file.name.startswith(_plain(found[1]))),
    (re.compile(rf"{TEXT}\s+in\s+parents"), lambda found, file: file.parent == _plain(found[1])),
    (re.compile(r"trashed\s*=\s*(true|false)"), lambda found, file: file.trashed == (found[1] == "true")),
    (
        re.compile(rf"appProperties\s+has\s+{{\s*key\s*=\s*{TEXT}\s+and\s+value\s*=\s*{TEXT}\s*}}"),
        lambda found, file: file.properties.get(_plain(found[1])) == _plain(found[2]),
    ),
)
AND = re.compile(r"\s*and\s+|\s*$")


def parse_query(query: str) -> Callable[[StoredFile], bool]:
    """The predicate of a query. Raises ValueError for anything but terms joined by `and`."""
    asked: list[Callable[[StoredFile], bool]] = []
    query, position = query.lstrip(), 0
    while position < len(query):
        terms = ((test, pattern.match(query, position)) for pattern, test in TERMS)
        test, found = next(((test, found) for test, found in terms if found), (None, None))
        joint = AND.match(query, found.end()) if found else None
        if test is None or found is None or joint is None:
            raise ValueError(query[position:])
        asked.append(partial(test, found))
        position = joint.end()
    return lambda file: all(term(file) for term in asked)


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
