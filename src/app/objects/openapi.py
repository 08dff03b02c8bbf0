"""The OpenAPI of /s3, as far as it does not follow from the routes' own parameters.

Invariant: each status that a route answers is named.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]
Answers = dict[int | str, dict[str, Any]]

WHOLE: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
MAYBE_TEXT: Schema = {"anyOf": [TEXT, {"type": "null"}]}
FAULTS = {
    400: "the form cannot be read",
    401: "no key, or one that is not known",
    403: "the key lacks the scope, or the key or prefix of the object is out of reach",
    404: "there is no such object",
    408: "the body did not arrive in time",
    409: "the object was changed meanwhile",
    412: "the object is not the version that the request's condition names",
    413: "the body is larger than MAX_UPLOAD_BYTES",
    415: "a form without a boundary",
    416: "no byte of the object is in that range, or the offset is behind its end",
    422: "a parameter, a key or a form is wrong: it is named",
    429: "too many transfers at once",
    502: "the store refuses, which a person has to mend",
    503: "the store cannot be reached: send the same request again",
}
ALWAYS = (401, 403, 422, 502, 503)
BODY = (400, 408, 409, 412, 413, 415, 429)
STORED: Schema = {
    "key": TEXT,
    "etag": TEXT,
    "version_id": MAYBE_TEXT,
    "size": WHOLE,
}
PATCHED: Schema = {**STORED, "offset": WHOLE, "guarded": {"type": "boolean"}, "warning": TEXT}
LISTED: Schema = {
    "prefix": TEXT,
    "count": WHOLE,
    "common_prefixes": {"type": "array", "items": TEXT},
    "continuation": TEXT,
    "objects": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "Key": TEXT,
                "LastModified": {"type": "string", "format": "date-time"},
                "Size": WHOLE,
                "ETag": TEXT,
            },
        },
    },
}
INFO: Schema = {
    "key": TEXT,
    "exists": {"type": "boolean"},
    "size": {"anyOf": [WHOLE, {"type": "null"}]},
    "etag": TEXT,
    "last_modified": {"type": "string", "format": "date-time"},
    "content_type": TEXT,
    "metadata": {"type": "object", "additionalProperties": TEXT},
}
LINKED: Schema = {"key": TEXT, "url": TEXT, "expires_at": {"type": "string", "format": "date-time"}}
DELETED: Schema = {"key": TEXT, "deleted": {"type": "boolean"}}


def answers(properties: Mapping[str, Any], codes: Sequence[int] = ()) -> Answers:
    """200 with this JSON, and what a route may refuse beside what all do."""
    content = {"application/json": {"schema": {"type": "object", "properties": dict(properties)}}}
    return {200: {"description": "done", "content": content}, **faults((*ALWAYS, *codes))}


def download(codes: Sequence[int] = ()) -> Answers:
    """The answers of a download."""
    content = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": "the object", "content": content},
        206: {"description": "the range that was asked for", "content": content},
        304: {"description": "the caller has this version"},
        **faults((*ALWAYS, 404, 409, 412, 416, *codes)),
    }


def faults(codes: Sequence[int]) -> Answers:
    """Errors in the one shape."""
    error = {
        "type": "object",
        "required": ["message", "hint"],
        "properties": dict.fromkeys(("message", "hint", "field"), TEXT),
    }
    schema = {"type": "object", "required": ["error"], "properties": {"error": error}}
    return {code: {"description": FAULTS[code], "content": {"application/json": {"schema": schema}}} for code in codes}


def upload() -> Mapping[str, Any]:
    """The body of an upload, and its conditions."""
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "required": ["file"], "properties": {"file": binary}}
    return {
        "requestBody": {
            "required": True,
            "description": "One file in a form, or the bare bytes. Nothing of it is kept in memory or on disk.",
            "content": {
                "multipart/form-data": {"schema": form},
                "application/octet-stream": {"schema": binary},
            },
        },
        "parameters": [field("If-Match", "store only over this ETag", '^"[^"]*"$')],
    }


def reading() -> Mapping[str, Any]:
    """The header fields of a download."""
    told = {
        "Range": "bytes=0-99, bytes=100- or bytes=-100",
        "If-None-Match": "ETags that the caller has: 304",
        "If-Match": "the ETag that is wanted: else 412",
        "If-Range": "the ETag to which the range belongs: else the whole object",
    }
    return {"parameters": [field(name, description) for name, description in told.items()]}


def field(name: str, description: str, pattern: str = "") -> Schema:
    """A header field."""
    schema = {"type": "string", "pattern": pattern} if pattern else TEXT
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}
