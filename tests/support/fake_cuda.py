"""A fake CUDA device: CuPy's names over host memory, every launch and copy written down.

Its ElementwiseKernels are the bodies of `agnmpi.arrays.device_kernels`, compiled by g++ into plain C loops; so are its
RawModules, the kernels of `agnmpi.arrays.device_encodings`.
"""

import ctypes
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from agnmpi.arrays.device_encodings import CUDA
from agnmpi.arrays.device_kernels import EACH, KERNELS, REDUCTIONS, VECTORS, names, unrolled

MODULE = "cupy_fake"  # where `backend.namespace` finds the device, and that it is one of CuPy's
TYPES = {"float32": ("float", ctypes.c_float), "float64": ("double", ctypes.c_double)}


def vectors(name):
    """The inputs of a kernel that are vectors: those with the letters of vectors; the others are scalars."""
    return [p for p in names(KERNELS[name].inputs) if p in VECTORS]


def source(qualifiers, loop):
    """C for every kernel and both dtypes, as CuPy writes it: whole vectors, the inputs const; `size` counts threads."""
    both = "__host__ __device__" if qualifiers else ""
    text = [
        f"struct Indexer {{ long count; {both} long size() const {{ return count; }} }};\n"
        f"template <typename E> struct Raw {{ E* raw; long count; {both} long size() const {{ return count; }}\n"
        f"{both} E& operator[](long j) const {{ return raw[j]; }} }};\n"
    ]
    for dtype, (ctype, _) in TYPES.items():
        for name, body in KERNELS.items():
            arguments, lines = ["long size", "long count"], ["const long i = index; const Indexer _ind{size};"]
            for p in names(body.inputs) + names(body.inouts):
                element = ctype if p in names(body.inouts) else f"const {ctype}"
                if p in VECTORS:
                    arguments.append(f"{element}* raw_{p}")
                    lines.append(f"const Raw<{element}> {p}{{raw_{p}, count}};")
                else:
                    arguments.append(f"{element} {p}")
            text.append(
                f'extern "C" {qualifiers} void {name}_{dtype}({", ".join(arguments)}) {{\n'
                f"typedef {ctype} T;\n{loop} {{ {' '.join(lines)}\n{unrolled(body).code} }} }}\n"
            )
    return "".join(text)


def reductions():
    """C for the reductions, element by element."""
    text = []
    for dtype, (ctype, _) in TYPES.items():
        for name, body in REDUCTIONS.items():
            kind = {"float64 y": "double", "bool y": "bool"}[body.output]
            loop = "for (long j = 0; j < size; ++j)"
            text.append(
                f'extern "C" void {name}_{dtype}(long size, const {ctype}* raw, {kind}* to) {{\n'
                f"{kind} a = {body.first};\n{loop} {{ const {ctype} x = raw[j]; const {kind} b = {body.each}; "
                f"a = {body.both}; }}\n*to = a; }}\n"
            )
    return "".join(text)


def compile_host(folder):
    """Compile the kernels into loops over host memory; skips without a compiler."""
    loop = "for (long index = 0; index < size; ++index)"
    head = "#include <cmath>\n#include <cstddef>\nusing std::isfinite;\nusing std::sqrt;\n"
    return _compiled(head + source("", loop) + reductions(), folder)


def _compiled(text, folder):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here (g++)")
    (folder / "kernels.cpp").write_text(text)
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        "kernels.cpp",
        "-o",
        "kernels.so",
    ]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return ctypes.CDLL(str(folder / "kernels.so"))


# What `device_encodings.CUDA` defines, as loops over all threads that were launched. The lanes of a warp go through one
# step after the other, as they do where they exchange values.
HOST = """
#include <cmath>
#include <cstring>
#define KERNEL extern "C" void
#define DEVICE inline
#define EACH_THREAD(i, count) for (i64 i = 0; i < (count) && i < launched; ++i)
#define EACH_WARP(b, count) for (i64 b = 0; b < (count) && b < launched / 32; ++b)
#define EACH_LANE for (int lane = 0; lane < 32; ++lane)
#define MAX_OVER_LANES(top, magnitude) \\
    u32 top = 0; EACH_LANE { const u32 found = magnitude; top = found > top ? found : top; }
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
extern "C" { i64 launched = 0; }
DEVICE u32 bits_of(float f) { u32 b; std::memcpy(&b, &f, 4); return b; }
DEVICE float float_of(u32 b) { float f; std::memcpy(&f, &b, 4); return f; }
"""


@cache
def _raw_library(code):
    assert CUDA in code
    with tempfile.TemporaryDirectory() as folder:
        return _compiled(code.replace(CUDA, HOST), Path(folder))


class Vector(np.lib.mixins.NDArrayOperatorsMixin):
    """A device array: whatever is done to it is written down."""

    __module__ = MODULE
    __cuda_array_interface__ = ()

    def __init__(self, memory, log):
        self.memory, self.log = memory, log
        self.size, self.dtype, self.shape, self.nbytes = memory.size, memory.dtype, memory.shape, memory.nbytes
        self.flags = memory.flags

    def view(self, dtype):
        return Vector(self.memory.view(dtype), self.log)

    def any(self):
        self.log.append("any")
        return Vector(self.memory.any(), self.log)

    def __getitem__(self, key):
        return Vector(self.memory[key], self.log)

    def __setitem__(self, key, value):
        if isinstance(value, Vector) and np.shares_memory(self.memory, value.memory):
            return  # x[part] += y writes back the view that it has moved
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")  # as CuPy says
        self.log.append("copy")
        self.memory[key] = plain(value)

    def __float__(self):
        self.log.append("synchronize")
        return float(self.memory)

    def __bool__(self):
        self.log.append("synchronize")
        return bool(self.memory)

    def all(self):
        self.log.append("all")
        return Vector(self.memory.all(), self.log)

    def sum(self):
        self.log.append("sum")
        return Vector(self.memory.sum(), self.log)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None):
        assert method == "__call__"
        self.log.append(ufunc.__name__)
        result = ufunc(*map(plain, inputs), out=None if out is None else tuple(map(plain, out)))
        return out[0] if out else Vector(np.asarray(result), self.log)

    @property
    def device(self):
        @contextmanager
        def entered():
            self.log.append("enter device")
            yield

        return entered()

    def reshape(self, *shape):
        return Vector(self.memory.reshape(*shape), self.log)

    def copy(self):
        self.log.append("copy")
        return Vector(self.memory.copy(), self.log)


def plain(value):
    return value.memory if isinstance(value, Vector) else value


def device(library):
    """A module with as much of CuPy in it as agnmpi uses; `log` is its list of what was done."""
    fake, log = ModuleType(MODULE), []
    fake.log, fake.pointers = log, []

    class ElementwiseKernel:
        def __init__(self, inputs, inouts, code, name):
            self.name = name.removeprefix("agnmpi_")
            assert (inputs, inouts, code) == unrolled(KERNELS[self.name])
            log.append(f"make {self.name}")

        def __call__(self, *arguments, size):
            log.append(self.name)
            arrays = [a for a in arguments if isinstance(a, Vector)]
            (dtype,) = {a.dtype.name for a in arrays}
            (count,) = {a.size for a in arrays}
            assert size == -(-count // EACH)
            expected = names(KERNELS[self.name].inputs) + names(KERNELS[self.name].inouts)
            assert len(arguments) == len(expected)
            passed = []
            for p, a in zip(expected, arguments):
                assert isinstance(a, Vector) == (p in VECTORS), (self.name, p, a)
                passed.append(ctypes.c_void_p(a.memory.ctypes.data) if p in VECTORS else TYPES[dtype][1](a))
            getattr(library, f"{self.name}_{dtype}")(ctypes.c_long(size), ctypes.c_long(count), *passed)

    class ReductionKernel:
        def __init__(self, _inputs, output, each, both, _end, first, name):
            self.name = name.removeprefix("agnmpi_")
            assert (output, each, both, first) == REDUCTIONS[self.name]

        def __call__(self, x):
            log.append(self.name)
            found = np.empty((), REDUCTIONS[self.name].output.split()[0])
            at, to = (ctypes.c_void_p(memory.ctypes.data) for memory in (x.memory, found))
            getattr(library, f"{self.name}_{x.dtype.name}")(ctypes.c_long(x.size), at, to)
            return Vector(found, log)

    class RawModule:
        def __init__(self, code, options):
            assert options == ("--fmad=false",)
            self.library = _raw_library(code)

        def get_function(self, name):
            def call(grid, block, arguments):
                log.append(name)
                (blocks,), (threads,) = grid, block
                ctypes.c_longlong.in_dll(self.library, "launched").value = blocks * threads
                getattr(self.library, name)(*map(passed, arguments))

            def passed(value):
                if isinstance(value, Vector):
                    return ctypes.c_void_p(value.memory.ctypes.data)
                return np.ctypeslib.as_ctypes_type(value.dtype)(value.item())  # a scalar without a dtype is refused

            return call

    class Memory:  # one cudaMalloc
        def __init__(self, size):
            log.append(f"malloc {size}")
            self.size = size

    def ndarray(shape, dtype, memptr):
        memory, offset = memptr
        assert offset == 0
        assert np.dtype(dtype).itemsize * int(np.prod(shape)) == memory.size
        made = Vector(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 0xAB, dtype), log)
        fake.pointers.append(memptr)
        return made

    def concatenate(pieces, out):
        log.append("concatenate")
        np.concatenate([p.memory for p in pieces], out=out.memory)

    def array(values, dtype=None):
        return Vector(np.array(plain(values), dtype), log)

    def copyto(out, x):
        out[...] = x

    def event():
        return SimpleNamespace(record=lambda: None, synchronize=lambda: None)

    fake.ElementwiseKernel, fake.ReductionKernel = ElementwiseKernel, ReductionKernel
    fake.ndarray, fake.concatenate = ndarray, concatenate
    fake.RawModule = RawModule
    fake.zeros = lambda size, dtype=float: Vector(np.zeros(size, dtype), log)
    fake.array, fake.asarray, fake.copyto = array, array, copyto
    fake.empty = lambda size, dtype=float: Vector(np.empty(size, dtype), log)
    fake.asnumpy = lambda x: log.append("to host") or x.memory.copy()
    fake.zeros_like = lambda x: Vector(np.zeros_like(x.memory), log)
    fake.full_like = lambda x, value: Vector(np.full_like(x.memory, value), log)
    fake.full = lambda size, value, dtype=float: Vector(np.full(size, value, dtype), log)
    fake.cuda = SimpleNamespace(
        Memory=Memory, MemoryPointer=lambda memory, offset: (memory, offset), Event=event,
        get_elapsed_time=lambda start, end: 1.0,
        get_current_stream=lambda: SimpleNamespace(synchronize=lambda: log.append("synchronize")),
    )  # fmt: skip
    return fake
