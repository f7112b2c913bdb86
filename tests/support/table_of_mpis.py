"""The table of tests/README.md: MPI × what works, from pytest's reports of what must work with any MPI.

python tests/support/table_of_mpis.py tests/README.md MPI.xml…   (jobs/test.sh --long system does it)
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

SOLVER = "test_a_solver_trains_a_surrogate_and_computes_the_same_bits"
COLUMNS = {
    "test_train[p2p]": "p2p",
    "test_train[rma]": "rma",
    "test_train[accumulate]": "accumulate",
    "test_train[allreduce]": "allreduce",
    "test_shared_windows[rma]": "windows shared",
    "test_resume": "resume",
    "test_kill": "kill, resume",
    "test_usr1": "USR1",
    "test_drop_stalled": "`--drop-stalled`",
    f"{SOLVER}[build_c]": "C",
    f"{SOLVER}[build_fortran]": "Fortran",
    "test_under_mpiexec[2]": "2 ranks",
    "test_under_mpiexec[3]": "3 ranks",
}
HEAD = ["MPI", *COLUMNS.values()]
TABLE = re.compile(r"^\| MPI \|.*\n\|[-|]+\|\n(?:\|.*\n)*", re.MULTILINE)


def short(version):
    """The name and number of an MPI library.

    >>> short("MPICH Version:      4.0.2\\nMPICH Release date: …"), short("Open MPI v4.1.4, package: …")
    ('MPICH 4.0.2', 'Open MPI 4.1.4')
    >>> short("Intel(R) MPI Library 2021.18.1 for Linux* OS")
    'Intel MPI 2021.18.1'
    """
    name = re.match(r"Intel|MPICH|Open MPI|[\w ]*", version)[0].strip()
    return f"{name}{' MPI' if name == 'Intel' else ''} {re.search(r'[0-9]+([.][0-9]+)+', version)[0]}"


def row(report):
    """The cells of a report; a test that did not run is left open."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    version = next(p.get("value") for p in suite.iter("property") if p.get("name") == "mpi")
    outcome = {}
    for case in suite.iter("testcase"):
        outcome[case.get("name")] = {"skipped": "no", "failure": "**fails**", "error": "**fails**"}.get(
            next((child.tag for child in case if child.tag != "properties"), ""), "yes"
        )
    return [f"{short(version)} (`{Path(report).stem}`)", *(outcome.get(test, "") for test in COLUMNS)]


def line(cells):
    return f"| {' | '.join(cells)} |\n"


def merged(text, rows):
    """`text` with its table, in which the cells of `rows` replace those of the same MPI, but for empty ones."""
    old = [[cell.strip() for cell in row.split("|")[1:-1]] for row in TABLE.search(text)[0].splitlines()[2:]]
    all_rows = {cells[0]: cells for cells in old}
    for cells in rows:
        before = all_rows.get(cells[0], cells)
        all_rows[cells[0]] = [new or was for new, was in zip(cells, before)]
    table = line(HEAD) + "|" + "---|" * len(HEAD) + "\n" + "".join(line(all_rows[name]) for name in sorted(all_rows))
    return TABLE.sub(lambda _: table, text)


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(merged(document.read_text(), [row(report) for report in sys.argv[2:]]))
