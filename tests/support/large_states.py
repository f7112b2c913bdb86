"""`agnmpi` to which the state of every worker is large: it is written as it lies, and the worker waits."""

import sys
from functools import partial

from agnmpi.cli.main import main
from agnmpi.training import job

job.WorkerSaver = partial(job.WorkerSaver, small=0)
sys.exit(main())
