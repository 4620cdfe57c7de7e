"""The paper's statements, in its order, as theorems about any implementation.

A theorem knows nothing about the implementation: its right-hand sides derive from β and Eq. 2. A
legitimate choice (either σ_t², clipping or not, mean or sum) is detected and reported. `wrong` maps
easy mistakes to what they give.
"""
import math

import hypothesis
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from .reference import F64, at, beta_lists, log_bin, log_bin_of, log_normal, mean_log_ratio, numbers, randn


class Law:
    """What Eq. 2 implies: x_t = a_t x_0 + N(0, v_t), and x_t = c_t x_{t−1} + N(0, β_t)."""

    def __init__(self, betas):
        a, v = [1.0], [0.0]
        for beta in betas:
            a.append(a[-1] * math.sqrt(1 - beta))
            v.append((1 - beta) * v[-1] + beta)
        self.beta, self.a, self.v = (torch.tensor(x, dtype=F64)[:, None] for x in ([0, *betas], a, v))
        self.c, self.T, self.betas = (1 - self.beta).sqrt(), len(betas), list(betas)

    def at(self, t) -> tuple:
        """a_t and √v_t, a row per time."""
        return self.a[t], self.v[t].sqrt()

    def posterior(self, t, x0, x_t) -> tuple:
        """Mean and variance of x_{t−1} given x_0 and x_t, by conditioning their joint Gaussian."""
        total = self.c[t] ** 2 * self.v[t - 1] + self.beta[t]
        gain, mean = self.c[t] * self.v[t - 1] / total, self.a[t - 1] * x0
        return mean + gain * (x_t - self.c[t] * mean), self.v[t - 1] * self.beta[t] / total

    def eq11(self, t, x_t, eps):
        """μ_θ of Eq. 11."""
        return (x_t - self.beta[t] / self.v[t].sqrt() * eps) / self.c[t]

    def step(self, t, x_t, eps, z, clip, large, last=False, power=0.5):
        """x_{t−1} of Algorithm 2. Mistakes: `last` adds noise at t = 1, power = 1 takes σ² for σ."""
        x0 = (x_t - self.v[t].sqrt() * eps) / self.a[t]
        mean, small = self.posterior(t, x0.clamp(-1, 1) if clip else x0, x_t)
        sigma2 = self.beta[t] if large else small
        return mean + (sigma2 ** power * z if t > 1 or last else 0)

    def walk(self, model, x, z, clip, large, first=None, until=1, times=None, **mistake):
        """Algorithm 2 from t = first (default: T) to `until`; the network is given times[t]."""
        for t in range(first or self.T, until - 1, -1):
            now = torch.full((len(x),), t if times is None else times[t])
            x = self.step(t, x, model(x, now), z[t], clip, large, **mistake)
        return x


def linear(x, t):
    """A network whose output depends on t."""
    return 0.4 * x + 0.05 + 0.01 * t.to(x.dtype)[:, None]


CLEAR = [0.11, 0.23, 0.17, 0.31, 0.26]  # β with which every mistake shows
TWICE = {(clip, large): f"x̂_0 {'clipped' if clip else 'not clipped'}, σ_t² = {'β_t' if large else 'β̃_t'}"
         for clip in (True, False) for large in (True, False)}


THEOREMS: dict = {}  # name → a function of a judge, whose docstring is the statement


def theorem(*strategies, clear=(), examples=50):
    """A theorem for a clear case and then for drawn β; the judge is its first argument."""
    settings = hypothesis.settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])

    def decorate(test):
        drawn = given(beta_lists(8), numbers, *strategies)(settings(test))
        THEOREMS[test.__name__] = example(CLEAR, 7, *clear)(drawn)
        return THEOREMS[test.__name__]
    return decorate


def rows(law, seed, n=5):
    """Times 1 … T, one per row, x_0 in [−1, 1], and ε."""
    t = torch.arange(1, law.T + 1)
    return t, randn(seed, law.T, n).clamp(-1, 1), randn(seed + 1, law.T, n)


def worst(law, t) -> float:
    """min(β_t, α_t, 1 − ᾱ_{t−1}): the conditioning of float32 tables at t."""
    before = [x.item() for x in law.v[t - 1].flatten() if x > 0]
    return min(law.beta[t].min().item(), 1 - law.beta[t].max().item(), *before, 1.0)


@theorem()
def eq04_the_jump_is_iterated_steps(judge, betas, seed):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I)"""
    law, their = Law(betas), judge.offered("schedule", "q_sample")
    t, x0, eps = rows(law, seed)
    got = their.q_sample(their.schedule(betas), x0, t, eps)
    judge.same(got, *jumps(law, t, x0, eps), worst(law, t))


def jumps(law, t, x0, eps) -> tuple:
    """x_t of Eq. 4, and what mistakes give instead."""
    (a, sd), later, T = law.at(t), (t + 1).clamp(max=law.T), torch.full_like(t, law.T)
    beta = law.beta[t]
    return a * x0 + sd * eps, {
        "1 − ᾱ_t instead of its root": a * x0 + sd ** 2 * eps,
        "ᾱ_t instead of its root": a ** 2 * x0 + sd * eps,
        "β_t instead of 1 − ᾱ_t": (1 - beta).sqrt() * x0 + beta.sqrt() * eps,
        "√β_t instead of √(1 − ᾱ_t)": a * x0 + beta.sqrt() * eps,
        "ᾱ_{t−1} instead of ᾱ_t": law.a[t - 1] * x0 + law.v[t - 1].sqrt() * eps,
        "ᾱ_{t+1} instead of ᾱ_t": law.a[later] * x0 + law.v[later].sqrt() * eps,
        "ᾱ_t as a product up to T": law.a[T] * x0 + law.v[T].sqrt() * eps,
        "α_t and β_t exchanged": sd * x0 + a * eps}


@theorem()
def eq07_posterior_mean(judge, betas, seed):
    """μ̃_t(x_t, x_0), the mean of q(x_{t−1} | x_t, x_0), by Bayes' rule"""
    law, their = Law(betas), judge.offered("schedule", "q_posterior")
    t, x0, x_t = rows(law, seed)
    got, _ = their.q_posterior(their.schedule(betas), x0, x_t, t)
    beta, c, a, v, b, w = law.beta[t], law.c[t], law.a[t], law.v[t], law.a[t - 1], law.v[t - 1]
    judge.same(got, law.posterior(t, x0, x_t)[0], {
        "√ᾱ_t instead of √ᾱ_{t−1}": a * beta / v * x0 + c * w / v * x_t,
        "√ᾱ_t instead of √α_t": b * beta / v * x0 + a * w / v * x_t,
        "1 − ᾱ_t instead of 1 − ᾱ_{t−1}": b * beta / v * x0 + c * x_t,
        "x_0 and x_t exchanged": b * beta / v * x_t + c * w / v * x0,
        "α_t instead of √α_t": b * beta / v * x0 + c ** 2 * w / v * x_t}, worst(law, t))


@theorem()
def eq07_posterior_variance(judge, betas, seed):
    """β̃_t = (1 − ᾱ_{t−1})/(1 − ᾱ_t) β_t, the variance of q(x_{t−1} | x_t, x_0), t > 1"""
    law, their = Law(betas), judge.offered("schedule", "q_posterior")
    t, x0, x_t = rows(law, seed)
    got = column(their.q_posterior(their.schedule(betas), x0, x_t, t)[1], x0)[1:]
    want, t = law.posterior(t, x0, x_t)[1].expand_as(x0)[1:], t[1:]
    judge.same(got, want, {
        "β_t instead of β̃_t": law.beta[t].expand_as(want), "a deviation, not a variance": want.sqrt(),
        "log β̃_t, not β̃_t": want.log(),
        "the quotient turned round": (law.v[t] / law.v[t - 1] * law.beta[t]).expand_as(want)},
        worst(law, t) if len(t) else 1)


def column(variance, x):
    """A variance per row or per element, expanded to the shape of x."""
    variance = torch.as_tensor(variance, dtype=F64)
    return (variance[:, None] if variance.dim() == 1 and len(variance) == len(x) else variance).expand_as(x)


@theorem()
def eq15_inverts_the_jump(judge, betas, seed):
    """x̂_0 = (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t"""
    law, their = Law(betas), judge.offered("schedule", "predict_x0")
    t, x0, eps = rows(law, seed)
    (a, sd), x_t = law.at(t), jumps(law, t, x0, eps)[0]
    assume(a.min() > 1e-3)
    got = their.predict_x0(their.schedule(betas), x_t, t, eps)
    judge.same(got, x0, {
        "divided by ᾱ_t, not by its root": (x_t - sd * eps) / a ** 2, "not divided by √ᾱ_t": x_t - sd * eps,
        "1 − ᾱ_t instead of its root": (x_t - sd ** 2 * eps) / a,
        "clipped": x0.clamp(-1, 1) + 0 * x_t}, worst(law, t) * a.min().item(), floor=1e-9 / a.min().item())


@theorem()
def eq11_the_mean(judge, betas, seed):
    """μ_θ(x_t, t) = (x_t − β_t/√(1 − ᾱ_t) ε_θ(x_t, t)) / √α_t, where nothing needs clipping"""
    law, their = Law(betas), judge.offered("schedule", "p_mean_variance")
    t, x0, x_t = rows(law, seed)
    (a, sd), shown, beta, c = law.at(t), [], law.beta[t], law.c[t]
    assume(a.min() > 1e-3)
    eps = (x_t - a * 0.9 * x0) / sd
    got, _ = their.p_mean_variance(their.schedule(betas), lambda x, u: shown.append((x, u)) or eps, x_t, t)
    wrong = {"√ᾱ_t instead of √α_t": (x_t - beta / sd * eps) / a,
             "β_t/(1 − ᾱ_t), without the root": (x_t - beta / sd ** 2 * eps) / c,
             "1/α_t instead of 1/√α_t": (x_t - beta / sd * eps) / c ** 2,
             "ᾱ_t instead of α_t": (x_t - sd ** 2 / sd * eps) / a,
             "x̂_0 instead of μ_θ": 0.9 * x0, "√β_t instead of β_t": (x_t - beta.sqrt() / sd * eps) / c}
    judge.same(shown[0][1], t, {"the network is shown t − 1": t - 1})
    judge.same(shown[0][0], x_t, {})
    judge.same(got, law.eq11(t, x_t, eps), wrong, worst(law, t) * a.min().item(), 1e-9 / a.min().item())


@theorem()
def sec32_clipping_comes_before_the_mean(judge, betas, seed):
    """If x̂_0 is clipped, then before the mean is taken: μ_θ is μ̃_t(x_t, clipped x̂_0), or Eq. 11"""
    law, their = Law(betas), judge.offered("schedule", "p_mean_variance")
    t, x0, x_t = rows(law, seed)
    (a, sd), far = law.at(t), 3 * x0
    assume(a.min() > 1e-3 and far.abs().max() > 1.1)
    eps = (x_t - a * far) / sd
    got, _ = their.p_mean_variance(their.schedule(betas), lambda x, u: eps, x_t, t)
    plain, clipped = law.eq11(t, x_t, eps), law.posterior(t, far.clamp(-1, 1), x_t)[0]
    judge.choice(got, {"x̂_0 clipped": clipped, "x̂_0 not clipped": plain}, {
        "clipped after the mean was taken": plain.clamp(-1, 1), "x_t clipped": law.eq11(t, x_t.clamp(-1, 1), eps)},
        worst(law, t) * a.min().item(), 1e-8 / a.min().item())


@theorem()
def sec32_the_variance(judge, betas, seed):
    """σ_t² is β_t or β̃_t at every t > 1"""
    law, their = Law(betas), judge.offered("schedule", "p_mean_variance")
    t, x0, x_t = rows(law, seed)
    got = their.p_mean_variance(their.schedule(betas), linear, x_t, t)[1]
    got, small, t = column(got, x_t)[1:], law.posterior(t, x0, x_t)[1].expand_as(x0)[1:], t[1:]
    large = law.beta[t].expand_as(small)
    judge.choice(got, {"σ_t² = β_t": large, "σ_t² = β̃_t": small}, {
        "a deviation, not a variance (β_t)": large.sqrt(), "a deviation, not a variance (β̃_t)": small.sqrt(),
        "log σ_t², not σ_t²": small.log(), "log β_t, not β_t": large.log(), "σ_t⁴": large ** 2},
        worst(law, t) if len(t) else 1)


@theorem(examples=30)
def alg2_sampling(judge, betas, seed):
    """x_{t−1} = μ_θ(x_t, t) + σ_t z for t = T … 1, with z = 0 at t = 1"""
    law, their, (n, m) = Law(betas), judge.offered("schedule", "sample"), (3, 5)
    assume(law.a[-1] > 1e-2)
    x, z, shown = randn(seed, n, m), {t: randn(seed + t, n, m) for t in range(law.T + 1)}, []
    got = their.sample(their.schedule(betas), lambda x, t: shown.append(t[0].item()) or linear(x, t), x, z.get)
    chains(judge, law, x, z, got, shown)


def chains(judge, law, x, z, got, shown, times=None, full=None) -> None:
    """Compares with Algorithm 2 by hand, for every legitimate choice and every mistake."""
    times = list(range(law.T + 1)) if times is None else times
    judge.same(shown, times[:0:-1], {
        "the network is shown t − 1": [t - 1 for t in times[:0:-1]], "a loop that ends at t = 2": times[:1:-1],
        "a loop that begins at T − 1": times[-2:0:-1], "the network is shown i instead of τ_i":
        list(range(law.T, 0, -1)), "the network is shown T − t": [law.T - t for t in range(law.T, 0, -1)]})

    def walks(law=law, model=linear, noise=z, times=times, **mistake):
        return {name: law.walk(model, x, noise, *choice, times=times, **mistake)
                for choice, name in TWICE.items()}
    early = {t: z[t - 1] for t in range(1, law.T + 1)}
    wrong = {"noise at the last step": walks(last=True), "σ_t² z instead of σ_t z": walks(power=1.0),
             "a loop that ends at t = 2": walks(until=2), "no noise at all": walks(noise={t: 0 * x for t in z}),
             "the z of another time": walks(noise=early),
             "the network is shown t − 1": walks(model=lambda x, t: linear(x, t - 1))}
    if law.T > 1:
        wrong["a loop that begins at T − 1"] = walks(first=law.T - 1)
    if full is not None:
        kept = Law(law.betas)
        kept.beta, kept.c = full.beta[times], full.c[times]
        wrong["β_t of the full schedule with skipped steps"] = walks(law=kept)
        wrong["ᾱ not of the τ_i, but a product of their β"] = walks(law=Law(
            [full.betas[t - 1] for t in times[1:]]))
        wrong["the network is shown i instead of τ_i"] = walks(times=list(range(law.T + 1)))
        wrong["a step to τ_i − 1 instead of τ_{i−1}"] = single = {}
        for choice, name in TWICE.items():
            single[name] = x
            for i in range(law.T, 0, -1):
                eps = linear(single[name], torch.full((len(x),), times[i]))
                single[name] = full.step(times[i], single[name], eps, z[i], *choice)
    judge.choice(got, walks(), {f"{name} ({choice})": value for name, values in wrong.items()
                                for choice, value in values.items()},
                 worst(law, torch.arange(1, law.T + 1)) * law.a[-1].item(), 1e-9 / law.a[-1].item())


@theorem()
def eq14_the_loss(judge, betas, seed):
    """‖ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖² for each image, a mean or a sum over dimensions"""
    law, their, shown = Law(betas), judge.offered("schedule", "loss"), []
    t, x0, eps = rows(law, seed)
    error = randn(seed + 2, *x0.shape)
    got = their.loss(their.schedule(betas), lambda x, u: shown.append((x, u)) or eps + error, x0, t, eps)
    judge.same(shown[0][1], t, {"the network is shown t − 1": t - 1})
    judge.same(shown[0][0], *jumps(law, t, x0, eps), worst(law, t))
    square, other = error ** 2, (x0 - eps - error) ** 2
    judge.choice(got, {"mean over dimensions": square.mean(1), "sum over dimensions": square.sum(1)}, {
        "x_0 as the target": other.mean(1), "x_0 as the target (sum)": other.sum(1),
        "absolute values, not squares": error.abs().mean(1), "averaged over the batch": square.mean().expand(len(t)),
        "half of the square": square.mean(1) / 2, "the root of the mean": square.mean(1).sqrt()}, worst(law, t))


@theorem(st.floats(-0.9, 0.9), st.floats(0.01, 0.5), clear=(0.31, 0.07), examples=20)
def eq13_each_bin_is_an_integral(judge, betas, seed, mean, sigma):
    """log ∫ N(x; μ, σ²) dx over x_0 ± 1/255, for ordinary levels and means"""
    their = judge.offered("log_likelihood")
    near = min(max(round((mean + 1) * 127.5), 4), 251)
    k = torch.tensor([[near - 3, near, near + 3]])
    decoded(judge, their, k, mean, sigma)


@theorem(st.floats(-1, 1), st.floats(0.02, 0.5), clear=(-0.97, 0.03), examples=20)
def eq13_the_outermost_bins_are_open(judge, betas, seed, mean, sigma):
    """the bins of −1 and 1 reach to ∓∞, so that the 256 probabilities sum to 1"""
    their, x = judge.offered("log_likelihood"), torch.tensor([[0], [255]])
    for k, mu in ((x[:1], -1 + 0.1 * mean), (x[1:], 1 + 0.1 * mean)):
        decoded(judge, their, k, mu, sigma)


def decoded(judge, their, k, mean, sigma) -> None:
    """Compares with Eq. 13 by quadrature and with mistakes, per dimension or summed."""
    x0 = k.to(F64) / 127.5 - 1
    got = their.log_likelihood(x0, torch.full_like(x0, mean), torch.full_like(x0, sigma ** 2))

    def by(f):
        return torch.tensor([[f(int(level)) for level in row] for row in k], dtype=F64)

    def bins(width, sigma=sigma, edges=True):
        def one(n):
            x, inf = n / 127.5 - 1, math.inf
            return log_bin(-inf if edges and n == 0 else (x - width - mean) / sigma,
                           inf if edges and n == 255 else (x + width - mean) / sigma)
        return one
    wrong = {"finite outermost bins": by(bins(1 / 255, edges=False)), "bins twice too wide": by(bins(2 / 255)),
             "bins half as wide": by(bins(1 / 510)), "density × bin width":
             log_normal(x0, mean, torch.tensor(sigma ** 2, dtype=F64)) + math.log(2 / 255),
             "a density, not a probability": log_normal(x0, mean, torch.tensor(sigma ** 2, dtype=F64)),
             "σ² taken for σ": by(bins(1 / 255, sigma ** 2)) if sigma > 0.02 else x0, "√σ taken for σ":
             by(bins(1 / 255, sigma ** 0.5))}
    right = by(lambda n: log_bin_of(n, mean, sigma))
    wrong |= {"the minus sign": -right, "a probability, not its logarithm": right.exp(),
              "in bits": right / math.log(2)}
    wrong |= {f"{name} (sum)": value.sum(1) for name, value in wrong.items()}
    judge.choice(got, {"one number a dimension": right, "sum over dimensions": right.sum(1)}, wrong, 1e-3, 1e-9)


@theorem(st.floats(0.1, 3), st.floats(0.1, 3), clear=(0.4, 1.7))
def eq05_kl_is_the_mean_log_ratio(judge, betas, seed, v, w):
    """KL(q ‖ p) of two Gaussians"""
    their, (m, n) = judge.offered("kl"), randn(seed, 2, 1, 4)
    q, p = (m, torch.full_like(m, v)), (n, torch.full_like(n, w))
    right = mean_log_ratio(q, p)
    wrong = {"KL(p ‖ q)": mean_log_ratio(p, q), "without ½": 2 * right, "without −1": right + 0.5,
             "in bits": right / math.log(2), "σ taken for σ²": mean_log_ratio((m, q[1] ** 2), (n, p[1] ** 2))}
    wrong |= {f"{name} (sum)": value.sum(1) for name, value in wrong.items()}
    judge.choice(their.kl(*q, *p), {"one number a dimension": right, "sum over dimensions": right.sum(1)}, wrong)


@theorem()
def eq05_terms_of_the_bound(judge, betas, seed):
    """L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)) in nats, summed over dimensions, t > 1"""
    law, their = Law(betas), judge.offered("schedule", "vlb_term")
    t, x0, x_t = rows(law, seed)
    assume(law.T > 1 and law.a[-1] > 1e-2)
    got = their.vlb_term(their.schedule(betas), linear, (x0 * 127.5).round() / 127.5, x_t, t)[1:]
    x0, x_t, t = ((x0 * 127.5).round() / 127.5)[1:], x_t[1:], t[1:]
    q, eps = law.posterior(t, x0, x_t), linear(x_t, t)
    right, wrong = {}, {}
    for (clip, large), name in TWICE.items():
        x0_hat = (x_t - law.v[t].sqrt() * eps) / law.a[t]
        mean = law.posterior(t, x0_hat.clamp(-1, 1) if clip else x0_hat, x_t)[0]
        p = (mean, (law.beta[t] if large else q[1]).expand_as(mean))
        kl = mean_log_ratio((q[0], q[1].expand_as(mean)), p)
        right[name] = kl.sum(1)
        wrong |= {f"averaged over dimensions ({name})": kl.mean(1), f"in bits ({name})": kl.sum(1) / math.log(2),
                  f"KL(p ‖ q) ({name})": mean_log_ratio(p, (q[0], q[1].expand_as(mean))).sum(1),
                  f"in bits/dim ({name})": kl.mean(1) / math.log(2)}
    judge.choice(got, right, wrong, worst(law, t) * law.a[-1].item(), 1e-8 / law.a[-1].item() ** 2)


@theorem(clear=(), examples=10)
def eq05_the_last_term(judge, betas, seed):
    """L_0 = −log p_θ(x_0 | x_1), Eq. 13 summed over dimensions in nats, with σ_1² = β_1 or β̃_2"""
    law, their = Law(betas), judge.offered("schedule", "vlb_term")
    k = torch.randint(2, 254, (2, 3), generator=torch.Generator().manual_seed(seed))
    x0, t, sd = k.to(F64) / 127.5 - 1, at(1, 2), law.v[1].sqrt()
    x_1 = law.a[1] * x0 + sd * randn(seed + 1, 2, 3)
    near = 0.9 * x_1.tanh()                                      # x̂_0, unchanged by clipping
    got = their.vlb_term(their.schedule(betas), lambda x, u: (x - law.a[1] * 0.9 * x.tanh()) / sd, x0, x_1, t)
    right = {}
    for name, sigma2 in (("σ_1² = β_1", betas[0]), ("σ_1² = β̃_2", betas[0] if law.T == 1 else
                                                    law.posterior(at(2), x0[:1], x0[:1])[1].item())):
        right[name] = -torch.tensor([sum(log_bin_of(int(n), mean.item(), sigma2 ** 0.5) for n, mean in zip(
            *row)) for row in zip(k, near)], dtype=F64)
    wrong = {f"{mistake} ({name})": value for name, nats in right.items() for mistake, value in {
        "the minus sign": -nats, "averaged over dimensions": nats / 3, "in bits": nats / math.log(2),
        "in bits/dim": nats / 3 / math.log(2)}.items()}
    judge.choice(got, right, wrong, worst(law, t) * 1e-3, 1e-7)


def shortened(betas, data) -> tuple:
    """A list of times, the full law, and the law of the chain of only these times."""
    T = len(betas)
    times = [1, 3, 5] if data is None else sorted(data.draw(st.sets(st.integers(1, T), min_size=1)) | {T})
    full = Law(betas)
    bars = [full.a[t].item() ** 2 for t in [0, *times]]
    return times, full, Law([1 - b / a for a, b in zip(bars, bars[1:])])


@theorem(st.data(), clear=(None,), examples=25)
def fewer_steps_of_alg2(judge, betas, seed, data):
    """a step from τ_i to τ_{i−1} has the marginals of Eq. 4 at both, and the network is shown τ_i"""
    their, (times, full, law) = judge.offered("schedule", "respaced", "sample"), shortened(betas, data)
    assume(full.a[-1] > 1e-2 and len(times) > 1)
    x, z, shown = randn(seed, 3, 5), {t: randn(seed + t, 3, 5) for t in range(full.T + 1)}, []
    by_index = {i: z[i] for i in range(law.T + 1)}
    s = their.respaced(their.schedule(betas), times)
    got = their.sample(s, lambda x, t: shown.append(t[0].item()) or linear(x, t), x, by_index.get)
    chains(judge, law, x, by_index, got, shown, [0, *times], full)


@theorem(st.data(), st.floats(0, 1), clear=(None, 0.6), examples=25)
def fewer_steps_of_ddim(judge, betas, seed, data, eta):
    """DDIM: x_{τ_{i−1}} = √ᾱ x̂_0 + √(1 − ᾱ − σ²) ε̂ + σ z with ᾱ of τ_{i−1}, σ² = η² β̃"""
    their, (times, full, law) = judge.offered("schedule", "respaced", "ddim"), shortened(betas, data)
    assume(full.a[-1] > 1e-2 and len(times) > 1)
    x_T, z = randn(seed, 3, 5), {t: randn(seed + t, 3, 5) for t in range(law.T + 1)}
    s = their.respaced(their.schedule(betas), times)
    got = their.ddim(s, linear, x_T, z.get, eta)

    def walk(clip, again=True, power=1.0, reduced=True, last=False, small=True):
        x = x_T
        for i in range(law.T, 0, -1):
            (a, sd), eps = law.at(i), linear(x, torch.full((3,), [0, *times][i]))
            x0 = (x - sd * eps) / a
            x0 = x0.clamp(-1, 1) if clip else x0
            eps = (x - a * x0) / sd if again else eps
            sigma2 = eta ** 2 * (law.posterior(i, x, x)[1] if small else law.beta[i])
            rest = (law.v[i - 1] - (sigma2 if reduced else 0)).clamp(min=0).sqrt()
            x = law.a[i - 1] * x0 + rest * eps + (sigma2.sqrt() ** (power + 0.0) * z[i] if i > 1 or last else 0)
        return x
    right = {"x̂_0 clipped": walk(True), "x̂_0 not clipped": walk(False),
             "x̂_0 clipped, ε̂ not computed anew": walk(True, again=False)}
    wrong = {f"{name} ({clip and 'clipped' or 'not clipped'})": walk(clip, **how) for clip in (True, False)
             for name, how in {"the direction not reduced by σ²": dict(reduced=False), "σ² instead of σ":
                               dict(power=2.0), "noise at the last step": dict(last=True),
                               "β_t instead of β̃_t": dict(small=False)}.items()}
    judge.choice(got, right, wrong, worst(law, torch.arange(1, law.T + 1)) * full.a[-1].item(),
                 1e-9 / full.a[-1].item())


@theorem(st.floats(0, 1), clear=(0.3,), examples=25)
def sec44_interpolation(judge, betas, seed, lam):
    """x̄_t = (1 − λ) x_t + λ x'_t is decoded from the same t, with two draws for all λ"""
    law, their = Law(betas), judge.offered("schedule", "interpolate")
    assume(law.a[-1] > 1e-2 and law.T > 1)
    t, (x0, other, eps, eps_other) = max(2, law.T - 1), randn(seed, 4, 2, 5)
    z, lam = {t: randn(seed + t, 2, 5) for t in range(law.T + 1)}, torch.full((2,), lam, dtype=F64)
    got = their.interpolate(their.schedule(betas), linear, x0, other, lam, t, eps, eps_other, z.get)
    (a, sd), (b, sd_b) = law.at(t), law.at(t - 1)
    part = lam[:, None]

    def mixed(a, sd, part):
        return (1 - part) * (a * x0 + sd * eps) + part * (a * other + sd * eps_other)

    def walks(x, first, **mistake):
        return {name: law.walk(linear, x, z, *choice, first=first, **mistake) for choice, name in TWICE.items()}
    images = (1 - part) * x0 + part * other
    wrong = {"decoded from t − 1": walks(mixed(a, sd, part), t - 1), "λ exchanged": walks(mixed(a, sd, 1 - part), t),
             "encoded at t − 1": walks(mixed(b, sd_b, part), t), "images mixed instead of x_t":
             walks(a * images + sd * eps, t), "noise at the last step": walks(mixed(a, sd, part), t, last=True)}
    judge.choice(got, walks(mixed(a, sd, part), t), {f"{name} ({choice})": value for name, values in wrong.items()
                                                     for choice, value in values.items()},
                 worst(law, torch.arange(1, law.T + 1)) * law.a[-1].item(), 1e-9 / law.a[-1].item())
