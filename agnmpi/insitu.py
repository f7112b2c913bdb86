"""In situ: `agnmpi.insitu.Run` trains a surrogate of a solver while it runs, in its loop; see examples/README.md."""

from .frameworks.insitu import Run as Run
from .frameworks.insitu import Status as Status
from .frameworks.insitu import Surrogate as Surrogate
from .frameworks.samples import Reservoir as Reservoir
