"""Google credentials: a service account's key, an installed app's client secrets, or a user's token.

Invariants: the document's shape alone determines the kind; an installed app's token is stored and refreshed in
DATA_DIR, readable by its owner only; no message contains a secret.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.config.settings import DriveSettings
from app.core.errors import Permanent, Transient
from app.core.files import write_durably

SCOPES = ("https://www.googleapis.com/auth/drive",)
TOKEN_URI = "https://oauth2.googleapis.com/token"  # noqa: S105 - an address
TOKEN_FILE = "google_token.json"  # noqa: S105 - a file's name
FORMS = "use a service account's key file or the client secrets of an installed app, as Google Cloud Console gives them"
CONSENT = (
    "run `python -m app google` once on a machine with a browser; elsewhere copy google_token.json into DATA_DIR, "
    "or set GOOGLE_CREDENTIALS_JSON to its text"
)
CONSENT_AGAIN = "run `python -m app google` again, sign in as a member of the shared drive, and allow access to Drive"


def document(drive: DriveSettings) -> dict[str, Any]:
    """The JSON document of the credentials. Raises Permanent if there is none, or it is not a JSON object."""
    file, given = drive.credentials_file, drive.credentials_json
    if file is None and given is None:
        raise Permanent("no Google credentials are set", "set GOOGLE_CREDENTIALS_FILE to the client secrets file")
    try:
        text = file.read_text(encoding="utf-8") if file else given.get_secret_value() if given else ""
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Permanent(f"GOOGLE_CREDENTIALS_FILE {file}: {why}", FORMS) from error
    try:
        info = json.loads(text)
    except ValueError as error:
        raise Permanent(f"Google credentials ({file or 'GOOGLE_CREDENTIALS_JSON'}) are not JSON", FORMS) from error
    if not isinstance(info, dict):
        raise Permanent("Google credentials are not a JSON object", FORMS)
    return info


def credentials(drive: DriveSettings, token_file: Path) -> Any:
    """google-auth credentials of any kind, not refreshed yet; an installed app's are in `token_file`. Raises Permanent
    if they cannot be used.
    """
    info = document(drive)
    try:
        if info.get("type") == "service_account":
            return _service_account(info)
        return _user(info if "refresh_token" in info else _kept(token_file, client_of(info)))
    except (ValueError, KeyError) as error:  # google-auth's MalformedError is a ValueError
        raise Permanent(f"Google credentials cannot be read: {type(error).__name__}", FORMS) from error


def client_of(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The client secrets in the document. Raises Permanent if it is something else."""
    client = info.get("installed") or info.get("web")
    if not isinstance(client, dict) or "client_id" not in client:
        raise Permanent("Google credentials are neither a service account, an installed app nor a token", FORMS)
    return client


def _service_account(info: Mapping[str, Any]) -> Any:
    """Contacts only hosts from the settings or the document; the library's own class looks up regions at another."""
    from google.oauth2 import service_account

    class Quiet(service_account.Credentials):
        def before_request(self, request: Any, method: str, url: str, headers: Any) -> None:  # noqa: ARG002 - its words
            if not self.valid:
                self.refresh(request)  # type: ignore[no-untyped-call]  # the library is untyped
            self.apply(headers)  # type: ignore[no-untyped-call]

    return Quiet.from_service_account_info(info, scopes=list(SCOPES))  # type: ignore[no-untyped-call]


def _user(info: Mapping[str, Any]) -> Any:
    """Uses the document's token endpoint; the library's own loader would always use Google's."""
    from google.oauth2.credentials import Credentials

    return Credentials(
        None,
        refresh_token=info["refresh_token"],
        token_uri=info.get("token_uri", TOKEN_URI),
        client_id=info["client_id"],
        client_secret=info["client_secret"],
        scopes=list(SCOPES),
    )


def _kept(token_file: Path, client: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(token_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Permanent("the installed app has no consent yet: client secrets alone give no access", CONSENT) from error
    except (OSError, ValueError) as error:
        raise Permanent(f"{token_file} cannot be read", CONSENT) from error
    if kept.get("client_id") != client["client_id"]:
        raise Permanent(f"{token_file} belongs to another client than the credentials", CONSENT)
    return kept


def save_token(path: Path, found: Any) -> None:
    """Store a user's credentials, readable by the owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # write_durably keeps the mode
    write_durably(path, [found.to_json().encode()])


def consent(drive: DriveSettings, token_file: Path, *, open_browser: bool) -> None:
    """Ask the user for consent in a browser and keep the token. Raises Permanent, or Transient if offline."""
    info = document(drive)
    client_of(info)
    from google_auth_oauthlib.flow import InstalledAppFlow
    from oauthlib.oauth2 import OAuth2Error

    # The library logs the redirect request, which contains the authorization code.
    logging.getLogger("google_auth_oauthlib.flow").setLevel(logging.WARNING)
    try:
        flow = InstalledAppFlow.from_client_config(info, list(SCOPES))
        found = flow.run_local_server(port=0, open_browser=open_browser, access_type="offline", prompt="consent")
    except (OAuth2Error, Warning) as error:  # a scope that the user deselected is raised as a Warning
        why = getattr(error, "error", "") or type(error).__name__
        raise Permanent(f"Google's consent was not given: {why}", CONSENT_AGAIN) from error
    except (ValueError, KeyError) as error:
        raise Permanent(f"Google credentials cannot be read: {type(error).__name__}", FORMS) from error
    except OSError as error:
        raise Transient(f"Google's sign-in could not be reached: {type(error).__name__}", "try again") from error
    save_token(token_file, found)
