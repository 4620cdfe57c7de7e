"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020): the mathematics.

Read it from top to bottom beside the paper (arXiv 2006.11239): sections, equations, algorithms and
symbols are the paper's, in its order but for Eqs. 1 and 15. The network is any `net(x_t, t)`.

    t         the paper's time 1 … T: (B,) int64, one number for each image of the batch; in the
              algorithms, where all images have the same time, one int
    x0, x_t   (B, …) floating point: images (B, C, H, W) in [−1, 1], or data of any other shape
    eps, z    noise ~ N(0, I) of the same shape, which the caller draws
    x0_hat    x̂_0, an estimate of x_0 (Eq. 15)
    s         a Schedule: β_t, α_t and ᾱ_t for t = 0 … T, on the device of t: `s.to(device)`
    model     a Model, which is p_θ: the schedule, the network and three choices
    D         the number of dimensions of one x0; for images C · H · W

A function `*_mean_variance` returns a distribution. A function that returns a sample takes its
noise as an argument. `sigma2` is a variance σ² (a tensor); `variance` (a string) selects one.
Likelihoods are in nats, summed over all dimensions unless the docstring says otherwise;
`bits_per_dim` converts them.

    s = make_schedule().to(x0.device)
    model = Model(s, net)                                                     # p_θ
    t = torch.randint(1, s.T + 1, (len(x0),), device=x0.device)
    loss = loss_simple(model, x0, t, torch.randn_like(x0)).mean()             # Algorithm 1, line 5
    with torch.no_grad():
        for state in p_sample_loop(model, x_T, lambda t: torch.randn_like(x_T)):
            print(state.t, state.x_t, state.x0_hat)                           # Algorithm 2
"""
from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]

# === §2  Background ===============================================================================
#
# The data are samples x_0 ~ q(x_0) of an unknown distribution. The forward process q adds noise to
# them in T steps. It is a fixed Markov chain:
#
#     q(x_{1:T} | x_0) = ∏_{t=1}^{T} q(x_t | x_{t−1}),
#     q(x_t | x_{t−1}) = N(√(1 − β_t) x_{t−1}, β_t I)                                        [Eq. 2]
#
# The model is a Markov chain in the other direction. It starts from noise and removes it:
#
#     p_θ(x_{0:T}) = p(x_T) ∏_{t=1}^{T} p_θ(x_{t−1} | x_t),     p(x_T) = N(0, I),            [Eq. 1]
#     p_θ(x_{t−1} | x_t) = N(μ_θ(x_t, t), Σ_θ(x_t, t))
#
# Training looks for the θ under which the data are likely: it lowers a bound on −log p_θ(x_0),
# where p_θ(x_0) = ∫ p_θ(x_{0:T}) dx_{1:T}. E_q is the mean over x_1 … x_T ~ q, given x_0.
# One factor of Eq. 1 is `p_mean_variance` in §3.2; `p_sample_loop` walks the whole chain.

class Gaussian(NamedTuple):
    """A Gaussian with a diagonal covariance, as in each step of Eqs. 1, 2, 4 and 6."""
    mean: Tensor    # (B, …)
    sigma2: Tensor  # σ², for each image (in float64) or each dimension; it broadcasts

# --- Eq. 2: the forward process adds noise --------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Schedule:
    """β_t, α_t = 1 − β_t and ᾱ_t = ∏_{i≤t} α_i for t = 0 … T: float64 tensors (T + 1,).   [DDPM §2]

    β_0 = 0 and ᾱ_0 = 1, so `alpha_bars[t − 1]` also works at t = 1. `times[t]` is the time
    that is passed to the network. It is t, except after `respace`: then it is the time in the
    original schedule, which is kept in `full`.
    """
    betas: Tensor
    alphas: Tensor
    alpha_bars: Tensor
    times: Tensor
    full: Schedule | None = None

    @property
    def T(self) -> int:
        """The number of steps T."""
        return len(self.betas) - 1

    def to(self, device) -> Schedule:
        """The same schedule on `device`, in float64; in float32 on Apple's MPS, which lacks it."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        full = None if self.full is None else self.full.to(device)
        return Schedule(self.betas.to(device, dtype), self.alphas.to(device, dtype),
                        self.alpha_bars.to(device, dtype), self.times.to(device), full)

def schedule_from_betas(betas) -> Schedule:
    """ᾱ_t = ∏_{i=1}^{t} (1 − β_i).   [DDPM §2]

    betas: β_1 … β_T, a sequence of numbers in (0, 1). ValueError for anything else.
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.dim() != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError("a schedule needs at least one β, and each β in (0, 1)")
    betas = torch.cat([betas.new_zeros(1), betas])  # β_0 = 0, and so ᾱ_0 = 1
    alphas = 1 - betas
    return Schedule(betas, alphas, alphas.cumprod(0), torch.arange(len(betas)))

def make_schedule(T: int = 1000, kind: str = "linear",
                  beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """linear: β_t rises from 10⁻⁴ to 0.02 in equal steps; T = 1000.   [DDPM §4]

    kind: "linear"; "quadratic", where √β_t rises in equal steps; "constant", where every β_t is
    beta_end; or a branch that you add. Not in the paper: for T ≠ 1000 both ends are multiplied by
    1000/T (and are at most 0.999), because T = 100 with the paper's β would leave ᾱ_T = 0.36.
    ValueError for an unknown kind, T < 2, β that are ≤ 0 or fall, and if ᾱ_T > 10⁻³: p(x_T) =
    N(0, I) would then be far from q(x_T | x_0).
    """
    if T < 2 or not (beta_start > 0 and beta_end > 0) or (
            kind != "constant" and beta_start > beta_end):
        raise ValueError(f"T = {T}, β from {beta_start} to {beta_end}: it needs T ≥ 2 and β > 0 "
                         "that do not fall")
    first, last = (min(beta * 1000 / T, 0.999) for beta in (beta_start, beta_end))
    if kind == "linear":
        betas = torch.linspace(first, last, T, dtype=torch.float64)
    elif kind == "quadratic":
        betas = torch.linspace(first ** 0.5, last ** 0.5, T, dtype=torch.float64) ** 2
    elif kind == "constant":
        betas = torch.full((T,), last, dtype=torch.float64)
    else:
        raise ValueError(f"no schedule is called {kind!r}: choose linear, quadratic or constant")
    s = schedule_from_betas(betas)
    if s.alpha_bars[T] > 1e-3:
        raise ValueError(f"ᾱ_T = {s.alpha_bars[T]:.3g} exceeds 10⁻³, so x_T would still show the "
                         "image: the schedule needs more noise, as from a larger beta_end")
    if s.alpha_bars[T].float() == 0:
        raise ValueError("ᾱ_T is 0 in float32, and Eq. 15 divides by its root: the schedule needs "
                         "a smaller beta_end")
    return s

def _at(table: Tensor, t: Tensor) -> Tensor:
    """The entries (B,) of a table of the schedule at the times t (B,): integers from 0.

    ValueError if t is no tensor, or on another device; IndexError or RuntimeError for times that
    are not integers or lie outside the table.
    """
    if not isinstance(t, Tensor):
        raise ValueError(f"t is a {type(t).__name__}: it must be a tensor, one time per image")
    if table.device != t.device:
        raise ValueError(f"the schedule is on {table.device} and t on {t.device}: move one of them,"
                         f" as in s.to({str(t.device)!r})")
    return table.index_select(0, t)

def _from_1(table: Tensor, t: Tensor) -> Tensor:
    """The same at t = 1 … T. IndexError or RuntimeError for t = 0, as of code that counts from 0:
    no step leads to x_0, and it has no noise to predict."""
    return _at(table[1:], t - 1)

def _column(c: Tensor, x: Tensor) -> Tensor:
    """c (B,), a number per image, as (B, 1, …, 1), to multiply x (B, …). ValueError if not B."""
    if len(c) != len(x):
        raise ValueError(f"{len(c)} times for {len(x)} images: t needs one time per image")
    return c.to(x.device).reshape((-1,) + (1,) * (x.dim() - 1))

def _like(c: Tensor, x: Tensor) -> Tensor:
    """The same in the dtype of x: a coefficient, computed in float64, is rounded here, once."""
    return _column(c, _floating(x)).to(x.dtype)

def _floating(x: Tensor) -> Tensor:
    """x itself. ValueError for integers: a coefficient would be rounded to 0 or 1."""
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}: images are floating point, in [−1, 1]")
    return x

def _same(x: Tensor, *others: Tensor) -> None:
    """ValueError unless x, ε, z or what the network returns have one shape and a floating dtype."""
    for other in others:
        if x.shape != other.shape or not (x.is_floating_point() and other.is_floating_point()):
            raise ValueError(f"shapes or dtypes differ: {tuple(x.shape)} {x.dtype} and "
                             f"{tuple(other.shape)} {other.dtype}: x, ε, z and the network's "
                             "output must have the same shape and be floating point")

def _countdown(T: int, start: int | None) -> range:
    """The times start (T) … 1. ValueError if they do not begin in 1 … T."""
    first = T if start is None else operator.index(start)
    if not 1 <= first <= T:
        raise ValueError(f"a chain cannot start at t = {first}: choose 1 … {T}")
    return range(first, 0, -1)

def _all(t: int, x: Tensor) -> Tensor:
    """The time t for every image of x (B, …): (B,) int64."""
    return torch.full((len(x),), t, device=x.device)

def q_step(s: Schedule, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = √(1 − β_t) x_{t−1} + √β_t ε, a sample of q(x_t | x_{t−1}).   [DDPM Eq. 2]

    x is x_{t−1} (B, …), the result x_t. If x_{t−1} has variance 1, then so has x_t:
    (1 − β_t) · 1 + β_t = 1. Training does not walk these steps: Eq. 4 jumps to any t at once.
    """
    _same(x, eps)
    alpha, beta = _from_1(s.alphas, t), _from_1(s.betas, t)
    return _like(alpha.sqrt(), x) * x + _like(beta.sqrt(), x) * eps

# --- Eq. 3: the bound -----------------------------------------------------------------------------
#
#     −log p_θ(x_0) ≤ L,                                                                     [Eq. 3]
#     L = E_q[ −log [p_θ(x_{0:T}) / q(x_{1:T} | x_0)] ]
#       = E_q[ −log p(x_T) − Σ_{t≥1} log [p_θ(x_{t−1} | x_t) / q(x_t | x_{t−1})] ]
#
# by Jensen's inequality (derived in PAPER.md), for one x_0; the paper's L is its mean over all x_0.
# It is the negative evidence lower bound of a variational autoencoder whose encoder q is fixed.

# --- Eq. 4: from x_0 to any x_t in one jump -------------------------------------------------------

def q_mean_variance(s: Schedule, x0: Tensor, t: Tensor) -> Gaussian:
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I).   [DDPM Eq. 4]

    By induction. A step of Eq. 2 multiplies the mean by √α_t, so that it becomes √ᾱ_t x_0. It turns
    a variance v into α_t v + β_t, so that 1 − ᾱ_{t−1} becomes α_t − ᾱ_t + β_t = 1 − ᾱ_t.
    t: 0 … T, where t = 0 stands for x_0 itself.
    """
    alpha_bar = _at(s.alpha_bars, t)
    return Gaussian(_like(alpha_bar.sqrt(), x0) * x0, _column(1 - alpha_bar, x0))

def q_sample(s: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t(x_0, ε) = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, a sample of q(x_t | x_0).   [DDPM Eq. 4]"""
    mean, sigma2 = q_mean_variance(s, x0, t)
    _same(mean, eps)
    return mean + sigma2.sqrt().to(mean.dtype) * eps

# --- Eq. 15: from x_t back to x_0 -----------------------------------------------------------------

def predict_x0_from_eps(s: Schedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x̂_0 = (x_t − √(1 − ᾱ_t) ε_θ(x_t, t)) / √ᾱ_t: Eq. 4 solved for x_0.   [DDPM Eq. 15]"""
    _same(x_t, eps)
    alpha_bar = _at(s.alpha_bars, t)
    return (x_t - _like((1 - alpha_bar).sqrt(), x_t) * eps) / _like(alpha_bar.sqrt(), x_t)

def predict_eps_from_x0(s: Schedule, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """ε = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t): Eq. 4 solved for ε.   [DDPM Eq. 15 inverted]"""
    _same(x_t, x0)
    alpha_bar = _from_1(s.alpha_bars, t)
    return (x_t - _like(alpha_bar.sqrt(), x_t) * x0) / _like((1 - alpha_bar).sqrt(), x_t)

# --- Eq. 5: the bound as a sum of KL divergences --------------------------------------------------
#
# Bayes' rule, with x_0 given, turns Eq. 3 into a sum of KL divergences (derived in PAPER.md):
#
#     L = E_q[ L_T + Σ_{t>1} L_{t−1} + L_0 ]                                                [Eq. 5]
#     L_T = KL(q(x_T | x_0) ‖ p(x_T))                            `prior_kl`   (§3.1)
#     L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t))   `vlb_term`   (after §3.3)
#     L_0 = −log p_θ(x_0 | x_1)                                  `vlb_term`   (after §3.3)

def normal_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q ‖ p) = ½ (log(σ_p²/σ_q²) + (σ_q² + (μ_q − μ_p)²)/σ_p² − 1).   [used in DDPM Eq. 5]

    This is E_q[log q − log p] with E_q(x − μ_p)² = σ_q² + (μ_q − μ_p)². Both σ² > 0. The result
    has one number for each dimension, in nats, and is not summed.
    """
    return 0.5 * ((p.sigma2 / q.sigma2).log()
                  + (q.sigma2 + (q.mean - p.mean) ** 2) / p.sigma2 - 1)

# --- Eqs. 6 and 7: the posterior of the forward process -------------------------------------------

def _beta_tilde(s: Schedule, t: Tensor) -> Tensor:
    """β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) β_t (B,)."""
    return (1 - _at(s.alpha_bars, t - 1)) / (1 - _at(s.alpha_bars, t)) * _at(s.betas, t)

def q_posterior_mean_variance(s: Schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
    """q(x_{t−1} | x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I).   [DDPM Eqs. 6, 7]

        μ̃_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t) x_0  +  √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) x_t
        β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) β_t

    By Bayes' rule it is proportional to q(x_t | x_{t−1}) q(x_{t−1} | x_0) as a function of x_{t−1},
    a product of two Gaussians (derived in PAPER.md). At t = 1 it is the point x_0, as β̃_1 = 0.
    """
    beta, alpha = _at(s.betas, t), _at(s.alphas, t)
    alpha_bar, alpha_bar_before = _at(s.alpha_bars, t), _at(s.alpha_bars, t - 1)
    weight_x0 = alpha_bar_before.sqrt() * beta / (1 - alpha_bar)
    weight_x_t = alpha.sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar)
    _same(x_t, x0)
    return Gaussian(_like(weight_x0, x_t) * x0 + _like(weight_x_t, x_t) * x_t,
                    _column(_beta_tilde(s, t), x_t))

def predict_x0_from_mean(s: Schedule, x_t: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """x̂_0 = ((1 − ᾱ_t) μ̃_t − √α_t (1 − ᾱ_{t−1}) x_t) / (√ᾱ_{t−1} β_t).   [DDPM Eq. 7 inverted]"""
    alpha_bar, alpha_bar_before = _at(s.alpha_bars, t), _at(s.alpha_bars, t - 1)
    weight_x_t = _at(s.alphas, t).sqrt() * (1 - alpha_bar_before)
    weight_x0 = alpha_bar_before.sqrt() * _at(s.betas, t)
    _same(x_t, mean)
    return (_like(1 - alpha_bar, x_t) * mean - _like(weight_x_t, x_t) * x_t) / _like(weight_x0, x_t)

# === §3.1  The forward process and L_T ============================================================

def prior_kl(s: Schedule, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)).   [DDPM Eq. 5, §3.1]

    Takes x0 (B, …), returns (B,) nats in float64. It has no parameters: training leaves it out.
    """
    x0 = _float64(x0)
    q = q_mean_variance(s, x0, _all(s.T, x0))
    standard = Gaussian(torch.zeros_like(x0), torch.ones_like(q.sigma2))
    return normal_kl(q, standard).flatten(1).sum(1)

def _float64(x: Tensor) -> Tensor:
    """x in float64, because bounds sum over thousands of dimensions; on the CPU if x is on MPS."""
    return _floating(x.cpu() if x.device.type == "mps" else x).double()

# === §3.2  The reverse process and L_{1:T−1} ======================================================

def p_variance(s: Schedule, t: Tensor, variance: str) -> Tensor:
    """Σ_θ = σ_t² I with σ_t² = β_t ("fixed_large") or σ_t² = β̃_t ("fixed_small").   [DDPM §3.2]

    Returns (B,) in float64. The true variance of x_{t−1} given x_t is β_t if x_0 ~ N(0, I), and
    β̃_t if x_0 is always one point. Ho et al.'s CIFAR-10 code, not the paper: at t = 1 both are
    β̃_2, since L_0 would divide by β̃_1 = 0, and since, as a comment there says, β̃_2 gives a
    better likelihood than β_1. Only L_0 depends on σ_1². (A schedule of one step has σ_1² = β_1.)
    """
    beta = _from_1(s.betas, t)
    if s.T == 1:
        return beta
    beta_tilde = _beta_tilde(s, t.clamp(min=2))
    if variance == "fixed_small":
        return beta_tilde
    if variance == "fixed_large":
        return torch.where(t == 1, beta_tilde, beta)
    raise ValueError(f"no fixed variance is called {variance!r}: choose fixed_large or fixed_small")

# --- Eqs. 8 to 12: from L_{t−1} to a prediction of the noise --------------------------------------
#
# In Eqs. 8 to 12 L_{t−1} is a mean. For t > 1 and a fixed σ_t² it depends on θ through μ_θ alone:
#
#     L_{t−1} = E_q[ 1/(2σ_t²) · ‖μ̃_t(x_t, x_0) − μ_θ(x_t, t)‖² ] + C,                      [Eq. 8]
#     C = D/2 · (log(σ_t²/β̃_t) + β̃_t/σ_t² − 1).
#
# Eq. 4 solved for x_0 is (x_t − √(1 − ᾱ_t) ε)/√ᾱ_t. Put into Eq. 7 it gives (derived in PAPER.md)
#
#     L_{t−1} − C = E[ 1/(2σ_t²) · ‖μ̃_t(x_t, (x_t − √(1 − ᾱ_t) ε)/√ᾱ_t) − μ_θ(x_t, t)‖² ]   [Eq. 9]
#     L_{t−1} − C = E[ 1/(2σ_t²) · ‖1/√α_t · (x_t − β_t/√(1 − ᾱ_t) · ε) − μ_θ(x_t, t)‖² ]   [Eq. 10]
#
# where x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, and the mean is over x_0 and ε. The network already
# receives x_t, so it only has to predict ε: μ_θ takes the same form, with the output ε_θ(x_t, t):
#
#     μ_θ(x_t, t) = 1/√α_t · (x_t − β_t/√(1 − ᾱ_t) · ε_θ(x_t, t))                           [Eq. 11]
#     L_{t−1} − C = E[ β_t²/(2σ_t² α_t (1 − ᾱ_t)) · ‖ε − ε_θ(x_t, t)‖² ]                    [Eq. 12]
#
# `p_mean_variance` computes μ_θ in two equivalent steps: first x̂_0 (Eq. 15), then μ̃_t(x_t, x̂_0)
# (Eq. 7). A sampling step, this mean plus σ_t z, resembles Langevin dynamics:
# −ε_θ/√(1 − ᾱ_t) estimates ∇ log q(x_t), the gradient of a log-density.

def vlb_weight(s: Schedule, t: Tensor, variance: str = "fixed_large") -> Tensor:
    """β_t² / (2 σ_t² α_t (1 − ᾱ_t)), the weight of ‖ε − ε_θ‖² in L_{t−1} − C.   [in DDPM Eq. 12]

    Returns (B,) in float64. With these weights Eq. 12 resembles denoising score matching; L_simple
    leaves them out. t > 1: at t = 1 the term is L_0, to which Eq. 12 does not apply.
    """
    weight = _at(s.betas, t) ** 2 / (_at(s.alphas, t) * (1 - _at(s.alpha_bars, t)))
    return weight / (2 * p_variance(s, t, variance))

# --- p_θ(x_{t−1} | x_t) ---------------------------------------------------------------------------

class Prediction(NamedTuple):
    """What a network predicts: its target in training, and the x̂_0 that its output stands for."""
    target: Callable[[Schedule, Tensor, Tensor, Tensor, Tensor], Tensor]  # of s, x0, x_t, t, eps
    x0_hat: Callable[[Schedule, Tensor, Tensor, Tensor], Tensor]          # of s, x_t, t, output

PREDICTIONS = {  # to add a prediction, add one entry
    "eps": Prediction(lambda s, x0, x_t, t, eps: eps, predict_x0_from_eps),              # ε
    "x0": Prediction(lambda s, x0, x_t, t, eps: x0, lambda s, x_t, t, out: out),         # §3.2
    "mean": Prediction(lambda s, x0, x_t, t, eps: q_posterior_mean_variance(s, x0, x_t, t).mean,
                       predict_x0_from_mean),                                # μ̃_t, Table 2
}
VARIANCES = ("fixed_large", "fixed_small", "learned")

@dataclass(frozen=True, eq=False)
class Model:
    """p_θ(x_{t−1} | x_t) = N(μ_θ(x_t, t), Σ_θ(x_t, t)) for t = 1 … T.   [DDPM Eq. 1]

    net: the network, net(x_t, t) → (B, …). predict: what it returns, a key of PREDICTIONS.
    variance: "fixed_large" or "fixed_small" (§3.2), or "learned" (Table 2): then the network
    returns twice the channels, and the second half is log σ², one number for each dimension.
    clip: Ho et al.'s code, not the paper: x̂_0 is clamped to [−1, 1] before Eq. 7 is applied.
    ValueError for unknown names. Fewer steps: `replace(model, s=respace(s, 50))`.
    """
    s: Schedule
    net: Network
    predict: str = "eps"
    variance: str = "fixed_large"
    clip: bool = True

    def __post_init__(self):
        for name, known in ((self.predict, PREDICTIONS), (self.variance, VARIANCES)):
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}")

def predict_x0(model: Model, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """x̂_0(x_t) from the output of the network, and log σ² if it is learned.   [DDPM Eq. 15]

    After `respace`, both the network and the formula for x̂_0 use the times of the full schedule.
    """
    full, tau, log_sigma2 = model.s.full or model.s, _from_1(model.s.times, t), None
    out = model.net(x_t, tau)
    if model.variance == "learned":
        out, log_sigma2 = out.chunk(2, dim=1)
        _same(out, log_sigma2)
    _same(x_t, out)
    x0_hat = PREDICTIONS[model.predict].x0_hat(full, x_t, tau, out)
    return (x0_hat.clamp(-1, 1) if model.clip else x0_hat), log_sigma2

class Reverse(NamedTuple):
    """p_θ(x_{t−1} | x_t) of Eq. 1 as a Gaussian, and the x̂_0 from which it was computed."""
    mean: Tensor
    sigma2: Tensor
    x0_hat: Tensor

def p_mean_variance(model: Model, x_t: Tensor, t: Tensor) -> Reverse:
    """p_θ(x_{t−1} | x_t) = N(μ_θ(x_t, t), σ_t² I), with μ_θ = μ̃_t(x_t, x̂_0).   [DDPM Eqs. 1, 11]

    Where nothing is clipped, μ̃_t(x_t, x̂_0) of Eq. 7 is the μ_θ of Eq. 11. ValueError for a
    learned variance after `respace`: the network knows the variance of its own steps only.
    """
    s = model.s
    x0_hat, log_sigma2 = predict_x0(model, x_t, t)
    if log_sigma2 is None:
        sigma2 = _column(p_variance(s, t, model.variance), x_t)
    elif s.full is None:
        sigma2 = log_sigma2.exp()
    else:
        raise ValueError("a learned variance can only be sampled with all its time steps")
    mean = q_posterior_mean_variance(s, x0_hat, x_t, t).mean
    return Reverse(mean, sigma2, x0_hat)

# --- Algorithm 2: sampling ------------------------------------------------------------------------

class State(NamedTuple):
    """The state of a chain at time t. At t = 0 both tensors are the sample x_0."""
    t: int
    x_t: Tensor
    x0_hat: Tensor    # x̂_0(x_t), as `p_mean_variance` returns it

def p_sample(p: Gaussian | Reverse, z: Tensor) -> Tensor:
    """x_{t−1} = μ_θ(x_t, t) + σ_t z.   [DDPM Alg. 2, line 4]"""
    _same(p.mean, z)
    return p.mean + p.sigma2.sqrt().to(p.mean.dtype) * z

def p_sample_loop(model: Model, x_T: Tensor, noise: Callable[[int], Tensor],
                  start: int | None = None) -> Iterator[State]:
    """x_{t−1} = μ_θ(x_t, t) + σ_t z for t = T … 1, with z = 0 at t = 1.   [DDPM Alg. 2]

    x_T: (B, …) ~ N(0, I). noise(t): returns the z ~ N(0, I) of the step from t to t − 1, and is not
    called at t = 1. start: begin at this time instead of T; x_T is then x_start. Yields the states
    at t = T … 0; the last one holds x_0.
    """
    # 1: x_T ~ N(0, I), drawn by the caller
    x_t = x_T
    # 2: for t = T, …, 1 do
    for t in _countdown(model.s.T, start):
        # 3: z ~ N(0, I) if t > 1, else z = 0
        z = noise(t) if t > 1 else torch.zeros_like(x_t)
        # 4: x_{t−1} = (x_t − (1 − α_t)/√(1 − ᾱ_t) ε_θ(x_t, t)) / √α_t + σ_t z, where the first
        #    part is p.mean (Eq. 11, as Eq. 7 with x̂_0)
        p = p_mean_variance(model, x_t, _all(t, x_t))
        yield State(t, x_t, p.x0_hat)
        x_t = p_sample(p, z)
    # 6: return x_0
    yield State(0, x_t, x_t)

# === §3.3  Data scaling, the decoder (Eq. 13) and L_0 =============================================

def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, sigma2: Tensor) -> Tensor:
    """log p_θ(x_0 | x_1) = log ∫_{δ₋(x_0)}^{δ₊(x_0)} N(x; μ, σ²) dx.   [DDPM Eq. 13]

    x0: 8-bit levels k/127.5 − 1 with k = 0 … 255; mean, sigma2: broadcast against x0. Returns
    nats ≤ 0 in float64, one number for each dimension (the log of Eq. 13's product is their sum).
    δ₋ and δ₊ are the ends of the bin x_0 ± 1/255. The bins touch, and the two outermost ones extend
    to ∓∞. So the 256 probabilities sum to 1, and −log₂ of them is the length of a code for 8-bit
    data. Ho et al.'s code approximates Φ, the distribution function of N(0, 1), with a tanh, and
    floors the probability at 10⁻¹²; this does not.
    """
    infinity = 1e30  # a large finite number, because a true ∞ would make gradients NaN
    mean, sigma = _float64(mean), _float64(sigma2).sqrt()
    x0 = ((_float64(x0) + 1) * 127.5).round() / 127.5 - 1  # undoes a rounding to float32
    lower = torch.where(x0 <= -1, -infinity, x0 - 1 / 255)  # in this form NaN stays NaN
    upper = torch.where(x0 >= 1, infinity, x0 + 1 / 255)
    a, b = (lower - mean) / sigma, (upper - mean) / sigma
    # Φ(b) − Φ(a) = Φ(−a) − Φ(−b). Use whichever form lies in the left tail, where log Φ keeps
    # all its digits: log(Φ(b) − Φ(a)) = log Φ(b) + log(1 − exp(log Φ(a) − log Φ(b))).
    right = a + b > 0
    a, b = torch.where(right, -b, a), torch.where(right, -a, b)
    log_a, log_b = _log_cdf(a), _log_cdf(b)
    return log_b + torch.log(-torch.expm1(log_a - log_b))

def _log_cdf(x: Tensor) -> Tensor:
    """log Φ(x), where Φ(x) = erfc(−x/√2)/2 = e^{−x²/2} erfcx(−x/√2)/2.

    The second form is for x < −1: erfcx varies slowly there, so that value and gradient are exact
    (the gradient of `torch.special.log_ndtr` is off by 10⁻⁴ at x = −10⁶). `clamp` keeps each form
    away from where the other one is used, because `torch.where` differentiates both.
    """
    tail, rest = x.clamp(max=-1), x.clamp(min=-1)
    log_tail = (torch.special.erfcx(-tail / math.sqrt(2)) / 2).log() - tail ** 2 / 2
    return torch.where(x < -1, log_tail, torch.log1p(-torch.erfc(rest / math.sqrt(2)) / 2))

def vlb_term(s: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, p: Gaussian | Reverse) -> Tensor:
    """L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)); L_0 at t = 1.   [DDPM Eq. 5]

    x_t ~ q(x_t | x_0); p: p_θ(x_{t−1} | x_t) as `p_mean_variance` returns it; t may differ between
    images. Where t = 1, x0 must lie on the 256 levels of Eq. 13. Returns (B,) nats in float64,
    differentiable with respect to p.
    """
    x0, x_t = _float64(x0), _float64(x_t)
    p = Gaussian(_float64(p.mean), _float64(p.sigma2))
    q = q_posterior_mean_variance(s, x0, x_t, t)
    is_first = _column(t == 1, x0)
    # The KL at t = 1 is not used, but `torch.where` differentiates it, and β̃_1 = 0 would make its
    # gradient NaN. So a 1 replaces it.
    q = Gaussian(q.mean, torch.where(is_first, 1.0, q.sigma2))
    L_0 = -discretized_gaussian_log_likelihood(x0, p.mean, p.sigma2)
    return torch.where(is_first, L_0, normal_kl(q, p)).flatten(1).sum(1)

def bits_per_dim(nats: Tensor, x0: Tensor) -> Tensor:
    """nats / (D ln 2): bits for each dimension of x0 (B, …).   [DDPM Table 1]"""
    return nats / (x0[0].numel() * math.log(2))

# === §3.4  The simplified training objective (Eq. 14) =============================================
#
#     L_simple(θ) = E_{t,x_0,ε}[ ‖ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖² ]                   [Eq. 14]

def loss_simple(model: Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """‖ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖² / D for each image.   [DDPM Eq. 14; Alg. 1, line 5]

    Returns (B,), to be averaged over a batch in which t is uniform on 1 … T. The factor 1/D is the
    released code's; the paper has none. For t > 1 it is Eq. 12 without its weight, which is largest
    at small t. So L_simple gives the errors at small t, where x_t has little noise, less weight
    than the bound does. At t = 1 it approximates L_0 (see PAPER.md). If the network predicts
    x_0 or μ̃_t, that is the target instead of ε (§3.2, Table 2). Algorithm 1 is
    `train.training_step`, which `train.train` repeats.
    """
    x_t = q_sample(model.s, x0, t, eps)
    target = PREDICTIONS[model.predict].target(model.s, x0, x_t, t, eps)
    out = model.net(x_t, _from_1(model.s.times, t))
    _same(target, out)
    return (target - out).square().flatten(1).mean(1)

def loss_vlb(model: Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """L_{t−1} of Eq. 5 (L_0 at t = 1) in bits/dim for each image.   [DDPM Table 2, the objective L]

    Takes and returns what `loss_simple` does; over uniform t its mean is (L − L_T)/T. The L of
    Table 2 has no clipping: `clip` should be False.
    """
    x_t = q_sample(model.s, x0, t, eps)
    p = p_mean_variance(model, x_t, t)
    return bits_per_dim(vlb_term(model.s, x0, x_t, t, p), x0)

# === §4.3  Progressive coding =====================================================================
#
# A sender who knows x_0 transmits x_T, x_{T−1}, …, x_1 and finally x_0 to a receiver who knows only
# the model. Reverse channel coding sends a sample of q in about KL(q ‖ p) nats, on average, to a
# receiver who knows p; the paper assumes such a code. So the messages have the lengths L_T,
# L_{T−1}, …, L_1, and the last one L_0, which makes the code lossless. At each time t the receiver
# has an estimate x̂_0 (Eq. 15).

# --- Algorithm 3: sending -------------------------------------------------------------------------

class Sent(NamedTuple):
    """What the receiver holds at time t, and how much has been sent for it."""
    t: int
    x_t: Tensor
    x0_hat: Tensor  # x̂_0(x_t), the receiver's estimate; x_0 itself at t = 0
    rate: Tensor    # (B,) nats sent so far: L_T + Σ_{u>t} L_{u−1}

def send(model: Model, x0: Tensor, noise: Callable[[int], Tensor]) -> Iterator[Sent]:
    """x_T ~ q(x_T | x_0); x_t ~ q(x_t | x_{t+1}, x_0) for t = T − 1 … 1; x_0.   [DDPM Alg. 3]

    x0: (B, …) on the 256 levels of Eq. 13. noise(t): the noise ~ N(0, I) with which x_t is drawn
    (in `p_sample_loop` it draws x_{t−1}). No bits are produced; their expected length is summed.
    Yields t = T … 0, where the rate at t = 1 is L_T + … + L_1, and at t = 0 the whole of Eq. 5.
    """
    s = model.s
    # 1: send x_T ~ q(x_T | x_0) using p(x_T), for L_T nats
    x = q_sample(s, x0, _all(s.T, x0), noise(s.T))
    rate = prior_kl(s, x0)
    # 2: for t = T − 1, …, 1 do   (here x is x_{t+1})
    for t in range(s.T - 1, 0, -1):
        now = _all(t + 1, x0)
        p = p_mean_variance(model, x, now)
        yield Sent(t + 1, x, p.x0_hat, rate)
        # 3: send x_t ~ q(x_t | x_{t+1}, x_0) using p_θ(x_t | x_{t+1}), for L_t nats
        q = q_posterior_mean_variance(s, x0, x, now)
        rate = rate + vlb_term(s, x0, x, now, p)
        x = p_sample(q, noise(t))
    # 5: send x_0 using p_θ(x_0 | x_1), for L_0 nats   (here x is x_1)
    p = p_mean_variance(model, x, _all(1, x0))
    yield Sent(1, x, p.x0_hat, rate)
    yield Sent(0, x0, x0, rate + vlb_term(s, x0, x, _all(1, x0), p))

# --- Algorithm 4: receiving -----------------------------------------------------------------------

def receive(model: Model, x_T: Tensor,
            decode: Callable[[int, Reverse], Tensor]) -> Iterator[State]:
    """x_t, received using p_θ(x_t | x_{t+1}), for t = T − 1 … 0.   [DDPM Alg. 4]

    x_T: (B, …), received using p(x_T). decode(t, p): the caller's decoder, which returns the x_t
    that was sent, where p is the p_θ(x_t | x_{t+1}) by which it was coded; at t = 0 it returns x_0.
    Yields the states at t = T … 0. extras/compress.py has a decoder of real bits.
    """
    # 1: receive x_T using p(x_T)
    x = x_T
    # 2: for t = T − 1, …, 0 do   (here x is x_{t+1})
    for t in range(model.s.T - 1, -1, -1):
        p = p_mean_variance(model, x, _all(t + 1, x))
        yield State(t + 1, x, p.x0_hat)
        # 3: receive x_t using p_θ(x_t | x_{t+1})
        x = decode(t, p)
        _same(p.mean, x)
    # 5: return x_0
    yield State(0, x, x)

def distortion(x0: Tensor, x0_hat: Tensor) -> Tensor:
    """127.5 √(‖x_0 − x̂_0‖² / D), the root mean square error in pixel values.   [DDPM §4.3]

    Returns (B,). 127.5 converts from [−1, 1] to the pixel values 0 … 255.
    """
    _same(x0, x0_hat)
    return 127.5 * (x0 - x0_hat).square().flatten(1).mean(1).sqrt()

# --- Eq. 16: the bound without x_0 ----------------------------------------------------------------
#
#     L = KL(q(x_T) ‖ p(x_T)) + E Σ_{t≥1} KL(q(x_{t−1}|x_t) ‖ p_θ(x_{t−1}|x_t)) + H(x_0)   [Eq. 16]
#
# where L is the mean over x_0 too. This is Eq. 3 with Bayes' rule applied without x_0 (derived in
# PAPER.md). q(x_{t−1} | x_t) depends on the unknown distribution of the data, so only a test, for
# Gaussian data, computes it.

# === §4.4  Interpolation ==========================================================================

def interpolate(model: Model, x0: Tensor, other: Tensor, lam: Tensor, t: int, eps: Tensor,
                eps_other: Tensor, noise: Callable[[int], Tensor],
                loop: Callable[..., Iterator[State]] = p_sample_loop) -> Iterator[State]:
    """x̄_t = (1 − λ) x_t + λ x'_t, decoded by p_θ from the same t.   [DDPM §4.4]

    lam: (B,), one λ in [0, 1] for each row of the batch; x0, other: (B, …), the two images in each
    row; t: one number, 500 in the paper; eps, eps_other: the noise that encodes them as x_t and
    x'_t (Eq. 4), the same for every λ; loop: Algorithm 2, or `ddim_loop`; noise: as in that loop.
    Yields the states at t, t − 1, …, 0. (The paper prints x_0 and x'_0 for x_t and x'_t.)
    """
    t = _countdown(model.s.T, t)[0]
    x_t = q_sample(model.s, x0, _all(t, x0), eps)
    other_t = q_sample(model.s, other, _all(t, x0), eps_other)
    _same(x_t, other_t)
    mixed = (1 - _like(lam, x0)) * x_t + _like(lam, x0) * other_t
    return loop(model, mixed, noise, start=t)

# === Not in the paper: fewer sampling steps =======================================================

def respace(s: Schedule, times: int | Sequence[int]) -> Schedule:
    """β'_i = 1 − ᾱ_{τ_i} / ᾱ_{τ_{i−1}} for n times τ_1 < … < τ_n = T.   [Nichol, Dhariwal 2021]

    The schedule of a chain with n steps: ᾱ'_i = ᾱ_{τ_i}, so x_{τ_i} has the distribution (Eq. 4) on
    which the network was trained. All functions above work with it, except with a learned variance;
    the network is called with `times[i]` = τ_i. times: the list of the τ, at least two; or their
    number n, and then they are evenly spaced from 1 to T. Otherwise ValueError.
    """
    try:
        times = operator.index(times)
    except TypeError:
        times = [operator.index(tau) for tau in times]
    if times == s.T:
        return s
    if isinstance(times, int):
        if not 2 <= times < s.T:
            raise ValueError(f"{times} sampling steps: choose from 2 to {s.T}, so that t = 1 and "
                             f"t = {s.T} are among them")
        times = torch.linspace(1, s.T, times, dtype=torch.float64).round().long().tolist()
    tau = torch.tensor([0, *times], device=s.times.device)
    if len(tau) < 3 or tau[-1] != s.T or not bool((tau[1:] > tau[:-1]).all()):
        raise ValueError(f"a chain needs two times or more, which rise from 1 or later to T = {s.T}"
                         )
    alpha_bars = s.alpha_bars[tau]
    alphas = torch.cat([alpha_bars[:1], alpha_bars[1:] / alpha_bars[:-1]])
    full = s if s.full is None else s.full
    return Schedule(1 - alphas, alphas, alpha_bars, s.times[tau], full)

def ddim_loop(model: Model, x_T: Tensor, noise: Callable[[int], Tensor],
              start: int | None = None, eta: float = 0.0) -> Iterator[State]:
    """x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1 − ᾱ_{t−1} − σ²) ε̂ + σ z,  σ² = η² β̃_t.   [Song et al. 2021]

    ε̂ is the noise that takes x̂_0 to x_t (Eq. 15 inverted). If x̂_0 were x_0, then x_{t−1} would
    have the distribution of Eq. 4 for every η in [0, 1]. With η = 1 this is Algorithm 2 with
    σ_t² = β̃_t, whose mean is Eq. 7. With η = 0 no noise is added, and x_0 is a function of x_T
    alone. At t = 1 the result is x̂_0. The model's variance is not used. The other arguments
    and the states are those of `p_sample_loop`. ValueError for other η.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"η = {eta}: it lies in [0, 1]")
    s, x_t = model.s, x_T
    for t in _countdown(s.T, start):
        now = _all(t, x_t)
        x0_hat, _ = predict_x0(model, x_t, now)
        yield State(t, x_t, x0_hat)
        eps = predict_eps_from_x0(s, x_t, now, x0_hat)
        z = noise(t) if eta and t > 1 else torch.zeros_like(x_t)
        alpha_bar_before, sigma2 = _at(s.alpha_bars, now - 1), eta ** 2 * _beta_tilde(s, now)
        rest = (1 - alpha_bar_before - sigma2).clamp(min=0)  # rounding may make it −10⁻¹⁷
        _same(x_t, z)
        x_t = (_like(alpha_bar_before.sqrt(), x_t) * x0_hat + _like(rest.sqrt(), x_t) * eps
               + _like(sigma2.sqrt(), x_t) * z)
    yield State(0, x_t, x_t)
