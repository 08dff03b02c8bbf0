"""What Google refuses, in each of its styles, and what is told about it."""

import json
from typing import Any

import pytest
from google.auth.exceptions import RefreshError, TransportError

from app.core.errors import Permanent, Transient
from app.dynamo_to_drive.drive import error_of_response, failed


def old(reason: str, **more: Any) -> bytes:
    return json.dumps({"error": {"errors": [{"reason": reason}], "message": "said", **more}}).encode()


def new(reason: str, status: str = "PERMISSION_DENIED") -> bytes:
    return json.dumps({"error": {"status": status, "details": [{"@type": "help"}, {"reason": reason}]}}).encode()


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (500, old("internalError")),
        (502, b"<html>Bad Gateway</html>"),
        (503, b"\xff"),
        (403, old("userRateLimitExceeded")),
        (403, new("RATE_LIMIT_EXCEEDED")),
        (403, old("forbidden", details=[{"reason": "RATE_LIMIT_EXCEEDED"}])),
        (429, b""),
        (408, b"{}"),
    ],
)
def test_what_may_pass_is_tried_again(status: int, content: bytes) -> None:
    assert isinstance(error_of_response(status, content, {}), Transient)


@pytest.mark.parametrize(
    ("status", "content", "hint"),
    [
        (400, old("invalid"), "GOOGLE_DRIVE_FOLDER_ID"),
        (401, b"<html>", "no longer accepted"),
        (401, new("", "UNAUTHENTICATED"), "no longer accepted"),
        (403, old("storageQuotaExceeded"), "share a Shared Drive"),
        (403, old("forbidden", details=[{"reason": "SERVICE_DISABLED"}]), "enable the Google Drive API"),
        (403, new("ACCESS_TOKEN_SCOPE_INSUFFICIENT"), "lacks the scope"),
        (403, old("never heard of"), "Content manager"),
        (403, b'{"error":"text"}', "Content manager"),
        (404, b"[]", "add the account"),
    ],
)
def test_what_a_person_must_mend_has_the_next_step(status: int, content: bytes, hint: str) -> None:
    refused = error_of_response(status, content, {})
    assert isinstance(refused, Permanent)
    assert hint in refused.hint


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7.0), ("", None), ("\u00b2", None), ("-1", None), ("Wed, 1", None)]
)
def test_the_wait_that_is_asked_for_is_taken_when_it_is_a_number(text: str, seconds: float | None) -> None:
    told = error_of_response(429, b"", {"retry-after": text})
    assert isinstance(told, Transient)
    assert told.retry_after_seconds == seconds


@pytest.mark.parametrize("word", ["invalid_grant", "invalid_client", "invalid_scope", "access_denied"])
def test_a_sign_in_that_is_refused_waits_for_a_person(word: str) -> None:
    refused = failed(RefreshError(word, {"error": word, "error_description": "x" * 5000}))
    assert isinstance(refused, Permanent)
    assert word in refused.message
    assert len(refused.message) < 400


@pytest.mark.parametrize(
    "error",
    [
        RefreshError("x", {"error": "temporarily_unavailable", "access_token": "ya29.secret"}),
        RefreshError("no token", "ya29.secret"),
        TransportError(OSError(111, "refused")),
        TimeoutError("timed out"),
        OSError(),
    ],
)
def test_no_answer_is_tried_again_and_no_token_is_told(error: Exception) -> None:
    told = failed(error)
    assert isinstance(told, Transient)
    assert "ya29" not in str(told)
    assert told.message.removeprefix("Drive cannot be reached: ")
