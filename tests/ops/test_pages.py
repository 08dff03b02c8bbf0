"""The pages in a real browser: each state at a desk and on a phone, in light and dark, without a finding of axe; keys,
and what a reader has open, through a refresh; the server away; who may see what.
"""

import hashlib
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


KEYS = {name: f"hw_{name}_{('root' * 11)[:43]}" for name in ("ana", "grafana")}
API_KEYS = ",".join(
    f"{name}:{scope}:{hashlib.sha256(KEYS[name].encode()).hexdigest()}"
    for name, scope in (("ana", "admin"), ("grafana", "analytics:read"))
)
LOCKED = Path(__file__).parents[2] / "src" / "app" / "ops" / "assets" / "locked.html"
# What a cell looks like without its colours: one in the page's own style for each state, as of now.
SHAPES = """Object.fromEntries('ok none open late missing partial changed aside unknown'.split(' ').map(kind => {
    const cell = make('span', {class: 'cell ' + kind}), style = (document.body.append(cell), getComputedStyle(cell));
    const mark = getComputedStyle(cell, '::after'), filled = style.backgroundColor !== 'rgba(0, 0, 0, 0)';
    const found = [filled, style.borderTopStyle, style.boxShadow !== 'none', mark.display !== 'none' && mark.clipPath];
    cell.remove();
    return [kind, JSON.stringify(found)];
}))"""


SLOWLY = "fetch = (f => (...a) => new Promise(d => setTimeout(() => d(f(...a)), /over-time/.test(a[0]) * 1500)))(fetch)"
REFUSED = "document.getElementById('state').innerText.startsWith('The report was refused')"
OPENED = """!!document.querySelector('.drill .button.main')
    || !!(document.querySelector('.drill') || document.querySelector('#maps .cell.missing')?.click())"""


def filled(folder: Path) -> None:
    """A lake of two devices that have sent until now, and an object of a third that is damaged."""
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=90)
    for device in ("D1", "D2"):
        path = folder / "objects" / "telemetry" / f"device_id={device}" / "part.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(exported(device, start, 90, draw=random.Random(device)))  # noqa: S311 - test data
    damaged = folder / "objects" / "telemetry" / "device_id=D3" / "part.parquet"
    damaged.parent.mkdir()
    damaged.write_bytes(b"PAR1 not a file PAR1")


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
def test_who_signs_in_sees_what_the_key_may_and_how_all_stands_until_a_sum_does_not_close(
    browser: Browser, daemons: Daemons
) -> None:
    daemon = daemons.start("delivered", key=KEYS["ana"], API_KEYS=API_KEYS)
    jobs = ("shelf", "shelf_late", "fleet", "unclosing")
    daemon.until(lambda: all((daemon.job(name)["last_run"] or {}).get("ended_at") for name in jobs))
    pages = Pages(browser, daemon)
    browser.zone("Asia/Tokyo")
    browser.size(1440, 900)
    browser.open(LOCKED.as_uri())
    pages.clean_in_all_looks("the page of a server without keys")

    signing_in(pages)
    all_is_delivered(pages, daemon)
    groups_and_pages(pages)
    from_a_year_to_a_window(pages)
    a_sum_that_does_not_close(pages)
    browser.click("document.getElementById('sign-out')")
    browser.until("document.getElementById('sign-in')?.hidden === false")


def signing_in(pages: Pages) -> None:
    """A wrong key is told as such, one with few rights sees what it may, and can sign out."""
    browser = pages.browser

    def send(key: str, until: str) -> None:
        browser.until("document.getElementById('sign-in')?.hidden === false")
        browser.run(f"document.getElementById('key').value = '{key}'")
        browser.click("document.querySelector('#sign-in button[type=submit]')")
        browser.until(until)

    pages.open("/", "document.getElementById('sign-in')?.hidden === false")
    send(
        KEYS["ana"][:-1] + "x", "document.getElementById('sign-in-error').innerText.startsWith('This key is not known')"
    )
    pages.clean_in_all_looks("a wrong key")
    send(KEYS["grafana"], "!document.getElementById('few').hidden")
    assert pages.text("#few").startswith("Signed in as grafana, but this key may not see this page.")
    assert "It needs the scope ops:read. This key has analytics:read." in pages.text("#few")
    assert browser.run("document.getElementById('few-open').getAttribute('href')") == "analytics/explore"
    pages.clean_in_all_looks("a key with few rights")
    browser.click("document.getElementById('sign-out')")
    send(KEYS["ana"], "!!document.querySelector('#map-fleet .group') && !document.querySelector('.skeleton')")


def all_is_delivered(pages: Pages, daemon: Daemon) -> None:
    """One sentence in the head, the title and the icon; each pipeline a row, with its helper in it."""
    browser = pages.browser
    browser.until("document.getElementById('verdict').innerText.startsWith('Everything delivered, complete up to ')")
    assert browser.run("document.title") == "All delivered \u2013 Headwater"
    assert browser.run("document.querySelector('link[rel=icon]').href").endswith("icon-ok.svg")
    local, utc = browser.run("(x => [x.innerText, x.title])(document.querySelector('#verdict time'))")
    at = datetime.strptime(utc, "%Y-%m-%d %H:%M:%S %Z") + timedelta(hours=9)  # noqa: DTZ007 - shown as text
    assert local.endswith(f"{at:%H:%M}"), "times are local, UTC stands in their title"

    keys = browser.run("[...document.querySelectorAll('#pipelines tr')].map(x => x.dataset.key)")
    assert keys == ["p-shelf", "p-fleet", "p-unclosing"], "a helper is no row of its own"
    assert pages.text("#p-shelf .id").startswith("shelf\nlate rows ")
    assert pages.text('#p-fleet td[data-label="Max lag"]') != "\u2013"
    assert pages.text('#p-unclosing td[data-label="New rows today"]').startswith("12\n"), "new rows, not rewrites"
    for part, number in ((".bars rect", 24), (".strip .cell", 24), (".menu > button", 1)):
        assert browser.run(f"document.querySelectorAll('#p-shelf {part}').length") == number
    assert pages.text("#off").startswith("sleeping\nOff. Set INFLUXDB_URL to enable.\nGuide")
    links = browser.run("[...document.querySelectorAll('.foot a')].map(x => x.getAttribute('href'))")
    assert [daemon.get(f"/{link}").status for link in ("guides/influx_to_s3", *links)] == [200] * 4, links
    assert links == ["guides/README", "docs", "metrics"]
    shapes = browser.run(SHAPES)
    assert len(set(shapes.values())) == len(shapes), "each state has a shape of its own"
    pages.clean_in_all_looks("all delivered, and partitions in groups")


def groups_and_pages(pages: Pages) -> None:
    """Above 200 partitions they come in groups, and above 20 groups on pages; names are found, problems chosen."""
    browser = pages.browser
    groups = "document.querySelectorAll('#map-fleet .group').length"
    assert browser.run(groups) == 20
    assert pages.text("#map-fleet .pager").endswith("Groups 1 to 20 of 21. 0 of 520 partitions have problems.")
    browser.click("document.querySelector('#map-fleet .group button')")
    browser.until("document.querySelectorAll('#map-fleet .map-row:not(.group):not(.scale)').length === 25")
    assert browser.run("document.querySelector('#map-fleet .group button').getAttribute('aria-expanded')") == "true"
    browser.click("document.querySelector('#map-fleet .pager button:not(:disabled)')")
    browser.until(f"{groups} === 1")
    write = "(x => {{ x.value = '{}'; x.dispatchEvent(new Event('input')); }})(document.getElementById('find'))"
    browser.run(write.format("d51"))
    browser.until("document.querySelectorAll('#map-fleet .map-row:not(.scale)').length === 10")
    assert "find=d51" in browser.run("location.search")
    browser.run(write.format(""))
    browser.click("document.getElementById('only')")
    browser.until("document.getElementById('map-fleet').innerText.includes('No problems in this range.')")
    browser.click("document.getElementById('only')")
    browser.until(f"{groups} === 20")


def from_a_year_to_a_window(pages: Pages) -> None:
    """Each cell opens into finer ones, from weeks to one window, and Escape goes back a level."""
    browser = pages.browser
    browser.click("document.querySelector('#ranges [data-range=\"365d\"]')")
    browser.until("document.querySelectorAll('#map-shelf .map-row .cell').length === 53")
    filled = "[...document.querySelectorAll('{} .cell.ok')].at(-1)"
    browser.run(f"{filled.format('#map-shelf .map-row')}.focus()")
    browser.run("document.activeElement.click()")
    for place, cells in enumerate((7, 6, 4)):  # days, 4 h, hours
        browser.until(f"document.querySelectorAll('.drill .cells .cell').length === {cells}")
        assert browser.run("document.querySelectorAll('.drill .crumbs li').length") == place + 2
        browser.run(f"{filled.format('.drill .cells')}.click()")
    browser.until("document.querySelector('.drill .about').innerText.includes('All there: 10 rows delivered')")
    browser.run("document.querySelector('.drill button').focus()")
    pages.key("Escape")
    browser.until("document.querySelectorAll('.drill .cells .cell').length === 4")
    browser.click("document.querySelector('#ranges [data-range=\"24h\"]')")


def a_sum_that_does_not_close(pages: Pages) -> None:
    """The head names it, leads to it, and the run shows what is in no column; the list of runs is filtered."""
    browser = pages.browser
    browser.click("document.querySelector('#p-unclosing .sub .button')")
    browser.until("document.getElementById('verdict').innerText === '2 rows of unclosing are unaccounted for.'")
    assert browser.run("document.querySelector('#verdict a').hash") == "#p-unclosing"
    assert browser.run("document.querySelector('link[rel=icon]').href").endswith("icon-bad.svg")
    assert "2 rows unaccounted for\nlast run partly delivered, " in pages.text("#p-unclosing .state")
    run = browser.run("document.querySelector('#todo a').getAttribute('href')")
    pages.open(f"/{run}", "document.getElementById('closes').innerText.includes('does not close: 2 rows in no column')")
    assert pages.text("#verdict") == "2 rows unaccounted for."
    assert pages.text("#sums div:last-child") == "Unaccounted for\n2\nin no column"
    assert browser.run("document.querySelectorAll('#todo .mark.bad').length") == 1
    pages.clean_in_all_looks("a run whose sum does not close")
    pages.open("/runs?outcome=", "document.querySelectorAll('#runs tr').length === 5")
    choose = "(x => {{ x.value = '{}'; x.dispatchEvent(new Event('change', {{bubbles: true}})); }})"
    for id_, value, rows in (("f-outcome", "partial", 1), ("f-time", "3600", 1), ("f-job", "shelf", 0)):
        browser.run(f"{choose.format(value)}(document.getElementById('{id_}'))")
        browser.until(f"document.querySelectorAll('#runs a').length === {rows}")
    assert browser.run("location.search") == "?outcome=partial&since=3600&job=shelf"
    assert pages.text("#runs") == "No run matches these filters."


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
    browser.until("document.getElementById('version').textContent.startsWith('Headwater ')")  # on every page
    pages.clean_in_all_looks("a run")
    pages.open("/run?id=nobody", "document.getElementById('verdict').innerText.includes('not kept any more')")
    assert browser.run("document.getElementById('log-part').hidden")
    pages.clean_in_all_looks("a run that is gone")
    pages.open("/run", "document.getElementById('verdict').innerText.includes('not kept any more')")
    pages.open("/runs?outcome=failed", "document.querySelectorAll('#runs tr').length > 0")
    assert "OK" not in pages.text("#runs")
    pages.clean_in_all_looks("the list of runs")


def explore(pages: Pages) -> None:
    """Ranges, zoom, the legend, what is not there, and the link."""
    browser = pages.browser
    pages.open("/analytics/explore", "document.querySelectorAll('#plot path').length === 2")
    assert pages.text("#chart-title") == "Average voltage, V"
    assert pages.text("#tiles").startswith("Rows\n180")
    warning = "1 of 3 objects could not be read whole, so that rows of it may be left out."
    assert pages.text("#warnings").startswith(warning)
    assert pages.text("#warnings").count("device_id=D3/part.parquet") == 1
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
    browser.run(SLOWLY)
    browser.click("document.querySelector('#ranges [data-range=\"24h\"]')")
    browser.until("document.getElementById('view').getAttribute('aria-busy') === 'true'")
    assert pages.text("#fresh") == "Loading"
    browser.until("!document.getElementById('view').hasAttribute('aria-busy')")
    browser.run("(x => { x.value = '10000'; x.dispatchEvent(new Event('change', {bubbles: true})); })(at('refresh'))")
    browser.until("location.search.includes('refresh=10000')")
    pages.open("/analytics/explore?range=custom&from=2020-01-02T00:00:00Z&to=2020-01-01T00:00:00Z", REFUSED)
    assert "'From' must be earlier than 'To'. Swap them" in pages.text("#state")
    pages.clean_in_all_looks("a report that was refused")


@pytest.mark.slow
def test_a_lake_without_a_readable_row_is_not_called_empty(browser: Browser, daemons: Daemons, tmp_path: Path) -> None:
    damaged = tmp_path / "data" / "objects" / "telemetry" / "damaged.parquet"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"PAR1 not a file PAR1")
    daemon = daemons.start("shelf")
    browser.open(f"{daemon.url}/analytics/explore")
    browser.until("document.getElementById('state').innerText.startsWith('No row can be read. There is 1 object')")
    assert "damaged.parquet" in browser.run("document.getElementById('warnings').innerText")
