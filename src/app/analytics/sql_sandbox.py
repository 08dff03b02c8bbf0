"""/analytics/sql: one SELECT over the view `telemetry`, in a separate process.

Invariants: the statement is parsed by DuckDB and refused unless it is one SELECT whose tables are `telemetry` or its
own CTEs, and whose functions are all listed here; the view reads a fixed list of objects; the process has no
environment and no configuration that it could change, and the kernel or its parent enforces limits on memory, time,
disk and answer size, so that a statement cannot affect anything else. One statement runs at a time.
"""

import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from app.analytics.columns import span_conditions
from app.analytics.engine import (
    Engine,
    EngineLimits,
    InvalidReport,
    RemoteBucket,
    ReportTooLarge,
    ReportTooSlow,
    UnboundName,
    UnreadableObject,
    checked,
)
from app.analytics.formats import AnswerShape, ReportAnswer, of_batches
from app.analytics.queries import Queries, ReportObjects
from app.analytics.reports import BadParameter
from app.core.closed_days import ReportSpan
from app.core.errors import AppError, Permanent, Rejected, Transient
from app.db.database import UNSTORABLE

log = logging.getLogger(__name__)

MAX_CHARACTERS = 20_000
MAX_ROWS = 100_000
ANSWER_BYTES = 64 << 20
BASE_BYTES = 512 << 20  # an idle interpreter with DuckDB and pyarrow, including their threads
SPILL_BYTES = 1 << 30
START_SECONDS = 10.0
TRACE_CHARACTERS = 2000
ATTEMPTS = 3
KEPT = ("PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
NARROW = "narrow it by device_id, from and to, or aggregate more"
ONE_SELECT = "send one SELECT over telemetry; docs/analytics.md lists what is allowed"
# A CTE with the name of a DuckDB built-in would expose the built-in wherever the CTE is out of scope.
OWN_NAME = re.compile(r"(?!duckdb_|sqlite_|pg_|pragma_|information_)[A-Za-z_][A-Za-z0-9_]{0,62}")
OPERATOR = re.compile(r"[^\w\s'\"]{1,3}")
TABLES = frozenset({"BASE_TABLE", "SUBQUERY", "JOIN", "EMPTY", "EXPRESSION_LIST", "TABLE_FUNCTION"})
SOURCES = frozenset({"range", "generate_series", "unnest"})
PURE = """
    abs acos acosh add age ago any_value approx_count_distinct approx_quantile arbitrary arg_max arg_min argmax
    argmin array_agg array_to_string ascii asin asinh atan atan2 atanh avg bit_and bit_count bit_length bit_or
    bit_position bit_xor bool_and bool_or cardinality cbrt ceil ceiling century char_length character_length chr
    concat concat_ws contains corr cos cosh cot count count_if count_star countif covar_pop covar_samp cume_dist
    current_date current_localtimestamp current_timestamp date_add date_diff date_part date_sub date_trunc datediff
    datepart datesub datetrunc day dayname dayofmonth dayofweek dayofyear days_in_month decade decode degrees
    dense_rank divide element_at encode ends_with entropy epoch epoch_ms epoch_ns epoch_us era even exp fdiv fill
    filter first first_value flatten floor fmod format fsum gcd generate_series geomean get_current_timestamp
    greatest greatest_common_divisor group_concat hash histogram histogram_exact hour ilike_escape instr isfinite
    isinf isnan isodow isoyear json json_array json_array_length json_contains json_exists json_extract
    json_extract_path json_extract_path_text json_extract_string json_keys json_merge_patch json_object json_pretty
    json_quote json_type json_valid json_value julian kurtosis kurtosis_pop lag last last_day last_value lcase lcm
    lead least least_common_multiple left len length like_escape list list_aggr list_aggregate list_apply list_avg
    list_cat list_concat list_contains list_count list_distance list_distinct list_dot_product list_element
    list_extract list_filter list_first list_has list_has_all list_has_any list_indexof list_intersect list_last
    list_max list_median list_min list_pack list_position list_reduce list_resize list_reverse_sort list_select
    list_slice list_sort list_sum list_transform list_unique list_value list_where list_zip listagg ln log log10
    log2 lower lpad ltrim mad make_date make_time make_timestamp make_timestamp_ms make_timestamp_ns
    make_timestamptz map map_concat map_contains map_entries map_extract map_extract_value map_from_entries map_keys
    map_values max max_by md5 md5_number mean median microsecond millennium millisecond min min_by minute mod mode
    month monthname multiply not_ilike not_ilike_escape not_like_escape now nth_value ntile nullif octet_length
    percent_rank pg_typeof pi position pow power prefix printf quantile quantile_cont quantile_disc quarter radians
    range rank rank_dense reduce regexp_extract regexp_extract_all regexp_full_match regexp_matches regexp_replace
    regexp_split_to_array regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy
    regr_syy repeat replace reverse right round round_even row row_number row_to_json rpad rtrim second sem sha256
    sign sin sinh skewness split split_part sqrt starts_with stddev stddev_pop stddev_samp strftime string_agg
    string_split string_to_array strip_accents strlen strpos strptime struct_contains struct_extract
    struct_extract_at struct_has struct_keys struct_pack struct_values substr substring subtract suffix sum
    sum_no_overflow tan tanh time_bucket timezone timezone_hour timezone_minute to_base64 to_days to_hours to_json
    to_microseconds to_minutes to_months to_quarters to_seconds to_timestamp to_weeks to_years today trim trunc
    try_strptime typeof ucase unnest unicode upper var_pop var_samp variance week weekday weekofyear weighted_avg xor
    year yearweek
"""
FUNCTIONS = frozenset(PURE.split())
"""Pure functions: they use no settings, sessions, sequences, logs, files or network."""


class SqlBusy(Transient):
    """Another statement is running."""


class SqlSandbox:
    """Runs statements over the objects that `queries` selects. `objects(engine)` gives the objects, copied or pinned
    below the engine's folder.
    """

    def __init__(
        self, queries: Queries, folder: Path, limits: EngineLimits, objects: Callable[[Engine], ReportObjects]
    ) -> None:
        self._queries = queries
        self._folder = folder
        self._limits = limits
        self._objects = objects
        self._turn = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """Stop the running statement, if any."""
        if self._process is not None:
            self._process.kill()

    def run(self, sql: str, span: ReportSpan, shape: AnswerShape) -> ReportAnswer:
        """The whole answer of a statement whose view has the rows of a span. Raises BadParameter for what the caller
        must change, SqlBusy, and Transient when objects cannot be read or are replaced during each attempt.
        """
        if len(sql) > MAX_CHARACTERS:
            raise BadParameter(f"the statement has more than {MAX_CHARACTERS} characters", "send a shorter one")
        if UNSTORABLE.search(sql + (span.device or "")):
            raise BadParameter("the statement or device_id holds a NUL or half of a surrogate pair", "leave it out")
        if span.since is not None and span.until is not None and span.since >= span.until:
            raise BadParameter("from is not earlier than to", "send the earlier timestamp as from")
        if not self._turn.acquire(blocking=False):
            hint = "send the same request again later"
            raise SqlBusy("another statement is running, and they run one at a time", hint, retry_after_seconds=5)
        try:
            return self._queries.retry(partial(self._attempt, sql, span, shape), ATTEMPTS)
        finally:
            self._turn.release()

    def _attempt(self, sql: str, span: ReportSpan, shape: AnswerShape) -> ReportAnswer:
        wanted = self._queries.to_read(span)
        where = " AND ".join(span_conditions(span)) or "true"
        with TemporaryDirectory(dir=self._folder, prefix="sql-") as name:
            engine = Engine(Path(name), self._limits)
            objects = self._objects(engine)
            try:
                with objects.opened(wanted) as (reader, files):
                    job = {
                        "sql": sql,
                        "rows": f"SELECT * FROM {self._queries.rows(sql, engine, files)} WHERE {where}",  # noqa: S608
                        "folder": name,
                        "limits": asdict(self._limits),
                        "remote": reader.remote and asdict(reader.remote),
                        "shape": asdict(shape),
                    }
                    answer = self._answer(job, Path(name))
                self._queries.confirm(objects, wanted)
            finally:
                objects.close()
        return answer

    def _answer(self, job: Mapping[str, Any], folder: Path) -> ReportAnswer:
        environ = {name: os.environ[name] for name in KEPT if name in os.environ}
        command = [sys.executable, "-I", "-m", "app.analytics.sql_sandbox"]
        with subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=environ
        ) as process:
            self._process = process
            try:
                said, trace = process.communicate(json.dumps(job).encode(), self._limits.seconds + START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise _too_slow(self._limits) from None
            finally:
                self._process = None
        fault = json.loads(said) if said else None
        if fault is None and process.returncode == 0:
            return ReportAnswer((folder / "answer").open("rb"))
        if fault is None and process.returncode > 0:
            log.error("the process of a statement failed: %s", trace.decode(errors="replace")[-TRACE_CHARACTERS:])
            raise Permanent("the process of the statement failed", "bug in Headwater; please report it with its log")
        raise _fault(fault, self._limits)


def _too_slow(limits: EngineLimits) -> BadParameter:
    return BadParameter(f"the statement took longer than {limits.seconds:g} s", NARROW)


def _fault(fault: Mapping[str, str] | None, limits: EngineLimits) -> AppError:
    """The process's fault as an error. None: a signal killed it because a memory allocation inside DuckDB failed."""
    if fault is None or fault["kind"] == ReportTooLarge.__name__:
        return BadParameter(f"the statement needs more than {limits.memory_mb} MB of memory, or 1 GB of disk", NARROW)
    if fault["kind"] == ReportTooSlow.__name__:
        return _too_slow(limits)
    if fault["kind"] == "UnreadableObject":
        return UnreadableObject(fault["message"], fault["hint"])
    if fault["kind"] in (InvalidReport.__name__, UnboundName.__name__):
        return BadParameter(fault["message"], "correct the statement")
    known: dict[str, type[AppError]] = {"Transient": Transient, "Permanent": Permanent}
    return known.get(fault["kind"], BadParameter)(fault["message"], fault["hint"])


# Code that runs in the child process.


def main() -> int:
    """Read a job from standard input; write the answer to the file `answer`, or the error to standard output."""
    import pyarrow as pa

    job = json.load(sys.stdin)
    limits = EngineLimits(**job["limits"])
    memory_bytes = (limits.memory_mb << 20) + BASE_BYTES
    for what, most in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_CPU, int((limits.seconds + START_SECONDS) * limits.threads)),
        (resource.RLIMIT_FSIZE, SPILL_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    engine = Engine(Path(job["folder"]), limits, RemoteBucket(**job["remote"]) if job["remote"] else None)
    try:
        check(engine, job["sql"])
        with engine.batches(job["sql"], {}, rows=job["rows"]) as reader:
            bounded = pa.RecordBatchReader.from_batches(reader.schema, _bounded(reader))
            answer = of_batches(bounded, AnswerShape(**job["shape"]), engine.folder)
            with (engine.folder / "answer").open("xb") as file:
                file.writelines(answer.pieces())
    except AppError as error:
        fault = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    except MemoryError:
        fault = {"kind": ReportTooLarge.__name__, "message": "", "hint": ""}
    else:
        return 0
    sys.stdout.write(json.dumps(fault))
    return 1


def _bounded(batches: Iterable[Any]) -> Iterator[Any]:
    size_bytes = 0
    for batch in batches:
        size_bytes += batch.nbytes
        if size_bytes > ANSWER_BYTES:
            raise Rejected(f"the answer is larger than {ANSWER_BYTES >> 20} MiB", NARROW)
        yield batch


def check(engine: Engine, sql: str) -> None:
    """Raises Rejected for anything but one SELECT over `telemetry` with the functions above."""
    checked(engine.parsed(sql), SOURCES, _refused_in, "allowed", ONE_SELECT)


def _refused_in(node: Mapping[str, Any]) -> str:
    """What this node contains that is not allowed, "" if nothing. Every table node has the field `sample`."""
    kind = node.get("type")
    for entry in (node.get("cte_map") or {}).get("map", ()):
        if not OWN_NAME.fullmatch(str(entry["key"])):
            return f"the name {entry['key']!r} in WITH"
    if "sample" in node and kind not in TABLES and not str(kind).endswith("_NODE"):
        return f"{kind} as a table"
    if kind == "VALUE_PARAMETER":
        return "a parameter"
    name = str(node.get("function_name", "abs")).lower()
    return "" if name in FUNCTIONS or OPERATOR.fullmatch(name) else f"the function {name}()"


if __name__ == "__main__":
    sys.exit(main())
