"""What Drive and its sign-in refuse, as what a person or the next run should do.

Invariant: the reason is read from the answer's machine-readable part, in either of Google's two styles; text of a proxy
is no reason. The table is section 6 of contracts/google-drive.md.
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
HINTS: Mapping[str, str] = {
    "storageQuotaExceeded": "service accounts have no storage of their own: share a Shared Drive with the account and "
    "set GOOGLE_DRIVE_FOLDER_ID to it or to a folder on it; for a user's own Drive, free space",
    "teamDriveFileLimitExceeded": "the shared drive is full (500,000 items, trash included): archive or delete some",
    "teamDriveHierarchyTooDeep": "the folder lies too deep: choose one nearer to the top",
    "numChildrenInNonRootLimitExceeded": "the folder holds too many files: set GOOGLE_DRIVE_FOLDER_ID to a new one",
    "accessNotConfigured": "enable the Google Drive API in the project of the credentials (Google Cloud Console)",
    "SERVICE_DISABLED": "enable the Google Drive API in the project of the credentials (Google Cloud Console)",
    "dailyLimitExceeded": "the project's quota of the day is used up: it comes back at midnight Pacific time",
    "insufficientFilePermissions": RIGHTS_HINT,
    "insufficientParentPermissions": RIGHTS_HINT,
    "insufficientPermissions": "the token lacks the scope drive: run `python -m app google` again",
    "domainPolicy": "the domain's policy forbids it: ask the administrator of the Workspace",
    "notFound": SHARE_HINT,
    "authError": "the credentials are not accepted any more: make a new key, or run `python -m app google` again",
}
PASSING = frozenset(
    {"userRateLimitExceeded", "rateLimitExceeded", "sharingRateLimitExceeded", "RATE_LIMIT_EXCEEDED", "backendError"}
)
REVOKED = frozenset({"invalid_grant", "invalid_client", "unauthorized_client", "deleted_client"})
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
    return Permanent(text, HINTS.get(reason, HINTS["notFound"] if status == 404 else RIGHTS_HINT))  # noqa: PLR2004


def _reason(content: bytes) -> tuple[str, str]:
    try:
        said: Any = json.loads(content)["error"]
        listed = [each.get("reason") for each in (*said.get("errors", ()), *said.get("details", ()))]
        reason = next((each for each in listed if each), said.get("status", ""))
        return str(reason), str(said.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", "no reason given"


def _seconds(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def failed(error: Exception) -> AppError:
    """No answer at all, or no sign-in. google-auth's own word on what may be repeated is not to be relied on."""
    from google.auth.exceptions import RefreshError

    said = error.args[1] if len(error.args) > 1 and isinstance(error.args[1], dict) else {}
    if isinstance(error, RefreshError) and str(said.get("error")) in REVOKED:
        return Permanent(
            f"Google refused the sign-in: {said['error']}: {said.get('error_description', '')}", GRANT_HINT
        )
    text = str(error)[:TEXT_LIMIT] or type(error).__name__
    return Transient(f"Drive cannot be reached: {text}", AGAIN_HINT)
