"""Google Drive v3 as few calls; the home of googleapiclient. Facts are those of contracts/google-drive.md.

Invariants: every call may be repeated, since a create carries an id that was made before; the flags for shared drives
are always sent; an upload counts only when Drive's checksum and size are ours; no exception of the SDK leaves here.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from app.core.errors import AppError, Permanent, Transient
from app.core.retry import Pauses, RetryPolicy, retry
from app.dynamo_to_drive.credentials import Given, credentials, keep_token
from app.dynamo_to_drive.drive_errors import AGAIN_HINT, answered, failed

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

RESUMABLE_BYTES = 5_000_000
CHUNK_BYTES = 4 << 20  # a multiple of 256 KiB, held in memory
DOWNLOAD_BYTES = 8 << 20
NO_PROGRESS = 6
GONE = (404, 410)
GOOGLE_TYPES = "application/vnd.google-apps."
FOLDER_TYPE = f"{GOOGLE_TYPES}folder"
FILE_FIELDS = "id,name,mimeType,md5Checksum,size,headRevisionId,createdTime,appProperties,trashed"
FOLDER_FIELDS = "id,name,mimeType,driveId,trashed,capabilities(canAddChildren)"


@dataclass(frozen=True, slots=True)
class Patience:
    """How failures that may pass are met."""

    policy: RetryPolicy
    pauses: Pauses
    draw: Callable[[], float]


@dataclass(frozen=True, slots=True)
class DriveFile:
    """What is known of a file."""

    file_id: str
    name: str
    md5: str
    size_bytes: int
    revision: str
    created: str
    properties: Mapping[str, str]
    trashed: bool
    mime_type: str

    @property
    def is_binary(self) -> bool:
        """False for a folder, a shortcut, a document: what has no bytes to download or to replace."""
        return not self.mime_type.startswith(GOOGLE_TYPES)


@dataclass(frozen=True, slots=True)
class FileContent:
    """What to upload: a seekable stream, its MD5 and size, and properties that only this application sees."""

    body: BinaryIO
    md5: str
    size_bytes: int
    properties: Mapping[str, str]


class DriveService:
    """The client library behind `given`, at `api_url` ("" = Google's). One connection per thread: it is not safe."""

    def __init__(self, given: Given, api_url: str, timeout_seconds: float) -> None:
        self.given = given
        self._api_url = api_url
        self._timeout_seconds = timeout_seconds
        self._here = threading.local()

    def made(self) -> Any:
        """The `files` API. Raises Permanent for credentials that cannot be used."""
        if not hasattr(self._here, "service"):
            found = credentials(self.given)
            self._here.http = self._connect(found)
            self._here.service = self._build(self._here.http)
            self._here.token, self._here.found = found.token, found
        return self._here.service

    def forget(self) -> None:
        """End this thread's connections and read the credentials anew next time."""
        if hasattr(self._here, "http"):
            self._here.http.close()
        self._here.__dict__.clear()

    def note_token(self) -> None:
        """Keep the token when the call just made refreshed it."""
        found = getattr(self._here, "found", None)
        if found is not None and found.token != self._here.token:
            self._here.token = found.token
            keep_token(self.given, found)

    def _connect(self, found: Any) -> Any:
        import httplib2
        from google_auth_httplib2 import AuthorizedHttp

        plain = httplib2.Http(timeout=self._timeout_seconds)
        plain.redirect_codes = plain.redirect_codes - {308}  # Drive's 308 says how much of an upload it has
        return AuthorizedHttp(found, http=plain)

    def _build(self, http: Any) -> Any:
        from googleapiclient.discovery import build_from_document

        document = _discovery()
        options: dict[str, Any] = {}
        if self._api_url:
            # The library drops the path of an endpoint, and uploads go to the document's own root.
            document = {**document, "rootUrl": f"{self._api_url}/", "baseUrl": f"{self._api_url}/drive/v3/"}
            options["client_options"] = {"api_endpoint": f"{self._api_url}/drive/v3/"}
        return build_from_document(document, http=http, **options)


class Drive:
    """Calls on one folder, each retried as `patience` says. Raises Transient and Permanent."""

    def __init__(self, service: DriveService, patience: Patience) -> None:
        self._service = service
        self._patience = patience

    def folder(self, folder_id: str) -> Mapping[str, Any]:
        """Its `mimeType`, `driveId` (absent in My Drive), `trashed` and `capabilities`."""
        found: Mapping[str, Any] = self._again(
            lambda files: files.get(fileId=folder_id, fields=FOLDER_FIELDS, supportsAllDrives=True).execute()
        )
        return found

    def named(self, name: str, folder_id: str, drive_id: str) -> Sequence[DriveFile]:
        """Everything of that name in the folder that is not in the trash, oldest first."""
        found = self._listed(f"name = '{_quoted(name)}'", name, folder_id, drive_id)
        return [each for each in found if each.name == name]

    def beginning(self, start: str, folder_id: str, drive_id: str) -> Sequence[DriveFile]:
        """Everything in the folder whose name begins so and that is not in the trash, oldest first."""
        found = self._listed(f"name contains '{_quoted(start)}'", start, folder_id, drive_id)
        return [each for each in found if each.name.startswith(start)]

    def _listed(self, term: str, name: str, folder_id: str, drive_id: str) -> Sequence[DriveFile]:
        where = {"corpora": "drive", "driveId": drive_id} if drive_id else {"corpora": "user"}
        asked = {
            "q": f"{term} and '{_quoted(folder_id)}' in parents and trashed = false",
            "fields": f"nextPageToken,incompleteSearch,files({FILE_FIELDS})",
            "pageSize": 100,
            "supportsAllDrives": True,
            "includeItemsFromAllDrives": True,
            **where,
        }
        found: list[DriveFile] = []
        while True:
            page = self._again(lambda files: files.list(**asked).execute())
            if page.get("incompleteSearch"):
                raise Transient(f"Drive searched only a part for {name}", "nothing to do: it is asked again")
            found += [_file(each) for each in page.get("files", ())]
            if not page.get("nextPageToken"):
                return sorted(found, key=lambda each: (each.created, each.file_id))
            asked["pageToken"] = page["nextPageToken"]

    def get(self, file_id: str) -> DriveFile | None:
        """The file, also from the trash; None when there is none."""
        try:
            found = self._again(
                lambda files: files.get(fileId=file_id, fields=FILE_FIELDS, supportsAllDrives=True).execute()
            )
        except AppError as error:
            if _status(error) == 404:  # noqa: PLR2004 - HTTP's own number
                return None
            raise
        return _file(found)

    def new_id(self) -> str:
        """An id for a file that is to be created."""
        made = self._again(lambda files: files.generateIds(count=1, space="drive", type="files").execute())
        return str(made["ids"][0])

    def create(self, file_id: str, name: str, folder_id: str, content: FileContent) -> DriveFile | None:
        """The new file; None when the id is in use, perhaps by an earlier try of ours."""
        body = {"id": file_id, "name": name, "parents": [folder_id], **_metadata(content)}
        try:
            return self._upload(lambda files, media: files.create(body=body, media_body=media, **_ASKED), content)
        except AppError as error:
            if _status(error) == 409:  # noqa: PLR2004 - HTTP's own number
                return None
            raise

    def update(self, file_id: str, content: FileContent) -> DriveFile:
        """The file with its content and properties replaced; name and folder stay as people made them."""
        body = _metadata(content)
        return self._upload(
            lambda files, media: files.update(fileId=file_id, body=body, media_body=media, **_ASKED), content
        )

    def download(self, file_id: str, into: BinaryIO) -> None:
        """Write the content to `into`."""
        from googleapiclient.http import MediaIoBaseDownload

        def run(files: Any) -> None:
            into.seek(0)
            into.truncate()
            request = files.get_media(fileId=file_id, supportsAllDrives=True)
            loading, done = MediaIoBaseDownload(into, request, chunksize=DOWNLOAD_BYTES), False
            while not done:
                _, done = loading.next_chunk(num_retries=0)

        self._again(run)

    def trash(self, file_id: str) -> None:
        """Into the trash, where it stays for 30 days."""
        body = {"trashed": True}
        self._again(lambda files: files.update(fileId=file_id, body=body, supportsAllDrives=True).execute())

    def _upload(self, request: Callable[[Any, Any], Any], content: FileContent) -> DriveFile:
        """In one request, or above 5 MB in pieces. The answer must show what was sent."""
        from googleapiclient.http import MediaInMemoryUpload, MediaIoBaseUpload

        content.body.seek(0)
        if content.size_bytes <= RESUMABLE_BYTES:
            media = MediaInMemoryUpload(content.body.read(), mimetype="text/csv")
            found = _file(self._again(lambda files: request(files, media).execute()))
        else:
            media = MediaIoBaseUpload(content.body, mimetype="text/csv", chunksize=CHUNK_BYTES, resumable=True)
            # As bytes: a stream that the transport sends again after a lost connection is empty by then.
            media.has_stream = lambda: False
            found = _file(self._again(lambda files: self._in_pieces(request(files, media))))
        if (found.md5, found.size_bytes) != (content.md5, content.size_bytes):
            raise Transient(
                f"{found.name}: Drive has {found.size_bytes} bytes with MD5 {found.md5}, "
                f"sent were {content.size_bytes} with {content.md5}",
                "nothing to do: it is written again",
            )
        return found

    def _in_pieces(self, request: Any) -> Any:
        """The library's own retry sends an empty body under the old length, so each failed piece is asked about anew:
        the next call on the same request first learns from Drive how much it has.
        """
        answer, reached, idle = None, -1, 0
        while answer is None:
            try:
                with _translated():
                    _, answer = request.next_chunk(num_retries=0)
            except Permanent as error:
                if request.resumable_uri is not None and _status(error) in GONE:
                    raise Transient("Drive forgot the upload in its middle", "nothing to do: it starts anew") from error
                raise
            except Transient:
                idle = 0 if request.resumable_progress > reached else idle + 1
                reached = max(reached, request.resumable_progress)
                if idle >= NO_PROGRESS:
                    raise
                self._patience.pauses.pause(self._patience.draw() * min(16.0, 0.5 * 2**idle))
        return answer

    def _again(self, call: Callable[[Any], T]) -> T:
        """Run `call` on the API until it succeeds or the patience ends; nothing of the SDK's passes."""

        def once() -> T:
            with _translated():
                made = self._service.made()
                result = call(made.files())
                self._service.note_token()
            if isinstance(result, str):  # what the library hands over when it is no JSON
                raise Transient("Drive's answer cannot be read: it is no JSON", AGAIN_HINT)
            return result

        return retry(once, self._patience.policy, self._patience.pauses, self._patience.draw)


_ASKED: Mapping[str, Any] = {"fields": FILE_FIELDS, "supportsAllDrives": True}


def _discovery() -> Mapping[str, Any]:
    """The API's description as the library ships it: nothing is fetched."""
    import json
    from pathlib import Path

    import googleapiclient

    folder = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    document: Mapping[str, Any] = json.loads((folder / "drive.v3.json").read_text(encoding="utf-8"))
    return document


def _metadata(content: FileContent) -> dict[str, Any]:
    return {"mimeType": "text/csv", "appProperties": dict(content.properties)}


def _quoted(text: str) -> str:
    """Inside single quotes of a query: the backslash first."""
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _file(found: Mapping[str, Any]) -> DriveFile:
    return DriveFile(
        file_id=found["id"],
        name=found.get("name", ""),
        md5=found.get("md5Checksum", ""),
        size_bytes=int(found.get("size", 0)),
        revision=found.get("headRevisionId", ""),
        created=found.get("createdTime", ""),
        properties=found.get("appProperties", {}),
        trashed=bool(found.get("trashed")),
        mime_type=found.get("mimeType", ""),
    )


def _status(error: AppError) -> int:
    """The HTTP status behind an error of ours; 0 for none."""
    return int(getattr(error.__cause__, "status_code", 0) or 0)


@contextmanager
def _translated() -> "Iterator[None]":
    """What the SDK and its transport raise, as what the caller should do about it."""
    from http.client import HTTPException

    from google.auth.exceptions import GoogleAuthError
    from googleapiclient.errors import Error, HttpError
    from httplib2 import HttpLib2Error

    try:
        yield
    except HttpError as error:
        raise answered(error.status_code, error.content, error.resp) from error
    except (GoogleAuthError, Error, HttpLib2Error, HTTPException, OSError) as error:
        raise failed(error) from error
