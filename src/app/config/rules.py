"""The variables in readable form, rules that span several of them, and configuration warnings.

Invariant: the rules are pure; each line names the variable to change and the next step, and shows no secret.
"""

import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from app.config import NEW_KEY
from app.config.settings import Settings
from app.config.value_types import Allowed, KeyEntry, SettingsGroup
from app.core.windows import DAY_SECONDS

# The variables in readable form, for the reference, faults and warnings; read from the models.

MASK = "***"
SPARK_REMOTE = re.compile(r"sc://[^/\s:;]+(:\d{1,5})?(/?;\S+|/)?")


def text_of(value: object) -> str:
    """A value as a person would write it; secrets as `***`."""
    match value:
        case None:
            return ""
        case SecretStr():
            return MASK if value.get_secret_value() else ""
        case bool():
            return str(value).lower()
        case datetime():
            return value.isoformat()
        case tuple():
            pairs = ("=".join(map(str, each)) if isinstance(each, tuple) else each for each in value)
            return ",".join(each.name if isinstance(each, KeyEntry) else str(each) for each in pairs)
        case _:
            return str(value)


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting. `title` is the title of its group, `goes_to` is `group.field`.

    `default` is in readable form, "" where `unset` describes what happens instead.
    """

    title: str
    goes_to: str
    names: tuple[str, ...]
    default: str
    unset: str
    allowed: Allowed


def _allowed(field: FieldInfo) -> Allowed:
    """The description of the type itself, or else one made from its limits or literals."""
    said = [each for each in field.metadata if isinstance(each, Allowed)]
    if said:
        return said[-1]
    if get_origin(field.annotation) is Literal:
        return Allowed(f"one of {', '.join(get_args(field.annotation))}")
    limits = {name: getattr(each, name) for each in field.metadata for name in ("ge", "le") if hasattr(each, name)}
    number = "a number" if float in (field.annotation, *get_args(field.annotation)) else "a whole number"
    return Allowed(f"{number} from {limits['ge']} to {limits['le']}")


def _default(field: FieldInfo, shown: str | None) -> str:
    if shown is not None or field.default_factory is not None:
        return shown or ""
    return f"{field.default:g}" if isinstance(field.default, float) else text_of(field.default)


def _variables(group: str, model: type[SettingsGroup]) -> Iterator[Variable]:
    for name, field in model.model_fields.items():
        words = cast("dict[str, Any]", field.json_schema_extra)
        yield Variable(
            title=str(model.model_config.get("title")),
            goes_to=f"{group}.{name}",
            names=tuple(cast("Any", field.validation_alias).choices),
            default=_default(field, words["shown"]),
            unset=words["unset"],
            allowed=_allowed(field),
        )


GROUPS = {name: cast("type[SettingsGroup]", field.annotation) for name, field in Settings.model_fields.items()}
VARIABLES = tuple(variable for group, model in GROUPS.items() for variable in _variables(group, model))


# Rules that span several variables, and configuration warnings.

# The variables that Kubernetes sets in each container for every service in the namespace.
OF_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_")
CLOSE = 0.8
MOUNTS = Path("/proc/self/mounts")  # Linux only
OF_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|afs|ceph|9p|lustre|gpfs|glusterfs|beegfs|fuse\.(?:sshfs|s3fs|rclone|glusterfs)"
)
NEEDS = (
    ("S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"),
    ("S3_SECRET_ACCESS_KEY", "S3_ACCESS_KEY_ID"),
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
    ("CHECKPOINT_DB_HOST", "CHECKPOINT_DB_NAME"),
    ("CHECKPOINT_DB_NAME", "CHECKPOINT_DB_HOST"),
    ("CHECKPOINT_DB_USER", "CHECKPOINT_DB_HOST"),
    ("CHECKPOINT_DB_PASSWORD", "CHECKPOINT_DB_HOST"),
    ("CHECKPOINT_DB_PASSWORD", "CHECKPOINT_DB_USER"),
    ("CHECKPOINT_DB_SSLMODE", "CHECKPOINT_DB_HOST"),
    ("INFLUXDB_PASSWORD", "INFLUXDB_USERNAME"),
    ("APPMETRICA_API_KEY", "APPMETRICA_APPLICATION_ID"),
    ("APPMETRICA_APPLICATION_ID", "APPMETRICA_API_KEY"),
    ("AMPLITUDE_WEB_CLIENT_ID", "AMPLITUDE_WEB_SECRET_KEY"),
    ("AMPLITUDE_WEB_SECRET_KEY", "AMPLITUDE_WEB_CLIENT_ID"),
    ("AMPLITUDE_MOBILE_CLIENT_ID", "AMPLITUDE_MOBILE_SECRET_KEY"),
    ("AMPLITUDE_MOBILE_SECRET_KEY", "AMPLITUDE_MOBILE_CLIENT_ID"),
)
"""If the first name is set, the second must be too: half a configuration is always a mistake."""


@lru_cache(maxsize=64)  # asked for each request while there are no keys
def loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


UNLOCK = f"run `{NEW_KEY}`, set API_KEYS to the line it prints, and start again"


def locked(settings: Settings, *, own_server: bool = True) -> bool:
    """Whether only probes are answered: others can reach the service and no setting says who may call it.

    `own_server` False: another ASGI server listens, so HOST does not tell who can reach it.
    """
    access = settings.access
    return not (access.api_keys or access.allow_anonymous or (own_server and loopback(settings.service.host)))


def broken_rules(settings: Settings, names: AbstractSet[str], refused: AbstractSet[str]) -> Iterator[str]:
    """One line per broken rule. `names` are set; no value of a name that was `refused` is compared."""
    for given, needed in NEEDS:
        if given in names and needed not in names:
            yield _missing(needed, given)
    if "S3_SSE_KMS_KEY_ID" in names and not settings.s3.sse.startswith("aws:kms") and "S3_SSE" not in refused:
        yield f"S3_SSE={settings.s3.sse!r}: S3_SSE_KMS_KEY_ID needs aws:kms or aws:kms:dsse; set it, or remove the key"
    yield from _influx(settings.influx.api, names)
    yield from _drive(names)
    lease, service = settings.lease, settings.service
    most = lease.ttl_seconds / 2
    if lease.heartbeat_seconds > most and not refused & {"LEASE_TTL_SECONDS", "LEASE_HEARTBEAT_SECONDS"}:
        yield (
            f"LEASE_HEARTBEAT_SECONDS='{lease.heartbeat_seconds:g}': allowed: at most half of LEASE_TTL_SECONDS, "
            f"here {most:g}"
        )
    if "SCALE_ENGINE" not in refused and lease.engine != "embedded" and not on_postgres(settings):
        yield (
            f"SCALE_ENGINE='{lease.engine}': needs checkpoints in PostgreSQL: set CHECKPOINT_DB_HOST, _NAME, "
            "_USER and _PASSWORD, or remove SCALE_ENGINE"
        )
    if service.health_port == service.port and not refused & {"PORT", "HEALTH_PORT"}:
        yield f"HEALTH_PORT='{service.port}': allowed: another port than PORT, which answers probes already"
    if settings.lake.catalog != "none":
        yield from _lake(settings.lake.prefix, settings.s3.prefix)
    if settings.analytics.engine == "spark" and "ANALYTICS_ENGINE" not in refused:
        yield from _spark(settings)


def _missing(needed: str, given: str) -> str:
    return f"{needed}='': needed because {given} is set; set it, or remove {given}"


def _influx(api: str, names: AbstractSet[str]) -> Iterator[str]:
    if "INFLUXDB_URL" not in names:
        return
    if api == "influxql":
        if not names & {"INFLUXDB_DATABASE", "INFLUXDB_BUCKET"}:
            yield _missing("INFLUXDB_DATABASE", "INFLUXDB_URL")
        return
    if not names & {"INFLUXDB_TOKEN", "INFLUXDB_USERNAME"}:
        yield _missing("INFLUXDB_TOKEN", "INFLUXDB_URL")
    for needed in ("INFLUXDB_ORG", "INFLUXDB_BUCKET"):
        if needed not in names:
            yield _missing(needed, "INFLUXDB_URL")


def _drive(names: AbstractSet[str]) -> Iterator[str]:
    """Without credentials, files that somebody expects on Drive would go to the local disk."""
    for given in ("GOOGLE_DRIVE_FOLDER_ID", "GOOGLE_SHARED_DRIVE_ID"):
        if given in names and not names & {"GOOGLE_CREDENTIALS_FILE", "GOOGLE_CREDENTIALS_JSON"}:
            yield _missing("GOOGLE_CREDENTIALS_FILE", given)


def on_postgres(settings: Settings) -> bool:
    """Whether the state is in PostgreSQL."""
    return settings.checkpoint.url.get_secret_value().startswith("postgres")


def _spark(settings: Settings) -> Iterator[str]:
    if settings.lake.catalog == "none":
        yield "ANALYTICS_ENGINE='spark': Spark reads the table of closed days; set CATALOG=iceberg"
    remote = settings.analytics.spark_remote
    if remote is None:
        yield "SPARK_REMOTE='': ANALYTICS_ENGINE=spark needs it; set it to a server, such as sc://host:15002"
    elif not SPARK_REMOTE.fullmatch(remote.get_secret_value()):
        yield "SPARK_REMOTE='***': allowed: sc://host:port, and ;token= behind it"


def _lake(lake: str, exports: str) -> Iterator[str]:
    """Neither prefix may contain the other, or files of one would be taken for files of the other."""
    if not exports:
        yield "S3_PREFIX='': CATALOG=iceberg needs one, so that the table lies outside of it; set it"
    elif not lake or f"{lake}/".startswith(f"{exports}/") or f"{exports}/".startswith(f"{lake}/"):
        yield f"S3_LAKE_PREFIX={lake!r}: allowed: a prefix outside S3_PREFIX, which is {exports!r}"


def warnings(
    settings: Settings,
    environ: Mapping[str, str],
    in_file: Mapping[str, str] = MappingProxyType({}),
    *,
    own_server: bool = True,
) -> list[str]:
    """What a person should check before relying on this configuration; `in_file` is what `.env` sets."""
    found = list(_near_misses({**in_file, **environ}))
    host = settings.service.host if own_server else "this server"
    if locked(settings, own_server=own_server):
        found.append(
            f"others may reach {host} and API_KEYS is not set, so all but the jobs, /health and /ready is locked: "
            f"{UNLOCK}; or {'set HOST=127.0.0.1, or ' * own_server}set ALLOW_ANONYMOUS=true"
        )
    elif settings.access.allow_anonymous and not settings.access.api_keys and not (own_server and loopback(host)):
        found.append(f"ALLOW_ANONYMOUS=true: everybody who reaches {host} may read, write and delete")
    if "*" in settings.access.cors_origins and not settings.access.api_keys:
        found.append(
            "CORS_ORIGINS=*: without API_KEYS every web page that is open in a browser here may read and write"
        )
    if environ.get("RAILWAY_ENVIRONMENT_NAME"):
        found.extend(_railway(settings, environ))
    urls = {"CHECKPOINT_DB_HOST": settings.checkpoint.url, "DWH_DATABASE_URL": settings.dwh.database_url}
    kept_here = [variable for variable, url in urls.items() if not url.get_secret_value()]
    data_dir = settings.service.data_dir.absolute()
    kind = network_file_system(data_dir, MOUNTS.read_text() if MOUNTS.exists() else "")
    if kind and kept_here:
        found.append(
            f"DATA_DIR={data_dir} is on a network file system ({kind}), on which SQLite may be damaged: set DATA_DIR to"
            f" a local disk, or {' and '.join(kept_here)} to a PostgreSQL"
        )
    export = settings.export
    if settings.influx.url and 0 < export.reconcile_days * DAY_SECONDS <= export.grace_seconds:
        found.append(
            f"RECONCILE_DAYS={export.reconcile_days}: windows stay open longer than that "
            f"(EXPORT_GRACE_SECONDS={export.grace_seconds}), so the daily reconcile has nothing to compare: raise it"
        )
    own_disk = [] if settings.s3.bucket else ["S3_BUCKET"]
    own_disk += [] if settings.dwh.database_url.get_secret_value() else ["DWH_DATABASE_URL"]
    if settings.lease.engine != "embedded" and own_disk:
        found.append(
            f"SCALE_ENGINE={settings.lease.engine}: workers write to DATA_DIR, so all of them must share {data_dir}: "
            f"otherwise set {' and '.join(own_disk)}"
        )
    return found


def network_file_system(path: Path, mounts: str) -> str:
    """The kind of network file system that `path` lies on, "" for none; `mounts` as in /proc/self/mounts."""
    fields = [line.split() for line in mounts.splitlines()]
    places = {Path(each[1].replace("\\040", " ")): each[2] for each in fields}
    kind = next((places[place] for place in (path, *path.parents) if place in places), "")
    return kind if OF_NETWORK.fullmatch(kind) else ""


def _near_misses(said: Mapping[str, str]) -> Iterator[str]:
    """A line for each unknown name that resembles a variable or the start of one."""
    for name in sorted(said):
        if not OF_KUBERNETES.search(name) and not said[name].startswith("tcp://") and (meant := _meant(name)):
            yield f"{name} is not a variable of Headwater and is ignored: did you mean {meant}?"


def _meant(name: str) -> str:
    """The variable that an unknown name resembles; "" for none, and for a variable's own name."""
    known = [each for variable in VARIABLES for each in variable.names]
    wanted = name.upper()
    # Names of other programs end like ours (PGHOST, AWS_ENDPOINT_URL), so the beginning has to match.
    alike = [each for each in known if each[:2] == wanted[:2]]
    longer = [each for each in alike if "_" in wanted and each.startswith(wanted)]
    meant = longer[:1] or get_close_matches(wanted, alike, n=1, cutoff=CLOSE)
    return meant[0] if meant and name not in known else ""


def unknown_names(in_file: Mapping[str, str]) -> list[str]:
    """Names in `.env` that are neither variables nor close to one, so that a person sees what is ignored."""
    known = {name for variable in VARIABLES for name in variable.names}
    return sorted(name for name in in_file.keys() - known if not _meant(name))


def _railway(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    service = settings.service
    volume = environ.get("RAILWAY_VOLUME_MOUNT_PATH", "")
    data_dir = Path.cwd() / service.data_dir
    if not volume or not data_dir.is_relative_to(volume):
        fix = f"set DATA_DIR to a folder under {volume}" if volume else "attach a volume and set DATA_DIR to its path"
        yield f"DATA_DIR={data_dir} is on no Railway volume and is lost at each deployment: {fix}"
    draining = environ.get("RAILWAY_DEPLOYMENT_DRAINING_SECONDS", "")
    if not draining.isdecimal() or int(draining) <= service.shutdown_grace_seconds:
        wanted = service.shutdown_grace_seconds + 5
        yield (
            f"RAILWAY_DEPLOYMENT_DRAINING_SECONDS={draining or 'unset'}: Railway kills before a stop is done: "
            f"set it to {wanted}"
        )
    if loopback(service.host):
        yield f"HOST={service.host}: Railway cannot reach it: set HOST=0.0.0.0 and API_KEYS"
