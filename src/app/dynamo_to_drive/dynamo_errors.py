"""What DynamoDB refuses and what the SDK makes of the network, as what a person or the next run should do.

Invariant: the code of the answer decides, never its text. The codes are section 7 of contracts/dynamodb.md.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from app.core.errors import AppError, Permanent, Transient

KEYS_HINT = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
CLOCK_HINT = f"{KEYS_HINT}, and this machine's clock (NTP)"
HINTS: Mapping[str, str] = {
    "ResourceNotFoundException": "check DYNAMODB_TABLE_NAME and AWS_REGION, and that the index still exists",
    "AccessDeniedException": "allow dynamodb:DescribeTable, Query and Scan on the table and its indexes",
    "UnrecognizedClientException": KEYS_HINT,
    "MissingAuthenticationTokenException": KEYS_HINT,
    "IncompleteSignatureException": KEYS_HINT,
    "InvalidSignatureException": CLOCK_HINT,
    "ExpiredTokenException": "the temporary credentials ended: renew AWS_SESSION_TOKEN",
    "ValidationException": "check DYNAMODB_TIMESTAMP_ATTRIBUTE, DYNAMODB_TIMESTAMP_UNIT and DYNAMODB_PARTITION_VALUES",
}
THROTTLED = frozenset(
    {"ProvisionedThroughputExceededException", "ThrottlingException", "RequestLimitExceeded", "LimitExceededException"}
)
SLOW_HINT = "the table's read capacity is used up: raise it, or DRIVE_INTERVAL_SECONDS; the next run catches up"
AGAIN_HINT = "nothing to do: the next run goes on"
FOREIGN_HINT = "check that DYNAMODB_ENDPOINT_URL is DynamoDB, and that no proxy answers; it is tried again"
TEXT_LIMIT = 300


def member(answer: Mapping[str, Any], name: str, where: str) -> Any:
    """What an answer must have. Without it, it is that of something else: taken as empty, it would cost rows."""
    if name not in answer:
        raise Transient(f"the answer of {where} holds no {name}", FOREIGN_HINT)
    return answer[name]


@contextmanager
def translated(table: str, where: str) -> Iterator[None]:
    """What the SDK raises, as what the caller should do about it. `where` names the service as the settings have it."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _answered(table, error) from error
    except BotoCoreError as error:
        raise _failed(table, where, error) from error


def _answered(table: str, error: Any) -> AppError:
    said, status = (
        error.response.get("Error") or {},
        error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
    )
    code = str(said.get("Code") or status)
    text = f"table {table!r}: {code}: {str(said.get('Message') or '')[:TEXT_LIMIT]}"
    if code in THROTTLED:
        return Transient(text, SLOW_HINT)
    if status >= 500:  # noqa: PLR2004 - HTTP's own border
        return Transient(text, AGAIN_HINT)
    return Permanent(text, HINTS.get(code, "check the table, the region and the keys"))


def _failed(table: str, where: str, error: Exception) -> AppError:
    from botocore import exceptions as sdk

    text = f"table {table!r}: {str(error)[:TEXT_LIMIT]}"
    if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError):
        return Permanent(text, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role")
    if isinstance(error, sdk.ParamValidationError):
        return Permanent(text, "check DYNAMODB_TABLE_NAME and DYNAMODB_PARTITION_VALUES")
    return Transient(text, f"check that {where} can be reached (AWS_REGION, DYNAMODB_ENDPOINT_URL); it is tried again")
