"""The dashboard in a real browser: signing in, running, pausing, verifying, healing, on a desk and on a phone."""

import hashlib
import re
from pathlib import Path

import httpx
import pytest

from browser import Browser
from daemon import Daemon, Daemons

KEY = "hw_root_" + ("root" * 11)[:43]


def entry(scopes: str) -> str:
    return f"root:{scopes}:{hashlib.sha256(KEY.encode()).hexdigest()}"


def button(within: str, text: str) -> str:
    is_it = f"x => x.textContent.startsWith('{text}') && !x.disabled"
    return f"[...(document.querySelector('{within}')?.querySelectorAll('button') ?? [])].find({is_it})"


def sign_in(browser: Browser, daemon: Daemon) -> None:
    browser.open(daemon.url)
    browser.until("document.getElementById('sign-in')?.hidden === false")
    browser.run(f"document.getElementById('key').value = '{KEY}'")
    browser.click("document.querySelector('#sign-in button[type=submit]')")
    browser.until("document.querySelectorAll('#map-shelf .map-row .cell').length >= 23", 60)


@pytest.mark.slow
def test_an_operator_signs_in_runs_pauses_verifies_and_heals(
    browser: Browser, daemons: Daemons, tmp_path: Path
) -> None:
    daemon = daemons.start("shelf", key=KEY, API_KEYS=entry("admin"))
    daemon.until(lambda: daemon.job("shelf")["runs_total"])
    browser.size(1440, 1000)
    sign_in(browser, daemon)
    assert browser.run("document.cookie") == "", "scripts must not see the key"

    before = daemon.job("shelf")["runs_total"]
    browser.click(button("#p-shelf", "Run now"))
    daemon.until(lambda: daemon.job("shelf")["runs_total"] > before)
    browser.click("document.querySelector('#p-shelf .menu > button')")
    browser.click(button("#p-shelf .menu ul", "Pause"))
    browser.until("document.querySelector('#p-shelf .state').innerText.includes('Paused')")
    assert daemon.job("shelf")["state"] == "paused"
    assert browser.run("document.querySelectorAll('#maps b').length") == 0, "a partition's name became markup"
    assert "failing failed" in browser.run("document.getElementById('verdict').innerText")
    assert "Next: create it, or set S3_BUCKET" in browser.run("document.getElementById('todo').innerText")
    assert browser.run("document.querySelector('link[rel=icon]').href").endswith("icon-bad.svg")
    assert browser.run("document.getElementById('off').innerText").startswith(
        "sleeping\nOff. Set INFLUXDB_URL to enable."
    )

    # by age, not by name: an hour of yesterday may have a later name than one of today
    shelf = sorted((tmp_path / "data" / "shelf").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    lost, other = shelf[3], shelf[6]
    text = lost.read_text()
    lost.unlink()
    other.unlink()
    (tmp_path / "data" / "hold").touch()
    browser.click(button("#map-shelf", "Verify 24 h"))
    browser.until("!!document.querySelector('#map-shelf progress[aria-label=\"shelf: windows compared\"]')")
    (tmp_path / "data" / "hold").unlink()
    browser.until("!document.querySelector('#map-shelf progress')")
    browser.until("document.querySelector('#map-shelf .head').innerText.includes('2 missing')")
    browser.until("document.getElementById('verdict').innerText.includes('2 windows are missing in shelf')", 60)
    assert "2 problems" in browser.run("document.title")
    assert "2 windows missing" in browser.run("document.querySelector('#p-shelf .state').innerText")
    browser.click("document.querySelector('#map-shelf .map-row .cell.missing')")
    browser.click(button("#map-shelf .drill", "Heal this window"))
    daemon.until(lambda: lost.exists() or other.exists())
    browser.until("document.getElementById('notice').innerText.includes('1 window written again; both ends are equal')")
    browser.until("document.querySelectorAll('#map-shelf .map-row .cell.missing').length === 1", 60)
    browser.click(button("#todo", "Heal 1 window"))
    daemon.until(lambda: lost.exists() and other.exists())
    assert lost.read_text() == text
    browser.until("document.querySelectorAll('#map-shelf .map-row .cell.missing').length === 0", 60)
    browser.until("!document.getElementById('verdict').innerText.includes('shelf')")
    assert "missing" not in browser.run("document.querySelector('#map-shelf .head').innerText")
    assert "Healed at" in browser.run("document.querySelector('#map-shelf .head').innerText"), "the result stays"
    assert not browser.run("document.getElementById('notice').hidden"), "and the notice, until it is dismissed"

    browser.size(390, 844, phone=True)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.click("document.getElementById('sign-out')")
    browser.until("document.getElementById('sign-in')?.hidden === false")
    assert [error for error in browser.errors if "401" not in error] == []


@pytest.mark.slow
def test_who_may_only_read_sees_everything_and_can_press_nothing(browser: Browser, daemons: Daemons) -> None:
    daemon = daemons.start("shelf", key=KEY, API_KEYS=entry("ops:read"))
    daemon.until(lambda: daemon.job("failing")["last_run"])
    sign_in(browser, daemon)
    browser.until("document.querySelectorAll('[data-needs]').length > 5")
    browser.until("[...document.querySelectorAll('[data-needs]')].every(x => x.disabled)")
    assert "read-only key" in browser.run("document.getElementById('who').innerText")
    assert "Next: create it, or set S3_BUCKET" in browser.run("document.body.innerText").replace("\n", " ")


def test_without_a_script_the_page_shows_jobs_to_who_may_see_them_and_to_nobody_else(daemons: Daemons) -> None:
    daemon = daemons.start("quick_jobs", key=KEY, API_KEYS=entry("ops:read"))
    ended = ("breaking", "failing", "counting")
    daemon.until(lambda: all((daemon.job(name)["last_run"] or {}).get("error") for name in ended))
    page = daemon.get("/").text
    assert re.findall(r'data-key="p-(\w+)"', page) == [job["name"] for job in daemon.get("/ops/jobs").json["jobs"]]
    assert "create it, or set S3_BUCKET" in page
    assert '<div id="board">' in page
    assert "unforeseen &lt;b&gt;markup" in page, "what an error says is text"
    assert "Ledger: 18 values counted: 12 new" in page
    assert "for example m &lt;b&gt;voltage" in page, "and what data say"
    for key in ("", KEY[:-1] + "x"):
        stranger = httpx.get(daemon.url, headers={"X-API-Key": key} if key else {})
        assert "data-key" not in stranger.text
        assert '<div id="board" hidden>' in stranger.text
