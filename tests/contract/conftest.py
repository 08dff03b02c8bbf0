"""S3 with one bucket for the tests of the object stores, directly and through a proxy."""

from object_stores import (
    bucket,
    outside,
    proxy,
    remote,
    shared_bucket,
    shared_proxy,
    shared_remote,
    shared_target,
    target,
)

__all__ = [
    "bucket",
    "outside",
    "proxy",
    "remote",
    "shared_bucket",
    "shared_proxy",
    "shared_remote",
    "shared_target",
    "target",
]
