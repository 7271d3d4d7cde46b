"""What a run is told of its model's time at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rkd_cli.events import Event, RunDone
from rkd_cli.models import build_model, cost, load_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.cost import timing
from rkd_cli.models.embedding_net import header_of
from rkd_cli.schemas import Result


def done(path: Path) -> RunDone:
    return RunDone(Result(selected_on="eval", best_epoch=1, best={}, final={}, seconds=1.0), (path,))


@pytest.fixture
def best(tmp_path: Path) -> Path:
    model = build_model("shufflenet_v2_x0_5", 8, False)
    save_model(
        tmp_path / "best.safetensors", model.state_dict(), header_of(model, "shufflenet_v2_x0_5", 40, 36, "demo")
    )
    return tmp_path / "best.safetensors"


def test_a_run_that_is_done_is_timed_on_one_thread(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, threads, told = list[tuple[int, ...]](), list[int](), list[Event]()

    def spied(path: Path) -> torch.nn.Module:
        model = load_model(path)

        def seen(network: torch.nn.Module, images: tuple[torch.Tensor]) -> None:
            shapes.append(tuple(images[0].shape))
            threads.append(torch.get_num_threads())

        model.register_forward_pre_hook(seen)
        return model

    monkeypatch.setattr(cost, "load_model", spied)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        random = torch.get_rng_state()
        timing(told.append)(done(best))
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert ({*shapes}, {*threads}) == ({(1, 3, 36, 36)}, {1})
    (event,) = told
    assert isinstance(event, RunDone) and event.milliseconds is not None and 0 < event.milliseconds < 10_000


def test_a_model_that_cannot_be_timed_ends_no_run(tmp_path: Path) -> None:
    told: list[Event] = []
    timing(told.append)(done(tmp_path / "gone.safetensors"))
    assert told == [done(tmp_path / "gone.safetensors")]
