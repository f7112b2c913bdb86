"""The same rules, optimizers and golden numbers on a device: pytest -m gpu, where there is one.

test_kernels.py proves the same without: the kernels as C on the host, the launches on a device of fake_cuda.
"""

import fake_cuda
import numpy as np
import pytest
from golden import ONE_WORKER
from in_process import device_and_host, follow_golden

from agnmpi.arrays import backend, encodings
from agnmpi.arrays import device_kernels as kernels
from agnmpi.arrays.kernels import all_finite, global_norm
from agnmpi.bench import optimizers as bench_optimizers
from agnmpi.core import rules
from agnmpi.core.optimizers import OPTIMIZERS
from agnmpi.core.params import Layout

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # the device multiplies and adds with one rounding
SIZE = 100_003


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def require_equal(there, here, dtype):
    np.testing.assert_allclose(there.get(), here, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", ONE_WORKER)
def test_golden_one_worker(cupy, case):
    follow_golden(case, cupy)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("numbers", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "clip": 3.0}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_agree_with_the_host(cupy, name, numbers, dtype):
    rng = np.random.default_rng(0)
    here = rng.normal(size=SIZE).astype(dtype)
    there, optimizer = cupy.asarray(here), OPTIMIZERS[name](0.05, **numbers)
    state, state_there = optimizer.init(here), optimizer.init(there)
    for t in range(5):
        g = rng.normal(size=SIZE).astype(dtype)
        given = {"scale": (1.0, -0.5)[t % 2], "ranges": [None, [(0, 10), (10, 500), (777, SIZE)]][t % 2]}
        state = optimizer.update(g, state, here, **given)
        state_there = optimizer.update(cupy.asarray(g), state_there, there, **given)
    require_equal(there, here, dtype)
    for slot_there, slot in zip(state_there[1:], state[1:]):
        require_equal(slot_there, slot, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [None, *OPTIMIZERS])
def test_center_step_agrees_with_the_host(cupy, name, dtype):
    rng = np.random.default_rng(1)
    here, delta = rng.normal(size=(2, SIZE)).astype(dtype)
    there, optimizer = cupy.asarray(here), name and OPTIMIZERS[name](0.1, weight_decay=0.01)
    state, state_there = (optimizer.init(here), optimizer.init(there)) if optimizer else (None, None)
    for weight in (1.0, 1 / 3, 0.5):
        state = rules.center_step(here, delta, weight, optimizer, state)
        state_there = rules.center_step(there, cupy.asarray(delta), weight, optimizer, state_there)
    require_equal(there, here, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rule", [rules.agn(), rules.agn("gradient"), rules.downpour(), rules.aeasgd(0.3)])
def test_delta_and_adopt_agree_with_the_host(cupy, rule, dtype):
    rng = np.random.default_rng(2)
    here = list(rng.normal(size=(6, SIZE)).astype(dtype))
    there = [cupy.asarray(v) for v in here]
    for x, o, a, sent, c, delta in (here, there):
        rule.delta(x, o, a, 7, delta)
        rule.adopt(x, sent, delta, c)
    for v_there, v in zip(there, here):
        require_equal(v_there, v, dtype)
    x, _, _, _, c, delta = there
    rules.agn().adopt(x, x, delta, c)
    assert (x == c).all()


@pytest.mark.parametrize("overlap", [False, True])
def test_workers_follow_the_host(cupy, overlap):
    np.testing.assert_allclose(*device_and_host(cupy, overlap), rtol=1e-10)


def test_each_kernel_compiles_for_both_dtypes(cupy):
    """Of each kernel its two device codes, no more."""
    for name, body in kernels.KERNELS.items():
        for dtype in TOLERANCE:
            scalar = set(fake_cuda.names(body.inputs)) - set(fake_cuda.vectors(name))
            given = [
                0.5 if p in scalar else cupy.ones(3, dtype) for p in fake_cuda.names(body.inputs + ", " + body.inouts)
            ]
            kernels.launch(name, *given)
        assert len(kernels.kernel(cupy, name).cached_codes) == 2


def test_the_norm_of_a_device_vector(cupy):
    g = np.random.default_rng(3).normal(size=SIZE)
    for ranges in ([(0, SIZE)], [(0, 10), (10, 20), (99, SIZE)]):
        assert global_norm(cupy.asarray(g), ranges) == pytest.approx(global_norm(g, ranges), rel=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 1000, SIZE, 1 << 22])
def test_all_finite_on_a_device(cupy, size, dtype):
    x = cupy.random.default_rng(0).random(size, dtype=dtype)
    assert all_finite(x)
    for at in (0, size // 2, size - 1):
        broken = x.copy()
        broken[at] = float("nan")
        assert not all_finite(broken)
    assert global_norm(cupy.full(size, 2e38, dtype), [(0, size)]) == pytest.approx(2e38 * size**0.5, rel=1e-6)


def test_reductions_need_no_vector_of_their_own(cupy):
    x = cupy.ones(1 << 24, "f4")
    all_finite(x), global_norm(x, [(0, x.size)])
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    all_finite(x), global_norm(x, [(0, x.size)])
    assert pool.total_bytes() - before < x.nbytes / 16


def test_tensors_of_another_stream_are_awaited(cupy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    with torch.cuda.stream(torch.cuda.Stream()):
        a = torch.ones(1 << 24, device="cuda")
        for _ in range(200):
            a = a + 1
        x = backend.as_array(a)
        assert x.data.ptr == a.data_ptr()
        assert float(x.min()) == 201


@pytest.mark.parametrize("count", [3, 40])  # CuPy copies few arrays one by one, many small ones in one launch
def test_packing_on_the_device(cupy, count):
    params = {f"p{i}": np.arange(6.0).reshape(2, 3) + i for i in range(count)} | {"s": np.array(5.0)}
    there = {name: cupy.asarray(value) for name, value in params.items()}
    layout = Layout.of(there)
    np.testing.assert_array_equal(layout.pack(there).get(), layout.pack(params))


def test_vectors_for_mpi_are_allocations_of_their_own(cupy):
    like = cupy.arange(5, dtype="f4")
    before = cupy.get_default_memory_pool().used_bytes()
    made = [backend.full_like(like, 2), backend.full_like(like, like), backend.empty(0, "f4", like)]
    assert cupy.get_default_memory_pool().used_bytes() == before
    assert [type(v.data.mem) for v in made] == [cupy.cuda.Memory] * 3
    assert made[0].data.ptr == made[0].data.mem.ptr
    np.testing.assert_array_equal(made[0].get(), 2)
    np.testing.assert_array_equal(made[1].get(), np.arange(5))


def test_the_bench_measures_each_side(cupy):
    rows = bench_optimizers.device_bandwidth(10_000, rounds=3)
    assert {"device copy", "sgd", "momentum", "adam", "center add", "agn delta"} <= {row["name"] for row in rows}
    assert all(row["bytes_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key", [None, 7])
@pytest.mark.parametrize("name", encodings.NAMES)
def test_encodings_are_the_hosts_bit_for_bit(cupy, name, key, dtype):
    rng, encoding = np.random.default_rng(5), encodings.get(name)
    x, residual, c = rng.normal(size=(3, SIZE)).astype(dtype)
    results = []
    for xp in (np, cupy):
        out, new, back = xp.zeros(encoding.nbytes(SIZE, dtype), "u1"), xp.zeros(SIZE, dtype), xp.zeros(SIZE, dtype)
        there = xp.array(x)
        finite = encoding.encode(there, out, residual=xp.asarray(residual), new_residual=new, key=key)
        encoding.decode(out, back)
        summed = xp.asarray(c.copy())
        encoding.decode_add(out, summed, 1 / 3)
        there[SIZE // 2] = np.nan
        results.append((finite, encoding.encode(there, xp.zeros_like(out)), out, new, back, summed))
    here, there = results
    assert there[:2] == here[:2] == (True, False)
    for on_device, on_host in zip(there[2:5], here[2:5]):
        np.testing.assert_array_equal(on_device.get(), on_host)
    require_equal(there[5], here[5], dtype)
