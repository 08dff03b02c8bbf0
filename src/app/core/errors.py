"""Errors, classified by what the caller should do.

    AppError(message, hint)
    ├── Transient     retry with backoff: the cause may pass
    │   ├── Conflict      somebody else changed the object to be replaced: re-read, then retry
    │   └── LeaseLost     another process owns this job now: stop, it continues there
    ├── Permanent     a person must act: a retry cannot help
    │   └── BadSettings   the configuration is invalid: the process must not start
    ├── Rejected      this item is set aside; the others continue (HTTP 4xx)
    └── Stopped       the process was asked to stop; nothing is wrong

Invariant: every SDK's exceptions are translated to one of these once, in the module that owns the SDK, with `raise ...
from`. The hint is the next thing for an operator to try; logs, the dashboard and HTTP bodies show it.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class AppError(Exception):
    """The root. `message` names the thing and the value, `hint` the next step. Neither may hold a secret."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Transient(AppError):
    """May pass by itself. `retry_after_seconds` is what the outside system asked for, None if it asked for nothing."""

    def __init__(self, message: str, hint: str = "", *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after_seconds = retry_after_seconds


class Conflict(Transient):
    """The object is not the version to be replaced. Rows read before this must not be written again."""


class LeaseLost(Transient):
    """The lease of this job expired or is held by another owner; a commit was refused."""


class Permanent(AppError):
    """A retry cannot help until a person has acted."""


class BadSettings(Permanent):
    """One line per fault in `faults`: variable, value (secrets masked), what is allowed. Exit code 78."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults), "correct the variables named above, then start again")
        self.faults = tuple(faults)


class Rejected(AppError):
    """This item cannot be accepted; it is set aside with the reason, and the others continue."""


class Stopped(AppError):
    """A stop was requested and a safe point was reached; this run ends here and the next one continues."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question, "did you mean ...?", naming the closest of `known` or one that starts with `word`; "" if none."""
    names = list(known)
    meant = get_close_matches(word.lower(), names, n=1) or [name for name in names if name.startswith(word.lower())][:1]
    return f"did you mean {meant[0]}? " if meant else ""
