"""Which lifecycle rules remove the old versions of what Headwater replaces; the answers are as in the S3 reference."""

from typing import Any

import pytest

from app.object_store.s3_multipart import removes_old_versions

EXPIRES = {"NoncurrentVersionExpiration": {"NoncurrentDays": 7}}


def rule(**more: Any) -> dict[str, Any]:
    return {"ID": "r", "Status": "Enabled", "Filter": {"Prefix": ""}, **EXPIRES, **more}


@pytest.mark.parametrize(
    "rules",
    [
        [rule()],
        [rule(Filter={})],
        [rule(Filter={"Prefix": "tele"})],
        [rule(Filter={"Prefix": "telemetry/"})],
        [{"ID": "old form", "Prefix": "telemetry", "Status": "Enabled", **EXPIRES}],
        [{"Status": "Enabled", "Filter": {}, "Expiration": {"Days": 30}}, rule()],
    ],
)
def test_a_rule_for_everything_below_the_prefix_removes_old_versions(rules: list[dict[str, Any]]) -> None:
    assert removes_old_versions(rules, "telemetry")


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [rule(Status="Disabled")],
        [rule(Filter={"Prefix": "telemetry/device_id=D1/"})],
        [rule(Filter={"Prefix": "other/"})],
        [rule(Filter={"Tag": {"Key": "a", "Value": "b"}})],
        [rule(Filter={"And": {"Prefix": "", "Tags": []}})],
        [{"Status": "Enabled", "Filter": {}, "Expiration": {"Days": 30}}],
    ],
)
def test_any_other_rule_leaves_some(rules: list[dict[str, Any]]) -> None:
    assert not removes_old_versions(rules, "telemetry")


def test_without_a_prefix_only_a_rule_for_the_whole_bucket_does() -> None:
    assert removes_old_versions([rule()], "")
    assert not removes_old_versions([rule(Filter={"Prefix": "telemetry/"})], "")
