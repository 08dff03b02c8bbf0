"""The declared variables as a person meets them: in the reference, in a fault, in a warning; told from the models."""

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from app.config.masking import text_of
from app.config.settings import Group, Settings
from app.config.value_types import Allowed


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting. `goes_to` is `group.field`; `default` is written as a person would, "" where `unset` says it."""

    goes_to: str
    names: tuple[str, ...]
    default: str
    unset: str
    allowed: Allowed


@dataclass(frozen=True, slots=True)
class Part:
    """The variables of one part of the product, under a title."""

    title: str
    variables: tuple[Variable, ...]


def _allowed(field: FieldInfo) -> Allowed:
    """What the type says of itself, or else what its limits or its literals say."""
    said = [each for each in field.metadata if isinstance(each, Allowed)]
    if said:
        return said[-1]
    if get_origin(field.annotation) is Literal:
        return Allowed(f"one of {', '.join(get_args(field.annotation))}")
    limits = {name: getattr(each, name) for each in field.metadata for name in ("ge", "le") if hasattr(each, name)}
    number = "a number" if field.annotation is float else "a whole number"
    return Allowed(f"{number} from {limits['ge']} to {limits['le']}")


def _default(field: FieldInfo, shown: str | None) -> str:
    if shown is not None or field.default_factory is not None:
        return shown or ""
    return f"{field.default:g}" if isinstance(field.default, float) else text_of(field.default)


def _variable(group: str, name: str, field: FieldInfo) -> Variable:
    words = cast("dict[str, Any]", field.json_schema_extra)
    names = cast("Any", field.validation_alias).choices
    return Variable(f"{group}.{name}", tuple(names), _default(field, words["shown"]), words["unset"], _allowed(field))


def _part(group: str, model: type[Group]) -> Part:
    fields = model.model_fields.items()
    title = model.model_config.get("title") or group
    return Part(title, tuple(_variable(group, name, field) for name, field in fields))


GROUPS = {name: cast("type[Group]", field.annotation) for name, field in Settings.model_fields.items()}
PARTS = tuple(_part(group, model) for group, model in GROUPS.items())
