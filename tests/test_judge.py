"""The judge: a file written from the paper holds, and a typical mistake in it is caught and named."""
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import test_ddpm
from judging import NAMES, Judge, load, short

ROOT = Path(__file__).resolve().parents[1]
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
     "eq04_the_jump_is_iterated_steps", "1 − ᾱ_t in place of its root"),
    ("(1 - before) / (1 - bar) * b\n", "b\n", "eq07_posterior_variance", "β_t in place of β̃_t"),
    ("mean = before.sqrt() * b", "mean = bar.sqrt() * b", "eq07_posterior_mean", "√ᾱ_t in place of √ᾱ_{t−1}"),
    ("/ (1 - b).sqrt(), b", "/ bar.sqrt(), b", "eq11_the_mean", "√ᾱ_t in place of √α_t"),
    ("if t > 1 else 0", "if t else 0", "alg2_sampling", "noise at the last step"),
    ("variance.sqrt() * noise", "variance * noise", "alg2_sampling", "σ_t² z in place of σ_t z"),
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
    for name, test in vars(test_ddpm).items():
        if name.startswith("test_judge_") and only in (None, name[11:]):
            judge.begin(name, test.__doc__)
            try:
                test(judge=judge)
            except (AssertionError, pytest.skip.Exception):
                pass
    return {name[11:]: row for name, row in judge.rows.items()}


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
    ("model(x_t, s[2][t - 1])", "model(x_t, t)", "shown i in place of τ_i")])
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


def test_the_command_prints_a_table_and_no_traceback(tmp_path):
    """With a mistake the status is 1; without a value the interface; a broken file is one line."""
    (tmp_path / "my_ddpm.py").write_text(STUDENT.replace(*MISTAKES[4][:2]), encoding="utf-8")
    (tmp_path / "broken.py").write_text("x = (")

    alone = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}

    def run(*words):
        return subprocess.run([sys.executable, "-m", "pytest", "test_ddpm.py", "-p", "no:cacheprovider",
                               "--implementation", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=alone)
    done = run(str(tmp_path / "my_ddpm.py"))
    assert done.returncode == 1 and "Traceback" not in done.stdout and "assert" not in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("alg2_sampling"))
    assert "fails" in line and "noise at the last step" in line
    interface = run()
    assert interface.returncode == 0 and all(name in interface.stdout for name in NAMES)
    broken = run(str(tmp_path / "broken.py"))
    assert broken.returncode and "broken.py" in broken.stderr and "Traceback" not in broken.stderr


def test_the_template_is_an_implementation():
    """It can be judged as it stands, and lists the whole interface."""
    text = (ROOT / "tools" / "template.py").read_text(encoding="utf-8")
    assert all(f"{name}(" in text for name in NAMES) and len(NAMES) == 13
    assert judged(text, "eq04_the_jump_is_iterated_steps")["eq04_the_jump_is_iterated_steps"]["verdict"] == "holds"
    with pytest.raises(pytest.UsageError, match="no such file"):
        load("nowhere.py")
