"""What the READMEs say of files, links, options and modules is so."""

import re

import pytest
from launcher import ROOT

from agnmpi.cli.arguments import HelpAsked, parse

PARTS = ("agnmpi", "examples", "jobs", "tests")
DOCUMENTS = [ROOT / "README.md", *sorted(path for part in PARTS for path in (ROOT / part).rglob("*.md"))]
FOLDERS = sorted(p.parent for p in ROOT.glob("agnmpi/*/__init__.py"))
# Of mpiexec, srun, sbatch, scancel, pip, pytest, Docker, and of scripts here.
FOREIGN = {
    "--with-ft", "--mca", "--mpi", "--nodes", "--time", "--signal", "--gpus-per-task", "--gpu-bind", "--no-binary",
    "--force-reinstall", "--with-mpi", "--shm-size", "--long", "--quick", "--full", "--data", "--picture", "--ranks",
    "--check", "--large", "--mnist", "--fashion", "--map-by", "--mode", "--shakespeare",
}  # fmt: skip
HIDDEN = ["--inject-faults", "--no-use-locking", "--slots=4"]  # of train; not in its help


def name(path):
    return str(path.relative_to(ROOT))


def anchors(document):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def options():
    """All options that --help of a command shows, and hidden ones."""
    found = options_in(" ".join(HIDDEN))
    for command in (
        "train",
        "sweep",
        "simulate",
        "bench",
        "bench utilisation",
        "bench problem",
        "doctor",
        "export",
        "evaluate",
        "runs",
        "report",
        "capi",
    ):
        with pytest.raises(HelpAsked) as asked:
            parse([*command.split(), "--help"])
        found |= options_in(str(asked.value))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_resolve(document):
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link} leads nowhere"
        if target.is_dir():
            target = target / "README.md"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_exist(document):
    """Paths from the checkout, and names of files beside the document."""
    text = document.read_text()
    for path in re.findall(r"(?<![\w/.])((?:agnmpi|examples|jobs|tests)/[\w/]+\.(?:py|sh|sbatch|md))", text):
        assert (ROOT / path).exists(), f"{path} does not exist"
    if document.name == "README.md" and document.parent != ROOT:
        for cell in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE):
            for file in re.findall(r"`([\w.-]+\.(?:py|sh|sbatch))\b", cell):
                assert (document.parent / file).exists(), f"{file} does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_options_exist(document):
    assert options_in(document.read_text()) - options() - FOREIGN == set()


def test_hidden_options_exist():
    parse(["train", "module:Problem", *HIDDEN])


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_each_folder_has_a_readme_that_names_its_modules(folder):
    text = (folder / "README.md").read_text()
    assert len(text.splitlines()) <= 40
    modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert not {module for module in modules if f"`{module}`" not in text}
    assert f"{name(folder)}/README.md" in (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10 * 1024


def test_nothing_cites_what_is_not_here():
    """No design document, no review: comments and documents stand by themselves."""
    cited = re.compile("|".join(("DES" + "IGN", "REV" + "IEW")))
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if path.suffix in (".py", ".md", ".sh", ".sbatch"):
                assert not cited.search(path.read_text()), path
