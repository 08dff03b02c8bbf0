"""How the time that a stop may take is shared among its steps, which follow one another.

Invariant: the sum stays below the grace with room for what lies between the steps, so the process is gone before the
platform kills it, also when every step takes all of its time.
"""

from dataclasses import dataclass

ROOM_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Steps:
    """The longest that each step may take, in seconds and in this order.

    `jobs` come to their next safe point, `requests` to their end, then the `refresh` of the reports; `stuck` is how
    long the threads of jobs are waited for that heard nothing.
    """

    jobs: float
    requests: float
    refresh: float
    stuck: float


def steps_of(grace_seconds: float) -> Steps:
    """The steps of a stop within `grace_seconds`."""
    shared = grace_seconds - min(ROOM_SECONDS, grace_seconds / 2)
    return Steps(jobs=shared / 2, requests=shared / 8, refresh=shared / 8, stuck=shared / 8)
