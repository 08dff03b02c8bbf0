"""Documents and schemas as short text that says what is there and of which type, and nothing of values that change."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 118
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
WORDS = frozenset({"outcome", "sign", "unit"})
"""Keys whose texts are words of the interface."""
MAPS = frozenset({"fields", "partitions", "counts", "values", "types", "checks"})
"""Keys of objects whose own keys are data."""
NAMED = {"runs": "Run", "last_run": "Run", "ledger": "Ledger"}
"""Keys of what is found in many documents and told once."""
PROSE = frozenset({"title", "description", "summary", "examples", "example"})
TYPES = {"boolean": "bool", "integer": "int", "number": "num", "string": "str"}
LEAVES = {bool: "bool", int: "int", float: "num", str: "str", type(None): "null"}


@dataclass(slots=True)
class Shapes:
    """The shapes of documents that are told together."""

    named: dict[str, list[Any]] = field(default_factory=dict)

    def of(self, documents: Sequence[Any], key: str = "") -> Any:
        """What all of `documents` are: an object by its keys, `key?` where some lack it, a list by what it holds."""
        given = [each for each in documents if each is not None] or list(documents)
        kinds = {type(each) for each in given}
        if kinds == {list}:
            held = [value for each in given for value in each]
            return [self.of(held, key if key in NAMED else "")] if held else []
        if kinds != {dict}:
            return " | ".join(sorted({_leaf(each, key) for each in documents}))
        if key in NAMED:
            self.named.setdefault(NAMED[key], []).extend(given)
            return NAMED[key]
        if key in MAPS:
            held = [value for each in given for value in each.values()]
            return {"*": self.of(held)} if held else {}
        return self._keys(given)

    def _keys(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = dict.fromkeys(name for each in documents for name in each)
        found = {}
        for name in names:
            there = [each[name] for each in documents if name in each]
            nested = any(isinstance(each, dict | list) for each in there)
            optional = "?" * (len(there) < len(documents))
            found[f"{name}{optional}{'|null' * (nested and None in there)}"] = self.of(there, name)
        return found

    def told_once(self) -> Iterator[str]:
        """What the other shapes only name."""
        for name in dict.fromkeys(NAMED.values()):
            yield from lines(self._keys(self.named.get(name, [])), f"{name}: ")


def _leaf(value: Any, key: str) -> str:
    if isinstance(value, str) and key in WORDS:
        return json.dumps(value)
    found = INSTANT.fullmatch(value) if isinstance(value, str) else None
    return f"instant{(found[1] or '')[:1]}{'0' * len((found[1] or '')[1:])}" if found else LEAVES[type(value)]


def schema(given: Mapping[str, Any]) -> Any:
    """A JSON schema in the same form, with all its keywords but prose."""
    rest = {name: value for name, value in given.items() if name not in PROSE}
    kind = rest.pop("type", "")
    if "$ref" in rest:
        return rest["$ref"].rpartition("/")[2]
    if "items" in rest:
        found: Any = [schema(rest.pop("items"))]
    elif "properties" in rest or isinstance(rest.get("additionalProperties"), dict):
        needed, more = rest.pop("required", ()), rest.pop("additionalProperties", None)
        properties = rest.pop("properties", {}).items()
        found = {f"{name}{'?' * (name not in needed)}": schema(each) for name, each in properties}
        if more is not None:
            found["*"] = schema(more) if isinstance(more, dict) else json.dumps(more)
    else:
        found = " | ".join(inline(schema(each)) for each in rest.pop("anyOf", ())) or TYPES.get(kind, kind)
    keywords = " ".join(f"{name}={json.dumps(value)}" for name, value in sorted(rest.items()))
    return f"{inline(found)} {keywords}".strip() if keywords else found


def inline(found: Any) -> str:
    """A shape on one line."""
    if isinstance(found, dict):
        return f"{{{', '.join(f'{name}: {inline(each)}' for name, each in found.items())}}}"
    return f"[{', '.join(map(inline, found))}]" if isinstance(found, list) else str(found)


def lines(found: Any, head: str = "", indent: str = "") -> Iterator[str]:
    """A shape on as few lines as are readable, the first one after `head`."""
    whole = f"{indent}{head}{inline(found)}".rstrip()
    if len(whole) <= WIDTH or not isinstance(found, dict | list) or not found:
        yield whole
    elif isinstance(found, list):
        yield from lines(found[0], f"{head}each ", indent)
    else:
        if head:
            yield f"{indent}{head}".rstrip()
        for name, each in found.items():
            yield from lines(each, f"{name}: ", f"{indent}  " if head else indent)
