"""Reports: one SQL file each, with its title, its typed parameters and the shape of its answer in comments at its head.

    -- title: Each device over time          what it is called
    -- path: devices/latest                  where it is served; the file's name with dashes unless said
    -- param from: timestamp = 2026-01-01: x typed query parameter, its default (none: null) and what it means
    -- reads: timestamp >= $from             what the objects that it reads may be limited to
    -- answer: devices                       name of the list in the JSON answer; `object`: its one row is the answer
    -- summary: devices                      answered from the summaries of this name

Invariant: values reach DuckDB only as bound parameters; the one thing that is filled into the text is the placeholder.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from app.core.errors import Permanent, Rejected

RELATION = "telemetry"
PLACEHOLDER = re.compile(r"\bread_parquet\s*\(\s*(['\"]?)\{\{S3_PATH\}\}\1\s*\)", re.IGNORECASE)
NAME = re.compile(r"[a-z][a-z0-9_]{0,60}")
PATH = re.compile(r"[a-z0-9_-]{1,60}(/[a-z0-9_-]{1,60}){0,3}")
FIELD = re.compile(r"^-- *(title|path|param|reads|answer|summary)\b:? *(.*)$")
PARAM = re.compile(r"(?P<name>\w+): *(?P<kind>\w+)(?: *= *(?P<default>[^:]*?|'[^']*'))?(?:: *(?P<meaning>.*))?")
LIMIT = re.compile(r"(device_id *=|timestamp *>=|timestamp *<) *\$(\w+)")
LIMITS: Mapping[str, str] = {"device_id=": "text", "timestamp>=": "timestamp", "timestamp<": "timestamp"}
RESERVED = frozenset({"format", "scan"})
TAKEN = frozenset({"schema", "explore"})
MAX_TEXT = 1000


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    return instant.astimezone(UTC).replace(tzinfo=None) if instant.tzinfo else instant


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _text(text: str) -> str:
    if len(text) > MAX_TEXT or "\0" in text:
        raise ValueError
    return text


def _whole(text: str) -> int:
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError
    return value


KINDS: Mapping[str, tuple[Any, str]] = {
    "text": (_text, f"text of at most {MAX_TEXT} characters"),
    "integer": (_whole, "a whole number"),
    "number": (float, "a number"),
    "boolean": (_flag, "true or false"),
    "date": (date.fromisoformat, "a date such as 2026-02-07"),
    "timestamp": (_instant, "an instant such as 2026-02-07T12:00:00Z; UTC when it has no offset"),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter. `default` is as it would be sent; "" = null."""

    name: str
    kind: str
    default: str = ""
    meaning: str = ""

    def read(self, text: str) -> Any:
        """The value of `text`, None for "". Raises Rejected."""
        if not text:
            return None
        read, allowed = KINDS[self.kind]
        try:
            return read(text)
        except (ValueError, KeyError, OverflowError):
            raise Rejected(f"{self.name}={text[:80]!r} is not {self.kind}", f"send {allowed}") from None


@dataclass(frozen=True, slots=True)
class Reads:
    """Names of the parameters that limit which objects are read; "" = not limited by that."""

    device: str = ""
    since: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True)
class ReportDefinition:
    """One SQL file. `text` is it with its placeholder; `answer` and `summary` are as in its head."""

    name: str
    path: str
    title: str
    description: str
    text: str
    parameters: Sequence[Parameter] = ()
    reads: Reads = field(default_factory=Reads)
    answer: str = "data"
    summary: str = ""

    def sql(self, relation: str = RELATION) -> str:
        """The statement over these rows."""
        return PLACEHOLDER.sub(lambda _: relation, self.text)

    def values(self, query: Iterable[tuple[str, str]]) -> Mapping[str, Any]:
        """The value of every parameter, from the query string. Raises Rejected for unknown, repeated or wrong ones."""
        given: dict[str, str] = {}
        names = {parameter.name for parameter in self.parameters}
        for name, text in query:
            if name not in names:
                raise Rejected(
                    f"report {self.name} has no parameter {name[:80]!r}",
                    f"parameters: {', '.join(sorted(names | RESERVED))}",
                )
            if name in given:
                raise Rejected(f"{name} is there twice", "send it once")
            given[name] = text
        return {each.name: each.read(given.get(each.name, each.default)) for each in self.parameters}


def load_reports(folders: Sequence[Path]) -> Mapping[str, ReportDefinition]:
    """Path -> report, for every SQL file of the folders. Raises Permanent for one that cannot be understood, or when
    two have one path.
    """
    reports: dict[str, ReportDefinition] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.sql")):
            report = parse(file.stem, _read(file))
            if report.path in reports:
                raise _fault(report.name, f"the path {report.path} is another report's", "rename the file")
            reports[report.path] = report
    return reports


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(file.stem, f"cannot be read: {error}", "make it a readable UTF-8 file") from error


def parse(name: str, text: str) -> ReportDefinition:
    """The report in `text`. Raises Permanent when its head or its placeholder is not as it must be."""
    if not NAME.fullmatch(name):
        raise _fault(name, "its name is not usable", "use a to z, 0 to 9 and _")
    head: dict[str, list[str]] = {}
    words: list[str] = []
    for line in text.splitlines():
        if found := FIELD.match(line):
            head.setdefault(found[1], []).append(found[2].strip())
        elif line.startswith("--"):
            words.append(line.removeprefix("--").strip())
    text = text.strip().removesuffix(";")
    if "{{" in PLACEHOLDER.sub("", text):
        raise _fault(name, "holds {{...}} elsewhere", "write FROM read_parquet({{S3_PATH}}), nothing else is filled in")
    path = _last(head, "path", name.replace("_", "-"))
    if not PATH.fullmatch(path) or path in TAKEN:
        raise _fault(name, f"the path {path[:80]!r} cannot be", "use other words of a to z, 0 to 9, - and _")
    return ReportDefinition(
        name=name,
        path=path,
        title=_last(head, "title", name.replace("_", " ")),
        description=" ".join(words),
        text=text,
        parameters=(parameters := [_parameter(name, line) for line in head.get("param", ())]),
        reads=_reads(name, _last(head, "reads", ""), {each.name: each.kind for each in parameters}),
        answer=_last(head, "answer", "data"),
        summary=_last(head, "summary", ""),
    )


def _last(head: Mapping[str, Sequence[str]], name: str, default: str) -> str:
    return head[name][-1] if name in head else default


def _parameter(report: str, line: str) -> Parameter:
    found = PARAM.fullmatch(line)
    if not found or found["kind"] not in KINDS or not NAME.fullmatch(found["name"]) or found["name"] in RESERVED:
        raise _fault(report, f"cannot read `param {line[:80]}`", f"write `name: kind`; kinds: {', '.join(KINDS)}")
    default = (found["default"] or "").strip().strip("'")
    parameter = Parameter(found["name"], found["kind"], default, (found["meaning"] or "").strip())
    try:
        parameter.read(default)
    except Rejected as error:
        raise _fault(report, error.message, "correct the default") from error
    return parameter


def _reads(report: str, line: str, kinds: Mapping[str, str]) -> Reads:
    """`kinds` of the parameters: a limit must be of the column's kind, which it is compared with."""
    limits = {}
    for part in filter(None, (each.strip() for each in line.split(","))):
        found = LIMIT.fullmatch(part)
        what = found[1].replace(" ", "") if found else ""
        if not found or found[2] not in kinds:
            raise _fault(
                report,
                f"cannot read `reads: {part[:80]}`",
                "write device_id = $x, timestamp >= $x, timestamp < $x with declared parameters",
            )
        if kinds[found[2]] != LIMITS[what]:
            wanted = f"declare `param {found[2]}: {LIMITS[what]}`, or leave this out of `reads`"
            raise _fault(report, f"`reads: {part[:80]}` with {found[2]}, which is {kinds[found[2]]}", wanted)
        limits[what] = found[2]
    return Reads(limits.get("device_id=", ""), limits.get("timestamp>=", ""), limits.get("timestamp<", ""))


def _fault(report: str, message: str, hint: str) -> Permanent:
    return Permanent(f"report {report}.sql: {message}", hint)
