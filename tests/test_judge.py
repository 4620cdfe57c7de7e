"""The judge: a file written from the paper holds, and a typical mistake in it is caught and named."""
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import ddpm
from ddpm import Gaussian, Model
from judge.__main__ import main
from judge.interface import INTERFACE
from judge.judging import Judge, short
from judge.theorems import THEOREMS

ROOT = Path(__file__).resolve().parents[1]


class Ours:
    """ddpm.py behind the judge's interface."""
    schedule, respaced = ddpm.schedule_from_betas, ddpm.respace
    q_sample, q_posterior = ddpm.q_sample, ddpm.q_posterior_mean_variance
    predict_x0 = ddpm.predict_x0_from_eps
    log_likelihood = ddpm.discretized_gaussian_log_likelihood

    def p_mean_variance(s, net, x_t, t):
        return ddpm.p_mean_variance(Model(s, net), x_t, t)[:2]

    def loss(s, net, x0, t, eps):
        return ddpm.loss_simple(Model(s, net), x0, t, eps)

    def sample(s, net, x_T, noise):
        return [*ddpm.p_sample_loop(Model(s, net), x_T, noise)][-1].x_t

    def ddim(s, net, x_T, noise, eta):
        return [*ddpm.ddim_loop(Model(s, net), x_T, noise, eta=eta)][-1].x_t

    def interpolate(s, net, x0, other, lam, t, eps, eps_other, noise):
        return [*ddpm.interpolate(Model(s, net), x0, other, lam, t, eps, eps_other, noise)][-1].x_t

    def kl(mean_q, variance_q, mean_p, variance_p):
        return ddpm.normal_kl(Gaussian(mean_q, variance_q), Gaussian(mean_p, variance_p))

    def vlb_term(s, net, x0, x_t, t):
        return ddpm.vlb_term(s, x0, x_t, t, ddpm.p_mean_variance(Model(s, net), x_t, t))


@pytest.mark.parametrize("name", THEOREMS)
def test_this_project_is_right_in_float64(name):
    """ddpm.py offers all, and each theorem holds to 1e-9; float32 would not do."""
    judge = Judge(Ours, strict=True)
    row = judge.run(name, THEOREMS[name])
    assert row["verdict"] == "holds" and row["precision"] == "float64", judge.table()


STUDENT = '''
import torch

def schedule(betas):
    b = torch.tensor(betas, dtype=torch.float64)
    return b, torch.cumprod(1 - b, 0)

def at(c, t):
    return torch.cat([torch.ones(1), c])[t][:, None]

def q_sample(s, x0, t, eps):
    return at(s[1], t).sqrt() * x0 + (1 - at(s[1], t)).sqrt() * eps

def q_posterior(s, x0, x_t, t):
    b, bar, before = at(s[0], t), at(s[1], t), at(s[1], t - 1)
    mean = before.sqrt() * b / (1 - bar) * x0 + (1 - b).sqrt() * (1 - before) / (1 - bar) * x_t
    return mean, (1 - before) / (1 - bar) * b

def predict_x0(s, x_t, t, eps):
    return (x_t - (1 - at(s[1], t)).sqrt() * eps) / at(s[1], t).sqrt()

def p_mean_variance(s, model, x_t, t):
    b, bar = at(s[0], t), at(s[1], t)
    return (x_t - b / (1 - bar).sqrt() * model(x_t, t)) / (1 - b).sqrt(), b

def sample(s, model, x, noise):
    for t in range(len(s[0]), 0, -1):
        mean, variance = p_mean_variance(s, model, x, torch.full((len(x),), t))
        x = mean + (variance.sqrt() * noise(t) if t > 1 else 0)
    return x

def loss(s, model, x0, t, eps):
    return ((eps - model(q_sample(s, x0, t, eps), t)) ** 2).sum(1)

def log_likelihood(x0, mean, variance):
    cdf = lambda x: torch.special.ndtr((x - mean) / variance.sqrt())
    above = torch.where(x0 > 0.999, 1.0, cdf(x0 + 1 / 255))
    return (above - torch.where(x0 < -0.999, 0.0, cdf(x0 - 1 / 255))).log()

def kl(m, v, n, w):
    return 0.5 * ((w / v).log() + (v + (m - n) ** 2) / w - 1)
'''
MISTAKES = [  # right, wrong, the theorem that catches it, its name there
    ("(1 - at(s[1], t)).sqrt() * eps\n\ndef q_p", "(1 - at(s[1], t)) * eps\n\ndef q_p",
     "eq04_the_jump_is_iterated_steps", "1 − ᾱ_t instead of its root"),
    ("(1 - before) / (1 - bar) * b\n", "b\n", "eq07_posterior_variance", "β_t instead of β̃_t"),
    ("mean = before.sqrt() * b", "mean = bar.sqrt() * b", "eq07_posterior_mean", "√ᾱ_t instead of √ᾱ_{t−1}"),
    ("/ (1 - b).sqrt(), b", "/ bar.sqrt(), b", "eq11_the_mean", "√ᾱ_t instead of √α_t"),
    ("if t > 1 else 0", "if t else 0", "alg2_sampling", "noise at the last step"),
    ("variance.sqrt() * noise", "variance * noise", "alg2_sampling", "σ_t² z instead of σ_t z"),
    ("range(len(s[0]), 0", "range(len(s[0]) - 1, 0", "alg2_sampling", "a loop that begins at T − 1"),
    ("torch.where(x0 > 0.999, 1.0, cdf(x0 + 1 / 255))", "cdf(x0 + 1 / 255)", "eq13_the_outermost_bins_are_open",
     "finite outermost bins"),
    ("/ at(s[1], t).sqrt()\n\ndef p_", "/ at(s[1], t)\n\ndef p_", "eq15_inverts_the_jump",
     "divided by ᾱ_t, not by its root"),
    ("(eps - model(", "(x0 - model(", "eq14_the_loss", "x_0 as the target"),
    ("/ w - 1)", "/ w)", "eq05_kl_is_the_mean_log_ratio", "without −1"),
    ("1 - b, 0)", "b, 0)", "eq04_the_jump_is_iterated_steps", "")]


def judged(source: str, only=None) -> dict:
    """theorem → its row, for a file with this source."""
    module = types.ModuleType("student")
    exec(source, vars(module))
    judge = Judge(module)
    return {name: judge.run(name, THEOREMS[name]) for name in ([only] if only else THEOREMS)}


def test_a_file_from_the_paper_holds_with_its_choices():
    """What it offers holds in float64; what it lacks is said; its choices are found out."""
    rows = judged(STUDENT)
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    missing = {"eq05_terms_of_the_bound", "eq05_the_last_term", "fewer_steps_of_alg2", "fewer_steps_of_ddim", "sec44_interpolation"}
    assert {name for name, verdict in verdicts.items() if verdict == "not offered"} == missing
    assert set(verdicts.values()) == {"holds", "not offered"}
    assert all(row["precision"] == "float64" and row["largest"] < 1e-8 for row in rows.values())
    assert rows["alg2_sampling"]["choices"] == ["x̂_0 not clipped, σ_t² = β_t"]
    assert rows["eq14_the_loss"]["choices"] == ["sum over dimensions"]


def test_computing_in_place_changes_no_verdict():
    """What is given to the file is a copy. Kills: a wrong function that holds as it has changed t, a right one that
    fails as it has changed x_0."""
    body = "    return at(s[1], t).sqrt() * x0 + (1 - at(s[1], t)).sqrt() * eps\n\ndef q_p"
    assert STUDENT.count(body) == 1
    name = "eq04_the_jump_is_iterated_steps"
    for new, verdict in (("    t -= 1\n    return 0 * x0\n\ndef q_p", "fails"),
                         ("    x0 *= at(s[1], t).sqrt()\n    eps *= (1 - at(s[1], t)).sqrt()\n    return x0.add_(eps)\n\ndef q_p", "holds")):
        assert judged(STUDENT.replace(body, new), name)[name]["verdict"] == verdict
    z, name = "mean + (variance.sqrt() * noise(t) if t > 1 else 0)", "alg2_sampling"
    assert STUDENT.count(z) == 1
    in_place = STUDENT.replace(z, "mean + (noise(t).mul_(variance.sqrt()) if t > 1 else 0)")
    assert judged(in_place, name)[name]["verdict"] == "holds"


@pytest.mark.parametrize("right, wrong, theorem, name", MISTAKES)
def test_a_typical_mistake_is_caught_and_named(right, wrong, theorem, name):
    """The theorem fails, and the mistake's own symptom is the first or second that fits."""
    assert STUDENT.count(right) == 1
    row = judged(STUDENT.replace(right, wrong), theorem)[theorem]
    assert row["verdict"] == "fails"
    assert not name or name in list(map(short, row["fits"]))[:2]


FEWER = STUDENT.replace("torch.cumprod(1 - b, 0)", "torch.cumprod(1 - b, 0), torch.arange(1, len(b) + 1)").replace(
    "model(x_t, t)) / (1 - b)", "model(x_t, s[2][t - 1])) / (1 - b)") + '''
def respaced(s, times):
    bar = s[1][torch.tensor(times) - 1]
    return 1 - bar / torch.cat([torch.ones(1), bar[:-1]]), bar, torch.tensor(times)
'''


@pytest.mark.parametrize("right, wrong, name", [
    ("", "", None),
    ("return 1 - bar / torch.cat([torch.ones(1), bar[:-1]])", "return s[0][torch.tensor(times) - 1]",
     "a step to τ_i − 1"),
    ("model(x_t, s[2][t - 1])", "model(x_t, t)", "shown i instead of τ_i")])
def test_fewer_steps_are_judged(right, wrong, name):
    """A file with `respaced` holds; the two usual mistakes of skipped steps are caught and named."""
    row = judged(FEWER.replace(right, wrong) if right else FEWER, "fewer_steps_of_alg2")["fewer_steps_of_alg2"]
    assert row["verdict"] == ("fails" if name else "holds")
    assert not name or name in short(row["fits"][0])


def test_two_mistakes_are_both_named():
    source = STUDENT
    for right, wrong, *_ in (MISTAKES[1], MISTAKES[4]):
        source = source.replace(right, wrong)
    for _, _, theorem, name in (MISTAKES[1], MISTAKES[4]):
        assert short(judged(source, theorem)[theorem]["fits"][0]) == name


def test_float32_tables_are_judged_by_their_conditioning():
    """They hold, the table says float32, and a mistake is caught all the same."""
    source = STUDENT.replace("return b, torch.cumprod(1 - b, 0)", "return b.float(), torch.cumprod(1 - b, 0).float()")
    row = judged(source, "eq04_the_jump_is_iterated_steps")["eq04_the_jump_is_iterated_steps"]
    assert row["verdict"] == "holds" and row["precision"] == "float32" and row["largest"] > 1e-9
    right, wrong, theorem, name = MISTAKES[0]
    assert judged(source.replace(right, wrong), theorem)[theorem]["fits"][0] == name


def test_numpy_is_converted_at_the_edge():
    pytest.importorskip("numpy", reason="a NumPy file needs NumPy")
    rows = judged('''
import numpy as np
def schedule(betas):
    return np.cumprod(1 - np.array([0.0, *betas]))
def q_sample(s, x0, t, eps):
    assert type(x0) is type(t) is np.ndarray
    return np.sqrt(s[t])[:, None] * x0 + np.sqrt(1 - s[t])[:, None] * eps
def loss(s, model, x0, t, eps):
    return np.mean((eps - model(q_sample(s, x0, t, eps), t)) ** 2, 1)
''')
    assert [rows[name]["verdict"] for name in ("eq04_the_jump_is_iterated_steps", "eq14_the_loss")] == 2 * ["holds"]


@pytest.mark.parametrize("body, said", [
    ("assert eps is None", "AssertionError"), ("raise KeyError", "KeyError"), ("import sys; sys.exit(3)", "SystemExit: 3"),
    ("return None", "RuntimeError"), ("return x0[0]", "the shape is (5,), not (5, 5)")])
def test_a_function_that_raises_or_returns_nonsense_fails(body, said):
    """Whatever it raises, an assertion of its own too, the theorem fails and the table says why."""
    source = STUDENT[:STUDENT.index("def q_posterior")].replace("    return at(s[1], t).sqrt() * x0", f"    {body}\n    return x0")
    row = judged(source, "eq04_the_jump_is_iterated_steps")["eq04_the_jump_is_iterated_steps"]
    assert row["verdict"] == "fails" and row["error"].startswith(said)


def test_an_object_called_implementation_is_judged():
    """It is asked instead of the module, and a NumPy module gets NumPy arrays there too."""
    pytest.importorskip("numpy", reason="a NumPy file needs NumPy")
    row = judged('''
import numpy as np
class implementation:
    def schedule(betas):
        return np.cumprod(1 - np.array([0.0, *betas]))
    def q_sample(s, x0, t, eps):
        assert type(x0) is type(t) is np.ndarray
        return np.sqrt(s[t])[:, None] * x0 + np.sqrt(1 - s[t])[:, None] * eps
''', "eq04_the_jump_is_iterated_steps")["eq04_the_jump_is_iterated_steps"]
    assert row["verdict"] == "holds"


# ------------------------------------------------------------------------------------ the command

def command(*words, **environment):
    """`python -m judge`, as a user runs it."""
    return subprocess.run([sys.executable, "-m", "judge", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment)


def test_the_command_judges_a_file_called_ddpm_with_its_neighbour(tmp_path):
    """The user's ddpm.py is judged and not this project's, its neighbour unet.py is the user's too, and
    so is the ddpm that the neighbour imports; the mistake is named, and pytest is not needed."""
    source = STUDENT.replace(*MISTAKES[4][:2]).replace("import torch\n", "import torch\nfrom unet import at\n", 1)
    neighbour = source[source.index("def at("):source.index("def q_sample")]
    (tmp_path / "ddpm.py").write_text(source.replace(neighbour, ""), encoding="utf-8")
    (tmp_path / "unet.py").write_text("import sys\nimport torch\nimport ddpm\nassert not hasattr(ddpm, 'Model')\n" + neighbour)
    (tmp_path / "pytest.py").write_text("raise ImportError('pytest is not needed')")
    done = command(tmp_path / "ddpm.py", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert [*rows] == ["theorem", *THEOREMS] and "noise at the last step" in rows["alg2_sampling"]
    assert sum("fails" in line for line in rows.values()) == 1
    assert sum("not offered" in line for line in rows.values()) == 5


def test_the_command_judges_the_template_and_without_a_file_prints_the_interface():
    """Both have status 0; a module's name does as well as a file's."""
    for name in ("judge/template.py", "judge.template"):
        done = command(name)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("holds") == 1 and done.stdout.count("not offered") == len(THEOREMS) - 1
    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"    {name}({arguments})" in done.stdout for name, (arguments, _) in INTERFACE.items())


ENDS, LACKS = "it exits when imported: SystemExit", "nothing to judge: it has "
UNUSABLE = [  # a file's source, what is said of it; the first four as a user runs the command
    (None, "no such file"),
    ("x = (", "it cannot be imported: SyntaxError: '(' was never closed (mine.py, line 1)"),
    ("import argparse; argparse.ArgumentParser().parse_args()", f"{ENDS}: 2 ("),
    ("", f"{LACKS}no function of the interface"),
    ("x = \0", "it cannot be imported: "),
    ("import nowhere", "it cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ("raise ValueError('one\\ntwo')", "it cannot be imported: ValueError: one two"),
    ("import sys; print('why', file=sys.stderr); sys.exit()", f"{ENDS} (why)"),
    ("def schedule(betas): return betas", f"{LACKS}only schedule of the interface")]


@pytest.mark.parametrize("name", ["notebook.ipynb", "../mine", ".", "text.txt", "a b"])
def test_what_is_no_python_file_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in ("notebook.ipynb", "text.txt"):
        Path(file).write_text("{}")
    assert main([name]) == 2
    assert capsys.readouterr().err == f"judge: {name}: give a Python file, or the name of a module\n"


@pytest.mark.parametrize("source, said", UNUSABLE)
def test_a_file_that_cannot_be_judged_is_one_line(tmp_path, source, said, monkeypatch, capsys):
    """It is on stderr, says which file and why, and the status is 2."""
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    if (source, said) in UNUSABLE[:4]:
        done = command(path)
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.setattr(sys, "path", [*sys.path])
        status, (out, err) = main([str(path)]), capsys.readouterr()
    sys.modules.pop("mine", None)
    assert (status, out) == (2, "")
    assert err.startswith(f"judge: {path}: {said}") and err.count("\n") == 1


def test_the_template_is_an_implementation():
    """It lists the whole interface."""
    text = (ROOT / "judge" / "template.py").read_text(encoding="utf-8")
    assert all(f"def {name}({arguments}):" in text for name, (arguments, _) in INTERFACE.items())
