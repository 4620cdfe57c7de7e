"""Proof that the tests can fail: each mistake is put into the source, and its test must notice.

tools/mistakes.py lists them. The wrong lines are executed in the module itself, the named test
runs alone, and the module is put back. A test that starts other processes runs on a copy of the
files. With --long the same tests also run alone on the right lines.
"""
import importlib
import inspect
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

import test_commands
import test_compress
import test_data
import test_ddpm
import test_evaluate
import test_unet
import test_weights
from test_compress import file  # a fixture, as is the next one
from test_weights import folder
from mistakes import MISTAKES, wrong_source

HERE = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

BY_PROCESS = {"the same images in every process"}  # the test starts scripts: it needs files, not a module


def run_alone(test: str, request) -> None:
    """One test function with the fixtures that it asks for; hypothesis generates, and no more."""
    module_name, function_name = test.split(".")
    function = getattr(importlib.import_module(module_name), function_name)
    if module_name in ("test_commands", "test_pictures"):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
        torch.save(test_commands.train.data.shapes(64, 8), "images.pt")
    fixtures = {}
    if hasattr(function, "hypothesis"):
        before = function._hypothesis_internal_use_settings
        function._hypothesis_internal_use_settings = settings(
            before, phases=(Phase.explicit, Phase.generate), database=None)
        names = [n for n in inspect.signature(function).parameters if n == "tmp_path_factory"]
        try:
            function(**{n: request.getfixturevalue(n) for n in names})
        finally:
            function._hypothesis_internal_use_settings = before
        return
    if "run" in inspect.signature(function).parameters:  # a fixture of the test's own module
        run = importlib.import_module(module_name).run
        set_up = getattr(run, "__wrapped__", None) or run.__pytest_wrapped__.obj
        fixtures = {"run": set_up(**{name: request.getfixturevalue(name)
                                     for name in inspect.signature(set_up).parameters})}
    for name in inspect.signature(function).parameters:
        if name not in fixtures:
            fixtures = {**fixtures, name: request.getfixturevalue(name)}
    function(**fixtures)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_noticed(name, request, tmp_path, monkeypatch):
    """With the wrong line in place the named test fails."""
    file, test, replacements, _ = MISTAKES[name]
    source = wrong_source(file, replacements)
    if name in BY_PROCESS:
        for path in HERE.glob("*.py"):
            shutil.copy(path, tmp_path)
        (tmp_path / file).write_text(source)
        monkeypatch.setattr(test_commands, "HERE", tmp_path)
        with pytest.raises(BaseException):
            run_alone(test, request)
        return
    module = importlib.import_module(Path(file).stem)
    before = dict(vars(module))
    exec(compile(source, file, "exec"), vars(module))
    try:
        with pytest.raises(BaseException) as caught:
            run_alone(test, request)
        assert not isinstance(caught.value, (NameError, SyntaxError, pytest.skip.Exception)), caught
    finally:
        vars(module).clear()
        vars(module).update(before)


@pytest.mark.long
@pytest.mark.parametrize("test", sorted({test for _, test, _, _ in MISTAKES.values()}))
def test_the_right_lines_pass(test, request):
    """The control: run in the same way on the source as it is, the same tests pass."""
    run_alone(test, request)
