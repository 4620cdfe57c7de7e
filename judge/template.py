"""An implementation for the judge to fill in: python -m judge FILE

Omit what you do not have. Shapes: x0, x_t, eps (B, D), t (B,) int64 in 1 … T; `python -m judge`
prints the rest. NumPy arrays work, too.
"""
import torch


def schedule(betas):
    """β_1 … β_T, a list → whatever the other functions need."""
    betas = torch.tensor(betas, dtype=torch.float64)
    return {"betas": betas, "alpha_bars": (1 - betas).cumprod(0)}


def at(numbers, t):
    """The numbers at the times t, to multiply (B, D)."""
    return numbers[t - 1][:, None]


def q_sample(s, x0, t, eps):
    """Eq. 4 → x_t."""
    alpha_bar = at(s["alpha_bars"], t)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


# def q_posterior(s, x0, x_t, t):               Eqs. 6, 7 → mean, variance
# def predict_x0(s, x_t, t, eps):               Eq. 15 → x̂_0
# def p_mean_variance(s, model, x_t, t):        Eq. 11, σ_t² → mean, variance
# def sample(s, model, x_T, noise):             Algorithm 2 → x_0; noise(t) is z from t to t − 1
# def loss(s, model, x0, t, eps):               Eq. 14 → (B,)
# def log_likelihood(x0, mean, variance):       Eq. 13 → nats
# def kl(mean_q, variance_q, mean_p, variance_p):                       → nats
# def vlb_term(s, model, x0, x_t, t):           Eq. 5, L_{t−1} → (B,) nats
# def respaced(s, times):                       a schedule of τ_1 < … < τ_n = T
# def ddim(s, model, x_T, noise, eta):          → x_0
# def interpolate(s, model, x0, other, lam, t, eps, eps_other, noise):  §4.4 → x_0
