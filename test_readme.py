"""What the README says can be run, runs; what it quotes is there."""
import re
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()


def test_points_on_a_circle(capsys):
    """The example of one's own network, as it stands: samples lie on the circle."""
    torch.manual_seed(0)
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 14
    space: dict = {}
    exec(code, space)
    radius = space["last"].x_t.norm(dim=1)
    assert abs(radius.mean() - 1) < 0.05 and radius.std() < 0.15


def test_quoted_lines_are_in_the_code():
    """Each `file`: `line` of "Where the released code differs" stands in that file."""
    rows = README.split("## Where the released code differs")[1].split("\n## ")[0].splitlines()
    quotes = re.findall(r"`(\w+\.py)`: `([^`]+)`", "\n".join(rows))
    assert len(quotes) >= 20
    for file, line in quotes:
        assert line in (HERE / file).read_text(), line


def test_pictures_and_files_are_there():
    """Every picture that the README shows is in the repository, and no placeholder is left."""
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (HERE / picture).exists(), picture
    assert not re.search(r"@[A-Z0-9]+@", README)


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "bench", "weights"])
def test_flags_in_the_readme_exist(script, capsys):
    """Every flag that the README gives to a script is one of its flags."""
    import importlib
    assert importlib.import_module(script).main(["--help"]) == 0
    text = capsys.readouterr().out
    for line in re.findall(rf"python {script}\.py([^\n`#]*)", README):
        for flag in re.findall(r"--[a-z][a-z-]*", line):
            assert flag in text, flag
