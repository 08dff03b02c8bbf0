"""The monthly cost of requests to S3 and DynamoDB: counted requests times a price table.

Invariant: an estimate states its basis: the counted time span, and the region and date of the prices.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.resources import files
from math import inf
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from app.config.settings import Settings
from app.core.errors import AppError, Permanent
from app.db.state import RequestCounts, SqlRequestCounts
from app.object_store.request_counts import PUT, RequestCounter

MONTH_SECONDS = 365.25 * 86_400 / 12
LEAST_SECONDS = 60.0
SETTLED_SECONDS = 3600.0  # startup lists and catches up: at that rate a month would look many times as expensive
KINDS: Mapping[str, str] = {
    "put": "PUT",
    "list": "LIST",
    "get": "GET",
    "delete": "DELETE",
    "read_unit": "DynamoDB read units",
}
FORM_HINT = (
    "give an object with date, currency, default_region and regions, each with a price for every kind of request"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestPrices:
    """Prices per request by kind in one region, in `currency`."""

    by_kind: Mapping[str, float]
    region: str
    date: str
    currency: str

    def of(self, by_kind: Mapping[str, float]) -> float:
        """The cost of these requests."""
        return sum(number * self.by_kind[kind] for kind, number in by_kind.items())


@dataclass(frozen=True, slots=True)
class MonthlyEstimate:
    """Requests per month at the counted rate. `cost` is None where prices are unknown."""

    by_kind: Mapping[str, float]
    span_seconds: float
    cost: float | None
    prices: RequestPrices | None

    def text(self) -> str:
        """One line for a person."""
        if not self.by_kind:
            return "no requests counted yet"
        if self.span_seconds < SETTLED_SECONDS:
            return "not yet known: requests have been counted for less than an hour"
        counts = ", ".join(f"{round(number):,} {KINDS[kind]}" for kind, number in self.by_kind.items() if number)
        since = f"counted over {timedelta(seconds=round(self.span_seconds))}"
        if self.cost is None or self.prices is None:
            return f"a month at this rate: {counts} ({since}); set REQUEST_PRICES_FILE to price them"
        source = f"prices of {self.prices.region}, {self.prices.date}"
        return f"{self.cost:,.2f} {self.prices.currency} a month at this rate: {counts} ({since}; {source})"


def load_prices(path: str, region: str) -> RequestPrices:
    """The prices of a region, or else those of the file's default region. `path` "": the built-in table.

    Raises Permanent for a file that cannot be read or has the wrong format.
    """
    source = Path(path) if path else files("app.ops") / "request_prices.json"
    try:
        table: Any = json.loads(source.read_text(encoding="utf-8"))
        name = region if region in table["regions"] else table["default_region"]
        prices = {kind: float(table["regions"][name][kind]) for kind in KINDS}
        found = RequestPrices(prices, name, str(table["date"]), str(table["currency"]))
    except OSError as error:
        raise Permanent(f"REQUEST_PRICES_FILE: cannot read {path}: {error}", "correct the path") from error
    except (ValueError, TypeError) as error:
        raise Permanent(f"REQUEST_PRICES_FILE: {path} is not a price table: {error}", FORM_HINT) from error
    except KeyError as error:
        raise Permanent(f"REQUEST_PRICES_FILE: {path} has no {error}", FORM_HINT) from error
    if not all(0 <= price < inf for price in prices.values()):  # json.loads takes NaN and Infinity
        raise Permanent(f"REQUEST_PRICES_FILE: {path} has a price below 0 or without end", "correct the price")
    return found


def prices_for(settings: Settings) -> RequestPrices | None:
    """Prices for the bucket's region; None for stores other than AWS, unless a file has prices."""
    s3, path = settings.s3, settings.request_costs.prices_file
    host = urlsplit(s3.endpoint_url).hostname or ""
    if s3.bucket and host and not host.endswith((".amazonaws.com", ".amazonaws.com.cn")) and not path:
        return None
    return load_prices(path, s3.region)


def estimate(counted: RequestCounts, prices: RequestPrices | None) -> MonthlyEstimate:
    """The monthly cost if requests go on as in the counted time span."""
    if not counted.by_kind:
        return MonthlyEstimate({}, counted.span_seconds, None, prices)
    share = MONTH_SECONDS / max(counted.span_seconds, LEAST_SECONDS)
    month = {kind: counted.by_kind[kind] * share for kind in KINDS if kind in counted.by_kind}
    return MonthlyEstimate(month, counted.span_seconds, prices.of(month) if prices else None, prices)


def rewrite_seconds(partitions: int, window_seconds: float, *, put_price: float, monthly: float) -> float:
    """The interval between writes of each open window at which `partitions`, including closing writes, cost at most
    `monthly`; never longer than the window, whatever that costs.
    """
    a_month = partitions * MONTH_SECONDS * put_price
    left = monthly - a_month / window_seconds
    return window_seconds if left * window_seconds <= a_month else a_month / left


class RequestCosts:
    """Saves the request counts of this process to the state, and estimates the cost from the stored counts.

    `max_monthly`: cost limit for all requests per month; None for no limit.
    """

    def __init__(
        self,
        counter: RequestCounter,
        stored: SqlRequestCounts,
        prices: RequestPrices | None,
        clock: Callable[[], datetime],
        max_monthly: float | None = None,
    ) -> None:
        if max_monthly is not None and prices is None:
            raise Permanent(
                "MAX_MONTHLY_REQUEST_COST is set, and no prices of this store are known", "set REQUEST_PRICES_FILE"
            )
        self._max_monthly = max_monthly
        self._counter = counter
        self._stored = stored
        self._prices = prices
        self._clock = clock
        self._saved_at = clock()
        self._lock = Lock()

    def save(self) -> None:
        """Add the counts to the state. While the state is unavailable they stay in memory."""
        with self._lock:
            now, taken = self._clock(), self._counter.take()
            if not taken:
                return
            try:
                self._stored.add(taken, min(self._saved_at, now), now)
                self._saved_at = now
            except AppError as error:
                log.warning("requests are not counted yet: %s", error)
                for kind, number in taken.items():
                    self._counter.add(kind, number)

    def estimate(self) -> MonthlyEstimate:
        """From the last seven days. Raises the errors of the state."""
        return estimate(self._stored.recent(self._clock()), self._prices)

    def rewrite_seconds(self, partitions: int, window_seconds: float) -> float:
        """The module's `rewrite_seconds`, with the part of the limit that other requests leave; 0 without a limit."""
        if self._max_monthly is None or self._prices is None:
            return 0.0
        found = self.estimate()
        others = {kind: number for kind, number in found.by_kind.items() if kind != PUT}
        left = self._max_monthly - self._prices.of(others)
        return rewrite_seconds(partitions, window_seconds, put_price=self._prices.by_kind[PUT], monthly=left)
