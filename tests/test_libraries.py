"""The form of judge/libraries: adapters and reproductions are short and say what they are about."""
import ast
import re
import sys
from pathlib import Path

import pytest

from judge.interface import INTERFACE
from judge.libraries import __main__ as matrix
from judge.theorems import THEOREMS

FOLDER = Path(__file__).resolve().parents[1] / "judge" / "libraries"
LIBRARIES = {"diffusers": "diffusers", "monai": "monai", "labml": "labml_nn",
             "lucidrains": "denoising_diffusion_pytorch"}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """The packages that a module's own lines import."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def defined(tree):
    """The names that a module's own lines give to something."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_adapter_offers_the_interface_and_no_more(name):
    """At most 80 lines, its own library, and public names of the interface only."""
    path = FOLDER / f"peer_{name}.py"
    tree, allowed = parsed(path), {LIBRARIES[name], "torch", "numpy"} | set(sys.stdlib_module_names)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
    assert set(imported(tree)) <= allowed and LIBRARIES[name] in set(imported(tree))
    public = {given for given in defined(tree) if not given.startswith("_")}
    assert {"schedule", "q_sample", "sample"} <= public <= {*INTERFACE, "NOTES"}


@pytest.mark.parametrize("path", sorted((FOLDER / "defects").glob("*.py")), ids=lambda p: p.stem)
def test_a_reproduction_is_short_and_names_library_and_theorem(path):
    """At most 12 lines: library, theorem and setting; what the paper says; public calls."""
    lines = path.read_text(encoding="utf-8").splitlines()
    name, theorem = re.fullmatch(r"# (\w+): (\w+)(?: fails)?(?:, .+)?", lines[0]).groups()
    assert len(lines) <= 12 and lines[1].startswith("# ") and path.name.startswith(name + "_")
    assert theorem in THEOREMS and LIBRARIES[name] in set(imported(parsed(path)))
    assert not re.search(r"\._[a-z]|\._\w+\(", "\n".join(lines)), "a private name"
    assert "print(" in path.read_text(encoding="utf-8") and re.search("assert |sys.exit", lines[-1])


def test_every_library_is_pinned_and_has_an_adapter():
    """PACKAGES, the adapters and requirements.txt are about the same libraries."""
    pinned = (FOLDER / "requirements.txt").read_text(encoding="utf-8").lower()
    assert set(matrix.PACKAGES) == set(LIBRARIES) == {
        path.stem.removeprefix("peer_") for path in FOLDER.glob("peer_*.py")}
    for package in matrix.PACKAGES.values():
        assert re.search(rf"^{package.lower()}==\d", pinned, re.M)


def test_a_cell_says_defect_only_if_a_reproduction_has_shown_it():
    """A failure has a reason that was seen, a note of the adapter, or is called unexplained."""
    def cell(verdict, note=None, *whys, error=None):
        row = {"verdict": verdict, "largest": 0.25, "precision": "float64", "error": error}
        defects = [{"why": why, "setting": None, "text": "", "printed": "", "file": ""} for why in whys]
        return matrix.cell(row, note, defects, lambda setting, sentence: 7)
    assert cell("fails") == "fails (unexplained)" and cell("fails", None, True) == "defect [7]"
    assert cell("fails", None, False) == "fails (unexplained), but defect [7]"
    assert cell("fails", ("choice", "")) == "choice [7], 2e-01" and cell("holds") == "holds, 2e-01"
    assert cell("fails", ("choice", ""), error="TypeError: no") == "fails (unexplained)"
    assert cell("not offered", None, False, False) == "not offered, but defect [7], [7]"


def test_a_reproduction_that_is_not_seen_any_more_is_not_in_the_table():
    """Only what was shown counts."""
    found = {"version": "1", "notes": {}, "theorems": {"one": {
        "statement": "a | b", "verdict": "fails", "largest": 1.0, "precision": "float64"}}}
    defect = {"library": "monai", "theorem": "one", "why": True, "setting": None, "text": "It is.",
              "printed": "so", "file": "monai_one.py"}
    shown, gone = (matrix.table({"monai": found}, [defect | {"shown": x}]) for x in (True, False))
    assert "| a \\| b | defect [1] |" in shown and "1. MONAI: It is. Seen: so (`monai_one.py`)." in shown
    assert "| fails (unexplained) |" in gone and "defect" not in gone
