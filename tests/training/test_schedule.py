"""The learning rate of every step, against values written out."""

from __future__ import annotations

import math
from functools import partial

import pytest

from rkd_cli.training.schedule import cosine_rate, step_rate, warmed_up


@pytest.mark.parametrize("step", [1, 7, 10])
def test_step_knows_no_steps(step: int) -> None:
    rates = [step_rate(1.0, 0.5, (2, 4), epoch, step) for epoch in range(1, 6)]
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_cosine_falls_with_every_step_to_nothing() -> None:
    rates = [cosine_rate(2.0, 1, 3, 4, epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([1 + math.cos(math.pi * number / 12) for number in range(12)])
    assert rates[0] == 2.0
    assert rates[6] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.04
    assert cosine_rate(2.0, 1, 3, 4, 4, 1) == 0.0


def test_warmup_rises_to_the_rate_and_the_cosine_begins_there() -> None:
    rate = partial(warmed_up, partial(cosine_rate, 2.0, 3, 4, 5), 2, 5)
    rates = [rate(epoch, step) for epoch in range(1, 5) for step in range(1, 6)]
    assert rates[:10] == pytest.approx([0.2 * number for number in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * number / 10) for number in range(10)])


def test_warmup_of_a_step_schedule_keeps_its_milestones() -> None:
    rate = partial(warmed_up, partial(step_rate, 1.0, 0.5, (2, 5)), 3, 2)
    rates = [rate(epoch, step) for epoch in range(1, 6) for step in (1, 2)]
    assert rates == pytest.approx([1 / 6, 2 / 6, 3 / 12, 4 / 12, 5 / 12, 6 / 12, 0.5, 0.5, 0.25, 0.25])
