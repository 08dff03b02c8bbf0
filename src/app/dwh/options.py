"""How a POST wants its body to be read and stored: query string and headers, checked.

Invariant: what is unknown is refused, since a misspelt `dry_run` would otherwise store.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from app.dwh.bodies import Body, Gzip, JsonBody, NdjsonBody
from app.dwh.faults import BadRequest
from app.dwh.tables import Table

Form = Literal["json", "ndjson", "csv"]
FORMS: Mapping[str, Form] = {
    "": "json",
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
}
KEY = re.compile(r"[!-~]{1,255}")
YES_NO = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Options:
    """`key` is the Idempotency-Key, "" for none."""

    form: Form = "json"
    gzip: bool = False
    skip: bool = False
    dry_run: bool = False
    key: str = ""

    def body(self, table: Table, body_bytes: int, stream_bytes: int) -> tuple[Body, Gzip | None]:
        """The parser, and what unpacks before it. No row may be larger than a JSON body."""
        gzip = Gzip(body_bytes if self.form == "json" else stream_bytes) if self.gzip else None
        if self.form == "csv":
            from app.dwh.csv_body import CsvBody

            return CsvBody(table, body_bytes), gzip
        return (NdjsonBody if self.form == "ndjson" else JsonBody)(body_bytes), gzip


def options(given: Sequence[tuple[str, str]], headers: Mapping[str, str]) -> Options:
    """Raises BadRequest."""
    chosen = dict(given)
    for name in chosen.keys() - {"on_error", "dry_run"}:
        raise BadRequest(400, f"{name[:80]} is no parameter of this route", "use on_error and dry_run", name[:80])
    on_error = chosen.get("on_error", "stop")
    if len(chosen) < len(given) or on_error not in ("stop", "skip"):
        raise BadRequest(422, "on_error is not stop or skip, or given twice", "correct it", "on_error")
    dry_run = YES_NO.get(chosen.get("dry_run", "false").lower())
    if dry_run is None:
        raise BadRequest(422, "dry_run is not true or false", "correct it", "dry_run")
    key = headers.get("idempotency-key")
    if key is not None and not KEY.fullmatch(key):
        raise BadRequest(
            422, "Idempotency-Key is not 1 to 255 characters of ASCII without blanks", "use a UUID", "Idempotency-Key"
        )
    return Options(_form(headers), _packed(headers), on_error == "skip", dry_run, key or "")


def _form(headers: Mapping[str, str]) -> Form:
    media, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower()
    form = FORMS.get(media.strip().lower())
    if form is None or ("charset=" in charset and charset.split("charset=")[1].strip('" ') not in ("utf-8", "utf8")):
        raise BadRequest(
            415, "this media type is not read", "send application/json, application/x-ndjson or text/csv in UTF-8"
        )
    return form


def _packed(headers: Mapping[str, str]) -> bool:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise BadRequest(415, "this content encoding is not read", "send gzip, or nothing")
    return "gzip" in encoding
