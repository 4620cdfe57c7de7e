"""The matrix: which statements of the paper hold in which library.

    pip install --no-deps -r judge/libraries/requirements.txt     beside torch and hypothesis
    python -m judge.libraries                     a table, and judge/libraries/matrix.json

Every library with an adapter (peer_NAME.py) is judged in a process of its own, and every file of
defects/ is run. A cell says “defect” only if a file has just shown it. Such a file begins with
`# NAME: theorem fails, with SETTING`, or without `fails` if the adapter's settings do not show it;
the comment after it is the note. NOTES in an adapter has the choices and conventions, {theorem:
(kind, sentence)}. Exit status 1: a failure without a reason, or a defect that is not seen now.
"""
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from ..judging import judged, load

HERE = Path(__file__).resolve().parent
PACKAGES = dict(diffusers="diffusers", monai="MONAI", labml="labml-nn",
                lucidrains="denoising-diffusion-pytorch")


def judge(name: str, out: str) -> None:
    """In a process of its own: the judge's rows and the adapter's notes, written to `out`."""
    found = judged(load(str(HERE / f"peer_{name}.py")))
    rows = {theorem: {k: row[k] for k in row if k != "known"}
            for theorem, row in found.rows.items()}
    kept = {"theorems": rows, "notes": getattr(found.module, "NOTES", {})}
    Path(out).write_text(json.dumps(kept))


def run(*command) -> tuple:
    """Exit status and last line of a program in Python."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parents[1], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, (done.stdout.strip().splitlines() or [done.stderr])[-1].strip("; ")


def reproduce(path: Path) -> dict:
    """A file of defects/, run."""
    head, *text = [line[2:] for line in path.read_text().splitlines() if line[:2] == "# "]
    name, theorem, fails, setting = re.fullmatch(r"(\w+): (\w+)( fails)?(?:, (.+))?", head).groups()
    status, printed = run(path)
    return {"file": path.name, "library": name, "theorem": theorem, "setting": setting, "text":
            " ".join(text), "why": bool(fails), "shown": status == 0, "printed": printed}


def cell(row: dict, note, defects: list, number) -> str:
    """What the table says of a theorem and a library; `number` gives a sentence its number."""
    said, verdict, note = [], row["verdict"], None if row.get("error") else note
    off, single = f"{row['largest']:.0e}", " in float32" * (row["precision"] == "float32")
    if verdict == "holds":
        verdict = ", ".join(["holds", *row.get("choices", [])[:1], off + single])
    if note:
        said.append(f"{note[0]} [{number('', note[1])}], {off}")
    for why, word in ((True, "defect"), (False, "but defect")):
        seen = [number(d["setting"], f"{d['text']} Seen: {d['printed']} (`{d['file']}`).")
                for d in defects if d["why"] == why]
        said += [f"{word} {', '.join(f'[{n}]' for n in seen)}"] if seen else []
    if verdict == "fails":
        verdict = "" if note or any(d["why"] for d in defects) else "fails (unexplained)"
    return ", ".join(filter(None, [verdict, *said]))


def table(libraries: dict, defects: list) -> str:
    """The matrix and its notes in Markdown."""
    notes, columns = [], {name: PACKAGES[name] for name in libraries}

    def number(name, setting, sentence):
        text = ", ".join(filter(None, [columns[name], setting])) + f": {sentence}"
        notes.extend([] if text in notes else [text])
        return notes.index(text) + 1
    heads = ["", *(f"{columns[name]} {libraries[name]['version']}" for name in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for theorem, row in next(iter(libraries.values()))["theorems"].items():
        cells = [cell(found["theorems"][theorem], found["notes"].get(theorem), [
            d for d in defects if d["shown"] and (d["library"], d["theorem"]) == (name, theorem)],
            lambda *note, name=name: number(name, *note)) for name, found in libraries.items()]
        lines.append(" | ".join(["| " + row["statement"].replace("|", "\\|"), *cells]) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def main() -> int:
    libraries, out = {}, HERE / "judged.json"
    for name, package in PACKAGES.items():
        try:
            version, began = importlib.metadata.version(package), time.time()
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed", file=sys.stderr)
            continue
        said = run("-m", "judge.libraries", "--judge", name, out)[1]
        assert out.is_file(), f"{package} was not judged: {said}"
        libraries[name] = json.loads(out.read_text()) | {
            "package": package, "version": version, "seconds": round(time.time() - began, 1)}
        out.unlink()
    defects = [reproduce(path) for path in sorted((HERE / "defects").glob("*.py"))
               if path.name.split("_")[0] in libraries]
    record = {"date": str(datetime.date.today()), "python": platform.python_version(), "torch":
              importlib.metadata.version("torch"), "libraries": libraries, "defects": defects}
    (HERE / "matrix.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print("Judged on {date} with Python {python} and torch {torch}.\n".format(**record))
    print(shown := table(libraries, defects))
    gone = [d["file"] for d in defects if not d["shown"]]
    print(*(f"no defect seen: {file}\n" for file in gone), end="", file=sys.stderr)
    return int("(unexplained)" in shown or bool(gone))


if __name__ == "__main__":
    sys.exit(judge(*sys.argv[2:]) if sys.argv[1:2] == ["--judge"] else main())
