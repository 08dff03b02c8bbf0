"""Spans of time that can be asked in one question: inside one shard group, and small enough for the server's limits.

A field has one type per shard. A question over two shards in which it has two types loses one of them: InfluxQL's
`COUNT(*)` counts one type, Flux gives the first shard's part. So nothing is asked across the bound of a shard group,
nor across midnight UTC, which is such a bound wherever the shard group's duration is whole days.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from app.core.window import DAY_SECONDS, EPOCH, Window, floor_to
from app.influx_to_s3.reader import QueryTooLarge

T = TypeVar("T")

DAY = timedelta(seconds=DAY_SECONDS)
SHARDS_FROM = datetime(1, 1, 1, tzinfo=UTC)  # Go cuts a time to a multiple of a duration since then: weeks from Mondays


def one_type_spans(span: Window, shard: timedelta) -> Iterator[Window]:
    """The parts of `span` that cross neither midnight UTC nor the bound of a shard group of that duration."""
    start = span.start
    while start < span.end:
        midnight = EPOCH + ((start - EPOCH) // DAY + 1) * DAY
        shard_end = SHARDS_FROM + ((start - SHARDS_FROM) // shard + 1) * shard
        end = min(span.end, midnight, shard_end)
        yield Window(start, end)
        start = end


def counted_in_parts(
    spans: Iterable[Window],
    every_seconds: int,
    ask: Callable[[Sequence[Window]], Iterator[T | None]],
    spans_per_question: int = 1,
) -> Iterator[T]:
    """What `ask` counts over the spans; they are cut, down to one bucket, while the server finds them too long.

    `ask` gives the counts of its spans in their order, and None at the end of each. Raises QueryTooLarge when one
    bucket is still too much, or the server gave up on a span of which counts had already come.
    """
    waiting = deque(spans)
    while waiting:
        asked = [waiting.popleft() for _ in range(min(spans_per_question, len(waiting)))]
        ended, is_inside = 0, False
        try:
            for counted in ask(asked):
                is_inside = counted is not None
                if counted is None:
                    ended += 1
                else:
                    yield counted
        except QueryTooLarge:
            buckets = len(list(_pieces(asked[ended], every_seconds))) // 2 if ended < len(asked) else 0
            if is_inside or not buckets:
                raise
            waiting = deque(
                piece for span in (*asked[ended:], *waiting) for piece in _pieces(span, every_seconds * buckets)
            )


def _pieces(span: Window, seconds: int) -> Iterator[Window]:
    """The span cut at every multiple of `seconds` since the epoch."""
    start = span.start
    while start < span.end:
        end = min(span.end, floor_to(start, seconds) + timedelta(seconds=seconds))
        yield Window(start, end)
        start = end
