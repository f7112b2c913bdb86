"""A job that is killed and resumed commits every sample as often as one that was not, whatever the transport."""

import numpy as np
import pytest
from launcher import PROBLEMS, agnmpi

from agnmpi.recovery.checkpoint import newest
from agnmpi.recovery.files import load

LIMIT = 90
COUNTS = ["--rule", "downpour", "--optimizer", "sgd", "--rate", "1", "--batch", "4", "--period", "3", "--epochs", "8"]
WAYS = [
    ["--transport", "accumulate"],
    ["--transport", "accumulate", "--no-wait"],
    pytest.param(["--transport", "p2p", "--no-wait"], marks=pytest.mark.long),
    pytest.param(["--transport", "accumulate", "--overlap"], marks=pytest.mark.long),
    pytest.param(["--transport", "rma"], marks=pytest.mark.long),
    pytest.param(["--transport", "p2p", "--overlap"], marks=pytest.mark.long),
    pytest.param(["--transport", "p2p", "--centers", "2"], marks=pytest.mark.long),
]


def counted(run):
    return load(run / "center.safetensors")[0]["count"]


@pytest.mark.parametrize("options", WAYS, ids=" ".join)
def test_a_kill_and_a_resume_count_every_sample_once_an_epoch(tmp_path, options):
    run, problem = tmp_path / "run", f"{PROBLEMS}:Counts"
    given = [*COUNTS, *options, "--checkpoint-commits", "5", "--set", "options.slow=0.01"]
    given += ["--inject-faults", "--run-dir", run]
    faults = {"AGNMPI_FAULTS": "kill:3@80,slow:2@0:0.003"}
    code, output = agnmpi(4, "train", problem, *given, env=faults, timeout=LIMIT)
    assert code not in (0, 76), output
    assert newest(run, print)[2]["steps"] > 0, "it was killed before the first checkpoint"
    code, output = agnmpi(4, "train", "--resume", run, "--set", "options.slow=0", timeout=LIMIT)
    assert code == 0, output
    np.testing.assert_array_equal(counted(run), np.full(240, 8.0))
