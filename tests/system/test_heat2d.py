"""The solver of the examples, with the surrogate that it trains, and alone."""

import re
import sys

from launcher import ROOT, mpiexec

HEAT = ROOT / "examples/heat2d/heat.py"
SMALL = ["--grid", 24, "--time-steps", 150]


def test_a_solver_trains_a_surrogate_and_computes_the_same_bits(tmp_path):
    path = tmp_path / "heat.safetensors"
    code, output = mpiexec(3, sys.executable, HEAT, *SMALL, "--train", 5000, "--save", path, timeout=120)
    assert code == 0, output
    assert float(re.search(r"error of the surrogate: ([\d.]+)", output)[1]) < 0.7
    assert "after 5000 steps" in output
    assert path.exists()
    code, alone = mpiexec(3, sys.executable, HEAT, *SMALL, "--train", 0)
    assert code == 0, alone
    plates = [re.search(r"plate (\w{64})", text)[1] for text in (output, alone)]
    assert plates[0] == plates[1]
