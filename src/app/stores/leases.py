"""Leases in the state database, timed by its own clock: the clocks of the replicas may differ as they like.

Invariants: each change is one statement; the generation of a name grows with every acquisition and is never used again;
owners are stored with the mark of this format of the state, so that a process of an older version, which writes none,
takes no lease (see migration 0006).
"""

from collections.abc import Mapping

from app.core.errors import LeaseLost
from app.core.runs import Lease
from app.stores.sql import Database, Row

FORMAT = "v2|"
LOST_HINT = "nothing to do: the process that holds it goes on; several takeovers in a row mean a stalled machine"


class SqlLeases:
    """See `app.core.runs.Leases`."""

    def __init__(self, database: Database, queries: Mapping[str, str]) -> None:
        self._database = database
        self._queries = queries

    def acquire(self, name: str, owner: str, ttl_seconds: float) -> Lease | None:
        """See `Leases.acquire`."""
        found = self._changed("acquire", name=name, owner=FORMAT + owner, ttl_seconds=float(ttl_seconds))
        return Lease(name, owner, found["generation"], found["expires_at"]) if found else None

    def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        """See `Leases.renew`."""
        found = self._changed("renew", **identity(lease), ttl_seconds=float(ttl_seconds))
        if found is None:
            raise lost(lease)
        return Lease(lease.name, lease.owner, lease.generation, found["expires_at"])

    def release(self, lease: Lease) -> None:
        """See `Leases.release`."""
        with self._database.transaction() as session:
            session.run(self._queries["release"], **identity(lease))

    def _changed(self, query: str, **params: object) -> Row | None:
        with self._database.transaction() as session:
            return next(iter(session.rows(self._queries[query], **params)), None)


def identity(lease: Lease) -> dict[str, object]:
    """What tells a lease from those before and after it. Its expiry is the database's to know."""
    return {"name": lease.name, "owner": FORMAT + lease.owner, "generation": lease.generation}


def lost(lease: Lease) -> LeaseLost:
    """The error that says which lease is gone."""
    return LeaseLost(f"the lease {lease.name} (generation {lease.generation}) expired or was taken over", LOST_HINT)
