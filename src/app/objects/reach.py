"""Which keys a caller may read and write.

Invariant: a key that stores would rewrite never gets as far as a store, and one that the caller may not touch answers
the same whether or not it exists.
"""

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from app.core.errors import Rejected
from app.objects.faults import NotServed
from app.stores.objects import CONTROL, MAX_KEY_BYTES, check_key

HIDDEN_SEGMENT = ".headwater"


@dataclass(frozen=True, slots=True)
class Reach:
    """`allowed` prefixes of the routes and `own` of the caller, "" and none = all; under `read_only` nobody writes."""

    allowed: tuple[str, ...] = ()
    read_only: str | None = None
    own: str = ""

    def reads(self, key: str) -> str:
        """`key`. Raises NotServed."""
        checked = _checked(key)
        self._within(checked, "key")
        return checked

    def writes(self, key: str) -> str:
        """`key`. Raises NotServed."""
        checked = self.reads(key)
        if self.read_only is not None and checked.startswith(self.read_only):
            raise NotServed(
                403,
                f"{self.read_only or 'the whole bucket'} is where the export writes, and read-only here",
                "choose another key, or set S3_ROUTES_WRITE_EXPORTS=true",
                fault="key",
            )
        return checked

    def lists(self, prefix: str) -> str:
        """`prefix`. Raises NotServed."""
        if not CONTROL.isdisjoint(prefix) or len(prefix.encode("utf-8", "surrogatepass")) > MAX_KEY_BYTES:
            raise NotServed(422, "no key begins like this prefix", "leave out control characters", fault="prefix")
        self._within(prefix, "prefix")
        return prefix

    def sweeps(self, key: str) -> bool:
        """Whether an upload to `key` can have come through /s3."""
        return (not self.allowed or key.startswith(self.allowed)) and not (
            self.read_only is not None and key.startswith(self.read_only)
        )

    def _within(self, text: str, fault: str) -> None:
        if not text.startswith(self.own):
            raise NotServed(403, f"your key reaches only {self.own}", f"begin with {self.own}", fault=fault)
        if self.allowed and not text.startswith(self.allowed):
            places = ", ".join(self.allowed)
            raise NotServed(403, f"/s3 is confined to {places}", f"begin with one of {places}", fault=fault)


def _checked(key: str) -> str:
    try:
        check_key(key)
    except Rejected as error:
        raise NotServed(422, error.message, error.hint, fault="key") from error
    if key.split("/", 1)[0].startswith(HIDDEN_SEGMENT):
        raise NotServed(
            422, f"keys below {HIDDEN_SEGMENT} are the service's own", "choose another first segment", fault="key"
        )
    return key


def check_query(query: bytes) -> None:
    """Raises NotServed for a query string that is not UTF-8: it would be read as another key."""
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError as error:
        raise NotServed(422, "the query is not UTF-8", "percent-encode the key's UTF-8 bytes") from error
