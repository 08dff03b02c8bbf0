"""An S3 server with very many objects that exist by name only: `analytics_bucket.py PORT DEVICES HOURS LATENCY_MS`.

It lists hourly objects of DEVICES devices as S3 does, in order, and stores objects that are put. It does not check
signatures.
"""

import asyncio
import sys
from bisect import bisect_left, insort
from datetime import UTC, datetime, timedelta
from hashlib import md5
from urllib.parse import parse_qs, quote, unquote, urlsplit

PREFIX = "telemetry"
START = datetime(2025, 1, 1, tzinfo=UTC)
SIZE_BYTES = 12_345
HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'


def key_of(device: int, hour: int) -> str:
    """The key of one hour of one device."""
    at = START + timedelta(hours=hour)
    return f"{PREFIX}/device_id=D{device:03d}/date={at:%Y/%m/%d}/export_{at:%H%M%S}.parquet"


def etag_of(key: str) -> str:
    """The ETag of an object that exists by name only."""
    return f'"{md5(key.encode(), usedforsecurity=False).hexdigest()}"'


class Bucket:
    """Names in order, and the objects that were put."""

    def __init__(self, devices: int, hours: int, latency_seconds: float) -> None:
        self.names = sorted(key_of(device, hour) for device in range(devices) for hour in range(hours))
        self.held: dict[str, bytes] = {}
        self.latency_seconds = latency_seconds
        self.listed = 0
        self.pages: dict[tuple[str, ...], bytes] = {}

    def listing(self, asked: dict[str, str]) -> bytes:
        """One page, made once while nothing below its prefix changes."""
        self.listed += 1
        of = (
            asked.get("prefix", ""),
            *(asked.get(name, "") for name in ("continuation-token", "delimiter", "max-keys")),
        )
        if of not in self.pages:
            self.pages[of] = self.page(asked)
        return self.pages[of]

    def changed(self, name: str) -> None:
        """Pages that may hold this name are made anew."""
        self.pages = {of: page for of, page in self.pages.items() if not name.startswith(of[0])}

    def page(self, asked: dict[str, str]) -> bytes:
        """One page."""
        prefix, limit = asked.get("prefix", ""), int(asked.get("max-keys", "1000"))
        at = bisect_left(self.names, asked.get("continuation-token", prefix))
        entries: list[str] = []
        while at < len(self.names) and self.names[at].startswith(prefix) and len(entries) < limit:
            name = self.names[at]
            slash = name.find("/", len(prefix)) if "delimiter" in asked else -1
            if slash >= 0:
                folder = name[: slash + 1]
                entries.append(f"<CommonPrefixes><Prefix>{quote(folder)}</Prefix></CommonPrefixes>")
                at = bisect_left(self.names, folder + "\U0010ffff")
                continue
            entries.append(self.entry(name))
            at += 1
        more = at < len(self.names) and self.names[at].startswith(prefix)
        token = f"<NextContinuationToken>{self.names[at]}</NextContinuationToken>" if more else ""
        told = f"<EncodingType>url</EncodingType><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        return f"{HEAD}{told}{''.join(entries)}</ListBucketResult>".encode()

    def entry(self, name: str) -> str:
        """One object of a page, as S3 writes it."""
        body = self.held.get(name)
        etag = etag_of(name) if body is None else f'"{md5(body, usedforsecurity=False).hexdigest()}"'
        size = SIZE_BYTES if body is None else len(body)
        return (
            f"<Contents><Key>{quote(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{etag[1:-1]}&quot;</ETag><ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm>"
            f"<ChecksumType>FULL_OBJECT</ChecksumType><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                fields = {name.lower(): text for name, _, text in (one.partition(": ") for one in lines)}
                if "expect" in fields:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await reader.readexactly(int(fields.get("content-length", "0")))
                method, target, _ = line.split(" ")
                status, said, etag = await self.answer(method, target, body)
                mark = f"ETag: {etag}\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n" if etag else ""
                writer.write(f"HTTP/1.1 {status} x\r\n{mark}Content-Length: {len(said)}\r\n\r\n".encode())
                writer.write(said if not line.startswith("HEAD") else b"")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, method: str, target: str, body: bytes) -> tuple[int, bytes, str]:
        """Status, body and ETag."""
        url = urlsplit(target)
        asked = {name: texts[0] for name, texts in parse_qs(url.query).items()}
        name = unquote(url.path).lstrip("/").partition("/")[2]
        if not name and method == "GET":
            await asyncio.sleep(self.latency_seconds)
            return (200, str(self.listed).encode(), "") if "listed" in asked else (200, self.listing(asked), "")
        if method in ("PUT", "DELETE"):
            self.changed(name)
        if method == "PUT":
            if name not in self.held:
                insort(self.names, name)
            self.held[name] = body
        if method == "DELETE" and self.held.pop(name, None) is not None:
            self.names.remove(name)
        if method == "DELETE" or name not in self.held:
            return (204 if method == "DELETE" else 404), b"", ""
        found = self.held[name]
        etag = f'"{md5(found, usedforsecurity=False).hexdigest()}"'
        return 200, found if method == "GET" else b"", etag


async def main() -> None:
    """Serve until killed."""
    port, devices, hours, latency_ms = map(int, sys.argv[1:])
    bucket = Bucket(devices, hours, latency_ms / 1000)
    async with await asyncio.start_server(bucket.serve, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
