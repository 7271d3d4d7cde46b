"""rkd compare: what runs' directories hold, side by side; seeds together; unfinished and damaged ones said as such."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from safetensors.numpy import save_file

from rkd_cli.commands.compare import Comparison, RunFacts, compare_runs
from rkd_cli.data import load_dataset
from rkd_cli.embedding.loaded import load
from rkd_cli.errors import DataError
from rkd_cli.events import silent
from rkd_cli.report.comparison import comparison_facts, comparison_table, difference_lines
from rkd_cli.screen import comparison
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve_grid
from rkd_cli.training.loop import train
from rkd_cli.training.open import build_run

Rkd = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # runs are named from here, as people name them


def write_run(
    name: str, figures: dict[str, float] | None = None, *, last: float = 0.25, rows: Sequence[Any] = (), **settings: Any
) -> Path:
    """A run's directory; with ``figures`` it is done, with ``rows`` it is not."""
    path = Path(name)
    path.mkdir(parents=True)
    settings = {"dataset": "cub200", "epochs": 8, **settings}
    model = DistillSettings(**settings) if "teacher" in settings else TeacherSettings(**settings)
    (path / "settings.json").write_text(model.model_dump_json())
    if figures:
        best = {f"R@{name}" if name.isdigit() else name: value for name, value in figures.items()}
        final = {next(iter(best)): last}
        result = {"best": {"eval": best}, "final": {"eval": final}}
        (path / "result.json").write_text(
            json.dumps(result | {"selected_on": "eval", "best_epoch": 3, "seconds": 61.0})
        )
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(epoch: int, recall: float | None, is_best: bool = False) -> dict[str, Any]:
    found = {} if recall is None else {"eval": {"R@1": recall, "R@2": recall + 0.1}}
    return {"epoch": epoch, "losses": {}, "learning_rate": 0.1, "seconds": 10.0, "is_best": is_best, "figures": found}


def runs_of(found: Comparison) -> list[RunFacts]:
    return [run for group in found.groups for run in group.runs]


def test_seeds_come_together_with_mean_and_sample_deviation() -> None:
    scores = {1: 0.50, 2: 0.56, 3: 0.53}
    paths = [write_run(f"a-{seed}", {"1": r, "2": r + 0.1}, last=r - 0.1, seed=seed) for seed, r in scores.items()]
    other = write_run("b-1", {"1": 0.54}, lr=0.5)
    found = compare_runs([*paths, other])
    assert [[str(run.path) for run in group.runs] for group in found.groups] == [["b-1"], ["a-2", "a-3", "a-1"]]
    alone, seeds = found.groups
    assert (alone.seeds, alone.mean) == (1, {})
    assert seeds.seeds == 3
    assert seeds.mean == pytest.approx({"R@1": 0.53, "R@2": 0.63, "last": 0.43, "seconds": 61})
    assert seeds.deviation["R@1"] == pytest.approx(0.03)  # of 3 - 1 degrees of freedom
    assert seeds.deviation["R@1"] == pytest.approx(statistics.stdev(scores.values()))
    assert found.differing == ("lr",)
    assert found.problems == ()
    first = seeds.runs[0]
    assert (first.status, first.seed, first.best_epoch, first.reached, first.epochs) == ("done", 2, 3, 8, 8)


def test_differences_are_paired_by_seed() -> None:
    """[0.30, 0.50, 0.40] - [0.29, 0.48, 0.37] has mean 0.02, deviation 0.01 and t(0.975, 2) = 4.302653."""
    scores = {"a": (0.30, 0.50, 0.40), "b": (0.29, 0.48, 0.37), "c": (0.20, 0.18, 0.19)}
    for margin, (name, values) in enumerate(scores.items(), 1):
        for seed, value in enumerate(values, 1):
            write_run(f"{name}-{seed}", {"1": value}, seed=seed, margin=float(margin))
    write_run("d-1", {"1": 0.1}, seed=1, margin=0.5)
    found = compare_runs([Path(f"{name}-{seed}") for name in "abc" for seed in (1, 2, 3)] + [Path("d-1")])
    near, far = found.differences  # none with d, which has one seed
    assert (near.figure, near.seeds) == ("R@1", 3)
    assert [near.mean, far.mean] == pytest.approx([0.02, 0.21])
    assert near.margin == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    assert (near.is_clear, far.is_clear) == (False, False)
    said = difference_lines(found)
    gain = "R@1 +2.00 ± 2.48 points over 3 common seeds"
    assert said[0] == f"the runs like a-2 cannot be told apart from the runs like b-2: {gain}"
    facts = comparison_facts(found)["differences"][0]
    assert facts == {"groups": [0, 1], "figure": "R@1", "seeds": 3, "mean": near.mean, "margin_95": near.margin}


def test_only_a_clear_difference_is_called_better() -> None:
    for seed, (one, other) in enumerate([(0.50, 0.40), (0.51, 0.41), (0.49, 0.40)], 1):
        write_run(f"a-{seed}", {"1": one}, seed=seed)
        write_run(f"b-{seed}", {"1": other}, seed=seed, margin=0.5)
    (line,) = difference_lines(compare_runs(Path(f"{name}-{seed}") for name in "ab" for seed in (1, 2, 3)))
    assert line.startswith("the runs like a-2 are better than the runs like b-2: R@1 +9.67 ± 1.43 points")


def test_a_seed_that_ran_again_counts_once() -> None:
    for name, seed, recall in (("a", 1, 0.4), ("b", 1, 0.5), ("c", 2, 0.65)):
        write_run(name, {"1": recall}, seed=seed, save_dir=name, device="cpu" if name == "a" else "auto", workers=seed)
    (group,) = compare_runs(map(Path, "abc")).groups
    assert (len(group.runs), group.seeds) == (3, 2)
    assert group.mean["R@1"] == pytest.approx(0.55)
    assert group.deviation["R@1"] == pytest.approx(statistics.stdev([0.45, 0.65]))


def test_a_teacher_of_each_seed_is_one_teacher() -> None:
    for seed in (1, 2):
        write_run(f"t-{seed}", {"1": 0.7}, seed=seed)
        write_run(f"s-{seed}", {"1": 0.5}, seed=seed, teacher=f"t-{seed}/best.safetensors")
        write_run(f"u-{seed}", {"1": 0.4}, seed=seed, teacher=f"t-{seed}/last.safetensors")
    write_run("t-other", {"1": 0.7}, seed=3, margin=0.5)
    write_run("s-other", {"1": 0.6}, seed=3, teacher="t-other")
    found = compare_runs(Path(name) for name in ("s-1", "s-2", "s-other", "u-1", "u-2"))
    assert [[str(run.path) for run in group.runs] for group in found.groups] == [
        ["s-other"], ["s-1", "s-2"], ["u-1", "u-2"],
    ]  # fmt: skip
    assert found.groups[1].runs[0].facts["teacher"] == "t-1"


def test_losses_are_named_and_what_no_term_uses_is_no_difference() -> None:
    common: dict[str, Any] = {"teacher": "timm:a", "dist_ratio": 0.0, "angle_ratio": 0.0}
    write_run("a", {"1": 0.5}, **common, match_ratio=2.0, match_kind="squared")
    write_run("b", {"1": 0.4}, **common, csd_ratio=0.5, queue_size=64)
    write_run("c", {"1": 0.3}, teacher="timm:a", hint_epochs=0)
    write_run("d", {"1": 0.2}, loss="softmax", base="resnet18", embedding_size=64, l2normalize=False)
    found = compare_runs(map(Path, "abcd"))
    assert [run.facts["loss"] for run in runs_of(found)] == ["2 match", "0.5 csd", "1 dist + 2 angle", "softmax"]
    # the teacher's own defaults differ from the students' in these
    assert set(found.differing) == {"loss", "lr", "lr_decay_epochs", "lr_decay_gamma"}
    assert "match_kind" not in runs_of(found)[1].facts
    assert [("queue_size" in run.facts) for run in runs_of(found)] == [False, True, False, False]
    assert {run.facts["network"] for run in runs_of(found)} == {"resnet18 64-d"}


def test_a_setting_without_effect_is_no_difference_and_one_with_is() -> None:
    write_run("a", {"1": 0.5}, seed=1, weights="none", freeze_bn=True)
    write_run("b", {"1": 0.4}, seed=2, weights="none", freeze_bn=False)
    assert len(compare_runs([Path("a"), Path("b")]).groups) == 1
    write_run("c", {"1": 0.5}, seed=1, weights="none", load="l", freeze_bn=True)
    write_run("d", {"1": 0.4}, seed=2, weights="none", load="l", freeze_bn=False)
    assert compare_runs([Path("c"), Path("d")]).differing == ("freeze_bn",)


def test_settings_of_another_version_have_todays_defaults() -> None:
    old = write_run("old", {"1": 0.5})
    new = write_run("new", {"1": 0.4})
    settings = json.loads((old / "settings.json").read_text())
    del settings["jitter"]
    (old / "settings.json").write_text(json.dumps(settings | {"gone": 1}))
    found = compare_runs([old, new])
    assert found.differing == ()  # the other has none that is gone
    assert runs_of(found)[0].facts["jitter"] == 0


def test_data_sets_are_sections_and_their_place_counts_where_it_tells_them_apart() -> None:
    write_run("a", {"1": 0.1}, data="here")
    write_run("b", {"1": 0.9}, dataset="folder", data="x/photos")
    write_run("c", {"1": 0.5}, data="there", seed=2)
    write_run("d", {"1": 0.3}, dataset="folder", data="y/photos", seed=2)
    found = compare_runs(map(Path, "abcd"))
    assert [run.facts["data"] for run in runs_of(found)] == ["cub200", "cub200", "folder x/photos", "folder y/photos"]
    assert [[str(run.path) for run in group.runs] for group in found.groups] == [["c", "a"], ["b"], ["d"]]
    assert found.differing == ("data",)


def test_runs_that_are_not_done(tmp_path: Path) -> None:
    rows = [row(0, 0.1, True), row(1, None), row(2, 0.4, True), row(3, 0.3), row(4, None)]
    write_run("on", rows=rows)
    write_run("killed", rows=rows[:1], seed=2)
    write_run("early", seed=3)
    (Path("early") / ".lock").touch()
    (Path("killed") / "metrics.jsonl").chmod(0o444)
    held = "from filelock import FileLock; lock = FileLock('on/.lock'); lock.acquire(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        (group,) = compare_runs(map(Path, ("early", "killed", "on"))).groups
        process.communicate("\n")
    assert (group.seeds, group.mean) == (0, {})
    on, killed, early = group.runs
    assert (on.status, on.best_epoch, on.reached, on.epochs, on.last) == ("running", 2, 4, 8, 0.3)
    assert on.figures == pytest.approx({"R@1": 0.4, "R@2": 0.5})
    assert on.seconds == 50
    assert (killed.status, killed.best_epoch, killed.reached, killed.last) == ("stopped", 0, 0, 0.1)
    assert (early.status, early.best_epoch, early.reached, early.last, early.figures) == (
        "stopped",
        None,
        None,
        None,
        {},
    )
    assert compare_runs([Path("on")]).groups[0].runs[0].status == "stopped"
    with FileLock("on/.lock", timeout=0):  # it was given back
        pass


def test_photos_without_labels_stand_below_and_are_sorted_by_overlap() -> None:
    common: dict[str, Any] = {"dataset": "images", "data": "p", "teacher": "timm:a"}
    write_run("low", {"overlap@10": 0.2, "asymmetric@1": 0.1}, **common, lr=0.5)
    write_run("high", {"overlap@10": 0.6, "asymmetric@1": 0.3}, **common, last=0.5)
    found = compare_runs(map(Path, ("low", "high")))
    assert [str(run.path) for run in runs_of(found)] == ["high", "low"]
    assert runs_of(found)[0].figures == {"overlap@10": 0.6, "asymmetric@1": 0.3}
    assert runs_of(found)[0].last == 0.5
    rows = [{**row(0, None, True), "figures": {"eval": {"overlap@10": 0.3}}}]
    write_run("on", rows=rows, **common, seed=2)
    assert compare_runs([Path("on")]).groups[0].runs[0].figures == {"overlap@10": 0.3}


def test_the_cost_is_that_of_the_best_model() -> None:
    path = write_run("a", {"1": 0.5})
    tensors = {
        "w": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32), "bn.running_mean": np.zeros(7, np.float32),
        "bn.running_var": np.zeros(7, np.float32), "bn.num_batches_tracked": np.array(0),
        "index": np.zeros(9, np.int64),
    }  # fmt: skip
    save_file(tensors, path / "best.safetensors")
    (run,) = runs_of(compare_runs([path]))
    assert (run.parameters, run.bytes) == (17, (path / "best.safetensors").stat().st_size)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("settings.json", "{", "damaged, or of an incompatible version (the whole file: Invalid JSON"),
        ("settings.json", "[]", "damaged, or of an incompatible version (the whole file: Input should be an object"),
        ("settings.json", '{"dataset": "demo"}', "damaged, or of an incompatible version (data: Field required"),
        ("settings.json", b"\xff\xfe", "cannot be read ("),
        ("result.json", "{}", "damaged, or of an incompatible version (selected_on: Field required"),
        ("metrics.jsonl", '{"epoch": 0}\n', "damaged, or of an incompatible version (seconds: Field required"),
        ("best.safetensors", "x", "cannot be read ("),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line_beside_the_others(file: str, text: str | bytes, says: str) -> None:
    good, bad = write_run("good", {"1": 0.5}), write_run("bad")
    (bad / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = compare_runs([bad, good])
    assert [str(run.path) for run in runs_of(found)] == ["good"]
    (problem,) = found.problems
    assert problem.startswith(f"bad/{file}: {says}")
    assert "\n" not in problem
    with pytest.raises(DataError, match=f"^bad/{file}: "):
        compare_runs([bad])


def test_a_ratio_that_is_no_number() -> None:
    path = write_run("a", {"1": 0.5}, teacher="timm:a")
    settings = json.loads((path / "settings.json").read_text()) | {"dist_ratio": "x"}
    (path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="a loss ratio is not a number"):
        compare_runs([path])


def test_what_is_no_run_is_said_in_one_line() -> None:
    Path("a.log").touch()
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"^a.log and 2 more: not a run directory \(no settings.json\)"):
        compare_runs(map(Path, ("a.log", "empty", "none", "a.log")))


@pytest.fixture
def three() -> list[Path]:
    write_run("a-1", {"1": 0.50, "2": 0.6, "8": 0.8}, seed=1)
    write_run("a-2", {"1": 0.56, "2": 0.7, "8": 0.9}, seed=2)
    write_run("b-[bold]", rows=[row(0, 0.1, True)], lr=0.5, lr_decay_epochs=(3, 4), weight_decay=0.125)
    return [Path("a-1"), Path("a-2"), Path("b-[bold]")]


def test_the_table_in_a_log(three: list[Path], rkd: Rkd) -> None:
    Path("x.log").touch()
    code, out, err = rkd("compare", *three, "x.log")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines() if line.strip()]
    assert lines[0] == "all: data cub200, network resnet50 512-d, loss l2_triplet"
    assert lines[1] == "run lr lr-decay-epochs weight-decay state seed epoch R@1 R@2 R@8 last time"
    assert lines[3:7] == [
        "mean of 2 seeds 1e-05 25,30,35 1e-05 53.00 ± 4.24 65.00 ± 7.07 85.00 ± 7.07 25.00 ± 0.00 1:01",
        "a-2 2 3 56.00 70.00 90.00 25.00 1:01",
        "a-1 1 3 50.00 60.00 80.00 25.00 1:01",
        "b-[bold] 0.5 3,4 0.125 stopped, 0/8 1 0 10.00 20.00 10.00 0:10",
    ]
    assert lines[-1] == "left out: x.log: not a run directory (no settings.json). Name run directories."


@pytest.mark.parametrize(
    ("width", "has", "not_has"),
    [
        (180, {"R@2", "R@8", "last", "time", "lr", "weight-decay"}, {"settings"}),
        (140, {"R@2", "last", "time", "lr", "weight-decay"}, {"R@8", "settings"}),
        (110, {"settings", "last", "time"}, {"R@2", "R@8", "lr"}),
        (80, {"settings"}, {"R@2", "R@8", "lr", "last", "time"}),
        (60, {"settings"}, {"R@2", "R@8", "lr", "last", "time"}),
    ],
)
def test_a_screen_has_what_there_is_room_for(
    three: list[Path], monkeypatch: pytest.MonkeyPatch, width: int, has: set[str], not_has: set[str]
) -> None:
    file = io.StringIO()
    screen = Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(comparison, "console", screen)
    comparison.show_comparison(compare_runs(three), as_json=False)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    titles = set(lines[1].split())
    assert titles >= has | {"run", "state", "seed", "R@1"}
    assert not titles & not_has
    assert [line.split()[0] for line in lines if "56.00" in line] == ["a-2"]
    assert "53.00 ± 4.24" in file.getvalue()
    assert "settings" not in has or "lr 0.5," in file.getvalue()


def test_a_csv_has_each_column_once(rkd: Rkd) -> None:
    for epochs in (1, 2):
        write_run(f"a-{epochs}", {"1": 0.5}, epochs=epochs, teacher=f"t-{epochs}")
    assert rkd("compare", "a-1", "a-2", "--csv", "t.csv")[0] == 0
    titles, *lines = csv.reader(Path("t.csv").read_text().splitlines())
    assert len(set(titles)) == len(titles)
    assert sorted(line[titles.index("epochs")] for line in lines) == ["1", "2"]


def test_json_and_csv(three: list[Path], rkd: Rkd) -> None:
    code, out, err = rkd("compare", *three, "none", "--json", "--csv", "t.csv")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["differing"] == ["lr", "lr_decay_epochs", "weight_decay"]
    assert found["unreadable"] == ["none: not a run directory (no settings.json). Name run directories."]
    assert [[run["run"] for run in group["runs"]] for group in found["groups"]] == [["a-2", "a-1"], ["b-[bold]"]]
    assert found["groups"][0]["seeds"] == 2
    assert found["groups"][0]["mean"]["R@1"] == pytest.approx(0.53)
    assert found["groups"][0]["standard_deviation"]["R@1"] == pytest.approx(statistics.stdev([0.5, 0.56]))
    assert found["groups"][1]["runs"][0]["settings"]["lr"] == 0.5
    assert found["groups"][1]["runs"][0]["status"] == "stopped"
    table = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert [(line["group"], line["run"], line["R@8"], line["lr"]) for line in table] == [
        ("1", "a-2", "0.9", "1e-05"), ("1", "a-1", "0.8", "1e-05"), ("2", "b-[bold]", "", "0.5"),
    ]  # fmt: skip
    assert float(table[0]["R@1 mean"]) == pytest.approx(0.53)
    assert float(table[0]["R@1 sd"]) == pytest.approx(statistics.stdev([0.5, 0.56]))
    assert (table[2]["R@1 sd"], table[2]["lr_decay_epochs"], table[2]["seconds"]) == ("", "3,4", "10.0")

    code, _, err = rkd("compare", "a-1", "--csv", "t.csv")
    assert (code, err.count("\n")) == (2, 1)
    assert "--csv t.csv: already exists" in err
    code, out, _ = rkd("compare", "a-1", "--csv", "t.csv", "--overwrite")
    assert code == 0
    assert out.splitlines()[-1] == "t.csv: 1 run"
    code, _, err = rkd("compare", "none")
    assert (code, err) == (2, "rkd: error: none: not a run directory (no settings.json). Name run directories.\n")


def test_html(three: list[Path], rkd: Rkd) -> None:
    code, out, err = rkd("compare", *three, "none", "--html", "t.html")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "t.html: 3 runs"
    text = Path("t.html").read_text(encoding="utf-8")
    assert "53.00 ± 4.24" in text
    assert '<strong>56.00</strong><span class="star"' in text  # and no other of the column
    assert "<strong>50.00</strong>" not in text
    assert '<td class="text">stopped, 0/8</td>' in text
    assert "none: not a run directory" in text
    code, _, err = rkd("compare", "a-1", "--html", "t.html")
    assert (code, err.count("\n")) == (2, 1)
    assert "--html t.html: already exists" in err
    code, out, _ = rkd("compare", "a-1", "--json", "--html", "t.html", "--overwrite")
    assert (code, len(json.loads(out)["groups"])) == (0, 1)


def test_untrained_runs_are_named_and_get_no_star(rkd: Rkd) -> None:
    for name, recall, best in (("a", 0.5, 3), ("b", 0.4, 8), ("c", 0.9, 0)):
        file = write_run(name, {"1": recall}, lr=recall) / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"best_epoch": best}))
    code, out, _ = rkd("compare", "a", "b", "c", "--html", "t.html", "--csv", "t.csv")
    assert code == 0
    marked = {line.split()[0] for line in out.splitlines() if "untrained: epoch 0 is best" in line}
    assert marked == {"c"}
    text = Path("t.html").read_text(encoding="utf-8")
    assert re.findall(r"<strong>(.*?)</strong>", text) == ["50.00"]
    assert text.count("untrained: epoch 0 is best") == 1
    assert "★: the best trained run" in text
    table = {line["run"]: line["untrained"] for line in csv.DictReader(Path("t.csv").read_text().splitlines())}
    assert table == {"a": "False", "b": "False", "c": "True"}
    rkd("compare", "a", "c", "--html", "two.html")  # one of them trained: nothing to be better than
    assert "<strong>" not in Path("two.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("names", "title"), [(("a",), "Comparison of 1 run"), (("a", "b"), "Comparison of 2 runs")])
def test_a_page_counts_its_runs(names: tuple[str, ...], title: str, rkd: Rkd) -> None:
    for name in names:
        write_run(name, {"1": 0.5})
    _, out, _ = rkd("compare", *names, "--html", "t.html")
    assert f"<title>{title}</title>" in Path("t.html").read_text(encoding="utf-8")
    assert out.splitlines()[-1] == f"t.html: {title.removeprefix('Comparison of ')}"


def test_folds_are_averaged_within_a_seed_and_pair_up(rkd: Rkd) -> None:
    scores = {"a": ((0.30, 0.40), (0.50, 0.52)), "b": ((0.28, 0.36), (0.49, 0.47))}
    for margin, (name, seeds) in enumerate(scores.items(), 1):
        for seed, folds in enumerate(seeds, 1):
            for fold, recall in enumerate(folds, 1):
                write_run(f"{name}-{seed}-{fold}", {"1": recall}, seed=seed, fold=f"{fold}/2", margin=float(margin))
    write_run("a-3-1", {"1": 0.9}, seed=3, fold="1/2", margin=1.0)  # its other fold has not run: counts for neither
    write_run("c-1-1", {"1": 0.1}, seed=1, fold="1/3", margin=2.0)
    names = sorted(path.name for path in Path().iterdir())
    found = compare_runs(map(Path, names))
    first, second, alone = found.groups
    assert [(group.seeds, group.folds) for group in found.groups] == [(2, 2), (2, 2), (0, 3)]
    assert first.mean["R@1"] == pytest.approx((0.35 + 0.51) / 2)
    assert first.deviation["R@1"] == pytest.approx(statistics.stdev([0.35, 0.51]))
    assert second.mean["R@1"] == pytest.approx((0.32 + 0.48) / 2)
    assert alone.mean == {}
    (one,) = found.differences
    gains = [(0.02 + 0.04) / 2, (0.01 + 0.05) / 2]
    assert one.seeds == 2
    assert [one.mean, one.margin] == pytest.approx([statistics.fmean(gains), 0], abs=1e-9)
    code, out, _ = rkd("compare", *names)
    assert code == 0 and "mean of 2 seeds x 2 folds" in out and "--concatenate also measures" in out
    assert "1/2" in out and "fold" in out.splitlines()[2]
    code, _, err = rkd("compare", "c-1-1", "--concatenate")
    assert (code, err) == (2, "rkd: error: --concatenate: no seed has finished runs of all its folds. Omit the flag.\n")


def test_the_folds_of_one_seed_have_a_mean() -> None:
    paths = [write_run(f"a-{fold}", {"1": fold / 10}, fold=f"{fold}/3") for fold in (1, 2, 3)]
    found = compare_runs(paths)
    (group,) = found.groups
    assert [group.mean["R@1"], group.deviation["R@1"]] == pytest.approx([0.2, 0.1])
    assert found.differing == () and comparison_table(found)[1][0][1][0]["run"] == "mean of 3 folds"


def test_concatenated_recall_is_that_of_the_formula(tiny_set: Path, tmp_path: Path, rkd: Rkd) -> None:
    """Each model's embeddings divided by their length, side by side, all distances and their nearest neighbor."""
    flags = {
        "data": str(tiny_set), "dataset": "cub200", "weights": "none", "base": "shufflenet_v2_x0_5", "lr": "1e-3",
        "embedding_size": "8", "resize": "36", "image_size": "32", "batch": "4", "num_image_per_class": "2",
        "iter_per_epoch": "1", "epochs": "1", "sample": "all", "workers": "0", "device": "cpu", "l2normalize": False,
    }  # fmt: skip
    runs = resolve_grid(TeacherSettings, {**flags, "fold": "1/2,2/2", "save_dir": "folds"})
    for settings in runs:
        train(build_run(settings, silent), silent)
    code, out, err = rkd("compare", "folds/fold-1of2", "folds/fold-2of2", "--concatenate", "--json")
    assert (code, err) == (0, "")
    _, images = load_dataset("cub200", tiny_set)
    parts = []
    for fold in ("folds/fold-1of2", "folds/fold-2of2"):
        rows = load(fold, device="cpu", fit="square").embed(images.paths)
        parts.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    x, labels = np.concatenate(parts, axis=1).astype(np.float64), np.array(images.labels)
    distances = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    order = labels[distances.argsort(axis=1)]
    expected = {f"R@{k}": (order[:, :k] == labels[:, None]).any(axis=1).mean() for k in (1, 2, 4, 8)}
    (group,) = json.loads(out)["groups"]
    assert group["concatenated"] == {"1": pytest.approx(expected)}
    assert expected["R@1"] not in [run["figures"]["R@1"] for run in group["runs"]], "else one model alone would do"
