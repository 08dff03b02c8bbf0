"""Which keys a caller may read and write.

Invariant: a key that stores would rewrite is never written, and one that the caller may not touch answers the same
whether or not it exists.
"""

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from app.objects.faults import NotServed
from app.stores.objects import CONTROL, MAX_KEY_BYTES, BadKey, check_key, is_new_form, taken_for

HIDDEN_SEGMENT = ".headwater"


@dataclass(frozen=True, slots=True)
class Reach:
    """`allowed` prefixes of the routes and `own` of the caller, "" and none = all; under `read_only` nobody writes, and
    under `exports`, which is the same place also where the routes may write it, no key of an odd form is deleted.

    Each holds for every key that a store could take the given one for: a backslash must not lead out of a prefix, or
    into one.
    """

    allowed: tuple[str, ...] = ()
    read_only: str | None = None
    own: str = ""
    exports: str | None = None

    def reads(self, key: str) -> str:
        """`key`, of whatever form: the store looks whether it has exactly that one. Raises NotServed."""
        for form in _forms(key):
            if form.split("/", 1)[0].startswith(HIDDEN_SEGMENT):
                hint = "choose another first segment"
                raise NotServed(422, f"keys below {HIDDEN_SEGMENT} are the service's own", hint, fault="key")
            self._within(form, "key")
        return key

    def writes(self, key: str) -> str:
        """`key`, which a new object may have. Raises NotServed."""
        try:
            check_key(key)
        except BadKey as error:
            raise NotServed(422, error.message, error.hint, fault="key") from error
        return self._changes(key)

    def deletes(self, key: str) -> str:
        """`key`, of whatever form. Raises NotServed."""
        if not is_new_form(key) and self.exports is not None and _is_below(self.exports, key):
            raise NotServed(
                403,
                f"{key!r} can be taken for a key of the export, and is only read here",
                "delete it with the store's own tools",
                fault="key",
            )
        return self._changes(key)

    def _changes(self, key: str) -> str:
        self.reads(key)
        if self.read_only is not None and _is_below(self.read_only, key):
            raise NotServed(
                403,
                f"{self.read_only or 'the whole bucket'} is where the export writes, and read-only here",
                "choose another key, or set S3_ROUTES_WRITE_EXPORTS=true",
                fault="key",
            )
        return key

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


def _forms(key: str) -> set[str]:
    return {key, taken_for(key)}


def _is_below(prefix: str, key: str) -> bool:
    return any(form.startswith(prefix) for form in _forms(key))


def check_query(query: bytes) -> None:
    """Raises NotServed for a query string that is not UTF-8: it would be read as another key."""
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError as error:
        raise NotServed(422, "the query is not UTF-8", "percent-encode the key's UTF-8 bytes") from error
