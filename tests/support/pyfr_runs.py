"""PyFR with the plugin of examples/pyfr, and alone.

How much the plugin slows it, in runs that take turns (PYFR_XSMM_LIBRARY_PATH as PyFR wants it):
    OMP_NUM_THREADS=1 python tests/support/pyfr_runs.py --mode asynchronous
"""

import argparse
import configparser
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from launcher import ROOT, mpiexec

EXAMPLE = ROOT / "examples/pyfr"


def make_mesh(directory, elements, ranks):
    """Returns its path."""
    path = directory / "box.pyfrm"
    command = [sys.executable, EXAMPLE / "mesh.py", path, "--elements", str(elements), "--ranks", str(ranks)]
    subprocess.run(command, check=True)
    return path


def write_case(path, end, plugin, dt):
    """The example's, until time `end`; `plugin`: options of its section, None for a case without."""
    case = configparser.ConfigParser(interpolation=None)
    case.optionxform = str
    case.read(EXAMPLE / "vortex.ini")
    case["solver-time-integrator"]["tend"] = case["soln-plugin-writer"]["dt-out"] = str(end)
    case["solver-time-integrator"]["dt"] = str(dt)
    if plugin is None:
        case.remove_section("soln-plugin-autoencoder")
    else:
        case["soln-plugin-autoencoder"].update({key: str(value) for key, value in plugin.items()})
    with path.open("w") as file:
        case.write(file)


def run(directory, mesh, ranks, end, plugin, dt=0.01):
    """Run in that directory; returns what was printed, the last solution (bytes), and PyFR's seconds."""
    import h5py

    directory.mkdir(exist_ok=True)
    write_case(directory / "case.ini", end, plugin, dt)
    command = [sys.executable, EXAMPLE / "run.py", "run", "-b", "openmp", mesh, "case.ini"]
    code, output = mpiexec(ranks, *command, timeout=280, cwd=directory)
    assert code == 0, output
    with h5py.File(directory / f"vortex-{end:.1f}.pyfrs") as file:
        solution = file["soln/p3-quad"][()]
        stats = configparser.ConfigParser()
        stats.read_string(file["stats"][()].decode())
    assert np.isfinite(solution).all(), "PyFR's steps are too long for this mesh"
    return output, solution.tobytes(), stats.getfloat("solver-time-integrator", "wall-time")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="asynchronous", choices=["asynchronous", "synchronous"])
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--nsteps", type=int, default=50, help="PyFR's steps between two turns of the plugin")
    parser.add_argument("--elements", type=int, default=48, help="along each side of the box")
    parser.add_argument("--end", type=float, default=4.0, help="in PyFR's time")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    plugin = {"mode": given.mode, "budget": given.budget, "nsteps": given.nsteps}
    ratios, dt = [], 0.12 / given.elements
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        mesh = make_mesh(directory, given.elements, given.ranks)
        for _ in range(given.pairs):
            (said, _, trained), (_, _, alone) = (
                run(directory / "run", mesh, given.ranks, given.end, options, dt) for options in (plugin, None)
            )
            ratios.append(trained / alone)
            print(f"{alone:.2f} s alone, {trained:.2f} s with the plugin: {ratios[-1]:.4f}  ({said.splitlines()[0]})")
    allowed = 1.02 + given.budget
    print(f"{given.mode}: median {statistics.median(ratios):.4f} of the time alone; at most {allowed:.2f} is meant")


if __name__ == "__main__":
    main()
