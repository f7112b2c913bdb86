"""A periodic box of n × n quadrilaterals for PyFR, cut into strips for the ranks: no mesh generator, no partitioner.

python examples/pyfr/mesh.py box.pyfrm --elements 16 --ranks 2
"""

import argparse
from io import StringIO
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
from pyfr.partitioners.base import BasePartitioner, write_partitioning
from pyfr.progress import NullProgressSequence
from pyfr.readers.gmsh import GmshReader

SIDES = ("periodic_x_l", "periodic_x_r", "periodic_y_l", "periodic_y_r")


class Strips(BasePartitioner):
    """Elements in the order of the mesh."""

    name = "strips"
    has_part_weights = has_multiple_constraints = False
    int_opts, enum_opts, dflt_opts = (), {}, {}

    def _partition_graph(self, graph, partwts):
        weights = graph.vwts[:, 0]
        return (np.cumsum(weights) - weights) * len(partwts) // weights.sum()


def gmsh(n, half=10.0):
    """The box [−half, half]² in Gmsh's format 2.2."""
    at = np.arange((n + 1) ** 2).reshape(n + 1, n + 1) + 1  # number of the node at [y, x]
    places = np.linspace(-half, half, n + 1)
    nodes = [f"{at[j, i]} {x} {y} 0" for j, y in enumerate(places) for i, x in enumerate(places)]
    quads = [(at[j, i], at[j, i + 1], at[j + 1, i + 1], at[j + 1, i]) for j in range(n) for i in range(n)]
    edges = [pairwise(line) for line in (at[:, 0], at[:, -1], at[0], at[-1])]
    elements = [(3, 1, quad) for quad in quads]
    elements += [(1, tag, pair) for tag, pairs in enumerate(edges, 2) for pair in pairs]
    lines = [f"{k} {kind} 2 {tag} {tag} {' '.join(map(str, at))}" for k, (kind, tag, at) in enumerate(elements, 1)]
    names = ['2 1 "fluid"'] + [f'1 {tag} "{name}"' for tag, name in enumerate(SIDES, 2)]
    text = "$MeshFormat\n2.2 0 8\n$EndMeshFormat\n"
    for name, rows in {"PhysicalNames": names, "Nodes": nodes, "Elements": lines}.items():
        text += "\n".join([f"${name}", str(len(rows)), *rows, f"$End{name}\n"])
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("mesh", type=Path)
    parser.add_argument("--elements", type=int, default=16, help="along each side")
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    quiet = NullProgressSequence()
    GmshReader(StringIO(gmsh(given.elements)), quiet).write(str(given.mesh), 1e-5)
    if given.ranks > 1:
        with h5py.File(given.mesh, "r+") as mesh:
            parts = Strips([1] * given.ranks, {"quad": 1}).partition(mesh, quiet)
            write_partitioning(mesh, str(given.ranks), parts)


if __name__ == "__main__":
    main()
