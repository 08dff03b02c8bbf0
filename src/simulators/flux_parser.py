"""Parses Flux source into calls: the subset of the language that pipelines use.

Invariant: a text is either parsed completely or refused with `FluxSyntax`, which gives the position
(`@line:column-line:column`); nothing is skipped. Strings use Flux's own escapes. An unescaped `${`, which a server
would evaluate, and an escape right after a `$`, which its scanner rejects, are refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
NS = 10**9
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?)?")
UNITS_NS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "ms": 10**6,
    "s": NS,
    "m": 60 * NS,
    "h": 3600 * NS,
    "d": 86_400 * NS,
    "w": 7 * 86_400 * NS,
}
DURATION = re.compile(r"(\d+)(ns|us|µs|ms|s|m(?!o)|h|d|w)")
TOKEN = re.compile(
    r"""(?P<blank>(?:\s|//[^\n]*)+)
    |(?P<time>\d{4}-\d\d-\d\d(?:T\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d))?)
    |(?P<duration>(?:\d+(?:ns|us|µs|ms|mo|s|m|h|d|w|y))+)
    |(?P<float>\d+\.\d*|\.\d+)
    |(?P<integer>\d+)
    |(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign>\|>|=>|==|!=|<=|>=|[<>()\[\]{},:.=+*/-])""",
    re.VERBOSE | re.DOTALL,
)
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "$": "$"}
ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|\$(?!\\)|[^$])|\$[{\\]", re.DOTALL)
COMPARISONS = frozenset({"==", "!=", "<", "<=", ">", ">="})
WORDS = frozenset({"import", "package", "option", "and", "or", "not", "exists", "if", "then", "else", "return"})


class FluxError(Exception):
    """A query that failed while running; `code` is the platform's error code."""

    def __init__(self, message: str, code: str = "invalid") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class FluxSyntax(Exception):
    """The text cannot be compiled; the message is the server's, position included."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the text with its offsets; `kind` is a group name of `TOKEN`, or `end`."""

    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Literal:
    """`kind`: string, time, duration, integer, float or boolean. Times and durations are nanoseconds."""

    kind: str
    value: str | int | float | bool


@dataclass(frozen=True, slots=True)
class Name:
    """A bare word, such as `count` in `fn: count`."""

    text: str


@dataclass(frozen=True, slots=True)
class Member:
    """`r.label` or `r["label"]`, on any record."""

    label: str


@dataclass(frozen=True, slots=True)
class Operation:
    """`sign` applied to its operands: a comparison, `and`, `or`, `not`, `exists`, `+`, or `if` with its three parts."""

    sign: str
    operands: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Items:
    """An array."""

    values: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Function:
    """`(parameter) => body`."""

    body: "Expression"
    parameter: str = "r"


@dataclass(frozen=True, slots=True)
class Call:
    """`name(key: value, ...)`; `where` is its position in the text, for errors."""

    name: str
    arguments: Mapping[str, "Expression"] = field(default_factory=dict)
    where: str = ""


Expression = Literal | Name | Member | Operation | Items | Function | Call
Pipeline = tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """The imports, and the pipelines in order."""

    imports: frozenset[str]
    pipelines: tuple[Pipeline, ...]


def parse_flux(text: str) -> Program:
    """The program of a query text. Raises FluxSyntax."""
    return _Parser(text).program()


def tokens(text: str) -> list[Token]:
    """The tokens of the text, the last one of kind `end`. Raises FluxSyntax for anything else."""
    found, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise FluxSyntax(_failed(text, at, at + 1, f"invalid token {text[at]!r}"))
        if match.lastgroup != "blank":
            found.append(Token(str(match.lastgroup), match.group(), at, match.end()))
        at = match.end()
    return [*found, Token("end", "", len(text), len(text))]


def _failed(text: str, start: int, end: int, reason: str) -> str:
    return f"compilation failed: error at @{_position(text, start)}-{_position(text, end)}: {reason}"


def _position(text: str, at: int) -> str:
    return f"{text.count(chr(10), 0, at) + 1}:{at - (text.rfind(chr(10), 0, at) + 1) + 1}"


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = tokens(text)
        self._at = 0

    def program(self) -> Program:
        imports = set()
        while self._take("import"):
            imports.add(self._string())
        pipelines = []
        while self._next.kind != "end":
            pipelines.append(self._pipeline())
        if not pipelines:
            self._fail("expected an expression, got the end of the text")
        return Program(frozenset(imports), tuple(pipelines))

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _take(self, text: str) -> bool:
        if self._next.text != text or self._next.kind == "string":
            return False
        self._at += 1
        return True

    def _expect(self, text: str) -> None:
        if not self._take(text):
            self._fail(f"expected {text!r}, got {self._next.text or 'end of file'!r}")

    def _fail(self, reason: str) -> None:
        raise FluxSyntax(_failed(self._text, self._next.start, self._next.end, reason))

    def _word(self) -> str:
        token = self._next
        if token.kind != "name" or token.text in WORDS:
            self._fail(f"expected an identifier, got {token.text or 'end of file'!r}")
        self._at += 1
        return token.text

    def _string(self) -> str:
        token = self._next
        if token.kind != "string":
            self._fail(f"expected a string, got {token.text or 'end of file'!r}")
        self._at += 1
        return self._unescaped(token)

    def _unescaped(self, token: Token) -> str:
        def plain(found: re.Match[str]) -> str:
            escape = found.group(1)
            at = token.start + 1 + found.start()
            if escape is None:
                reason = "string interpolation" if found[0] == "${" else "an escape right after a dollar sign"
                raise FluxSyntax(_failed(self._text, at, at + 2, f"{reason} is not possible here"))
            if escape[0] == "x":
                return chr(int(escape[1:], 16))
            if escape not in ESCAPES:
                raise FluxSyntax(_failed(self._text, at, at + 2, f"invalid escape sequence \\{escape}"))
            return ESCAPES[escape]

        return ESCAPE.sub(plain, token.text[1:-1])

    def _pipeline(self) -> Pipeline:
        calls = [self._call()]
        while self._take("|>"):
            calls.append(self._call())
        return tuple(calls)

    def _call(self) -> Call:
        start = self._next.start
        name = self._word()
        while self._take("."):
            name += "." + self._word()
        self._expect("(")
        arguments = dict(self._listed(")", self._argument))
        end = self._tokens[self._at - 1].end
        return Call(name, arguments, f"@{_position(self._text, start)}-{_position(self._text, end)}")

    def _argument(self) -> tuple[str, Expression]:
        name = self._word()
        self._expect(":")
        return name, self._expression()

    def _listed(self, end: str, one: Callable[[], T]) -> Iterator[T]:
        """What `one` parses, between commas, up to the sign `end`; a comma may stand before it."""
        while not self._take(end):
            yield one()
            if not self._take(","):
                self._expect(end)
                return

    def _expression(self) -> Expression:
        if self._take("if"):
            condition = self._expression()
            self._expect("then")
            consequence = self._expression()
            self._expect("else")
            return Operation("if", (condition, consequence, self._expression()))
        return self._joined("or", lambda: self._joined("and", self._unary))

    def _joined(self, sign: str, one: Callable[[], Expression]) -> Expression:
        left = one()
        while self._take(sign):
            left = Operation(sign, (left, one()))
        return left

    def _unary(self) -> Expression:
        for word in ("not", "exists"):
            if self._take(word):
                return Operation(word, (self._unary(),))
        left = self._joined("+", self._primary)
        if self._next.kind == "sign" and self._next.text in COMPARISONS:
            sign = self._next.text
            self._at += 1
            return Operation(sign, (left, self._joined("+", self._primary)))
        return left

    def _primary(self) -> Expression:
        token = self._next
        if token.kind == "sign":
            return self._signed()
        if token.kind == "string":
            return Literal("string", self._string())
        if token.kind == "name":
            return self._named()
        self._at += 1
        return self._literal(token)

    def _literal(self, token: Token) -> Literal:
        try:
            if token.kind == "time":
                return Literal("time", parse_rfc3339(token.text))
            if token.kind == "duration":
                return Literal("duration", duration_ns(token.text))
            if token.kind in ("integer", "float"):
                return Literal(token.kind, int(token.text) if token.kind == "integer" else float(token.text))
        except ValueError as error:
            raise FluxSyntax(_failed(self._text, token.start, token.end, str(error))) from error
        raise FluxSyntax(_failed(self._text, token.start, token.end, "unexpected end of the text"))

    def _signed(self) -> Expression:
        if self._take("-"):
            value = self._primary()
            if isinstance(value, Literal) and value.kind in ("integer", "float", "duration"):
                return Literal(value.kind, -value.value)  # type: ignore[operator]
            self._fail("a minus sign belongs before a number or a duration")
        if self._take("["):
            return Items(tuple(self._listed("]", self._expression)))
        if self._take("("):
            if self._is_function():
                return self._function()
            inner = self._expression()
            self._expect(")")
            return inner
        self._fail(f"unexpected token {self._next.text!r}")
        raise AssertionError

    def _is_function(self) -> bool:
        shape = [token.text for token in self._tokens[self._at + 1 : self._at + 3]]
        return self._next.kind == "name" and shape == [")", "=>"]

    def _function(self) -> Function:
        parameter = self._word()
        self._expect(")")
        self._expect("=>")
        return Function(self._expression(), parameter)

    def _named(self) -> Expression:
        following = self._tokens[self._at + 1].text
        if following == "(":
            return self._call()
        word = self._word()
        if word in ("true", "false"):
            return Literal("boolean", word == "true")
        if self._take("."):
            return Member(self._word())
        if self._take("["):
            label = self._string()
            self._expect("]")
            return Member(label)
        return Name(word)


def rfc3339(time_ns: int) -> str:
    """`2026-02-07T12:00:00.5Z`: UTC, without trailing zeros. Exact, as is the parser: no float is involved."""
    second, fraction = divmod(time_ns, NS)
    if not fraction:
        return _second(second) + "Z"
    return f"{_second(second)}.{fraction:09d}".rstrip("0") + "Z"


@lru_cache(maxsize=8192)
def _second(second: int) -> str:
    return (EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S")


def parse_rfc3339(text: str) -> int:
    """Nanoseconds of an RFC 3339 text; a date alone means midnight, no zone means UTC. Raises ValueError."""
    found = RFC3339.fullmatch(text)
    if found is None:
        raise ValueError(f"not a time: {text!r}")
    day, clock, fraction, zone = found.groups()
    elapsed = datetime.fromisoformat(f"{day}T{clock or '00:00:00'}{zone or 'Z'}") - EPOCH
    return (elapsed.days * 86_400 + elapsed.seconds) * NS + int((fraction or "0").ljust(9, "0"))


def duration_ns(text: str) -> int:
    """Nanoseconds of `1h30m`. Raises ValueError for anything else, months and years included."""
    parts = DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"not a duration: {text!r}")
    return sum(int(number) * UNITS_NS[unit] for number, unit in parts)
