"""Kernels on the host: numba against NumPy, several threads against one, the same numbers in each case."""

import importlib.util
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from golden import ONE_WORKER
from in_process import follow_golden
from mpi4py import MPI

from agnmpi.arrays import backend, host_kernels, kernels
from agnmpi.bench.optimizers import optimizer_bandwidth
from agnmpi.cluster.placement import place
from agnmpi.core import rules
from agnmpi.core.optimizers import OPTIMIZERS

PIECE, BLOCK = 96, 40
SIZES = [1, BLOCK, BLOCK + 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 1, 5 * PIECE + 7]
needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
libraries = pytest.mark.parametrize("library", ["NumPy", pytest.param("numba", marks=needs_numba)])


@pytest.fixture(autouse=True)
def _one_thread_and_short_pieces(monkeypatch):
    monkeypatch.setattr(kernels, "LONG", 0)
    monkeypatch.setattr(kernels, "PIECE", PIECE)
    monkeypatch.setattr(backend, "BLOCK", BLOCK)
    yield
    kernels.set_threads(1)


@pytest.fixture
def use(monkeypatch):
    """Chooses the library."""

    def choose(library):
        if library == "NumPy":
            monkeypatch.setattr(kernels, "compiled", lambda name: None)
        else:
            monkeypatch.setattr(kernels, "compiled", host_kernels.compiled)
        assert kernels.library(np.zeros(1)) == library

    return choose


def three_steps(name, n, dtype, **numbers):
    """x and the slots after three steps, with each way of scaling."""
    rng, optimizer = np.random.default_rng(n), OPTIMIZERS[name](0.05, **numbers)
    x = rng.normal(size=n).astype(dtype)
    state = optimizer.init(x)
    for scale in (1.0, -0.5, 1 / 3):
        state = optimizer.update(rng.normal(size=n).astype(dtype), state, x, scale=scale)
    return [x, *state[1:]]


@needs_numba
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numba_gives_numpys_numbers(use, name, decay, dtype):
    for n in SIZES:
        results = []
        for library in ("NumPy", "numba"):
            use(library)
            results.append(three_steps(name, n, dtype, weight_decay=decay))
        for ours, numpys in zip(*reversed(results)):
            np.testing.assert_array_equal(ours, numpys)


@needs_numba
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_numbas_rules_give_numpys_numbers(use, dtype):
    for n in SIZES:
        results = []
        for library in ("NumPy", "numba"):
            use(library)
            x, o, c, delta = np.random.default_rng(n).normal(size=(4, n)).astype(dtype)
            for rule in (rules.downpour(), rules.agn(), rules.aeasgd(0.3)):
                assert rule.delta(x, o, x, 7, delta) is True
                rule.adopt(x, o, delta, c)
                rules.center_step(c, delta, 1.0, None, None)
                rules.center_step(c, delta, 1 / 3, None, None)
            results.append((x, o, c, delta))
        np.testing.assert_array_equal(*results)


@needs_numba
@pytest.mark.parametrize("case", ONE_WORKER)
def test_golden_one_worker_by_numba(use, case):
    use("numba")
    follow_golden(case)


@needs_numba
def test_vectors_of_several_dtypes_are_left_to_numpy(use):
    use("numba")
    x, g, optimizer = np.ones(5, "f4"), np.full(5, 1 / 3), OPTIMIZERS["sgd"](0.1)
    optimizer.update(g, optimizer.init(x), x)
    np.testing.assert_array_equal(x, 1 - np.full(5, 0.1 / 3, "f4"))
    for dtype in ("f2", ">f4", "g"):
        assert kernels.library(np.zeros(1, dtype)) == "NumPy"
        moved = np.ones(5, dtype)
        optimizer.update(moved.copy(), optimizer.init(moved), moved)
        np.testing.assert_allclose(moved.astype("f8"), 0.9, rtol=1e-3)


@libraries
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threads_give_the_bits_of_one(use, name, library):
    use(library)
    for n in SIZES:
        kernels.set_threads(1)
        one = three_steps(name, n, "f4", weight_decay=0.1, clip=1.0)
        for count in (2, 5):
            kernels.set_threads(count)
            np.testing.assert_array_equal(three_steps(name, n, "f4", weight_decay=0.1, clip=1.0), one)


@libraries
@pytest.mark.parametrize("count", [1, 3])
def test_a_delta_says_whether_it_is_finite(use, library, count):
    use(library)
    kernels.set_threads(count)
    n = 5 * PIECE + 7
    x, o, delta = np.zeros(n, "f4"), np.full(n, -2e38, "f4"), np.empty(n, "f4")
    for rule in (rules.downpour(), rules.agn(), rules.aeasgd(0.3)):
        assert rule.delta(x, o, x, 7, delta) is True, "its square overflows, it does not"
        for at in (0, BLOCK, PIECE, n // 2, n - 1):
            for bad in (np.nan, np.inf, -np.inf):
                broken = x.copy()
                broken[at] = bad
                assert rule.delta(broken, o, x, 7, delta) is False
                assert not kernels.all_finite(delta)
    assert kernels.all_finite(x)


@libraries
@pytest.mark.parametrize("count", [1, 3])
def test_ranges_and_their_norm(use, library, count):
    use(library)
    kernels.set_threads(count)
    n = 6 * PIECE
    start, g = np.random.default_rng(0).normal(size=(2, n)).astype("f4")
    ranges = [(0, 3), (3, PIECE + 5), (2 * PIECE, 5 * PIECE)]
    moving = np.r_[tuple(np.s_[lo:hi] for lo, hi in ranges)]
    assert kernels.global_norm(g, ranges) == pytest.approx(np.linalg.norm(g[moving].astype(float)), rel=1e-12)
    assert kernels.global_norm(np.full(n, 2e38, "f4"), [(0, n)]) == pytest.approx(2e38 * n**0.5, rel=1e-6)
    x, optimizer, stops = start.copy(), OPTIMIZERS["sgd"](1.0), []
    optimizer.update(g, optimizer.init(x), x, ranges=ranges, on_block=stops.append)
    expected = start.copy()
    expected[moving] -= g[moving]
    np.testing.assert_array_equal(x, expected)
    assert stops == sorted(set(stops))
    assert stops[-1] == 5 * PIECE


@libraries
def test_what_is_done_is_reported_in_order_by_the_callers_thread(use, library):
    use(library)
    kernels.set_threads(3)
    n, seen = 40 * PIECE + 1, []
    c, delta = np.zeros(n), np.ones(n)

    def on_block(stop):
        assert threading.current_thread() is threading.main_thread()
        seen.append((stop, bool((c[:stop] == 1).all())))

    rules.center_step(c, delta, 1.0, None, None, on_block=on_block)
    stops = [stop for stop, _ in seen]
    assert stops == sorted(set(stops))
    assert len(stops) == 41
    assert stops[-1] == n
    assert all(final for _, final in seen)


def test_no_thread_writes_when_an_error_has_been_raised():
    kernels.set_threads(3)
    n = 400 * PIECE
    c, delta = np.zeros(n), np.ones(n)

    def on_block(stop):
        raise ConnectionError("no more replies")

    with pytest.raises(ConnectionError):
        rules.center_step(c, delta, 1.0, None, None, on_block=on_block)
    np.testing.assert_array_equal(c, 1)  # the other threads have done all of it


def test_two_callers_share_the_threads_and_none_waits_for_the_others_work():
    kernels.set_threads(2)  # one helper
    held, entered = threading.Event(), threading.Event()

    def slow(lo, _hi):
        entered.set()
        assert held.wait(60)
        return lo

    other = threading.Thread(target=kernels.share, args=(slow, [(0, 2 * PIECE)]))
    other.start()
    try:
        assert entered.wait(60)
        assert kernels.share(lambda lo, _hi: lo, [(0, 3 * PIECE)]) == [0, PIECE, 2 * PIECE], "while the helper is busy"
    finally:
        held.set()
        other.join()


@libraries
@pytest.mark.parametrize("count", [1, 4])
def test_vectors_of_several_lengths_are_refused_in_whatever_thread(use, library, count):
    """numba would read beyond their ends."""
    use(library)
    kernels.set_threads(count)
    optimizer, x = OPTIMIZERS["momentum"](0.1), np.ones(10 * PIECE)
    short = optimizer.init(x[: 5 * PIECE])
    with pytest.raises(ValueError, match="broadcast"):
        optimizer.update(x.copy(), short, x)
    with pytest.raises(ValueError, match="broadcast"):
        optimizer.update(x[:-1], optimizer.init(x), x)


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("agnmpi-kernels")]


def test_set_threads():
    x, delta = np.zeros(3 * PIECE), np.ones(3 * PIECE)
    kernels.set_threads(4)
    assert kernels.threads() == 4
    rules.center_step(x[:PIECE], delta[:PIECE], 1.0, None, None)
    assert not ours(), "a vector of one piece is not worth a second thread"
    rules.center_step(x, delta, 1.0, None, None)
    assert 1 <= len(ours()) <= 2, "three pieces: two helpers at most"
    kernels.set_threads(1)
    assert (kernels.threads(), ours()) == (1, [])
    with pytest.raises(ValueError, match="at least 1, not 0"):
        kernels.set_threads(0)
    assert kernels.threads() == 1


def run_python(code):
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return made.stdout.split()


def test_a_forked_child_starts_threads_of_its_own():
    said = run_python(
        "import os, signal, numpy as np\n"
        "from agnmpi.arrays import kernels\n"
        "kernels.LONG, n = 10**9, 4 * kernels.PIECE\n"
        "kernels.set_threads(3)\n"
        "c = np.zeros(n)\n"
        "kernels.run('add', [np.ones(n)], [1.0], [c])\n"
        "if os.fork() == 0:\n"
        "    signal.alarm(60)\n"
        "    kernels.run('add', [np.ones(n)], [1.0], [c])\n"
        "    os._exit(0 if (c == 2).all() else 1)\n"
        "print(os.wait()[1], (c == 1).all())\n"
    )
    assert said == ["0", "True"]


@needs_numba
def test_numba_is_imported_for_the_first_long_vector():
    said = run_python(
        "import sys, numpy as np, agnmpi\n"
        "from agnmpi.arrays import kernels\n"
        "for n in (1000, kernels.LONG - 1, kernels.LONG):\n"
        "    x = np.zeros(n, 'f4')\n"
        "    agnmpi.sgd(0.1).update(x, agnmpi.sgd(0.1).init(x), x)\n"
        "    print('numba' in sys.modules)\n"
    )
    assert said == ["False", "False", "True"]


@pytest.fixture
def no_numba(monkeypatch, tmp_path):
    """A numba that cannot be imported, first where Python looks."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    host_kernels.compiled.cache_clear()
    yield
    host_kernels.compiled.cache_clear()


def test_a_broken_numba_is_named_and_numpy_takes_over(no_numba):
    x = np.zeros(10)
    with pytest.warns(RuntimeWarning, match="numba cannot be used.*NumPy 1.0 or less"):
        rules.center_step(x, np.ones(10), 1.0, None, None)
    assert (x == 1).all()


def test_a_rank_alone_has_all_its_cores_or_what_omp_num_threads_says(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert [place(MPI.COMM_SELF, trains).threads for trains in (True, False)] == [cores, cores]
    for text, threads in (("3", 3), ("5,2", 5), ("0", 1), ("many", cores)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert place(MPI.COMM_SELF, True).threads == threads


@libraries
def test_the_bench_says_what_ran_and_with_how_many_threads(use, library):
    use(library)
    rows = {row["name"]: row for row in optimizer_bandwidth(1000, threads=2, rounds=1)}
    assert kernels.threads() == 1
    assert {"memcpy", "sgd", "momentum", "adam", "center add", "agn delta"} <= set(rows)
    assert {(row["threads"], row["library"]) for row in rows.values()} == {(2, library)}
    assert rows["memcpy"]["ratio"] == 1
    for name in ("sgd", "momentum", "adam"):
        with_torch = f"torch {name}" in rows
        assert ("times_torch" in rows[name]) == with_torch
        if with_torch:
            torch = rows[f"torch {name}"]["bytes_per_second"]
            assert rows[name]["times_torch"] == pytest.approx(torch / rows[name]["bytes_per_second"])


def test_kernels_run_to_the_very_end_of_the_interpreter():
    """A loop that was not closed commits at exit, when Python starts no threads any more."""
    code = (
        "import atexit, numpy as np; from agnmpi.arrays import kernels; kernels.set_threads(2); x = np.zeros(3 << 18);"
        "atexit.register(lambda: (kernels.run('add', [np.ones_like(x)], [1], [x]), print(x.sum() == x.size)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (said.stdout.strip(), said.stderr) == ("True", "")
