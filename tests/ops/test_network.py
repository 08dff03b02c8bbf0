"""A private certificate authority and a forward proxy, for each client of a system outside."""

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from app.core.errors import AppError, Permanent
from app.core.network import CA_HINT, CA_VARIABLES, proxy_for
from app.main import build
from given_settings import faults, loaded, secret

NAMES = (*CA_VARIABLES, "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy", "ALL_PROXY")
SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"  # how PostgreSQL asks for TLS


class Heard:
    """A server of which only this matters: which connections came so far that they were answered."""

    def __init__(self, serve: Callable[[socket.socket, list[str]], None]) -> None:
        self.said: list[str] = []
        self._serve = serve
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(10)
            self._serve(connection, self.said)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def secured(context: ssl.SSLContext) -> Callable[[socket.socket, list[str]], None]:
    """Answers every request with 400, and a PostgreSQL client not at all, once their TLS stands."""

    def serve(connection: socket.socket, said: list[str]) -> None:
        if connection.recv(8, socket.MSG_PEEK) == SSL_REQUEST:
            connection.recv(8)
            connection.sendall(b"S")
        with context.wrap_socket(connection, server_side=True) as shielded:
            head = shielded.recv(65536)
            said.append(head.split(b"\r\n")[0].decode("latin-1"))
            shielded.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    return serve


def forward(connection: socket.socket, said: list[str]) -> None:
    """CONNECT, and bytes both ways."""
    head = connection.recv(65536).split(b"\r\n")[0].decode()
    said.append(head)
    host, _, port = head.split()[1].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as there:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=copy, args=(there, connection), daemon=True)
        back.start()
        copy(connection, there)
        back.join(10)


def copy(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while piece := one.recv(65536):
            other.sendall(piece)
        other.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """The certificate of an authority, and a server's that it signed."""
    folder = tmp_path_factory.mktemp("authority")
    now = datetime.now(UTC)

    def signed(name: str, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private authority")])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=ca,
            crl_sign=ca,
            encipher_only=False,
            decipher_only=False,
        )
        made = (
            x509.CertificateBuilder()
            .subject_name(issuer if ca else subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        )
        made = made if ca else made.add_extension(names, critical=False)
        return made.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "ca.pem").write_bytes(signed("root", root, root, ca=True))
    key = leaf.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(key + signed("localhost", leaf, root, ca=False))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return folder / "ca.pem", context


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `build` puts into the environment goes with the test."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    for name in NAMES:
        os.environ.pop(name, None)


@pytest.fixture
def server(authority: tuple[Path, ssl.SSLContext]) -> Iterator[Heard]:
    with closing(Heard(secured(authority[1]))) as heard:
        yield heard


def given(port: int, folder: Path) -> Mapping[str, str]:
    """Every client points to the one server."""
    url = f"https://localhost:{port}"
    account = (
        '{"type": "service_account", "client_email": "a@b", "private_key_id": "1", "project_id": "p",'
        f' "token_uri": "{url}/token", "private_key": '
    )
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return {
        "DATA_DIR": str(folder),
        "INFLUXDB_URL": url,
        "INFLUXDB_TOKEN": "token",
        "INFLUXDB_ORG": "org",
        "INFLUXDB_BUCKET": "bucket",
        "S3_BUCKET": "bucket",
        "S3_ENDPOINT_URL": url,
        "S3_ADDRESSING_STYLE": "path",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "DYNAMODB_TABLE_NAME": "table",
        "DYNAMODB_ENDPOINT_URL": url,
        "GOOGLE_CREDENTIALS_JSON": f'{account}"{pem}"}}'.replace("\n", "\\n"),
        "GOOGLE_DRIVE_API_URL": url,
        "AMPLITUDE_BASE_URL": url,
        "AMPLITUDE_WEB_CLIENT_ID": "id",
        "AMPLITUDE_WEB_SECRET_KEY": "secret",
        "APPMETRICA_BASE_URL": url,
        "APPMETRICA_API_KEY": "key",
        "APPMETRICA_APPLICATION_ID": "1",
        "ALERT_WEBHOOK_URL": f"{url}/hook",
    }


DATABASE = {
    "CHECKPOINT_DB_HOST": "localhost",
    "CHECKPOINT_DB_NAME": "name",
    "CHECKPOINT_DB_SSLMODE": "verify-full",
}
HTTPS = ("s3_accessible", "influxdb", "dynamodb", "google_drive", "amplitude_web", "appmetrica", "webhook")


def tried(environ: Mapping[str, str], names: tuple[str, ...]) -> dict[str, AppError]:
    """What each system says; nothing here answers as it should."""
    service = build(loaded(environ))
    found: dict[str, AppError] = {}
    systems = {each.key: each for each in service.systems}
    for name in names:
        with pytest.raises(AppError) as caught:
            systems[name].check()
        found[name] = caught.value
    service.state.close()
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("clean")
def test_without_ca_file_every_client_refuses_a_private_authority_and_names_the_variable(
    server: Heard, tmp_path: Path
) -> None:
    for name, error in tried(given(server.port, tmp_path), HTTPS).items():
        assert isinstance(error, Permanent), name
        assert error.hint == CA_HINT, (name, error)
    assert server.said == []


@pytest.mark.usefixtures("clean")
def test_a_client_that_cannot_connect_says_where_and_why_in_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        place = f"127.0.0.1:{closed.getsockname()[1]}"
    environ = {
        name: value.replace("https://localhost:0", f"http://{place}") for name, value in given(0, tmp_path).items()
    }
    for name, error in tried(environ, ("influxdb", "amplitude_web", "appmetrica", "webhook")).items():
        assert error.message.endswith(f"cannot connect to {place}: connection refused"), name


@pytest.mark.usefixtures("clean")
def test_postgresql_takes_ca_file_and_the_way_its_tls_is_checked(
    server: Heard, authority: tuple[Path, ssl.SSLContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.pem").write_text("an authority that the environment names")
    environ = {**DATABASE, "CHECKPOINT_DB_PORT": str(server.port), "DATA_DIR": str(tmp_path)}
    (refused,) = tried(environ, ("checkpoint_store_connected",)).values()
    assert (refused.hint, server.said) == (CA_HINT, [])
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "other.pem"))
    monkeypatch.setenv("PGSSLROOTCERT", str(tmp_path / "missing.pem"))
    (reached,) = tried({**environ, "CA_FILE": str(authority[0])}, ("checkpoint_store_connected",)).values()
    assert reached.hint != CA_HINT
    assert server.said
    trusted = (tmp_path / "ca-bundle.pem").read_bytes()
    assert trusted.endswith(authority[0].read_bytes())
    assert trusted.count(b"BEGIN CERTIFICATE") > 50, "the public authorities stay"
    assert b"an authority that the environment names" in trusted, "and those of a conda or a company"
    assert os.environ["SSL_CERT_FILE"] == os.environ["PGSSLROOTCERT"] == str(tmp_path / "ca-bundle.pem")


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://influx.example.org/x", "http://u:p@proxy:3128"),
        ("http://influx.example.org", ""),
        ("https://localhost:8086", ""),
        ("https://inner.example.net", ""),
    ],
)
@pytest.mark.usefixtures("clean")
def test_the_proxy_of_a_url_is_that_of_its_scheme_unless_no_proxy_names_the_host(
    url: str, proxy: str, tmp_path: Path
) -> None:
    environ = {"HTTPS_PROXY": "http://u:p@proxy:3128", "NO_PROXY": "localhost,.example.net", "DATA_DIR": str(tmp_path)}
    build(loaded(environ)).state.close()
    assert proxy_for(url) == proxy


def test_how_the_tls_of_postgresql_is_checked_is_a_part_of_its_url_and_a_wrong_file_is_a_fault(tmp_path: Path) -> None:
    settings = loaded(DATABASE)
    assert secret(settings.checkpoint.url) == "postgresql://localhost:5432/name?sslmode=verify-full"
    (tmp_path / "no.pem").write_text("nothing")
    for path in (tmp_path / "no.pem", tmp_path / "missing.pem"):
        (fault,) = faults(CA_FILE=str(path))
        assert fault.startswith("CA_FILE=")
        assert "PEM" in fault
    (fault,) = faults(CHECKPOINT_DB_SSLMODE="require")
    assert fault.startswith("CHECKPOINT_DB_HOST=''")


@pytest.mark.slow
@pytest.mark.usefixtures("clean")
def test_with_ca_file_and_a_proxy_every_client_reaches_the_server_through_it(
    server: Heard, authority: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    with closing(Heard(forward)) as proxy:
        network = {"CA_FILE": str(authority[0]), "HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}
        for name in HTTPS:
            server.said.clear()
            proxy.said.clear()
            (error,) = tried({**given(server.port, tmp_path), **network}, (name,)).values()
            assert error.hint != CA_HINT, (name, error)
            assert server.said, (name, error)
            assert proxy.said[0].startswith(f"CONNECT localhost:{server.port}"), name
