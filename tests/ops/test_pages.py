"""The pages in a real browser: each state at a desk and on a phone, in light and dark, without a finding of axe; keys,
and what a reader has open, through a refresh; the server away.
"""

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from daemon import Daemon, Daemons
from lake import exported
from needs import needs_node_package

LOOKS = [(1440, False), (1440, True), (390, False), (390, True)]
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
FOUND = "r.violations.map(v => v.id + ' ' + v.nodes[0].html.slice(0, 200))"
AUDIT = f"axe.run(document, {{runOnly: {json.dumps(TAGS)}, resultTypes: ['violations']}}).then(r => {FOUND})"


OPENED = """!!document.querySelector('.drill .button.main')
    || !!(document.querySelector('.drill') || document.querySelector('#maps .cell.missing')?.click())"""


def filled(folder: Path) -> None:
    """A lake of two devices that have sent until now."""
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=90)
    for device in ("D1", "D2"):
        path = folder / "objects" / "telemetry" / f"device_id={device}" / "part.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(exported(device, start, 90, draw=random.Random(device)))  # noqa: S311 - test data


class Pages:
    """A browser on a daemon, with axe."""

    def __init__(self, browser: Browser, daemon: Daemon) -> None:
        self.browser = browser
        self.url = daemon.url
        self.axe = (needs_node_package("axe-core") / "axe.min.js").read_text()

    def open(self, path: str, until: str) -> None:
        self.browser.open(self.url + path)
        self.browser.until(until)

    def clean_in_all_looks(self, what: str, again: str = "") -> None:
        """`again` opens what closes when a desk becomes a phone; it is true once that is open."""
        self.browser.run(self.axe + "; true")
        for width, dark in LOOKS:
            self.size(width, dark=dark)
            if again:
                self.browser.until(again)
            found = self.browser.run(AUDIT)
            assert found == [], f"{what} at {width}, {'dark' if dark else 'light'}"
            assert self.browser.run("document.documentElement.scrollWidth") <= width, f"{what} is too wide at {width}"
        self.size(1440)

    def size(self, width: int, *, dark: bool = False) -> None:
        """Until the page has heard of it."""
        self.browser.size(width, 900, phone=width < 500, dark=dark)
        self.browser.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 30)))")

    def text(self, selector: str) -> str:
        found: str = self.browser.run(f"document.querySelector('{selector}').innerText")
        return found

    def key(self, name: str) -> None:
        event = f"new KeyboardEvent('keydown', {{key: '{name}', bubbles: true, cancelable: true}})"
        self.browser.run(f"document.activeElement.dispatchEvent({event})")

    def focus(self, script: str) -> Any:
        return self.browser.run(f"(document.activeElement.{script})")


@pytest.mark.slow
def test_every_page_is_clean_for_axe_works_by_keys_and_keeps_what_the_reader_has_open(
    browser: Browser, daemons: Daemons, tmp_path: Path
) -> None:
    filled(tmp_path / "data")
    daemon = daemons.start("shelf", LOG_FILE=str(tmp_path / "app.log"), LOG_FORMAT="json")
    daemon.until(lambda: daemon.job("shelf")["last_run"] and daemon.job("failing")["last_run"])
    shelf = sorted((tmp_path / "data" / "shelf").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    shelf[3].unlink()
    pages = Pages(browser, daemon)
    browser.size(1440, 900)

    pages.open("/", "!!document.querySelector('#maps .cell.missing')")
    browser.until("document.getElementById('verdict').innerText.includes('1 window is missing in shelf')")
    browser.until("!document.getElementById('rest').hasAttribute('aria-busy')")
    assert "Next: heal" in pages.text("#todo")
    assert "First seen " in pages.text("#todo"), "when the window was first seen to be gone"
    assert browser.run("document.querySelectorAll('#map-shelf .map-row .cell').length") == 24, "the whole span"
    assert "Off. Set INFLUXDB_URL to enable." in pages.text("#off")

    an_opened_cell(pages)
    a_menu_and_a_backfill(pages)
    for span, cells in (("7d", 42), ("30d", 30), ("365d", 53)):
        browser.click(f"document.querySelector('#ranges [data-range=\"{span}\"]')")
        browser.until(f"document.querySelectorAll('#map-shelf .map-row .cell').length === {cells}")
    assert "range=365d" in browser.run("location.search"), "a link shows the same"
    pages.clean_in_all_looks("the map of a year")
    runs(pages, daemon.job("failing")["last_run"]["run_id"])
    explore(pages)

    pages.open("/", "!!document.querySelector('#maps .cell')")
    daemon.kill()
    browser.until("document.getElementById('verdict').innerText.startsWith('No answer from the server since')", 30)
    assert browser.run("document.title") == "Server away \u2013 Headwater"
    assert browser.run("document.querySelectorAll('[data-needs]:not(:disabled)').length") == 0
    assert "grayscale" in browser.run("getComputedStyle(document.getElementById('rest')).filter")
    pages.clean_in_all_looks("the server away")


def an_opened_cell(pages: Pages) -> None:
    """Reached by keys; a refresh leaves it open, with its focus and the scroll."""
    browser = pages.browser
    browser.run("document.querySelector('#maps .cell[tabindex=\"0\"]').focus()")
    assert "missing" in pages.focus("className"), "the one tab stop of a map is at first its first problem"
    pages.key("ArrowLeft")
    assert "missing" not in pages.focus("className")
    pages.key("n")
    assert "missing" in pages.focus("className")
    browser.run("document.activeElement.click()")
    browser.until("!!document.querySelector('.drill .button.main')")
    assert "Missing at the destination: 10 rows delivered" in pages.text(".drill")
    pages.clean_in_all_looks("an opened cell", OPENED)
    browser.until(OPENED)
    refreshed = "window.seen = document.querySelector('#fresh time')?.dateTime"
    browser.run(f"{refreshed}; document.querySelector('.drill .lined').focus(); scrollTo(0, 300)")
    browser.until("document.querySelector('#fresh time')?.dateTime !== window.seen", 20)
    assert pages.focus("textContent") == "Earlier"
    assert browser.run("scrollY") == 300
    pages.key("Escape")
    assert browser.run("document.querySelector('.drill')") is None
    assert "missing" in pages.focus("className"), "Escape goes back to the cell"


def a_menu_and_a_backfill(pages: Pages) -> None:
    """A menu by its keys, and the dialog with the last day filled in."""
    browser = pages.browser
    browser.click("document.querySelector('#p-shelf .menu > button')")
    browser.until("document.activeElement.role === 'menuitem'")
    pages.key("ArrowDown")
    assert pages.focus("textContent") == "Verify last 24 h"
    pages.clean_in_all_looks("a menu")
    pages.key("Escape")
    assert pages.focus("getAttribute('aria-expanded')") == "false"
    browser.click("document.querySelector('#p-shelf .menu > button')")
    browser.click("document.querySelector('#p-shelf .menu ul [data-act=backfill]')")
    hours = "(new Date(document.getElementById('to').value) - new Date(document.getElementById('from').value)) / 36e5"
    assert browser.run(hours) == 24, "the last day is filled in"
    browser.run("document.getElementById('backfill').close()")


def runs(pages: Pages, run_id: str) -> None:
    """One run that failed, and the list of those that did."""
    browser = pages.browser
    pages.open(f"/run?id={run_id}", "document.querySelectorAll('#log li').length > 0")
    assert browser.run("document.title").startswith("failing failed")
    assert "Next: create it, or set S3_BUCKET" in pages.text("#todo")
    assert "Started by\nschedule, every" in pages.text("#facts")
    assert pages.text("#version").startswith("Headwater "), "the checks are on every page"
    pages.clean_in_all_looks("a run")
    pages.open("/run?id=nobody", "document.getElementById('verdict').innerText.includes('not kept any more')")
    assert browser.run("document.getElementById('log-part').hidden")
    pages.clean_in_all_looks("a run that is gone")
    pages.open("/runs?outcome=failed", "document.querySelectorAll('#runs tr').length > 0")
    assert "OK" not in pages.text("#runs")
    pages.clean_in_all_looks("the list of runs")


def explore(pages: Pages) -> None:
    """Ranges, zoom, the legend, what is not there, and the link."""
    browser = pages.browser
    pages.open("/analytics/explore", "document.querySelectorAll('#plot path').length === 2")
    assert pages.text("#chart-title") == "Average voltage, V"
    assert pages.text("#tiles").startswith("Rows\n180")
    pages.clean_in_all_looks("Explore")
    browser.click("document.querySelector('#series button')")
    browser.until("document.querySelectorAll('#plot path').length === 1")
    assert "hide=D1" in browser.run("location.search")
    box = browser.run("(b => [b.x, b.y, b.width, b.height])(document.getElementById('plot').getBoundingClientRect())")
    browser.drag((box[0] + box[2] * 0.3, box[1] + box[3] / 2), (box[0] + box[2] * 0.6, box[1] + box[3] / 2))
    browser.until("document.getElementById('hint-text').textContent.startsWith('Zoomed to')")
    browser.run("document.getElementById('plot').focus()")
    pages.key("Escape")
    browser.until("document.getElementById('unzoom').hidden")
    browser.click("document.querySelector('#ranges [data-range=\"1h\"]')")
    browser.until("location.search.includes('range=1h')")
    span = "range=custom&from=2020-01-01T00:00:00Z&to=2020-01-02T00:00:00Z"
    pages.open(f"/analytics/explore?{span}", "document.getElementById('state').innerText.includes('No readings')")
    pages.clean_in_all_looks("nothing in this range")
    browser.click("document.querySelector('#state button')")
    browser.until("document.querySelectorAll('#plot path').length === 2")
