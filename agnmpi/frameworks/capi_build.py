"""Builds libagnmpi.so, for C and Fortran, with the Python that runs this and the MPI of a compiler."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

_SOURCES = Path(__file__).parent / "c"
_CHECK = """\
import ctypes, sys
from agnmpi.frameworks.capi import use_mpi_at
try:
    use_mpi_at(ctypes.cast(ctypes.CDLL(sys.argv[1]).PMPI_Get_library_version, ctypes.c_void_p).value)
except (OSError, RuntimeError) as error:
    sys.exit(str(error))
"""


def build(directory: Path, compiler: str | None = None) -> list[str]:
    """Write libagnmpi.so, agnmpi.h and agnmpi.f90 to `directory`.

    Args:
        directory: is made if need be.
        compiler: MPI's C compiler; default: mpicc beside this Python, $MPICC, or mpicc on PATH.

    Returns:
        What a compiler and a linker need to be told.

    Raises:
        ValueError: with the remedy, where something is missing, or mpi4py is of another MPI than the compiler.
    """
    beside = shutil.which("mpicc", path=str(Path(sys.executable).parent))
    command = (compiler or beside or os.environ.get("MPICC") or "mpicc").split()
    if shutil.which(command[0]) is None:
        raise ValueError(f"there is no {command[0]} on PATH: load your MPI's module, or name its C compiler by --mpicc")
    include, library = Path(sysconfig.get_path("include")), _libpython()
    if not (include / "Python.h").is_file():
        raise ValueError(f"{include} has no Python.h: install Python's headers (Debian: apt-get install python3-dev)")
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "libagnmpi.so"
    with TemporaryDirectory() as made:
        paths = {"AGN_PYTHON": sys.executable, "AGN_LIBPYTHON": str(library)}
        lines = [f"#define {name} {json.dumps(path, ensure_ascii=False)}\n" for name, path in paths.items()]
        (Path(made) / "environment.h").write_text("".join(lines))
        _run(
            [*command, "-shared", "-fPIC", "-O2", f"-I{made}", f"-I{include}", str(_SOURCES / "agnmpi.c"), "-o",
             f"{made}/libagnmpi.so", str(library), f"-Wl,-rpath,{library.parent}", "-ldl"],
            f"{' '.join(command)} cannot build libagnmpi.so",
        )  # fmt: skip
        _run([sys.executable, "-c", _CHECK, f"{made}/libagnmpi.so"], "the library would not work with this environment")
        shutil.copy(f"{made}/libagnmpi.so", target)
    for name in ("agnmpi.h", "agnmpi.f90"):
        shutil.copy(_SOURCES / name, directory)
    return [f"-I{directory}", f"-L{directory}", "-lagnmpi", f"-Wl,-rpath,{directory}"]


def _libpython() -> Path:
    """The shared library of this Python."""
    names = {str(sysconfig.get_config_var(name)) for name in ("INSTSONAME", "LDLIBRARY")}
    folders = [Path(str(sysconfig.get_config_var("LIBDIR"))), Path(sys.base_prefix) / "lib"]
    for path in (folder / name for folder in folders for name in sorted(names, reverse=True)):
        if ".so" in path.name and path.is_file():
            return path
    raise ValueError(
        f"{sys.executable} has no shared library, such as {folders[0]}/libpython{sysconfig.get_python_version()}.so: "
        "install it (Debian: apt-get install libpython3-dev), or take a Python that was built with --enable-shared"
    )


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{what}: {(done.stderr + done.stdout).strip()}")
