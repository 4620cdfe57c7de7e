"""The judge: the paper's statements (test_ddpm.py) on any implementation.

    python -m pytest test_ddpm.py --implementation my_ddpm.py     a file, or a module's name
    python -m pytest test_ddpm.py --implementation                prints the interface

The implementation is a module with some of these functions (or an object `implementation` in it
that has them); tools/template.py is one to fill in. t is (B,) int64 in 1 … T (T may be 1), x (B, D) in
[−1, 1] with 256 levels where Eq. 13 is asked, a variance (B,), (B, 1) or (B, D), and s what
`schedule` returns. Arrays are torch tensors; if the module uses NumPy and not torch, NumPy arrays.

    schedule(betas)                               β_1 … β_T, a list → s, anything
    q_sample(s, x0, t, eps)                       Eq. 4 → x_t
    q_posterior(s, x0, x_t, t)                    Eqs. 6, 7 → mean, variance of x_{t−1}
    predict_x0(s, x_t, t, eps)                    Eq. 15 → x̂_0
    p_mean_variance(s, model, x_t, t)             Eq. 11, σ_t² → mean, variance; model is ε_θ
    sample(s, model, x_T, noise)                  Algorithm 2 → x_0; noise(t): z from t to t − 1
    loss(s, model, x0, t, eps)                    Eq. 14 → (B,), a mean or a sum over D
    log_likelihood(x0, mean, variance)            Eq. 13 → log p, (B, D) or summed to (B,); nats
    kl(mean_q, variance_q, mean_p, variance_p)    KL(q ‖ p), (B, D) or summed to (B,); nats
    vlb_term(s, model, x0, x_t, t)                L_{t−1} of Eq. 5, at t = 1 L_0 → (B,), nats, a sum
    respaced(s, times)                            a schedule of τ_1 < … < τ_n = T alone: with it t
                                                  counts 1 … n, and the network is shown τ_t
    ddim(s, model, x_T, noise, eta)               DDIM with this η → x_0
    interpolate(s, model, x0, other, lam, t, eps, eps_other, noise)       §4.4, lam (B,), t one int
"""
import importlib
import importlib.util
import math
import sys
from pathlib import Path

import pytest

NAMES = [line.split("(")[0].strip() for line in __doc__.splitlines() if line.startswith("    ")
         and "(" in line and line[4] != " " and not line.startswith("    python")]
FLOAT32 = 4 * 2.0 ** -24  # of the formula's conditioning: four roundings of a float32 table


class Judge:
    """Calls an implementation, compares what it returns, and remembers what was found."""

    def __init__(self, module):
        self.module, self.rows, self.choices, self.row, self.strict = module, {}, {}, None, False
        used = {getattr(value, "__name__", "").split(".")[0] for value in vars(module).values()
                if type(value) is type(sys)} if module else {"torch"}
        self.numpy = "torch" not in used and "numpy" in used

    def begin(self, name: str, statement: str) -> None:
        """From now on a theorem is judged."""
        self.row = self.rows.setdefault(name, dict(statement=statement, verdict="holds", known={},
                                                   largest=0.0, precision="float64", fits=[]))

    def offered(self, *names: str):
        """The implementation, if it has these functions; they take and return tensors here."""
        missing = [name for name in names if not hasattr(self.module, name)]
        if missing:
            self.row["verdict"] = "not offered"
            pytest.skip(f"not offered: {', '.join(missing)}")
        return self

    def __getattr__(self, name: str):
        function = getattr(self.module, name)
        if name in ("schedule", "respaced"):
            return function
        return lambda *given: self.here(function(*map(self.there, given)))

    def there(self, x):
        """A tensor, or a function of tensors, as the implementation takes it."""
        import torch
        if callable(x) and not isinstance(x, torch.Tensor) and self.numpy:
            return lambda *given: self.there(x(*map(self.here, given)))
        return x.numpy() if self.numpy and isinstance(x, torch.Tensor) else x

    def here(self, x):
        """What the implementation returns, as tensors; anything with __array__ is converted."""
        import torch
        if isinstance(x, (tuple, list)):
            return tuple(map(self.here, x))
        if hasattr(x, "__array__") and not isinstance(x, torch.Tensor):
            import numpy
            x = torch.from_numpy(numpy.array(x))
        return x.detach() if isinstance(x, torch.Tensor) else x

    def fits(self, got, want, rel: float, floor: float) -> bool:
        """Whether |got − want| ≤ rel · |want| + floor everywhere."""
        import torch
        got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
        bound = rel * want.abs() + floor
        return got.shape == want.shape and bool(((got - want).abs() <= bound).all())

    def same(self, got, want, wrong: dict, conditioning=1.0, floor=1e-9) -> None:
        """Fails unless got is want; `wrong` says what mistakes would give."""
        self.choice(got, {"": want}, wrong, conditioning, floor)

    def choice(self, got, right: dict, wrong: dict, conditioning=1.0, floor=1e-9) -> None:
        """Fails unless got is one of `right`, the same one in every case of the theorem."""
        import torch
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
            row["verdict"] = "fails"
            row["largest"] = max(row["largest"], min(map(self.distance, [got] * len(right),
                                                         right.values())))
            row["fits"] += [name for name, value in wrong.items() if name not in row["fits"]
                            and self.fits(got, value, 1e-6, 1e-6)]
            shapes = {tuple(torch.as_tensor(x).shape) for x in right.values()}
            if tuple(got.shape) not in shapes:
                row["error"] = f"the shape is {tuple(got.shape)}, not {' or '.join(map(str, shapes))}"
            raise AssertionError(f"{row['statement']}: got {got}")
        row["largest"] = max(row["largest"], min(self.distance(got, right[name]) for name in found))
        if precision == "float32":
            row["precision"] = precision
        if "" not in right:
            kept = self.choices.setdefault(id(row), list(right))
            self.choices[id(row)] = row["choices"] = [name for name in kept if name in found]
            if not row["choices"]:
                row["verdict"] = "fails"
                raise AssertionError(f"{row['statement']}: now {found[0]}, and {kept[0]} before")

    def distance(self, got, want) -> float:
        """The largest |got − want|, relative to the size of want."""
        import torch
        got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
        if got.shape != want.shape or not got.numel():
            return math.inf if got.shape != want.shape else 0.0
        value = ((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()
        return math.inf if math.isnan(value) else value

    def table(self) -> str:
        """The verdicts."""
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
            lines.append(f"{name[11:55]:44} {row['verdict']:12} {largest}  {', '.join(note)}")
        return "\n".join(lines)


def short(mistake: str) -> str:
    """A mistake without the choice beside which it stands."""
    return mistake.split(" (")[0]


def load(name: str):
    """The module of --implementation; what it calls `implementation`, if it does."""
    if Path(name).suffix == ".py":
        if not Path(name).is_file():
            raise pytest.UsageError(f"--implementation {name}: there is no such file")
        sys.path.insert(0, str(Path(name).resolve().parent))
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        begin = lambda: spec.loader.exec_module(module) or module
    else:
        begin = lambda: importlib.import_module(name)
    try:
        module = begin()
    except Exception as error:  # somebody else's file
        said = f"{type(error).__name__}: {error}"
        raise pytest.UsageError(f"--implementation {name}: {said}") from None
    return getattr(module, "implementation", module)
