"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020): the mathematics.

Read it top to bottom beside the paper (arXiv 2006.11239), whose sections and equation numbers
these are. The network is any callable `model(x_t, t)`. Throughout:

    t        (B,) int64 in 1 … T, the paper's time, one for each image of the batch
    x0, x_t  (B, …) floating point; images (B, C, H, W) in [−1, 1]; points (B, 2) work as well
    D        the number of dimensions of one x0
    s        a Schedule: β_t, α_t, ᾱ_t for t = 0 … T in float64, with β_0 = 0 and ᾱ_0 = 1

Distributions are functions of what they condition on; samples are functions of their noise, which
the caller draws. Every `variance` is σ², never σ. Likelihoods are in nats until `bits_per_dim`.

    s = make_schedule()
    loss = loss_simple(s, model, x0, t, torch.randn_like(x0)).mean()            # Algorithm 1
    for t, x_t, x0_hat in p_sample_loop(s, model, x_T, lambda t: torch.randn_like(x_T)):
        ...                                                                     # Algorithm 2
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]


class Gaussian(NamedTuple):
    """N(mean, variance · I), the form of every distribution in Eqs. 1, 2, 4 and 6."""
    mean: Tensor      # (B, …)
    variance: Tensor  # broadcasts against the mean


class Reverse(NamedTuple):
    """p_θ(x_{t−1} | x_t) = N(mean, variance · I) of Eq. 1, with the x̂_0 of Eq. 15 behind it."""
    mean: Tensor
    variance: Tensor
    x0: Tensor


class State(NamedTuple):
    """What the sampler of Algorithm 2 holds at time t; at t = 0 both tensors are the sample."""
    t: int
    x_t: Tensor
    x0: Tensor        # x̂_0(x_t), Eq. 15


# === The noise schedule (§2, §4) ==================================================================

@dataclass(frozen=True, eq=False)
class Schedule:
    """β_t, α_t = 1 − β_t and ᾱ_t = ∏_{s≤t} α_s (§2) for t = 0 … T, each a float64 tensor (T + 1,).

    β_0 = 0 and ᾱ_0 = 1, so `alpha_bars[t − 1]` is right at t = 1 too. `times` is what the network
    is shown: t itself, unless `respace` made this schedule, from `full`.
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
        """The same schedule on `device`; float64 stays, except on Apple's MPS, which has none."""
        real = torch.float32 if torch.device(device).type == "mps" else torch.float64
        tables = [x.to(device, real) for x in (self.betas, self.alphas, self.alpha_bars)]
        return Schedule(*tables, self.times.to(device), self.full and self.full.to(device))


def schedule_from_betas(betas) -> Schedule:
    """ᾱ_t = ∏_{s=1}^{t} (1 − β_s).   [DDPM §2]

    betas: β_1 … β_T, a sequence of numbers in (0, 1). ValueError on anything else.
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.dim() != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError("a schedule needs at least one β, every one of them in (0, 1)")
    betas = torch.cat([betas.new_zeros(1), betas])
    alphas = 1 - betas
    return Schedule(betas, alphas, alphas.cumprod(0), torch.arange(len(betas)))


def make_schedule(T: int = 1000, kind: str = "linear",
                  beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """linear: β_t from 10⁻⁴ to 0.02 in equal steps.   [DDPM §4]

    constant: β_t = beta_end; quadratic: √β_t in equal steps. The ends are meant for T = 1000 and
    are scaled by 1000/T (at most 0.999): unscaled, T = 100 would leave ᾱ_T = 0.36. ValueError if
    ᾱ_T > 10⁻³, for then p(x_T) = N(0, I) is no prior for x_T, or if an argument is out of range.
    """
    if T < 1:
        raise ValueError(f"a schedule needs T ≥ 1 time steps, not {T}")
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"β_start = {beta_start} and β_end = {beta_end} must lie in (0, 1)")
    first, last = (min(beta * 1000 / T, 0.999) for beta in (beta_start, beta_end))
    if kind == "linear":
        betas = torch.linspace(first, last, T, dtype=torch.float64)
    elif kind == "quadratic":
        betas = torch.linspace(first ** 0.5, last ** 0.5, T, dtype=torch.float64) ** 2
    elif kind == "constant":
        betas = torch.full((T,), last, dtype=torch.float64)
    else:
        raise ValueError(f"no schedule is called {kind!r}: linear, quadratic or constant")
    s = schedule_from_betas(betas)
    if s.alpha_bars[T] > 1e-3:
        raise ValueError(f"ᾱ_T = {s.alpha_bars[T]:.3g} exceeds 10⁻³: x_T would still show the "
                         "image. Raise β_end (or β_start), or the number of time steps")
    return s


def respace(s: Schedule, n: int) -> Schedule:
    """β'_i = 1 − ᾱ_{τ_i} / ᾱ_{τ_{i−1}}, for n times τ evenly spaced from τ_1 = 1 to τ_n = T.

    Every α'_1 ⋯ α'_i = ᾱ_{τ_i}, so x_{τ_i} has the distribution of Eq. 4 that the network knows,
    and Algorithm 2 runs unchanged with n network calls, showing it `times[i]` = τ_i. Not in the
    paper: §3's chain with steps left out. ValueError unless 2 ≤ n ≤ T (n = T returns s itself).
    """
    if n == s.T:
        return s
    if not 2 <= n < s.T:
        raise ValueError(f"{n} sampling steps: they must include t = 1 and t = {s.T}, "
                         f"so from 2 to {s.T}")
    tau = torch.linspace(1, s.T, n, dtype=torch.float64).round().long().to(s.times.device)
    tau = torch.cat([tau.new_zeros(1), tau])
    alpha_bars = s.alpha_bars[tau]
    alphas = torch.cat([alpha_bars[:1], alpha_bars[1:] / alpha_bars[:-1]])
    return Schedule(1 - alphas, alphas, alpha_bars, s.times[tau], s.full or s)


def _like(c: Tensor, x: Tensor) -> Tensor:
    """One coefficient an image, c (B,), in the type of x (B, …) and shaped to multiply it."""
    return c.to(x.device).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


# === §2  The forward process: noise is added ======================================================

def q_step(s: Schedule, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = √(1 − β_t) x_{t−1} + √β_t ε ~ q(x_t | x_{t−1}).   [DDPM Eq. 2]

    x: x_{t−1}, (B, …); eps: ε ~ N(0, I), the same shape → x_t. Shrinking by √(1 − β_t) keeps a
    unit variance at one: (1 − β_t) + β_t = 1.
    """
    return _like(s.alphas[t].sqrt(), x) * x + _like(s.betas[t].sqrt(), x) * eps


def q_mean_variance(s: Schedule, x0: Tensor, t: Tensor) -> Gaussian:
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I).   [DDPM Eq. 4]

    Eq. 2 repeated: a mean is multiplied by √α_t, a variance v becomes α_t v + β_t. If it was
    1 − ᾱ_{t−1} it becomes α_t − ᾱ_t + 1 − α_t = 1 − ᾱ_t. t in 0 … T, where t = 0 is x_0 itself.
    """
    alpha_bar = s.alpha_bars[t]
    return Gaussian(_like(alpha_bar.sqrt(), x0) * x0, _like(1 - alpha_bar, x0))


def q_sample(s: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t(x_0, ε) = √ᾱ_t x_0 + √(1 − ᾱ_t) ε: any x_t in one jump.   [DDPM Eq. 4, §3.2]"""
    mean, variance = q_mean_variance(s, x0, t)
    return mean + variance.sqrt() * eps


def q_posterior_mean_variance(s: Schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
    """q(x_{t−1} | x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I).   [DDPM Eqs. 6, 7]

        μ̃_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t) x_0  +  √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) x_t
        β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) β_t

    Bayes' rule: q(x_t | x_{t−1}) q(x_{t−1} | x_0) as a function of x_{t−1}. Precisions add,
    1/β̃_t = α_t/β_t + 1/(1 − ᾱ_{t−1}), and μ̃_t is the mean weighted by them. At t = 1 it is the
    point x_0: β̃_1 = 0.
    """
    beta, alpha, alpha_bar, before = s.betas[t], s.alphas[t], s.alpha_bars[t], s.alpha_bars[t - 1]
    mean = (_like(before.sqrt() * beta / (1 - alpha_bar), x_t) * x0
            + _like(alpha.sqrt() * (1 - before) / (1 - alpha_bar), x_t) * x_t)
    return Gaussian(mean, _like((1 - before) / (1 - alpha_bar) * beta, x_t))


# === §3.2  The reverse process: noise is removed ==================================================

def predict_x0_from_eps(s: Schedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x̂_0 = (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t, Eq. 4 solved for x_0.   [DDPM Eq. 15]"""
    alpha_bar = s.alpha_bars[t]
    return (x_t - _like((1 - alpha_bar).sqrt(), x_t) * eps) / _like(alpha_bar.sqrt(), x_t)


def predict_eps_from_x0(s: Schedule, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """ε = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t), Eq. 4 solved for ε.   [DDPM Eq. 15, backwards]"""
    alpha_bar = s.alpha_bars[t]
    return (x_t - _like(alpha_bar.sqrt(), x_t) * x0) / _like((1 - alpha_bar).sqrt(), x_t)


def predict_x0_from_mean(s: Schedule, x_t: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """The x_0 for which μ̃_t(x_t, x_0) is `mean`.   [DDPM Eq. 7, solved for x_0]"""
    beta, alpha, alpha_bar, before = s.betas[t], s.alphas[t], s.alpha_bars[t], s.alpha_bars[t - 1]
    return ((_like(1 - alpha_bar, x_t) * mean - _like(alpha.sqrt() * (1 - before), x_t) * x_t)
            / _like(before.sqrt() * beta, x_t))


def p_mean_from_eps(s: Schedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """μ_θ(x_t, t) = (x_t − β_t / √(1 − ᾱ_t) ε_θ) / √α_t.   [DDPM Eq. 11]

    Eq. 7 with the x̂_0 of Eq. 15 put in. −ε_θ / √(1 − ᾱ_t) estimates the score ∇ log q(x_t), so
    this is (x_t + β_t · score) / √α_t: with σ_t z added, a step of Langevin dynamics (§3.2).
    """
    factor = s.betas[t] / (1 - s.alpha_bars[t]).sqrt()
    return (x_t - _like(factor, x_t) * eps) / _like(s.alphas[t].sqrt(), x_t)


def p_variance(s: Schedule, t: Tensor, variance: str) -> Tensor:
    """σ_t² = β_t ("fixed_large") or β̃_t ("fixed_small").   [DDPM §3.2]

    → (B,) float64. The two extremes: β_t is optimal for x_0 ~ N(0, I), β̃_t for x_0 a single point.
    Ho et al.'s code, not the paper: β̃_1 = 0 has no logarithm, so σ_1² is β̃_2 in both cases (β_1
    if T = 1). Only L_0 sees it, since the sampler's last step is noiseless.
    """
    if variance not in ("fixed_large", "fixed_small"):
        raise ValueError(f"no fixed variance is called {variance!r}: fixed_large or fixed_small")
    if s.T == 1:
        return s.betas[t]
    u = t.clamp(min=2)
    small = (1 - s.alpha_bars[u - 1]) / (1 - s.alpha_bars[u]) * s.betas[u]
    return small if variance == "fixed_small" else torch.where(t == 1, small, s.betas[t])


def p_mean_variance(s: Schedule, model: Model, x_t: Tensor, t: Tensor, predict: str = "eps",
                    variance: str = "fixed_large", clip: bool = True) -> Reverse:
    """p_θ(x_{t−1} | x_t) = N(μ_θ(x_t, t), σ_t² I).   [DDPM Eqs. 1, 11]

    predict: what the network returns: "eps" for ε_θ (Eq. 11), "x0" for x̂_0 (§3.2), "mean" for μ_θ
    itself (Table 2). variance: "fixed_large", "fixed_small" (`p_variance`) or "learned": then the
    network has twice the channels, and the second half is log σ², a number for each dimension.
    Ho et al.'s code, not the paper: with `clip`, x̂_0 is clipped to [−1, 1] and put into Eq. 7,
    which equals Eq. 11 when nothing clips; a predicted mean stays as it is. ValueError: learned
    variance on a respaced schedule, of whose steps the network knows nothing.
    """
    out = model(x_t, s.times[t])
    if variance == "learned":
        if s.full is not None:
            raise ValueError("a learned variance belongs to its own time steps: sample all of them")
        out, log_variance = out.chunk(2, dim=1)
        sigma2 = log_variance.exp()
    else:
        sigma2 = _like(p_variance(s, t, variance), x_t)

    if predict == "eps":
        x0 = predict_x0_from_eps(s, x_t, t, out)
    elif predict == "x0":
        x0 = out
    elif predict == "mean":  # a mean of the schedule that the network was trained on
        x0 = predict_x0_from_mean(s.full or s, x_t, s.times[t], out)
    else:
        raise ValueError(f"no network predicts {predict!r}: eps, x0 or mean")
    if clip:
        x0 = x0.clamp(-1, 1)

    if predict == "mean" and s.full is None:
        mean = out
    elif predict == "eps" and not clip:
        mean = p_mean_from_eps(s, x_t, t, out)
    else:
        mean = q_posterior_mean_variance(s, x0, x_t, t).mean
    return Reverse(mean, sigma2, x0)


def p_sample(p: Reverse | Gaussian, z: Tensor) -> Tensor:
    """x_{t−1} = μ_θ(x_t, t) + σ_t z.   [DDPM Alg. 2, line 4]"""
    return p.mean + p.variance.sqrt() * z


def reverse_chain(s: Schedule, model: Model, x_t: Tensor, draw: Callable[[State, Reverse], Tensor],
                  start: int | None = None, **choices) -> Iterator[State]:
    """p(x_T) ∏_t p_θ(x_{t−1} | x_t), walked from `start` to 0.   [DDPM Eq. 1; Algs. 2, 3 and 4]

    The one loop of sampler, sender and receiver: at each t the network gives p_θ(x_{t−1} | x_t),
    and `draw(state, p)` → x_{t−1} is a fresh sample, the sender's choice or what the receiver
    decodes. x_t: x_start, start = T unless given; choices: those of `p_mean_variance`. Yields the
    State at t = start … 1, and at t = 0 x_0.
    """
    for t in range(s.T if start is None else start, 0, -1):
        p = p_mean_variance(s, model, x_t, torch.full((len(x_t),), t, device=x_t.device), **choices)
        state = State(t, x_t, p.x0)
        yield state
        x_t = draw(state, p)
    yield State(0, x_t, x_t)


def p_sample_loop(s: Schedule, model: Model, x_T: Tensor, noise: Callable[[int], Tensor],
                  start: int | None = None, **choices) -> Iterator[State]:
    """x_T ~ N(0, I); for t = T … 1: x_{t−1} = μ_θ(x_t, t) + σ_t z, z = 0 at t = 1.   [DDPM Alg. 2]

    noise(t) → z ~ N(0, I), never asked for at t = 1; `start` < T continues from an x_start. Yields
    t, x_t and x̂_0 as `reverse_chain`.
    """
    def draw(state: State, p: Reverse) -> Tensor:
        return p_sample(p, noise(state.t) if state.t > 1 else torch.zeros_like(x_T))
    return reverse_chain(s, model, x_T, draw, start, **choices)


# === §3.3  Data scaling and the discretised decoder ===============================================

def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log ∫_{δ₋(x_0)}^{δ₊(x_0)} N(x; μ, σ²) dx, for each dimension.   [DDPM Eq. 13]

    x0: 8-bit levels k/127.5 − 1, k = 0 … 255; mean, variance: broadcast against it → nats ≤ 0 in
    float64, the shape of x0. The bins δ± = x_0 ± 1/255 meet halfway between levels, and the two
    outermost reach to ∓∞, so the 256 probabilities sum to 1: a codelength for 8-bit data.

    Φ(b) − Φ(a) would lose every digit in a tail. With a < b moved to the left tail by symmetry,
    log(Φ(b) − Φ(a)) = log Φ(b) + log(1 − e^{log Φ(a) − log Φ(b)}) keeps them, and its gradient.
    Ho et al.'s code approximates Φ by a tanh and floors the probability at 10⁻¹²; neither here.
    """
    x0, mean, sigma = _exact(x0), _exact(mean), _exact(variance).sqrt()
    level = ((x0 + 1) * 127.5).round()
    a = ((level - 0.5) / 127.5 - 1 - mean) / sigma
    b = ((level + 0.5) / 127.5 - 1 - mean) / sigma
    flip = a + b > 0
    a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
    log_a, log_b = _log_cdf(a), _log_cdf(b)
    inside = log_b + torch.log(-torch.expm1(log_a - log_b))
    # An edge bin is a whole tail: below b at level 0, above a at level 255, which the flip turned.
    below = torch.where(flip, _log_cdf(-a), log_b)
    above = torch.where(flip, log_b, _log_cdf(-a))
    return torch.where(level <= 0, below, torch.where(level >= 255, above, inside))


def _log_cdf(x: Tensor) -> Tensor:
    """log Φ(x). torch.special.log_ndtr has the same value, but a gradient that is off by 10⁻⁴ in
    tails of a million σ; here −x²/2 stands apart, and erfcx(x) = e^{x²} erfc(x) varies slowly."""
    tail = x.clamp(max=-1)
    far = (torch.special.erfcx(-tail / math.sqrt(2)) / 2).log() - tail ** 2 / 2
    return torch.where(x < -1, far, torch.log1p(-torch.erfc(x.clamp(min=-1) / math.sqrt(2)) / 2))


def _exact(x: Tensor) -> Tensor:
    """x in float64: bounds sum over thousands of dimensions. MPS has none: there on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


# ==================================================================================================
# §2, §3.1–3.4  The variational bound, and the loss that is trained
#
# −log p_θ(x_0) ≤ E_q[−log p_θ(x_{0:T}) / q(x_{1:T} | x_0)], Jensen's inequality: the ELBO of a VAE
# whose encoder q is fixed and whose latents x_1 … x_T have the size of the data (Eq. 3). Divided
# as it stands, step t would compare p_θ(x_{t−1} | x_t) with q(x_t | x_{t−1}), which points the
# other way. Given x_0 Bayes' rule turns it round, q(x_t | x_{t−1}) = q(x_{t−1} | x_t, x_0)
# q(x_t | x_0) / q(x_{t−1} | x_0), and the last two factors telescope over t = 2 … T. At t = 1 there
# is nothing to turn round, x_0 being given; that factor is the decoder. What is left (Eq. 5):
#
#     L = L_T + Σ_{t=2}^{T} L_{t−1} + L_0
#     L_T = KL(q(x_T | x_0) ‖ N(0, I))                           `prior_kl`
#     L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t))   `vlb_term`
#     L_0 = −log p_θ(x_0 | x_1)                                  `vlb_term` at t = 1
# ==================================================================================================

def normal_kl(q: Gaussian | Reverse, p: Gaussian | Reverse) -> Tensor:
    """KL(q ‖ p) = ½ (log σ_p²/σ_q² + (σ_q² + (μ_q − μ_p)²)/σ_p² − 1), for each dimension.   [Eq. 5]

    E_q[log q − log p], where E_q(x − μ_p)² = σ_q² + (μ_q − μ_p)². Variances > 0 → nats.
    """
    return 0.5 * ((p.variance / q.variance).log()
                  + (q.variance + (q.mean - p.mean) ** 2) / p.variance - 1)


def prior_kl(s: Schedule, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)).   [DDPM Eq. 5, §3.1]

    x0: (B, …) → (B,) nats, float64. No parameter is in it, so training leaves it out.
    """
    x0 = _exact(x0)
    q = q_mean_variance(s, x0, torch.full((len(x0),), s.T, device=s.betas.device))
    return _sum(normal_kl(q, Gaussian(torch.zeros_like(x0), torch.ones_like(q.variance))))


def vlb_term(s: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, p: Reverse | Gaussian) -> Tensor:
    """L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)), and L_0 at t = 1.   [DDPM Eq. 5]

    p: p_θ(x_{t−1} | x_t) of `p_mean_variance`; L_0 = −log p_θ(x_0 | x_1) is Eq. 13's, so x0 must
    be 8-bit images where t = 1 → (B,) nats, float64. With a fixed σ_t² the KL is
    ‖μ̃_t − μ_θ‖² / (2σ_t²) + C (Eq. 8). Differentiable in p.
    """
    x0, x_t = _exact(x0), _exact(x_t)
    p = Gaussian(_exact(p.mean), _exact(p.variance))
    first = _like(t, x0) == 1
    q = q_posterior_mean_variance(s, x0, x_t, t)
    q = q._replace(variance=torch.where(first, 1.0, q.variance))  # β̃_1 = 0: no KL is taken there
    decoder = discretized_gaussian_log_likelihood(x0, *p)
    return _sum(torch.where(first, -decoder, normal_kl(q, p)))


def vlb_weight(s: Schedule, t: Tensor, variance: str = "fixed_large") -> Tensor:
    """β_t² / (2 σ_t² α_t (1 − ᾱ_t)), which multiplies ‖ε − ε_θ‖² in L_{t−1}.   [DDPM Eq. 12]

    → (B,) float64. Eqs. 9–11: with x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε both μ̃_t and μ_θ are
    (x_t − β_t/√(1 − ᾱ_t) · noise)/√α_t, the one with ε and the other with ε_θ, so Eq. 8's
    ‖μ̃_t − μ_θ‖² is β_t²/(α_t (1 − ᾱ_t)) ‖ε − ε_θ‖²: denoising score matching at T noise levels.
    """
    weight = s.betas[t] ** 2 / (s.alphas[t] * (1 - s.alpha_bars[t]))
    return weight / (2 * p_variance(s, t, variance))


def loss_simple(s: Schedule, model: Model, x0: Tensor, t: Tensor, eps: Tensor,
                predict: str = "eps") -> Tensor:
    """L_simple = ‖ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖² / D.   [DDPM Eq. 14; Alg. 1, line 5]

    → (B,), the mean over dimensions, to be averaged over a batch with t uniform in 1 … T. It is
    Eq. 12 without its weight, which is largest at small t: there, where the image is barely noisy,
    an error counts for less than in the bound. At t = 1 it stands for L_0 with the bin's integral
    replaced by density times width, and σ_1² and the edges ignored (§3.4). predict = "x0" compares
    with x_0 in ε's place, "mean" with μ̃_t (Table 2's ‖μ̃ − μ̃_θ‖²).
    """
    x_t = q_sample(s, x0, t, eps)
    targets = {"eps": lambda: eps, "x0": lambda: x0,
               "mean": lambda: q_posterior_mean_variance(s, x0, x_t, t).mean}
    if predict not in targets:
        raise ValueError(f"no network predicts {predict!r}: eps, x0 or mean")
    return (targets[predict]() - model(x_t, s.times[t])).square().flatten(1).mean(1)


def bits_per_dim(nats: Tensor, x0: Tensor) -> Tensor:
    """nats / (D ln 2): the codelength in bits for each dimension of x0 (B, …).   [DDPM Table 1]"""
    return nats / (x0[0].numel() * math.log(2))


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)  # (B, …) → (B,)


# === §4.3  Progressive coding: rate and distortion ================================================

class Coded(NamedTuple):
    """Time t of the transmission: what the receiver holds, and what has been paid for it."""
    t: int
    x_t: Tensor
    x0: Tensor      # x̂_0(x_t), the receiver's estimate; x_0 itself at t = 0
    rate: Tensor    # (B,) nats sent so far: L_T + Σ_{s>t} L_{s−1}


class Bound(NamedTuple):
    """The three parts of Eq. 5, (B,) nats each; their sum bounds −log p_θ(x_0)."""
    L_T: Tensor
    L_t: Tensor   # Σ_{t=2}^{T} L_{t−1}
    L_0: Tensor


def progressive_coding(s: Schedule, model: Model, x0: Tensor, noise: Callable[[int], Tensor],
                       **choices) -> Iterator[Coded]:
    """Send x_T, then x_{T−1}, …, x_1, then x_0, each by the code of p_θ.   [DDPM Algs. 3, 4]

    The sender picks x_T ~ q(x_T | x_0), then x_{t−1} ~ q(x_{t−1} | x_t, x_0), with noise(t) for
    x_t; picking from q and coding with p costs KL(q ‖ p). The receiver runs the same
    `reverse_chain`, its `draw` decoding x_{t−1}, and so sees the same x̂_0. x0: 8-bit images. It
    yields t = T … 0: the rate at t = 1 is L_T + … + L_1, and sending x_0 adds L_0 (Eq. 5).
    """
    rate, t_T = prior_kl(s, x0), torch.full((len(x0),), s.T, device=x0.device)

    def draw(state: State, p: Reverse) -> Tensor:
        nonlocal rate
        t = torch.full_like(t_T, state.t)
        rate = rate + vlb_term(s, x0, state.x_t, t, p)
        if state.t == 1:
            return x0
        return p_sample(q_posterior_mean_variance(s, x0, state.x_t, t), noise(state.t - 1))

    x_T = q_sample(s, x0, t_T, noise(s.T))
    for state in reverse_chain(s, model, x_T, draw, **choices):
        yield Coded(*state, rate)


def variational_bound(s: Schedule, model: Model, x0: Tensor, noise: Callable[[int], Tensor],
                      **choices) -> Bound:
    """L = L_T + Σ_{t=2}^{T} L_{t−1} + L_0, with one draw of x_t for each t.   [DDPM Eq. 5]

    Arguments as in `progressive_coding`. In expectation sum(bound) ≥ −log p_θ(x_0) (Eq. 3).
    """
    rates = {c.t: c.rate for c in progressive_coding(s, model, x0, noise, **choices)}
    return Bound(rates[s.T], rates[1] - rates[s.T], rates[0] - rates[1])


def distortion(x0: Tensor, estimate: Tensor) -> Tensor:
    """127.5 √(‖x_0 − x̂_0‖² / D), the RMSE in pixel values of 0 … 255.   [DDPM §4.3]  → (B,)"""
    return 127.5 * (x0 - estimate).square().flatten(1).mean(1).sqrt()


# === §4.4  Interpolation ==========================================================================

def interpolate(s: Schedule, model: Model, x0: Tensor, other: Tensor, lam: Tensor, t: int,
                eps: Tensor, eps_other: Tensor, noise: Callable[[int], Tensor],
                **choices) -> Iterator[State]:
    """x̄_t = (1 − λ) x_t + λ x'_t, decoded by p_θ from that same t.   [DDPM §4.4]

    x0, other: (B, …); lam: (B,) in [0, 1]; eps, eps_other: the noise that encodes them by Eq. 4,
    the same for every λ of a row. Yields the states of `p_sample_loop` from t on.
    """
    at_t, lam = torch.full((len(x0),), t, device=x0.device), _like(lam, x0)
    mixed = (1 - lam) * q_sample(s, x0, at_t, eps) + lam * q_sample(s, other, at_t, eps_other)
    return p_sample_loop(s, model, mixed, noise, start=t, **choices)
