"""The unfinished file: rows come back as they went in, and what was half written does not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rkd_cli.data.resumable import open_resumable, rows_path

CPU = torch.device("cpu")
STAMPS = np.arange(10, 15, dtype=np.uint64)


def test_rows_are_kept_but_for_a_half(tmp_path: Path) -> None:
    out, rows = tmp_path / "v.npz", torch.randn(5, 3)
    with open_resumable(out, {"another model": 1}, STAMPS, 3, CPU) as part:
        assert (part.done, part.changed) == (0, "")
        part.append(rows[:2])
    with rows_path(out).open("ab") as file:
        file.write(b"half")
    with open_resumable(out, {"another model": 1}, STAMPS, 3, CPU) as part:
        assert (part.done, part.changed) == (2, "")
        part.append(rows[2:].bfloat16())
        assert part.shape == (5, 3)
        assert torch.equal(part[0:9], torch.cat([rows[:2], rows[2:].bfloat16().float()]))
        assert torch.equal(part[1:2], rows[1:2])
        part.truncate(1)
        part.append(rows[4:])
        assert torch.equal(part[:], rows[[0, 4]])
    with open_resumable(out, {"another model": 2}, STAMPS, 3, CPU) as part:
        assert (part.done, part.changed) == (0, "another model")
    rows_path(out).write_bytes(b"no header")
    with open_resumable(out, {"another model": 2}, STAMPS, 3, CPU) as part:
        assert (part.done, part.changed) == (0, "damaged header")


def test_rows_before_the_first_image_that_differs_are_kept(tmp_path: Path) -> None:
    out, rows = tmp_path / "v.npz", torch.randn(5, 3)
    with open_resumable(out, {}, STAMPS, 3, CPU) as part:
        part.append(rows[:4])
    removed = np.delete(STAMPS, 2)
    with open_resumable(out, {}, removed, 3, CPU) as part:
        assert (part.done, part.changed) == (2, "")
        assert torch.equal(part[:], rows[:2])
        part.append(rows[3:])
    with open_resumable(out, {}, removed, 3, CPU) as part:
        assert part.done == 4
    with open_resumable(out, {}, removed[:3], 3, CPU) as part:
        assert (part.done, part.changed) == (3, "")
        assert torch.equal(part[:], rows[[0, 1, 3]])
    with open_resumable(out, {}, STAMPS + np.uint64(9), 3, CPU) as part:
        assert (part.done, part.changed) == (0, "other images")
