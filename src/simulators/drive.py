"""A Google Drive that runs inside this process: one shared drive, one My Drive, its own sign-in.

Invariant: the real client library talks to it unmodified over HTTP on a loopback port; what it does not understand it
refuses, as the service would.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from simulators.drive_api import DriveApi, DriveFault, State
from simulators.drive_files import FOLDER_TYPE, Files, StoredFile
from simulators.drive_uploads import Uploads
from simulators.google_tokens import Tokens
from simulators.http import Served


def _now() -> datetime:
    return datetime.now(UTC)


class DriveSimulator:
    """Use it as a context manager, or `start` and `close` it. `state` is what it holds and what it shall suffer.

    Files stay in `folder` for the next one; None = they end with this one.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        clock: Callable[[], datetime] = _now,
        lifetime_seconds: int = 3599,
        folder: Path | None = None,
    ) -> None:
        self._served = Served("drive", port)
        self.state = State(Files(clock, folder), Tokens(lifetime_seconds), Uploads(), self._served.wait)
        for root, drive_id in ((self.state.my_drive, ""), (self.state.shared_drive, self.state.shared_drive)):
            self._add_folder(root, drive_id, "")
        self.folder_id = "1demofolder"
        self._add_folder(self.folder_id, self.state.shared_drive, self.state.shared_drive)

    def start(self) -> Self:
        """Listen and serve from a thread."""
        self._served.start(DriveApi(self.state, lambda: self.url).respond)
        return self

    def close(self) -> None:
        """Stop listening and end every connection; nothing when it does not run."""
        self._served.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens, without a trailing slash."""
        return self._served.url

    def add_fault(self, fault: DriveFault, when: str = "", times: int = 1) -> None:
        """The next `times` requests whose `METHOD path` has the pattern `when` in it get the fault."""
        with self.state.lock:
            self.state.waiting.extend([(fault, when)] * times)

    def named(self, name: str) -> list[StoredFile]:
        """Every file of that name that is not in the trash."""
        return list(self.state.files.matching(lambda file: file.name == name and not file.trashed))

    def contents(self) -> dict[str, bytes]:
        """Name -> content of every file that is not in the trash. Raises ValueError when a name is there twice."""
        found = list(self.state.files.matching(lambda file: file.is_binary and not file.trashed))
        by_name = {file.name: file.content for file in found}
        if len(by_name) != len(found):
            raise ValueError(f"a name is there twice: {sorted(file.name for file in found)}")
        return by_name

    def _add_folder(self, file_id: str, drive_id: str, parent: str) -> None:
        if file_id not in self.state.files.held:
            of = {"id": file_id, "name": file_id, "parent": parent, "drive_id": drive_id, "mime_type": FOLDER_TYPE}
            self.state.files.add(of)
