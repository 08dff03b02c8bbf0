"""Logs: JSON lines on stdout, text on a terminal, a rotating file, rate limits per kind of line, and
one line per run.
"""

import json
import logging
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from app.core.errors import AppError, BadSettings
from app.core.files import LogFile
from app.core.ledger import TALLY_NAMES
from app.core.runs import Outcome, Run, named_in_logs, run_in_logs
from app.core.windows import instant_text

# Rate limits per kind of line, so that nobody who can reach the service can fill a disk or push out other lines.
#
# Invariants: suppressed lines are counted, and the count is logged with a later line or at the end; memory is bounded.
# The limits are far higher inside a run, where only its own data cause lines, and for callers with a key.

TELL_SECONDS = 60.0
KINDS = 1000


@dataclass(frozen=True, slots=True)
class LogAllowance:
    """The size of a burst, and the lines per minute after it."""

    at_once: int
    a_minute: int


IN_RUNS = LogAllowance(1000, 100)
OF_CALLERS = LogAllowance(100, 20)
OF_ANYBODY = LogAllowance(20, 4)
OF_ALL_OF_ANYBODY = LogAllowance(150, 20)
NOBODY = "nobody"


class _Bucket:
    """A token bucket. `record` is the last suppressed line."""

    def __init__(self, allowance: LogAllowance, at: float) -> None:
        self.allowance = allowance
        self._left = float(allowance.at_once)
        self._at = at
        self.left_out = 0
        self.since = at
        self.record: logging.LogRecord | None = None

    def takes(self, at: float) -> bool:
        seconds = max(at - self._at, 0.0)  # the clock may have been set back
        self._at = at
        self._left = min(self._left + seconds * self.allowance.a_minute / 60, float(self.allowance.at_once))
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def count(self, other: "_Bucket") -> None:
        """Take over the count of suppressed lines from `other`, which is evicted."""
        if other.left_out:
            self.since = self.since if self.left_out else other.since
            self.left_out += other.left_out
            self.record = other.record


class LogLimits:
    """One bucket per kind of line: logger, level, message template, job, caller and status."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: OrderedDict[tuple[object, ...], _Bucket] = OrderedDict()
        self._of_anybody = _Bucket(OF_ALL_OF_ANYBODY, 0.0)

    def passed(self, record: logging.LogRecord, job: str) -> list[logging.LogRecord]:
        """The lines to write for `record`: itself or nothing, preceded by summaries that are due."""
        with self._lock:
            told = list(self._due(record.created))
            bucket = self._bucket(record, job)
            fits = bucket.takes(record.created)
            if fits and bucket.allowance is OF_ANYBODY:
                fits = self._of_anybody.takes(record.created)
            if fits:
                return [*told, record]
            if not bucket.left_out:
                bucket.since = record.created
            bucket.left_out += 1
            bucket.record = record
            return told

    def rest(self) -> list[logging.LogRecord]:
        """The summaries that remain when the log is closed."""
        with self._lock:
            return [_summary(each) for each in (self._of_anybody, *self._buckets.values()) if each.left_out]

    def _bucket(self, record: logging.LogRecord, job: str) -> _Bucket:
        who, status = getattr(record, "who", NOBODY), getattr(record, "status", None)
        kind = (record.name, record.levelno, str(record.msg), job, who, status)
        allowance = IN_RUNS if job else OF_ANYBODY if who == NOBODY else OF_CALLERS
        bucket = self._buckets.setdefault(kind, _Bucket(allowance, record.created))
        self._buckets.move_to_end(kind)
        return bucket

    def _due(self, now: float) -> Iterator[logging.LogRecord]:
        while len(self._buckets) > KINDS:
            _, oldest = self._buckets.popitem(last=False)
            self._of_anybody.count(oldest)
        for bucket in (self._of_anybody, *self._buckets.values()):
            if bucket.left_out and not 0 <= now - bucket.since < TELL_SECONDS:
                yield _summary(bucket)


def _summary(bucket: _Bucket) -> logging.LogRecord:
    """A line that replaces suppressed lines and repeats the last one."""
    last, count = bucket.record, bucket.left_out
    assert last is not None  # noqa: S101 - set whenever a line is counted
    bucket.left_out, bucket.record = 0, None
    made = logging.makeLogRecord(last.__dict__)
    made.msg, made.args = "%d more lines were left out, the last: %s", (count, last.getMessage())
    made.exc_info = made.exc_text = made.stack_info = None
    return made


# Logs: JSON lines on stdout, text on a terminal, and a rotating file.
#
# Invariants: a record is one line of bounded length, whatever its message contains; lines of one kind are rate-limited
# and counted; only the owner can read the file; no known secret and nothing that looks like one is logged; every record
# made inside `app.core.runs.named_in_logs`, or in a thread with a copy of that context, names its run and job.

FILE_BYTES = 1_000_000
OURS = ("headwater-stdout", "headwater-file")
OWNER_ONLY = 0o600
MESSAGE_CHARACTERS, TRACE_CHARACTERS = 8000, 6000
# At DEBUG these log request headers, signatures, tokens and whole bodies, which no filter can redact reliably.
TALKATIVE = ("boto3", "botocore", "s3transfer", "urllib3", "googleapiclient", "google.auth", "httpx")
# Railway indexes these four words; anything else counts as info.
LEVEL_WORDS = {10: "debug", 20: "info", 30: "warn", 40: "error", 50: "error"}
STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ANYWHERE_CHARACTERS, WORD_CHARACTERS = 8, 4
PLAIN_WORD = re.compile(r"[A-Za-z]?[a-z]{1,15}|[A-Z]{1,15}|\d{1,15}")
SAID = r"\b(?:password|passwd|pwd|secret|token|key)"
# Repetitions are bounded: a hostile message of a megabyte must not take a minute.
NAMED = r"(?:password|passwd|pwd|secret\w{0,20}|api_?key|access_?key\w{0,20}|token|signature|X-Amz-Credential)"
QUOTED = r"[\"']?\s{0,9}[:=]\s{0,9}(?=[\"'])"
SHAPES = (
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "***"),
    (re.compile(r"\bhw_[a-z0-9_-]{1,40}_[A-Za-z0-9_-]{43}"), "hw_***"),
    (
        re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,20}PRIVATE KEY-----|$)", re.DOTALL),
        "***",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+[^\s\"',;]+", re.IGNORECASE), r"\1 ***"),
    (re.compile(r"\b(Token)\s+(?=[^\s\"',;]*[0-9_=-])[^\s\"',;]{8,}", re.IGNORECASE), r"\1 ***"),
    (re.compile(r"(Authorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?)[^\s\"',;]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"://[^\s/\"']*@"), "://***@"),
    (re.compile(rf"({NAMED}(?:=|{QUOTED}))(?:([\"'])(?!\2).*?\2|[^\s&\"',;)}}]+)", re.IGNORECASE), r"\1***"),
)


class Redaction:
    """Redacts known secrets and whatever looks like one."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        forms = {form for secret in secrets for form in (secret, quote(secret, safe=""))}
        words = sorted((form for form in forms if len(form) >= WORD_CHARACTERS), key=len, reverse=True)
        # A short secret may be part of an ordinary word; below four characters it would blank everything. One that is
        # itself an ordinary word, such as postgres, is hidden only where the text marks it as a secret.
        known, plain = list[str](), list[str]()
        for word in words:
            part = re.escape(word)
            if PLAIN_WORD.fullmatch(word):
                plain.append(part)
            else:
                known.append(part if len(word) >= ANYWHERE_CHARACTERS else rf"(?<!\w){part}(?!\w)")
        self._known = re.compile("|".join(known)) if known else None
        self._plain = re.compile(rf"({SAID}\W{{1,4}})(?:{'|'.join(plain)})(?!\w)", re.IGNORECASE) if plain else None

    def __call__(self, text: str) -> str:
        """`text` with `***` in place of each secret."""
        if self._known:
            text = self._known.sub("***", text)
        if self._plain:
            text = self._plain.sub(r"\1***", text)
        for shape, instead in SHAPES:
            text = shape.sub(instead, text)
        return text


class _Redacted(logging.Formatter):
    def __init__(self, redact: Redaction) -> None:
        super().__init__()
        self._redact = redact


class JsonLines(_Redacted):
    """One JSON object per line: time, level, message, logger, run_id, job, the `extra` fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, in ASCII, so that no reader finds a line break or an invalid character in it."""
        run_id, job = run_in_logs.get()
        line: dict[str, object] = {
            "time": instant_text(datetime.fromtimestamp(record.created, UTC)),
            "level": LEVEL_WORDS.get(record.levelno, record.levelname.lower()),
            "message": self._redact(_message(record)),
            "logger": record.name,
        }
        line |= {name: value for name, value in (("run_id", run_id), ("job", job)) if value}
        line |= {name: self._plain(value) for name, value in _extra(record) if name not in line}
        if trace := _trace(self, record):
            line["exception"] = self._redact(trace)
        return json.dumps(line)

    def _plain(self, value: object) -> object:
        number = isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value))
        return value if number or value is None else self._redact(str(value))


class TextLines(_Redacted):
    """For people: time, level, job, message; traceback lines are marked, so that they cannot pass for records."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the lines of the traceback."""
        _, job = run_in_logs.get()
        at = instant_text(datetime.fromtimestamp(record.created, UTC))
        head = f"{at} {record.levelname:<7} {f'[{job}] ' if job else ''}"
        extra = "".join(f" {name}={value}" for name, value in _extra(record))
        lines = [head + _printable(self._redact(_message(record) + extra))]
        trace = self._redact(_trace(self, record)).split("\n")
        return "\n".join(lines + [f"    | {_printable(line)}" for line in trace if line])


def configure(
    log_level: str,
    log_format: str,
    log_file: Path | None,
    *,
    log_files: int = 5,
    secrets: Sequence[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Send every record to stdout (or `stream`) and to the file; may be called again. Raises BadSettings for the file.

    `log_files`: the number of rotated files to keep.

    `log_format` auto is text on a terminal and JSON elsewhere; the file holds JSON unless text is requested.
    """
    redact = Redaction(secrets)
    out = stream or sys.stdout
    text_out = log_format == "text" or (log_format == "auto" and out.isatty())
    handlers: list[logging.Handler] = [_Console(out)]
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_OwnersFile(log_file, maxBytes=FILE_BYTES, backupCount=log_files, encoding="utf-8"))
        except OSError as error:
            fault = f"LOG_FILE={str(log_file)!r}: {error.strerror}; allowed: a file that can be written, or off"
            raise BadSettings([fault]) from error
    release()
    for name, handler, text in zip(OURS, handlers, (text_out, log_format == "text"), strict=False):
        handler.setFormatter(TextLines(redact) if text else JsonLines(redact))
        limited = _Limited(handler)
        limited.set_name(name)
        logging.getLogger().addHandler(limited)
    logging.getLogger().setLevel(log_level)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def release() -> None:
    """Remove and close what `configure` set up."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if each.get_name() in OURS]:
        root.removeHandler(handler)
        handler.close()


class _Limited(logging.Handler):
    """Passes on to `target` what `LogLimits` permits."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target
        self._limits = LogLimits()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or count it."""
        for each in self._limits.passed(record, run_in_logs.get()[1]):
            self._target.handle(each)

    def flush(self) -> None:
        """Flush the target."""
        self._target.flush()

    def close(self) -> None:
        """Log the remaining summaries and close the target."""
        for each in self._limits.rest():
            self._target.handle(each)
        self._target.close()
        super().close()


class _Console(logging.StreamHandler[TextIO]):
    """Standard output, which may be a pipe that nobody reads any more."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's word
        """Name the error only: the library would print the message and its arguments, secrets included."""
        kind = getattr(sys.exc_info()[0], "__name__", "")
        with suppress(OSError, ValueError):
            sys.stderr.write(f"a log line of {record.name} cannot be written: {kind}\n")


class _OwnersFile(LogFile):
    """Only the owner can read the file, also one that an earlier version left readable, and each rotated file."""

    def _open(self) -> TextIOWrapper:
        file = super()._open()
        os.fchmod(file.fileno(), OWNER_ONLY)
        return file


def _message(record: logging.LogRecord) -> str:
    """The message. One whose arguments do not fit is shown unformatted, since logging's default would print the
    arguments.
    """
    try:
        return _cut(record.getMessage(), MESSAGE_CHARACTERS)
    except (TypeError, ValueError, KeyError):
        return f"{record.msg} (its arguments do not fit)"


def _cut(text: str, characters: int) -> str:
    """The beginning and the end of a long text."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"


def _extra(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    return ((name, value) for name, value in record.__dict__.items() if name not in STANDARD)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    traces = [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    return _cut("\n".join([*traces, *([record.stack_info] if record.stack_info else [])]), TRACE_CHARACTERS)


def _printable(text: str) -> str:
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


# The log line of each run.
#
# Invariant: every finished run is logged exactly once, at the level that says what a person has to do.

LEVELS = {Outcome.OK: logging.INFO, Outcome.STOPPED: logging.INFO, Outcome.PARTIAL: logging.WARNING}
log = logging.getLogger(__name__)


def log_run(run: Run, cause: BaseException | None) -> None:
    """One line; with a traceback only for unexpected errors, or at DEBUG."""
    report = run.report
    told = f": {run.error}" + (f" ({run.hint})" if run.hint else "") if run.error else ""
    ledger = report.ledger
    entries = {name: getattr(ledger.total, name) for name in TALLY_NAMES} if ledger else {}
    unexpected = cause is not None and not isinstance(cause, AppError)
    with named_in_logs(run.run_id, run.job):
        log.log(
            LEVELS.get(run.outcome, logging.ERROR),
            "%s %s%s",
            run.job,
            run.outcome.value,
            told,
            exc_info=cause if unexpected or log.isEnabledFor(logging.DEBUG) else None,
            extra={
                "outcome": run.outcome.value,
                "rows": report.rows,
                "bytes": report.bytes,
                "windows": report.windows,
                "late_rows": report.late_rows,
                "corrected_rows": report.corrected_rows,
                **entries,
                **({"ledger_closes": ledger.closes} if ledger else {}),
                "seconds": round((run.ended_at - run.started_at).total_seconds(), 3) if run.ended_at else 0.0,
            },
        )
    if isinstance(cause, AppError) and not run.error:
        log.warning("%s: the end of run %s could not be recorded: %s", run.job, run.run_id, cause)
