"""The daemon: a built service, served until a signal, and then ended in order."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from app.config.environment import read_dotenv
from app.config.rules import warnings
from app.ops.allocator import give_back_large_blocks
from app.ops.server import Serving, serve
from app.ops.service import Headwater
from app.ops.stopping import steps_of

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
    serving = Serving(
        host=settings.service.host,
        port=settings.service.port,
        health_port=settings.service.health_port,
        forwarded_allow_ips=settings.access.forwarded_allow_ips,
        steps=steps_of(settings.service.shutdown_grace_seconds),
        ask_stop=service.scheduler.ask_stop,
        busy=lambda: service.scheduler.busy,
    )
    serve(service.app, serving)
