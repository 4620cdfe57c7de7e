"""Calls an implementation, compares its answers with the right ones, and says what it found."""
import contextlib
import importlib
import importlib.util
import io
import math
import sys
from pathlib import Path

import torch

from .theorems import THEOREMS

FLOAT32 = 4 * 2.0 ** -24  # times the conditioning: four roundings of a float32 table


class Unusable(Exception):
    """Why a file cannot be judged."""


class _NotOffered(Exception):
    """The implementation lacks a function that the theorem needs."""


class _Differs(AssertionError):
    """A wrong answer; the theorem's row says which mistakes it looks like."""


class Judge:
    """Calls an implementation, compares what it returns, and remembers what was found."""

    def __init__(self, module, strict: bool = False):
        """module: has the functions, or an object `implementation` that has them. strict: answers
        that are right only to float32 fail."""
        self.module = getattr(module, "implementation", module)
        self.rows, self.choices, self.row, self.strict = {}, {}, None, strict
        used = {(getattr(value, "__name__" if isinstance(value, type(sys)) else "__module__", None)
                 or type(value).__module__).split(".")[0] for value in vars(module).values()}
        self.numpy = "torch" not in used and "numpy" in used

    def run(self, name: str, theorem) -> dict:
        """Judges one theorem. Returns its row of the table."""
        self.row = row = self.rows.setdefault(name, dict(
            statement=" ".join(theorem.__doc__.split()), verdict="holds", known={}, largest=0.0,
            precision="float64", fits=[]))
        try:
            theorem(judge=self)
        except _NotOffered:
            row["verdict"] = "not offered"
        except _Differs:
            row["verdict"] = "fails"
        except (Exception, SystemExit) as error:           # of the implementation
            row["verdict"], row["largest"], row["error"] = "fails", math.inf, said(error)[:120]
        return row

    def offered(self, *names: str):
        """The judge, if the implementation has these functions; its methods take tensors."""
        missing = [name for name in names if not hasattr(self.module, name)]
        if missing:
            raise _NotOffered(", ".join(missing))
        return self

    def __getattr__(self, name: str):
        function = getattr(self.module, name)
        if name in ("schedule", "respaced"):
            return function
        return lambda *given: self.here(function(*map(self.there, given)))

    def there(self, x):
        """A tensor, or a function of tensors, as the implementation takes it: copies, because it
        may compute in place."""
        if type(x).__module__ == "builtins" and callable(x):  # a function, but no schedule
            return lambda *given: self.there(x(*map(self.here, given)))
        if isinstance(x, torch.Tensor):
            return x.clone().numpy() if self.numpy else x.clone()
        return x

    def here(self, x):
        """What the implementation returned, as tensors; anything with __array__ is converted."""
        if isinstance(x, (tuple, list)):
            return tuple(map(self.here, x))
        if hasattr(x, "__array__") and not isinstance(x, torch.Tensor):
            import numpy
            x = torch.from_numpy(numpy.array(x))
        return x.detach() if isinstance(x, torch.Tensor) else x

    def fits(self, got, want, rel: float, floor: float) -> bool:
        """Whether |got − want| ≤ rel · |want| + floor everywhere."""
        got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
        bound = rel * want.abs() + floor
        return got.shape == want.shape and bool(((got - want).abs() <= bound).all())

    def same(self, got, want, wrong: dict, conditioning=1.0, floor=1e-9) -> None:
        """Fails unless got is want; `wrong`: mistake → what it would give."""
        self.choice(got, {"": want}, wrong, conditioning, floor)

    def choice(self, got, right: dict, wrong: dict, conditioning=1.0, floor=1e-9) -> None:
        """Fails unless got is one of `right`, the same one in every case of the theorem."""
        row, single = self.row, FLOAT32 / max(conditioning, 1e-12)
        row["known"].update(dict.fromkeys(wrong))
        got = torch.as_tensor(got)
        size = max([1.0, *(torch.as_tensor(x).double().abs().max().item() for x in right.values()
                           if torch.as_tensor(x).numel())])
        for precision, rel, least in (("float64", 1e-9, floor),
                                      ("float32", single, single * size + floor)):
            found = [name for name, want in right.items() if self.fits(got, want, rel, least)]
            if found or self.strict:
                break
        if not found:
            row["largest"] = max(row["largest"], min(map(self.distance, [got] * len(right),
                                                         right.values())))
            row["fits"] += [name for name, value in wrong.items() if name not in row["fits"]
                            and self.fits(got, value, 1e-6, 1e-6)]
            shapes = {tuple(torch.as_tensor(x).shape) for x in right.values()}
            if tuple(got.shape) not in shapes:
                row["error"] = (f"the shape is {tuple(got.shape)}, not "
                                + " or ".join(map(str, shapes)))
            raise _Differs(f"{row['statement']}: got {got}")
        row["largest"] = max(row["largest"], min(self.distance(got, right[name]) for name in found))
        if precision == "float32":
            row["precision"] = precision
        if "" not in right:
            kept = self.choices.setdefault(id(row), list(right))
            self.choices[id(row)] = row["choices"] = [name for name in kept if name in found]
            if not row["choices"]:
                raise _Differs(f"{row['statement']}: now {found[0]}, before {kept[0]}")

    def distance(self, got, want) -> float:
        """The largest |got − want|, relative to the size of want."""
        got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
        if got.shape != want.shape or not got.numel():
            return math.inf if got.shape != want.shape else 0.0
        value = ((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()
        return math.inf if math.isnan(value) else value

    def table(self) -> str:
        """The verdicts, a line per theorem."""
        lines = [f"{'theorem':44} {'verdict':12} {'deviation':>9}  precision, choices, mistakes"]
        for name, row in self.rows.items():
            note = [row["precision"]] if row["verdict"] == "holds" else []
            if row["verdict"] == "holds" and 0 < len(row.get("choices", [])):
                note.append(row["choices"][0])
            if row["verdict"] == "fails":
                fits = list(dict.fromkeys(short(x) for x in row["fits"]))
                known = [x for x in dict.fromkeys(map(short, row["known"])) if x not in fits]
                note += ["looks like: " + "; or ".join(fits)] if fits else []
                if known and not fits and "error" not in row:
                    note.append(f"like no known mistake (such as: {'; '.join(known[:3])})")
                note += [row["error"]] if row.get("error") else []
            largest = f"{row['largest']:9.1e}" if row["verdict"] != "not offered" else " " * 9
            lines.append(f"{name:44} {row['verdict']:12} {largest}  {', '.join(note)}")
        return "\n".join(lines)


def short(mistake: str) -> str:
    """A mistake's name without its choice in parentheses."""
    return mistake.split(" (")[0]


def said(error: BaseException) -> str:
    """An error on one line, with its class."""
    return ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))


def load(name: str):
    """Imports the module of this name, or the file, which may import its neighbours."""
    path = Path(name)
    is_python = path.suffix.lower() == ".py"
    if is_python and not path.is_file():
        raise Unusable("no such file")
    if not is_python and (path.is_file() or not all(map(str.isidentifier, name.split(".")))):
        raise Unusable("give a Python file, or the name of a module")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            module = _imported(path) if is_python else importlib.import_module(name)
    except SystemExit as error:
        last = printed.getvalue().strip().split("\n")[-1]
        raise Unusable(f"it exits when imported: {said(error)}"
                       f"{last and f' ({last})'}") from None
    except Exception as error:                             # of the implementation
        raise Unusable(f"it cannot be imported: {said(error)}") from None
    sys.stderr.write(printed.getvalue())
    return module


def _imported(path: Path):
    """Imports a file, with its folder first in sys.path, so that it finds its neighbours."""
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)              # never replaces a loaded module
    spec.loader.exec_module(module)
    return module


def judged(module, strict: bool = False) -> Judge:
    """The judge after all theorems."""
    judge = Judge(module, strict)
    for name, theorem in THEOREMS.items():
        judge.run(name, theorem)
    return judge
