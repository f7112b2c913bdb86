"""The fused kernels, proved without a GPU: on a fake device, and by the device compiler where there is one."""

import importlib.util
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
from golden import ONE_WORKER
from in_process import device_and_host, follow_golden
from mpi4py import MPI

from agnmpi import sgd
from agnmpi.arrays import backend
from agnmpi.arrays import device_kernels as kernels
from agnmpi.arrays.device_kernels import EACH, KERNELS, REDUCTIONS
from agnmpi.arrays.kernels import SHORT, all_finite, global_norm
from agnmpi.bench import optimizers as bench_optimizers
from agnmpi.cluster.connect import Connector
from agnmpi.cluster.roles import WorkerRole
from agnmpi.core import rules
from agnmpi.core.center import Center
from agnmpi.core.leases import Lease
from agnmpi.core.membership import Membership
from agnmpi.core.messages import OK, Reply, Snapshot
from agnmpi.core.optimizers import OPTIMIZERS
from agnmpi.core.params import Layout
from agnmpi.core.worker import Worker
from agnmpi.recovery.election import SurvivorReport
from agnmpi.recovery.failover import Failover
from agnmpi.training.job import Job
from agnmpi.transport.local import LocalCenter

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
SIZE = 1000


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda.compile_host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def xp(library, monkeypatch):
    device = fake_cuda.device(library)
    monkeypatch.setitem(sys.modules, fake_cuda.MODULE, device)
    return device


def launches(xp):
    """What was launched or waited for since the last call, without the making of kernels."""
    done = [entry for entry in xp.log if not entry.startswith("make")]
    xp.log.clear()
    return done


def require_equal(there, here, dtype):
    # Differences of numbers near 1: the error that counts is the one beside 1.
    np.testing.assert_allclose(there.memory, here, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def kernel_of(name):
    return {"adamw": "adam", "optimistic": "nesterov"}.get(name, name)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "numbers",
    [{}, {"weight_decay": 0.1}, {"clip": 3.0}, {"weight_decay": 0.1, "clip": 3.0}],
    ids=["plain", "decay", "clip", "decay and clip"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_one_launch_with_the_numbers_of_the_host(xp, name, numbers, dtype):
    rng = np.random.default_rng(0)
    here = rng.normal(size=SIZE).astype(dtype)
    there, optimizer = xp.array(here), OPTIMIZERS[name](0.05, **numbers)
    state, state_there = optimizer.init(here), optimizer.init(there)
    for t in range(5):
        g = rng.normal(size=SIZE).astype(dtype)
        g_there, scale = xp.array(g), (1.0, -0.5)[t % 2]
        launches(xp)
        state = optimizer.update(g, state, here, scale=scale)
        state_there = optimizer.update(g_there, state_there, there, scale=scale)
        norm = ["squares", "synchronize"] if "clip" in numbers else []
        assert launches(xp) == [*norm, kernel_of(name)]
        np.testing.assert_array_equal(g_there.memory, g)
    assert state_there.step == 5
    require_equal(there, here, dtype)
    for slot_there, slot in zip(state_there[1:], state[1:]):
        require_equal(slot_there, slot, dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_launch_for_each_range_and_the_rest_keeps_still(xp, name):
    rng = np.random.default_rng(0)
    start, g = rng.normal(size=10), rng.normal(size=10)
    here, there, optimizer = start.copy(), xp.array(start), OPTIMIZERS[name](0.1, weight_decay=0.1, clip=0.1)
    ranges, turns = [(0, 1), (1, 3), (7, 10)], []
    optimizer.update(g, optimizer.init(here), here, ranges=ranges)
    optimizer.update(
        xp.array(g), optimizer.init(there), there, ranges=ranges, on_block=lambda _stop: turns.append(xp.log[-1])
    )
    done = launches(xp)
    assert done.count(kernel_of(name)) == 2, "ranges that touch are one"
    assert turns == [kernel_of(name)] * 2
    assert done.count("synchronize") == 1
    require_equal(there, here, "float64")
    np.testing.assert_array_equal(there.memory[3:7], start[3:7])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [None, *OPTIMIZERS])
@pytest.mark.parametrize("weight", [1.0, 1 / 3])
def test_center_step_is_one_launch(xp, name, weight, dtype):
    rng = np.random.default_rng(1)
    here, delta = rng.normal(size=SIZE).astype(dtype), rng.normal(size=SIZE).astype(dtype)
    there, optimizer, turns = xp.array(here), name and OPTIMIZERS[name](0.1, weight_decay=0.01), []
    state, state_there = (optimizer.init(here), optimizer.init(there)) if optimizer else (None, None)
    delta_there = xp.array(delta)
    launches(xp)
    for _ in range(3):
        state = rules.center_step(here, delta, weight, optimizer, state)
        state_there = rules.center_step(
            there, delta_there, weight, optimizer, state_there, on_block=lambda _stop: turns.append(1)
        )
    assert launches(xp) == [kernel_of(name) if name else "add"] * 3
    assert turns == [1] * 3
    require_equal(there, here, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rule", "launched"), [(rules.agn(), "delta"), (rules.aeasgd(0.3), "elastic"), (rules.agn("gradient"), "divide")]
)
def test_a_delta_is_one_launch(xp, rule, launched, dtype):
    rng = np.random.default_rng(2)
    here = [rng.normal(size=SIZE).astype(dtype) for _ in range(4)]
    there = [xp.array(v) for v in here]
    for x, o, a, out in (here, there):
        rule.delta(x, o, a, 7, out)
    assert launches(xp) == [launched]
    for v_there, v in zip(there, here):
        require_equal(v_there, v, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_adopt_is_one_launch(xp, dtype):
    rng = np.random.default_rng(3)
    here = [rng.normal(size=SIZE).astype(dtype) for _ in range(4)]
    there = [xp.array(v) for v in here]
    for x, sent, delta, c in (here, there):
        rules.agn().adopt(x, sent, delta, c)
    assert launches(xp) == ["adopt"]
    require_equal(there[0], here[0], dtype)
    x, _, delta, c = there
    rules.agn().adopt(x, x, delta, c)  # no overlap
    assert launches(xp) == ["copy"]
    np.testing.assert_array_equal(x.memory, c.memory)
    rules.aeasgd(0.5).adopt(x, x, delta, c)
    assert launches(xp) == ["add"]


@pytest.mark.parametrize("case", ONE_WORKER)
def test_golden_one_worker(xp, case):
    follow_golden(case, xp)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_worker_and_its_center_follow_the_host(xp, overlap):
    np.testing.assert_allclose(*device_and_host(xp, overlap), rtol=1e-11)


def test_a_kernel_is_made_once(xp):
    x, optimizer = xp.array(np.zeros(3)), sgd(0.1)
    state = optimizer.init(x)
    for _ in range(3):
        state = optimizer.update(xp.array(np.ones(3)), state, x)
    sgd(0.2).update(xp.array(np.ones(3)), state, x)
    assert xp.log.count("make sgd") == 1


def test_vectors_for_mpi_are_allocations_of_their_own(xp):
    like = xp.array(np.arange(5, dtype="f4"))
    empty, filled, copied = backend.empty_like(like), backend.full_like(like, 2), backend.full_like(like, like)
    assert launches(xp) == ["malloc 20", "malloc 20", "copy", "malloc 20", "copy"]
    assert len({id(memory) for memory, _ in xp.pointers}) == 3
    assert empty.shape == (5,)
    assert (filled.memory == 2).all()
    np.testing.assert_array_equal(copied.memory, like.memory)
    assert backend.empty(3, "float64", like).dtype == np.float64
    assert backend.empty(0, "float64", like).size == 0


def test_packing_is_one_call_into_an_allocation_of_its_own(xp):
    params = {"w": xp.array(np.arange(6.0).reshape(2, 3)), "b": xp.array([7.0]), "s": xp.array(8.0)}
    layout = Layout.of(params)
    x = layout.pack(params)
    assert launches(xp) == ["malloc 64", "concatenate"]
    np.testing.assert_array_equal(x.memory, [0, 1, 2, 3, 4, 5, 7, 8])
    assert layout.pack(params, out=x) is x
    assert launches(xp) == ["concatenate"]
    with pytest.raises(ValueError, match=r"'b' has shape \(2,\), expected \(1,\)"):
        layout.pack(params | {"b": xp.array([1.0, 2.0])})
    host = {name: value.memory for name, value in params.items()}
    layout.pack(host | {"b": np.ones(1)}, out=x)  # from the host, one by one
    np.testing.assert_array_equal(x.memory, [0, 1, 2, 3, 4, 5, 1, 8])


def test_memory_that_the_pool_holds_is_given_back_for_vectors(xp, monkeypatch):
    class Full(Exception):
        pass

    freed, memory = [], xp.cuda.Memory

    def crowded(nbytes):
        if not freed:
            raise Full
        return memory(nbytes)

    monkeypatch.setattr(xp.cuda, "Memory", crowded)
    xp.cuda.runtime = SimpleNamespace(CUDARuntimeError=Full)
    xp.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: freed.append(1))
    assert backend.empty(3, "f4", xp.array(np.ones(3, "f4"))).size == 3
    assert freed == [1]


class Tensor:
    """As PyTorch's on a GPU: with a history it refuses to be looked at; work on it may be under way on a stream."""

    dtype = "torch.float32"

    def __init__(self, device=0, history=True):
        self.device, self.history, self.ready_for = device, history, []

    def detach(self):
        detached = Tensor(self.device, history=False)
        detached.ready_for = self.ready_for
        return detached

    def __dlpack_device__(self):
        return 2, self.device

    def __dlpack__(self, stream):
        if self.history:
            raise BufferError("Can't export tensors that require gradient")
        self.ready_for.append(stream)
        return "memory of the tensor"

    @property
    def __cuda_array_interface__(self):
        raise AssertionError("its version 2 says nothing of streams")


def test_tensors_keep_their_memory_and_are_ready_for_our_stream_or_are_refused(monkeypatch):
    cupy = SimpleNamespace(
        from_dlpack=lambda tensor: tensor.__dlpack__(stream=77),
        cuda=SimpleNamespace(Device=lambda: SimpleNamespace(id=0)),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    tensor = Tensor()
    assert backend.as_array(tensor) == "memory of the tensor"
    assert tensor.ready_for == [77]
    elsewhere = Tensor(device=1)
    with pytest.raises(ValueError, match="another device than this rank's, 0"):
        backend.as_array(elsewhere)
    assert elsewhere.ready_for == []


def test_arrays_with_cudas_interface_alone_are_shared_or_refused(monkeypatch):
    """As Numba's. CuPy copies from another device."""

    class Foreign:
        def __init__(self, at):
            self.__cuda_array_interface__ = {"data": (at, False)}

    cupy = SimpleNamespace(
        asarray=lambda _value: SimpleNamespace(size=1, data=SimpleNamespace(ptr=1000)),
        cuda=SimpleNamespace(Device=lambda: SimpleNamespace(id=0)),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert backend.as_array(Foreign(1000)).data.ptr == 1000
    with pytest.raises(ValueError, match="another device than this rank's, 0"):
        backend.as_array(Foreign(2000))


@pytest.fixture
def no_cupy():
    """Forgets what `import cupy` has found, before and after."""
    found = sys.modules.pop("cupy", None)
    yield
    sys.modules.pop("cupy", None)
    if found:
        sys.modules["cupy"] = found


def test_a_broken_cupy_is_no_device_and_is_named(no_cupy, monkeypatch, tmp_path):
    """A directory of that name, where Python looks, is a package to `import`."""
    (tmp_path / "cupy").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if importlib.util.find_spec("cupy").origin:
        pytest.skip("CuPy is installed, and comes before a directory without __init__.py")
    with pytest.warns(RuntimeWarning, match=rf"no attribute 'cuda'.*found in {tmp_path}/cupy"):
        assert backend.device_count() == 0
    with pytest.warns(RuntimeWarning, match="CuPy cannot be used"):
        assert backend.choose("auto", 0) is np


def test_without_a_driver_there_is_no_device(monkeypatch):
    class NoDriver(RuntimeError):
        pass

    def count():
        raise NoDriver("cudaErrorInsufficientDriver")

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=NoDriver)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    assert backend.device_count() == 0
    assert backend.choose("auto", 0) is np
    with pytest.raises(ValueError, match="finds no CUDA device"):
        backend.choose("gpu", 0)


def test_a_center_is_evaluated_where_the_problem_computes(xp):
    """In whatever thread, and wherever the center lies: on the host, after another rank was elected, or here."""
    x, seen = xp.array(np.zeros(3, "f4")), []
    layout = Layout.of({"w": x})

    def evaluate(params):
        assert xp.log[-1].startswith("enter device")
        seen.append(type(params["w"]))
        return {"sum": float(np.sum(params["w"].memory))}

    job = SimpleNamespace(x=x, layout=layout, problem=SimpleNamespace(evaluate=evaluate))
    for c in (np.ones(3, "f4"), xp.array(np.ones(3, "f4"))):
        assert Job.evaluate(job, c) == {"sum": 3.0}
    assert seen == [fake_cuda.Vector] * 2


def test_the_norm_waits_once(xp):
    g = xp.array([3.0, 0.0, 4.0, 0.0, 12.0])
    assert global_norm(g, [(0, 5)]) == 13
    assert launches(xp) == ["squares", "synchronize"]
    assert global_norm(g, [(0, 1), (1, 3), (4, 5)]) == 13
    assert launches(xp) == ["squares", "squares", "add", "synchronize"]
    assert global_norm(g, []) == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 7, 1000, 2000, 200_001])  # the last: more elements than threads
def test_a_reduction_sees_each_element_once(xp, size, dtype):
    here = np.random.default_rng(6).normal(size=size).astype(dtype)
    there = xp.array(here)
    exact = np.sqrt((here.astype(float) ** 2).sum())
    for x in (here, there):
        assert global_norm(x, [(0, size)]) == pytest.approx(exact, rel=1e-12)
        assert all_finite(x) is True
    for at in {0, size // 2, size - 1}:
        for bad in (np.nan, np.inf, -np.inf):
            broken = here.copy()
            broken[at] = bad
            launches(xp)
            assert all_finite(xp.array(broken)) is False
            assert launches(xp) == (["to host"] if broken.nbytes <= SHORT else ["finite", "synchronize"])
            assert all_finite(broken) is False


def test_large_float32_numbers_have_a_norm_and_are_finite(xp):
    here = np.full(1000, 2e38, "f4")
    for x in (here, xp.array(here)):
        assert all_finite(x)
        assert global_norm(x, [(0, 1000)]) == pytest.approx(2e38 * np.sqrt(1000), rel=1e-6)
        optimizer = sgd(1.0, clip=1.0)
        moved = x.copy()
        optimizer.update(x, optimizer.init(moved), moved)
        change = fake_cuda.plain(moved).astype(float) - here
        assert np.isfinite(change).all()
    assert not all_finite(np.full(5, -np.inf, "f4"))


def test_bodies_write_no_input_and_compute_in_the_dtype_of_the_vectors():
    for name, body in KERNELS.items():
        assert not re.search(r"\b\d", body.code), f"{name}: a literal would be a double or an int"
        for p in fake_cuda.names(body.inputs):
            assert not re.search(rf"\b{p} [-+*/]?= ", body.code), f"{name} writes {p}"


def test_cupy_takes_every_signature():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    for name in REDUCTIONS:
        assert kernels.kernel(cupy, name) is kernels.kernel(cupy, name)
    for name, body in KERNELS.items():
        made = kernels.kernel(cupy, name)
        assert made is kernels.kernel(cupy, name)
        assert made.name == f"agnmpi_{name}"
        assert made.nin == len(fake_cuda.names(body.inputs))
        assert made.nout == len(body.inouts.split(", "))


def test_device_code_reads_and_writes_each_vector_once_and_in_its_own_precision(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    loop = "const long index = blockIdx.x * (long)blockDim.x + threadIdx.x; if (index < size)"
    (tmp_path / "kernels.cu").write_text(fake_cuda.source("__global__", loop))
    # No -arch: what this nvcc takes for its oldest device.
    made = subprocess.run([nvcc, "-ptx", "kernels.cu"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    if made.returncode and "host compiler" in made.stderr:
        pytest.skip(f"nvcc cannot work here: {made.stderr.strip().splitlines()[0]}")
    assert made.returncode == 0, made.stderr
    entries = re.split(r"\.visible \.entry ", (tmp_path / "kernels.ptx").read_text())[1:]
    codes = {entry[: entry.index("(")]: entry for entry in entries}
    assert set(codes) == {f"{name}_{dtype}" for name in KERNELS for dtype in fake_cuda.TYPES}
    written_only = {"delta", "elastic"}
    for name, body in KERNELS.items():
        for dtype, kind in (("float32", "f32"), ("float64", "f64")):
            code = codes[f"{name}_{dtype}"]
            moved = len(fake_cuda.names(body.inouts))
            read = len(fake_cuda.vectors(name)) + (0 if name in written_only else moved)
            assert len(re.findall(rf"ld\.global\S*\.{kind}", code)) == EACH * read, name
            assert len(re.findall(rf"st\.global\S*\.{kind}", code)) == EACH * moved, name
            if dtype == "float32":
                assert ".f64" not in code, f"{name} computes in double"


def test_the_device_bench_runs_each_side_as_often_as_the_others(xp, monkeypatch):
    monkeypatch.setattr(bench_optimizers, "choose", lambda device, _index: xp if device == "gpu" else None)
    monkeypatch.setitem(sys.modules, "torch", None)  # not installed
    rows = {row["name"]: row for row in bench_optimizers.device_bandwidth(1000, rounds=3)}
    calls = 4 * 5  # three rounds and one to warm up, five calls between the events
    for name, launched in [("device copy", "copy"), ("sgd", "sgd"), ("momentum", "momentum"), ("adam", "adam"),
                           ("center add", "add"), ("agn delta", "delta")]:  # fmt: skip
        assert xp.log.count(launched) >= calls, name
        words = {"device copy": 2, "momentum": 5, "adam": 7}.get(name, 3)
        assert rows[name]["bytes_per_second"] == pytest.approx(words * 4 * 1000 / (1e-3 / 5))
        assert rows[name]["ratio"] == pytest.approx(words / 2)
    assert len(rows) == 6


def test_torch_steps_move_the_same_vector_to_the_same_place():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    x, g = np.random.default_rng(0).random((2, 100), np.float32)
    for name in ("sgd", "momentum", "adam"):
        here, there, optimizer = x.copy(), x.copy(), OPTIMIZERS[name](1e-3)
        step, _ = bench_optimizers.torch_steps(there, g)[f"torch {name}"]
        state = optimizer.init(here)
        for _ in range(3):
            step()
            state = optimizer.update(g, state, here)
        np.testing.assert_allclose(there, here, rtol=1e-5)
        assert (there != x).all()


def test_a_center_on_the_host_goes_on_from_a_pull_on_a_device_and_back(xp):
    """A worker on a GPU is elected: c and slots come to the host; left alone, it takes them to the device again."""
    here = np.zeros(6, "f4")
    center = Center(rules.agn(), here, 1, OPTIMIZERS["momentum"](1.0))
    pulled = xp.array(np.arange(6, dtype="f4"))
    facts = {
        "clock": 3, "steps": 9, "refused": 0, "dropped": 0, "staleness": [1, 1], "center_optimizer": "momentum",
        "center_optimizer_step": 4, "served": 5,
    }  # fmt: skip
    center.restore({"c": pulled, "slot/momentum": xp.array(np.full(6, 2, "f4"))}, facts, here)
    assert here.tolist() == list(range(6))
    center.move(pulled)
    assert isinstance(center.state.momentum, fake_cuda.Vector)
    assert (center.state.momentum.memory.tolist(), center.state.step) == ([2.0] * 6, 4)


def test_a_sole_survivor_goes_on_on_its_device(xp):
    x, roles = xp.array(np.ones(6, "f4")), []
    lost = LocalCenter(x, 3, None).worker_end(2)  # serves nothing any more
    worker = Worker(x, rules.agn(), OPTIMIZERS["sgd"](0.5), lost, 2, double_buffer=True)
    role = WorkerRole(Center(rules.agn(), x[:0], 3), [worker], 3)
    role.begin(20, 3)
    members = Membership(4)
    failover = Failover(
        MPI.COMM_SELF, role, members, Connector(rules.agn()), worker.x, lambda: None, roles.append
    )  # fmt: skip
    worker.o[...] = 4
    snapshot = Snapshot(5, 1, 12, open=(Lease(6, 3), Lease(9, 3)))
    worker.last_reply, worker.sequence = Reply(2, steps=6, applied=(0, 0, 1), snapshot=snapshot), 1
    worker.held.add(Lease(9, 3), 3)
    worker.x[...] = 4
    for _ in range(3):
        worker.local_step(xp.array(np.full(6, -2, "f4")))
    worker.start_exchange()  # commits 1, the mean of three steps of 1
    commit = worker.under_way
    failover.take_role([SurvivorReport.of(worker, 3)], members.workers())
    (alone,) = roles
    assert isinstance(alone.c, fake_cuda.Vector)
    out = xp.array(np.zeros(6, "f4"))
    reply = worker.end.exchange(commit, out).wait()
    assert (reply.status, reply.clock, reply.work) == (OK, 3, Lease(6, 3))
    assert out.memory.tolist() == [5.0] * 6
