"""The command line as a person uses it: runs, files, and every refusal with its text, exit code and no hang."""

import json
import re
import sys
import tomllib

import numpy as np
import pytest
from launcher import PROBLEMS, QUADRATIC, ROOT, agnmpi, events_of, mpi_library, mpiexec, result_of

from agnmpi.cli.main import main
from agnmpi.recovery.files import load

LIMIT = 60


def transport_of(options):
    """The transport that these options mean."""
    if "--no-use-locking" in options:
        return "accumulate"
    if "--transport" in options:
        return options[options.index("--transport") + 1]
    return "allreduce" if {"synchronous", "diloco"} & {*options} else "p2p"


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, []),
        (4, ["--period", "3"]),
        (4, ["--variant", "gradient", "--optimizer", "momentum"]),
        (3, ["--overlap", "--optimizer", "sgd"]),
        # A whole displacement of a worker that got no core until the end would be out of bounds.
        (3, ["--rule", "downpour", "--rate", "0.05", "--period", "3", "--set", "options.slow=0.001"]),
        (3, ["--rule", "dynsgd", "--set", "options.dtype=float64"]),
        (3, ["--rule", "aeasgd", "--rate", "0.1", "--rho", "3"]),
        (3, ["--rule", "eamsgd", "--rate", "0.02"]),
        (3, ["--rule", "synchronous", "--schedule", "cosine", "--warmup", "5"]),
        (3, ["--rule", "diloco", "--rate", "0.05"]),
        (1, ["--rule", "synchronous"]),
        (1, ["--transport", "local", "--workers", "3"]),
        (3, ["--transport", "rma"]),
        (3, ["--transport", "rma", "--no-use-locking", "--overlap"]),  # TensorFlow's words
        (3, ["--transport", "accumulate"]),
        (4, ["--centers", "2", "--rule", "dynsgd", "--rate", "0.05"]),
        (5, ["--transport", "rma", "--centers", "2", "--center-optimizer", "momentum"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_train(tmp_path, ranks, options):
    run = tmp_path / "run"
    given = ["--epochs", "40", "--batch", "16"] + ([] if "--rate" in options else ["--rate", "0.05"])
    code, output = agnmpi(ranks, "train", QUADRATIC, *given, *options, "--run-dir", run, timeout=LIMIT)
    assert code == 0, output
    result = result_of(run)
    assert result["metrics"]["distance"] < 0.25, result
    assert result["steps"] == 40 * 15
    assert result["samples"] == 40 * 240, "each sample of an epoch is used once"
    assert result["clock"] == result["commits"] > 0
    expected = {
        "rule",
        "variant",
        "transport",
        "workers",
        "period",
        "seconds",
        "samples_per_second",
        "loss",
        "mpi",
        "agnmpi",
    }
    assert expected <= set(result)
    assert set(result["staleness"]) == {"mean", "max"}
    arrays, facts = load(run / "center.safetensors")
    assert {name: x.shape for name, x in arrays.items()} == {"w": (4,), "b": (2,)}
    assert int(facts["clock"]) == result["clock"]
    seen = events_of(run)
    assert seen[0]["event"] == "start"
    assert seen[-1]["event"] == "end"
    assert seen[-1]["result"]["metrics"] == result["metrics"]
    assert all(np.diff([e["seconds"] for e in seen]) >= 0)
    assert result["transport"] == transport_of(options)
    if "gradient" not in options and "--rule" not in options:
        assert "n/λ = " in output


def test_the_written_configuration_repeats_the_run(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = [
        "--optimizer",
        "momentum",
        "--rate",
        "0.03",
        "--set",
        "optimizer_options.beta=0.8",
        "--seed",
        "7",
    ]
    code, output = agnmpi(2, "train", QUADRATIC, "--epochs", "3", *options, "--run-dir", first)
    assert code == 0, output
    code, output = agnmpi(2, "train", "--config", first / "config.toml", "--run-dir", second)
    assert code == 0, output
    a, b = (load(run / "center.safetensors")[0] for run in (first, second))
    np.testing.assert_array_equal(a["w"], b["w"])  # one worker: the same bits
    configs = [tomllib.loads((run / "config.toml").read_text()) for run in (first, second)]
    assert configs[0] == configs[1]
    assert configs[0]["optimizer_options"] == {"beta": 0.8}
    code, output = agnmpi(2, "train", "--config", first / "config.toml", "--run-dir", first)
    assert code != 0
    assert "holds another run" in output


def test_evaluation_does_not_stop_the_service(tmp_path):
    """Evaluations of 0.5 s each; commits go on meanwhile, so the run takes a fraction of their sum."""
    run = tmp_path / "run"
    code, output = agnmpi(
        3, "train", f"{PROBLEMS}:SlowEvaluation", "--epochs", "20", "--set", "options.slow=0.01", "--period", "1",
        "--evaluate-every", "1", "--log-every", "0.05", "--run-dir", run, timeout=LIMIT,
    )  # fmt: skip
    assert code == 0, output
    options = result_of(run)["options"]
    assert (options["rate"], options["warmup"]) == (0.002, 64), "the defaults of two workers"
    seen = events_of(run)
    evaluations = [e for e in seen if e["event"] == "evaluation"]
    assert len(evaluations) >= 2
    clocks = [e["commits"] for e in seen if e["event"] == "progress"]
    first = evaluations[0]
    # The first evaluation was of clock t and was done half a second later; in between commits were applied.
    before = max((c for c in clocks if c <= first["clock"]), default=0)
    during = [e["commits"] for e in seen if e["event"] == "progress" and e["seconds"] <= first["seconds"]]
    assert max(during) > before + 10


REFUSALS = [
    (3, f"{PROBLEMS}:OtherOrder", [], "order of parameters differs between ranks: w, b on ranks 0-1; b, w on rank 2"),
    (1, QUADRATIC, [], "needs a center and at least one worker.*mpiexec -n 4"),
    (2, QUADRATIC, ["--period", "0"], "period must be at least 1, not 0"),
    (2, QUADRATIC, ["--frobnicate"], "unrecognized arguments: --frobnicate"),
    (2, QUADRATIC, ["--set", "options.colour=3"], "colour"),
    (2, QUADRATIC, ["--rule", "synchronous", "--transport", "p2p"], "use allreduce"),
    (2, QUADRATIC, ["--transport", "local"], "one process"),
    (2, QUADRATIC, ["--device", "gpu"], "CuPy finds no CUDA device"),
    (2, "no_such_module:Problem", [], "no module 'no_such_module'"),
    (2, "missing.py:Problem", [], "problem file missing.py does not exist"),
    (2, f"{PROBLEMS}:Missing", [], "no class or function 'Missing'"),
    (2, f"{PROBLEMS}:on_last_rank", [], r"TypeError: on_last_rank\(\) takes 0"),
    (3, f"{PROBLEMS}:NoData", [], r"No such file or directory: '/nowhere/data.bin' \(rank 2\)"),
    (
        3,
        f"{PROBLEMS}:OtherShape",
        [],
        r"'w' differs between ranks: shape \(4,\) on ranks 0-1; shape \(5,\) on rank 2",
    ),
    (3, f"{PROBLEMS}:OtherDtype", [], "dtype differs between ranks: float32 on ranks 0-1; float64 on rank 2"),
    (3, f"{PROBLEMS}:OtherNames", [], "'v' differs between ranks: missing on ranks 0-1; shape .* on rank 2"),
    (
        2,
        f"{ROOT}/examples/mnist_mlp.py:Mnist",
        ["--set", "options.path=nowhere"],
        "nowhere/train-images.*options.path",
    ),
]


@pytest.mark.parametrize(("ranks", "problem", "options", "text"), REFUSALS, ids=[r[3][:40] for r in REFUSALS])
def test_refusals_are_said_once(ranks, problem, options, text):
    """One clear error from rank 0, exit code 2, no traceback, no hang."""
    code, output = agnmpi(ranks, "train", *([problem] if problem else []), *options, timeout=LIMIT)
    assert code == 2, output
    assert len(re.findall(text, output)) == 1, output
    assert "Traceback" not in output


REFUSED_OPTIONS = [
    ([QUADRATIC, "--rate", "-0.1"], "rate must be positive, not -0.1"),
    ([QUADRATIC, "--rule", "nonsense"], "invalid choice: '?nonsense"),
    ([QUADRATIC, "--set", "perod=3"], "unknown option 'perod'; did you mean 'period'"),
    ([QUADRATIC, "--set", "period=three"], "period must be of type int, not 'three'"),
    ([QUADRATIC, "--set", "optimizer_options.beta9=1"], "optimizer adam: .*beta9"),
    ([QUADRATIC, "--config", "missing.toml"], "missing.toml"),
    ([QUADRATIC, "--no-use-locking"], "use_locking=False needs transport 'rma'"),
    ([QUADRATIC, "--workers", "3", "--transport", "p2p"], "workers = 3 is for --transport local"),
    ([QUADRATIC, "--rule", "aeasgd", "--rate", "0.5"], "α = ηρ must lie in"),
    ([], "which problem"),
]


@pytest.mark.parametrize(("given", "text"), REFUSED_OPTIONS, ids=[text[:40] for _, text in REFUSED_OPTIONS])
def test_refused_options_are_said_once(capsys, given, text):
    """Before ranks have roles, on each by the same code; what rank 0 makes of it is shown above."""
    assert main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert len(re.findall(text, said)) == 1, said
    assert "Traceback" not in said


FAILURES = [
    (f"{PROBLEMS}:Raises", 2, "ArithmeticError: this gradient went wrong"),
    (f"{PROBLEMS}:WrongGradient", 2, r"'w' has shape \(5,\), expected \(4,\)"),
    (f"{PROBLEMS}:Exits", 2, "SystemExit: 7"),
]


@pytest.mark.parametrize(("problem", "rank", "text"), FAILURES, ids=[f[2][:30] for f in FAILURES])
def test_a_failure_on_one_rank_ends_the_job_with_its_traceback(problem, rank, text):
    # Without the failure this would go on for hours.
    code, output = agnmpi(3, "train", problem, "--epochs", "1e7", timeout=LIMIT)
    assert code != 0, output
    assert f"rank {rank} on " in output
    assert re.search(text, output), output
    assert output.count("Traceback") >= 1


def test_the_center_is_kept_when_the_last_evaluation_fails(tmp_path):
    run, problem = tmp_path / "run", f"{PROBLEMS}:SecondEvaluationRaises"
    code, output = agnmpi(2, "train", problem, "--evaluate-every", "0", "--run-dir", run)
    assert code == 77, output
    assert "the second evaluation went wrong" in output
    assert result_of(run)["metrics"] == {}
    arrays, _ = load(run / "center.safetensors")
    assert np.isfinite(arrays["w"]).all()


def test_a_run_that_diverges_says_so_in_valid_json(tmp_path):
    code, output = agnmpi(2, "train", f"{PROBLEMS}:Diverges", "--run-dir", tmp_path / "run", timeout=LIMIT)
    assert code == 0, output
    assert "WARNING: the loss or a metric is not finite" in output

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    result = json.loads((tmp_path / "run/result.json").read_text(), parse_constant=refuse)
    assert result["loss"] is None
    for line in (tmp_path / "run/events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


SCRIPT = """
import sys, time
import numpy as np
from mpi4py import MPI
from agnmpi import AGNOptimizer, sgd
comm = MPI.COMM_WORLD
opt = AGNOptimizer(sgd(0.1), np.zeros(3), comm, 2, transport="{transport}")
count = 0
for step in opt.steps({steps}):
    count += 1
    if comm.rank == 1 and count == 5:
        {act}
    if comm.rank == 2:
        time.sleep(1e-3)  # rank 1 comes to its fifth step, whoever gets the cores
    opt.minimize(lambda p: (0.0, p["0"] - 1))
sys.stdout.write("rank %d ended at %d\\n" % (comm.rank, opt.global_step))  # in one piece
opt.close()
"""


@pytest.mark.parametrize("transport", ["p2p", "rma"])
@pytest.mark.parametrize(
    ("act", "good", "text"),
    [
        ("raise KeyError('lost')", False, "(?s)rank 1 on .*KeyError: 'lost'"),
        ("continue", False, "step .* was not taken"),
        ("break", True, "(?s)rank 0 ended.*|rank 1 ended"),
        ("sys.exit(3)", None, ""),
    ],
)
def test_a_script_of_ones_own_never_hangs(tmp_path, act, good, text, transport):
    script = tmp_path / "script.py"
    # A failure must show at once, not when the others have finished their work.
    script.write_text(SCRIPT.format(act=act, transport=transport, steps=400 if good is not False else 10**9))
    code, output = mpiexec(3, sys.executable, script, timeout=LIMIT)
    assert (code == 0) == bool(good), output
    assert re.search(text, output), output


@pytest.mark.parametrize("ranks", [1, 4])
def test_own_loop_example(ranks):
    code, output = mpiexec(ranks, sys.executable, ROOT / "examples/own_loop.py", timeout=LIMIT)
    assert code == 0, output
    found = re.search(rf"workers: {max(1, ranks - 1)}, commits: \d+, w = ([\d.]+)", output)
    assert float(found[1]) == pytest.approx(3, abs=1e-3)
    lines = (ROOT / "examples/own_loop.py").read_text().splitlines()
    assert len(lines) < 40


@pytest.mark.parametrize("ranks", [1, 3])
def test_doctor(ranks):
    code, output = agnmpi(ranks, "doctor", "--json", "--period", "1", timeout=LIMIT)
    assert code == 0, output
    report = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert report["world"] == len(report["ranks"]) == ranks
    roles = [rank["role"] for rank in report["ranks"]]
    assert report["thread_level"] == "serialized", "more locks itself under ULFM, less forbids a communication thread"
    assert roles == (["alone"] if ranks == 1 else ["center", "worker", "worker"])
    assert mpi_library().startswith(report["mpi"][:5])
    assert bool(report["advice"]) == (ranks > 1)
    code, output = agnmpi(ranks, "doctor", "--encodings", timeout=LIMIT)
    assert code == 0
    assert "world of" in output
    assert "at 10 Gbit/s 1 M numbers take float32" in output


def test_bench(tmp_path):
    code, output = agnmpi(
        2, "bench", "--sizes", "1", "300000", "--rounds", "20", "--optimizer-size", "200000", "--quiet", "2",
        "--json", tmp_path / "bench.json", timeout=LIMIT,
    )  # fmt: skip
    assert code == 0, output
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["transport"], row["n"], row["side"]) for row in report["exchanges"]] == [
        (transport, n, side)
        for transport in ("p2p", "rma", "accumulate", "allreduce")
        for n in (1, 300000)
        for side in ("agnmpi", "floor", "memcpy")
    ]
    assert all(row["seconds"] > 0 for row in report["exchanges"])
    workers = {row["transport"]: row["workers"] for row in report["exchanges"]}
    assert workers == {"p2p": 1, "rma": 1, "accumulate": 1, "allreduce": 2}
    assert [row["n"] for row in report["pack"]] == [1, 300000]
    names = {row["name"] for row in report["optimizers"] if not row["name"].startswith("torch ")}
    assert names == {"memcpy", "sgd", "momentum", "adam", "center add", "agn delta"}
    assert set(report["quiet"]) == {"center_cpu", "worker_cpu", "busy_seconds", "quiet_seconds"}


def test_bench_refuses_a_file_that_cannot_be_written_before_it_measures(tmp_path):
    code, output = agnmpi(2, "bench", "--json", tmp_path / "missing" / "bench.json", timeout=LIMIT)
    assert code == 2
    assert "No such file or directory" in output
    assert "exchanges" not in output


def test_bench_utilisation(tmp_path):
    code, output = agnmpi(
        3, "bench", "utilisation", "--step", "0.002", "--parameters", "20000", "--period", "3", "--periods", "2",
        "--rounds", "2", "--slowest", "4", "--no-wait", "--json", tmp_path / "utilisation.json", timeout=LIMIT,
    )  # fmt: skip
    assert code == 0, output
    report = json.loads((tmp_path / "utilisation.json").read_text())
    names = ["p2p", "p2p int8", "rma", "rma int8", "accumulate", "allreduce"]
    found = [
        (row["transport"], row["encoding"], row["overlap"], row["workers"]) for row in report["rows"] if row["wait"]
    ]
    assert [row["transport"] for row in report["rows"] if not row["wait"]] == ["p2p", "p2p", "rma", "rma", "accumulate"]
    assert found == [
        (name.split()[0], "int8" if "int8" in name else "float32", overlap, 3 if name == "allreduce" else 2)
        for name in names
        for overlap in (False, True)
    ]
    for row in report["rows"]:
        assert row["bytes"] == 2 * (79 * 260 if row["encoding"] == "int8" else 4 * 20000)
        assert row["compute_seconds"] > 2 * 3 * 0.002, "the sleep is part of it, the last rank's fourfold"
        assert row["exchange_seconds"] == row["period_seconds"] - row["compute_seconds"]
        assert 0 < row["lowest_utilisation"] <= row["utilisation"]
        assert row["overlap"] or row["hidden"] is None
    assert output.count("accumulate") == 3
    assert output.count("no wait") >= 5


@pytest.mark.parametrize(
    ("options", "fit"),
    [
        (["--batch", "8"], ["p2p", "rma", "accumulate"]),
        (["--rule", "synchronous", "--set", "options.dtype=float64"], ["allreduce"]),
        (["--centers", "2", "--transports", "rma", "p2p"], ["p2p", "rma"]),
    ],
    ids=["agn", "synchronous", "centers"],
)
def test_bench_of_a_problem(tmp_path, options, fit):
    code, output = agnmpi(
        4, "bench", QUADRATIC, "--seconds", "0.02", "--json", tmp_path / "b.json", *options, timeout=LIMIT
    )
    assert code == 0, output
    report = json.loads((tmp_path / "b.json").read_text())
    assert [costs["transport"] for costs in report["costs"]] == fit
    assert all(costs["alone"] > 0 and costs["all_at_once"] > 0 for costs in report["costs"])
    assert {costs["workers"] for costs in report["costs"]} == {4 if fit == ["allreduce"] else 4 - report["centers"]}
    assert report["step"] == report["gradient_seconds"] + report["optimizer_seconds"] > 0
    assert (report["numbers"], report["number_bytes"]) == (6, 8 if "synchronous" in options else 4)
    assert f"So: {report['options']} (" in output
    assert ("not measured: allreduce" in output) == ("--batch" in options)


@pytest.mark.parametrize(
    ("ranks", "options", "said"),
    [
        (1, ["utilisation"], "type: mpiexec -n 3"),
        (2, ["utilisation", "--step", "nan"], "--step must be a number of seconds, 0 or more, not nan"),
        (2, ["utilisation", "--slowest", "-1"], "--slowest must be a number of times, 0 or more, not -1.0"),
        (2, ["utilisation", "--period", "0"], "--period must be at least 1, not 0"),
        (2, [QUADRATIC, "--seconds", "0"], "--seconds must be positive, not 0.0"),
        (2, [QUADRATIC, "--transports", "allreduce"], "rule agn cannot use transport 'allreduce'; use p2p"),
        (2, [f"{PROBLEMS}:OtherShape"], "parameter 'w' differs between ranks"),
        (2, ["problem"], "which problem? Give MODULE:PROBLEM"),
    ],
    ids=lambda value: " ".join(value).replace(str(PROBLEMS), "") if isinstance(value, list) else None,
)
def test_bench_refuses(tmp_path, ranks, options, said):
    code, output = agnmpi(ranks, "bench", *options, timeout=LIMIT, cwd=tmp_path)
    assert code == 2, output
    assert output.count(said) == 1


def test_help():
    code, output = agnmpi(2, "train", "--help", timeout=LIMIT)
    assert code == 0
    assert output.count("communication period") == 1, "one rank alone says it"
    for word in ("--rule", "--period", "--evaluate-every", "MODULE:PROBLEM", "[default: 10]", "--run-dir"):
        assert word in output


def test_earlier_spellings_still_work(tmp_path):
    """A command of a shell history, and the configuration that it wrote then."""
    old = ["--keep", "2", "--slots", "3", "--transport", "p2p", "--checkpoint-commits", "1"]
    code, output = agnmpi(2, "train", QUADRATIC, *old, "--run", tmp_path / "old", timeout=LIMIT)
    assert code == 0, output
    written = tomllib.loads((tmp_path / "old/config.toml").read_text())
    assert (written["keep_checkpoints"], written["message_buffers"]) == (2, 3)
    assert 1 <= len(list((tmp_path / "old/checkpoints").glob("step-*"))) <= 2
    file = tmp_path / "old.toml"
    file.write_text(f'problem = "{QUADRATIC}"\nkeep = 0\nslots = 2\nrun = "{tmp_path / "new"}"\nuse_locking = true\n')
    code, output = agnmpi(2, "train", "--config", file, timeout=LIMIT)
    assert code == 0, output
    assert not (tmp_path / "new/checkpoints").exists()
    simulated = ["--workers", "2", "--keep", "2", "--run", str(tmp_path / "virtual"), "--lr", "0.01"]
    assert main(["simulate", QUADRATIC, *simulated]) == 0
    assert (tmp_path / "virtual/result.json").exists()


def test_the_example_of_the_readme(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    script = tmp_path / "example.py"
    script.write_text(code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    code, output = mpiexec(3, sys.executable, script, timeout=LIMIT)
    assert code == 0, output
    assert output.count("w = 3.0000") == 3, output
