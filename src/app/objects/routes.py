"""/s3: list, inspect, download, upload, update, patch, delete, link.

Invariants: requests are refused before the body is read where possible; uploads and downloads are streamed block by
block. Only a few downloads at once use large pieces; the others use small ones. So many slow clients cost little and
do not block others.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.routing import APIRoute

from app.core.errors import Conflict, Permanent, Rejected, Transient
from app.object_store.port import (
    CONTENT_HEADERS,
    MARK,
    MAX_PAGE,
    TAGS,
    BadKey,
    ListingRequest,
    ObjectInfo,
    ObjectStore,
    PutRequest,
    ReadableBody,
    StoredObject,
    Transfers,
)
from app.objects import openapi
from app.objects.requests import (
    CHANGED_HINT,
    LINK_HINT,
    ByteSpan,
    KeyPolicy,
    SignedLinks,
    check_conditions,
    disposition,
    download_headers,
    join_headers,
    not_found,
    span_of,
    stored_fields,
)
from app.objects.streams import (
    PAYLOAD_HASH,
    ChecksummedBody,
    FormReader,
    SizedBody,
    boundary_of,
    media_type,
    peek_body,
)
from app.web.api import StreamedResponse, refuse_unknown_parameters
from app.web.auth import OPEN, needs
from app.web.errors import Refusal, Refused
from app.web.request_bodies import read_in_thread

if TYPE_CHECKING:
    from app.object_store.s3_multipart import S3Transfers

READERS, WRITERS, ROOMY = 16, 64, 100
PIECE_BYTES, LEAN_BYTES = 1 << 19, 1 << 16
LOOKS = 3
LINK_SECONDS, MAX_LINK_SECONDS = 3600, 7 * 24 * 3600
MAX_INTEGER = (1 << 63) - 1
PARQUET_WARNING = (
    "a Parquet file ends with offsets of its own content: bytes that move or change can make it unreadable"
)
BUSY = Refusal(429, "too many transfers at once", "send the same request again later", headers={"Retry-After": "5"})
NOT_MODIFIED = ("ETag", "Cache-Control", "Expires", "Last-Modified", "Vary")
CONDITIONS = {"if-match", "if-none-match", "if-unmodified-since"}
GZIP = b"\x1f\x8b"
T = TypeVar("T")
LinkSeconds = Annotated[int, Query(ge=1, le=MAX_LINK_SECONDS)]
Key = Annotated[str, Query(description="the object's key, percent-encoded: a bare + is a space")]
Work = Callable[[ReadableBody, str, "Sequence[tuple[str, str]]"], StoredObject]
"""Stores a body with this content type, which follows these form fields."""


@dataclass(frozen=True, slots=True)
class ObjectRoutes:
    """The state and services that the routes use."""

    store: ObjectStore
    transfers: Transfers
    reach: KeyPolicy
    links: "SignedLinks | S3Transfers"
    clock: Callable[[], datetime]
    max_upload_bytes: int = 5 << 30
    readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(READERS))
    writers: Executor = field(default_factory=lambda: ThreadPoolExecutor(WRITERS, "s3-write"))
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(WRITERS))
    roomy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(ROOMY))

    async def ask(self, call: Callable[..., T], *given: Any) -> T:
        """Call the store in a thread. When the client disconnects meanwhile, this ends with the call and not before, so
        that what the caller releases is no longer in use.
        """
        return await to_thread.run_sync(call, *given, limiter=self.readers)

    @property
    def own_links(self) -> SignedLinks:
        """The signed links to this service. Raises Refused when links lead to the store itself."""
        if isinstance(self.links, SignedLinks):
            return self.links
        raise Refused(404, "links of this store do not lead here", LINK_HINT)

    async def held(self, key: str, *, tags: bool = False) -> ObjectInfo:
        """The object at `key`, with its tags if `tags`. Raises Refused with 404."""
        found = await self.ask(self.transfers.properties if tags else self.store.head, key)
        if found is None:
            raise not_found(key)
        return found


def build(serving: ObjectRoutes) -> APIRouter:
    """All routes."""
    router = APIRouter(
        prefix="/s3", tags=["s3"], dependencies=[Depends(refuse_unknown_parameters)], route_class=ObjectRoute
    )
    _looking(router, serving)
    _linking(router, serving)
    _upload_links(router, serving)
    _uploading(router, serving)
    _patching(router, serving)
    _deleting(router, serving)
    return router


class ObjectRoute(APIRoute):
    """Translates store errors: Rejected to 422 for an invalid parameter, Conflict to 409, or 412 for a failed
    condition.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `fastapi.routing.APIRoute`."""
        answer = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await answer(request)
            except Refused:
                raise
            except Rejected as error:
                fault = "key" if isinstance(error, BadKey) else ""
                raise Refused(422, error.message, error.hint, fault) from error
            except Conflict as error:
                status = 412 if CONDITIONS & set(request.headers) else 409
                raise Refused(status, f"changed in the meantime: {error.message}", CHANGED_HINT) from error

        return answered


def _reach(request: Request, serving: ObjectRoutes) -> KeyPolicy:
    return replace(serving.reach, own=request.scope["state"]["grant"].s3_prefix)


def _looking(router: APIRouter, serving: ObjectRoutes) -> None:
    @router.get(
        "/objects",
        summary="Objects below a prefix, in order",
        openapi_extra=needs("s3:read"),
        **openapi.answers(openapi.ObjectListing),
    )
    async def objects(
        request: Request,
        prefix: str = "",
        delimiter: Annotated[str, Query(max_length=100)] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        continuation: Annotated[str, Query(max_length=4096)] = "",
    ) -> Any:
        question = ListingRequest(_reach(request, serving).lists(prefix), delimiter, limit, continuation)
        page = await serving.ask(serving.transfers.page, question)
        listed = [
            {
                "Key": info.key,
                "LastModified": info.modified_at.replace(microsecond=0),
                "Size": info.size_bytes,
                "ETag": info.etag,
            }
            for info in page.objects
        ]
        answer = {"prefix": prefix, "objects": listed, "count": len(listed)}
        if delimiter:
            answer["common_prefixes"] = list(page.prefixes)
        return {**answer, "continuation": page.continuation} if page.continuation else answer

    @router.get(
        "/object-info",
        summary="Whether there is an object, and its properties",
        openapi_extra=needs("s3:read"),
        **openapi.answers(openapi.ObjectProperties),
    )
    async def object_info(request: Request, key: Key) -> Any:
        known = _reach(request, serving).reads(key)
        try:
            found = await serving.ask(serving.transfers.properties, known)
        except Permanent:  # credentials without permission to read tags still see the rest
            found = await serving.ask(serving.store.head, known)
        if found is None:
            return {"key": known, "exists": False, "size": None}
        headers = found.headers
        return {
            "key": known,
            "exists": True,
            "size": found.size_bytes,
            "etag": found.etag,
            "last_modified": found.modified_at.replace(microsecond=0),
            "content_type": found.content_type,
            "metadata": {name: value for name, value in found.metadata.items() if name != MARK},
            **{name.replace("-", "_"): headers[name] for name in CONTENT_HEADERS if name in headers},
            **({"tags": dict(parse_qsl(headers[TAGS], keep_blank_values=True))} if TAGS in headers else {}),
        }


def _get_and_head(router: APIRouter, path: str, route: Callable[..., Any], scope: str, summary: str) -> None:
    router.add_api_route(
        path,
        route,
        methods=["GET"],
        summary=summary,
        openapi_extra={**needs(scope), **openapi.READING},
        responses=openapi.DOWNLOAD,
        response_class=Response,
    )
    router.add_api_route(path, route, methods=["HEAD"], openapi_extra=needs(scope), include_in_schema=False)


async def _download(request: Request, serving: ObjectRoutes, key: str) -> Response:
    """Send an object; if it is replaced between the lookup and the first byte, look it up again."""
    fields = join_headers(request.headers.items())
    for look in range(LOOKS):
        held = await serving.held(key)
        if check_conditions(fields, held, reads=True):
            told = download_headers(held, ByteSpan(0, 0, part=False))
            return Response(status_code=304, headers={name: told[name] for name in NOT_MODIFIED if name in told})
        span = span_of(fields, held)
        if request.method == "HEAD":
            return Response(status_code=206 if span.part else 200, headers=download_headers(held, span))
        try:
            return await _streamed(serving, held, span)
        except Conflict:
            if look + 1 == LOOKS:
                raise
    raise not_found(key)


async def _streamed(serving: ObjectRoutes, held: ObjectInfo, span: ByteSpan) -> Response:
    """The response. Every byte is from the version that was looked up; if it can no longer be read, the response ends
    before its declared length, which every client notices.

    If other downloads use all slots for large pieces, this one does not wait and uses small pieces.
    """
    status, headers = 206 if span.part else 200, download_headers(held, span)
    if span.count <= LEAN_BYTES:  # streaming costs more than so few bytes
        return Response(await serving.ask(_read_span, serving.transfers, held, span), status, headers)
    with ExitStack() as taken:
        piece_bytes = PIECE_BYTES
        if serving.roomy.locked():
            piece_bytes = LEAN_BYTES
        else:
            await serving.roomy.acquire()
            taken.callback(serving.roomy.release)
        opened = serving.transfers.open_span(held, span.first, span.count)
        stream = await serving.ask(taken.enter_context, opened)

        async def pieces() -> AsyncIterator[bytes]:
            left = span.count
            while left:
                data = await serving.ask(stream.read, min(piece_bytes, left))
                if not data:
                    raise Transient("the object ended early", "ask for it again")
                left -= len(data)
                yield data

        return StreamedResponse(pieces(), taken.pop_all(), status=status, headers=headers)


def _read_span(transfers: Transfers, held: ObjectInfo, span: ByteSpan) -> bytes:
    with transfers.open_span(held, span.first, span.count) as stream:
        return b"".join(iter(partial(stream.read, LEAN_BYTES), b""))


def _linking(router: APIRouter, serving: ObjectRoutes) -> None:
    async def download(request: Request, key: Key) -> Response:
        return await _download(request, serving, _reach(request, serving).reads(key))

    _get_and_head(router, "/download", download, "s3:read", "The bytes of an object or of a range of it")

    @router.get(
        "/link",
        summary="A link that reads one object for a while without a key",
        openapi_extra=needs("s3:read"),
        **openapi.answers(openapi.ObjectLink, (404,)),
    )
    async def link(request: Request, key: Key, expires: LinkSeconds = LINK_SECONDS) -> Any:
        held = await serving.held(_reach(request, serving).reads(key))
        name = disposition(held.key, held.headers.get("content-disposition", ""))
        ends_at = serving.clock().replace(microsecond=0) + timedelta(seconds=expires)
        url = await serving.ask(serving.links.link, held.key, expires, name)
        return {"key": held.key, "url": _absolute(request, url), "expires_at": ends_at}

    async def shared(
        request: Request,
        key: Key,
        expires: Annotated[int, Query(ge=0, le=MAX_INTEGER)],
        signature: Annotated[str, Query(max_length=200)],
    ) -> Response:
        await serving.ask(serving.own_links.check, key, expires, signature)
        return await _download(request, serving, serving.reach.reads(key))

    _get_and_head(router, "/shared", shared, OPEN, "The target of a link")


def _absolute(request: Request, url: str) -> str:
    """The links of this service are paths."""
    return str(request.base_url).rstrip("/") + url if url.startswith("/") else url


def _upload_links(router: APIRouter, serving: ObjectRoutes) -> None:
    @router.get(
        "/upload-link",
        summary="A form that uploads one object without a key: exact key and type, bounded size",
        openapi_extra=needs("s3:write"),
        **openapi.answers(openapi.UploadForm),
    )
    async def upload_link(
        request: Request,
        key: Key,
        expires: LinkSeconds = LINK_SECONDS,
        *,
        content_type: Annotated[str, Query(max_length=200)] = "",
        min_bytes: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0,
        max_bytes: Annotated[int | None, Query(ge=0, le=MAX_INTEGER)] = None,
    ) -> Any:
        known = _reach(request, serving).writes(key)
        largest = serving.max_upload_bytes if max_bytes is None else max_bytes
        if not min_bytes <= largest <= serving.max_upload_bytes:
            hint = f"give min_bytes <= max_bytes <= {serving.max_upload_bytes}, which is MAX_UPLOAD_BYTES"
            raise Refused(422, "there is no such size", hint, fault="max_bytes")
        if "${filename}" in known:
            raise Refused(422, "S3 replaces ${filename} in the key of a form", "choose another key", fault="key")
        media = media_type(content_type, known)
        if content_type.strip() not in ("", media):
            raise Refused(422, "no object can have this type", "leave it out, or correct it", fault="content_type")
        ends_at = serving.clock().replace(microsecond=0) + timedelta(seconds=expires)
        url, fields = await serving.ask(serving.links.form, known, media, range(min_bytes, largest + 1), expires)
        return {
            "key": known,
            "url": _absolute(request, url),
            "fields": fields,
            "content_type": media,
            "min_bytes": min_bytes,
            "max_bytes": largest,
            "expires_at": ends_at,
        }

    @router.post(
        "/shared",
        summary="Where the form of an upload link leads to, when objects are in a local directory",
        openapi_extra={**needs(OPEN), **openapi.FORM_UPLOAD},
        responses=openapi.FORM_ANSWERS,
        status_code=204,
    )
    async def shared_upload(request: Request) -> Response:
        def work(body: ReadableBody, _: str, fields: Sequence[tuple[str, str]]) -> StoredObject:
            key, content_type, sizes = serving.own_links.check_form(fields)
            return serving.transfers.write(serving.reach.writes(key), SizedBody(body, sizes), PutRequest(content_type))

        if boundary_of(request.headers) is None:
            raise Refused(415, "not a form", "send multipart/form-data with the fields of the link, then the file")
        done = await _received(request, serving, work)
        return Response(status_code=204, headers={"ETag": done.etag})


def _uploading(router: APIRouter, serving: ObjectRoutes) -> None:
    @router.post(
        "/upload",
        summary="Create or replace an object",
        openapi_extra={**needs("s3:write"), **openapi.upload()},
        **openapi.answers(openapi.ObjectStored, openapi.BODY),
    )
    async def upload(request: Request, key: Key) -> Any:
        known, fields = _reach(request, serving).writes(key), join_headers(request.headers.items())
        expected = None
        if CONDITIONS & fields.keys():
            # the store checks `If-None-Match: *`; any other condition is checked against the current version
            creates = fields.get("if-none-match", "").strip() == "*"
            held = None if creates else await serving.ask(serving.store.head, known)
            check_conditions(fields, held)
            expected = held.etag if held else ""
        return await _written(request, serving, known, expected)

    @router.put(
        "/update",
        summary="Replace an object that exists",
        openapi_extra={**needs("s3:write"), **openapi.upload()},
        **openapi.answers(openapi.ObjectStored, (404, *openapi.BODY)),
    )
    async def update(request: Request, key: Key) -> Any:
        held = await _to_change(request, serving, _reach(request, serving).writes(key))
        return await _written(request, serving, held.key, held.etag, held)


async def _to_change(request: Request, serving: ObjectRoutes, key: str) -> ObjectInfo:
    held, fields = await serving.held(key, tags=request.method != "DELETE"), join_headers(request.headers.items())
    check_conditions(fields, held)
    return held


async def _written(
    request: Request, serving: ObjectRoutes, key: str, expected: str | None, held: ObjectInfo | None = None
) -> Mapping[str, Any]:
    """Store the body at `key`. Headers, metadata and type that the request does not send are kept from `held`, which
    it replaces; but Content-Encoding, which describes the bytes, only if they are still gzip.
    """
    sent, sent_metadata = stored_fields(join_headers(request.headers.items()))
    old = held.headers if held else {}
    metadata = sent_metadata or {name: value for name, value in (held.metadata if held else {}).items() if name != MARK}

    def work(body: ReadableBody, media: str, _: object) -> StoredObject:
        headers = {**old, "content-encoding": "", **sent}
        if old.get("content-encoding") == "gzip" and "content-encoding" not in sent:
            start, body = peek_body(body, len(GZIP))
            headers["content-encoding"] = "gzip" if start == GZIP else ""
        headers = {name: value for name, value in headers.items() if value}
        content_type = media_type(media, key, held.content_type if held else "")
        return serving.transfers.write(key, body, PutRequest(content_type, metadata, expected, headers))

    return _stored(key, await _received(request, serving, work))


async def _received(request: Request, serving: ObjectRoutes, work: Work) -> StoredObject:
    """The result of `work` for the body, which is a form or bare."""
    boundary, fields = boundary_of(request.headers), dict(join_headers(request.headers.items()))
    if boundary is not None:
        fields.pop(PAYLOAD_HASH, None)  # covers the whole form, not its file
    ChecksummedBody.check(fields)

    def store(feed: ReadableBody) -> StoredObject:
        if boundary is None:
            return work(ChecksummedBody(feed, fields), fields.get("content-type", ""), ())
        form = FormReader(feed, boundary)
        return work(ChecksummedBody(form, fields), form.content_type, form.fields)

    return await read_in_thread(request, serving.uploads, BUSY, serving.writers, store)


def _patching(router: APIRouter, serving: ObjectRoutes) -> None:
    @router.patch(
        "/patch",
        summary="Overwrite bytes from an offset on; the rest, the type, headers and metadata stay",
        openapi_extra={**needs("s3:write"), **openapi.upload(kept=False)},
        **openapi.answers(openapi.ObjectPatched, (404, 416, *openapi.BODY)),
    )
    async def patch(request: Request, key: Key, offset: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0) -> Any:
        held = await _to_change(request, serving, _reach(request, serving).writes(key))
        if offset > held.size_bytes:
            raise Refused(
                416,
                f"offset {offset} is after the end of {held.size_bytes} bytes",
                "patch at the end to append",
                fault="offset",
                headers={"Content-Range": f"bytes */{held.size_bytes}"},
            )
        stored_fields(join_headers(request.headers.items()))  # refuses signed chunks, whose framing would be stored
        done = await _received(request, serving, lambda body, *_: serving.transfers.patch(held, offset, body))
        warning = {"warning": PARQUET_WARNING} if held.key.lower().endswith(".parquet") else {}
        return _stored(held.key, done, offset=offset, guarded=done.guarded, **warning)


def _deleting(router: APIRouter, serving: ObjectRoutes) -> None:
    @router.delete(
        "/delete",
        summary="Delete an object",
        openapi_extra=needs("s3:delete"),
        **openapi.answers(openapi.ObjectDeleted, (404, 412)),
    )
    async def delete(request: Request, key: Key) -> Any:
        held = await _to_change(request, serving, _reach(request, serving).deletes(key))
        await serving.ask(serving.store.delete, held.key)
        return {"key": held.key, "deleted": True}


def _stored(key: str, done: StoredObject, **more: Any) -> Mapping[str, Any]:
    """What every write answers, an ObjectStored."""
    answer = {"key": key, "etag": done.etag, "version_id": done.version_id, "size": done.size_bytes, **more}
    return answer if done.guarded else {**answer, "guarded": False}
