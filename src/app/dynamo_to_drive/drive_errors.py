"""What Drive and its sign-in refuse, as what a person or the next run should do.

Invariants: the reason is read from the answer's machine-readable part, in either of Google's two styles; text of a
proxy is no reason; no message holds a token. The table is section 6 of contracts/google-drive.md.
"""

import json
from collections.abc import Mapping
from typing import Any

from app.core.errors import AppError, Permanent, Transient

AGAIN_HINT = "nothing to do: it is tried again, and the next run goes on"
SHARE_HINT = (
    "check GOOGLE_DRIVE_FOLDER_ID and GOOGLE_SHARED_DRIVE_ID, and add the account of the credentials to the shared "
    "drive as Content manager"
)
RIGHTS_HINT = "make the account of the credentials Content manager of the shared drive"
ENABLE_HINT = "enable the Google Drive API in the project of the credentials (Google Cloud Console)"
SCOPE_HINT = "the token lacks the scope drive: run `python -m app google` again"
SIGN_IN_HINT = "the credentials are not accepted any more: make a new key, or run `python -m app google` again"
HINTS: Mapping[str, str] = {
    "storageQuotaExceeded": "service accounts have no storage of their own: share a Shared Drive with the account and "
    "set GOOGLE_DRIVE_FOLDER_ID to it or to a folder on it; for a user's own Drive, free space",
    "teamDriveFileLimitExceeded": "the shared drive is full (500,000 items, trash included): archive or delete some",
    "teamDriveHierarchyTooDeep": "the folder lies too deep: choose one nearer to the top",
    "numChildrenInNonRootLimitExceeded": "the folder holds too many files: set GOOGLE_DRIVE_FOLDER_ID to a new one",
    "accessNotConfigured": ENABLE_HINT,
    "SERVICE_DISABLED": ENABLE_HINT,
    "dailyLimitExceeded": "the project's quota of the day is used up: it comes back at midnight Pacific time",
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
    400: "check GOOGLE_DRIVE_FOLDER_ID and GOOGLE_SHARED_DRIVE_ID; else it is a fault of the program: please report it",
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
    "the key was deleted or the consent withdrawn, or this machine's clock is wrong: make a new key for a service "
    "account, run `python -m app google` again for an installed app"
)
TEXT_LIMIT = 300
TOO_MANY, SERVER_FAULT, TIMEOUT = 429, 500, 408


def answered(status: int, content: bytes, headers: Mapping[str, str]) -> AppError:
    """An answer that is no success."""
    reason, message = _reason(content)
    text = f"Drive answered {status} {reason}: {message}".replace("  ", " ")[:TEXT_LIMIT]
    if reason in PASSING or status in (TOO_MANY, TIMEOUT) or status >= SERVER_FAULT:
        return Transient(text, AGAIN_HINT, retry_after_seconds=_seconds(headers.get("retry-after", "")))
    return Permanent(text, HINTS.get(reason) or HINTS_OF_STATUS.get(status, RIGHTS_HINT))


def _reason(content: bytes) -> tuple[str, str]:
    """The first reason that is known here, else the first one; and the message. Both styles may stand in one answer."""
    try:
        said: Any = json.loads(content)["error"]
        listed = [each.get("reason") for each in (*said.get("errors", ()), *said.get("details", ()))]
        given = [str(each) for each in (*listed, said.get("status")) if each]
        known = (each for each in given if each in PASSING or each in HINTS)
        return next(known, given[0] if given else ""), str(said.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", "no reason given"


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() else None


def failed(error: Exception) -> AppError:
    """No answer at all, or no sign-in. google-auth's own word on what may be repeated is not to be relied on."""
    from google.auth.exceptions import GoogleAuthError, RefreshError

    said = error.args[1] if len(error.args) > 1 and isinstance(error.args[1], dict) else {}
    if isinstance(error, RefreshError) and str(said.get("error")) in REVOKED:
        why = f"{said['error']}: {said.get('error_description', '')}"
        return Permanent(f"Google refused the sign-in: {why[:TEXT_LIMIT]}", GRANT_HINT)
    # The second argument of a sign-in's error is the whole answer, which may hold a token.
    text = str(error.args[0]) if isinstance(error, GoogleAuthError) and error.args else str(error)
    return Transient(f"Drive cannot be reached: {text[:TEXT_LIMIT] or type(error).__name__}", AGAIN_HINT)
