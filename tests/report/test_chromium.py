"""Pages in a real browser: nothing is complained of, pictures decode, and no width makes the page itself scroll."""

from __future__ import annotations

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
# all of it is done within the load event, which is waited for
PROBE = """IMAGES<script>
addEventListener("load", () => {
  const context = document.createElement("canvas").getContext("2d");
  const decoded = [...document.querySelectorAll("img")].map(image => {
    try { context.drawImage(image, 0, 0); } catch { return 0; }
    return image.naturalWidth;
  });
  const widths = selector => [...document.querySelectorAll(selector)].map(one => one.getBoundingClientRect().width);
  const uses = [...document.querySelectorAll("use")];
  parent.document.body.dataset.found = JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth, decoded, shown: widths("svg.pic"),
    lost: uses.filter(use => !document.querySelector(use.getAttribute("href"))).length,
    paper: getComputedStyle(document.body).backgroundColor, title: document.title, scripts: document.scripts.length,
  });
});
</script></body>"""
# a window has 500 pixels at least, a frame as few as it is given
FRAME = """<!DOCTYPE html><title>a frame</title><body>
<iframe srcdoc="COPY" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def in_browser(html: str, folder: Path, width: int, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """What the probe finds in a copy of the page, and what the console says."""
    images = [f'<img hidden src="{uri}">' for uri in re.findall(r'<image [^>]*href="([^"]+)"', html)]
    frame, copy = folder / "frame.html", escape(html.replace("</body>", PROBE.replace("IMAGES", "".join(images))))
    frame.write_text(FRAME.replace("WIDTH", str(width)).replace("COPY", copy), encoding="utf-8")
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
    assert found["scripts"] == 1  # the probe


@pytest.mark.parametrize("width", [400, 1400])
def test_a_comparison_in_a_browser(tmp_path: Path, width: int) -> None:
    runs = tuple(replace(make_run(name, 0.5).facts, seed=seed) for seed, name in enumerate(("a", ODD, LONG)))
    group = Group(runs, 3, {"R@1": 0.5, "seconds": 1.0}, {"R@1": 0.0, "seconds": 0.0})
    found, console = in_browser(comparison_html(Comparison((group,), (), (LONG,)), MADE), tmp_path, width)
    assert console == []
    assert (found["width"], found["scroll"]) == (width, width)


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
    broken = broken.replace("</main>", "<div style='width:2000px'>wide</div><script>console.error('x')</script></main>")
    found, console = in_browser(broken, tmp_path, 800)
    assert sorted(found["decoded"]) == [0, 112, 112, 112]
    assert found["scroll"] > 2000
    assert len(console) == 1
