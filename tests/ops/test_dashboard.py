"""The dashboard in a real browser: signing in, running, pausing, verifying, healing, on a desk and on a phone."""

import hashlib
import re
from pathlib import Path

import httpx
import pytest

from browser import Browser
from daemon import Daemons

KEY = "hw_root_" + ("root" * 11)[:43]


def entry(scopes: str) -> str:
    return f"root:{scopes}:{hashlib.sha256(KEY.encode()).hexdigest()}"


def card(job: str) -> str:
    return f"[...document.querySelectorAll('.job')].find(x => x.querySelector('h3').textContent === '{job}')"


def button(within: str, text: str) -> str:
    is_it = f"x => x.textContent.startsWith('{text}') && !x.disabled"
    return f"[...({within})?.querySelectorAll('button') ?? []].find({is_it})"


@pytest.mark.slow
def test_an_operator_signs_in_runs_pauses_verifies_and_heals(
    browser: Browser, daemons: Daemons, tmp_path: Path
) -> None:
    daemon = daemons.start("shelf", key=KEY, API_KEYS=entry("admin"))
    daemon.until(lambda: daemon.job("shelf")["runs_total"])
    browser.size(1440, 1000)
    browser.open(daemon.url)
    browser.until("!document.getElementById('sign-in').hidden")
    browser.run(f"document.getElementById('key').value = '{KEY}'")
    browser.click("document.querySelector('#sign-in button')")
    browser.until("!document.getElementById('board').hidden")
    assert browser.run("document.cookie") == "", "scripts must not see the key"

    before = daemon.job("shelf")["runs_total"]
    browser.click(button(card("shelf"), "Run now"))
    daemon.until(lambda: daemon.job("shelf")["runs_total"] > before)
    browser.click(button(card("shelf"), "Pause"))
    browser.until(f"!!{button(card('shelf'), 'Resume')}")
    assert daemon.job("shelf")["state"] == "paused"
    browser.until("document.querySelectorAll('.mapcard .cell').length >= 23")
    assert browser.run("document.querySelectorAll('.mapcard b').length") == 0, "a partition's name became markup"

    # by age, not by name: an hour of yesterday may have a later name than one of today
    shelf = sorted((tmp_path / "data" / "shelf").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    lost, other = shelf[3], shelf[6]
    text = lost.read_text()
    lost.unlink()
    other.unlink()
    browser.click("document.querySelector('.mapcard .row button')")
    browser.until("document.querySelector('.proof')?.innerText.includes('2 missing')")
    browser.until("!!document.querySelector('button.cell.missing')", 60)
    browser.click("document.querySelector('button.cell.missing')")
    browser.until("document.getElementById('heal').open")
    browser.click("document.getElementById('heal-start')")
    daemon.until(lost.exists)
    assert lost.read_text() == text
    browser.until("document.querySelector('.proof').innerText.includes('1 missing')")
    browser.until("document.querySelectorAll('.mapcard .cell.missing').length === 1")
    browser.click(button("document.querySelector('.verdicts')", "Heal"))
    daemon.until(other.exists)
    browser.until("!document.querySelector('.verdicts')")
    browser.until("document.querySelectorAll('.mapcard .cell.missing').length === 0")
    assert "missing" not in browser.run("document.querySelector('.proof').innerText")

    browser.click(button(card("shelf"), "Resume"))
    browser.until(f"!!{button(card('shelf'), 'Pause')}")
    browser.size(390, 844, phone=True)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.click("document.getElementById('sign-out')")
    browser.until("!document.getElementById('sign-in').hidden")
    assert [error for error in browser.errors if "401" not in error] == []


@pytest.mark.slow
def test_who_may_only_read_sees_everything_and_can_press_nothing(browser: Browser, daemons: Daemons) -> None:
    daemon = daemons.start("shelf", key=KEY, API_KEYS=entry("ops:read"))
    daemon.until(lambda: daemon.job("failing")["last_run"])
    browser.open(daemon.url)
    browser.until("!document.getElementById('sign-in').hidden")
    browser.run(f"document.getElementById('key').value = '{KEY}'")
    browser.click("document.querySelector('#sign-in button')")
    browser.until("document.querySelectorAll('.mapcard .cell').length >= 23", 60)
    assert browser.run("[...document.querySelectorAll('#board button')].filter(x => !x.disabled).length") == 0
    assert "Next: create it, or set S3_BUCKET" in browser.run("document.body.innerText").replace("\n", " ")


def test_without_a_script_the_page_shows_jobs_to_who_may_see_them_and_to_nobody_else(daemons: Daemons) -> None:
    daemon = daemons.start("quick_jobs", key=KEY, API_KEYS=entry("ops:read"))
    ended = ("breaking", "failing", "counting")
    daemon.until(lambda: all((daemon.job(name)["last_run"] or {}).get("error") for name in ended))
    page = daemon.get("/").text
    assert re.findall(r"<h3>(\w+)</h3>", page) == [job["name"] for job in daemon.get("/ops/jobs").json["jobs"]]
    assert "create it, or set S3_BUCKET" in page
    assert '<div id="board">' in page
    assert "unforeseen &lt;b&gt;markup" in page, "what an error says is text"
    assert "<dt>Ledger</dt><dd>18 values counted: 12 new" in page
    assert "for example m &lt;b&gt;voltage" in page, "and what data say"
    for key in ("", KEY[:-1] + "x"):
        stranger = httpx.get(daemon.url, headers={"X-API-Key": key} if key else {})
        assert "<h3>" not in stranger.text
        assert '<div id="board" hidden>' in stranger.text
