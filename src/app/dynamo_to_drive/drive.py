"""A small Google Drive v3 client: errors, files. Only this module and `credentials` use Google's packages.

Invariants: every call can be repeated, since a create carries a pre-generated id; the flags for shared drives are
always sent; an upload succeeds only if Drive's checksum and size match ours; no SDK exception leaves this module.
"""

import json
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPSConnection
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec

from app.config.settings import DriveSettings
from app.core.errors import AppError, Permanent, Transient
from app.core.network import CA_HINT, is_untrusted, proxy_for, tunnel_to
from app.core.retry import Pauses, RetryPolicy, asked_seconds, retry
from app.core.windows import Window
from app.dynamo_to_drive.credentials import credentials, document, save_token
from app.dynamo_to_drive.hour_file import HourFile

# Errors of Drive and its sign-in, translated to ours with a hint for a person or a retry.
#
# Invariants: the reason comes from the machine-readable part of the response, in either of Google's two formats, never
# from a proxy's text; no message contains a token. The table is section 6 of contracts/google-drive.md.

AGAIN_HINT = "no action needed: it is retried, and the next run continues"
SHARE_HINT = (
    "check GOOGLE_DRIVE_FOLDER_ID and GOOGLE_SHARED_DRIVE_ID, and add the account of the credentials to the shared "
    "drive as Content manager"
)
RIGHTS_HINT = "make the account of the credentials Content manager of the shared drive"
ENABLE_HINT = "enable the Google Drive API in the project of the credentials (Google Cloud Console)"
SCOPE_HINT = "the token lacks the scope drive: run `python -m app google` again"
SIGN_IN_HINT = "the credentials are no longer accepted: make a new key, or run `python -m app google` again"
HINTS: Mapping[str, str] = {
    "storageQuotaExceeded": "service accounts have no storage of their own: share a Shared Drive with the account and "
    "set GOOGLE_DRIVE_FOLDER_ID to it or to a folder on it; for a user's own Drive, free space",
    "teamDriveFileLimitExceeded": "the shared drive is full (500,000 items, trash included): archive or delete some",
    "teamDriveHierarchyTooDeep": "the folder is nested too deep: choose one nearer to the top",
    "numChildrenInNonRootLimitExceeded": "the folder holds too many files: set GOOGLE_DRIVE_FOLDER_ID to a new one",
    "accessNotConfigured": ENABLE_HINT,
    "SERVICE_DISABLED": ENABLE_HINT,
    "dailyLimitExceeded": "the project's daily quota is used up: it resets at midnight Pacific time",
    "insufficientFilePermissions": RIGHTS_HINT,
    "insufficientParentPermissions": RIGHTS_HINT,
    "insufficientPermissions": SCOPE_HINT,
    "ACCESS_TOKEN_SCOPE_INSUFFICIENT": SCOPE_HINT,
    "appNotAuthorizedToFile": SCOPE_HINT,
    "domainPolicy": "the domain's policy forbids it: ask the administrator of the Workspace",
    "notFound": SHARE_HINT,
    "authError": SIGN_IN_HINT,
}
HINTS_OF_STATUS: Mapping[int, str] = {
    400: "check GOOGLE_DRIVE_FOLDER_ID and GOOGLE_SHARED_DRIVE_ID; if both are right, please report it",
    401: SIGN_IN_HINT,
    404: SHARE_HINT,
}
PASSING = frozenset(
    {"userRateLimitExceeded", "rateLimitExceeded", "sharingRateLimitExceeded", "RATE_LIMIT_EXCEEDED", "backendError"}
)
REVOKED = frozenset(
    {
        "invalid_grant",
        "invalid_client",
        "unauthorized_client",
        "deleted_client",
        "disabled_client",
        "invalid_scope",
        "access_denied",
    }
)
GRANT_HINT = (
    "make a new key for a service account, run `python -m app google` again for an installed app: the key was deleted "
    "or the consent withdrawn, or this machine's clock is wrong"
)
TEXT_LIMIT = 300
TOO_MANY, SERVER_FAULT, TIMEOUT = 429, 500, 408


def error_of_response(status: int, content: bytes, headers: Mapping[str, str]) -> AppError:
    """Translate a response with an error status."""
    reason, message = _reason(content)
    text = f"Drive answered {status} {reason}: {message}".replace("  ", " ")[:TEXT_LIMIT]
    if reason in PASSING or status in (TOO_MANY, TIMEOUT) or status >= SERVER_FAULT:
        return Transient(text, AGAIN_HINT, retry_after_seconds=asked_seconds(headers.get("retry-after", "")))
    return Permanent(text, HINTS.get(reason) or HINTS_OF_STATUS.get(status, RIGHTS_HINT))


def _reason(content: bytes) -> tuple[str, str]:
    """The first known reason, else the first one, and the message. One response may use both formats."""
    try:
        said: Any = json.loads(content)["error"]
        listed = [each.get("reason") for each in (*said.get("errors", ()), *said.get("details", ()))]
        given = [str(each) for each in (*listed, said.get("status")) if each]
        known = (each for each in given if each in PASSING or each in HINTS)
        return next(known, given[0] if given else ""), str(said.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", "no reason given"


def failed(error: Exception) -> AppError:
    """Translate a network or sign-in failure. google-auth's own retryable flag is not reliable."""
    from google.auth.exceptions import GoogleAuthError, RefreshError

    said = error.args[1] if len(error.args) > 1 and isinstance(error.args[1], dict) else {}
    if isinstance(error, RefreshError) and str(said.get("error")) in REVOKED:
        why = f"{said['error']}: {said.get('error_description', '')}"
        return Permanent(f"Google refused the sign-in: {why[:TEXT_LIMIT]}", GRANT_HINT)
    # The second argument of a sign-in error is the whole response, which may contain a token.
    text = str(error.args[0]) if isinstance(error, GoogleAuthError) and error.args else str(error)
    if is_untrusted(error):
        return Permanent(f"Drive: {text[:TEXT_LIMIT]}", CA_HINT)
    return Transient(f"Drive cannot be reached: {text[:TEXT_LIMIT] or type(error).__name__}", AGAIN_HINT)


T = TypeVar("T")

# The calls themselves.

RESUMABLE_BYTES = 5_000_000
CHUNK_BYTES = 4 << 20  # a multiple of 256 KiB, held in memory
DOWNLOAD_BYTES = 8 << 20
NO_PROGRESS = 6
NOT_FOUND, CONFLICT, GONE = 404, 409, 410
GOOGLE_TYPES = "application/vnd.google-apps."
FOLDER_TYPE, SHORTCUT_TYPE = f"{GOOGLE_TYPES}folder", f"{GOOGLE_TYPES}shortcut"
CSV_TYPES = ("", "application/csv", "application/octet-stream", "application/vnd.ms-excel")
FOLDER_FIELDS = "id,name,mimeType,driveId,trashed,capabilities(canAddChildren)"
FROM, TO, ESCAPED = "headwaterFrom", "headwaterTo", "headwaterEscaped"
HOUR_CHARACTERS = len("2026-02-07T12")


class DriveFile(msgspec.Struct, frozen=True, rename="camel"):
    """A file's metadata, in Drive's own words. `version` is `id:headRevisionId`."""

    id: str
    name: str = ""
    mime_type: str = ""
    md5_checksum: str = ""
    size: int = 0
    head_revision_id: str = ""
    created_time: str = ""
    app_properties: dict[str, str] = {}
    trashed: bool = False

    @property
    def version(self) -> str:
        """The version of the file's content."""
        return f"{self.id}:{self.head_revision_id}"

    def is_of(self, hour: Window) -> bool:
        """False for what cannot be the hour's file whatever its name: not CSV, or the file of another hour, which a
        person renamed or copied.
        """
        first, last = (self.app_properties.get(name, "")[:HOUR_CHARACTERS] for name in (FROM, TO))
        return self.is_csv and (not first or first <= hour.start.isoformat()[:HOUR_CHARACTERS] <= last)

    @property
    def is_csv(self) -> bool:
        """False for other things with the name of an hour's file: a folder, a shortcut, a Google document (a converted
        copy of our file keeps its properties), a picture, an archive. Windows browsers upload CSV with a spreadsheet's
        type.
        """
        if self.mime_type.startswith(GOOGLE_TYPES):
            return False
        return (
            "headwaterMd5" in self.app_properties or self.mime_type.startswith("text/") or self.mime_type in CSV_TYPES
        )


class DriveFolder(msgspec.Struct, frozen=True, rename="camel"):
    """A folder's metadata, in Drive's own words; it may be something else, in My Drive or without rights."""

    mime_type: str
    drive_id: str = ""
    trashed: bool = False
    capabilities: dict[str, bool] = {}


class DrivePage(msgspec.Struct, frozen=True, rename="camel"):
    """A page of a list. An object with neither of the first two is not a list without files."""

    incomplete_search: bool | None = None
    files: list[DriveFile] | None = None
    next_page_token: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError, which fails the conversion."""
        if self.incomplete_search is None and self.files is None:
            raise ValueError("it is not a list of files")


class GeneratedIds(msgspec.Struct, frozen=True):
    """Ids for files to be created."""

    ids: Annotated[list[str], msgspec.Meta(min_length=1)]


class DriveService:
    """The client library with the credentials of `settings`, and what is known of the destination folder.

    One connection per thread, since the library is not thread-safe. `drive_id` is the folder's shared drive, "" in My
    Drive, None until it was looked up. `told` has the ids of other items in the folder that were already warned about.
    """

    def __init__(self, settings: DriveSettings, token_file: Path) -> None:
        self.settings = settings
        self.folder_id = settings.folder_id or settings.shared_drive_id or "root"
        self.drive_id: str | None = None
        self.told = set[str]()
        self._token_file = token_file
        self._here = threading.local()

    def made(self) -> Any:
        """This thread's `files` API. Raises Permanent for unusable credentials."""
        if not hasattr(self._here, "files"):
            found = credentials(self.settings, self._token_file)
            self._here.http = self._connect(found)
            self._here.files = self._build(self._here.http).files()  # cached: building costs more than a request
            self._here.token, self._here.found = found.token, found
        return self._here.files

    def forget(self) -> None:
        """Close this thread's connections; read the credentials and look the folder up again next time."""
        self.drive_id = None
        if hasattr(self._here, "http"):
            self._here.http.close()
        self._here.__dict__.clear()

    def note_token(self) -> None:
        """Store an installed app's token for the next start if the last call refreshed it."""
        found = getattr(self._here, "found", None)
        if found is not None and found.token != self._here.token:
            self._here.token = found.token
            if not {"installed", "web"}.isdisjoint(document(self.settings)):
                save_token(self._token_file, found)

    def _connect(self, found: Any) -> Any:
        import httplib2
        from google_auth_httplib2 import AuthorizedHttp

        class Tunnel(httplib2.HTTPSConnectionWithTimeout):  # type: ignore[misc]  # the library is untyped
            """Connects through the proxy with the standard library; httplib2's proxy support needs PySocks."""

            host: str
            port: int

            def connect(self) -> None:
                target = self.host, self.port
                host, port, headers = tunnel_to(f"https://{self.host}:{self.port}")
                self.set_tunnel(*target, headers)
                self.host, self.port = host, port
                try:
                    HTTPSConnection.connect(self)
                finally:
                    self.host, self.port = target  # httplib2 reconnects the same object after an error

        class Http(httplib2.Http):  # type: ignore[misc]
            def request(self, uri: str, *args: Any, **given: Any) -> Any:
                if uri.startswith("https:") and proxy_for(uri):
                    given["connection_type"] = Tunnel
                return super().request(uri, *args, **given)

        # httplib2 reads this variable on import, which may be before `app.core.network` sets it.
        plain = Http(
            timeout=self.settings.timeout_seconds, ca_certs=os.environ.get("HTTPLIB2_CA_CERTS"), proxy_info=None
        )
        plain.redirect_codes = plain.redirect_codes - {308}  # Drive's 308 reports upload progress
        return AuthorizedHttp(found, http=plain)

    def _build(self, http: Any) -> Any:
        """Build the API from the discovery document shipped with the library; nothing is fetched."""
        import googleapiclient
        from googleapiclient.discovery import build_from_document

        folder = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
        document = json.loads((folder / "drive.v3.json").read_text(encoding="utf-8"))
        options: dict[str, Any] = {}
        if url := self.settings.api_url:
            # The library drops the endpoint's path, and uploads go to the document's root URL.
            document = {**document, "rootUrl": f"{url}/", "baseUrl": f"{url}/drive/v3/"}
            options["client_options"] = {"api_endpoint": f"{url}/drive/v3/"}
        return build_from_document(document, http=http, **options)


class Drive:
    """Drive calls, each retried by `policy`. Raises Transient and Permanent."""

    def __init__(self, service: DriveService, policy: RetryPolicy, pauses: Pauses) -> None:
        self._service = service
        self._policy = policy
        self._pauses = pauses

    def check_folder(self) -> str:
        """Look up the destination folder; returns the id of its shared drive, "" in My Drive.

        Raises Permanent if it is not a folder, is read-only, or is not on the configured shared drive.
        """
        service, what = self._service, f"GOOGLE_DRIVE_FOLDER_ID {self._service.folder_id}"
        service.drive_id = None
        asked = {"fileId": service.folder_id, "fields": FOLDER_FIELDS, "supportsAllDrives": True}
        folder = self._answer(DriveFolder, "get", **asked)
        if folder.mime_type == SHORTCUT_TYPE:
            raise Permanent(f"{what} is a shortcut", "set GOOGLE_DRIVE_FOLDER_ID to the folder that it leads to")
        if folder.mime_type != FOLDER_TYPE or folder.trashed:
            raise Permanent(f"{what} is {'in the trash' if folder.trashed else 'not a folder'}", SHARE_HINT)
        if not folder.capabilities.get("canAddChildren", True):
            raise Permanent(f"{what} may not be written by this account", RIGHTS_HINT)
        if (wanted := service.settings.shared_drive_id) and folder.drive_id != wanted:
            told = f"{what} is not on the shared drive {wanted}"
            hint = f"set GOOGLE_SHARED_DRIVE_ID to {folder.drive_id}"
            raise Permanent(told, hint if folder.drive_id else "unset GOOGLE_SHARED_DRIVE_ID: it is in My Drive")
        service.drive_id = folder.drive_id
        return folder.drive_id

    def named(self, name: str) -> Sequence[DriveFile]:
        """Everything in the folder with that name, oldest first, without the trash."""
        return [each for each in self._listed("=", name) if each.name == name]

    def beginning(self, start: str) -> Sequence[DriveFile]:
        """Everything in the folder whose name begins with `start`, oldest first, without the trash."""
        return [each for each in self._listed("contains", start) if each.name.startswith(start)]

    def _listed(self, compared: str, name: str) -> Sequence[DriveFile]:
        """The items of the folder, which is looked up once per process and again after a failure."""
        drive_id = self._service.drive_id  # read once: another thread may forget it
        if drive_id is None:
            drive_id = self.check_folder()
        folder = _quoted(self._service.folder_id)
        asked = {
            "q": f"name {compared} '{_quoted(name)}' and '{folder}' in parents and trashed = false",
            "fields": f"nextPageToken,incompleteSearch,files({FILE_FIELDS})",
            "pageSize": 100,
            "supportsAllDrives": True,
            "includeItemsFromAllDrives": True,
            **({"corpora": "drive", "driveId": drive_id} if drive_id else {"corpora": "user"}),
        }
        found: list[DriveFile] = []
        while True:
            try:
                page = self._answer(DrivePage, "list", **asked)
            except Permanent:
                self._service.drive_id = None
                raise
            if page.incomplete_search:
                raise Transient(f"Drive searched only partially for {name}", "no action needed: it is repeated")
            found += page.files or ()
            if not page.next_page_token:
                return sorted(found, key=lambda each: (each.created_time, each.id))
            asked["pageToken"] = page.next_page_token

    def get(self, file_id: str) -> DriveFile | None:
        """The file, even if it is in the trash; None if there is none."""
        return _unless(NOT_FOUND, lambda: self._answer(DriveFile, "get", fileId=file_id, **_ASKED))

    def new_id(self) -> str:
        """A pre-generated id for a file to be created."""
        return self._answer(GeneratedIds, "generateIds", count=1, space="drive", type="files").ids[0]

    def create(self, file_id: str, name: str, hour: HourFile) -> DriveFile | None:
        """The new file; None if the id is in use, perhaps by our own earlier attempt."""
        body = {"id": file_id, "name": name, "parents": [self._service.folder_id], **_metadata(hour)}
        return _unless(CONFLICT, lambda: self._upload("create", hour, body=body))

    def update(self, file_id: str, hour: HourFile) -> DriveFile:
        """Replace the file's content and properties; its name and folder stay as users set them."""
        return self._upload("update", hour, fileId=file_id, body=_metadata(hour))

    def download(self, file_id: str, into: BinaryIO) -> bool:
        """Write the content to `into`; False if there is no such file."""
        from googleapiclient.http import MediaIoBaseDownload

        def run(files: Any) -> bool:
            into.seek(0)
            into.truncate()
            request = files.get_media(fileId=file_id, supportsAllDrives=True)
            loading, done = MediaIoBaseDownload(into, request, chunksize=DOWNLOAD_BYTES), False
            while not done:
                _, done = loading.next_chunk(num_retries=0)
            return True

        return bool(_unless(NOT_FOUND, lambda: self._again(run, bool)))

    def trash(self, file_id: str) -> None:
        """Move the file to the trash, where it stays for 30 days."""
        self._answer(DriveFile, "update", fileId=file_id, body={"trashed": True}, supportsAllDrives=True)

    def _upload(self, method: str, hour: HourFile, **asked: Any) -> DriveFile:
        """Upload in one request, or in chunks above 5 MB. Raises Transient if Drive's MD5 or size differ from ours."""
        from googleapiclient.http import MediaInMemoryUpload, MediaIoBaseUpload

        hour.file.seek(0)
        if hour.size_bytes <= RESUMABLE_BYTES:
            media = MediaInMemoryUpload(hour.file.read(), mimetype="text/csv")
            found = self._answer(DriveFile, method, media_body=media, **asked, **_ASKED)
        else:
            media = MediaIoBaseUpload(hour.file, mimetype="text/csv", chunksize=CHUNK_BYTES, resumable=True)
            # Send bytes, not a stream: a stream would be empty when the transport resends after a lost connection.
            media.has_stream = lambda: False
            whole = {"media_body": media, **asked, **_ASKED}
            found = self._again(lambda files: self._in_pieces(getattr(files, method)(**whole)), DriveFile)
        if (found.md5_checksum, found.size) != (hour.digest, hour.size_bytes):
            raise Transient(
                f"{found.name}: Drive has {found.size} bytes with MD5 {found.md5_checksum}, "
                f"sent were {hour.size_bytes} with {hour.digest}",
                "no action needed: it is written again",
            )
        return found

    def _in_pieces(self, request: Any) -> Any:
        """Resumable upload. The library's own retry sends an empty body with the old length, so retry here instead:
        the next call on the same request first asks Drive how much it has.
        """
        answer, reached, idle = None, -1, 0
        while answer is None:
            try:
                with _translated():
                    _, answer = request.next_chunk(num_retries=0)
            except Permanent as error:
                if request.resumable_uri is not None and _status(error) in (NOT_FOUND, GONE):
                    raise Transient(
                        "Drive dropped the upload session before it was complete", "no action needed: it starts again"
                    ) from error
                raise
            except Transient:
                idle = 0 if request.resumable_progress > reached else idle + 1
                reached = max(reached, request.resumable_progress)
                if idle >= NO_PROGRESS:
                    raise
                self._pauses.pause(random.random() * min(16.0, 0.5 * 2**idle))  # noqa: S311 - jitter only
        return answer

    def _answer(self, kind: type[T], method: str, **asked: Any) -> T:
        """The response of one API request."""
        return self._again(lambda files: getattr(files, method)(**asked).execute(), kind)

    def _again(self, call: Callable[[Any], Any], kind: type[T]) -> T:
        """Run `call`, whose result is a `kind`, with retries; SDK exceptions are translated."""

        def once() -> T:
            with _translated():
                result = call(self._service.made())
                self._service.note_token()
            try:
                return msgspec.convert(result, kind, strict=False)  # sizes come as text
            except msgspec.ValidationError as error:  # the library returns a response that is not JSON as text
                why = "not JSON" if isinstance(result, str) else str(error)
                raise Transient(f"Drive's response cannot be read: {why}", AGAIN_HINT) from error

        return retry(once, self._policy, self._pauses)


FILE_FIELDS = ",".join(DriveFile.__struct_encode_fields__)
_ASKED: Mapping[str, Any] = {"fields": FILE_FIELDS, "supportsAllDrives": True}


def _metadata(hour: HourFile) -> dict[str, Any]:
    """The type, and properties that only this application sees."""
    escaped = str(hour.shape.escape).lower()
    properties = {"headwaterMd5": hour.digest, "headwaterRows": str(hour.rows), ESCAPED: escaped}
    if hour.min_at and hour.max_at:
        properties |= {FROM: hour.min_at.isoformat(), TO: hour.max_at.isoformat()}
    return {"mimeType": "text/csv", "appProperties": properties}


def _quoted(text: str) -> str:
    """Escape text for single quotes in a query; backslashes first."""
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _status(error: AppError) -> int:
    """The HTTP status that caused the error; 0 if none."""
    return int(getattr(error.__cause__, "status_code", 0) or 0)


def _unless(status: int, call: Callable[[], T]) -> T | None:
    """The result of a call; None if Drive answered with this status."""
    try:
        return call()
    except AppError as error:
        if _status(error) == status:
            return None
        raise


@contextmanager
def _translated() -> "Iterator[None]":
    """Translate exceptions of the SDK and its transport to ours."""
    from http.client import HTTPException

    from google.auth.exceptions import GoogleAuthError
    from googleapiclient.errors import Error, HttpError
    from httplib2 import HttpLib2Error

    try:
        yield
    except HttpError as error:
        raise error_of_response(error.status_code, error.content, error.resp) from error
    except (GoogleAuthError, Error, HttpLib2Error, HTTPException, OSError) as error:
        raise failed(error) from error
