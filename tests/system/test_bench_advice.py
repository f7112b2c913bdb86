"""`agnmpi bench MODULE:PROBLEM` as a user sees it."""

import json

import pytest
from launcher import PROBLEMS, ROOT, agnmpi

LIMIT = 120
SUPPORT = ROOT / "tests" / "support"


def bench(tmp_path, problem, *options, ranks=3):
    file = tmp_path / "bench.json"
    given = [f"{PROBLEMS}:{problem}", "--seconds", "0.1", "--json", file, *options]
    code, output = agnmpi(ranks, "bench", *given, timeout=LIMIT)
    assert code == 0, output
    return json.loads(file.read_text())


def advice(report, about):
    return next((line for line in report["advice"] if line.startswith(about)), "")


def test_no_encoding_is_recommended_for_six_numbers(tmp_path):
    report = bench(tmp_path, "Timed", "--set", "options.mean=0.01", "--transports", "p2p", "rma")
    said = advice(report, "Encoding")
    assert "float32" in said
    assert not any(text in said for text in ("int4", "int8", "B/s"))
    assert all(costs["one_alone"] > 0 and costs["one_all_at_once"] > 0 for costs in report["costs"])
    assert report["not_finite"] == 0
    assert not advice(report, "WARNING: 100.0 %")


@pytest.mark.parametrize(
    ("rule", "transport", "centers"), [("agn", "p2p", 2), ("synchronous", "allreduce", 1)], ids=["centers", "together"]
)
def test_one_number_with_each_center(tmp_path, rule, transport, centers):
    given = ["--rule", rule, "--transports", transport] + ["--centers", str(centers)] * (centers > 1)
    report = bench(tmp_path, "Quadratic", "--seconds", "0.02", *given, ranks=4)
    (costs,) = report["costs"]
    assert report["centers"] == centers
    assert costs["one_alone"] > 0
    assert (costs["one_all_at_once"] == costs["one_alone"]) == (transport == "allreduce")


def test_a_problem_whose_loss_is_always_nan(tmp_path):
    report = bench(tmp_path, "Diverges", "--transports", "accumulate")
    assert advice(report, "WARNING: 100.0 % of the steps gave NaN or infinity")
    assert report["not_finite"] == 1


def test_a_problem_whose_gradients_are_always_nan(tmp_path):
    problem = tmp_path / "nan.py"
    text = f"import sys\nsys.path.insert(0, {str(SUPPORT)!r})\nfrom problems import Spoilt\n"
    problem.write_text(f"{text}class AlwaysNaN(Spoilt):\n    def spoils(self, indices):\n        return True\n")
    code, output = agnmpi(3, "bench", f"{problem}:AlwaysNaN", "--seconds", "0.1", timeout=LIMIT)
    assert code == 2, output
    assert output.count("every gradient holds NaN or infinity: look at the problem") == 1
    assert "Traceback" not in output
