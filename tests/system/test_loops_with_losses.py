"""Loops of one's own in which ranks die (ULFM)."""

import re
import sys

import pytest
from launcher import ROOT, ULFM, events_of, has_ulfm, mpiexec, result_of


@pytest.mark.skipif(
    not has_ulfm(), reason="this MPI ends the whole job when a rank dies: no ULFM, which Open MPI 5 has"
)
@pytest.mark.parametrize(
    ("deaths", "left", "spares"),
    [
        ("2@1.7", 3, 0),
        pytest.param("0@1.20", 3, 0, marks=pytest.mark.long),
        pytest.param("1@1.30,3@2.30", 2, 0, marks=pytest.mark.long),
        ("0@2.60,3@2.20,1@1.30", 1, 0),
        ("1@1.30", 5, 2),
    ],
)
def test_a_loop_of_ones_own_survives(tmp_path, deaths, left, spares):
    """AGNOptimizer: every commit of the clock is in the center once, and `comm` is what is left.

    The first spare takes the place of the first loss; another waits on.
    """
    script = ROOT / "tests/support/own_loop_with_losses.py"
    code, output = mpiexec(4 + spares, sys.executable, script, deaths, spares, tmp_path, launcher=ULFM, timeout=90)
    assert "Traceback" not in output, output
    said = re.findall(r"rank (\d): clock (\d+), center rank \w+, (\d+) left, (\d+) steps", output)
    assert len(said) == left, output
    assert {(clock, size) for _, clock, size, _ in said} == {("400", str(left))}
    assert {rank for rank, *_, steps in said if int(rank) > 3 and int(steps)} == ({"4"} if spares else set())
    assert code in (0, 137), output
    assert "MPI cannot be finalized any more" in output
    kinds = [event["event"] for event in events_of(tmp_path)]
    assert kinds[-1] == "end"
    assert ("failover" in kinds) == ("0@" in deaths)
    assert kinds.count("lost") + kinds.count("failover") >= 1
    result = result_of(tmp_path)
    assert result["lost"] == sorted(int(death[0]) for death in deaths.split(","))
    assert result["metrics"] == {"w": 400.0}
    assert f"WARNING: the run ended without ranks {result['lost']}" in output
