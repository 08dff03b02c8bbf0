"""A Google Drive that runs inside this process: one shared drive, one My Drive, its own sign-in.

Invariant: the real client library talks to it unmodified over HTTP on a loopback port; what it does not understand it
refuses, as the service would.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from threading import Event, Thread
from typing import Self

from app.demo.drive_api import DriveApi, DriveFault, State
from app.demo.drive_files import FOLDER_TYPE, Files, StoredFile
from app.demo.drive_uploads import Uploads
from app.demo.faults import CutHere
from app.demo.google_tokens import Tokens
from app.demo.influx_http import Server


def _now() -> datetime:
    return datetime.now(UTC)


class DriveSimulator:
    """Use it as a context manager, or `start` and `close` it. `state` is what it holds and what it shall suffer."""

    def __init__(self, port: int = 0, *, clock: Callable[[], datetime] = _now, lifetime_seconds: int = 3599) -> None:
        self._closing = Event()
        self.state = State(Files(clock), Tokens(lifetime_seconds), Uploads(), self._wait)
        for folder, drive_id in ((self.state.my_drive, ""), (self.state.shared_drive, self.state.shared_drive)):
            self._add_folder(folder, drive_id, "")
        self.folder_id = "1demofolder"
        self._add_folder(self.folder_id, self.state.shared_drive, self.state.shared_drive)
        self._port = port
        self._server: Server | None = None
        self._thread: Thread | None = None

    def start(self) -> Self:
        """Listen and serve from a thread."""
        self._closing.clear()
        api = DriveApi(self.state, lambda: self.url)
        self._server = Server(("127.0.0.1", self._port), api.respond)
        self._port = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), name="drive-simulator", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening and end every connection; nothing when it does not run."""
        self._closing.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._server = self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens, without a trailing slash."""
        return f"http://127.0.0.1:{self._port}"

    def add_fault(self, fault: DriveFault, when: str = "", times: int = 1) -> None:
        """The next `times` requests whose `METHOD path` has the pattern `when` in it get the fault."""
        with self.state.lock:
            self.state.waiting.extend([(fault, when)] * times)

    def named(self, name: str) -> list[StoredFile]:
        """Every file of that name that is not in the trash."""
        return list(self.state.files.matching(lambda file: file.name == name and not file.trashed))

    def contents(self) -> dict[str, bytes]:
        """Name -> content of every file that is not in the trash. Raises ValueError when a name is there twice."""
        found = list(self.state.files.matching(lambda file: file.mime_type != FOLDER_TYPE and not file.trashed))
        by_name = {file.name: file.content for file in found}
        if len(by_name) != len(found):
            raise ValueError(f"a name is there twice: {sorted(file.name for file in found)}")
        return by_name

    def _add_folder(self, file_id: str, drive_id: str, parent: str) -> None:
        of = {"id": file_id, "name": file_id, "parent": parent, "drive_id": drive_id, "mime_type": FOLDER_TYPE}
        self.state.files.add(of)

    def _wait(self, seconds: float) -> None:
        """Wait that long; a simulator that is closed meanwhile ends the connection instead."""
        if seconds and self._closing.wait(seconds):
            raise CutHere
