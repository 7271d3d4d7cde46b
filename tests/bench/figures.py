"""How the benchmarks of this folder run: flags, a line of progress for each case, then a table or JSON.

They measure figures of the manual's pages: `python tests/bench/embed.py --help`. `rkd bench` measures what a user asks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from rkd_cli.bench.measure import Measurement, Meter
from rkd_cli.bench.suite import machine
from rkd_cli.errors import SettingsError
from rkd_cli.runtime.allocator import keep_memory
from rkd_cli.runtime.context import make_context
from rkd_cli.runtime.files import check_replaceable, write_text
from rkd_cli.screen.tables import bench_json, show_bench
from rkd_cli.settings import BenchSettings, default_text, flag_name, help_text
from rkd_cli.settings.resolve import resolve

_ALWAYS = ("seed", "quick", "device", "out")
Settings = TypeVar("Settings", bound=BenchSettings)
Rows = Iterable[Measurement]


def asked(model: type[Settings], about: str | None, flags: tuple[str, ...]) -> tuple[Settings, bool]:
    """The settings of the command line, and whether it asks for JSON.

    Args:
        model: the settings.
        about: the benchmark.
        flags: fields of the model that have an effect.
    """
    keep_memory()  # before torch allocates, as the commands do
    parser = argparse.ArgumentParser(description=about)
    for name in (*flags, *_ALWAYS):
        field, default = model.model_fields[name], default_text(model.model_fields[name])
        text = f"{help_text(field)} Default: {default}.".replace("%", "%%") if default else help_text(field)
        if field.annotation is bool:
            parser.add_argument(flag_name(name), action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag_name(name), metavar="VALUE", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    try:
        settings = resolve(model, given)
        if settings.out:
            check_replaceable("--out", settings.out)
    except SettingsError as error:
        parser.error("; ".join(error.problems))
    return settings, as_json


def run(measure: Callable[[BenchSettings, Meter], Rows], about: str | None, *flags: str) -> None:
    """A benchmark from its flags to its table.

    Args:
        measure: gives its rows.
        about: the benchmark, for its help.
        flags: fields of ``BenchSettings`` that it has.
    """
    settings, as_json = asked(BenchSettings, about, flags)
    torch.manual_seed(settings.seed)
    meter = Meter(make_context(settings.device, "fp32").device, settings.repeats, _tell)
    rows = list(measure(settings, meter))
    if settings.out:
        write_text(settings.out, bench_json(rows, machine(settings)) + "\n")
    show_bench(rows, machine(settings), as_json)


def _tell(what: str) -> None:
    print(f"Measuring {what}", file=sys.stderr, flush=True)
