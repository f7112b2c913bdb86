"""What an MPI launcher leaves in the environment of its ranks, and other libraries mistake for their own."""

import os
from collections.abc import MutableMapping
from contextlib import suppress

from mpi4py import MPI

from ..cluster.placement import check_world
from ..transport.agreement import ConfigError

_LAUNCHER = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "MPIEXEC_", "HYDRA_")
_PARAMETERS = "OMPI_MCA_"  # of the library, not of this rank; also says whether the job goes on without lost ranks
_RANK_OF_4 = ("OMPI_MCA_ess", "OMPI_MCA_orte_")  # but these: Open MPI 4 tells a rank so where its daemon is


def hide_launcher_from_children() -> None:
    """Remove the launcher's variables from this process, now that MPI is initialized.

    They stay where the launcher's ranks are worlds of one, which is refused by them when a run is made.
    """
    with suppress(ConfigError):
        check_world(MPI.COMM_WORLD)
        hide_launcher(os.environ)


def hide_launcher(environment: MutableMapping[str, str]) -> None:
    """Remove what MPI has read in MPI_Init and does not need again.

    A process that inherits them and imports MPI, as a spawned or forkserver worker of a DataLoader does, would join the
    job as a rank that is there already, and end it; and Accelerate would set up process groups of its own.

    >>> environment = {"PMI_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1;tcp", "OMPI_MCA_btl": "^ofi"}
    >>> hide_launcher(environment)
    >>> environment
    {'OMPI_MCA_btl': '^ofi'}
    """
    for name in list(environment):
        if name.startswith(_RANK_OF_4) or (name.startswith(_LAUNCHER) and not name.startswith(_PARAMETERS)):
            del environment[name]
