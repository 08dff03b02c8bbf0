"""The network of this machine: proxies, and certificate authorities of its own, for every client of an outside system.

The libraries each read a variable of their own for the authorities; `use` sets all of them for this process. Proxies
they read from HTTPS_PROXY, HTTP_PROXY and NO_PROXY, but for urllib3 alone, which asks `proxy_for`.
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
    "REQUESTS_CA_BUNDLE",  # the sign-in to Google
    "PGSSLROOTCERT",  # PostgreSQL, with an sslmode that checks
)
UNTRUSTED = ("certificate_verify_failed", "certificate verify failed", "root certificate file")


T = TypeVar("T")


class SharedClient(Generic[T]):
    """What `make` makes on first use, for all threads: a library's client, or a part of the program that loads heavy
    packages. Call it to have it; raises what `make` raises.
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
        """End idle connections. It may be used again afterwards."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            made.close()


def use(proxies: Mapping[str, str], ca_file: Path | None, public: Path, bundle: Path) -> None:
    """Set the variables of all libraries. `proxies`: variable -> value, "" for none.

    `bundle` is written: the authorities of `public`, which every library trusts anyway, those of files that the
    environment names already, as conda does, and those of `ca_file`. Proxies that it names stay. Raises Permanent when
    the bundle cannot be written.
    """
    for name, value in proxies.items():
        # Libraries read the name in small letters first: who set it so meant it.
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
    """The proxy that the environment names for `url`, "" for none; also for what is no URL, which its client says."""
    from urllib.request import getproxies_environment, proxy_bypass  # 1.6 MiB, which an idle process does without

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
    """What happened on the way to `url`, such as `cannot connect to 127.0.0.1:8086: connection refused`; "" where the
    operating system has no word on it. Holds no more of the URL than host and port.
    """
    place = urlsplit(url).netloc.rpartition("@")[2]
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            was_open = isinstance(found, ConnectionResetError | ConnectionAbortedError | BrokenPipeError)
            what = f"the connection to {place} broke off" if was_open else f"cannot connect to {place}"
            return f"{what}: {found.strerror[0].lower()}{found.strerror[1:]}"
        found = found.__cause__ or found.__context__
    return ""


def is_untrusted(error: BaseException) -> bool:
    """True where a certificate was not trusted, which trying again does not cure."""
    found: BaseException | None = error
    while found is not None:
        if any(text in str(found).lower() for text in UNTRUSTED):
            return True
        found = found.__cause__ or found.__context__
    return False
