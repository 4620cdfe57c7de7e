"""Proof that the tests can fail: each mistake is put into the source, and its test must notice.

page/mistakes.py lists them. The wrong lines are written into a copy of the files, and pytest runs
the named test there, in this process.
"""
import os
import shutil
import sys

import pytest
from hypothesis import Phase, settings

from mistakes import MISTAKES, ROOT, wrong_source

COPIED = ("*.py", "*.md", "pyproject.toml", "__pycache__/*.pyc", *(f"{folder}/{kind}" for kind in ("*.py", "__pycache__/*.pyc")
          for folder in ("support", "extras", "judge", "page", "tools", "tests")))


class Result:
    """What pytest has seen of a run: the names of tests that failed, and the errors."""

    def __init__(self):
        self.failed, self.errors = [], []

    def pytest_exception_interact(self, node, call):
        self.failed.append(node.name.split("[")[0])
        self.errors.append(call.excinfo.value)


def own(place: str) -> bool:
    """Whether this file is the project's, and not of an environment that lies in its folder."""
    return place.startswith(f"{ROOT}{os.sep}") and "site-packages" not in place and ".venv" not in place


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the files, and a process into which none of them has been imported."""
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # options of the run around it
    before = dict(sys.modules)
    for name, module in before.items():
        if own(getattr(module, "__file__", None) or ""):
            del sys.modules[name]
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not own(f"{place}{os.sep}")])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path  # no assertion is rewritten
                                           if not hasattr(finder, "mark_rewrite")])
    settings.register_profile("unshrunk", settings.get_profile("ddpm"), phases=(Phase.explicit, Phase.generate))
    yield tmp_path
    settings.load_profile("ddpm")
    for name in sys.modules.keys() - before.keys():
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{tmp_path}/"):
            del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_noticed(name, copy):
    """With the wrong line in place the named test fails, and for no other reason."""
    file, test, replacements, _ = MISTAKES[name]
    (copy / file).write_text(wrong_source(file, replacements), encoding="utf-8")
    module, function = test.split(".")
    path, = copy.rglob(f"{module}.py")
    result = Result()
    without = [f"-pno:{name}" for name in ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")]
    pytest.main(["-x", "-s", "-q", "--tb=no", "--assert=plain", *without, "--hypothesis-profile=unshrunk", f"{path}::{function}"],
                [result])
    assert result.failed == [function], result.errors
    assert not isinstance(result.errors[0], (NameError, SyntaxError)), result.errors
