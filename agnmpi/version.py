"""The versions: agnmpi's, which the build reads without importing the package, and the MPI library's."""

__version__ = "0.5.0.dev0"


def mpi_library() -> str:
    """Name and version of the MPI library, such as "Open MPI v5.0.11"."""
    from mpi4py import MPI

    line = MPI.Get_library_version().replace("\0", "").split("\n")[0].split(",")[0]
    return " ".join(line.replace("Version:", "").split())
