"""InfluxQL text to statements: SELECT over one measurement, and the SHOW statements that an exporter asks.

Invariant: a text is understood whole or refused with `QlSyntax`, worded as a server does (`found X, expected Y at line
L, char C`). Identifiers stand in double quotes or bare, strings in single quotes.
"""

import re
from dataclasses import dataclass

from simulators.flux_parser import duration_ns

TOKEN = re.compile(
    r"""(?P<blank>\s+)
    |(?P<string>'(?:[^'\\\n]|\\.)*')
    |(?P<quoted>"(?:[^"\\\n]|\\.)*")
    |(?P<duration>\d+(?:ns|us|µ|u|ms|s|m|h|d|w)(?:\d+(?:ns|us|u|ms|s|m|h|d|w))*)
    |(?P<number>\d+\.\d+|\d+)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign>::|<>|!=|<=|>=|[=<>(),;*.+-])""",
    re.VERBOSE,
)
ESCAPES = {"\\\\": "\\", "\\'": "'", '\\"': '"', "\\n": "\n"}
EVERY = ""  # what a bare `*` names; a quoted one is a name like any other
COMPARISONS = frozenset({"=", "!=", "<>", "<", "<=", ">", ">="})


class QlSyntax(Exception):
    """The text cannot be parsed; the message is the server's without its `error parsing query: `."""


@dataclass(frozen=True, slots=True)
class Token:
    """A word with its offset; `text` of a string or a quoted name is what it means."""

    kind: str
    text: str
    at: int


@dataclass(frozen=True, slots=True)
class Selected:
    """One entry of a SELECT: a column with its cast, or a function of a column; EVERY stands for all fields."""

    name: str
    cast: str = ""
    function: str = ""
    alias: str = ""


@dataclass(frozen=True, slots=True)
class Condition:
    """`left sign right` with a name on the left, `cast` behind it, or `and`/`or` over other conditions."""

    sign: str
    name: str = ""
    cast: str = ""
    value: str | int | float = ""
    parts: tuple["Condition", ...] = ()


@dataclass(frozen=True, slots=True)
class Select:
    """One SELECT statement. `every_ns` 0 = no time buckets; `tags` is GROUP BY, (EVERY,) = every tag."""

    selected: tuple[Selected, ...]
    source: tuple[str, ...]
    where: Condition | None = None
    tags: tuple[str, ...] = ()
    every_ns: int = 0
    fill: str = "null"
    descending: bool = False
    limit: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Show:
    """One SHOW statement; `what` in capitals, `keys` of WITH KEY."""

    what: str
    source: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    where: Condition | None = None
    limit: int = 0


Statement = Select | Show


def parse_influxql(text: str) -> list[Statement]:
    """The statements of a query, in order. Raises QlSyntax."""
    return _Parser(text).statements()


def tokens(text: str) -> list[Token]:
    """The words of the text, the last one `EOF`. Raises QlSyntax."""
    found, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise QlSyntax(f"found {text[at]}, expected a word at {_position(text, at)}")
        kind = str(match.lastgroup)
        if kind in ("string", "quoted"):
            plain = re.sub(r"\\[\\'\"n]", lambda escape: ESCAPES[escape.group()], match.group()[1:-1])
            found.append(Token(kind, plain, at))
        elif kind != "blank":
            found.append(Token(kind, match.group(), at))
        at = match.end()
    return [*found, Token("end", "EOF", len(text))]


def _position(text: str, at: int) -> str:
    line_start = text.rfind("\n", 0, at) + 1
    return f"line {text.count(chr(10), 0, at) + 1}, char {at - line_start + 1}"


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = tokens(text)
        self._at = 0

    def statements(self) -> list[Statement]:
        found: list[Statement] = []
        while self._next.kind != "end":
            found.append(self._statement())
            if not self._take(";") and self._next.kind != "end":
                self._fail(";, EOF")
        return found

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _take(self, *words: str) -> bool:
        ahead = self._tokens[self._at : self._at + len(words)]
        if [token.text.upper() for token in ahead] != list(words) or any(
            token.kind in ("string", "quoted") for token in ahead
        ):
            return False
        self._at += len(words)
        return True

    def _expect(self, word: str) -> None:
        if not self._take(word):
            self._fail(word)

    def _fail(self, expected: str) -> None:
        token = self._next
        at = _position(self._text, token.at)
        raise QlSyntax(f"found {token.text}, expected {expected} at {at}")

    def _statement(self) -> Statement:
        if self._take("SELECT"):
            return self._select()
        if self._take("SHOW"):
            return self._show()
        self._fail("SELECT, DELETE, SHOW, CREATE, DROP, EXPLAIN, GRANT, REVOKE, ALTER, SET, KILL")
        raise AssertionError

    def _name(self, *, quoted_only: bool = False) -> str:
        token = self._next
        if token.kind != "quoted" and (quoted_only or token.kind != "name"):
            self._fail("identifier")
        self._at += 1
        return token.text

    def _integer(self) -> int:
        token = self._next
        if token.kind != "number" or not token.text.isdigit():
            self._fail("integer")
        self._at += 1
        return int(token.text)

    def _source(self) -> tuple[str, ...]:
        parts = [self._name()]
        while self._take("."):
            parts.append(self._name())
        return tuple(parts)

    def _show(self) -> Show:
        for what in ("DATABASES", "MEASUREMENTS"):
            if self._take(what):
                return Show(what, where=self._where(), limit=self._limit())
        if self._take("RETENTION", "POLICIES"):
            return Show("RETENTION POLICIES", self._source() if self._take("ON") else ())
        for what in ("FIELD KEYS", "TAG KEYS", "TAG VALUES"):
            if self._take(*what.split()):
                source = self._source() if self._take("FROM") else ()
                keys = self._keys() if what == "TAG VALUES" else ()
                return Show(what, source, keys, self._where(), self._limit())
        self._fail("DATABASES, FIELD, MEASUREMENTS, RETENTION, TAG")
        raise AssertionError

    def _limit(self) -> int:
        return self._integer() if self._take("LIMIT") else 0

    def _keys(self) -> tuple[str, ...]:
        self._expect("WITH")
        self._expect("KEY")
        if self._take("IN"):
            self._expect("(")
            names = [self._name()]
            while self._take(","):
                names.append(self._name())
            self._expect(")")
            return tuple(names)
        self._expect("=")
        return (self._name(),)

    def _select(self) -> Select:
        selected = [self._selected()]
        while self._take(","):
            selected.append(self._selected())
        self._expect("FROM")
        source = self._source()
        where = self._where()
        tags, every_ns = self._group_by()
        fill = self._fill()
        descending = self._order()
        limit = self._limit()
        offset = self._integer() if self._take("OFFSET") else 0
        return Select(
            tuple(selected), source, where, tags, every_ns, fill, descending=descending, limit=limit, offset=offset
        )

    def _selected(self) -> Selected:
        if self._take("*"):
            return Selected(EVERY)
        is_function = self._tokens[self._at + 1].text == "(" and self._next.kind == "name"
        name = self._name()
        if is_function:
            self._expect("(")
            column = EVERY if self._take("*") else self._name()
            cast = self._cast()
            self._expect(")")
            return Selected(column, cast, function=name.lower(), alias=self._alias())
        return Selected(name, self._cast(), alias=self._alias())

    def _cast(self) -> str:
        return self._name().lower() if self._take("::") else ""

    def _alias(self) -> str:
        return self._name() if self._take("AS") else ""

    def _where(self) -> Condition | None:
        return self._or() if self._take("WHERE") else None

    def _or(self) -> Condition:
        parts = [self._and()]
        while self._take("OR"):
            parts.append(self._and())
        return parts[0] if len(parts) == 1 else Condition("or", parts=tuple(parts))

    def _and(self) -> Condition:
        parts = [self._comparison()]
        while self._take("AND"):
            parts.append(self._comparison())
        return parts[0] if len(parts) == 1 else Condition("and", parts=tuple(parts))

    def _comparison(self) -> Condition:
        if self._take("("):
            inner = self._or()
            self._expect(")")
            return inner
        name, cast = self._name(), self._cast()
        sign = self._next.text
        if self._next.kind != "sign" or sign not in COMPARISONS:
            self._fail("a comparison")
        self._at += 1
        return Condition("!=" if sign == "<>" else sign, name, cast, self._value())

    def _value(self) -> str | int | float:
        negative = self._take("-")
        token = self._next
        if token.kind == "string":
            self._at += 1
            return token.text
        if token.kind not in ("number", "duration"):
            self._fail("identifier, string, number, bool")
        self._at += 1
        if token.kind == "duration":
            return duration_ns(token.text)
        value = float(token.text) if "." in token.text else int(token.text)
        return -value if negative else value

    def _group_by(self) -> tuple[tuple[str, ...], int]:
        tags: list[str] = []
        every_ns = 0
        if self._take("GROUP", "BY"):
            while True:
                if self._take("*"):
                    tags.append(EVERY)
                elif self._take("TIME", "("):
                    every_ns = self._duration()
                    self._expect(")")
                else:
                    tags.append(self._name())
                    self._cast()
                if not self._take(","):
                    break
        return tuple(tags), every_ns

    def _duration(self) -> int:
        token = self._next
        if token.kind != "duration":
            self._fail("duration")
        self._at += 1
        return duration_ns(token.text)

    def _fill(self) -> str:
        if not self._take("FILL", "("):
            return "null"
        token = self._next
        if token.text not in ("none", "null", "0"):
            self._fail("none, null, 0")
        self._at += 1
        self._expect(")")
        return token.text

    def _order(self) -> bool:
        if not self._take("ORDER", "BY"):
            return False
        self._expect("TIME")
        if self._take("DESC"):
            return True
        self._take("ASC")
        return False
