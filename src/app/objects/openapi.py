"""The OpenAPI of /s3: response models, error statuses, and whatever the routes' parameters do not imply.

Invariant: every status that a route returns is documented.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from app.web.errors import Answers, faults

FAULTS = {
    400: "the form cannot be read, or a checksum does not match the bytes",
    403: "the key lacks the scope, or the key or prefix of the object is out of reach",
    404: "there is no such object",
    408: "the body did not arrive in time",
    409: "the object was changed meanwhile",
    412: "the object is not the version that the request's condition names",
    413: "the body is larger than MAX_UPLOAD_BYTES",
    415: "a form without a boundary",
    416: "no byte of the object is in that range, or the offset is after its end",
    422: "a parameter, a key or a form is wrong: it is named",
    429: "too many transfers at once",
    502: "the store refused the request; somebody must correct its cause",
    503: "the store cannot be reached: send the same request again",
}
KEPT = {
    "Content-Encoding": "kept with the object",
    "Cache-Control": "kept with the object",
    "Content-Disposition": "kept with the object; a download is an attachment in any case",
    "Content-Language": "kept with the object",
    "Expires": "a date, kept with the object",
    "x-amz-tagging": "tags, as name=value&name=value",
}
CHECKED = {
    "Content-MD5": "checked before anything is stored",
    "x-amz-checksum-crc32": "checked before anything is stored",
    "x-amz-checksum-sha1": "checked before anything is stored",
    "x-amz-checksum-sha256": "checked before anything is stored",
}
ALWAYS = (403, 422, 502, 503)
BODY = (400, 408, 409, 412, 413, 415, 429)


class ObjectStored(BaseModel):
    """An upload."""

    key: str
    etag: str
    version_id: str | None
    size: int = Field(ge=0)
    guarded: bool = Field(default=True, description="false when the store honours no conditions")


class ObjectPatched(ObjectStored):
    """A patch."""

    offset: int = Field(ge=0)
    warning: str = ""


class ListedObject(BaseModel):
    """An object, named as S3 does."""

    Key: str
    LastModified: datetime
    Size: int = Field(ge=0)
    ETag: str


class ObjectListing(BaseModel):
    """A page of a listing; `continuation` asks for the next one."""

    prefix: str
    objects: list[ListedObject]
    count: int = Field(ge=0)
    common_prefixes: list[str] = Field(default=[], description="with a delimiter")
    continuation: str = ""


class ObjectProperties(BaseModel):
    """What is known of an object; of one that is missing, that it is."""

    key: str
    exists: bool
    size: int | None = Field(ge=0)
    etag: str = ""
    last_modified: datetime | None = None
    content_type: str = ""
    metadata: dict[str, str] = {}
    content_encoding: str = ""
    cache_control: str = ""
    content_disposition: str = ""
    content_language: str = ""
    expires: str = ""
    tags: dict[str, str] = {}


class ObjectLink(BaseModel):
    """A link that needs no key."""

    key: str
    url: str
    expires_at: datetime


class UploadForm(BaseModel):
    """A form that needs no key: POST multipart/form-data to `url` with these fields, then `file`."""

    key: str
    url: str
    fields: dict[str, str]
    content_type: str
    min_bytes: int = Field(ge=0)
    max_bytes: int = Field(ge=0)
    expires_at: datetime


class ObjectDeleted(BaseModel):
    """A deletion."""

    key: str
    deleted: bool


def answers(model: type[BaseModel], codes: Sequence[int] = ()) -> dict[str, Any]:
    """Keyword arguments of a route that answers 200 with the given fields of `model`; `codes` are its own error
    statuses, in addition to those of all routes.
    """
    responses: Answers = {200: {"description": "done"}, **_faults(codes)}
    return {"response_model": model, "response_model_exclude_unset": True, "responses": responses}


def _faults(codes: Sequence[int]) -> Answers:
    return faults({code: FAULTS[code] for code in (*ALWAYS, *codes)})


BINARY = {"type": "string", "format": "binary"}
DOWNLOAD: Answers = {
    200: {"description": "the object", "content": {"*/*": {"schema": BINARY}}},
    206: {"description": "the range that was asked for", "content": {"*/*": {"schema": BINARY}}},
    304: {"description": "the caller has this version"},
    **_faults((404, 409, 412, 416)),
}
FORM_TEXTS = {name: {"type": "string"} for name in ("key", "Content-Type", "policy", "signature")}
FORM_FIELDS = {**FORM_TEXTS, "file": BINARY}
FORM_SCHEMA = {"type": "object", "required": [*FORM_FIELDS], "properties": FORM_FIELDS}
FORM_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM_SCHEMA}}}}
FORM_ANSWERS: Answers = {204: {"description": "stored"}, **_faults((404, *BODY))}


def upload(*, kept: bool = True) -> Mapping[str, Any]:
    """The body of an upload, its conditions and checksums, and, if `kept`, the headers stored with the object."""
    told = {**(KEPT if kept else {}), **CHECKED}
    form = {"type": "object", "required": ["file"], "properties": {"file": BINARY}}
    return {
        "requestBody": {
            "required": True,
            "description": "One file in a form, or the bare bytes. Nothing of it is kept in memory or on disk.",
            "content": {
                "multipart/form-data": {"schema": form},
                "application/octet-stream": {"schema": BINARY},
            },
        },
        "parameters": [
            _field("If-Match", "store only over this ETag", pattern='^"[^"]*"$'),
            *(_field(name, description) for name, description in told.items()),
        ],
    }


def _field(name: str, description: str, **keywords: str) -> Mapping[str, Any]:
    schema = {"type": "string", **keywords}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


CONDITIONS = {
    "Range": "bytes=0-99, bytes=100- or bytes=-100",
    "If-None-Match": "ETags that the caller has: 304",
    "If-Modified-Since": "the date of the version that the caller has: 304",
    "If-Unmodified-Since": "the date of the version that is wanted: otherwise 412",
    "If-Match": "the ETag that is wanted: otherwise 412",
    "If-Range": "the ETag to which the range belongs: otherwise the whole object",
}
READING = {"parameters": [_field(name, description) for name, description in CONDITIONS.items()]}
