"""The daemon with /s3 on a local directory and on a bucket, for the tests of the routes."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from daemon import Daemon, Daemons
from seaweed import Seaweed

MIB = 1 << 20


def bucket_environ(seaweed: Seaweed, bucket: str, url: str = "") -> dict[str, str]:
    return {
        "S3_BUCKET": bucket,
        "S3_ENDPOINT_URL": url or seaweed.endpoint_url,
        "S3_ACCESS_KEY_ID": seaweed.access_key,
        "S3_SECRET_ACCESS_KEY": seaweed.secret_key,
        "S3_ADDRESSING_STYLE": "path",
    }


@pytest.fixture(scope="session", params=["local directory", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One daemon per store for all tests; each test uses keys of its own."""
    environ = {"MAX_UPLOAD_BYTES": str(40 * MIB)}
    if request.param == "s3":
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        environ |= bucket_environ(seaweed, seaweed.new_bucket())
    with ExitStack() as stack:
        daemons = stack.enter_context(closing(Daemons(tmp_path_factory.mktemp("objects"))))
        daemon = daemons.start("", wait=True, key="", **environ)
        client = stack.enter_context(httpx.Client(base_url=f"{daemon.url}/s3", timeout=60))
        daemon.until(lambda: daemon.get("/ready").json["checks"]["s3_accessible"], 30)
        yield client


def held_parts(seaweed: Seaweed, bucket: str) -> list[str]:
    with closing(seaweed.client()) as client:
        return [each["Key"] for each in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


def peak_mib(daemon: Daemon) -> float:
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
