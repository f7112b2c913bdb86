"""The progress that a run writes to its events."""

import pytest
from launcher import QUADRATIC, events_of
from mpi4py import MPI

from agnmpi import Config, train


@pytest.mark.parametrize(
    "options", [{"rule": "synchronous"}, {"rule": "diloco"}, {"transport": "local", "workers": 2}], ids=str
)
def test_it_is_written_whatever_is_evaluated(tmp_path, options):
    """Here each round crosses an evaluation, and is followed by a line that is due."""
    given = {"batch": 16, "rate": 0.05, "period": 4, "steps": 48, "evaluate_every": 1e-3, "log_every": 1e-9}
    train(Config(QUADRATIC, run_dir=str(tmp_path / "run"), **given, **options), MPI.COMM_SELF)
    events = [event["event"] for event in events_of(tmp_path / "run")]
    assert events.count("evaluation") >= 12
    assert events.count("progress") >= 12
