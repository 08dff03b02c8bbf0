"""A real S3 server from its wheel (SeaweedFS), one for the whole test session, on ports that were free a moment ago."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from app.object_store.s3_client import S3Target

HOST = "127.0.0.1"
READY_SECONDS = 40
SOCKET_FILE = "/tmp/seaweedfs-{}-grpc-{}.sock"  # noqa: S108 - the server puts them there whatever it is told
SERVICES = ("s3", "master", "volume", "filer", "admin")


@dataclass(frozen=True, slots=True)
class Seaweed:
    """Where the server listens and with which key it may be written. Without a key it answers nobody."""

    host: str
    port: int
    access_key: str = "test-access"
    secret_key: str = field(default="test-secret-of-this-session", repr=False)

    @property
    def endpoint_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def new_bucket(self) -> str:
        """Make an empty bucket with a name that no other test has."""
        name = f"test-{uuid4().hex[:16]}"
        with closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """A plain SDK client, to look at the server from outside the code under test. The caller closes it."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, connect_timeout=2, retries={"total_max_attempts": 1}),
        )


def target(seaweed: Seaweed, bucket: str) -> "S3Target":
    """How the product reaches a bucket of the server."""
    from app.object_store.s3_client import S3Target

    return S3Target(
        bucket=bucket,
        endpoint_url=seaweed.endpoint_url,
        addressing_style="path",
        access_key_id=seaweed.access_key,
        secret_access_key=seaweed.secret_key,
        read_timeout_seconds=1,
        connect_timeout_seconds=1,
        attempts=2,
    )


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Seaweed]:
    directory = Path(tempfile.mkdtemp(prefix="seaweed-"))
    try:
        with running(directory, free_ports(2 * len(SERVICES))) as server:
            yield server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def bucket(seaweed: Seaweed) -> str:
    """A bucket for the tests of one module."""
    return seaweed.new_bucket()


def free_ports(count: int) -> list[int]:
    """Ports that are free now; all are held at once while they are chosen, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def running(directory: Path, ports: list[int], *, checks_keys: bool = True) -> Iterator[Seaweed]:
    """Without `checks_keys` it answers whoever asks, also those whose clock is wrong by more than 15 minutes."""
    server = Seaweed(HOST, ports[0])
    environment = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}  # of seven volumes a bucket, one is enough
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            _command(directory, server, ports, checks_keys=checks_keys),
            stdout=log,
            stderr=log,
            cwd=directory,
            env=environment,
        )
    try:
        _wait_until_ready(server, process, directory / "log")
        yield server
    finally:
        process.kill()  # its data goes away with it, and an orderly stop takes seconds
        process.wait()
        for service, port in zip(SERVICES, ports[1::2], strict=True):
            Path(SOCKET_FILE.format(service, port)).unlink(missing_ok=True)


def _command(directory: Path, server: Seaweed, ports: list[int], *, checks_keys: bool) -> list[str]:
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (directory / "data").mkdir()
    pairs = zip(SERVICES, ports[::2], ports[1::2], strict=True)
    listen = [
        f"-{name}.port{kind}={port}" for name, *both in pairs for kind, port in zip(("", ".grpc"), both, strict=True)
    ]
    return [
        str(Path(sys.executable).with_name("weed")),
        f"-logdir={directory}",
        "mini",
        f"-dir={directory / 'data'}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *listen,
        f"-filer.localSocket={directory / 'filer.sock'}",
        f"-s3.localSocket={directory / 's3.sock'}",
        *([f"-s3.config={directory / 's3.json'}"] if checks_keys else []),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=1000",
    ]


def _wait_until_ready(server: Seaweed, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ready is when an object can be written: the S3 port listens before there is a volume to write to."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            bucket = server.new_bucket()
            with closing(server.client()) as client:
                client.put_object(Bucket=bucket, Key="ready", Body=b"yes")
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").splitlines()[-20:]
                raise RuntimeError("\n".join(["the S3 server did not start:", *lines])) from error
            time.sleep(0.1)
        else:
            return
