"""An order-free digest of Arrow rows: one 128-bit hash per row, added up.

Invariants: the order of rows and columns and the cutting into tables do not matter; a null is the same as no column; a
number is the same whatever numeric type holds it. It tells of accidents; forgers are kept out by the bucket's own keys.
"""

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from app.core.errors import Permanent
from app.core.verify import NOTHING, Content

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow as pa

LANES = (b"headwater-0", b"headwater-1")
TRUTH = 0x9E3779B97F4A7C15
TEXT = 0xC2B2AE3D27D4EB4F


def content_of_tables(tables: "Iterable[pa.Table]", *, as_text: bool = False) -> Content:
    """The content of all tables, in bounded memory. `as_text`: every value but an instant counts as its text, and an
    empty text as null, as in a CSV object, which tells them apart no more.
    """
    total = NOTHING
    for table in tables:
        total += _content(table, as_text=as_text)
    return total


def _content(table: "pa.Table", *, as_text: bool) -> Content:
    import numpy as np
    import pyarrow as pa

    sums = [np.zeros(table.num_rows, np.uint64) for _ in LANES]
    for column in table.schema:
        try:
            bits, valid = _bits(table.column(column.name), as_text=as_text)
        except pa.ArrowException as error:
            raise Permanent(
                f"column {column.name!r} of type {column.type} is none of this pipeline: {str(error)[:100]}",
                "another program wrote this object: heal the window, or move the object away",
            ) from error
        for lane, name in enumerate(LANES):
            cells = mixed(bits ^ seed_of(name, column.name))
            sums[lane] += np.where(valid, cells, np.uint64(0))
    lanes = [
        int(np.sum(mixed(each ^ seed_of(name, "")), dtype=np.uint64)) for each, name in zip(sums, LANES, strict=True)
    ]
    return Content(table.num_rows, f"{lanes[0]:016x}{lanes[1]:016x}")


def _bits(column: Any, *, as_text: bool) -> tuple[Any, Any]:
    """64 bits per value, and which values there are; both numpy arrays."""
    import numpy as np
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ns", "UTC")).cast(pa.int64())
    elif as_text or not _is_plain(column.type):
        column = column.cast(pa.string())
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_string(array.type):
        bits, filled = text_bits(array)
        return bits, valid & filled if as_text else valid
    if pa.types.is_boolean(array.type):
        truth = array.fill_null(False).to_numpy(zero_copy_only=False)  # noqa: FBT003 - Arrow's own signature
        return truth.astype(np.uint64) ^ np.uint64(TRUTH), valid
    return _number_bits(array.fill_null(pa.scalar(0).cast(array.type)).to_numpy()), valid


def _is_plain(kind: Any) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def _number_bits(values: Any) -> Any:
    """Of a whole number that float64 holds exactly, the bits of that; so 5 and 5.0 are one, and -0.0 is 0.0."""
    import numpy as np

    floats = values.astype(np.float64) + 0.0
    floats = np.where(np.isnan(floats), np.nan, floats)
    bits = floats.view(np.uint64)
    if values.dtype.kind == "f":
        return bits
    exact = np.abs(floats) <= 2.0**53
    return np.where(exact, bits, values.astype(np.uint64))


def text_bits(array: Any) -> tuple[Any, Any]:
    """64 bits per text by way of the distinct ones, and which are not empty."""
    import numpy as np

    encoded = array.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    hashes = np.array([_of_text(text or "") for text in texts] or [0], np.uint64) ^ np.uint64(TEXT)
    filled = np.array([bool(text) for text in texts] or [False])
    places = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    return hashes[places], filled[places]


def _of_text(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def seed_of(lane: bytes, name: str) -> Any:
    """64 bits for a column's name."""
    import numpy as np

    return np.uint64(int.from_bytes(blake2b(name.encode(), digest_size=8, key=lane).digest()))


def mixed(bits: Any) -> Any:
    """The finaliser of splitmix64: each bit of the input moves half of the output's. Wraps at 64 bits."""
    import numpy as np

    mixed = bits + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
