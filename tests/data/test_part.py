"""The unfinished file: rows come back as they went in, and what was half written does not count."""

from __future__ import annotations

from pathlib import Path

import torch

from rkd_cli.data.part import open_part, part_of

CPU = torch.device("cpu")


def test_rows_are_kept_but_for_a_half(tmp_path: Path) -> None:
    out, rows = tmp_path / "v.npz", torch.randn(5, 3)
    with open_part(out, {"other images": 1}, 3, CPU) as part:
        assert (part.done, part.changed) == (0, "")
        part.append(rows[:2])
    with part_of(out).open("ab") as file:
        file.write(b"half")
    with open_part(out, {"other images": 1}, 3, CPU) as part:
        assert (part.done, part.changed) == (2, "")
        part.append(rows[2:].bfloat16())
        assert part.shape == (5, 3)
        assert torch.equal(part[0:9], torch.cat([rows[:2], rows[2:].bfloat16().float()]))
        assert torch.equal(part[1:2], rows[1:2])
        part.cut(1)
        part.append(rows[4:])
        assert torch.equal(part[:], rows[[0, 4]])
    with open_part(out, {"other images": 2}, 3, CPU) as part:
        assert (part.done, part.changed) == (0, "other images")
    part_of(out).write_bytes(b"no header")
    with open_part(out, {"other images": 2}, 3, CPU) as part:
        assert (part.done, part.changed) == (0, "its beginning")
