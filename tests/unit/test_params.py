import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnmpi.core.params import Layout, named, parts


class Bfloat16:
    """As PyTorch's tensors on the CPU: NumPy has no such dtype."""

    dtype = "torch.bfloat16"

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_how):
        raise BufferError("bfloat16 is not supported for dlpack export")


shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@given(shapes, st.sampled_from(["float32", "float64"]))
def test_views_cover_the_vector_once(shapes, dtype):
    params = {f"p{i}": np.full(shape, i, dtype) for i, shape in enumerate(shapes)}
    if not sum(p.size for p in params.values()):
        with pytest.raises(ValueError, match="no elements"):
            Layout.of(params)
        return
    layout = Layout.of(params)
    x = layout.pack(params)
    assert x.dtype == dtype
    assert x.shape == (layout.size,)
    views = layout.views(x)
    for view in views.values():
        view += 1000
    assert (x >= 1000).all()
    assert (x < 1000 + len(shapes)).all()
    for i, (name, view) in enumerate(views.items()):
        assert view.shape == params[name].shape
        assert (view == 1000 + i).all()
        lo, hi = layout.span(name)
        assert hi - lo == view.size


@given(st.integers(0, 1000), st.integers(1, 20))
def test_parts_are_a_partition(size, count):
    cut = list(parts(size, count))
    assert len(cut) == count
    assert [i for p in cut for i in range(p.start, p.stop)] == list(range(size))
    assert max(p.stop - p.start for p in cut) - min(p.stop - p.start for p in cut) <= 1


def test_one_array_and_sequences():
    assert list(named(np.zeros(3))) == ["0"]
    assert Layout.of([np.zeros(3), np.zeros((2, 2))]).size == 7


def test_several_dtypes_make_a_vector_of_float32_unless_all_are_float64():
    params = {"w": np.ones(2, "f2"), "b": np.ones(3, "f8")}
    layout = Layout.of(params, mixed=True)
    assert (layout.dtype, layout.pack(params).tolist()) == ("float32", [1] * 5)
    assert Layout.of({"b": np.ones(3, "f8")}, mixed=True).dtype == "float64"
    with pytest.raises(ValueError, match="'n' is int64"):
        Layout.of({"n": np.zeros(2, int)}, mixed=True)


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({}, ValueError, "no parameters"),
        ({"w": 3.0}, TypeError, "'w'.*no array"),
        ({1: np.zeros(2)}, TypeError, "strings"),
        ({"w": np.zeros(2), "n": np.zeros(2, int)}, ValueError, "float32 or float64, but 'n' is int64; convert it"),
        ({"w": np.zeros(2, "f2")}, ValueError, r"'w' is float16; convert it with astype \(PyTorch: tensor.float\(\)\)"),
        ({"w": Bfloat16()}, TypeError, r"parameter 'w': .*torch.bfloat16 cannot be shared .*convert it to float32"),
        ({"w": np.zeros(2), "b": np.zeros(2, "f4")}, ValueError, "share one dtype"),
    ],
)
def test_what_is_refused(params, error, text):
    with pytest.raises(error, match=text):
        Layout.of(params)


def test_pack_refuses_other_names_and_shapes():
    layout = Layout.of({"w": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="missing w, unknown v; the parameters are named w"):
        layout.pack({"v": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"'w' has shape \(6,\), expected \(2, 3\)"):
        layout.pack({"w": np.zeros(6)})
