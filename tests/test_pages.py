"""README and PAPER: what they show runs, what they name exists, and nothing is missing."""
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import ddpm
import sample
import train
from mistakes import MISTAKES
from support import data

HERE = Path(__file__).resolve().parents[1]
PAGES = {path: path.read_text() for path in [HERE / "README.md", HERE / "PAPER.md", *sorted((HERE / "docs").glob("*.md"))]}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def block(text: str) -> str:
    """The one Python block of README and docs that contains this text."""
    found, = (code for code in BLOCKS if text in code)
    return found


def rows(title: str) -> list[list[str]]:
    """The cells of the first table under a heading of PAPER.md or of a page in docs/."""
    text = re.split("\n##? ", TEXT.split(f"\n## {title}\n")[1])[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ----------------------------------------------------------------------------------- the examples

@pytest.fixture(scope="module")
def circle() -> dict:
    """The names that the example of docs/usage.md leaves behind: a network that draws a circle."""
    torch.manual_seed(0)
    space: dict = {}
    exec(block("points on a circle"), space)
    return space


def test_another_network_and_other_data(circle):
    """Samples lie on the circle."""
    radius = circle["last"].x_t.norm(dim=1)
    assert abs(radius.mean() - 1) < 0.05 and radius.std() < 0.15


def test_another_schedule(circle):
    """ᾱ_t of the cosine schedule is cos² of a line in t, but for the last β, which is bounded."""
    exec(block("cosine of Nichol"), circle)
    bars = circle["cosine"].alpha_bars
    u = (torch.arange(101, dtype=torch.float64) / 100 + 0.008) / 1.008 * torch.pi / 2
    want = u.cos() ** 2 / u[0].cos() ** 2
    torch.testing.assert_close(bars[:-1], want[:-1], rtol=1e-6, atol=1e-9)
    assert 0 < bars[-1] < 1e-4


def test_v_prediction_is_one_entry(tmp_path, monkeypatch):
    """The README's entry, for images: the target √ᾱ ε − √(1 − ᾱ) x_0 gives x_0 back, train.py --predict v
    lowers its loss, and the network is sampled like any other."""
    monkeypatch.setattr(ddpm, "PREDICTIONS", dict(ddpm.PREDICTIONS))
    exec(block("v-prediction"), {})
    s, t = ddpm.make_schedule(), torch.tensor([1, 500, 1000])
    x0, eps = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    a, b = s.alpha_bars[t].sqrt()[:, None, None, None], (1 - s.alpha_bars[t]).sqrt()[:, None, None, None]
    v, x_t = ddpm.PREDICTIONS["v"], a * x0 + b * eps
    target = v.target(s, x0, x_t, t, eps)
    torch.testing.assert_close(target, a * eps - b * x0)
    torch.testing.assert_close(v.x0_hat(s, x_t, t, target), x0)
    monkeypatch.setitem(train.SETTINGS, "predict", ("eps", tuple(ddpm.PREDICTIONS), "what the network predicts"))
    monkeypatch.chdir(tmp_path)
    torch.save(data.shapes(64, 8), "images.pt")
    assert train.main("--dataset images.pt --predict v --channels 32 --multipliers 1 2 --blocks 1 --attention 4 --timesteps "
                      "50 --batch-size 8 --lr 2e-3 --warmup 0 --steps 40 --log-every 10 --samples 0 --device cpu".split()) == 0
    losses = [json.loads(line)["loss"] for line in Path("runs/images/log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    assert sample.main("--n 2 --steps 5 --device cpu".split()) == 0


def test_ddim(circle):
    """Twenty deterministic steps end on the circle, and the same noise gives the same points."""
    torch.manual_seed(1)
    exec(block("DDIM"), circle)
    first = circle["last"].x_t
    torch.manual_seed(1)
    exec(block("DDIM"), circle)
    assert abs(first.norm(dim=1).mean() - 1) < 0.05 and first.norm(dim=1).std() < 0.15
    assert torch.equal(first, circle["last"].x_t)


def test_two_lines_load_and_draw(tmp_path, monkeypatch):
    """From Python: a network in evaluation mode, and images of it."""
    monkeypatch.chdir(tmp_path)
    assert train.main("--dataset shapes --channels 32 --multipliers 1 --blocks 1 --batch-size 2 "
                      "--steps 1 --samples 0 --device cpu".split()) == 0
    space: dict = {}
    exec(block("sample.load"), space)
    assert space["images"].shape == (16, 3, 16, 16) and space["images"].dtype == torch.uint8
    assert not space["trained"].net.training


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "extras.compress", "extras.weights", "bench", "clean", "steps", "mistakes", "film", "memory"])
def test_flags_exist(script, capsys):
    """Every flag that README and PAPER give to a script is one of its flags."""
    assert importlib.import_module(script).main(["--help"]) == 0
    text = capsys.readouterr().out
    joined = TEXT.replace("\\\n", " ")
    for line in re.findall(rf"(?:python|--) (?:tools/|page/)?{script}\.py([^\n`#]*)|-m {re.escape(script)} ([^\n`#]*)", joined):
        for flag in re.findall(r"--[a-z][a-z-]*", " ".join(line)):
            assert flag in text, flag


def test_pictures_and_links_exist():
    """Every picture and every file that a page links to is there, and no placeholder is left."""
    for path, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert target.startswith("https://") or (path.parent / target).exists(), target
        assert not re.search(r"@[A-Z]+@", page)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                   for title in re.findall(r"^#+ (.*)", page, re.M)}
        for anchor in re.findall(r"\]\(#([^)]+)\)", page):
            assert anchor in anchors, anchor


# ------------------------------------------------------------------------------- the paper in code

def resolve(name: str) -> object:
    """`function` of ddpm.py, or `module.function`."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module or "ddpm"), function, None)


def test_the_map_is_complete_and_true():
    """Every function and test in it exists, every label and public function of ddpm.py is there.

    And every test in it fails on a mistake."""
    named, labels = set(), ""
    for label, _, both in rows("The map"):
        functions, _, tests = both.partition("<br>")
        labels += label.replace("Eqs.", "Eq.").replace("Algs.", "Alg.").replace("Figs.", "Fig.") + "; "
        for name in re.findall(r"`([\w.]+)`", functions):
            assert callable(resolve(name)), name
            named.add(name)
        for test in re.findall(r"`(test_\w+)`", tests) or [None]:
            assert test in {entry[1].split(".")[1] for entry in MISTAKES.values()}, (label, test)
    for name, thing in vars(ddpm).items():
        if inspect.isfunction(thing) and thing.__module__ == "ddpm" and not name.startswith("_"):
            assert name in named, name
    numbers = {(kind, int(n)) for kind, some in re.findall(r"(Eq|Alg|Table|Fig)\.? ([\d, ]+)", labels)
               for n in re.findall(r"\d+", some)}
    wanted = {("Eq", range(1, 17)), ("Alg", range(1, 5)), ("Table", (1, 2, 4)), ("Fig", range(5, 9))}
    assert {(kind, n) for kind, some in wanted for n in some} <= numbers


def test_the_easy_mistakes_are_those_that_are_tried():
    """docs/mistakes.md lists the mistakes that a command shows, each with the test that notices it."""
    listed = {row[0]: re.findall(r"`(test_\w+)`", row[-1]) for row in rows("Easy mistakes")
              if not row[0].startswith("**")}
    assert listed == {name: [test.split(".")[1]] for name, (_, test, _, controls)
                      in MISTAKES.items() if controls}


def test_every_symptom_has_a_run_behind_it():
    """Each mistake of docs/mistakes.md was run under each of its controls, beside the right lines."""
    folder = HERE / "page" / "images" / "mistakes"
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name, (*_, controls) in MISTAKES.items():
        for control in (controls or "").split():
            assert f"{control}/{name}" in runs and f"{control}/right" in runs, (name, control)
    pictures = {run["picture"] for run in runs.values()} - {None}
    assert pictures == {path.name for path in folder.glob("*.png")}


def test_the_released_codes_flags_exist(capsys):
    """Every function and flag in the table of differences exists."""
    flags = ""
    for script in (train, sample):
        script.main(["--help"])
        flags += capsys.readouterr().out
    evaluate = importlib.import_module("evaluate")
    evaluate.main(["--help"])
    flags += capsys.readouterr().out
    text = " ".join(row[-1] for row in rows("Where the released code differs"))
    for flag in re.findall(r"`(--[a-z-]+)", text):
        assert flag in flags, flag
    for name in re.findall(r"`(\w+\.\w+)`", text):
        assert callable(resolve(name)), name


def test_every_symptom_leads_to_mistakes_that_are_there():
    """Each name in the table of symptoms has its row in the table of mistakes, under that name."""
    symptoms = rows("Symptoms")
    named = [name for row in symptoms for name in row[1].split("; ") if not name.startswith("`")]
    assert len(symptoms) > 15 and set(named) <= set(MISTAKES) and len(named) > 40
