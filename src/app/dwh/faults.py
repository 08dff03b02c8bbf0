"""What is wrong with a body or with one of its rows, as the caller is told.

Invariant: a message never repeats a value of the body, which may be personal; it says where and what is wanted.
"""

from dataclasses import dataclass

from app.core.errors import Rejected

SHAPE_HINT = "see /docs for the columns of this table"
ROW_HINT = "correct that row, or send ?on_error=skip to store the others"


class BadRequest(Rejected):
    """A request that cannot be served: `status` is the HTTP status, `fault` the field or parameter, "" for none."""

    def __init__(self, status: int, message: str, hint: str, fault: str = "") -> None:
        super().__init__(message, hint)
        self.status = status
        self.fault = fault


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be stored. `index` counts from 0; `field` is "" when it is the row as such."""

    index: int
    field: str
    message: str

    def refusal(self) -> BadRequest:
        """The answer when one bad row refuses the whole request."""
        where = f"row {self.index}, field {self.field}" if self.field else f"row {self.index}"
        fault = f"data.{self.index}.{self.field}" if self.field else f"data.{self.index}"
        return BadRequest(422, f"{where}: {self.message}", ROW_HINT, fault)
