"""Order-free digests: one 128-bit hash for each row or cell, summed. All verifications use this digest.

Invariants: the order of rows and columns and the split into tables do not matter; a null is the same as no column; a
number is the same whatever numeric type holds it. It detects accidents; the bucket's access keys keep forgers out.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.core.errors import Permanent
from app.core.verify import NOTHING, WindowContent, content_from

LANES = (b"headwater-0", b"headwater-1")
TRUTH = 0x9E3779B97F4A7C15
TEXT = 0xC2B2AE3D27D4EB4F
ROWS = 1000
NANOSECONDS = pa.timestamp("ns", "UTC")
WHOLE = re.compile(r"-?(0|[1-9]\d{0,19})")
DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


# Rows of text, for pipelines whose rows are not cells identified by a key and a timestamp.


def content_of(rows: Iterable[Mapping[str, str]]) -> WindowContent:
    """The content of rows of text. An empty cell equals a missing one, so a new column changes no earlier row."""
    total, left = NOTHING, iter(rows)
    while step := list(islice(left, ROWS)):
        names = {name for row in step for name, text in row.items() if text}
        cells = {
            name: [(row.get(name) or "").encode("utf-8", "surrogatepass") or None for row in step] for name in names
        }
        # Bytes, since text from a file may not be valid Unicode.
        columns = {name: pa.array(some, pa.binary()) for name, some in cells.items()}
        total += summed(row_lanes((columns or {"": pa.nulls(len(step), pa.binary())}).items()), len(step))
    return total


# Cells: (identity of the row, field, value). Rows need not be assembled before two ends are compared.


def cell_lanes(rows: Sequence[Any], field: str, values: Any, *, as_text: bool = False) -> Sequence[Any]:
    """Two hashes per row, each combining its value of `field` with the row's hash from `row_lanes`; 0 for a null.

    An integer or boolean has the same hash in a text column. `as_text`: so does any number, as in a CSV object, where
    empty text also counts as null.
    """
    if as_text and pa.types.is_string(values.type):
        values = pc.if_else(pc.equal(values, ""), None, values)
    try:
        bits, valid = value_bits(values, hashed=_as_number if as_text else _as_whole)
    except pa.ArrowException as error:
        raise _unknown_type(field, values, error) from error
    lanes = zip(LANES, rows, strict=True)
    return [np.where(valid, mixed(row ^ mixed(bits ^ seed_of(lane, field))), np.uint64(0)) for lane, row in lanes]


def row_lanes(columns: Iterable[tuple[str, Any]], lanes: Sequence[bytes] = LANES) -> Sequence[Any]:
    """The hashes of rows that these columns identify; a uint64 array for each of `lanes`."""
    sums: list[Any] = [np.uint64(0) for _ in lanes]
    for name, column in columns:
        try:
            bits, valid = value_bits(column)
        except pa.ArrowException as error:
            raise _unknown_type(name, column, error) from error
        for at, lane in enumerate(lanes):
            sums[at] = sums[at] + np.where(valid, mixed(bits ^ seed_of(lane, name)), np.uint64(0))
    return [mixed(each ^ seed_of(lane, "")) for each, lane in zip(sums, lanes, strict=True)]


def summed(lanes: Sequence[Any], rows: int) -> WindowContent:
    """The content of these hashes, which stand for `rows` rows."""
    return content_from(rows, *(int(np.sum(each, dtype=np.uint64)) for each in lanes))


def _unknown_type(name: str, column: Any, error: Exception) -> Permanent:
    return Permanent(
        f"column {name!r} of type {column.type} was not written by this pipeline: {str(error)[:100]}",
        "run verify with --heal, or move the object away: another program wrote it",
    )


def one_array(column: Any) -> Any:
    """A column as a single array; not copied when it is one already."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def value_bits(column: Any, *, hashed: Callable[[str | bytes], int] | None = None) -> tuple[Any, Any]:
    """64 bits per value, and which values are not null; both numpy arrays. `hashed`: hash of one text, default
    `text_hash`.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    array = one_array(column)
    if pa.types.is_timestamp(array.type):
        array = array.cast(NANOSECONDS).view(pa.int64())
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(array.type):
        truth = array.fill_null(False).to_numpy(zero_copy_only=False)  # noqa: FBT003 - Arrow's own signature
        return truth.astype(np.uint64) ^ np.uint64(TRUTH), valid
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        filled = array.fill_null(pa.scalar(0).cast(array.type)) if array.null_count else array
        return _number_bits(filled.to_numpy()), valid
    # Dates, decimals and the like are compared as text.
    if not pa.types.is_binary(array.type):
        array = array.cast(pa.string())
    return text_bits(array, hashed or text_hash), valid


def text_bits(array: Any, hashed: Callable[[str | bytes], int]) -> Any:
    """64 bits per text; each distinct text is hashed once."""
    encoded = array.dictionary_encode()
    hashes = np.array([hashed(text) for text in encoded.dictionary.to_pylist() if text is not None] or [0], np.uint64)
    return hashes[encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)]


def text_hash(text: str | bytes) -> int:
    """The 64-bit hash of one text."""
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(content, digest_size=8).digest()) ^ TEXT


def _as_whole(text: str | bytes) -> int:
    """The bits of an integer or boolean that was stored as text because its column could not hold it; else the text's
    hash.
    """
    if text in ("true", "false"):
        return int(text == "true") ^ TRUTH
    if isinstance(text, str) and WHOLE.fullmatch(text) and -(1 << 63) <= (number := int(text)) < 1 << 64:
        return int(_number_bits(np.array([number], np.uint64 if number >= 0 else np.int64))[0])
    return text_hash(text)


def _as_number(text: str | bytes) -> int:
    """The same for any number: in a CSV object every value is text."""
    if isinstance(text, str) and not WHOLE.fullmatch(text) and DECIMAL.fullmatch(text):
        return int(_number_bits(np.array([float(text)]))[0])
    return _as_whole(text)


def _number_bits(values: Any) -> Any:
    """An integer that float64 holds exactly has the float's bits; so 5 equals 5.0, and -0.0 equals 0.0."""
    floats = values.astype(np.float64) + 0.0
    floats = np.where(np.isnan(floats), np.nan, floats)
    bits = floats.view(np.uint64)
    if values.dtype.kind == "f":
        return bits
    fits = np.abs(floats) < float(np.iinfo(values.dtype).max)  # beyond that the conversion back is undefined
    exact = fits & (np.where(fits, floats, 0).astype(values.dtype) == values)
    return np.where(exact, bits, values.astype(np.uint64))


@lru_cache(maxsize=1024)
def seed_of(lane: bytes, name: str) -> Any:
    """A 64-bit seed for a column's name."""
    return np.uint64(int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, key=lane).digest()))


def mixed(bits: Any) -> Any:
    """The finaliser of splitmix64: each input bit flips half of the output bits on average. Wraps at 64 bits."""
    with np.errstate(over="ignore"):
        mixed = bits + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
