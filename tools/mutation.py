"""Mutation testing: how many wrong changes of the code do the tests notice?

    pip install mutmut==3.8.1 pillow matplotlib diffusers
    python tools/mutation.py ddpm                  every small change of a file that mutmut makes
    python tools/mutation.py train --sample 150    150 of them, drawn at random
    python tools/mutation.py first                 a list of mistakes of meaning
    python tools/mutation.py second                another list, independent of the first

tools/meanings.json has the two lists of mistakes of meaning: file, right line, wrong line, and what
the mistake means. Both were written from the code, without a look at the tests, and the scores that
the README tells are of tests that knew nothing of them. A list takes about 40 minutes on one core.

All mutants of ddpm.py take about a quarter of an hour on two cores, 150 of another file from two
minutes to half an hour. Left out are the wording of messages, which no test should pin, the
display of progress and the looks of plots. What was tested already is not tested again, until the
folder that the first line of the output names is deleted. At the end stand the survivors.
"""
from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
from support.command import Parser, command, count

TESTS = {
    "ddpm": ["test_ddpm.py"],
    "unet": ["tests/test_unet.py", "tests/test_weights.py"],
    "train": ["tests/test_train.py", "tests/test_pictures.py", "tests/test_long_runs.py",
              "tests/test_commands.py"],
    "sample": ["tests/test_pictures.py", "tests/test_long_runs.py", "tests/test_commands.py",
               "tests/test_weights.py"],
    "evaluate": ["tests/test_evaluate.py"],
    "compress": ["tests/test_compress.py"],
    "support/command": ["tests/test_support.py", "tests/test_commands.py", "tests/test_hostile.py"],
    "support/machine": ["tests/test_support.py", "tests/test_pictures.py"],
    "support/checkpoint": ["tests/test_support.py", "tests/test_pictures.py",
                           "tests/test_weights.py"],
    "support/data": ["tests/test_data.py", "tests/test_hostile.py"],
    "support/weights": ["tests/test_weights.py"],
}
# Statements that begin so are left alone: the wording of messages, progress, the looks of a plot.
MESSAGES = [r"raise \w+\(", r"\bsay\(", r"parser\.add", r"progress\b", r"figure", r"ax\w*\."]
LEFT_OUT = ("not (kill_at or two_ranks or signal or bench or process_of_its_own or "
            "machines_without or same_bits)")  # what starts processes of its own
SETTINGS = """

[tool.mutmut]
source_paths = ["{target}"]
also_copy = {others}
do_not_mutate_patterns = {messages}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-x", "-q", "-k", "{left_out}"]
use_git_change_detection = false
"""

def copied(work: Path, *places: Path) -> list[str]:
    """Copies the files of the tree to these folders, and returns their names."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE,
                            capture_output=True, text=True).stdout.split()
    files = [file for file in listed if (HERE / file).is_file()]
    for file in files:
        for place in (work, *places):
            (place / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / file, work / file)
    return files

def meanings(which: str, sample: int | None) -> int:
    """Puts each mistake of a list into a copy of the tree, and runs the tests there."""
    listed = json.loads((HERE / "tools" / "meanings.json").read_text(encoding="utf-8"))[which]
    listed = random.Random(0).sample(listed, min(sample or len(listed), len(listed)))
    tests = sorted({test for some in TESTS.values() for test in some} | {"tests/test_judge.py"})
    score: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        copied(work)
        if subprocess.run([sys.executable, "-m", "pytest", "-xq", *tests], cwd=work).returncode:
            raise ValueError("the tests fail without a mistake, and would notice anything")
        for file, right, wrong, meaning in listed:
            source = (work / file).read_text(encoding="utf-8")
            if source.count(right) != 1:
                raise ValueError(f"{file} has {source.count(right)} × {right!r}")
            (work / file).write_text(source.replace(right, wrong), encoding="utf-8")
            nearest = TESTS[file.removesuffix(".py")]
            for some in (nearest, [test for test in tests if test not in nearest]):
                try:
                    run = subprocess.run([sys.executable, "-m", "pytest", "-xq", *some], cwd=work,
                                         capture_output=True, timeout=900)
                    noticed = run.returncode != 0
                except subprocess.TimeoutExpired:
                    noticed = True
                if noticed:
                    break
            (work / file).write_text(source, encoding="utf-8")
            score.setdefault(file, []).append(noticed)
            print(f"{'noticed' if noticed else 'SURVIVED'}: {file}: {meaning}", flush=True)
    for file, seen in [*score.items(), ("all", sum(score.values(), []))]:
        print(f"{file}: {sum(seen)} of {len(seen)} noticed ({sum(seen) / len(seen):.1%})")
    return 0

@command
def main(argv=None) -> int:
    """Copies the tree, lets mutmut test its mutants, and prints the score and the survivors."""
    parser = Parser(__doc__)
    parser.add_argument("name", choices=[*TESTS, "first", "second"],
                        help="a file, without .py, or a list of mistakes of meaning")
    parser.add_argument("--sample", type=count, help="how many mutants (default: all of them)")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(),
                        help="how many mutants at a time (default: the number of cores)")
    args = parser.parse_args(argv)
    if args.name not in TESTS:
        return meanings(args.name, args.sample)
    target = f"{args.name}.py"
    work = Path(tempfile.gettempdir(), "ddpm-mutation-" + args.name.replace("/", "-"))
    print(f"working in {work}")
    if not work.exists():
        files = copied(work, work / "mutants")  # mutmut makes no folders
        with open(work / "pyproject.toml", "a", encoding="utf-8") as file:
            file.write(SETTINGS.format(
                target=target, left_out=LEFT_OUT, tests=json.dumps(TESTS[args.name]),
                messages=json.dumps(MESSAGES),
                others=json.dumps([file for file in files if file != target
                                   and Path(file).suffix in (".py", ".md", ".toml")])))
    mutmut = [sys.executable, "-m", "mutmut"]
    results = work / "mutants" / f"{target}.meta"
    names = []
    if args.sample:
        if not results.exists():  # this makes the mutants, and tests none of them
            subprocess.run([*mutmut, "run", "none-of-them"], cwd=work, capture_output=True)
        codes = json.loads(results.read_text(encoding="utf-8"))["exit_code_by_key"]
        names = random.Random(0).sample(sorted(codes), min(args.sample, len(codes)))
    subprocess.run([*mutmut, "run", "--max-children", str(args.jobs), *names], cwd=work)
    codes = json.loads(results.read_text(encoding="utf-8"))["exit_code_by_key"]
    tested = {key: code for key, code in codes.items() if code is not None}
    if not tested:
        raise ValueError("mutmut has tested nothing: what it says stands above")
    alive = sorted(key for key, code in tested.items() if code in (0, 5, 33))  # 33: no test runs it
    for key in alive:
        shown = subprocess.run([*mutmut, "show", key], cwd=work, capture_output=True, text=True)
        print(shown.stdout)
    print(f"{target}: {len(tested) - len(alive)} of {len(tested)} mutants killed "
          f"({1 - len(alive) / max(len(tested), 1):.1%}); {len(codes)} in all")
    return 0

if __name__ == "__main__":
    sys.exit(main())
