"""Google credentials from the one variable: a service account's key, an installed app's secrets, or a user's token.

Invariants: the kind is told by the document's shape alone; the token of an installed app is kept in DATA_DIR, for its
owner's eyes only, and renewed there; no message holds a secret.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Given:
    """Where the credentials come from: a file, or the text itself; and where an installed app's token is kept."""

    file: Path | None
    text: str
    token_file: Path


def document(given: Given) -> dict[str, Any]:
    """The JSON document. Raises Permanent when there is none."""
    try:
        text = given.file.read_text(encoding="utf-8") if given.file else given.text
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Permanent(f"GOOGLE_CREDENTIALS_FILE {given.file}: {why}", FORMS) from error
    try:
        info = json.loads(text)
    except ValueError as error:
        raise Permanent(
            f"Google credentials ({given.file or 'GOOGLE_CREDENTIALS_JSON'}) are not JSON", FORMS
        ) from error
    if not isinstance(info, dict):
        raise Permanent("Google credentials are no JSON object", FORMS)
    return info


def credentials(given: Given) -> Any:
    """google-auth credentials of either kind, not refreshed yet. Raises Permanent when they cannot be used."""
    info = document(given)
    try:
        if info.get("type") == "service_account":
            return _service_account(info)
        return _user(info if "refresh_token" in info else _kept(given, client_of(info)))
    except (ValueError, KeyError) as error:  # google-auth's MalformedError is a ValueError
        raise Permanent(f"Google credentials cannot be read: {type(error).__name__}", FORMS) from error


def account(given: Given) -> str:
    """Who the files belong to, for hints: the address of a service account, else "the signed-in user"."""
    return str(document(given).get("client_email") or "the signed-in user")


def client_of(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The client secrets inside the document. Raises Permanent when it is something else."""
    client = info.get("installed") or info.get("web")
    if not isinstance(client, dict) or "client_id" not in client:
        raise Permanent("Google credentials are neither a service account, an installed app nor a token", FORMS)
    return client


def _service_account(info: Mapping[str, Any]) -> Any:
    """The library's own would, beside each request, look up at another host of Google's in which regions the account
    may be used. Only the hosts that the settings and the document name are asked.
    """
    from google.oauth2 import service_account

    class Quiet(service_account.Credentials):
        def before_request(self, request: Any, method: str, url: str, headers: Any) -> None:  # noqa: ARG002 - its words
            if not self.valid:
                self.refresh(request)  # type: ignore[no-untyped-call]  # the library is untyped
            self.apply(headers)  # type: ignore[no-untyped-call]

    return Quiet.from_service_account_info(info, scopes=list(SCOPES))  # type: ignore[no-untyped-call]


def _user(info: Mapping[str, Any]) -> Any:
    """The library's own reader would ask Google's endpoint whatever the document names."""
    from google.oauth2.credentials import Credentials

    return Credentials(
        None,
        refresh_token=info["refresh_token"],
        token_uri=info.get("token_uri", TOKEN_URI),
        client_id=info["client_id"],
        client_secret=info["client_secret"],
        scopes=list(SCOPES),
    )


def _kept(given: Given, client: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(given.token_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Permanent("the installed app has no consent yet: client secrets alone open nothing", CONSENT) from error
    except (OSError, ValueError) as error:
        raise Permanent(f"{given.token_file} cannot be read", CONSENT) from error
    if kept.get("client_id") != client["client_id"]:
        raise Permanent(f"{given.token_file} belongs to another client than the credentials", CONSENT)
    return kept


def keep_token(given: Given, found: Any) -> None:
    """Keep a refreshed token of an installed app for the next start. Nothing for other kinds."""
    if "installed" in (info := document(given)) or "web" in info:
        save_token(given.token_file, found)


def save_token(path: Path, found: Any) -> None:
    """Store a user's credentials, readable by the owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # write_durably keeps the mode
    write_durably(path, [found.to_json().encode()])


def consent(given: Given, *, open_browser: bool) -> Path:
    """Ask the user in a browser, once; where the token was kept. Raises Permanent, and Transient for a network away."""
    info = document(given)
    client_of(info)
    from google_auth_oauthlib.flow import InstalledAppFlow
    from oauthlib.oauth2 import OAuth2Error

    # It logs the request that it waits for, and in that stands the code.
    logging.getLogger("google_auth_oauthlib.flow").setLevel(logging.WARNING)
    try:
        flow = InstalledAppFlow.from_client_config(info, list(SCOPES))
        found = flow.run_local_server(port=0, open_browser=open_browser, access_type="offline", prompt="consent")
    except (OAuth2Error, Warning) as error:  # a scope that the user took away is raised as a Warning
        why = getattr(error, "error", "") or type(error).__name__
        raise Permanent(f"Google gave no consent: {why}", CONSENT_AGAIN) from error
    except (ValueError, KeyError) as error:
        raise Permanent(f"Google credentials cannot be read: {type(error).__name__}", FORMS) from error
    except OSError as error:
        raise Transient(f"Google's sign-in was not reached: {type(error).__name__}", "try again") from error
    save_token(given.token_file, found)
    return given.token_file
