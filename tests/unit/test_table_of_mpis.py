"""The table of MPIs is what pytest reported, and keeps what was not run this time."""

import pytest
from launcher import ROOT
from table_of_mpis import COLUMNS, HEAD, TABLE, line, merged, row, short

XML = """<testsuites><testsuite><properties><property name="mpi" value="Open MPI v4.1.4, package"/></properties>
<testcase name="test_train[p2p]"/><testcase name="test_train[rma]"><failure/></testcase>
<testcase name="test_shared_windows[rma]"><skipped/></testcase></testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("MPICH Version:      4.0.2\nMPICH Release date", "MPICH 4.0.2"),
        ("Open MPI v4.1.4, package: Debian", "Open MPI 4.1.4"),
        ("Intel(R) MPI Library 2021.18.1 for Linux* OS", "Intel MPI 2021.18.1"),
    ],
)
def test_names(version, name):
    assert short(version) == name


def test_rows(tmp_path):
    (tmp_path / "debian.xml").write_text(XML)
    cells = dict(zip(HEAD, row(tmp_path / "debian.xml")))
    assert cells["MPI"] == "Open MPI 4.1.4 (`debian`)"
    assert [cells[key] for key in ("p2p", "rma", "windows shared", "resume")] == ["yes", "**fails**", "no", ""]
    before = dict.fromkeys(HEAD, "old") | {"MPI": cells["MPI"]}
    text = merged(f"before\n\n| MPI |\n|---|\n| Z | old |  |\n{line(before.values())}\nafter\n", [list(cells.values())])
    assert text.startswith("before\n\n| MPI | p2p |")
    assert line(cells[key] or "old" for key in HEAD) in text, "what did not run stays as it was"
    assert text.endswith("| Z | old |  |\n\nafter\n")
    assert text.count("Open MPI 4.1.4") == 1


def test_the_table_of_the_readme_has_these_columns():
    table = TABLE.search((ROOT / "tests/README.md").read_text())[0]
    assert table.startswith("| " + " | ".join(HEAD) + " |\n")
    files = ("test_everywhere", "test_capi", "test_under_mpiexec")
    tests = "".join((ROOT / f"tests/system/{name}.py").read_text() for name in files)
    assert all(f"def {name.partition('[')[0]}(" in tests for name in COLUMNS)
