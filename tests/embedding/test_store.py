"""The store: rows come back as they went in, and what was half written or damaged does not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rkd_cli.embedding.store import open_store
from rkd_cli.errors import RunError

STAMPS = np.arange(10, 15, dtype=np.uint64)


def test_rows_are_there_but_for_a_half(tmp_path: Path) -> None:
    path, rows = tmp_path / "s", torch.randn(5, 3)
    with open_store(path, {"another model": 1}, 3) as store:
        assert (store.done, store.changed) == (0, "")
        store.append(rows[:2], STAMPS[:2])
    with path.open("ab") as file:
        file.write(b"half")
    with open_store(path, {"another model": 1}, 3) as store:
        assert (store.done, store.changed) == (2, "")
        store.append(rows[2:].bfloat16(), STAMPS[2:])
        assert store.shape == (5, 3)
        assert torch.equal(store[0:9], torch.cat([rows[:2], rows[2:].bfloat16().float()]))
        assert torch.equal(store[1:2], rows[1:2])
        store.truncate(1)
        store.append(rows[4:], STAMPS[4:])
        assert torch.equal(store[:], rows[[0, 4]])
        assert store.find(STAMPS).tolist() == [0, -1, -1, -1, 1]
        assert np.array_equal(store.take(np.array([1, 0])), rows[[4, 0]].numpy())
    with open_store(path, {"another model": 2}, 3) as store:
        assert (store.done, store.changed) == (0, "another model")
    with open_store(path, {"another model": 2}, 4) as store:
        assert (store.done, store.changed) == (0, "another version")
    path.write_bytes(b"no header")
    with open_store(path, {"another model": 2}, 3) as store:
        assert (store.done, store.changed) == (0, "a damaged file")


def test_rows_before_the_first_image_that_differs_are_the_same(tmp_path: Path) -> None:
    path, rows = tmp_path / "s", torch.randn(5, 3)

    def opened(stamps: np.ndarray, more: slice = slice(0, 0)) -> tuple[int, str]:
        with open_store(path, {}, 3) as store:
            store.truncate_to_matching(stamps)
            found = store.done, store.changed
            store.append(rows[more], stamps[found[0] :][: len(rows[more])])
            return found

    assert opened(STAMPS, slice(0, 4)) == (0, "")
    removed = np.delete(STAMPS, 2)
    assert opened(removed, slice(3, 5)) == (2, "")
    assert opened(removed) == (4, "")
    assert opened(removed[:3]) == (3, "")
    with open_store(path, {}, 3) as store:
        assert torch.equal(store[:], rows[[0, 1, 3]])
    assert opened(STAMPS + np.uint64(9)) == (0, "other images")


@pytest.mark.parametrize("at", [0, 9, 19])
def test_a_damaged_row_is_of_no_image(tmp_path: Path, at: int) -> None:
    path, rows = tmp_path / "s", torch.randn(5, 3)
    with open_store(path, {}, 3) as store:
        store.append(rows, STAMPS)
    whole = bytearray(path.read_bytes())
    whole[4096 + 2 * 20 + at] ^= 16
    path.write_bytes(whole)
    with open_store(path, {}, 3) as store:
        assert store.find(STAMPS).tolist() == [0, 1, -1, 3, 4]
        store.truncate_to_matching(STAMPS)
        assert store.done == 2


def test_rewritten_it_holds_these_rows_alone(tmp_path: Path) -> None:
    path, rows = tmp_path / "s", torch.randn(5, 3)
    with open_store(path, {"facts": 1}, 3) as store:
        store.append(rows, STAMPS)
        store.rewrite(rows[3:], STAMPS[3:])
    with open_store(path, {"facts": 1}, 3) as store:
        assert (store.changed, store.find(STAMPS).tolist()) == ("", [-1, -1, -1, 0, 1])
        assert torch.equal(store[:], rows[3:])
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_a_file_that_another_has_open_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    busy = RunError("busy")
    with (
        open_store(tmp_path / "s", {}, 3, busy=busy),
        pytest.raises(RunError, match="busy"),
        open_store(tmp_path / "s", {}, 3, busy=busy),
    ):
        pass
