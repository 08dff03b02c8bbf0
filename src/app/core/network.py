"""Network settings of this machine for all clients of outside systems: proxies and additional certificate authorities.

Each library reads its own variable for the authorities; `use` sets all of them for this process. Proxies come from
HTTPS_PROXY, HTTP_PROXY and NO_PROXY, which all libraries read except urllib3; for it, call `proxy_for`.
"""

import os
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit

from app.core.errors import Permanent
from app.core.files import write_durably

CA_HINT = "set CA_FILE to the certificate of the authority that signed the server's, in PEM"
CA_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL: urllib3, httpx, DuckDB
    "AWS_CA_BUNDLE",  # boto3
    "HTTPLIB2_CA_CERTS",  # Google Drive
    "REQUESTS_CA_BUNDLE",  # the Google sign-in
    "PGSSLROOTCERT",  # PostgreSQL, with an sslmode that verifies
)
UNTRUSTED = ("certificate_verify_failed", "certificate verify failed", "root certificate file")


T = TypeVar("T")


class SharedClient(Generic[T]):
    """A client, or a module that loads heavy packages, created by `make` on first use and shared by all threads. Call
    it to get the client; raises what `make` raises.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: Any = None

    def __call__(self) -> T:
        """The client."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            made: T = self._made
            return made

    def close(self) -> None:
        """Close idle connections. The client may be used again afterwards."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            made.close()


def use(proxies: Mapping[str, str], ca_file: Path | None, public: Path, bundle: Path) -> None:
    """Set the variables of all libraries. `proxies`: variable -> value, "" for none.

    Writes `bundle`: the authorities of `public`, which every library trusts anyway, those of files already named in the
    environment (conda does that), and those of `ca_file`. Proxies set in the environment stay. Raises Permanent when
    the bundle cannot be written.
    """
    for name, value in proxies.items():
        # Libraries read the lower-case name first: a user who set it meant it.
        if value and name.lower() not in os.environ:
            os.environ.setdefault(name, value)
    if ca_file is None:
        return
    named = {Path(os.environ[name]) for name in CA_VARIABLES if os.environ.get(name)} - {bundle}
    files = (public, *(path for path in sorted(named) if path.is_file()), ca_file)
    try:
        text = b"\n".join(path.read_bytes().rstrip() for path in files) + b"\n"
        if not bundle.exists() or bundle.read_bytes() != text:
            bundle.parent.mkdir(parents=True, exist_ok=True)
            write_durably(bundle, [text])
    except OSError as error:
        raise Permanent(f"{bundle}: {error.strerror}", "set DATA_DIR to a directory that can be written") from error
    for name in CA_VARIABLES:
        os.environ[name] = str(bundle)


def proxy_for(url: str) -> str:
    """The proxy that the environment sets for `url`, "" for none or for an invalid URL, which its client reports."""
    from urllib.request import getproxies_environment, proxy_bypass  # 1.6 MiB, which an idle process does not need

    proxies = getproxies_environment()
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    if proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    return proxies.get(parts.scheme) or proxies.get("all", "")


def tunnel_to(url: str) -> tuple[str, int, dict[str, str]]:
    """Host and port of the proxy for `url`, and the headers of a CONNECT through it."""
    proxy = urlsplit(proxy_for(url))
    login = b64encode(unquote(proxy.netloc.rpartition("@")[0]).encode()).decode()
    return proxy.hostname or "", proxy.port or 80, {"Proxy-Authorization": f"Basic {login}"} if login else {}


def connection_fault(error: BaseException, url: str) -> str:
    """What went wrong on the way to `url`, such as `cannot connect to 127.0.0.1:8086: connection refused`; "" if the
    operating system reported nothing. Contains only host and port of the URL.
    """
    place = urlsplit(url).netloc.rpartition("@")[2]
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            was_open = isinstance(found, ConnectionResetError | ConnectionAbortedError | BrokenPipeError)
            what = f"the connection to {place} was lost" if was_open else f"cannot connect to {place}"
            return f"{what}: {found.strerror[0].lower()}{found.strerror[1:]}"
        found = found.__cause__ or found.__context__
    return ""


def is_untrusted(error: BaseException) -> bool:
    """True if a certificate was not trusted; a retry does not help."""
    found: BaseException | None = error
    while found is not None:
        if any(text in str(found).lower() for text in UNTRUSTED):
            return True
        found = found.__cause__ or found.__context__
    return False
