"""Exact search of a gallery beside faiss's approximate indexes: time a query, what the index finds of it, its build."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from figures import run
from rkd_cli.bench.measure import Measurement, Meter
from rkd_cli.retrieval import nearest
from rkd_cli.settings import BenchSettings

_SIZE, _K = 64, 10
_QUERIES = (1, 1000)  # at once


def measure_search(settings: BenchSettings, meter: Meter) -> Iterator[Measurement]:
    """Seconds of a query; in the notes the share of the ten nearest that an index finds, and what building it takes.

    Args:
        settings: of the benchmark.
        meter: whose device is searched on exactly; faiss searches on the CPU.
    """
    for count in (2000,) if settings.quick else (100_000, 1_000_000):
        gallery, queries = _draw(count, meter.device)
        exact = nearest(queries, gallery, _K)[1].cpu()
        for kind in ("HNSW32", f"IVF{int(count**0.5)}"):
            yield from _beside(kind, gallery, queries, exact, meter)


def _draw(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of unit length about one center for a hundred of them, as classes have."""
    centers = torch.randn(count // 100, _SIZE, device=device)

    def rows(number: int) -> Tensor:
        chosen = centers[torch.randint(len(centers), (number,), device=device)]
        return F.normalize(chosen + 0.7 * torch.randn(number, _SIZE, device=device), dim=1)

    return rows(count), rows(max(_QUERIES))


def _beside(kind: str, gallery: Tensor, queries: Tensor, exact: Tensor, meter: Meter) -> Iterator[Measurement]:
    try:
        import faiss
    except ImportError:
        for at_once in _QUERIES:
            found = meter.compare(_work(gallery, at_once), partial(nearest, queries[:at_once], gallery, _K), None)
            yield Measurement(found.work, found.seconds / at_once, note="a query; faiss is not installed")
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.index_factory(_SIZE, f"{kind},Flat")
    rows, asked = gallery.cpu().numpy(), queries.cpu().numpy()
    meter.tell(f"the building of {kind} for {len(gallery):,} rows")
    start = time.perf_counter()
    index.train(rows)
    index.add(rows)
    built = time.perf_counter() - start
    parameter, value = ("efSearch", 64) if kind.startswith("HNSW") else ("nprobe", 16)
    faiss.ParameterSpace().set_index_parameter(index, parameter, value)
    found_rows = torch.from_numpy(index.search(asked, _K)[1])
    recall = float((found_rows[:, :, None] == exact[:, None, :]).any(dim=2).float().mean())
    note = f"beside exact, a query; recall@{_K} {recall:.3f}, built in {built:.1f} s"
    for at_once in _QUERIES:
        some, some_asked = queries[:at_once], asked[:at_once]
        found = meter.compare(
            f"{_work(gallery, at_once)}, faiss {kind} {parameter}={value}",
            partial(index.search, some_asked, _K),
            partial(nearest, some, gallery, _K),
            memory=False,
        )
        assert found.textbook_seconds is not None
        yield Measurement(found.work, found.seconds / at_once, found.textbook_seconds / at_once, note=note)


def _work(gallery: Tensor, at_once: int) -> str:
    return f"search {len(gallery):,} x {_SIZE}, {at_once:,} at once"


if __name__ == "__main__":
    run(measure_search, __doc__, "repeats")
