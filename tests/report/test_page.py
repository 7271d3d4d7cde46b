"""The page of a report: every section, in one file that needs nothing else; names of any kind; what is not there."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from pages import MADE, ODD, make_model, make_report, make_run
from rkd_cli.commands.compare import Comparison, Group
from rkd_cli.commands.report import Model, Picture, Report, SetReport
from rkd_cli.report import svg, views
from rkd_cli.report.gallery import Answer, Gallery, Query
from rkd_cli.report.page import comparison_html, report_html

VOID = {"meta", "br", "hr", "img", "input", "link"}
Attributes = dict[str, str]


class Page(HTMLParser):
    """The elements of a page, each with its attributes and the text inside it; fails where they are not nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, Attributes, list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, {name: value or "" for name, value in attrs}, text))
        if tag not in VOID:
            self._open.append((tag, text))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)

    def all(self, tag: str) -> list[tuple[Attributes, str]]:
        return [(attributes, "".join(text).strip()) for name, attributes, text in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for _, text in self.all(tag)]


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(report_html(report))


def test_every_section_is_there_and_named(page: Page) -> None:
    assert page.texts("h1") == ["Report on 3 runs"]
    assert page.texts("title")[0] == "Report on 3 runs"
    assert page.texts("h2") == [
        "Which model", "Recall", "Student against teacher", "Recall by class", "Gallery", "Confused classes",
        "Embedding map", "Runs", "Learning curves", "Settings that differ",
    ]  # fmt: skip
    targets = [attributes["href"] for attributes, _ in page.all("a")]
    sections = [f"#{attributes['id']}" for attributes, _ in page.all("section")]
    assert targets == sections
    assert page.all("html")[0][0] == {"lang": "en"}


def test_the_page_needs_nothing_else(report: Report) -> None:
    html = report_html(report)
    assert not re.search(r"https?://|src=|url\(|@import|<link|\sstyle=|\son\w+=", html)
    page = Page(html)
    outside = [a[key] for _, a, _ in page.elements for key in ("href", "xlink:href") if key in a]
    assert all(target.startswith(("#", "data:image/webp;base64,")) for target in outside)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    assert {target[1:] for target in outside if target.startswith("#")} <= {*ids}


def test_pictures_tables_and_headings_say_what_they_are(page: Page) -> None:
    for attributes, text in page.all("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"], bool(attributes["aria-label"])) == (
            "img", True,
        ), text  # fmt: skip
    assert len(page.all("caption")) == len(page.all("table")) == 6
    assert all(text for text in page.texts("caption"))
    assert all(attributes.get("scope") in ("col", "row") for attributes, _ in page.all("th"))
    labels = [attributes["aria-label"] for attributes, _ in page.all("svg") if "aria-label" in attributes]
    assert "query: Owl (Owl.jpg)" in labels
    assert "Owl, right (Owl.jpg)" in labels
    assert "class 1, wrong (Owl.jpg)" in labels
    assert "Loss: dist by epoch; student" not in labels
    assert "Loss: dist by epoch: student from 0.4 to 0.2; other from 0.4 to 0.2" in labels
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_names_of_any_kind_are_text(report: Report) -> None:
    odd = make_report(student=ODD, label=ODD)
    part = replace(odd.sets[0], title=ODD, notes=(ODD,))
    html = report_html(replace(odd, sets=(part,), problems=(ODD,), machine=ODD))
    page = Page(html)
    assert html.count("<script") == 1  # the page's own
    assert "<b>x" not in html
    assert [tag for tag, _, _ in page.elements].count("title") == [
        tag for tag, _, _ in Page(report_html(report)).elements
    ].count("title")
    assert ODD in page.texts("h3")  # as it was given, newline and all
    assert page.texts("li").count(ODD) >= 3  # a problem, a note, a class of the legend
    assert f"runs/{ODD}" in page.texts("dd")
    labels = [attributes["aria-label"] for attributes, _ in page.all("svg") if "aria-label" in attributes]
    assert f"query: {ODD} ({ODD}.jpg)" in labels
    assert any(label.startswith(f"Loss: dist by epoch: {ODD} from") for label in labels)
    assert f"{ODD}: 2 images" in page.texts("title")


def test_each_picture_is_in_the_file_once(report: Report) -> None:
    html = report_html(report)
    assert html.count("data:image/webp") == 4
    assert html.count('<use href="#p0-') == 2 * (1 + 3 * 3) + 2
    assert html.count('<use href="#mark-right"') == 2 * 3
    assert html.count('<use href="#mark-wrong"') == 2 * 6
    assert html.count('class="pic right"') == 2 * 3
    pictures = {**report.sets[0].pictures, 1: Picture(None, "gone.jpg", "Owl")}
    html = report_html(replace(report, sets=(replace(report.sets[0], pictures=pictures),)))
    assert html.count("data:image/webp") == 3
    assert html.count('<use href="#gone"/>') == 2 * 3


def test_the_best_run_is_marked_and_the_teacher_does_not_compete(report: Report) -> None:
    styles = views.styles_of(report)
    table = views.figures_table(report.sets[0], ["student", "other"], styles)
    assert table["columns"] == ["best epoch", "R@1", "R@2", "R-Precision", "MAP@R", "last epoch", "training"]
    best = {row["title"]: [cell["text"] for cell in row["cells"] if cell["best"]] for row in table["rows"]}
    assert best == {"teacher": [], "student": ["60.00", "70.00", "30.00", "20.00"], "other": ["30.00", "20.00"]}
    alone = views.figures_table(report.sets[0], ["student"], styles)
    assert next(cell["text"] for cell in alone["rows"][0]["cells"] if cell["best"]) == "80.00"
    html = report_html(report)
    assert html.count('<strong>60.00</strong><span class="star"') == 1


def test_costs_stand_beside_their_share_of_the_teachers(report: Report) -> None:
    table = views.cost_table(report.sets[0])
    assert table["columns"] == ["teacher", "student", "other"]
    rows = {row["title"]: [(cell["text"], cell["share"]) for cell in row["cells"]] for row in table["rows"]}
    assert [*rows] == [
        "Parameters", "FLOPs an image", "File", "Embedding", "Time of 1 image, 1 thread", "Time of 32 images, 1 thread",
        "Time of 1 image, 2 threads", "Time of 32 images, 2 threads", "Recall@1, %", "Recall@2, %",
    ]  # fmt: skip
    assert rows["Parameters"] == [("10 M", None), ("1 M", 0.1), ("2 M", 0.2)]
    assert rows["FLOPs an image"][1] == ("400 M", 0.1)
    assert rows["File"][2] == ("8.0 MB", 0.2)
    assert rows["Embedding"][1] == ("256 bytes", 1.0)
    assert rows["Time of 32 images, 2 threads"] == [("160 ms", None), ("16 ms", 0.1), ("32 ms", 0.2)]
    assert rows["Recall@1, %"][1] == ("60.00", 0.6 / 0.8)
    assert views.summary_of(report.sets[0])[0] == (
        "student reaches 75.0 % of the Recall@1 of teacher (60.00 of 80.00) at 10 % of the parameters, 10 % of the "
        "FLOPs and 10 % of the time for an image on one thread."
    )


def test_a_fact_that_a_template_names_and_nobody_gives_is_an_error(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "_cell", lambda text, *_, **__: {"text": text, "best": False, "value": 0})
    with pytest.raises(UndefinedError, match="'recorded'"):
        report_html(report)


def test_what_is_not_there_is_left_out_and_said() -> None:
    going_on = make_run("early", None, status="running")
    stopped = make_run("cut", 0.5, status="stopped", reached=1)
    part = SetReport(
        "cub200, data", 0, 0, (Model("early", False, going_on), Model("cut", False, stopped)), notes=("why",)
    )
    page = Page(report_html(Report((going_on, stopped), (), (part,), (), (), "a machine", MADE, 1)))
    assert page.texts("h2") == ["Recall", "Runs", "Learning curves"]
    assert "running: no epoch yet" in page.texts("span")
    assert "stopped: 1 of 2 epochs done" in page.texts("span")
    assert "why" in page.texts("li")
    assert "50.00†" in page.texts("td")  # recorded by the run
    page = Page(report_html(Report((going_on,), (), (part,), (), (), "a machine", MADE, 1)))
    assert page.texts("h2") == ["Recall", "Runs"]
    assert page.texts("h1") == ["Report on early"]


def test_photos_have_no_classes(report: Report) -> None:
    part = report.sets[0]
    assert part.map
    pictures = {number: replace(picture, label=None) for number, picture in part.pictures.items()}
    answers = (Answer(1, None), Answer(2, None))
    query = Query(0, (answers, (Answer(1, True), Answer(3, False)), answers))
    models = tuple(replace(model, recall={}, r_precision=None, map_at_r=None) for model in part.models)
    part = replace(
        part, classes=0, models=models, galleries=(Gallery("The hardest", "", (query,)),), confusions=(),
        pictures=pictures, map=replace(part.map, labels=None),
    )  # fmt: skip
    html = report_html(replace(report, sets=(part,)))
    page = Page(html)
    assert "Confused classes" not in page.texts("h2")
    assert "Student against teacher" in page.texts("h2")
    assert "R-Precision" not in page.texts("th")
    assert 'class="classes"' not in html
    labels = [attributes["aria-label"] for attributes, _ in page.all("svg") if "aria-label" in attributes]
    assert "query: (Owl.jpg)" in [" ".join(label.split()) for label in labels]
    assert html.count('class="pic right"') == html.count('class="pic wrong"') == 1


def test_a_curve_is_where_its_points_are() -> None:
    chart = svg.line_chart("Loss: a", [("x", 9, [(0, 0.0), (5, 1.0), (10, 0.5)]), ("none", 0, [])])
    bottom, top = svg.HEIGHT - svg.BOTTOM, svg.TOP
    assert chart["y_ticks"][0] == {"at": bottom, "label": "0.0"}
    assert chart["y_ticks"][-1] == {"at": top, "label": "1.0"}
    assert [tick["label"] for tick in chart["y_ticks"]] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [tick["label"] for tick in chart["x_ticks"]] == ["0", "2", "4", "6", "8", "10"]
    (line,) = chart["lines"]
    middle = (svg.LEFT + svg.WIDTH - svg.RIGHT) / 2
    assert line["path"] == f"M{svg.LEFT} {bottom}L{middle:g} {top}L{svg.WIDTH - svg.RIGHT} {(top + bottom) / 2:g}"
    assert (line["color"], line["dash"]) == (1, 1)
    assert chart["about"] == "Loss: a by epoch: x from 0 to 0.5"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([3.0], ["1", "2", "3", "4", "5"]),
        ([0.0], None),
        ([-2.0, -2.0], None),
        ([1e-7, 3e-7], None),
        ([1e12, 5e12], None),
        ([0.3, float("inf"), float("nan")], None),
        ([float("nan")], None),
        ([52.3, 52.4], None),
    ],
)
def test_axes_hold_their_values(values: list[float], labels: list[str] | None) -> None:
    chart = svg.line_chart("t", [("x", 0, list(enumerate(values)))])
    assert 2 <= len(chart["y_ticks"]) <= 8
    assert labels is None or [tick["label"] for tick in chart["y_ticks"]] == labels
    assert len({tick["label"] for tick in chart["y_ticks"]}) == len(chart["y_ticks"])
    for line in chart["lines"]:
        assert all(svg.LEFT <= x <= svg.WIDTH - svg.RIGHT for x, *_ in line["dots"])
        assert all(svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM for _, y, _ in line["dots"])


def test_forty_eight_classes_can_be_told_apart() -> None:
    report = make_report(classes=48)
    assert report.sets[0].map
    view = views.map_view(report.sets[0].map)
    assert len({(entry["color"], entry["shape"]) for entry in view["legend"]}) == 48
    assert [entry["name"] for entry in view["legend"]] == sorted({*(report.sets[0].map.labels or ())})
    clusters = view["planes"][0][2]
    assert [cluster["points"] for cluster in clusters] == [2] * 48
    assert clusters[0]["path"].count("M") == 2
    (above,) = svg.clusters([(-1.0, 1.0)], None, {})
    assert above["path"].startswith("M10 10m")  # the left upper corner, but for a margin
    html = report_html(report)
    assert len(re.findall(r'<li class="k\d" data-k=', html)) == 48
    assert len(html) < 200_000


def test_the_page_of_a_comparison() -> None:
    runs = (make_run("a", 0.6).facts, make_run(ODD, 0.4).facts)
    runs = (runs[0], replace(runs[1], seed=2))
    group = Group(runs, 2, {"R@1": 0.5, "R@2": 0.6, "seconds": 61.0}, {"R@1": 0.1414, "R@2": 0.1414, "seconds": 0.0})
    later = replace(
        make_run("b", 0.3, status="stopped", reached=1).facts, facts={**runs[0].facts, "data": "folder other"}
    )
    html = comparison_html(Comparison((group, Group((later,), 0, {}, {})), ("data",), (f"{ODD}: no run",)), MADE)
    page = Page(html)
    assert html.count("<script") == 1
    assert page.texts("h1") == ["Comparison of 3 runs"]
    assert page.texts("h2") == ["folder photos", "folder other"]
    assert "<p>All: network resnet18 64-d, loss proxy_anchor.</p>" in html
    assert "All:" not in comparison_html(Comparison((Group(runs[:1], 1, {}, {}),), (), ()), MADE)
    assert html.count("★<span") == 2  # R@1 and R@2 of the best run; one alone is not marked
    assert "<strong>60.00</strong>" in html
    assert "50.00 ± 14.14" in page.texts("td")
    assert "stopped, 1/2" in page.texts("td")
    assert f"{ODD}: no run" in page.texts("li")
    names = [text for attributes, text in page.all("th") if attributes.get("scope") == "row"]
    assert names[:2] == ["mean of 2 seeds", "a"]
    assert ODD.endswith(names[2])  # the end of its path, which is all in the title
    assert f"runs/{ODD}" in [attributes.get("title") for attributes, _ in page.all("th")]
    assert not re.search(r"https?://|src=|url\(", html)


def test_a_comparison_shows_the_concatenated_models_of_folds() -> None:
    runs = tuple(
        replace(make_run(f"f{part}", 0.5).facts, fold=f"{part}/2", facts={"data": "d", "folds": 2}) for part in (1, 2)
    )
    found = Comparison((Group(runs, 1, {}, {}),), (), (), concatenated=({1: {"R@1": 0.625}},))
    page = Page(comparison_html(found, MADE))
    assert "Concatenated embeddings" in page.texts("h2")
    assert "concatenated embeddings of the 2 fold models like f1, 1 seed: R@1 62.50" in page.texts("li")


def test_the_policy_allows_the_pages_own_script_and_style_alone(report: Report) -> None:
    html = report_html(report)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy and "HASH" not in html


def with_seeds(report: Report) -> Report:
    """The student has a second seed, of Recall@1 50 in place of 60."""
    first, other = report.runs
    alike: dict[str, Any] = {"identity": "same", "path": Path("runs/students/seed-1")}
    one = replace(first, name="seed-1", facts=replace(first.facts, **alike))
    second = make_run("seed-2", 0.5, "teacher", **alike | {"path": Path("runs/students/seed-2"), "seed": 2})
    models = (
        report.sets[0].models[0],
        *(make_model(run, False, 0.1) for run in (one, second)),
        report.sets[0].models[2],
    )
    part = replace(report.sets[0], models=models, compared=("teacher", "seed-1", "other"), map=None)
    return replace(report, runs=(one, second, other), sets=(part,))


def test_runs_that_differ_by_seed_are_one_entry_with_its_spread(report: Report) -> None:
    found = with_seeds(report)
    page = Page(report_html(found))
    title = "students (2 seeds)"
    assert title in page.texts("h3") and "seed-2" not in page.texts("h3")  # one card
    names = [
        row["title"] for row in views.figures_table(found.sets[0], ["seed-1", "other"], views.styles_of(found))["rows"]
    ]
    assert names == ["teacher", title, "seed-1", "seed-2", "other"]
    assert "55.00 ± 7.07" in page.texts("td")
    assert views.cost_table(found.sets[0])["columns"] == ["teacher", title, "other"]
    assert views.summary_of(found.sets[0])[0].startswith(
        f"{title} reaches 68.8 % of the Recall@1 of teacher (55.00 ± 7.07 of 80.00)"
    )
    styles = views.styles_of(found)
    assert styles[title] == styles["seed-1"] == styles["seed-2"] != styles["other"]
    (chart,) = (
        one for one in views.recall_charts(views.groups_of(found.runs), styles) if one["title"].startswith("R@1 on e")
    )
    band = next(line for line in chart["lines"] if line["name"] == title)
    assert band["dots"][-1][2] == f"{title}, epoch 2: 55 (50 to 60)"
    assert band["band"].count("L") == 5
    table = views.differing_table(found)
    assert table["rows"][-1]["title"] == "seed" and [cell["text"] for cell in table["rows"][-1]["cells"]] == [
        "1, 2",
        "1",
    ]


def test_a_chart_of_models_has_a_line_through_those_worth_their_size() -> None:
    facts = [(1, 20.0), (10, 40.0), (100, 30.0), (1000, 60.0)]
    points = [
        {"x": x, "y": y, "style": 0, "spread": 5.0 if x == 10 else 0.0, "label": f"{x} MB", "tip": f"{x}: {y}"}
        for x, y in facts
    ]
    chart = svg.scatter("t", points, "MB", "%", "{:g}".format)
    best = [point["is_best"] for point in chart["points"]]
    assert best == [True, True, False, True]
    places = [(point["x"], point["y"]) for point in chart["points"]]
    apart = [b[0] - a[0] for a, b in pairwise(places)]
    assert max(apart) - min(apart) < 0.3  # equal factors are equally far apart
    assert places[1][1] < places[2][1] < places[0][1]
    assert [bool(point["bar"]) for point in chart["points"]] == [False, True, False, False]
    corners = [tuple(map(float, place.split())) for place in chart["front"][1:].split("L")]
    assert corners[:5] == [places[0], (places[1][0], places[0][1]), places[1], (places[3][0], places[1][1]), places[3]]
    assert [tick["label"] for tick in chart["x_ticks"]][:3] == ["1", "10", "100"]
    labels = [point["label"] for point in chart["points"]]
    assert [label[3] for label in labels] == ["1 MB", "10 MB", "100 MB", "1000 MB"]
    crowded = [{**points[0], "x": 10 + number / 100} for number in range(40)]
    assert sum("label" in point for point in svg.scatter("t", crowded, "", "", str)["points"]) < 9
    alone = svg.scatter("t", [{**points[0], "x": 9.7}], "", "", str)["x_ticks"]
    assert 2 < len(alone) <= 8


def test_smaller_vectors_are_listed_with_what_they_reach(report: Report) -> None:
    part = report.sets[0]
    rows = views.vector_table(part, views.styles_of(report))
    assert [(row["bytes"], row["title"], row["best"]) for row in rows[:4]] == [
        (64, "teacher", True), (64, "teacher", False), (64, "student", False), (64, "student", False),
    ]  # fmt: skip
    assert (
        "student needs 64 bytes a vector (64 dimensions, int8) for 59.50: at most 1 point below its best vectors."
        in (views.summary_of(part))
    )
    assert [chart["title"] for chart in views.choice_charts(part, views.styles_of(report))] == [
        "Recall@1 and size of the model", "Recall@1 and time of an image", "Recall@1 and size of a vector",
    ]  # fmt: skip


def test_the_worst_class_is_first(report: Report) -> None:
    table = views.class_table(report.sets[0])
    assert table["columns"] == ["teacher", "student", "other"]
    assert [(row["title"], row["images"], row["shares"]) for row in table["rows"]] == [
        ("class 1", 7, [0.4, 0.3, 0.2]), ("class 2", 1200, [0.8, 0.6, 0.4]),
    ]  # fmt: skip


def test_the_templates_travel_with_the_package() -> None:
    folder = files("rkd_cli.report") / "templates"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "base.html.j2",
        "card.md.j2",
        "compare.html.j2",
        "layout.md.j2",
        "openapi.json",
        "parts.html.j2",
        "report.html.j2",
        "script.js",
        "search.html.j2",
        "serve.css",
        "serve.html.j2",
        "serve.js",
        "snippet.js.j2",
        "snippet.py.j2",
        "style.css",
    }
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'packages = ["rkd_cli"]' in project
    assert "exclude" not in project
