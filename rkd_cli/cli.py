"""The command line: parses flags into settings, runs commands, and turns errors into exit codes.

Commands import torch when they run, so that ``--help`` is fast.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import typer
import typer.core

from rkd_cli import __version__
from rkd_cli.errors import DataError, RkdError, SettingsError
from rkd_cli.events import Reporter, silent
from rkd_cli.manual import PAGES, read_page
from rkd_cli.runtime.allocator import keep_memory
from rkd_cli.runtime.processes import is_distributed, is_main_process, print_errors
from rkd_cli.runtime.signals import Stopped, if_stopped, saving, stop
from rkd_cli.settings import (
    ADVANCED,
    SPELLINGS,
    BenchSettings,
    CacheSettings,
    CheckSettings,
    CompareSettings,
    DemoSettings,
    DistillSettings,
    DownloadSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    ImportSettings,
    PushSettings,
    ReportSettings,
    SearchSettings,
    ServeSettings,
    TeacherSettings,
    choices_of,
    default_text,
    flag_name,
    help_panels,
    help_text,
)
from rkd_cli.settings.names import meant
from rkd_cli.settings.resolve import GRID, check_effect, grid_of, grid_text, read_config, resolve, resolve_grid

app = typer.Typer(
    name="rkd",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train small image-embedding models: distil a large teacher into a small student, measure it, export it, and "
    "search with it.",
    epilog="Start with [bold]rkd demo[/bold]: it draws its own images and takes minutes. "
    "[bold]rkd manual[/bold] lists the pages of the manual.",
)
_TRAIN, _MEASURE, _USE, _CARE = "Train", "Measure", "Use", "Look after"  # groups of `rkd --help`
_SettingsT = TypeVar(
    "_SettingsT",
    TeacherSettings,
    DistillSettings,
    EvaluateSettings,
    EmbedSettings,
    ExportSettings,
    ImportSettings,
    DemoSettings,
    BenchSettings,
    CacheSettings,
    CheckSettings,
    CompareSettings,
    PushSettings,
    ReportSettings,
    SearchSettings,
    ServeSettings,
    DownloadSettings,
)
_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML or JSON file of settings, or a recipe (`rkd recipes`). Flags override it.",
        rich_help_panel="Run",
    ),
]
_REPEATED = ("teacher",)  # options that may be given more than once
_FINISHED = ". {} contains all finished epochs."
_NOTHING = ". Nothing was written."
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Run")]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the result.", rich_help_panel="Run")]
_DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the run, time a few steps, and print what it would take. Writes no run.",
        rich_help_panel="Common",
    ),
]


class _Command(typer.core.TyperCommand):
    """A command that hides advanced options in ``--help``, not in ``--help-all``, and rejects an option given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        left: list[str] = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:  # set during shell completion
            *_, order = self.make_parser(ctx).parse_args(words)
            options = [one for one in dict.fromkeys(order) if one.param_type_name == "option" and not one.multiple]
            twice = [one for one in options if order.count(one) > 1]
            if twice:
                raise SettingsError(*map(_given_twice, twice))
        return left

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for option in self.get_params(ctx):
            if not isinstance(option, typer.core.TyperOption):
                continue
            first = option.opts[0]  # other spellings are in the help text
            option.opts = [first.replace("--", "--[no-]", 1) if option.secondary_opts else first]
            option.secondary_opts = []
            if option.is_flag:
                option.metavar = ""
            if not ctx.params.get("help_all") and _is_advanced(option):
                option.hidden = True
        super().format_help(ctx, formatter)


def _given_twice(option: Any) -> str:
    flag = "/".join([*option.opts, *option.secondary_opts])
    several = "," in str(option.metavar)
    return f"{flag}: is given twice. " + ("Give all values at once, separated by commas." if several else "Omit one.")


def _is_advanced(option: Any) -> bool:
    return str(getattr(option, "rich_help_panel", "")).startswith(ADVANCED)


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked:
        ctx.params["help_all"] = True
        typer.echo(ctx.get_help(), nl=False)
        raise typer.Exit


_HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show all options and exit.")
]


def command(
    name: str, group: str, model: type[_SettingsT], dry_run: Callable[..., None] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register ``run(settings, ...)`` as the command ``name`` with one option per field of ``model``.

    Other parameters of ``run`` become parameters of the command. ``group`` is its section in ``rkd --help``.
    ``--dry-run`` calls ``dry_run(every, ...)`` once, with the settings of all runs of a grid.
    """

    def register(run: Callable[..., None]) -> Callable[..., None]:
        own: list[inspect.Parameter] = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(run, eval_str=True).parameters.values()
            if parameter.name != "settings"
        ]
        options: list[inspect.Parameter] = [_option(model, field, panel) for field, panel in help_panels(model).items()]

        def entry(**values: Any) -> None:
            flags = {n: values.pop(n) for n in list(values) if n in model.model_fields}
            given = {
                n: ",".join(value) if isinstance(value, list) else value
                for n, value in flags.items()
                if value not in (None, [])
            }
            values.pop("help_all", None)
            config = values.pop("config")
            every = _chosen(model, given, config)
            check_effect(every[0], given, every[1:])
            if is_distributed() and "nproc" not in model.model_fields:
                raise SettingsError(f"rkd {name}: runs in one process. Start it without torchrun.")
            processes = getattr(every[0], "nproc", 1)
            if is_distributed() and "nproc" in given and str(processes) != os.environ.get("LOCAL_WORLD_SIZE"):
                raise SettingsError(f"--nproc {processes}: torchrun started another number of processes. Omit --nproc.")
            jobs = getattr(every[0], "jobs", 1)
            if jobs > 1 and (len(every) < 2 or processes > 1 or is_distributed()):
                why = "--nproc. Omit it." if len(every) > 1 else "one run. Give several values, as --seed 1,2."
                raise SettingsError(f"--jobs {jobs}: has no effect with {why}")
            if processes > 1 and not is_distributed():
                _hand_on(processes)
            if dry_run and values.pop("dry_run"):
                dry_run(every, **values)
                return
            if len(every) > 1:
                asked = "" if given.get("resume") else grid_text(given, config)
                _train_grid(name, every, asked, partial(run, **values), **values)
            else:
                run(settings=every[0], **values)

        added: dict[str, Any] = {"config": (_Config, None)}
        if dry_run:
            added["dry_run"] = (_DryRun, False)
        if any(panel.startswith(ADVANCED) for panel in help_panels(model).values()):
            added["help_all"] = (_HelpAll, False)
        parameters = [*options, *own] + [
            inspect.Parameter(added_name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for added_name, (annotation, default) in added.items()
        ]
        entry.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        entry.__annotations__ = {p.name: p.annotation for p in parameters}
        # join the lines of a paragraph
        entry.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(run.__doc__ or ""))
        app.command(name, cls=_Command, rich_help_panel=group, no_args_is_help=False)(entry)
        return run

    return register


def _chosen(model: type[_SettingsT], given: dict[str, Any], config: Path | None) -> list[_SettingsT]:
    """The settings of a command. After a restart by torchrun, runs that had started are resumed."""
    every = resolve_grid(model, given, config)
    if "resume" in model.model_fields and is_distributed():
        from rkd_cli.runtime.distributed import has_begun

        differing = grid_of(model, given)
        own = {n: value for n, value in given.items() if n != "overwrite" and n not in differing} | {"resume": True}
        for number, settings in enumerate(every):
            directory = getattr(settings, "save_dir")  # noqa: B009
            if has_begun(directory):
                with suppress(SettingsError):  # nothing to resume: it was killed before it wrote anything
                    every[number] = resolve(model, own | {"save_dir": str(directory)})
    return every


def _train_grid(command: str, every: Sequence[Any], asked: str, run: Callable[..., None], quiet: bool) -> None:
    """Train the runs of a grid that are not finished, then compare all. ``asked``: the file ``GRID`` to write."""
    from rkd_cli.runtime.files import write_text
    from rkd_cli.runtime.jobs import run_jobs

    place = every[0].save_dir.parent
    left, code = [settings for settings in every if not _is_finished(settings)], 0
    if is_main_process() and asked and (every[0].overwrite or not _begun(every)):
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / GRID, asked)
    try:
        if every[0].jobs > 1:
            code = run_jobs({str(s.save_dir): partial(_job, command, s, quiet) for s in left}, every[0].jobs)
        for settings in left if every[0].jobs == 1 else ():
            try:
                run(settings=settings)
            except RkdError as error:
                if is_distributed():  # all processes stop
                    raise
                code = code or error.exit_code
                print_errors([f"error: {settings.save_dir}: {problem}" for problem in error.problems])
    except Stopped as stopped:
        words = shlex.join(["rkd", command, "--resume", "--save-dir", str(place)])
        stopped.outcome = f". Finished epochs are saved. Resume all with `{words}`."
        raise
    if is_main_process() and _begun(every):
        _show_grid(_begun(every))
    elif is_main_process():
        (place / GRID).unlink(missing_ok=True)
    if code:
        raise typer.Exit(code)


def _begun(every: Sequence[Any]) -> list[Path]:
    return [settings.save_dir for settings in every if (settings.save_dir / "settings.json").is_file()]


def _is_finished(settings: TeacherSettings | DistillSettings) -> bool:
    """Whether a run that is to be resumed has all its epochs."""
    directory = settings.save_dir
    is_done = settings.resume and (directory / "result.json").is_file()
    return is_done and bool(read_config(directory / "settings.json").get("epochs") == settings.epochs)


def _job(command: str, settings: TeacherSettings | DistillSettings, quiet: bool) -> None:
    """A run of a grid, in a process of its own."""
    code, lines = _guarded(lambda: _train(command, settings, quiet, f"{settings.save_dir}: "))
    if code < 128:  # the parent tells of signals
        print_errors([line.replace("error: ", f"error: {settings.save_dir}: ", 1) for line in lines])
    sys.exit(code)


def _show_grid(directories: Sequence[Path]) -> None:
    from rkd_cli.commands.compare import compare_runs
    from rkd_cli.screen.comparison import show_comparison

    show_comparison(compare_runs(directories), False)


def _hand_on(processes: int) -> None:
    """Run this command in several processes, then exit."""
    from rkd_cli.runtime.distributed import launch

    code, lines = launch(processes, sys.argv[1:])
    print_errors(lines)
    raise typer.Exit(code)


def _screen(quiet: bool, name: str = "") -> AbstractContextManager[Reporter]:
    """The reporter of the main process; others are silent."""
    from rkd_cli.screen.terminal import reporter

    return reporter(quiet, name=name) if is_main_process() else nullcontext(silent)


@contextmanager
def _watched(settings: TeacherSettings | DistillSettings, quiet: bool, name: str = "") -> Iterator[Reporter]:
    """The reporter of a training: screen and loggers."""
    from rkd_cli.screen.loggers import logged

    loggers = settings.log if is_main_process() else ()
    with _screen(quiet, name) as screen, logged(screen, loggers, settings.model_dump_json(indent=2)) as report:
        yield report


def _option(model: type[_SettingsT], name: str, panel: str) -> inspect.Parameter:
    field = model.model_fields[name]
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    default = default_text(field)
    help = help_text(field) + (f" [dim]\\[{default}][/dim]" if default else "")
    flag = flag_name(name)
    others = [flag_name(other) for other, field_name in SPELLINGS.items() if field_name == name]
    if kinds == [bool]:
        switch = f"{flag}/{flag.replace('--', '--no-', 1)}"
        option = typer.Option(switch, help=help, rich_help_panel=panel)
        annotation: Any = Annotated[bool | None, option]
    else:
        option = typer.Option(
            flag,
            *others,
            metavar=_metavar(kinds[0]),
            help=help,
            rich_help_panel=panel,
            autocompletion=_completion(choices_of(field)),
        )
        text = list[str] if name in _REPEATED else str  # settings parse it, so that all errors appear together
        annotation = Annotated[text | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    """Shell completion of a value; None completes files."""

    def matching(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return matching if choices else None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if type(None) in get_args(annotation) else (annotation,)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return "NAME"
    if get_origin(kind) is tuple:
        return "NAME,NAME,..." if get_origin(get_args(kind)[0]) is Literal else "INT,INT,..."
    return {int: "INT", float: "FLOAT", Path: "PATH"}.get(kind, "TEXT")


def _dry_run(every: Sequence[TeacherSettings | DistillSettings], quiet: bool) -> None:
    from rkd_cli.screen.tables import show_dry_run

    # loggers write nothing before a run starts
    with _watched(every[0], quiet) as report, if_stopped(_NOTHING):
        from rkd_cli.training.dry_run import dry_run

        found = dry_run(every, report)
    if is_main_process():
        show_dry_run(found)


@command("train-teacher", _TRAIN, TeacherSettings, _dry_run)
def train_teacher(settings: TeacherSettings, quiet: _Quiet = False) -> None:
    """Train a teacher: an embedding network on labelled images.

    The defaults are the paper's: ResNet50, 512 dimensions, triplet loss with distance-weighted negatives.

    Example: [bold]rkd train-teacher --dataset cub200 --data data --save-dir teacher[/bold]
    """
    _train("train-teacher", settings, quiet)


def _train(command: str, settings: TeacherSettings | DistillSettings, quiet: bool, name: str = "") -> None:
    if _is_finished(settings):
        if is_main_process():
            from rkd_cli.commands.card import write_card
            from rkd_cli.screen.tables import show_text

            show_text(f"{name}{settings.save_dir}: is finished, nothing to resume")
            write_card(settings.save_dir)  # a kill may have left none
        return
    with _watched(settings, quiet, name) as report:
        from rkd_cli.commands.card import write_card
        from rkd_cli.models.cost import timing
        from rkd_cli.runtime.distributed import ranks
        from rkd_cli.training.loop import train
        from rkd_cli.training.open import build_run

        with ranks().first():
            run = build_run(settings, report)
        with saving(command, settings.save_dir):
            train(run, report if quiet or not is_main_process() else timing(report))
    write_card(settings.save_dir)


@command("distill", _TRAIN, DistillSettings, _dry_run)
def distill(settings: DistillSettings, quiet: _Quiet = False) -> None:
    """Distil a teacher into a small student.

    The defaults are the paper's: ResNet18, 64 dimensions, not normalized, 1 x RKD-D + 2 x RKD-A, no labels.

    Example: [bold]rkd distill --teacher teacher --data data --save-dir student[/bold]
    """
    _train("distill", settings, quiet)


_NETWORK = "a checkpoint, a run's directory, hf:ORG/NAME, timm:NAME, torchvision:NAME"
_MODEL = f"{_NETWORK}, an exported .onnx, or a vectors file."


@command("evaluate", _MEASURE, EvaluateSettings)
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=f"Each {_MODEL}")],
    settings: EvaluateSettings,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Measure Recall@K, R-Precision and MAP@R of models.

    A checkpoint stores its network and its data set; any other model is measured on the images in --data. --gallery
    searches another model's embeddings (asymmetric). --dims and --vectors measure shorter and smaller embeddings.

    Example: [bold]rkd evaluate student --gallery teacher --vectors float,int8[/bold]
    """
    from rkd_cli.screen.tables import show_evaluations

    with _screen(quiet or json) as report:
        from rkd_cli.commands.evaluate import evaluate_models

        results = evaluate_models(models, settings, report)
    if is_main_process():
        show_evaluations(results, json)


@command("compare", _MEASURE, CompareSettings)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Each the directory of a run, finished or not.")],
    settings: CompareSettings,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Compare runs in one table.

    The table shows the settings that differ, the best epoch, recalls, size and time. Runs that differ only by seed
    or fold are grouped under their mean and standard deviation.

    Example: [bold]rkd compare students/* --csv students.csv[/bold]
    """
    from datetime import datetime

    from rkd_cli.commands.compare import compare_runs
    from rkd_cli.report.comparison import csv_text
    from rkd_cli.report.page import comparison_html
    from rkd_cli.report.text import count
    from rkd_cli.runtime.files import refuse_existing, write_text
    from rkd_cli.screen.comparison import show_comparison
    from rkd_cli.screen.tables import show_text

    for flag, path in (("--csv", settings.csv), ("--html", settings.html)):
        if path:
            refuse_existing(flag, path, settings.overwrite)
    found = compare_runs(runs)
    if settings.concatenate:
        with _screen(quiet or json) as report, if_stopped(_NOTHING):
            from rkd_cli.commands.folds import with_concatenated

            found = with_concatenated(found, settings, report)
    if settings.csv:
        write_text(settings.csv, csv_text(found))
    if settings.html:
        write_text(settings.html, comparison_html(found, datetime.now().astimezone()))
    show_comparison(found, json)
    for path in (settings.csv, settings.html):
        if path and not json:
            show_text(f"{path}: {count(sum(len(group.runs) for group in found.groups), 'run')}")


@command("report", _MEASURE, ReportSettings)
def report_runs(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Each the directory of a run, or an exported .onnx.")
    ],
    settings: ReportSettings,
    quiet: _Quiet = False,
) -> None:
    """Write an HTML report on runs.

    It shows curves, recalls, costs, example queries, confused classes and a map of the embeddings. It is one file that
    opens without a network. The teacher of a student is included if it is still there.

    Example: [bold]rkd report student --out report.html[/bold]
    """
    from rkd_cli.runtime.files import refuse_existing
    from rkd_cli.screen.tables import show_text

    refuse_existing("--out", settings.out, settings.overwrite)
    with _screen(quiet) as report, if_stopped(_NOTHING):
        size = _write_report(runs, settings, report)
    show_text(f"{settings.out}: {size / 1e6:.1f} MB, open it in a browser")


def _write_report(runs: list[Path], settings: ReportSettings, report: Reporter) -> int:
    from rkd_cli.commands.report import measure_report
    from rkd_cli.report.page import report_html
    from rkd_cli.runtime.files import write_text

    write_text(settings.out, report_html(measure_report(runs, settings, report)))
    return settings.out.stat().st_size


@command("push", _USE, PushSettings)
def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The directory of a run that is done, or an exported folder.")
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to, on huggingface.co.")],
    settings: PushSettings,
) -> None:
    """Upload the best model of a run to a model hub, or a folder of rkd export --to.

    Uploads the model, its card (README.md; fill in the licence first) and its metrics. The model is then named
    hf:ORG/NAME. Settings are not uploaded, because they contain paths of this machine.

    Example: [bold]rkd push student my-name/birds[/bold]
    """
    from rkd_cli.commands.push import push_run
    from rkd_cli.screen.tables import show_text

    address, names = push_run(run, repository, settings.private)
    show_text(f"{address}: {', '.join(names)}")


@command("embed", _USE, EmbedSettings)
def embed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"What embeds: {_MODEL}")],
    settings: EmbedSettings,
    quiet: _Quiet = False,
) -> None:
    """Write the embeddings of images into a file.

    The file can teach (rkd distill --teacher FILE), be measured (rkd evaluate FILE) and be searched (rkd search
    --gallery FILE). The same command resumes an interrupted one.

    Example: [bold]rkd embed timm:vit_small_patch14_dinov2.lvd142m --data photos --out photos.npz[/bold]
    """
    from rkd_cli.screen.tables import show_written

    with _screen(quiet) as report, if_stopped(_NOTHING):
        from rkd_cli.commands.embed import embed_file

        written = embed_file(model, settings, report)
    if is_main_process():
        show_written(written)


@command("export", _USE, ExportSettings)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"What to export: {_NETWORK}.")],
    settings: ExportSettings,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Export a model for other programs: as one ONNX file, or as a folder that timm or sentence-transformers loads.

    The ONNX file takes uint8 pixels and returns embeddings, for any batch size. All preprocessing after the crop is
    inside. Size, latency and Recall@K are measured and compared with the checkpoint; if the embeddings differ, nothing
    is written.

    Example: [bold]rkd export student --int8 --out student.onnx[/bold]
    """
    from rkd_cli.screen.tables import show_export

    if settings.snippet:
        from rkd_cli.commands.export import snippet_text

        typer.echo(snippet_text(model, settings.snippet))
        return

    with _screen(quiet or json) as report, if_stopped(_NOTHING):
        from rkd_cli.commands.export import export_file

        result = export_file(model, settings, report)
    show_export(result, json)


@command("search", _USE, SearchSettings)
def search(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"What embeds: {_NETWORK}, or an exported .onnx.")],
    settings: SearchSettings,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Find the nearest images to a query, or near-duplicates.

    The embeddings of a folder are cached; a later search embeds only new and changed images.

    Example: [bold]rkd search student --gallery photos --query new.jpg --html found.html[/bold]
    """
    from datetime import datetime

    from rkd_cli.report.found import found_html
    from rkd_cli.runtime.files import refuse_existing, write_text
    from rkd_cli.screen.found import show_found
    from rkd_cli.screen.tables import show_text

    if settings.html:
        refuse_existing("--html", settings.html, settings.overwrite)
    with _screen(quiet or json) as report, if_stopped(_NOTHING):
        from rkd_cli.commands.search import pictures_of
        from rkd_cli.commands.search import search as run

        found = run(model, settings, report)
        if settings.html:
            write_text(settings.html, found_html(found, pictures_of(found), datetime.now().astimezone()))
    show_found(found, json)
    if settings.html and not json:
        show_text(f"{settings.html}: open it in a browser")


@command("serve", _USE, ServeSettings)
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"What embeds: {_NETWORK}, or an exported .onnx.")],
    settings: ServeSettings,
    quiet: _Quiet = False,
) -> None:
    """Serve a search page and a JSON API for a gallery.

    On the page, drop, paste or photograph a picture to see the nearest images, and click one to search on. Only this
    machine can reach it, unless you pass --host and --token.

    Example: [bold]rkd serve student --gallery photos[/bold]
    """
    from rkd_cli.report.found import name_of
    from rkd_cli.report.text import count
    from rkd_cli.screen.tables import show_text
    from rkd_cli.screen.terminal import progress_lines

    with _screen(quiet) as report, if_stopped(_NOTHING):
        from rkd_cli.commands.serve import open_service

        service, port = open_service(model, settings, report)
    with if_stopped(". All requests were answered."):
        from rkd_cli.commands.web import make_server

        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{port.getsockname()[1]}/{'?token=TOKEN' if settings.token else ''}"
        what = f"{count(len(service.index.paths), 'image')} of {name_of(settings.gallery)}, by {model}"
        try:
            server = make_server(service, settings, progress_lines)
            show_text(f"{what}: open {address} in a browser. Press Ctrl-C to stop.")
            server.run([port])
        finally:
            service.close()


@command("import-checkpoint", _CARE, ImportSettings)
def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="best.pth or last.pth of the published code.")],
    settings: ImportSettings,
) -> None:
    """Convert a checkpoint of the published code.

    Only tensors are read from the pickle; its code never runs. Tensors that do not fit are listed.

    Example: [bold]rkd import-checkpoint best.pth --base resnet50 --embedding-size 512[/bold]
    """
    from rkd_cli.models.published import import_checkpoint as run
    from rkd_cli.screen.tables import show_text

    result = run(file, **settings.model_dump(), overwrite=settings.overwrite)
    if result.note:
        show_text(f"note: {file}: {result.note}")
    if result.ignored:
        show_text(f"not used: {', '.join(result.ignored)}")
    show_text(
        f"{result.path}: {result.tensors} tensors of a {settings.base} with {settings.embedding_size}-d embeddings"
    )


@app.command("recipes", cls=_Command, rich_help_panel=_TRAIN)
def show_recipes() -> None:
    """List the built-in recipes: experiments for --config.

    Example: [bold]rkd distill --config cub200-student-64 --data data[/bold]
    """
    from rkd_cli.screen.tables import show_recipes as show
    from rkd_cli.settings.recipes import recipes

    show(recipes())


@command("download-cub", _CARE, DownloadSettings)
def download_cub(settings: DownloadSettings, quiet: _Quiet = False) -> None:
    """Download, verify and unpack CUB-200-2011 (1.1 GB).

    The same command resumes an interrupted download, and does nothing if the data set is already there. On a machine
    without a network, bring the archive and name it with --archive.

    Example: [bold]rkd download-cub --data data[/bold]
    """
    from rkd_cli.screen.tables import show_text

    with _screen(quiet) as report, if_stopped(". The same command resumes the download."):
        from rkd_cli.data import download

        official = download.CUB_MD5 if settings.md5 is None else settings.md5
        folder = download.download_cub(
            settings.data,
            url=settings.url or download.CUB_URL,
            md5=None if official == "none" else official,
            size=download.CUB_SIZE if settings.md5 is None else None,
            archive=settings.archive,
            report=report,
        )
    show_text(f"CUB-200-2011 is in {folder}. Train on it with --dataset cub200 --data {settings.data}.")


@command("check-data", _CARE, CheckSettings)
def check_data(settings: CheckSettings, quiet: _Quiet = False) -> None:
    """Show the content of a data set, and name its damaged images.

    It decodes every image. Training does the same when it caches decoded images; --skip-damaged leaves out the
    damaged ones.

    Example: [bold]rkd check-data --data photos[/bold]
    """
    from rkd_cli.screen.tables import show_text

    with _screen(quiet) as report:
        from rkd_cli.data import find_dataset, load_dataset
        from rkd_cli.data.copies import copy_notes
        from rkd_cli.data.loader import find_damaged
        from rkd_cli.events import Note
        from rkd_cli.report.text import data_text

        name = find_dataset(settings.data, report) if settings.dataset == "auto" else settings.dataset
        train, evaluation = load_dataset(name, settings.data, report)
        splits = [*train.parts, evaluation]
        show_text(data_text(name, [images.facts for images in splits]))
        for note in copy_notes(train, evaluation, settings.data):
            report(Note(note))
        sets = [images.decoded(settings.max_pixels) for images in splits]
        damaged = find_damaged(sets, settings.workers, report)
    if damaged:
        raise DataError(*damaged.values())
    show_text(f"{name}: all {sum(map(len, splits)):,} images can be read")


@command("cache", _CARE, CacheSettings)
def cache(
    settings: CacheSettings,
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Folders of runs to list, in place of caches.")
    ] = None,
) -> None:
    """List or remove cached images and search indexes, or what finished runs no longer need.

    A command that needs a removed file of the cache writes it again. With folders, it lists the runs in them, and
    --clear removes the resume states of finished runs and what killed processes left.

    Example: [bold]rkd cache students --clear[/bold]
    """
    from rkd_cli.data.cache import clear_caches, list_caches
    from rkd_cli.runtime.files import default_cache_folder
    from rkd_cli.screen.tables import show_caches, show_sizes

    check_effect(settings, settings.model_fields_set, folders=folders)
    if folders:
        from rkd_cli.commands.runs import clear_run, sizes_of_runs

        found = sizes_of_runs(folders)
        show_sizes(found, sum(map(clear_run, found)) if settings.clear else None)
        return
    folder = settings.cache_dir or default_cache_folder()
    removed = clear_caches(folder) if settings.clear else []
    show_caches(folder, removed, list_caches(folder))


@app.command("doctor", cls=_Command, rich_help_panel=_CARE)
def doctor(json: _Json = False) -> None:
    """Print system information for a bug report.

    It lists versions, devices and whether they work, memory, disks and caches.

    Example: [bold]rkd doctor > doctor.txt[/bold]
    """
    from rkd_cli.runtime.doctor import diagnose
    from rkd_cli.screen.tables import show_doctor

    show_doctor(diagnose(), json)


@app.command("manual", cls=_Command, rich_help_panel=_CARE)
def manual(
    page: Annotated[str | None, typer.Argument(metavar="[PAGE]", help="The page to read.")] = None,
) -> None:
    """List the pages of the manual, or read one.

    Example: [bold]rkd manual photos[/bold]
    """
    from rkd_cli.screen.terminal import show_page, show_pages

    if page is None:
        show_pages(PAGES)
    else:
        show_page(read_page(page))


@command("demo", _TRAIN, DemoSettings)
def demo(settings: DemoSettings, quiet: _Quiet = False) -> None:
    """Train a teacher and five students on drawn birds and compare them, in minutes on any machine.

    It compares students trained on labels with students distilled from the teacher, and ends with an HTML report. Every
    command can use the same images: [bold]--dataset demo[/bold].
    """
    from rkd_cli.screen.tables import show_demo, show_text
    from rkd_cli.screen.terminal import reporter

    with reporter(quiet, advise=False) as report, if_stopped(_FINISHED.format(settings.save_dir)):
        from rkd_cli.commands.card import write_card
        from rkd_cli.commands.demo import NETWORKS, run_demo
        from rkd_cli.models.cost import timing

        result = run_demo(settings, report if quiet else timing(report))
        for best in settings.save_dir.glob("*/best.safetensors"):
            write_card(best.parent)
        page = settings.save_dir / "report.html"
        asked = ReportSettings(seed=settings.seed, workers=settings.workers, device=settings.device, out=page)
        _write_report([settings.save_dir / name for name in reversed(NETWORKS) if name != "teacher"], asked, report)
    show_text(f"Report for a browser: {page}")
    show_demo(result)


_PARTS = (
    "angle",
    "distance",
    "miners",
    "recall",
    "loader",
    "step",
    "epoch",
    "recipe",
    "gpu",
)


@command("bench", _MEASURE, BenchSettings)
def bench(
    settings: BenchSettings,
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...", help=f"What to measure, of {', '.join(_PARTS)}; all but the last two if not given."
        ),
    ] = None,
    json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Measure speed and memory against the textbook formulas.

    It takes a quarter of an hour on two cores; --repeats 1 gives first figures sooner. The parts recipe and gpu need
    an NVIDIA GPU.

    Example: [bold]rkd bench angle recall[/bold]
    """
    unknown = [part for part in parts or [] if part not in _PARTS]
    if unknown:
        raise SettingsError(*(f"PART {part}: must be one of {', '.join(_PARTS)}" for part in unknown))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence the profiler
    from rkd_cli.runtime.files import check_replaceable, write_text
    from rkd_cli.screen.tables import bench_json, show_bench
    from rkd_cli.screen.terminal import progress_lines

    if settings.out:
        check_replaceable("--out", settings.out)

    chosen = parts or _PARTS[:-2]
    check_effect(settings, settings.model_fields_set, parts=chosen)
    report: Reporter = silent if quiet else progress_lines
    with if_stopped(""):
        from rkd_cli.bench.gpu import check_gpu, run_gpu
        from rkd_cli.bench.suite import PARTS, machine, run_bench

        if "gpu" in chosen:
            check_gpu(settings)
        rows = run_bench(settings, [part for part in chosen if part in PARTS], report)
        rows += run_gpu(settings, report) if "gpu" in chosen else []
    if settings.out:
        write_text(settings.out, bench_json(rows, machine(settings)) + "\n")
    show_bench(rows, machine(settings), json)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rkd {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


def _complaint(error: Any) -> str:
    """The message of a Typer error (whose types are private), with a suggestion for an unknown name."""
    message = str(error.format_message())
    found = re.match(r"No such (option|command):? '?([^'\s]+?)'?\.?(?:\s|$)", message)
    if not found or error.ctx is None:
        return message
    kind, name = found.groups()
    asked = error.ctx.command
    known = asked.commands if kind == "command" else [one for p in asked.params for one in (*p.opts, *p.secondary_opts)]
    every = "--help-all" if "--help-all" in known else "--help"
    return f"No such {kind}: {name}" + (meant(name, known) or f". {every} lists all.")


def main(arguments: list[str] | None = None) -> None:
    """Run the program; failures exit with 1, 2, 130 or 143."""
    keep_memory()  # before torch allocates
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch prints call stacks when another process ends
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)

    def command() -> int:
        if is_distributed():
            from rkd_cli.runtime.distributed import join

            join()
        return app(arguments, standalone_mode=False) or 0

    _end(*_guarded(command))


def _guarded(work: Callable[[], int | None]) -> tuple[int, tuple[str, ...]]:
    """Exit code and error lines of ``work``, which returns a code."""
    debug = os.environ.get("RKD_DEBUG") == "1"
    code, lines = 0, ()  # type: tuple[int, tuple[str, ...]]
    try:
        code = work() or 0
    except RkdError as error:
        if debug:
            raise
        code, lines = error.exit_code, tuple(f"error: {problem}" for problem in error.problems)
    except Stopped as stopped:
        code, lines = 128 + stopped.args[0], (f"interrupted{stopped.outcome}",)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the pipe has exited
        code = 1
    except OSError as error:
        if debug:
            raise
        code, lines = 1, (f"error: {error.filename or 'a file'}: {error.strerror or error}",)
    except Exception as error:
        if debug:
            raise
        of_typer = hasattr(error, "format_message")
        code = 2 if of_typer else 1
        first = (str(error).strip().splitlines() or [""])[0]
        what = (
            _complaint(error)
            if of_typer
            else f"unexpected {type(error).__name__}: {first}. Set RKD_DEBUG=1 to see the traceback."
        )
        lines = (f"error: {what}",) if what else ()  # without a command Typer only shows the help
    return code, lines


def _end(code: int, lines: Sequence[str]) -> NoReturn:
    """Exit with ``code`` and print ``lines``. If several processes fail, only the first prints, and all exit with its
    code."""
    if not is_distributed():
        print_errors(lines)
        sys.exit(code)
    from rkd_cli.runtime.distributed import conclude, leave

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    if code:
        code, is_first = conclude(code)
        print_errors(lines if is_first else ())
    else:
        leave()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)  # in a normal exit gloo's threads may outlive their objects and abort the process
