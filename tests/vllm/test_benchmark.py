"""The benchmark's rows on a tiny shape; their times mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import vllm


def test_rows_of_every_kind(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = "--size tiny --side 8 --batch 2 --kind prefill decode load --rounds 1 --tokens 6 --requests 4 --rate 50"
    vllm.main([*options.split(), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["engine"]) for row in rows] == [
        ("prefill", "one ratio"),
        ("prefill", "schedule"),
        ("load", "one ratio"),
        ("load", "schedule"),
        ("decode", "stock again"),
        ("decode", "thin stages"),
        ("decode", "schedule"),
    ]
    assert all(value > 0 for row in rows for key, value in row.items() if key.endswith(("ratio", "_ms")))
    flat, stairs = (row["flops_ratio"] for row in rows[:2])
    assert abs(flat / stairs - 1) < 0.05
