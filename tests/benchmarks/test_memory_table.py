"""The memory table: eight rows, from the plan alone, in which quantized KV takes less."""

from collections.abc import Callable
from types import ModuleType

import pytest


def test_the_planned_table(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["memory_table.py"])
    assert load_script("memory_table").main() == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 8
    for row in rows:
        plain, int8, int4 = map(float, row[4:])
        assert plain > int8 > int4
    by_cell = {(row[0], row[1], row[2]): float(row[4]) for row in rows}
    kv_gb = 2048 * 512 * 1024 / 1e9  # 2048 more tokens of Llama-2-7B in 16 bits
    difference = by_cell["llama-2-7b", "awq", "4096"] - by_cell["llama-2-7b", "awq", "2048"]
    assert difference == pytest.approx(kv_gb, abs=0.11)
