"""What the calls of a Flux pipeline were given: typed arguments, and predicates over a row.

Invariant: an argument that is missing or of another type is refused with its place in the text; null follows Flux's
three-valued logic.
"""

from collections.abc import Callable, Mapping, Sequence

from simulators.flux_parser import Call, Expression, FluxError, Function, Items, Literal, Member, Name, Operation

COMPARE: Mapping[str, Callable[[object, object], bool]] = {
    "==": lambda left, right: left == right,
    "!=": lambda left, right: left != right,
    "<": lambda left, right: left < right,  # type: ignore[operator]
    "<=": lambda left, right: left <= right,  # type: ignore[operator]
    ">": lambda left, right: left > right,  # type: ignore[operator]
    ">=": lambda left, right: left >= right,  # type: ignore[operator]
}

LOGIC: Mapping[str, Callable[[list[object]], object]] = {
    "exists": lambda values: values[0] is not None,
    "not": lambda values: None if values[0] is None else not values[0],
    "and": lambda values: False if False in values else None if None in values else True,
    "or": lambda values: True if True in values else None if None in values else False,
    "if": lambda values: values[1] if values[0] is True else values[2],
}


def undefined(call: Call) -> FluxError:
    """What the compiler says of a function that it does not know."""
    return FluxError(f"compilation failed: error at {call.where}: undefined identifier {call.name}")


def text_argument(call: Call, name: str, default: str | None = None) -> str:
    """A string argument. Raises FluxError when it is missing or something else."""
    value = call.arguments.get(name)
    if isinstance(value, Literal) and isinstance(value.value, str):
        return value.value
    if value is None and default is not None:
        return default
    raise missing(call, name)


def literal_argument(call: Call, name: str, kind: str, default: int | None = None) -> int:
    """An argument that is an integer, a boolean or a duration in nanoseconds."""
    value = call.arguments.get(name)
    if isinstance(value, Literal) and value.kind == kind and isinstance(value.value, int):
        return value.value
    if value is None and default is not None:
        return default
    raise missing(call, name)


def texts_argument(call: Call, name: str, default: Sequence[str] | None = None) -> tuple[str, ...]:
    """An argument that is an array of strings."""
    value = call.arguments.get(name)
    if value is None and default is not None:
        return tuple(default)
    if not isinstance(value, Items):
        raise missing(call, name)
    texts = tuple(one.value for one in value.values if isinstance(one, Literal) and isinstance(one.value, str))
    if len(texts) != len(value.values):
        raise missing(call, name)
    return texts


def predicate_argument(call: Call, name: str) -> Expression:
    """The body of an argument that is a function of `r`."""
    value = call.arguments.get(name)
    if not isinstance(value, Function):
        raise missing(call, name)
    return value.body


def function_argument(call: Call, name: str) -> Function:
    """An argument that is a function of one parameter."""
    value = call.arguments.get(name)
    if not isinstance(value, Function):
        raise missing(call, name)
    return value


def applied(function: Function, value: str) -> object:
    """What a function of a string gives for it, such as the name that `rename` asks for."""

    def bound(expression: Expression) -> Expression:
        if expression == Name(function.parameter):
            return Literal("string", value)
        if isinstance(expression, Operation):
            return Operation(expression.sign, tuple(map(bound, expression.operands)))
        return expression

    return evaluate(bound(function.body), {})


def missing(call: Call, name: str) -> FluxError:
    """What the compiler says of an argument that it cannot use."""
    return FluxError(f"compilation failed: error at {call.where}: missing or wrong argument {name} of {call.name}")


def labels_of(expression: Expression) -> frozenset[str]:
    """The columns that a predicate reads."""
    if isinstance(expression, Member):
        return frozenset({expression.label})
    if isinstance(expression, Operation):
        return frozenset().union(*map(labels_of, expression.operands))
    return frozenset()


def evaluate(expression: Expression, row: Mapping[str, object]) -> object:
    """The value of a predicate for a row; None is null, and a column that is missing is null."""
    if isinstance(expression, Literal):
        return expression.value
    if isinstance(expression, Member):
        return row.get(expression.label)
    if isinstance(expression, Operation):
        return _operate(expression, [evaluate(one, row) for one in expression.operands])
    raise FluxError("compilation failed: a function may hold its parameter, literals and operators only")


def _operate(operation: Operation, values: list[object]) -> object:
    if operation.sign in LOGIC:
        return LOGIC[operation.sign](values)
    left, right = values
    if left is None or right is None:
        return None
    if operation.sign == "+":
        return _joined(left, right)
    if isinstance(left, str) != isinstance(right, str):
        raise FluxError("type conflict: string and a number cannot be compared")
    return COMPARE[operation.sign](left, right)


def _joined(left: object, right: object) -> str:
    if not isinstance(left, str) or not isinstance(right, str):
        raise FluxError("compilation failed: this simulator adds strings only")
    return left + right
