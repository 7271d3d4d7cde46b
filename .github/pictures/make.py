"""Make the README's pictures (`make pictures`): train the demo, and draw its screen and the gallery of its report."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from rkd_cli.commands.demo import run_demo
from rkd_cli.commands.report import SetReport, measure_report
from rkd_cli.events import Event, RunDone, RunStarted, StepDone, silent
from rkd_cli.screen.terminal import LiveScreen, reporter
from rkd_cli.settings import DemoSettings, ReportSettings

HERE = Path(__file__).resolve().parent
SIDE, GAP, FRAME = 96, 10, 4  # pixels
RIGHT, WRONG, INK = "#1a7f37", "#cf222e", "#1f2328"


class Camera:
    """Passes events on, and keeps the screen of the last distillation in its last epoch."""

    def __init__(self, screen: LiveScreen, console: Console, other: object) -> None:
        self.screen, self.console, self.other = screen, console, other
        self.run: RunStarted | None = None
        self.svg = ""

    def __call__(self, event: Event, /) -> None:
        self.other(event)  # type: ignore[operator]
        if isinstance(event, RunStarted):
            self.run = event
        if not isinstance(event, RunDone):
            self.screen(event)
        if isinstance(event, StepDone) and self.run and self.run.teacher:
            half = event.step >= self.run.steps_per_epoch // 2
            if half and event.epoch == self.run.epochs:
                self.console.print(self.screen.render())
                self.svg = self.console.export_svg(title="rkd distill", clear=True)


def draw_gallery(found: SetReport, queries: int) -> Image.Image:
    """Queries with the five nearest images by each model, from the galleries where teacher and student differ."""
    galleries = [gallery for gallery in found.galleries if "wrong by" in gallery.title] or found.galleries
    chosen = [query for gallery in galleries for query in gallery.queries[:queries]]
    label, step = 90, SIDE + GAP
    rows = len(chosen) * len(found.compared)
    picture = Image.new("RGB", (label + step * 6 + 3 * GAP, GAP + rows * step + len(chosen) * GAP), "white")
    draw, font, y = ImageDraw.Draw(picture), ImageFont.load_default(size=15), GAP

    def paste(image: int, x: int, y: int, right: bool | None) -> None:
        webp = found.pictures[image].webp
        if webp:
            picture.paste(Image.open(io.BytesIO(webp)).convert("RGB").resize((SIDE, SIDE)), (x, y))
        if right is not None:
            color = RIGHT if right else WRONG
            draw.rectangle((x - FRAME // 2, y - FRAME // 2, x + SIDE, y + SIDE), outline=color, width=FRAME)
            draw.rectangle((x + SIDE - 20, y + SIDE - 20, x + SIDE, y + SIDE), fill=color)
            x, y = x + SIDE - 16, y + SIDE - 16
            mark = [(x, y + 7), (x + 4, y + 12), (x + 12, y + 1)] if right else [(x, y), (x + 12, y + 12)]
            draw.line(mark, fill="white", width=3)
            if not right:
                draw.line([(x, y + 12), (x + 12, y)], fill="white", width=3)

    for query in chosen:
        paste(query.image, label, y, None)
        draw.text((label, y + SIDE + 2), "query", INK, font)
        for name, answers in zip(found.compared, query.answers, strict=True):
            draw.text((GAP, y + SIDE // 2 - 8), name.rsplit("/", 1)[-1], INK, font)
            for place, answer in enumerate(answers, 1):
                paste(answer.image, label + 2 * GAP + place * step, y, answer.right)
            y += step
        y += GAP
    return picture


def main() -> None:
    """Train in a temporary folder, and write both pictures beside this file."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["RKD_CACHE_DIR"] = "cache"  # no path of this machine is in the picture
        console = Console(record=True, width=100, height=34, force_terminal=True, file=io.StringIO())
        with reporter(quiet=False) as told:
            camera = Camera(LiveScreen(console), console, told)
            run_demo(DemoSettings(), camera)
        (HERE / "dashboard.svg").write_text(camera.svg, encoding="utf-8")
        found = measure_report([Path("demo/student")], ReportSettings(), silent)
        draw_gallery(found.sets[0], 1).quantize(256).save(HERE / "gallery.png", optimize=True)
    sys.stdout.write(f"{HERE}: dashboard.svg, gallery.png\n")


if __name__ == "__main__":
    main()
