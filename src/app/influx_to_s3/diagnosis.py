"""Explain a refused connection: what the InfluxDB token may do and which settings were probably meant.

For commands only, never the daemon. This is the only module that imports influxdb-client: the import costs 0.3 s and 41
MiB, so it is loaded only after a query has failed.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import urllib3
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.rest import ApiException

from app.core.errors import Permanent
from app.core.network import proxy_for

if TYPE_CHECKING:
    from app.config.settings import InfluxSettings

NAMED = 10
TIMEOUT_MS = 10_000


def check_access(ping: Callable[[], str], influx: "InfluxSettings") -> str:
    """The result of `ping`. Raises what `ping` raises.

    If the server refuses, the error also lists the token's organisations, buckets and permissions, and suggests the
    setting that was probably meant.
    """
    try:
        return ping()
    except Permanent as error:
        if influx.api != "flux" or not influx.token.get_secret_value():
            raise
        network: dict[str, Any] = {
            "proxy": proxy_for(influx.url) or None,
            "ssl_ca_cert": os.environ.get("SSL_CERT_FILE"),
        }
        with InfluxDBClient(
            influx.url, influx.token.get_secret_value(), timeout=TIMEOUT_MS, retries=False, **network
        ) as client:
            raise explain_refusal(error, client, org=influx.org, bucket=influx.bucket) from error


def explain_refusal(error: Permanent, client: Any, *, org: str, bucket: str) -> Permanent:
    """The refusal extended with what `client` finds out about the token; unchanged where nothing can be found."""
    orgs = {each.id: each.name for each in _asked(lambda: client.organizations_api().find_organizations())}
    buckets = [
        (each.name, orgs.get(each.org_id, each.org_id))
        for each in _asked(lambda: client.buckets_api().find_buckets(limit=100).buckets)
        if each.type != "system"
    ]
    if not orgs and not buckets:
        return error
    has = [f"organisations {_named(sorted(orgs.values()))}"] if orgs else []
    has.append(f"buckets {_named([f'{name} (of {owner})' for name, owner in sorted(buckets)])}")
    rights = list(_rights(client))
    if rights:
        has.append(f"rights {_named(rights)}")
    meant = _meant(org, bucket, orgs=sorted(orgs.values()), buckets=buckets)
    hint = ", ".join(f"{name}={value}" for name, value in meant.items())
    return Permanent(f"{error.message}. This token has: {'; '.join(has)}", f"set {hint}" if hint else error.hint)


def _meant(org: str, bucket: str, *, orgs: Sequence[str], buckets: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    """The settings that were probably meant, by variable name.

    Empty where nothing is similar, or where the configured names exist.
    """
    found: dict[str, str] = {}
    if org not in orgs:
        owners = sorted({owner for name, owner in buckets if name == bucket})
        if near := get_close_matches(org, orgs, 1) or owners or (orgs if len(orgs) == 1 else []):
            found["INFLUXDB_ORG"] = near[0]
    names = sorted({name for name, owner in buckets if owner == found.get("INFLUXDB_ORG", org)})
    if bucket not in names:
        elsewhere = sorted({owner for name, owner in buckets if name == bucket})
        if elsewhere:
            return {"INFLUXDB_ORG": elsewhere[0]}
        if near := get_close_matches(bucket, names, 1) or (names if len(names) == 1 else []):
            found["INFLUXDB_BUCKET"] = near[0]
    return found


def _rights(client: Any) -> Iterator[str]:
    """The permissions of the token itself; empty where it may not read authorizations."""
    own = client.token
    for each in _asked(lambda: client.authorizations_api().find_authorizations()):
        if each.token == own:
            for right in each.permissions:
                name = getattr(right.resource, "name", None) or ""
                yield f"{right.action} {right.resource.type}{f' {name}' if name else ''}"


def _asked(question: Callable[[], Sequence[Any] | None]) -> Sequence[Any]:
    """The result of the API call; empty where the token lacks permission or the server does not know the endpoint."""
    try:
        return question() or ()
    except (ApiException, urllib3.exceptions.HTTPError):
        return ()


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED]) or "none"
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown
