"""libagnmpi.so: built by one command, called from C and Fortran, as an HPC code does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from heat2d.draw import read
from heat2d.surrogate import Heat
from launcher import ROOT, mpi_library, mpiexec

from agnmpi.recovery.files import load

SUPPORT, HEAT = ROOT / "tests/support", ROOT / "examples/heat2d"
SURROGATES = SUPPORT / "surrogates.py"
BIN = Path(sys.executable).parent


def compiler(name):
    """A compiler of this environment's MPI; skips the test if there is none, or it does not compile."""
    path = BIN / name
    if not path.exists():
        pytest.skip(f"this environment's MPI, {mpi_library().splitlines()[0]}, has no {name}")
    if subprocess.run([path, "--version"], capture_output=True).returncode:
        pytest.skip(f"{name} finds no compiler here: apt-get install gcc gfortran")
    return path


def run(*command, cwd=None, env=None):
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def compiled(*command, cwd):
    code, output = run(*command, cwd=cwd)
    assert code == 0, output
    assert "warning" not in output, output


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The directory of the library, and what compilers need to be told."""
    compiler("mpicc")
    directory = tmp_path_factory.mktemp("capi")
    code, output = run(sys.executable, "-m", "agnmpi", "capi", directory)
    assert code == 0, output
    return directory, output.split()


@pytest.fixture(scope="module")
def host(library):
    """A program that loads capi_calls.c as a plugin."""
    directory, flags = library
    c, plugin = [compiler("mpicc"), "-std=c99", "-D_GNU_SOURCE", "-Wall", "-Wextra"], ["-shared", "-fPIC", "-Dmain=run"]
    compiled(*c, *plugin, SUPPORT / "capi_calls.c", "-o", "calls.so", *flags, "-lm", cwd=directory)
    compiled(*c, SUPPORT / "capi_host.c", "-o", "host", "-ldl", cwd=directory)
    return [directory / "host", directory / "calls.so"]


def build_c(library):
    directory, flags = library
    c = [compiler("mpicc"), "-std=c99", "-Wall", "-Wextra", "-O2"]
    compiled(*c, HEAT / "heat.c", "-o", "heat", *flags, "-lm", cwd=directory)
    return directory / "heat"


def build_fortran(library):
    directory, flags = library
    fortran = [compiler("mpifort"), "-O2", "-Wall", "-Wextra"]
    compiled(*fortran, directory / "agnmpi.f90", HEAT / "heat.f90", "-o", "heat_f", *flags, cwd=directory)
    return directory / "heat_f"


def by_python(params):
    """What the surrogate says of the plate at the end."""
    at = np.arange(1, 25) / 25
    y, x = np.meshgrid(at, at, indexing="ij")
    places = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1)
    return Heat().predict(params, places).reshape(x.shape)


@pytest.mark.parametrize("build", [build_c, build_fortran])
def test_a_solver_trains_a_surrogate_and_computes_the_same_bits(library, tmp_path, build):
    program, raw = build(library), tmp_path / ("heat" * 20)  # a long path
    shutil.copy(HEAT / "surrogate.py", tmp_path)
    code, output = mpiexec(3, program, 24, 150, 5000, raw, cwd=tmp_path, timeout=120)
    assert code == 0, output
    assert re.search(r"error of the surrogate: +[\d.]+ of the mean's, after 5000 steps", output)
    arrays, _ = load(next(tmp_path.glob("*.safetensors")))
    assert arrays["w1"].shape == (32, 32)
    truth, predicted = read(raw)
    assert truth.shape == (24, 24)
    assert predicted == pytest.approx(by_python(arrays), abs=1e-4)
    # Each rank trains on its own rows. Those without a core for a while leave their steps to the others, and the
    # surrogate forgets their rows: so the best third.
    assert max(np.corrcoef(a, b)[0, 1] for a, b in zip(truth.reshape(3, -1), predicted.reshape(3, -1))) > 0.3
    code, alone = mpiexec(3, program, 24, 150, 0, cwd=tmp_path)
    assert code == 0, alone
    plates = [re.search(r"plate (\w{16})", text)[1] for text in (output, alone)]
    assert plates[0] == plates[1]


def test_calls_leave_the_solver_as_it_is(host, tmp_path):
    """From a plugin, with another Python's PYTHONHOME, trapped floating-point errors and MPI_THREAD_FUNNELED."""
    code, output = mpiexec(2, *host, "calls", SURROGATES, cwd=tmp_path, env={"PYTHONHOME": "/nowhere"})
    assert code == 0, output
    assert output.count("as wanted") == 2
    assert output.count("RuntimeWarning: MPI was not initialized with MPI_THREAD_MULTIPLE") == 1
    assert output.count("period must be at least 1, not 0") == 1, "what all ranks refuse, one says"
    (w,) = set(re.findall(r"w ([\d.]+)", output))
    assert load(tmp_path / "capi.safetensors")[0]["w"] == pytest.approx(float(w))
    assert (tmp_path / "again.safetensors").exists()


def test_an_error_on_one_rank_ends_the_job(host, tmp_path):
    code, output = mpiexec(2, *host, "fails", SURROGATES, cwd=tmp_path)
    assert code != 0
    assert re.search(r"agnmpi: rank 1 on .*: agn_learn: ", output), output
    assert output.count('KeyError: "a mistake') == 1
    assert "surrogates.py" in output
    assert "as wanted" not in output


def test_a_program_without_mpi_is_refused(host, tmp_path):
    code, output = run(*host, "early", SURROGATES, cwd=tmp_path)
    assert code == 1
    assert "agn_open: RuntimeError: MPI runs from MPI_Init to MPI_Finalize: call agn_open, and agn_close" in output


def test_a_second_mpi_is_refused_before_it_is_used(host, tmp_path):
    """At the first call, and already when the library is built."""
    fake = tmp_path / "libfake.so"
    compiled("cc", "-shared", "-fPIC", SUPPORT / "capi_fake_mpi.c", "-o", fake, cwd=tmp_path)
    code, output = run(*host, "early", SURROGATES, cwd=tmp_path, env=os.environ | {"LD_PRELOAD": str(fake)})
    assert code == 1
    assert "the program's MPI is Fake MPI 1.0, mpi4py's is another" in output
    link = f"{compiler('mpicc')} -Wl,--no-as-needed {fake} -Wl,-rpath,{tmp_path}"
    code, output = run(sys.executable, "-m", "agnmpi", "capi", tmp_path / "other", "--mpicc", link)
    assert code == 2
    assert "would not work with this environment: the program's MPI is Fake MPI 1.0" in output
    assert not (tmp_path / "other/libagnmpi.so").exists()


def test_a_python_that_has_moved_is_named(library, host, tmp_path):
    directory, _ = library
    moved = (directory / "libagnmpi.so").read_bytes()
    path = str(sys.executable).encode()
    (tmp_path / "libagnmpi.so").write_bytes(moved.replace(path, b"/none".ljust(len(path), b"/")))
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    code, output = run(*host, "early", SURROGATES, cwd=tmp_path, env=environment)
    assert code == 1, output
    assert "build the library again" in output


def test_the_fortran_module_has_both_kinds_and_ranks(library, tmp_path):
    """Its solver is in Fortran, and its main program in C: MPI's wheels have no Fortran."""
    directory, flags = library
    if shutil.which("gfortran") is None:
        pytest.skip("no gfortran here: apt-get install gfortran")
    fortran = ["gfortran", "-Wall", "-std=f2018", "-c"]
    compiled(*fortran, "-Wextra", directory / "agnmpi.f90", cwd=tmp_path)
    compiled(*fortran, SUPPORT / "capi_fortran.f90", cwd=tmp_path)
    objects = [tmp_path / "agnmpi.o", tmp_path / "capi_fortran.o"]
    main = [SUPPORT / "capi_fortran_main.c", *objects, "-o", "main", *flags, "-lgfortran", "-lm"]
    compiled(compiler("mpicc"), *main, cwd=tmp_path)
    code, output = mpiexec(2, tmp_path / "main", SURROGATES, cwd=tmp_path)
    assert code == 0, output
    assert output.count("as wanted") == 2
