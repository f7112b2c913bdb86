"""The paper's experiment (examples/paper) on a hundred made-up images: it resumes, and says what it has found."""

import csv
import sys

import pytest
from launcher import ROOT
from made_up_mnist import made_up_mnist

sys.path.insert(0, str(ROOT / "examples/paper"))
import cells
import report
import resumable
import run


def test_it_resumes_and_reports(tmp_path, monkeypatch, capsys):
    images = made_up_mnist(tmp_path / "mnist", 120, 40)
    mine = [
        cells.Cell("alone", 1, 1),
        *(cells.Cell(method, 4, 2, seed) for method in ("AGN", "AGN r=1") for seed in (0, 1)),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which main would set, for good
    monkeypatch.setattr(run, "QUICK", cells.Size([8], 4.0, 2, 1.0))
    monkeypatch.setattr(run, "quick", lambda: mine[:3])
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", str(images), "--out", str(tmp_path / "out"), "--jobs", "1"])
    run.main()
    file = tmp_path / "out/cells.jsonl"
    first = file.read_text()
    file.write_text(first + '{"method": "AG')  # a crash
    monkeypatch.setattr(run, "quick", lambda: mine)
    run.main()
    assert "5 cells, 2 to do" in capsys.readouterr().out
    rows = resumable.load(file)
    assert {report.cell_of(row) for row in rows} == set(mine)
    assert file.read_text().startswith(first)
    assert all(row["samples"] == 4 * 120 for row in rows)
    assert all(row["curve"][-1][1] == 4.0 for row in rows)
    with (tmp_path / "out/results.csv").open() as table:
        assert len(list(csv.DictReader(table))) == 5
    assert "| 4, 2 | 2 |" in (tmp_path / "out/tables.md").read_text()


def test_the_grids():
    quick, full = cells.quick(), cells.full()
    assert len(set(quick)) == len(quick)
    for method in cells.PAPER:
        for n, period in cells.PAIRS:
            assert {cells.Cell(method, n, period, seed) for seed in range(3)} <= set(quick)
    for method in ("AGN", "AEASGD"):
        assert sum(cell.method == method for cell in full) == 49
    assert {cell.method for cell in quick + full} <= set(cells.METHODS) == set(report.COLORS)
    assert {cell.scene for cell in quick} == set(cells.SCENES)


def test_the_large_mlp_has_the_published_pairs_whose_ratio_is_1_2_or_4():
    large = cells.large()
    assert len(set(large)) == len(large) == 3 * (1 + 2 * 11)
    assert {cell.workers / cell.period for cell in large if cell.method != "alone"} == {1, 2, 4}
    assert {cell._replace(seed=0) for cell in large} <= set(cells.full())


def test_temporal_efficiency():
    """f_a climbs from 0.1 to 0.9 in 2 s, f_b in 4 s: over the 2 s that both last, areas 1.0 and 0.6."""
    a = {"curve": [[1.0, 1, 0.5, 0], [2.0, 2, 0.9, 0]]}
    b = {"curve": [[4.0, 1, 0.9, 0]]}
    assert report.efficiency(a, b) == pytest.approx(1.0 / 0.6)
    assert report.efficiency(a, a) == 1
    assert report.spread([1.0, 2.0]) == "1.50 (1.00–2.00)"


@pytest.mark.parametrize(
    ("accuracy", "said", "same"),
    [(91.25, "the same", True), (91.25000001, "the same to six digits", True), (91.26, "DIFFERS in curve", False)],
)
def test_a_check_tells_another_rounding_from_other_numbers(capsys, accuracy, said, same):
    row = {**cells.Cell("AGN", 4, 2)._asdict(), "seconds": 1.0, "curve": [[0.5, 1, accuracy]]}
    again = row | {"seconds": 2.0, "curve": [[0.5, 1, 91.25]]}
    assert resumable.check([row], 1, cells.Cell, lambda _: again, ()) is same
    assert capsys.readouterr().out.strip().endswith(f": {said}")
