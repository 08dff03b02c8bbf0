"""Links that read one object for a while without a key.

Invariant: a link gives no more than whoever made it had: one object, by reading, until an instant that is part of what
is signed.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlencode

from app.core.errors import Permanent
from app.core.files import sync_directory, sync_file
from app.objects.requests import NotServed

SECRET_BYTES = 32
SECRET_NAME = "link.key"  # noqa: S105 - the name of the file
LINK_HINT = "ask whoever sent it for a new one"


class Links(Protocol):
    """How links are made and opened."""

    def make(self, key: str, now: datetime, seconds: int) -> str:
        """A URL, or a path of this service. Whether the object exists is not looked at."""

    def check(self, key: str, now: datetime, expires: int, signature: str) -> None:
        """Raises NotServed unless this service made the link and it has not expired."""


class StoreLinks:
    """Links to the store itself. `presign` takes key, seconds and Content-Disposition."""

    def __init__(self, presign: Callable[[str, int, str], str]) -> None:
        self._presign = presign

    def make(self, key: str, now: datetime, seconds: int) -> str:  # noqa: ARG002 - the store has its own clock
        """See Links."""
        return self._presign(key, seconds, disposition(key))

    def check(self, key: str, now: datetime, expires: int, signature: str) -> None:  # noqa: ARG002 - the port's
        """See Links."""
        raise NotServed(404, "links of this store do not lead here", LINK_HINT)


class SignedLinks:
    """Links to this service, signed with a secret of its own in `folder`. Removing that file ends every link."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SECRET_NAME

    def make(self, key: str, now: datetime, seconds: int) -> str:
        """See Links."""
        expires = int((now + timedelta(seconds=seconds)).timestamp())
        return "/s3/shared?" + urlencode({"key": key, "expires": expires, "signature": self._sign(key, expires)})

    def check(self, key: str, now: datetime, expires: int, signature: str) -> None:
        """See Links. Both failures cost the same and look the same."""
        right = hmac.compare_digest(self._sign(key, expires).encode(), signature.encode("utf-8", "replace"))
        if not right or now.timestamp() >= expires:
            raise NotServed(403, "the link has expired or was changed", LINK_HINT, fault="signature")

    def _sign(self, key: str, expires: int) -> str:
        return hmac.new(self._secret(), f"{expires}\n{key}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        """Read each time, so that processes that share a folder agree, and that removing it works at once."""
        try:
            if not self._path.exists():
                self._create()
            return self._path.read_bytes()
        except OSError as error:
            raise Permanent(f"{self._path}: {error.strerror}", "let the service's user write to DATA_DIR") from error

    def _create(self) -> None:
        """Whole or not at all, and never over one that another process made meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{SECRET_NAME}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, secrets.token_bytes(SECRET_BYTES))
            sync_file(descriptor)
            os.link(temporary, self._path)
            sync_directory(self._path.parent)
        except FileExistsError:
            pass
        finally:
            os.close(descriptor)
            temporary.unlink()


def disposition(key: str) -> str:
    """Content-Disposition of a download: never shown as a page, named as the last segment of its key."""
    name = key.rpartition("/")[2]
    plain = "".join(each if each.isascii() and each.isprintable() and each not in '"\\' else "_" for each in name)
    extended = f"; filename*=UTF-8''{quote(name, safe='')}" if plain != name else ""
    return f'attachment; filename="{plain}"{extended}'
