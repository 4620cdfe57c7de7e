"""Computes right answers for the theorems of the judge and of test_ddpm.py."""
import math

import torch
from hypothesis import strategies as st

F64 = torch.float64


def beta_lists(longest: int = 12):
    """Linear ramps, and adversarial lists of any β in [1e-5, 0.999]; T = 1 included."""
    beta = st.floats(1e-5, 0.999)
    ramps = st.builds(lambda a, b, n: [a + (b - a) * i / max(n - 1, 1) for i in range(n)],
                      beta, beta, st.integers(1, longest))
    return ramps | st.lists(beta, min_size=1, max_size=longest)


numbers = st.integers(0, 2 ** 32)  # seeds of tensors: hypothesis draws the case, torch its filling


def randn(seed: int, *shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def at(t: int, n: int = 1) -> torch.Tensor:
    return torch.full((n,), t)


def log_normal(x, mean, variance):
    """log N(x; mean, variance), elementwise."""
    return -0.5 * (math.log(2 * math.pi) + torch.log(variance) + (x - mean) ** 2 / variance)


def mean_of_quadratic(f, mean, variance):
    """E f(X) for X ~ N(m, v) and a quadratic f: the mean of f at the two nodes m ± √v.

    For f = A x² + B x + C it is A (m² + v) + B m + C, since ((m + √v)² + (m − √v)²)/2 = m² + v."""
    return (f(mean + variance ** 0.5) + f(mean - variance ** 0.5)) / 2


def mean_log_ratio(q, p):
    """KL(q ‖ p) = E_q[log q − log p] of Gaussians (mean, variance): the log ratio is quadratic."""
    return mean_of_quadratic(lambda x: log_normal(x, *q) - log_normal(x, *p), *q)


def log_bin(a: float, b: float) -> float:
    """log ∫_a^b N(x; 0, 1) dx by quadrature around the integrand's peak, accurate in any tail."""
    peak = min(max(a, 0.0), b)
    reach = 90 / (abs(peak) + math.sqrt(peak ** 2 + 90))   # beyond it the integrand is e^−45
    low, high = max(a, peak - reach), min(b, peak + reach)
    nodes = [0.1488743389816312, 0.4333953941292472, 0.6794095682990244, 0.8650633666889845,
             0.9739065285171717]                           # Gauss–Legendre, ten points
    weights = [0.2955242247147529, 0.2692667193099963, 0.2190863625159820, 0.1494513491505806,
               0.0666713443086881]
    total, panels = 0.0, 60
    half = (high - low) / panels / 2
    for i in range(panels):
        middle = low + (2 * i + 1) * half
        for node, weight in zip(nodes, weights):
            for x in (middle - half * node, middle + half * node):
                total += weight * half * math.exp(-(x - peak) * (x + peak) / 2)
    return math.log(total) - peak ** 2 / 2 - 0.5 * math.log(2 * math.pi)


def log_bin_of(k: int, mean: float, sigma: float) -> float:
    """Eq. 13 for level k by `log_bin`, its outermost bins open."""
    x = k / 127.5 - 1
    a = -math.inf if k == 0 else (x - 1 / 255 - mean) / sigma
    b = math.inf if k == 255 else (x + 1 / 255 - mean) / sigma
    return log_bin(a, b)
