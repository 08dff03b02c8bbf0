"""The part of Google's sign-in that Drive needs: service account tokens, consent and refresh for installed apps.

Invariants: a token is invalid after its lifetime or after `expire`; an assertion is valid only with the account's own
signature and a time close to ours; a code works once, for the client that requested it. `aud` is not compared, since
the client library always names Google there.
"""

import base64
import binascii
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from functools import cache
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlencode

from simulators.http_server import Answer, Request

SKEW_SECONDS = 300
LIFETIME_SECONDS = 3599
GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
JSON = {"Content-Type": "application/json; charset=utf-8"}


@cache
def _account_key() -> Any:
    """The service account's key, shared within a process, since generating one takes longer than a run."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - a simulator on loopback; loading a larger key takes 0.1 s


class Tokens:
    """One service account and one installed app."""

    def __init__(self) -> None:
        self.revoked = False
        self.issued = 0
        self.client = {"client_id": "demo-client", "client_secret": secrets.token_hex(8)}
        self.refresh_token = f"1//{secrets.token_hex(8)}"
        self.email = "headwater@demo.iam.gserviceaccount.com"
        self._key = _account_key()
        self._live: dict[str, tuple[float, bool]] = {}
        self._codes: dict[str, tuple[str, str]] = {}
        self._lock = Lock()

    def service_account(self, url: str) -> dict[str, str]:
        """The key file of the service account, with the token endpoint at `url`."""
        from cryptography.hazmat.primitives import serialization

        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "type": "service_account",
            "project_id": "demo",
            "private_key_id": "demo",
            "private_key": pem.decode(),
            "client_email": self.email,
            "client_id": "1",
            "token_uri": f"{url}/token",
        }

    def installed(self, url: str) -> dict[str, Any]:
        """The client secrets of the installed app."""
        ends = {"auth_uri": f"{url}/o/oauth2/auth", "token_uri": f"{url}/token", "redirect_uris": ["http://localhost"]}
        return {"installed": {**self.client, "project_id": "demo", **ends}}

    def user(self, url: str) -> dict[str, Any]:
        """A user's token file, as a consent produces it."""
        return {**self.client, "refresh_token": self.refresh_token, "token_uri": f"{url}/token"}

    def is_service(self, authorization: str) -> bool | None:
        """Whether the bearer is the service account; None for an invalid token."""
        with self._lock:
            until, service = self._live.get(authorization.removeprefix("Bearer "), (0.0, False))
        return service if until > time.time() else None

    def expire(self) -> None:
        """Expire every token now."""
        with self._lock:
            self._live.clear()

    def respond(self, request: Request) -> Answer:
        """`/token` and `/o/oauth2/auth`."""
        if request.path.endswith("/auth"):
            return self._consented(request.parameters)
        form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        form = {**_basic(request.headers.get("authorization", "")), **form}
        fault = "invalid_grant" if self.revoked else self._fault(form)
        if fault:
            said = {"error": fault, "error_description": "Token has been expired or revoked."}
            return Answer(400, JSON, json.dumps(said).encode())
        return Answer(200, JSON, json.dumps(self._issue(form)).encode())

    def _consented(self, parameters: Mapping[str, str]) -> Answer:
        """The user consents at once: redirect to the app with a code."""
        code = secrets.token_hex(8)
        with self._lock:
            self._codes[code] = (parameters["redirect_uri"], parameters.get("code_challenge", ""))
        back = urlencode({"code": code, "state": parameters.get("state", ""), "scope": parameters.get("scope", "")})
        return Answer(302, {"Location": f"{parameters['redirect_uri']}?{back}"})

    def _fault(self, form: Mapping[str, str]) -> str:
        grant = form.get("grant_type")
        if grant == GRANT:
            return "" if self._signed(form.get("assertion", "")) else "invalid_grant"
        if any(form.get(name) != value for name, value in self.client.items()):
            return "invalid_client"
        if grant == "refresh_token":
            return "" if form.get("refresh_token") == self.refresh_token else "invalid_grant"
        return "" if grant == "authorization_code" and self._redeemed(form) else "invalid_grant"

    def _redeemed(self, form: Mapping[str, str]) -> bool:
        """Whether the code is valid: used once, with the same redirect and the verifier of its challenge."""
        with self._lock:
            redirect, challenge = self._codes.pop(form.get("code", ""), ("", ""))
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        proven = not challenge or base64.urlsafe_b64encode(digest).decode().rstrip("=") == challenge
        return bool(redirect) and redirect == form.get("redirect_uri") and proven

    def _signed(self, assertion: str) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import padding
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            head, claims, signature = assertion.split(".")
            signed = f"{head}.{claims}".encode()
            self._key.public_key().verify(_bytes(signature), signed, padding.PKCS1v15(), SHA256())
            said = json.loads(_bytes(claims))
        except (ValueError, InvalidSignature):
            return False
        near = abs(said["iat"] - time.time()) < SKEW_SECONDS
        return bool(near and said["iss"] == self.email)

    def _issue(self, form: Mapping[str, str]) -> dict[str, Any]:
        token = f"ya29.{secrets.token_hex(16)}"
        with self._lock:
            self.issued += 1
            self._live[token] = (time.time() + LIFETIME_SECONDS, form["grant_type"] == GRANT)
        answer: dict[str, Any] = {"access_token": token, "expires_in": LIFETIME_SECONDS, "token_type": "Bearer"}
        if form["grant_type"] == "authorization_code":
            answer |= {"refresh_token": self.refresh_token, "scope": "https://www.googleapis.com/auth/drive"}
        return answer


def _basic(authorization: str) -> dict[str, str]:
    """The client's id and secret from the Authorization header, where OAuth libraries send them."""
    kind, _, encoded = authorization.partition(" ")
    if kind != "Basic":
        return {}
    try:
        name, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return {}
    return {"client_id": name, "client_secret": secret}


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
