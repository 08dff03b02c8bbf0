"""Counted requests are those that a proxy sees, by their price class, retries included."""

import io
from collections import Counter

from app.object_store.port import PutRequest
from app.object_store.s3 import S3Store
from app.object_store.s3_multipart import S3Transfers
from fault_proxy import Answer, Fault, FaultProxy, Seen

CLASSES = {"PUT": "put", "POST": "put", "GET": "get", "HEAD": "get", "DELETE": "delete"}


def class_of(seen: Seen) -> str:
    return "list" if "list-type=2" in seen.path else CLASSES[seen.method]


def test_every_request_that_leaves_is_counted_once(remote: S3Store, proxy: FaultProxy) -> None:
    remote.target.counter.take()
    proxy.seen.clear()
    proxy.add(Fault("busy", instead=Answer(503)), method="PUT")
    remote.put("telemetry/a", io.BytesIO(b"1"), PutRequest("text/csv"))
    for _ in range(3):
        remote.head("telemetry/a")
    list(remote.list("telemetry/"))
    remote.delete("telemetry/a")
    transfers = S3Transfers(remote)
    transfers.write("telemetry/b", io.BytesIO(bytes(17 << 20)), PutRequest("text/csv"))
    transfers.close()
    assert remote.target.counter.take() == Counter(map(class_of, proxy.seen))
    assert remote.target.counter.take() == {}
