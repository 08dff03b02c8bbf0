"""The daemon: a built service, served until a signal, and then ended in order."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from app.config.environment import read_dotenv
from app.config.rules import warnings
from app.ops.service import Headwater, steps_of
from app.web.server import serve

# The C library's allocator, told to give large blocks back to the system as soon as they are free.
#
# Left alone, glibc raises the size from which it does so with each large block that is freed, up to 32 MiB; the
# parts of uploads and the buffers of tables then stay in its heaps, and the daemon keeps some 35 MiB more than it
# uses. It would also make a heap for each of a dozen threads, which each keep what is free in it; on half a core
# two are enough.

LARGE_BYTES = 1 << 20
TOP_BYTES = 16 << 20  # less than this makes the heap shrink and grow with every block of a body
HEAPS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def give_back_large_blocks() -> None:
    """For the whole process. Does nothing where the C library is another."""
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, TOP_BYTES)
        mallopt(M_ARENA_MAX, HEAPS)


# The daemon: a built service, served until a signal, and then ended in order.

# A job that computes holds the interpreter for this long at most before a request gets its turn.
SWITCH_SECONDS = 0.002
log = logging.getLogger(__name__)


def run_daemon(service: Headwater, environ: Mapping[str, str], dotenv: Path | None = None) -> None:
    """Serve `service`, which was configured by `environ` and `dotenv`. Ends by raising the stop signal again."""
    settings = service.settings
    for warning in warnings(settings, environ, read_dotenv(dotenv)[0]):
        log.warning("%s", warning)
    for job in service.pipelines.jobs:
        if job.off:
            log.info("job %s is %s", job.name, job.off)
    log.info(
        "%s %s on %s:%d", settings.service.title, settings.service.version, settings.service.host, settings.service.port
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    sys.setswitchinterval(SWITCH_SECONDS)
    give_back_large_blocks()
    serve(
        service.app,
        host=settings.service.host,
        port=settings.service.port,
        health_port=settings.service.health_port,
        forwarded_allow_ips=settings.access.forwarded_allow_ips,
        steps=steps_of(settings.service.shutdown_grace_seconds),
        ask_stop=service.scheduler.ask_stop,
        busy=lambda: service.scheduler.busy,
    )
