"""Settings for people to read: what was configured without its secrets, and the secrets for the log's filter.

Invariant: nothing here decides by a field's name; a secret is what is held as SecretStr.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import unquote

from pydantic import SecretStr

from app.config.keys import KeyEntry
from app.config.settings import Settings

MASK = "***"
LEAST_CHARACTERS = 16


def describe(settings: Settings) -> dict[str, str]:
    """Every setting as `group.field` -> text, secrets as `***`, unset as an empty text."""
    return {name: text_of(value) for name, value in _flat(settings)}


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """Every text that must never be seen: the secrets, the passwords inside URLs, the parts of a key file. For logs."""
    found: dict[str, None] = {}
    for _, value in _flat(settings):
        if isinstance(value, SecretStr) and (secret := value.get_secret_value()):
            found.update(dict.fromkeys((secret, *_inside(secret))))
    return tuple(sorted(found, key=len, reverse=True))


def text_of(value: object) -> str:
    """A value as one would write it, a secret as `***`."""
    match value:
        case None:
            return ""
        case SecretStr():
            return MASK if value.get_secret_value() else ""
        case bool():
            return str(value).lower()
        case datetime():
            return value.isoformat()
        case tuple():
            return ",".join(each.name if isinstance(each, KeyEntry) else str(each) for each in value)
        case _:
            return str(value)


def _flat(settings: Settings) -> Iterator[tuple[str, Any]]:
    for group, held in settings:
        for name, field in type(held).model_fields.items():
            if not field.exclude:
                yield f"{group}.{name}", getattr(held, name)


def _inside(secret: str) -> Iterator[str]:
    scheme, separator, rest = secret.partition("://")
    login, at, _ = rest.rpartition("@")
    if separator and at and scheme.isalnum() and (password := login.partition(":")[2]):
        yield from (password, unquote(password))
    if secret.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):  # a password may begin like a key file
            for text in _strings(json.loads(secret)):
                yield from (line for line in text.splitlines() if len(line) >= LEAST_CHARACTERS and "://" not in line)


def _strings(node: object) -> Iterator[str]:
    """Key files are small and flat; each long line of theirs may be part of a key, and none is needed in a log."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for each in node.values():
            yield from _strings(each)
    elif isinstance(node, list):
        for each in node:
            yield from _strings(each)
