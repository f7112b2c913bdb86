"""Recognised data and models (examples/evidence): problems in PyTorch, and the driver on a few images and lines."""

import json
import sys

import numpy as np
import pytest
from launcher import ROOT
from made_up_mnist import made_up_mnist

torch = pytest.importorskip("torch")

sys.path.extend([str(ROOT / "examples/evidence"), str(ROOT / "examples"), str(ROOT / "examples/paper")])
import benchmark_drawings  # noqa: E402
import benchmarks  # noqa: E402
import mnist_mlp  # noqa: E402
import resumable  # noqa: E402
from fashion import FashionCNN  # noqa: E402
from shakespeare import GPT, Shakespeare  # noqa: E402

SMALL = {"channels": 16, "layers": 1, "heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of small models only wait for each other where cores are few."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path):
    """A directory of images, and a text."""
    lines = [f"line {i}: {'to be or not to be'[: i % 18]}.\n" for i in range(100)]
    (tmp_path / "input.txt").write_text("".join(lines))
    yield {"Fashion-MNIST": str(made_up_mnist(tmp_path / "images", 256, 40)), "Shakespeare": f"{tmp_path}/input.txt"}
    mnist_mlp.read_set.cache_clear()


@pytest.mark.parametrize("name", ["Fashion-MNIST", "Shakespeare"])
def test_the_gradients(data, name):
    """A small step against the gradient lowers the loss by its length squared; what is evaluated is what is given."""
    make = {"Fashion-MNIST": FashionCNN, "Shakespeare": lambda path: Shakespeare(path=path, **SMALL)}
    problem = make[name](path=data[name])
    params, indices = problem.init(np.random.default_rng(0)), np.arange(12)
    assert problem.evaluate(params) == problem.evaluate(params)
    loss, gradients = problem.gradient(params, indices)
    length = sum(float((g**2).sum()) for g in gradients.values())
    moved = {key: a - 1e-3 / length**0.5 * gradients[key] for key, a in params.items()}
    assert problem.gradient(moved, indices)[0] - loss == pytest.approx(-1e-3 * length**0.5, rel=0.1)
    assert problem.evaluate(moved) != problem.evaluate(params)
    again = make[name](path=data[name]).init(np.random.default_rng(0))
    assert all(np.array_equal(params[key], again[key]) for key in params)


def test_the_sizes_of_the_models(data):
    experiments = benchmarks.EXPERIMENTS
    sizes = {
        "Fashion-MNIST": FashionCNN(path=data["Fashion-MNIST"]).network(),
        "Shakespeare": GPT(65, 64, 128, 4, 4),  # characters of tinyshakespeare
    }
    for name, model in sizes.items():
        assert sum(p.numel() for p in model.parameters()) == experiments[name].parameters
    assert experiments["Fashion-MNIST"].parameters < 100_000


def test_a_center_beside_a_worker_has_half_of_its_link():
    alone, beside = benchmarks.travel(100.0, 1), benchmarks.travel(100.0, 4)
    assert (alone["bandwidth"], alone["service_bandwidth"]) == (100, 200), "what comes in and what goes out"
    assert (beside["bandwidth"], beside["service_bandwidth"]) == (100, 100)
    assert benchmarks.travel(0.0, 1) == {}


def test_no_position_sees_a_later_one():
    torch.manual_seed(0)
    model, text = GPT(7, 8, 16, 2, 2), torch.arange(8)[None] % 7
    other = text.clone()
    other[0, 5] = 6
    before, after = (model(t)[0].detach().numpy() for t in (text, other))
    np.testing.assert_allclose(before[:5], after[:5], atol=1e-6)
    assert np.abs(before[5:] - after[5:]).max(axis=1).min() > 1e-3


def test_the_driver(data, tmp_path, monkeypatch):
    """It resumes after a cell, repeats cells to the same numbers, and reports."""
    fashion, shakespeare = benchmarks.EXPERIMENTS.values()
    small = {
        "Fashion-MNIST": fashion._replace(common=fashion.common | {"epochs": 2.0}),
        "Shakespeare": shakespeare._replace(common=shakespeare.common | {"steps": 8}, options=SMALL),
    }
    monkeypatch.setattr(benchmarks, "EXPERIMENTS", small)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mine = [
        benchmarks.Cell("Fashion-MNIST", benchmarks.ONE, "", 0),
        benchmarks.Cell("Fashion-MNIST", benchmarks.DEFAULT, "", 0),
        benchmarks.Cell("Shakespeare", "DiLoCo", "50 Mbit/s", 0),
    ]
    given = ["--fashion", data["Fashion-MNIST"], "--shakespeare", data["Shakespeare"], "--out", str(tmp_path)]
    for extra, cells in ((), mine[:2]), ((), mine), (["--check"], []):
        monkeypatch.setattr(sys, "argv", ["benchmarks.py", *given, *extra])
        monkeypatch.setattr(benchmarks, "cells", lambda found, cells=cells: cells if len(found) == 2 else [])
        monkeypatch.setattr(benchmarks, "finish", in_this_process)
        if extra:
            with pytest.raises(SystemExit) as ended:
                benchmarks.main()
            assert ended.value.code == 0
        else:
            benchmarks.main()
    one, several, rounds = resumable.load(tmp_path / "benchmarks.jsonl")
    assert [one["samples"], several["samples"], rounds["samples"]] == [512, 512, 96]
    text = (tmp_path / "benchmarks.md").read_text()
    assert f"| {several['accuracy'] - one['accuracy']:+.2f} |" in text
    assert f"| {rounds['loss']:.3f} |" in text


def in_this_process(cells, work, given, file, _jobs):
    """`resumable.finish`, without processes: what is patched here is not there."""
    done = [tuple(row[name] for name in cell._fields) for cell in cells for row in resumable.load(file)]
    with file.open("a") as log:
        log.writelines(json.dumps(work(cell, *given)) + "\n" for cell in cells if tuple(cell) not in done)


def test_another_link_moves_the_times_of_rounds(data, monkeypatch):
    """By two transfers of all bytes a round, as if it had been simulated."""
    experiment = benchmarks.EXPERIMENTS["Shakespeare"]
    size = sum(p.numel() for p in Shakespeare(path=data["Shakespeare"], **SMALL).network().parameters())
    common = experiment.common | {"steps": 20, "evaluate_every": 0.05}
    methods = {"rounds": {"rule": "synchronous", "period": 1}}
    small = {"Shakespeare": experiment._replace(common=common, parameters=size, options=SMALL, methods=methods)}
    monkeypatch.setattr(benchmark_drawings, "EXPERIMENTS", small)
    monkeypatch.setattr(benchmarks, "EXPERIMENTS", small)
    slow, fast = (
        benchmarks.run_cell(benchmarks.Cell("Shakespeare", "rounds", link, 0), data)
        for link in ("50 Mbit/s", "1 Gbit/s")
    )
    assert len(slow["curve"]) > 1
    moved = benchmark_drawings.moved(slow, "1 Gbit/s")
    for point, expected in zip(moved["curve"], fast["curve"], strict=True):
        np.testing.assert_allclose(point[:3], expected[:3], atol=1e-4)
    assert slow["curve"][-1][0] > fast["curve"][-1][0] + 0.01
