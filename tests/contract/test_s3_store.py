"""What only the S3 store can get wrong: the probe and its conditions, what a person must mend, what cannot be sent."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from app.core.errors import Conflict, Permanent, Rejected
from app.object_store.port import ObjectInfo, PutRequest
from app.object_store.s3 import S3Store, stale_probes
from app.object_store.s3_client import S3Target
from fault_proxy import Fault, FaultProxy, Request, answer, answer_afterwards
from object_stores import ANY, CREATE, get, keys, put, s3_store
from seaweed import Seaweed

if TYPE_CHECKING:
    from collections.abc import Callable


def conditional(request: Request) -> bool:
    return "if-match" in request.headers or "if-none-match" in request.headers


class TestS3:
    def test_conditions_are_known_to_hold_only_after_the_probe_which_leaves_nothing(self, target: S3Target) -> None:
        with s3_store(target) as store:
            put(store, "k", b"1", CREATE)
            with pytest.raises(Conflict):
                put(store, "k", b"2", CREATE)
            assert not store.conditional
            store.probe()
            assert store.conditional
            assert keys(store) == ["k"]

    def test_only_probes_that_no_process_is_still_at_count_as_old(self) -> None:
        at = datetime(2026, 2, 7, 12, tzinfo=UTC)
        ages = {"mine": 0, "young": 59, "killed": 61}
        probes = [ObjectInfo(name, 5, '"e"', at - timedelta(minutes=minutes)) for name, minutes in ages.items()]
        assert stale_probes(probes) == ["killed"]
        assert stale_probes([]) == []

    def test_a_replacement_of_a_missing_object_is_a_conflict_where_the_store_says_404(
        self, remote: S3Store, proxy: FaultProxy
    ) -> None:
        proxy.add(answer(404, b"<Error><Code>NoSuchKey</Code></Error>"), "PUT")
        with pytest.raises(Conflict):
            put(remote, "k", b"2", replace(ANY, expected='"x"'))

    def test_wrong_keys_name_the_variables(self, seaweed: Seaweed, target: S3Target) -> None:
        for wrong in (replace(target, secret_access_key="wrong"), replace(target, access_key_id="wrong")):
            with s3_store(wrong) as store, pytest.raises(Permanent) as caught:
                store.probe()
            assert "S3_SECRET_ACCESS_KEY" in caught.value.hint
            assert seaweed.secret_key not in str(caught.value)
            assert seaweed.secret_key not in repr(wrong)

    def test_a_missing_bucket_is_never_a_missing_object(self, target: S3Target) -> None:
        uses: tuple[Callable[[S3Store], object], ...] = (
            S3Store.probe,
            keys,
            lambda store: store.head("k"),
            lambda store: get(store, "k"),
            lambda store: put(store, "k", b"1"),
            lambda store: store.delete("k"),
        )
        for use in uses:
            with s3_store(replace(target, bucket="no-such-bucket")) as store, pytest.raises(Permanent) as caught:
                use(store)
            assert "bucket 'no-such-bucket' does not exist" in str(caught.value)
            assert "S3_BUCKET" in caught.value.hint

    @pytest.mark.parametrize(
        ("said", "hint"),
        [
            (answer(301, b"<Error><Code>PermanentRedirect</Code></Error>"), "S3_REGION"),
            (answer(400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>"), "S3_REGION"),
            (answer(403, b"<Error><Code>RequestTimeTooSkewed</Code></Error>"), "clock"),
            (answer(403, b"<Error><Code>AccessDenied</Code></Error>"), "S3_ACCESS_KEY_ID"),
            (answer(501, b"<Error><Code>NotImplemented</Code></Error>"), "S3_ENDPOINT_URL"),
        ],
        ids=range(5),
    )
    def test_what_a_person_must_mend_is_permanent(
        self, remote: S3Store, proxy: FaultProxy, said: Fault, hint: str
    ) -> None:
        proxy.add(said, times=10)
        with pytest.raises(Permanent) as caught:
            put(remote, "k", b"1")
        assert hint in caught.value.hint

    @pytest.mark.parametrize(
        "wrong",
        [
            {"endpoint_url": "no url at all"},
            {"endpoint_url": "http://[::1"},
            {"bucket": "not a bucket name!"},
            {"region": "not a region"},
            {"addressing_style": "sideways"},
            {"secret_access_key": ""},
        ],
        ids=str,
    )
    def test_settings_that_cannot_work_are_permanent(self, target: S3Target, wrong: dict[str, str]) -> None:
        with s3_store(replace(target, **wrong)) as store, pytest.raises(Permanent):  # type: ignore[arg-type]  # all text
            store.probe()

    @pytest.mark.parametrize(
        "fault", [answer_afterwards(200, headers={"ETag": '"any"'}), answer(501)], ids=["ignored", "not implemented"]
    )
    def test_a_store_without_conditions_is_found_out_and_the_check_is_made_by_head(
        self, target: S3Target, proxy: FaultProxy, fault: Fault
    ) -> None:
        proxy.add(fault, "PUT", times=1000, fits=conditional)
        with s3_store(target) as store:
            store.probe()
            assert not store.conditional
            etag = put(store, "k", b"1", CREATE)
            with pytest.raises(Conflict):
                put(store, "k", b"2", CREATE)
            put(store, "k", b"3", replace(ANY, expected=etag))
            with pytest.raises(Conflict):
                put(store, "k", b"4", replace(ANY, expected=etag))
            assert get(store, "k") == b"3"

    def test_a_key_that_may_not_delete_can_still_probe(self, target: S3Target, proxy: FaultProxy) -> None:
        proxy.add(answer(403, b"<Error><Code>AccessDenied</Code></Error>"), "DELETE")
        with s3_store(target) as store:
            store.probe()
            assert store.conditional

    def test_metadata_that_headers_cannot_carry_is_rejected(self, remote: S3Store) -> None:
        for metadata in ({"a": "ü"}, {"a": "x\ny"}, {"a": " x"}, {"ä": "x"}, {"a": "x" * 2048}):
            with pytest.raises(Rejected):
                put(remote, "k", b"1", PutRequest("text/plain", metadata))
        assert keys(remote) == []

    def test_more_than_one_upload_may_have_is_rejected(self, remote: S3Store, tmp_path: Path) -> None:
        with (tmp_path / "sparse").open("w+b") as file:
            file.truncate((5 << 30) + 1)
            with pytest.raises(Rejected, match="5 GiB"):
                remote.put("k", file, ANY)
