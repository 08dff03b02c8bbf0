"""What `check` tries: one row for each system that is set, under the name of its variable."""

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from app.main import build
from app.ops.connection_checks import CheckResult, check_once
from given_settings import loaded
from simulators.amplitude import AmplitudeSimulator
from simulators.appmetrica import AppMetricaSimulator
from simulators.influx import InfluxSimulator


class Heard(HTTPServer):
    """A webhook, which knows one path."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        heard = self

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200 if self.path == "/hook" else 404)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's own signature
                pass

        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}/hook"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def server_close(self) -> None:
        self.shutdown()
        self._thread.join()
        super().server_close()


def test_check_tries_every_system_that_is_set_and_says_what_its_credentials_may_do(tmp_path: Path) -> None:
    with (
        AmplitudeSimulator() as web,
        AppMetricaSimulator() as mobile,
        InfluxSimulator() as influx,
        Heard() as heard,
    ):
        environ = {
            **web.environment("web"),
            **mobile.environment(),
            "INFLUXDB_URL": influx.url,
            "INFLUXDB_TOKEN": influx.token,
            "INFLUXDB_ORG": influx.org,
            "INFLUXDB_BUCKET": influx.bucket,
            "ALERT_WEBHOOK_URL": heard.url,
            "DATA_DIR": str(tmp_path),
        }
        fine, _ = tried(environ)
        assert fine["AMPLITUDE_WEB_CLIENT_ID"].note == "may export events"
        assert "may read application" in fine["APPMETRICA_APPLICATION_ID"].note
        assert all(found.ok for found in fine.values())
        assert [body["event"] for body in heard.bodies] == ["check"]
        wrong = {"AMPLITUDE_WEB_SECRET_KEY": "x", "APPMETRICA_APPLICATION_ID": "7", "INFLUXDB_TOKEN": "x"}
        found, places = tried({**environ, **wrong, "ALERT_WEBHOOK_URL": f"{heard.url}/missing"})
    stores = ["CHECKPOINT_DATABASE_URL", "S3_BUCKET", "DWH_DATABASE_URL", "MAX_MONTHLY_REQUEST_COST"]
    assert [name for name, each in found.items() if each.ok] == stores
    assert "application 7" in found["APPMETRICA_APPLICATION_ID"].error
    assert all(each.hint for each in found.values() if not each.ok)
    assert places["influx_to_s3"] == f"{tmp_path}/objects/telemetry/device_id=.../date=%Y/%m/%d/export_HHMMSS.parquet"


def tried(environ: dict[str, str]) -> tuple[dict[str, CheckResult], Mapping[str, str]]:
    service = build(loaded(environ))
    found = {each.variable: check_once(each.check) for each in service.systems}
    service.state.close()
    return found, service.pipelines.destinations
