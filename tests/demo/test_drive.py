"""The simulated Drive, sentence by sentence of contracts/google-drive.md, over plain HTTP."""

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from simulators.drive import DriveFault, DriveSimulator

ALL = {"supportsAllDrives": "true", "includeItemsFromAllDrives": "true"}
WRITES = {"supportsAllDrives": "true"}
FILES, UPLOAD = "/drive/v3/files", "/upload/drive/v3/files"
ID = "1chosen"


@dataclass
class Client:
    """One connection to the simulator, signed in."""

    drive: DriveSimulator
    connection: HTTPConnection
    token: str = ""

    def call(
        self, method: str, path: str, asked: dict[str, str] | None = None, body: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        sent = {"Authorization": f"Bearer {self.token}", **{name.replace("_", "-"): headers[name] for name in headers}}
        self.connection.request(method, f"{path}?{urlencode(asked or {})}", body, sent)
        answer = self.connection.getresponse()
        text = answer.read()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, named, json.loads(text) if "json" in named.get("content-type", "") else text

    def sign_in(self) -> None:
        form = {**self.drive.state.tokens.client, "grant_type": "refresh_token"}
        form["refresh_token"] = self.drive.state.tokens.refresh_token
        self.token = self.call("POST", "/token", body=urlencode(form).encode())[2]["access_token"]

    def create(self, **body: Any) -> tuple[int, Any]:
        body = {"parents": [self.drive.folder_id], **body}
        status, _, told = self.call("POST", FILES, WRITES, json.dumps(body).encode())
        return status, told

    def listed(self, query: str, **more: str) -> Any:
        asked = {"corpora": "drive", "driveId": self.drive.state.shared_drive, **ALL, **more, "q": query}
        return self.call("GET", FILES, {name: value for name, value in asked.items() if value})[2]


@pytest.fixture
def client() -> Iterator[Client]:
    with DriveSimulator() as drive:
        made = Client(drive, HTTPConnection(urlsplit(drive.url).netloc, timeout=20))
        made.sign_in()
        yield made
        made.connection.close()


def test_with_a_folder_files_outlive_their_service_and_no_id_is_used_twice(tmp_path: Path) -> None:
    with DriveSimulator(folder=tmp_path) as first:
        files = first.state.files
        of = {"parent": first.folder_id, "drive_id": first.state.shared_drive, "mime_type": "text/csv"}
        files.add({**of, "id": "a", "name": "a.csv", "properties": {"rows": "1"}}, b"1,\xff\r\n")
        files.add({**of, "id": "../b", "name": "b.csv"})
        kept = files.change("a", content=b"2\r\n")
        files.delete("../b")
        handed_out = files.new_id()
    with DriveSimulator(folder=tmp_path) as second:
        found = second.state.files
        assert found.held["a"] == kept
        assert found.held.keys() == files.held.keys()
        assert second.contents() == {"a.csv": b"2\r\n"}
        assert found.new_id() > handed_out
        assert found.change("a", name="c.csv").version > kept.version
        with pytest.raises(KeyError):
            found.add({**of, "id": "../b", "name": "b.csv"})


def reason(told: Any) -> str:
    return str(told["error"]["errors"][0]["reason"])


def test_without_a_flag_for_shared_drives_a_list_is_empty_and_everything_else_finds_nothing(client: Client) -> None:
    client.create(id=ID, name="a")
    assert [file["id"] for file in client.listed("name = 'a'")["files"]] == [ID]
    for flag in ALL:
        assert client.listed("name = 'a'", **{flag: ""})["files"] == []
    for method, path in (("GET", f"{FILES}/{ID}"), ("PATCH", f"{FILES}/{ID}"), ("DELETE", f"{FILES}/{ID}")):
        status, _, told = client.call(method, path)
        assert (status, reason(told)) == (404, "notFound")
    status, _, told = client.call("POST", FILES, body=json.dumps({"parents": [client.drive.folder_id]}).encode())
    assert (status, reason(told)) == (404, "notFound")


def test_names_may_be_there_twice_and_ids_only_once_also_after_the_file_is_gone(client: Client) -> None:
    made = client.call("GET", f"{FILES}/generateIds", {"count": "1"})[2]["ids"][0]
    assert client.create(id=made, name="same")[0] == 200
    assert client.create(name="same")[0] == 200
    assert client.create(id=made, name="same")[0] == 409
    assert len(client.listed("name = 'same'")["files"]) == 2
    client.call("DELETE", f"{FILES}/{made}", WRITES)
    assert client.create(id=made, name="same")[0] == 409


def test_trashed_files_are_listed_unless_that_is_ruled_out_and_an_escaped_name_is_exact(client: Client) -> None:
    client.create(id=ID, name="it's \\ here")
    client.call("PATCH", f"{FILES}/{ID}", WRITES, b'{"trashed":true}')
    name = r"name = 'it\'s \\ here'"
    assert len(client.listed(name)["files"]) == 1
    assert client.listed(f"{name} and trashed = false")["files"] == []
    assert client.listed("name = 'it'")["files"] == []
    status, _, told = client.call("GET", FILES, {"q": "name like 'x'"})
    assert (status, reason(told)) == (400, "invalid")


def test_a_list_comes_in_pages_and_tells_four_fields_unless_more_are_asked_for(client: Client) -> None:
    for _ in range(5):
        client.create(name="n", appProperties={"kind": "x"})
    seen: list[str] = []
    token = ""
    while True:
        page = client.listed("appProperties has { key='kind' and value='x' }", pageSize="2", pageToken=token)
        assert len(page["files"]) <= 2
        assert all(set(file) == {"kind", "id", "name", "mimeType"} for file in page["files"])
        seen += [file["id"] for file in page["files"]]
        token = page.get("nextPageToken", "")
        if not token:
            break
    assert len(set(seen)) == len(seen) == 5


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_content_with_metadata_in_one_request_has_checksum_size_and_a_new_revision_each_time(
    client: Client, end: str
) -> None:
    fields = {**WRITES, "uploadType": "multipart", "fields": "id,md5Checksum,size,version,headRevisionId"}
    told = []
    for method, path, content in (("POST", UPLOAD, b"a,b\r\n1,2\r\n"), ("PATCH", f"{UPLOAD}/{ID}", b"\n")):
        metadata = json.dumps({"id": ID, "name": "n", "parents": [client.drive.folder_id]} if method == "POST" else {})
        body = end.join(["--=b=", "Content-Type: application/json", "", metadata, "--=b=", "Content-Type: text/csv"])
        body += end * 2
        sent = body.encode() + content + f"{end}--=b=--{end}".encode()
        _, _, one = client.call(method, path, fields, sent, Content_Type='multipart/related; boundary="=b="')
        assert (one["md5Checksum"], one["size"]) == (md5(content, usedforsecurity=False).hexdigest(), str(len(content)))
        told.append(one)
    assert told[0]["headRevisionId"] != told[1]["headRevisionId"]
    assert int(told[0]["version"]) < int(told[1]["version"])
    assert client.call("GET", f"{FILES}/{ID}", {**WRITES, "alt": "media"})[2] == b"\n"


def test_a_resumable_upload_says_what_it_holds_goes_on_there_and_repeats_its_last_answer(client: Client) -> None:
    total, piece = 600_000, 262_144
    content = bytes(range(256)) * (total // 256 + 1)
    _, headers, _ = client.call(
        "POST", UPLOAD, {**WRITES, "uploadType": "resumable"}, json.dumps({"id": ID, "name": "big"}).encode()
    )
    assert client.drive.named("big") == []
    where = urlsplit(headers["location"])

    def put(begin: int, end: int) -> tuple[int, str, Any]:
        span = f"bytes {begin}-{end - 1}/{total}" if end > begin else f"bytes */{total}"
        path = f"{where.path}?{where.query}&"
        status, headers, told = client.call("PUT", path, body=content[begin:end], Content_Range=span)
        return status, headers.get("range", ""), told

    assert put(0, 0)[:2] == (308, "")
    assert put(0, piece)[:2] == (308, f"bytes=0-{piece - 1}")
    client.drive.state.uploads.keep_bytes = 100
    assert put(piece, 2 * piece)[:2] == (308, f"bytes=0-{piece + 99}")
    client.drive.add_fault(DriveFault(503), "PUT")
    assert put(piece + 100, 2 * piece)[0] == 503
    assert put(0, 0)[:2] == (308, f"bytes=0-{piece + 99}")
    client.drive.add_fault(DriveFault(503, after=True), "PUT")
    assert put(piece + 100, total)[0] == 503
    first, again = put(0, 0), put(0, 0)
    assert first == again
    assert (first[0], first[2]["id"]) == (200, ID)
    client.drive.state.uploads.forget()
    assert put(0, 0)[0] == 404


def test_a_service_account_may_change_files_of_a_user_but_owns_none(client: Client) -> None:
    root = client.drive.state.my_drive
    assert client.create(id=ID, name="theirs", parents=[root])[0] == 200
    client.token = service_token(client)
    assert client.call("PATCH", f"{FILES}/{ID}", WRITES, b'{"name":"changed"}')[0] == 200
    status, told = client.create(name="its own", parents=[root])
    assert (status, reason(told)) == (403, "storageQuotaExceeded")
    assert client.create(name="its own")[0] == 200


def service_token(client: Client) -> str:
    from google.auth import crypt, jwt

    account = client.drive.state.tokens.service_account(client.drive.url)
    signer = crypt.RSASigner.from_service_account_info(account)
    iat = int(time.time())
    claims = {
        "iat": iat,
        "exp": iat + 3600,
        "iss": account["client_email"],
        "aud": "https://oauth2.googleapis.com/token",
    }
    good: bytes = jwt.encode(signer, claims)
    bad = good[:-8] + base64.urlsafe_b64encode(b"forged")
    tokens = []
    for assertion in (bad, good):
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion.decode()}
        status, _, told = client.call("POST", "/token", body=urlencode(form).encode())
        tokens.append((status, told))
    assert tokens[0] == (400, {**tokens[0][1], "error": "invalid_grant"})
    return str(tokens[1][1]["access_token"])


def test_a_token_opens_nothing_after_its_time_and_a_code_of_nobody_buys_none(client: Client) -> None:
    client.drive.state.tokens.expire()
    status, _, told = client.call("GET", f"{FILES}/x", WRITES)
    assert (status, reason(told)) == (401, "authError")
    form = {**client.drive.state.tokens.client, "grant_type": "authorization_code", "code": "made up"}
    assert client.call("POST", "/token", body=urlencode(form).encode())[0] == 400


@pytest.mark.parametrize("kind", ["folder", "shortcut", "spreadsheet"])
def test_what_has_no_binary_content_has_no_checksum_and_neither_gives_nor_takes_any(client: Client, kind: str) -> None:
    mime_type = f"application/vnd.google-apps.{kind}"
    status, made = client.create(name="theirs", mimeType=mime_type)
    assert status == 200
    shown = client.call("GET", f"{FILES}/{made['id']}", {**WRITES, "fields": "mimeType,md5Checksum,size"})[2]
    assert shown == {"mimeType": mime_type}
    for method, path, more in (("GET", FILES, {"alt": "media"}), ("PATCH", UPLOAD, {"uploadType": "media"})):
        status, _, told = client.call(method, f"{path}/{made['id']}", {**WRITES, **more}, b"x")
        assert (status, told["error"]["errors"][0]["reason"]) == (403, "fileNotDownloadable")
