"""Pages in a real browser: nothing is complained of, pictures decode, and no width makes the page itself scroll."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from pages import MADE, ODD, make_report, make_run
from rkd_cli.commands.compare import Comparison, Group
from rkd_cli.report.gallery import Confusion
from rkd_cli.report.page import comparison_html, report_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3
# outside of the page, whose policy allows no other script; all of it is done within the load event, which is waited for
PROBE = """<script>
document.addEventListener("load", event => {
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const context = document.createElement("canvas").getContext("2d");
  const decoded = [...page.querySelectorAll("img[hidden]")].map(image => {
    try { context.drawImage(image, 0, 0); } catch { return 0; }
    return image.naturalWidth;
  });
  const widths = selector => [...page.querySelectorAll(selector)].map(one => one.getBoundingClientRect().width);
  const uses = [...page.querySelectorAll("use")];
  const found = {
    width: view.innerWidth, scroll: page.documentElement.scrollWidth, decoded, shown: widths("svg.pic"),
    lost: uses.filter(use => !page.querySelector(use.getAttribute("href"))).length,
    paper: view.getComputedStyle(page.body).backgroundColor, title: page.title, scripts: page.scripts.length,
  };
  const table = page.querySelector("table.sort:has(.mean), #figures-0 table");
  const first = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent.trim());
  if (table) {
    const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === "R@1");
    const button = table.tHead.rows[0].cells[at].querySelector("button");
    button.click();
    found.falling = first();
    button.click();
    found.rising = first();
  }
  const dot = page.querySelector(".chart .dot");
  if (dot) {
    const box = dot.getBoundingClientRect(), where = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    dot.closest("svg").dispatchEvent(new view.PointerEvent("pointermove", where));
    found.tip = page.querySelector(".tip").textContent;
  }
  const picture = page.querySelector(".query .pic");
  if (picture) {
    picture.dispatchEvent(new view.KeyboardEvent("keydown", {key: "Enter"}));
    const dialog = page.querySelector("dialog[open]");
    found.enlarged = [dialog?.querySelector("p").textContent, dialog?.querySelector("img").src.slice(0, 15)];
  }
  document.body.dataset.found = JSON.stringify(found);
}, true);
</script>"""
# a window has 500 pixels at least, a frame as few as it is given
FRAME = """<!DOCTYPE html><title>a frame</title><body>PROBE
<iframe srcdoc="COPY" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def in_browser(html: str, folder: Path, width: int, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """What the probe finds in a copy of the page, and what the console says."""
    images = [f'<img hidden src="{uri}">' for uri in re.findall(r'<image [^>]*href="([^"]+)"', html)]
    frame, copy = folder / "frame.html", escape(html.replace("</body>", f"{''.join(images)}</body>"))
    text = FRAME.replace("PROBE", PROBE).replace("WIDTH", str(width)).replace("COPY", copy)
    frame.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--no-first-run", "--enable-logging=stderr", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1000",
            *flags, "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("names", ["plain", "odd", "long"])
def test_a_report_in_a_browser(tmp_path: Path, width: int, names: str) -> None:
    name = {"plain": "Owl", "odd": ODD, "long": LONG}[names]
    report = make_report(student=name if names != "plain" else "student", label=name, classes=48)
    part = replace(report.sets[0], notes=(f"{name}: {name}",))
    part = replace(part, confusions=(*part.confusions, Confusion(name, name, (1, 1, 1), 3, 0, 1)))
    found, console = in_browser(report_html(replace(report, sets=(part,))), tmp_path, width)
    assert console == []
    assert found["decoded"] == [112] * 4
    assert found["lost"] == 0
    assert len(found["shown"]) == 24
    assert min(found["shown"]) > 40
    assert (found["width"], found["scroll"]) == (width, width)
    assert found["title"] == "Report on 3 runs"  # with that of the teacher
    assert found["scripts"] == 1
    assert found["rising"] == ["other", name if names != "plain" else "student", "teacher"] == found["falling"][::-1]
    assert found["tip"].endswith(" MB") and "% at" in found["tip"]
    assert found["enlarged"] == [f"query: {name} ({name}.jpg)", "data:image/webp"]


@pytest.mark.parametrize("width", [400, 1400])
def test_a_comparison_in_a_browser(tmp_path: Path, width: int) -> None:
    runs = tuple(replace(make_run(name, 0.5).facts, seed=seed) for seed, name in enumerate(("a", ODD, LONG)))
    group = Group(runs, 3, {"R@1": 0.5, "seconds": 1.0}, {"R@1": 0.0, "seconds": 0.0})
    found, console = in_browser(comparison_html(Comparison((group,), (), (LONG,)), MADE), tmp_path, width)
    assert console == []
    assert (found["width"], found["scroll"]) == (width, width)
    assert found["falling"][0] == "mean of 3 seeds"  # its runs stay below it


def test_light_and_dark(tmp_path: Path) -> None:
    html = report_html(make_report())
    papers = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        found, _ = in_browser(html, tmp_path, 800, f"--blink-settings=preferredColorScheme={number}")
        papers[scheme] = [int(part) for part in re.findall(r"\d+", found["paper"])]
    assert max(papers["dark"]) < 60
    assert min(papers["light"]) > 240


def test_the_probe_notices(tmp_path: Path) -> None:
    html = report_html(make_report())
    broken = re.sub(r"(data:image/webp;base64,.{60})[^\"]*", r"\1AAAA", html, count=1)
    broken = broken.replace("body { margin: 0;", "body { margin: 0; width: 2100px;")
    digest = base64.b64encode(
        hashlib.sha256(re.findall("<style>(.*?)</style>", broken, re.DOTALL)[0].encode()).digest()
    )
    broken = re.sub(r"style-src 'sha256-[^']+'", f"style-src 'sha256-{digest.decode()}'", broken)
    broken = broken.replace("</main>", "<script>alert(1)</script></main>")  # which the policy refuses
    found, console = in_browser(broken, tmp_path, 800)
    assert sorted(found["decoded"]) == [0, 112, 112, 112]
    assert found["scroll"] > 2000
    assert len(console) == 1 and "Content Security Policy" in console[0]
