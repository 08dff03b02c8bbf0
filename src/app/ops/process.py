"""Process setup before anything else: import hooks, memory tuning, settings and logging."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from app.config import DOTENV
from app.core.errors import BadSettings

if TYPE_CHECKING:
    from app.config.settings import Settings


BAD_SETTINGS = 78


def unsupported(system: str) -> str:
    """Why this `os.name` is not supported, "" if it is."""
    if system != "nt":
        return ""
    return "Headwater runs on Linux and macOS: on Windows install it in WSL 2, or use Docker (docs/deploy/windows.md)"


class Absent:
    """Hides a package from all later imports; see `importlib.abc.MetaPathFinder`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, *_: object) -> None:
        """Refuse the package; leave others to the next finder."""
        if name == self._name:
            raise ModuleNotFoundError(f"{name} is not for this process", name=name)


def tune() -> None:
    """Tune for half a core and little memory; call it before anything heavy is imported."""
    # Arrow's own pool would keep some 50 MiB that the system allocator returns.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # numpy's linear algebra, which is not used here, would start a thread with buffers for each core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # pyarrow and DuckDB import pandas wherever it is installed: 91 MiB that are never used here.
    sys.meta_path.insert(0, Absent("pandas"))
    # FastAPI imports it to refuse its models: 1.5 MiB.
    sys.meta_path.insert(0, Absent("pydantic.v1"))


def show_pandas() -> None:
    """Make pandas importable from here on: Spark's client needs it."""
    sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, Absent)]


def configured(
    environ: Mapping[str, str] = os.environ, dotenv: Path | None = DOTENV, *, daemon: bool = False, file: bool = True
) -> "Settings":
    """The settings of this environment, with logging set up; commands log to stderr and not to the daemon's file.

    `file` False: the daemon logs to stdout only.
    """
    from app.config.environment import load_settings, secrets_of
    from app.ops import logs

    settings = load_settings(environ, dotenv)
    service = settings.service
    try:  # otherwise the first file written to DATA_DIR would get the blame
        service.data_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=service.data_dir):
            pass
    except OSError as error:
        allowed = "allowed: a directory that this user can write to"
        raise BadSettings([f"DATA_DIR='{service.data_dir}': {error.strerror}; {allowed}"]) from error
    logs.configure(
        service.log_level,
        service.log_format if daemon else "text",
        service.log_file if daemon and file else None,
        log_files=service.log_files,
        secrets=secrets_of(settings),
        stream=sys.stdout if daemon else sys.stderr,
    )
    return settings


# A computing job holds the interpreter (GIL) for this long at most before a request gets its turn.
SWITCH_SECONDS = 0.002


def share_the_machine() -> None:
    """For a process that serves requests and runs jobs."""
    sys.setswitchinterval(SWITCH_SECONDS)
    give_back_large_blocks()


# Tunes the C allocator to return large blocks to the system as soon as they are freed.
#
# By default glibc raises its mmap threshold with each large block that is freed, up to 32 MiB; the parts of uploads and
# the buffers of tables then stay in its heaps, and the daemon keeps some 35 MiB more than it uses. It would also create
# an arena for each of a dozen threads, which each keep their free memory; on half a core two are enough.

LARGE_BYTES = 1 << 20
TOP_BYTES = 16 << 20  # with less, the heap shrinks and grows with every block of a body
HEAPS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def give_back_large_blocks() -> None:
    """Applies to the whole process. Does nothing with another C library."""
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, TOP_BYTES)
        mallopt(M_ARENA_MAX, HEAPS)
