"""The part of DynamoDB's condition language that is spoken here: comparisons, BETWEEN, begins_with, AND, OR.

Invariant: an expression that is not understood is refused with a ValidationException, never taken as true.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

TOKEN = re.compile(r"\s*(#\w+|:\w+|begins_with|attribute_exists|BETWEEN|AND|OR|<=|>=|=|<|>|\(|\)|,)")
Item = Mapping[str, Mapping[str, Any]]
Holds = Callable[[Item], bool]


class NotUnderstood(Exception):
    """The expression is none of those that are spoken here."""


@dataclass(slots=True)
class Expression:
    """A parser over the tokens of one expression. `names` and `values` are the request's placeholders."""

    tokens: list[str]
    names: Mapping[str, str]
    values: Mapping[str, Mapping[str, Any]]
    at: int = 0

    def parsed(self) -> Holds:
        """The whole expression."""
        test = self._either()
        if self.at != len(self.tokens):
            raise NotUnderstood(self._rest())
        return test

    def _either(self) -> Holds:
        tests = [self._both()]
        while self._takes("OR"):
            tests.append(self._both())
        return lambda item: any(test(item) for test in tests)

    def _both(self) -> Holds:
        tests = [self._term()]
        while self._takes("AND"):
            tests.append(self._term())
        return lambda item: all(test(item) for test in tests)

    def _term(self) -> Holds:
        if self._takes("("):
            test = self._either()
            self._must(")")
            return test
        if self._takes("attribute_exists"):
            self._must("(")
            name = self._name()
            self._must(")")
            return lambda item: name in item
        if self._takes("begins_with"):
            return self._begins()
        return self._compared()

    def _begins(self) -> Holds:
        self._must("(")
        name = self._name()
        self._must(",")
        prefix = self._value()
        self._must(")")
        return lambda item: name in item and str(item[name].get("S", "\0")).startswith(prefix["S"])

    def _compared(self) -> Holds:
        name, operator = self._name(), self._next()
        if operator == "BETWEEN":
            low = self._value()
            self._must("AND")
            high = self._value()
            return lambda item: _compare(">=", item.get(name), low) and _compare("<=", item.get(name), high)
        if operator not in COMPARED:
            raise NotUnderstood(operator)
        value = self._value()
        return lambda item: _compare(operator, item.get(name), value)

    def _name(self) -> str:
        token = self._next()
        if token not in self.names:
            raise NotUnderstood(token)
        return self.names[token]

    def _value(self) -> Mapping[str, Any]:
        token = self._next()
        if token not in self.values:
            raise NotUnderstood(token)
        return self.values[token]

    def _takes(self, token: str) -> bool:
        found = self.at < len(self.tokens) and self.tokens[self.at] == token
        self.at += found
        return found

    def _must(self, token: str) -> None:
        if not self._takes(token):
            raise NotUnderstood(self._rest())

    def _next(self) -> str:
        self.at += 1
        if self.at > len(self.tokens):
            raise NotUnderstood("it ends early")
        return self.tokens[self.at - 1]

    def _rest(self) -> str:
        return " ".join(self.tokens[self.at :]) or "it ends early"


def condition(text: str, request: Mapping[str, Any]) -> Holds:
    """What an expression asks of an item. Raises NotUnderstood."""
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        found = TOKEN.match(text, position)
        if found is None:
            raise NotUnderstood(text[position:])
        tokens.append(found[1])
        position = found.end()
    names = request.get("ExpressionAttributeNames", {})
    return Expression(tokens, names, request.get("ExpressionAttributeValues", {})).parsed()


COMPARED: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": lambda one, other: bool(one == other),
    "<": lambda one, other: bool(one < other),
    "<=": lambda one, other: bool(one <= other),
    ">": lambda one, other: bool(one > other),
    ">=": lambda one, other: bool(one >= other),
}


def sortable(value: Mapping[str, Any]) -> Any:
    """A key's value as it is ordered: numbers by size, text by its bytes."""
    if "N" in value:
        return Decimal(value["N"])
    return str(value.get("S", value.get("B", ""))).encode()


def _compare(operator: str, value: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Values of two types are never equal, and neither is before the other."""
    if value is None or value.keys() != other.keys():
        return False
    return COMPARED[operator](sortable(value), sortable(other))
