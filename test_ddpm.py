"""One theorem for each equation of the paper, in its order; each kills the mistakes it names.

Left-hand sides are the code's; right-hand sides share nothing with it but `q_step`, the Markov
kernel of Eq. 2 that the whole paper follows from. All in float64, to 1e-9.
"""
import functools
import inspect
import math
import warnings
from dataclasses import replace

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import hypothesis
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import ddpm
from ddpm import Gaussian, Model
from judge.reference import (F64, at, beta_lists, log_bin_of, log_normal, mean_log_ratio,
                             mean_of_quadratic, numbers, randn)

hypothesis.settings.register_profile("ddpm", deadline=None, derandomize=True, database=None,
                                     max_examples=50)
hypothesis.settings.load_profile("ddpm")
PAPER = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]  # §4


# ------------------------------------------------------------------- what computes the second sides

def images8(seed: int, *shape) -> torch.Tensor:
    k = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))
    return k.to(F64) / 127.5 - 1


def same(a, b, rel: float = 1e-9, floor: float = 1e-12) -> None:
    """Elementwise: |a − b| ≤ rel · |b| + floor."""
    a, b = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=F64) for x in (a, b)))
    torch.testing.assert_close(a, b, rtol=rel, atol=floor)


def kernel(s, t: int) -> tuple[float, float]:
    """Eq. 2 as q_step has it: x_t = a x_{t−1} + b ε."""
    one, nil = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    return ddpm.q_step(s, one, at(t), nil).item(), ddpm.q_step(s, nil, at(t), one).item()


@functools.lru_cache(maxsize=8)
def chain(s) -> list[tuple[float, float]]:
    """x_t = a x_0 + N(0, v) by t steps of Eq. 2: (a, v) for t = 0 … T."""
    steps = [(1.0, 0.0)]
    for t in range(1, s.T + 1):
        (a, v), (scale, noise) = steps[-1], kernel(s, t)
        steps.append((a * scale, scale ** 2 * v + noise ** 2))
    return steps


def iterated(s, t: int) -> tuple[float, float]:
    """(a, v) of `chain` at time t."""
    return chain(s)[t]


def conditioned(s, t: int, x0, x_t) -> tuple:
    """Mean and variance of x_{t−1} given x_0 and x_t, from Eq. 2 alone.

    Given x_0, x_{t−1} ~ N(m, v) and x_t = c x_{t−1} + N(0, n) are jointly Gaussian. So the mean of
    x_{t−1} given x_t is m + gain (x_t − c m) with gain = Cov/Var = c v / (c² v + n), and its
    variance is v − gain c v = v n / (c² v + n)."""
    (a, v), (c, noise) = iterated(s, t - 1), kernel(s, t)
    total = c ** 2 * v + noise ** 2
    return a * x0 + c * v / total * (x_t - c * a * x0), v * noise ** 2 / total


def exact_denoiser(s, m: float, v: float):
    """ε(x_t, t) for x_0 ~ N(m, v): (x_t − √ᾱ_t E[x_0 | x_t]) / √(1 − ᾱ_t), from Eq. 2 iterated."""
    table = {t: iterated(s, t) for t in range(1, s.T + 1)}

    def model(x, t):
        a, w = (torch.tensor([table[u][i] for u in t.tolist()], dtype=F64)[:, None] for i in (0, 1))
        mean0 = m + a * v / (a * a * v + w) * (x - a * m)
        return (x - a * mean0) / w.sqrt()
    return model


def affine(run, n: int) -> tuple[float, float]:
    """Mean and variance of a number that is affine in n independent N(0, 1) draws.

    run(draws (n + 1, n)) → (n + 1,): row 0 of the draws is zero, the others are unit vectors."""
    out = run(torch.cat([torch.zeros(1, n, dtype=F64), torch.eye(n, dtype=F64)]))
    return out[0].item(), ((out[1:] - out[0]) ** 2).sum().item()


def step_by_hand(s, t: int, x_t, out, predict="eps", variance="fixed_large", clip=True) -> tuple:
    """μ_θ, σ_t² and x̂_0 where the network answers `out`, from Eq. 2 alone."""
    (a, v), (_, noise) = iterated(s, t), kernel(s, t)
    known, shift = conditioned(s, t, 0 * x_t, x_t)[0], conditioned(s, t, 1 + 0 * x_t, 0 * x_t)[0]
    x0_hat = {"eps": (x_t - math.sqrt(v) * out) / a, "x0": out, "mean": (out - known) / shift}[predict]
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    mean = conditioned(s, t, x0_hat, x_t)[0]
    sigma2 = noise ** 2 if variance == "fixed_large" else conditioned(s, t, 0, 0)[1]
    return mean, sigma2, x0_hat


# --------------------------------------------------------------------------- §2, §4: the schedule

def test_sec4_the_papers_numbers():
    """β from 10⁻⁴ to 0.02, T = 1000: ᾱ_T, β̃_2, and L_T in bits/dim at x_0² = ¼ and at 1."""
    s = ddpm.make_schedule()
    same(s.betas[1:], PAPER, 1e-12)
    same(s.alpha_bars[1000], 4.0358297654e-5, 1e-10, 0)
    same(ddpm.p_variance(s, at(2), "fixed_small"), [5.4532e-5], 1e-5, 0)
    for x, bits in ((0.5, 7.28e-6), (1.0, 2.91e-5)):
        x0 = torch.full((1, 3072), x, dtype=F64)
        same(ddpm.bits_per_dim(ddpm.prior_kl(s, x0), x0), [bits], 1e-3, 0)


@given(beta_lists())
@example(PAPER)
def test_sec2_alpha_bar_is_the_running_product(betas):
    """ᾱ_t = ∏_{s≤t} (1 − β_s), ᾱ_0 = 1, times[t] = t; and nothing but β in (0, 1) is a schedule.

    Kills: ᾱ_t as a product up to T, ᾱ_0 ≠ 1, a shifted index."""
    s = ddpm.schedule_from_betas(betas)
    assert s.T == len(betas) and s.times.tolist() == list(range(s.T + 1))
    product = 1.0
    for t in range(s.T + 1):
        product *= 1 - betas[t - 1] if t else 1
        same(s.alpha_bars[t], product)
        same(s.alphas[t], 1 - s.betas[t])
    assert s.betas[0] == 0 and s.alpha_bars.dtype == F64


@pytest.mark.parametrize("betas", [[], [0.0], [1.0], [0.1, float("nan")], [[0.1]], [-0.1]])
def test_sec2_no_other_betas(betas):
    """β outside (0, 1), none, or not a list of numbers: ValueError."""
    with pytest.raises(ValueError):
        ddpm.schedule_from_betas(betas)


def test_sec4_schedules_by_name():
    """Linear, quadratic (√β linear), constant; for T ≠ 1000 the ends are scaled by 1000/T, and no β
    is above 0.999. ValueError for another name, β ≤ 0, no steps, and an ᾱ_T that is not near 0.

    Kills: T changed without rescaling β, so that ᾱ_T is not near 0."""
    quadratic = ddpm.make_schedule(kind="quadratic").betas[1:]
    same(quadratic.sqrt().diff(), (0.02 ** 0.5 - 0.01) / 999, 1e-6)
    same(quadratic[[0, -1]], [1e-4, 0.02])
    same(ddpm.make_schedule(kind="constant").betas[1:], [0.02] * 1000)
    for T in (2, 10, 100, 4000):
        s = ddpm.make_schedule(T)
        same(s.betas[[1, T]], [min(0.1 / T, 0.999), min(20 / T, 0.999)])
        assert s.alpha_bars[T] < 1e-3
    for kind in ("linear", "quadratic", "constant"):
        s = ddpm.make_schedule(4, kind=kind, beta_start=1.0, beta_end=2.0)
        same(s.betas[1:], [0.999] * 4, 1e-12)
        for bad in (dict(T=1), dict(T=0), dict(T=-1), dict(beta_end=0.0), dict(beta_start=-1e-4),
                    dict(beta_start=0.0), dict(beta_end=-0.02), dict(beta_end=float("nan"))):
            with pytest.raises(ValueError, match="T ≥ 2 and β > 0"):
                ddpm.make_schedule(kind=kind, **bad)
        with pytest.raises(ValueError, match="larger beta_end"):
            ddpm.make_schedule(kind=kind, beta_end=0.002)
        with pytest.raises(ValueError, match="0 in float32.*smaller beta_end"):
            ddpm.make_schedule(kind=kind, beta_start=0.5, beta_end=0.999)
    with pytest.raises(ValueError, match="nonsense"):
        ddpm.make_schedule(kind="nonsense")


@pytest.mark.parametrize("T", [10, 1000])
def test_sec31_a_schedule_ends_near_pure_noise(T):
    """A schedule with ᾱ_T ≤ 10⁻³ is taken, and one just above is refused: p(x_T) = N(0, I) says that
    x_T shows nothing of the image."""
    for wanted, taken in ((0.99e-3, True), (1.01e-3, False)):
        beta = 1 - wanted ** (1 / T)                         # constant: ᾱ_T = (1 − β)^T
        try:
            s = ddpm.make_schedule(T, "constant", beta_end=beta * T / 1000)
        except ValueError:
            assert not taken
        else:
            assert taken and abs(s.alpha_bars[T] - wanted) < 1e-9


class Apple(torch.overrides.TorchFunctionMode):
    """Apple's MPS without one: a tensor that is sent there stays here, and float64 is refused."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        there = func is torch.Tensor.to and torch.device(args[1]).type == "mps"
        out = func(*((args[0], "cpu", *args[2:]) if there else args), **(kwargs or {}))
        if there and out.dtype == F64:
            raise TypeError("the MPS framework doesn't support float64")
        return out


def test_a_schedule_moves_whole():
    """`to` moves every tensor, and the full schedule too; float64 stays, except on Apple's MPS.

    Kills: β and α exchanged, the full schedule left behind, float64 asked of MPS."""
    s = ddpm.respace(ddpm.make_schedule(), 10)
    names = ("betas", "alphas", "alpha_bars", "times")
    for here, there, copy in ((s, s.to("meta"), s.to("cpu")),
                              (s.full, s.to("meta").full, s.to("cpu").full)):
        for name in names:
            assert getattr(there, name).device.type == "meta"
            assert getattr(there, name).dtype == (torch.int64 if name == "times" else F64)
            assert torch.equal(getattr(copy, name), getattr(here, name))
    with Apple():
        there = s.to("mps")
    for here, copy in ((s, there), (s.full, there.full)):
        for name in names:
            want = getattr(here, name)
            assert torch.equal(getattr(copy, name), want if name == "times" else want.float())


# --------------------------------------------------------------------- §2: the forward process q

@given(beta_lists(), numbers)
def test_eq02_forward_step(betas, seed):
    """q(x_t | x_{t−1}) = N(√(1 − β_t) x_{t−1}, β_t I), read off the sample's own coefficients.

    Kills: α and β exchanged, noise scaled by β instead of √β."""
    s, x, eps = ddpm.schedule_from_betas(betas), randn(seed, 4), randn(seed + 1, 4)
    for t, beta in enumerate(betas, 1):
        a, b = kernel(s, t)
        assert a > 0 and b > 0
        same(a * a, 1 - beta)
        same(b * b, beta)
        same(ddpm.q_step(s, x[None], at(t), eps[None])[0], a * x + b * eps)


@given(beta_lists(), numbers)
@example(PAPER, 0)
def test_eq04_jump_is_iterated_steps(betas, seed):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I): t steps of Eq. 2, for a batch with mixed t.

    Kills: noise scaled by the variance, ᾱ_t at another index, images broadcast over the batch."""
    s = ddpm.schedule_from_betas(betas)
    t = torch.tensor(sorted({0, 1, (s.T + 1) // 2, s.T}))
    x0, eps = randn(seed, len(t), 3, 2), randn(seed + 1, len(t), 3, 2)
    q, x_t = ddpm.q_mean_variance(s, x0, t), ddpm.q_sample(s, x0, t, eps)
    for i, u in enumerate(t.tolist()):
        a, v = iterated(s, u)
        same(q.mean[i], a * x0[i])
        same(q.sigma2[i], torch.full((1, 1), v, dtype=F64))
        same(x_t[i], a * x0[i] + math.sqrt(v) * eps[i])


@given(beta_lists(), numbers)
@example(PAPER, 0)
def test_eq07_posterior_is_bayes_rule(betas, seed):
    """q(x_{t−1} | x_t, x_0): two jointly Gaussian variables, one conditioned on the other.

    Kills: the posterior variance β_t instead of β̃_t, √ᾱ_t instead of √ᾱ_{t−1} or √α_t."""
    s, x0, x_t = ddpm.schedule_from_betas(betas), randn(seed, 1, 5), randn(seed + 1, 1, 5)
    for t in {1, min(2, s.T), (s.T + 1) // 2, s.T}:
        mean, variance = conditioned(s, t, x0, x_t)
        q = ddpm.q_posterior_mean_variance(s, x0, x_t, at(t))
        same(q.mean, mean)
        same(q.sigma2, [[variance]], 1e-9, 0)
        if t == 1:
            assert torch.equal(q.mean, x0) or (q.mean - x0).abs().max() < 1e-9
            assert q.sigma2.item() == 0


@given(beta_lists(8), numbers)
@example([PAPER[0], PAPER[500], PAPER[999]], 0)
def test_eq03_integrand_equals_eq21_along_every_path(betas, seed):
    """Appendix A: −log p(x_T) − Σ log p_θ/q(x_t | x_{t−1}), as it stands and turned round.

    For any path and any p_θ; Kills: a posterior that is not Bayes' rule, a lost factor."""
    s = ddpm.schedule_from_betas(betas)
    path = [randn(seed, 1, 3)]
    for t in range(1, s.T + 1):
        path.append(ddpm.q_step(s, path[-1], at(t), randn(seed + t, 1, 3)))
    p_theta = [log_normal(path[t - 1], 0.3 * path[t], torch.tensor(0.7 + t, dtype=F64))
               for t in range(1, s.T + 1)]
    prior = log_normal(path[s.T], 0, torch.ones(1, dtype=F64))
    eq3 = [-prior]
    for t in range(1, s.T + 1):
        scale, noise = kernel(s, t)
        eq3 += [-p_theta[t - 1], log_normal(path[t], scale * path[t - 1],
                                            torch.tensor(noise ** 2, dtype=F64))]
    eq21 = [-prior, log_normal(path[s.T], *ddpm.q_mean_variance(s, path[0], at(s.T))), -p_theta[0]]
    for t in range(2, s.T + 1):
        q = ddpm.q_posterior_mean_variance(s, path[0], path[t], at(t))
        eq21 += [-p_theta[t - 1], log_normal(path[t - 1], *q)]
    size = sum(term.abs() for term in eq3).max().item()
    same(sum(eq3), sum(eq21), 0, 1e-9 * size)


# ------------------------------------------------------------------- §3.2: the reverse process p_θ

@given(beta_lists(), numbers)
@example(PAPER, 0)
def test_eq15_inverts_the_jump(betas, seed):
    """x̂_0(x_t(x_0, ε), ε) = x_0 and back; the same for the x_0 behind a mean (Eq. 7 inverted)."""
    s = ddpm.schedule_from_betas(betas)
    x0, eps = randn(seed, 1, 4), randn(seed + 1, 1, 4)
    for t in {1, (s.T + 1) // 2, s.T}:
        a, v = iterated(s, t)
        assume(a * a >= 1e-8)
        x_t = a * x0 + math.sqrt(v) * eps
        same(ddpm.predict_x0_from_eps(s, x_t, at(t), eps), x0, 1e-9, 1e-9 / a)
        same(ddpm.predict_eps_from_x0(s, x_t, at(t), x0), eps, 1e-9, 1e-9 / math.sqrt(v))
        mean = ddpm.q_posterior_mean_variance(s, x0, x_t, at(t)).mean
        weight = iterated(s, t - 1)[0] * (1 - kernel(s, t)[0] ** 2) / v  # of x_0 in Eq. 7
        same(ddpm.predict_x0_from_mean(s, x_t, at(t), mean), x0, 1e-9, 1e-9 / weight)


@given(beta_lists(), numbers, st.sampled_from(["eps", "x0", "mean"]))
@example(PAPER, 0, "eps")
def test_eq11_every_prediction_gives_the_posterior_mean(betas, seed, predict):
    """A network that knows x_0 gives μ_θ = μ̃_t(x_t, x_0), whatever it predicts.

    Kills: √ᾱ_t instead of √α_t in the mean, the network shown another time than t."""
    s = ddpm.schedule_from_betas(betas)
    x0, eps = randn(seed, 1, 4), randn(seed + 1, 1, 4)
    for t in {1, (s.T + 1) // 2, s.T}:
        a, v = iterated(s, t)
        assume(a * a >= 1e-8)
        x_t = a * x0 + math.sqrt(v) * eps
        mean, _ = conditioned(s, t, x0, x_t)
        answer = {"eps": eps, "x0": x0, "mean": mean}[predict]
        seen = []
        model = Model(s, lambda x, u: seen.append(u) or answer, predict, clip=False)
        p = ddpm.p_mean_variance(model, x_t, at(t))
        same(p.mean, mean, 1e-9, 1e-9 / a)
        assert seen[0].tolist() == [t]


@given(beta_lists(), numbers)
@example(PAPER, 0)
def test_eq11_is_eq07_with_the_x0_of_eq15(betas, seed):
    """μ_θ = (x_t − β_t/√(1 − ᾱ_t) ε_θ) / √α_t for all x_t and ε_θ without clip, and with it in the
    dimensions where |x̂_0| ≤ 1.

    Kills: ᾱ of another time in Eq. 7 or Eq. 15, √ᾱ_t for √α_t, a clip that is always on."""
    s, x_t, eps = ddpm.schedule_from_betas(betas), randn(seed, 1, 7), randn(seed + 1, 1, 7)
    x0 = torch.tensor([[-2.0, -1.0, -0.7, 0.0, 0.7, 1.0, 2.0]], dtype=F64)
    for t in {1, (s.T + 1) // 2, s.T}:
        (a, v), (scale, noise) = iterated(s, t), kernel(s, t)
        p = ddpm.p_mean_variance(Model(s, lambda x, u: eps, clip=False), x_t, at(t))
        same(p.mean, (x_t - noise ** 2 / math.sqrt(v) * eps) / scale, 1e-9, 1e-9)
        if a * a >= 1e-8:
            behind = (x_t - a * x0) / math.sqrt(v)          # the ε_θ that has this x̂_0
            p = ddpm.p_mean_variance(Model(s, lambda x, u: behind), x_t, at(t))
            same(p.x0_hat, x0.clamp(-1, 1), 1e-9, 1e-9 / a)
            eq11 = (x_t - noise ** 2 / math.sqrt(v) * behind) / scale
            same(p.mean[:, 1:-1], eq11[:, 1:-1], 1e-9, 1e-9)


def test_eq11_clipping_comes_before_the_mean():
    """With clip, x̂_0 is clipped to [−1, 1] and Eq. 7 uses it, whatever is predicted; without it, a
    predicted mean stays as it is.

    Kills: x̂_0 clipped after the mean was taken, the mean clipped, a predicted mean that is not."""
    s, x_t = ddpm.make_schedule(), torch.tensor([[3.0, -2.5, 0.2]], dtype=F64)
    t, eps = at(300), torch.tensor([[-2.0, 1.0, 0.1]], dtype=F64)
    a, v = iterated(s, 300)
    x0 = ((x_t - math.sqrt(v) * eps) / a).clamp(-1, 1)
    assert x0.abs().max() == 1
    far = (x_t - math.sqrt(v) * eps) / a
    for predict, answer in (("eps", eps), ("x0", far), ("mean", conditioned(s, 300, far, x_t)[0])):
        p = ddpm.p_mean_variance(Model(s, lambda x, u: answer, predict), x_t, t)
        same(p.x0_hat, x0)
        same(p.mean, conditioned(s, 300, x0, x_t)[0])
    same(ddpm.p_mean_variance(Model(s, lambda x, u: 5 * x, "mean", clip=False), x_t, t).mean, 5 * x_t)


@given(beta_lists(), numbers)
def test_sec32_the_two_fixed_variances(betas, seed):
    """β_t is Var(x_{t−1} | x_t) if x_0 ~ N(0, 1), β̃_t if x_0 is one point; σ_1² is β̃_2 (β_1 if
    T = 1).

    Kills: σ instead of σ², β_t for β̃_t, log β̃_1 = −∞."""
    s = ddpm.schedule_from_betas(betas)
    for t in range(1, s.T + 1):
        for name, v0 in (("fixed_large", 1.0), ("fixed_small", 0.0)):
            u = max(t, min(2, s.T))                        # t = 1 takes β̃_2
            if t == 1:
                v0 = 0.0 if s.T > 1 else 1.0
            (a, v), (scale, noise) = iterated(s, u - 1), kernel(s, u)
            v += a * a * v0                                # Var(x_{t−1})
            same(ddpm.p_variance(s, at(t), name), [v * noise ** 2 / (scale ** 2 * v + noise ** 2)])
    for t in {1, s.T} if s.T > 1 else ():
        with pytest.raises(ValueError, match="learned"):
            ddpm.p_variance(s, at(t), "learned")


def test_table2_learned_variance_is_the_second_half():
    """With variance = learned the second half of the channels is log σ², for each dimension."""
    s, x_t, log_sigma2 = ddpm.make_schedule(), randn(0, 2, 3, 2, 2), randn(1, 2, 3, 2, 2)
    model = Model(s, lambda x, t: torch.cat([0.1 * x, log_sigma2], 1), variance="learned", clip=False)
    p, few = ddpm.p_mean_variance(model, x_t, at(7, 2)), replace(model, s=ddpm.respace(s, 10))
    same(p.sigma2, torch.exp(log_sigma2))
    same(p.mean, ddpm.p_mean_variance(Model(s, lambda x, t: 0.1 * x, clip=False), x_t, at(7, 2)).mean)
    with pytest.raises(ValueError, match="learned"):
        ddpm.p_mean_variance(few, x_t, at(7, 2))
    plain = replace(few, net=lambda x, t: 0.1 * x, variance="fixed_small")   # DDIM needs no variance
    for a, b in zip(ddpm.ddim_loop(few, x_t, None), ddpm.ddim_loop(plain, x_t, None), strict=True):
        same(a.x_t, b.x_t)


def test_a_model_refuses_names_that_are_not_there():
    for choices in ({"predict": "score"}, {"variance": "beta"}):
        with pytest.raises(ValueError, match=f"{[*choices.values()][0]}.*none of"):
            Model(ddpm.make_schedule(), lambda x, t: x, **choices)


@given(beta_lists(), st.floats(-2, 2), st.floats(0.01, 4), st.sampled_from(["fixed_large",
                                                                            "fixed_small"]))
@example(PAPER[::50], 0.0, 1.0, "fixed_large")
def test_alg2_moments_of_the_sampler(betas, m, v, variance):
    """Gaussian data and their exact denoiser: x_0's mean and variance follow a recursion.

    x_{t−1} = E[x_{t−1} | x_t] + σ_t z for t > 1, and x_0 = E[x_0 | x_1]: no noise at the end.
    Kills: noise scaled by σ², noise at the last step, a loop that misses t = 1 or t = T."""
    s = ddpm.schedule_from_betas(betas)
    assume(iterated(s, s.T)[0] ** 2 >= 1e-8)
    model = exact_denoiser(s, m, v)

    def run(draws):
        noise = {t: draws[:, t - 1:t] for t in range(1, s.T + 1)}   # x_T, and z at t = 2 … T
        states = list(ddpm.p_sample_loop(Model(s, model, variance=variance, clip=False), noise[1],
                                         lambda t: noise[t]))
        assert [state.t for state in states] == list(range(s.T, -1, -1))
        assert torch.equal(states[-1].x_t, states[-1].x0_hat)
        return states[-1].x_t[:, 0]

    mean, var = 0.0, 1.0                                            # of x_T
    for t in range(s.T, 0, -1):
        (a, w), (scale, noise) = iterated(s, t - 1), kernel(s, t)
        prior = a * a * v + w                                       # Var(x_{t−1}) of the data
        gain = scale * prior / (scale ** 2 * prior + noise ** 2)
        mean = a * m + gain * (mean - scale * a * m)
        sigma2 = noise ** 2 if variance == "fixed_large" else w * noise ** 2 / (scale ** 2 * w
                                                                                + noise ** 2)
        var = gain ** 2 * var + (sigma2 if t > 1 else 0)
    got = affine(run, s.T)
    same(got[0], mean, 1e-8, 1e-8)
    same(got[1], var, 1e-8, 1e-10)


def same_states(got, want) -> None:
    """The states of two chains, to the bit."""
    assert [state.t for state in got] == [state.t for state in want]
    for a, b in zip(got, want):
        assert torch.equal(a.x_t, b.x_t) and torch.equal(a.x0_hat, b.x0_hat), a.t


CHOICES = [{}, {"clip": False}, {"variance": "fixed_small"}, {"predict": "x0"},
           {"predict": "mean", "variance": "fixed_small"}]


@pytest.mark.parametrize("choices", CHOICES)
def test_alg2_every_state_by_hand(choices):
    """x_{t−1} = μ_θ + σ_t z along one chain, for every choice; from T, and from another start.

    Kills: a minus before the noise, choices that get lost, x̂_0 or x_t of another time."""
    s, model = ddpm.make_schedule(10), lambda x, t: 0.5 * x + 0.1
    z = {t: randn(t, 2, 3) for t in range(1, 11)}
    for start in (10, 4):
        x = randn(99, 2, 3)
        states = list(ddpm.p_sample_loop(Model(s, model, **choices), x, z.get,
                                         None if start == 10 else start))
        assert [state.t for state in states] == list(range(start, -1, -1))
        for state in states[:-1]:
            mean, sigma2, x0_hat = step_by_hand(s, state.t, x, model(x, None), **choices)
            same(state.x_t, x)
            same(state.x0_hat, x0_hat, 1e-8)
            x = mean + math.sqrt(sigma2) * z[state.t] if state.t > 1 else mean
        same(states[-1].x_t, x, 1e-8)
        same(states[-1].x0_hat, x, 1e-8)


def test_alg2_paper_schedule_standard_normal_data():
    """x_0 ~ N(0, 1), σ_t² = β_t: every x_t has variance 1, and the noiseless last step leaves
    α_1."""
    s = ddpm.make_schedule(40)
    model = exact_denoiser(s, 0.0, 1.0)
    asked = []

    def run(draws):
        def noise(t):
            asked.append(t)
            return draws[:, t - 1:t]
        *_, last = ddpm.p_sample_loop(Model(s, model, clip=False), draws[:, :1], noise)
        return last.x_t[:, 0]

    same(affine(run, 40)[1], kernel(s, 1)[0] ** 2)
    assert asked == list(range(40, 1, -1))


@given(beta_lists(30).filter(lambda b: len(b) > 2), st.data())
@example(PAPER, None)
def test_respace_is_the_chain_of_fewer_steps(betas, data):
    """α'_1 ⋯ α'_i = ᾱ_{τ_i} for the τ of a list, and for n of them evenly spaced with 1 and T; the
    network is shown τ_i.

    x_0 ~ N(0, 1): the sampler's moments are exact for any spacing, and the last step leaves ᾱ_{τ_1}.
    Kills: β_t of the full schedule kept, the network shown i, an end left out."""
    s = ddpm.schedule_from_betas(betas)
    n = data.draw(st.integers(2, s.T)) if data else 50
    r = ddpm.respace(s, n)
    tau = r.times[1:].tolist()
    assert r.T == n == len(set(tau)) and tau[0] == 1 and tau[-1] == s.T
    gaps = [b - a for a, b in zip(tau, tau[1:])]
    assert max(gaps) - min(gaps) <= 1
    if data:
        tau = sorted(data.draw(st.sets(st.integers(1, s.T - 1), min_size=1))) + [s.T]
        r, n = ddpm.respace(s, tau), len(tau)
    assert r.times.tolist() == [0] + tau and r.T == n
    for i in {1, n // 2, n}:
        a, v = iterated(s, int(r.times[i]))
        b, w = iterated(r, i)
        same([b * b, w], [a * a, v])
    assume(iterated(s, s.T)[0] ** 2 >= 1e-8 and n <= 60)
    model, shown = exact_denoiser(s, 0.0, 1.0), []

    def run(draws):
        net = lambda x, t: shown.append(int(t[0])) or model(x, t)
        *_, last = ddpm.p_sample_loop(Model(r, net, clip=False), draws[:, :1],
                                      lambda i: draws[:, i - 1:i])
        return last.x_t[:, 0]

    same(affine(run, n)[1], iterated(s, tau[0])[0] ** 2, 1e-7)
    assert shown == tau[::-1]


def test_respace_of_a_predicted_mean_goes_through_x0():
    """A network of μ̃_τ of the full chain serves the short one by the x_0 it implies."""
    s = ddpm.make_schedule()
    r, x0, x_t = ddpm.respace(s, 10), randn(0, 1, 4) / 4, randn(1, 1, 4)
    model = lambda x, tau: ddpm.q_posterior_mean_variance(s, x0, x, tau).mean
    for i in (1, 5, 10):
        p = ddpm.p_mean_variance(Model(r, model, "mean"), x_t, at(i))
        same(p.mean, ddpm.q_posterior_mean_variance(r, x0, x_t, at(i)).mean, 1e-9, 1e-8)
    assert ddpm.respace(s, 1000) is s
    for n in (0, 1, 1001):
        with pytest.raises(ValueError, match="sampling steps"):
            ddpm.respace(s, n)
    for times in ([], [1000], [1, 999], [0, 1000], [-1, 1000], [2, 2, 1000], [3, 2, 1000]):
        with pytest.raises(ValueError, match="rise from 1 or later to T = 1000"):
            ddpm.respace(s, times)


@given(beta_lists(), numbers, st.floats(0, 1))
@example(PAPER[::100], 0, 0.0)
@example(PAPER[::100], 0, 1.0)
def test_ddim_has_the_marginals_of_eq04_for_every_eta(betas, seed, eta):
    """With x̂_0 = x_0 and x_t ~ N(√ᾱ_t x_0, 1 − ᾱ_t), x_{t−1} ~ N(√ᾱ_{t−1} x_0, 1 − ᾱ_{t−1}).

    Kills: ε̂ scaled by √(1 − ᾱ_{t−1}) whatever σ is, σ for σ², another time's ᾱ."""
    s, pixel = ddpm.schedule_from_betas(betas), randn(seed, 1).clamp(-1, 1).item()
    a, v = iterated(s, s.T)
    assume(a * a >= 1e-8)

    def run(draws):                                         # draws: of x_T, and z at t = T … 2
        x0 = torch.full((len(draws), 1), pixel, dtype=F64)
        states = ddpm.ddim_loop(Model(s, lambda x, t: x0, "x0"), a * x0 + math.sqrt(v) * draws[:, :1],
                                lambda t: draws[:, t - 1:t], eta=eta)
        return torch.cat([state.x_t for state in states], 1)

    out = run(torch.cat([torch.zeros(1, s.T, dtype=F64), torch.eye(s.T, dtype=F64)]))
    for i, t in enumerate(range(s.T, -1, -1)):
        a, v = iterated(s, t)
        same(out[0, i], a * pixel, 1e-9, 1e-9)
        same(((out[1:, i] - out[0, i]) ** 2).sum(), v, 1e-8, 1e-9)


@given(beta_lists().filter(lambda b: len(b) > 1), st.data(), numbers, st.floats(0, 1),
       st.sampled_from(["eps", "x0", "mean"]))
@example(PAPER, None, 0, 0.5, "eps")
def test_one_strided_step_has_the_marginal_of_eq04(betas, data, seed, eta, predict):
    """x_{τ_i} ~ q(x_{τ_i} | x_0) and a network that knows x_0 give x_{τ_{i−1}} ~ q(x_{τ_{i−1}} | x_0),
    for every list of times, every prediction, DDIM with every η and Algorithm 2 with β̃.

    Kills: ᾱ or β̃ of the full schedule at τ_i − 1, a predicted mean read with the short schedule."""
    s, T = ddpm.schedule_from_betas(betas), len(betas)
    times = sorted(data.draw(st.sets(st.integers(1, T), min_size=1)) | {T}) if data else [1, 400, 1000]
    assume(len(times) > 1 and iterated(s, T)[0] ** 2 >= 1e-8)
    r, pixel = ddpm.respace(s, times), randn(seed, 1).clamp(-1, 1).item()

    def model(x, tau):
        a, v = iterated(s, int(tau[0]))
        known = conditioned(s, int(tau[0]), pixel, x)[0]
        return {"eps": (x - a * pixel) / math.sqrt(v), "x0": pixel + 0 * x, "mean": known}[predict]

    loops = [functools.partial(ddpm.ddim_loop, eta=eta), ddpm.p_sample_loop]
    for i in range(1, len(times) + 1):
        (a, v), (b, w) = iterated(s, times[i - 1]), iterated(s, [0, *times][i - 1])
        for loop in loops:
            def run(draws):
                x = a * pixel + math.sqrt(v) * draws[:, :1]
                states = loop(Model(r, model, predict, "fixed_small", False), x, lambda t: draws[:, 1:], start=i)
                return [state.x_t for _, state in zip(range(2), states)][1][:, 0]
            mean, variance = affine(run, 2)
            same(mean, b * pixel, 1e-8, 1e-10 / a)
            same(variance, w, 1e-7, 1e-10 / a)


@pytest.mark.parametrize("choices", CHOICES)
def test_ddim_with_eta_1_is_algorithm_2_and_with_eta_0_needs_no_noise(choices):
    """η = 1: μ̃_t(x_t, x̂_0) and β̃_t. η = 0: x_0 is a function of x_T."""
    s, model, z = ddpm.make_schedule(10), lambda x, t: 0.5 * x, {t: randn(t, 2, 3) for t in range(11)}
    asked: list[int] = []
    for eta in (1.0, 0.5):
        asked.clear()
        states = list(ddpm.ddim_loop(Model(s, model, **choices), z[0],
                                     lambda t: asked.append(t) or z[t], eta=eta))
        assert [state.t for state in states] == list(range(10, -1, -1))
        assert asked == list(range(10, 1, -1))
        for state, after in zip(states, states[1:]):
            *_, x0_hat = step_by_hand(s, state.t, state.x_t, model(state.x_t, None), **choices)
            mean, variance = conditioned(s, state.t, x0_hat, state.x_t)
            same(state.x0_hat, x0_hat, 1e-8)
            if eta == 1:
                same(after.x_t, mean + math.sqrt(variance) * z[state.t], 1e-7, 1e-8)
            else:  # a quarter of the variance is new noise; the rest of it is the direction of ε̂
                (a, v), (b, w) = iterated(s, state.t), iterated(s, state.t - 1)
                eps = (state.x_t - a * x0_hat) / math.sqrt(v)
                same(after.x_t, b * x0_hat + math.sqrt(w - variance / 4) * eps
                     + math.sqrt(variance) / 2 * z[state.t], 1e-7, 1e-8)
    asked.clear()
    *_, last = ddpm.ddim_loop(Model(s, model, **choices), z[0], lambda t: asked.append(t) or z[t])
    assert not asked and torch.equal(last.x_t, last.x0_hat)


@pytest.mark.parametrize("choices", CHOICES)
def test_ddim_from_any_start_is_the_tail_of_the_whole_chain(choices):
    """Begun at t from the x_t of the whole chain, the states at t, …, 0 are its last, to the bit,
    and noise is asked for at the same times.

    Kills: a start off by one, times counted from the start."""
    model = Model(ddpm.make_schedule(10), lambda x, t: 0.5 * x, **choices)
    z = {t: randn(t, 2, 3) for t in range(11)}
    for eta in (0.0, 0.5, 1.0):
        whole = list(ddpm.ddim_loop(model, z[0], z.get, eta=eta))
        for start in range(1, 11):
            asked: list[int] = []
            tail = list(ddpm.ddim_loop(model, whole[10 - start].x_t,
                                       lambda t: asked.append(t) or z[t], start, eta))
            same_states(tail, whole[10 - start:])
            assert [state.t for state in tail] == list(range(start, -1, -1))
            assert asked == (list(range(start, 1, -1)) if eta else [])


# --------------------------------------------------------------------------- §3.3: the decoder

sigmas = st.floats(math.log(1e-4), math.log(10)).map(math.exp)
means = st.floats(-1.2, 1.2) | st.floats(-100, 100) | st.sampled_from([-1.0, 0.0, 1.0])


def decoder(k, mean, sigma):
    level = torch.as_tensor(k, dtype=F64) / 127.5 - 1
    return ddpm.discretized_gaussian_log_likelihood(
        level, torch.as_tensor(mean, dtype=F64), torch.as_tensor(sigma, dtype=F64) ** 2)


@given(means, sigmas)
def test_eq13_probabilities_sum_to_one(mean, sigma):
    """The 256 bins cover the line exactly once.

    Kills: edge bins left finite, bins half as wide or twice, images in [0, 1]."""
    log_p = decoder(range(256), mean, sigma)
    assert log_p.isfinite().all() and (log_p <= 0).all()
    same(log_p.exp().sum(), 1, 0, 1e-12)


@given(means, sigmas, st.integers(0, 255) | st.sampled_from([0, 1, 254, 255]))
@example(0.0, 1e-4, 0)
@example(100.0, 1e-4, 0)
@example(-100.0, 1e-4, 255)
def test_eq13_each_bin_is_an_integral(mean, sigma, k):
    """log p_θ(x_0 | x_1) = log ∫ N(x; μ, σ²) dx over the bin, also where it underflows as a number.

    Kills: a bin shifted by half, the sign of L_0, a floor or a tanh instead of Φ."""
    same(decoder(k, mean, sigma), log_bin_of(k, mean, sigma), 1e-9, 1e-11)


@given(means, sigmas, st.integers(0, 255) | st.sampled_from([0, 255]))
@example(100.0, 1e-4, 3)
def test_eq13_gradient(mean, sigma, k):
    """Its gradient in μ and in log σ is finite and that of the integral (central differences)."""
    mu = torch.tensor(mean, dtype=F64, requires_grad=True)
    log_sigma = torch.tensor(math.log(sigma), dtype=F64, requires_grad=True)
    decoder(k, mu, log_sigma.exp()).backward()
    assert mu.grad.isfinite() and log_sigma.grad.isfinite()
    x = k / 127.5 - 1
    scale = 1 + abs(x - mean) / sigma
    h = 1e-5
    for got, numeric in ((mu.grad * sigma, log_bin_of(k, mean + h * sigma, sigma)
                          - log_bin_of(k, mean - h * sigma, sigma)),
                         (log_sigma.grad, log_bin_of(k, mean, sigma * math.exp(h))
                          - log_bin_of(k, mean, sigma * math.exp(-h)))):
        same(got, numeric / (2 * h), 1e-5, 1e-8 * scale ** 2)


# ----------------------------------------------------------------- §2, §3.4: the bound and the loss

@given(st.floats(-3, 3), st.floats(1e-4, 10), st.floats(-3, 3), st.floats(1e-4, 10))
def test_eq05_kl_is_the_mean_log_ratio(m1, v1, m2, v2):
    """KL(q ‖ p) = E_q[log q − log p]; 0 for the same distribution twice."""
    q, p = (Gaussian(*(torch.tensor([x], dtype=F64) for x in g)) for g in ((m1, v1), (m2, v2)))
    same(ddpm.normal_kl(q, p), mean_log_ratio(q, p), 1e-9, 1e-9)
    assert ddpm.normal_kl(q, q).abs() < 1e-12


@given(beta_lists(), numbers)
@example(PAPER, 0)
def test_eq05_prior_term(betas, seed):
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)), summed over dimensions: the mean log-ratio.

    Kills: q at another time than T, a mean over dimensions instead of the sum."""
    s, x0 = ddpm.schedule_from_betas(betas), randn(seed, 2, 3)
    a, v = iterated(s, s.T)
    ratio = mean_log_ratio((a * x0, torch.tensor(v, dtype=F64)), (0, torch.ones(1, dtype=F64)))
    same(ddpm.prior_kl(s, x0), ratio.sum(1), 1e-9, 1e-10)


@given(beta_lists(), numbers, st.sampled_from(["fixed_large", "fixed_small"]))
def test_eq05_terms_are_mean_log_ratios(betas, seed, variance):
    """L_{t−1} = E_q[log q(x_{t−1} | x_t, x_0) / p_θ(x_{t−1} | x_t)] for t > 1, L_0 = −log
    p_θ(x_0 | x_1).

    One batch holds both kinds. Kills: L_0 without its minus sign, KL(p ‖ q), loss averaged."""
    s = ddpm.schedule_from_betas(betas)
    t = torch.tensor(sorted({1, min(2, s.T), s.T}))
    k = torch.randint(256, (len(t), 3), generator=torch.Generator().manual_seed(seed))
    x0, x_t = k / 127.5 - 1, randn(seed, len(t), 3)
    x0 = x0.to(F64)
    p = ddpm.p_mean_variance(Model(s, lambda x, u: 0.2 * x, variance=variance), x_t, t)
    got = ddpm.vlb_term(s, x0, x_t, t, p)
    for i, u in enumerate(t.tolist()):
        mean, var = p.mean[i], p.sigma2[i].expand(3)
        if u == 1:
            sigma = math.sqrt(var[0])
            same(got[i], -sum(log_bin_of(int(n), m.item(), sigma) for n, m in zip(k[i], mean)))
            continue
        m, v = conditioned(s, u, x0[i], x_t[i])
        ratio = mean_log_ratio((m, torch.tensor(v, dtype=F64)), (mean, var))
        same(got[i], ratio.sum(), 1e-9, 1e-9)


@given(beta_lists().filter(lambda b: len(b) > 1), numbers,
       st.sampled_from(["fixed_large", "fixed_small"]))
@example(PAPER, 0, "fixed_large")
def test_eq12_weight(betas, seed, variance):
    """L_{t−1}(ε_θ) − L_{t−1}(ε) = β_t² / (2σ_t² α_t (1 − ᾱ_t)) ‖ε − ε_θ‖², t > 1 (Eqs. 8–10, 12).

    Kills: a weight with ᾱ_t for α_t, σ_t for σ_t², no ½."""
    s, x0, eps, guess = ddpm.schedule_from_betas(betas), *(randn(seed + i, 1, 4) for i in range(3))
    for t in {2, (s.T + 2) // 2, s.T}:
        assume(iterated(s, t)[0] ** 2 >= 1e-8)
        x_t = ddpm.q_sample(s, x0, at(t), eps)
        terms = [ddpm.vlb_term(s, x0, x_t, at(t), ddpm.p_mean_variance(Model(
            s, lambda x, u: e, variance=variance, clip=False), x_t, at(t))) for e in (guess, eps)]
        square = ((eps - guess) ** 2).sum()
        same(ddpm.vlb_weight(s, at(t), variance) * square, terms[0] - terms[1], 1e-7,
             1e-10 * terms[0].abs().item() + 1e-9)
        v, (scale, noise) = iterated(s, t)[1], kernel(s, t)
        sigma2 = noise ** 2 if variance == "fixed_large" else \
            iterated(s, t - 1)[1] * noise ** 2 / v
        same(ddpm.vlb_weight(s, at(t), variance), [noise ** 4 / (2 * sigma2 * scale ** 2 * v)])


@given(beta_lists(8), st.floats(-1, 1), st.floats(0.05, 3), st.floats(-1, 1), st.floats(0.1, 2))
def test_eq16_equals_eq05_for_gaussian_data(betas, m, v, slope, sigma2):
    """KL(q(x_T) ‖ p) + Σ E KL(q(x_{t−1} | x_t) ‖ p_θ) + H(x_0) = E[L_T + Σ L_{t−1} + L_0].

    x_0 ~ N(m, v), p_θ(x_{t−1} | x_t) = N(slope · x_t, σ²), L_0 a density. The left side knows
    nothing of x_0; its divergences are mean log-ratios, and those of the right side are the code's."""
    s = ddpm.schedule_from_betas(betas)
    one = torch.ones(1, 1, dtype=F64)

    def reverse(x_t):
        return Gaussian(slope * x_t, sigma2 * one)

    def kl(mean, var, p):
        return mean_log_ratio((mean * one, var * one), p).mean()

    x0 = m + math.sqrt(v) * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=F64)
    eps = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=F64)
    (a, w), left, right = iterated(s, s.T), 0.0, 0.0
    left += kl(a * m, a * a * v + w, Gaussian(0 * one, one)) + 0.5 * math.log(2 * math.pi * math.e * v)
    right += ddpm.prior_kl(s, x0).mean()
    for t in range(1, s.T + 1):
        (a, w), (b, u), (scale, noise) = iterated(s, t), iterated(s, t - 1), kernel(s, t)
        prior = b * b * v + u
        gain, rest = scale * prior / (a * a * v + w), prior * noise ** 2 / (a * a * v + w)
        left += mean_of_quadratic(                          # over x_t ~ q(x_t)
            lambda x_t: kl(b * m + gain * (x_t - a * m), rest, reverse(x_t)),
            a * m * one, (a * a * v + w) * one)
        x_t = ddpm.q_sample(s, x0, at(t, 4), eps)
        if t == 1:
            right -= log_normal(x0, *reverse(x_t)).mean()
        else:
            right += ddpm.vlb_term(s, x0, x_t, at(t, 4), reverse(x_t)).mean()
    same(left, right, 1e-9, 1e-8)


def test_eq05_bound_is_above_the_entropy_and_approaches_it():
    """One pixel with three values, the exact posterior mean, x_t by quadrature: E[L] ≥ H(x_0).

    Kills: a bound that is too good (σ_1² wrong, L_0 with open middle bins, terms left out)."""
    levels, p0 = torch.tensor([0.0, 90.0, 255.0], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    values, entropy = levels / 127.5 - 1, -(p0 * p0.log()).sum().item()
    z = torch.linspace(-8, 8, 201, dtype=F64)
    weight = torch.exp(-z ** 2 / 2)
    weight = (p0[:, None] * weight / weight.sum()).flatten()
    x0, eps = values.repeat_interleave(201)[:, None], z.repeat(3)[:, None]
    gaps = []
    for T in (20, 100, 1000):
        s = ddpm.make_schedule(T, beta_start=1e-6)

        def model(x, t):
            a, v = s.alpha_bars[t][:, None].sqrt(), 1 - s.alpha_bars[t][:, None]
            posterior = torch.softmax(p0.log() - (x - a * values) ** 2 / (2 * v), dim=1)
            return (posterior * values).sum(1, keepdim=True)

        total = (weight * ddpm.prior_kl(s, x0)).sum()
        for t in range(1, T + 1):
            t = at(t, len(x0))
            x_t = ddpm.q_sample(s, x0, t, eps)
            p = ddpm.p_mean_variance(Model(s, model, "x0", "fixed_small"), x_t, t)
            total += (weight * ddpm.vlb_term(s, x0, x_t, t, p)).sum()
        gaps.append(total.item() - entropy)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.02


@given(beta_lists(), numbers)
def test_eq14_loss_simple(betas, seed):
    """‖target − network(x_t, t)‖² / D for each image: 0 for the exact answer, D-free, one t an
    image.

    Kills: loss summed over dimensions, another x_t or t shown, √ forgotten in the jump."""
    s, n = ddpm.schedule_from_betas(betas), 3
    t = torch.randint(1, s.T + 1, (n,), generator=torch.Generator().manual_seed(seed))
    x0, eps, error = (randn(seed + i, n, 2, 5) for i in range(3))
    coefficients = [iterated(s, u) for u in t.tolist()]
    x_t = torch.stack([a * x + math.sqrt(v) * e for (a, v), x, e in zip(coefficients, x0, eps)])
    mean = torch.stack([conditioned(s, u, x, y)[0] for u, x, y in zip(t.tolist(), x0, x_t)])
    for predict, target in (("eps", eps), ("x0", x0), ("mean", mean)):
        def model(x, u):
            same(x, x_t)
            assert torch.equal(u, t)
            return target + error
        got = ddpm.loss_simple(Model(s, model, predict), x0, t, eps)
        same(got, [sum(e * e for e in row.flatten().tolist()) / 10 for row in error], 1e-9, 1e-9)


def test_respaced_times_are_what_every_function_shows_the_network():
    """After `respace` the network is called with τ_i: by the loss, the bound, both samplers; and a
    schedule that is respaced twice still tells the times of the first.

    Kills: i instead of τ_i in one of them, times counted in the shorter chain."""
    full = ddpm.make_schedule()
    s = ddpm.respace(ddpm.respace(full, 100), 10)
    assert s.full is full and full.full is None
    tau = s.times.tolist()
    assert len(tau) == 11 and tau[0] == 0 and tau[1] == 1 and tau[10] == 1000
    assert all(abs(t - (1 + 999 * i / 9)) < 7 for i, t in enumerate(tau[1:]))
    same(s.alpha_bars[1:], ddpm.make_schedule().alpha_bars[tau[1:]])
    x0, z, shown = images8(0, 10, 3), randn(1, 10, 3), []

    def model(x, t):
        shown.extend(t.tolist())
        return 0 * x
    model = Model(s, model)
    ddpm.loss_simple(model, x0, torch.arange(1, 11), z)
    assert shown == tau[1:]
    for run in (lambda: ddpm.p_sample_loop(model, z[:1], lambda t: z[:1]),
                lambda: ddpm.ddim_loop(model, z[:1], lambda t: z[:1]),
                lambda: ddpm.send(model, x0[:1], lambda t: z[:1]),
                lambda: ddpm.receive(model, z[:1], lambda t, p: z[:1]),
                lambda: ddpm.interpolate(model, x0[:1], x0[:1], torch.ones(1), 10, z[:1], z[:1],
                                         lambda t: z[:1])):
        shown.clear()
        list(run())
        assert shown == tau[:0:-1]


def test_table1_bits_per_dim():
    """A uniform code for 8-bit numbers costs 8 bits a dimension."""
    x0 = torch.zeros(2, 3, 4, 4)
    same(ddpm.bits_per_dim(torch.full((2,), 48 * math.log(256), dtype=F64), x0), [8.0, 8.0])


# ---------------------------------------------------------------------- precision of the images

LOW = {torch.float32: 2.0 ** -24, torch.bfloat16: 2.0 ** -8, torch.float16: 2.0 ** -11}  # half an ulp of 1
S, TIMES = ddpm.make_schedule(), torch.tensor([1, 2, 10, 999, 1000])
FEW = ddpm.respace(S, [1, 2, 3, 10, 1000])


def chain_of(loop, *start, **options):
    """All states of a chain with the network 0.1 x, as one tensor; its noise is as given."""
    def run(x, *z):
        model = Model(FEW, lambda x, t: 0.1 * x, clip=False)
        states = loop(model, *[x, *start], lambda t: z[(t - 1) % len(z)], **options)
        return torch.stack([state.x_t for state in states])
    return run


IN_THE_DTYPE_OF_THE_IMAGES = {  # name → function of images and noise, (5, 8) each
    "q_step": lambda x, eps: ddpm.q_step(S, x, TIMES, eps),
    "q_mean_variance": lambda x0: ddpm.q_mean_variance(S, x0, TIMES).mean,
    "q_sample": lambda x0, eps: ddpm.q_sample(S, x0, TIMES, eps),
    "predict_x0_from_eps": lambda x_t, eps: ddpm.predict_x0_from_eps(S, x_t, TIMES, eps),
    "predict_eps_from_x0": lambda x_t, x0: ddpm.predict_eps_from_x0(S, x_t, TIMES, x0),
    "q_posterior_mean_variance": lambda x0, x_t: ddpm.q_posterior_mean_variance(S, x0, x_t, TIMES).mean,
    "predict_x0_from_mean": lambda x_t, mean: ddpm.predict_x0_from_mean(S, x_t, TIMES, mean),
    "predict_x0": lambda x_t, out: ddpm.predict_x0(Model(S, lambda *_: out, clip=False), x_t, TIMES)[0],
    "p_mean_variance": lambda x_t, out: ddpm.p_mean_variance(Model(S, lambda *_: out, clip=False), x_t, TIMES).mean,
    "p_sample": lambda mean, z: ddpm.p_sample(Gaussian(mean, S.betas[TIMES][:, None]), z),
    "loss_simple": lambda x0, eps, out: ddpm.loss_simple(Model(S, lambda *_: out), x0, TIMES, eps),
    "distortion": lambda x0, x0_hat: ddpm.distortion(x0, x0_hat),
    "p_sample_loop": chain_of(ddpm.p_sample_loop),
    "ddim_loop": lambda x, z: torch.stack([state.x_t for state in ddpm.ddim_loop(  # noise alone, for small t
        Model(S, lambda x, t: 0 * x, "x0"), x, lambda t: z, start=12, eta=0.7)]),
    "send": lambda x0, z: torch.stack([c.x_t for c in ddpm.send(Model(FEW, lambda x, t: 0.1 * x), x0, lambda t: z)]),
    "receive": lambda x_T, z: torch.stack([c.x_t for c in ddpm.receive(
        Model(FEW, lambda x, t: 0.1 * x, clip=False), x_T, lambda t, p: ddpm.p_sample(p, z))]),
    "interpolate": lambda x0, other, eps, z: torch.stack([c.x_t for c in ddpm.interpolate(
        Model(FEW, lambda x, t: 0.1 * x, clip=False), x0, other, torch.linspace(0, 1, 5), 4, eps, eps, lambda t: z)]),
}
IN_DOUBLE = {"normal_kl", "prior_kl", "vlb_term", "loss_vlb", "discretized_gaussian_log_likelihood", "bits_per_dim"}
WITHOUT_IMAGES = {"make_schedule", "schedule_from_betas", "respace", "p_variance", "vlb_weight"}


def test_no_function_is_forgotten():
    """Each public function of ddpm.py computes in the dtype of the images, in float64, or without any."""
    public = {name for name, f in inspect.getmembers(ddpm, inspect.isfunction)
              if f.__module__ == "ddpm" and name[0] != "_"}
    assert public == {*IN_THE_DTYPE_OF_THE_IMAGES, *IN_DOUBLE, *WITHOUT_IMAGES}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", IN_THE_DTYPE_OF_THE_IMAGES)
def test_sec2_coefficients_are_double_and_rounded_once(name, dtype):
    """With images in float32, bfloat16 or float16 a function is off from float64 by a few roundings of
    its terms: of Σ |∂f/∂x_i · x_i| over its inputs and, in a chain, over all its states.

    Kills: 1 − ᾱ_t in the dtype of the images (3 % off at t = 1 in bfloat16), tables in float32, a
    difference that is taken after the cast (in bfloat16 no noise at all for small t)."""
    f, n = IN_THE_DTYPE_OF_THE_IMAGES[name], len(inspect.signature(IN_THE_DTYPE_OF_THE_IMAGES[name]).parameters)
    n = 2 if name == "p_sample_loop" else n
    for seed in range(5):
        given = [(images8 if i == 0 else randn)(seed + i, 5, 8).to(dtype) for i in range(n)]
        wide = [x.double() for x in given]
        found, want = f(*given), f(*wide)
        assert found.dtype == dtype and want.dtype == F64
        terms = sum(torch.func.jvp(lambda x, i=i: f(*wide[:i], x, *wide[i + 1:]), (wide[i],), (wide[i],))[1].abs()
                    for i in range(n))
        if terms.dim() > 2 or terms.dim() == 1:
            terms = terms.amax(0, keepdim=True) + want.abs().amax(0, keepdim=True)
        least = {torch.float16: 2.0 ** -25}.get(dtype, 0)  # where float16 has no more digits
        assert ((found.double() - want).abs() <= 8 * LOW[dtype] * terms + 8 * least / S.betas[1]).all(), seed


@pytest.mark.parametrize("dtype", LOW)
@given(numbers, st.sampled_from(["fixed_large", "fixed_small"]))
def test_eq05_is_computed_in_double_whatever_the_images_are(dtype, seed, variance):
    """L_T, L_{t−1}, L_0, Eq. 13 and the KL of numbers in 32 or 16 bits are those of the same numbers in
    float64, where the KL is a small difference of large terms.

    Kills: a bound in the dtype of the images (3 % off at t = 999 in float32)."""
    s, t = ddpm.make_schedule(), torch.tensor([1, 2, 999, 1000])
    x0, eps = images8(seed, 4, 8).to(dtype), randn(seed, 4, 8).to(dtype)
    x_t = ddpm.q_sample(s, x0, t, eps)
    p = ddpm.p_mean_variance(Model(s, lambda x, t: (0.9 * eps).to(dtype), variance=variance), x_t, t)
    double = ddpm.Reverse(*(x.double() for x in p))
    for found, want in (
            (ddpm.vlb_term(s, x0, x_t, t, p), ddpm.vlb_term(s, x0.double(), x_t.double(), t, double)),
            (ddpm.prior_kl(s, x0), ddpm.prior_kl(s, x0.double())),
            (ddpm.discretized_gaussian_log_likelihood(x0, p.mean, p.sigma2),
             ddpm.discretized_gaussian_log_likelihood(x0.double(), double.mean, double.sigma2)),
            (ddpm.bits_per_dim(ddpm.prior_kl(s, x0), x0), ddpm.bits_per_dim(ddpm.prior_kl(s, x0), x0.double()))):
        assert found.dtype == F64
        same(found, want, rel=1e-12)


# ------------------------------------------------------------------------------ what is refused

def edges():
    """(name, call, what the error says): tensors that would broadcast, integers, times that wrap."""
    x, t = randn(0, 3, 2), torch.tensor([1, 2, 3])
    s = ddpm.make_schedule(10)
    model, few = Model(s, lambda x, t: 0 * x), x[:1]
    gaussian, whole = Gaussian(x, torch.ones(3, 1)), torch.ones(3, 2, dtype=torch.int64)
    for name, two in (("q_step", ddpm.q_step), ("q_sample", ddpm.q_sample), ("predict_x0_from_eps", ddpm.predict_x0_from_eps),
                      ("predict_eps_from_x0", ddpm.predict_eps_from_x0), ("predict_x0_from_mean", ddpm.predict_x0_from_mean)):
        yield name, lambda two=two: two(s, x, t, few), "same shape"
        yield name, lambda two=two: two(s, x, t, x[:, :1]), "same shape"
        yield name, lambda two=two: two(s, whole, t, x), "floating point"
        yield name, lambda two=two: two(s, x, t[:1], x), "one time per image"
        for bad in (t - 2, t + 8, t.float(), t / 2):
            yield name, lambda two=two, bad=bad: two(s, x, bad, x), ""
    yield "posterior", lambda: ddpm.q_posterior_mean_variance(s, few, x, t), "same shape"
    yield "p_sample", lambda: ddpm.p_sample(gaussian, few), "same shape"
    for out in (few, x[:, :1], x[:, 0], whole):
        for name, call in (("p_mean_variance", lambda m: ddpm.p_mean_variance(m, x, t)),
                           ("loss_simple", lambda m: ddpm.loss_simple(m, x, t, x))):
            yield name, lambda call=call, out=out: call(Model(s, lambda x, t: out)), "same shape"
    for number in (5, [5, 5, 5]):
        yield "q_sample", lambda number=number: ddpm.q_sample(s, x, number, x), "must be a tensor"
    for start in (0, -5, 11, 10 ** 9):
        for name, loop in (("p_sample_loop", ddpm.p_sample_loop), ("ddim_loop", ddpm.ddim_loop)):
            yield name, lambda loop=loop, start=start: list(loop(model, x, lambda t: x, start)), "choose 1 … 10"
        yield "interpolate", lambda start=start: list(ddpm.interpolate(
            model, x, x, torch.zeros(3), start, x, x, lambda t: x)), "choose 1 … 10"
    for name, loop in (("p_sample_loop", ddpm.p_sample_loop), ("ddim_loop", functools.partial(ddpm.ddim_loop, eta=1.0))):
        yield name, lambda loop=loop: list(loop(model, x, lambda t: few)), "same shape"
    for name, call in (("loss_simple", ddpm.loss_simple), ("loss_vlb", ddpm.loss_vlb)):  # t = 0 … T − 1, as others count
        yield name, lambda call=call: call(model, x, t - 1, x), ""
    yield "p_mean_variance", lambda: ddpm.p_mean_variance(model, x, t - 1), ""
    for name, two in (("q_step", ddpm.q_step), ("predict_eps_from_x0", ddpm.predict_eps_from_x0),
                      ("predict_x0_from_mean", ddpm.predict_x0_from_mean), ("posterior", ddpm.q_posterior_mean_variance)):
        yield name, lambda two=two: two(s, x, t - 1, x) if two != ddpm.q_posterior_mean_variance else two(s, x, x, t - 1), ""
    for name, one in (("p_variance", ddpm.p_variance), ("vlb_weight", ddpm.vlb_weight)):
        for variance in ("fixed_small", "fixed_large"):
            yield name, lambda one=one, variance=variance: one(s, t - 1, variance), ""
    learned = lambda c: Model(s, lambda x, t: torch.zeros(3, c), variance="learned")
    for c in (2, 3, 5):
        yield "learned", lambda c=c: ddpm.p_mean_variance(learned(c), x, t), "same shape"
    yield "distortion", lambda: ddpm.distortion(x, x[:, :1]), "same shape"
    yield "interpolate", lambda: list(ddpm.interpolate(model, x, x[:, :1], torch.zeros(3), 5, x, few[:, :1].expand(3, 1),
                                                       lambda t: x)), "same shape"
    yield "receive", lambda: list(ddpm.receive(model, x, lambda t, p: few)), "same shape"
    for name, call in (("q_mean_variance", lambda: ddpm.q_mean_variance(s, whole, t)), ("prior_kl", lambda: ddpm.prior_kl(s, whole)),
                       ("vlb_term", lambda: ddpm.vlb_term(s, whole, x, t, gaussian))):
        yield name, call, "floating point"
    for eta in (-0.5, 1.5, float("nan")):
        yield "ddim_loop", lambda eta=eta: list(ddpm.ddim_loop(model, x, None, eta=eta)), "[0, 1]"
    for times in ([10], [0, 5, 10], [5, 5, 10], [5, 1], [1, 11]):
        yield "respace", lambda times=times: ddpm.respace(s, times), "two times or more"
    for kind in ("linear", "quadratic"):
        yield "make_schedule", lambda kind=kind: ddpm.make_schedule(10, kind, 0.02, 1e-4), "do not fall"


def test_what_would_broadcast_or_wrap_is_refused():
    """Another shape, integers, times that are negative, beyond T or fractions, a start outside 1 … T.

    Kills: t = −1 taken for T, noise of one image for all, one channel for three."""
    for name, call, said in edges():
        with pytest.raises((ValueError, IndexError, RuntimeError)) as refusal:
            call()
        assert said in str(refusal.value), name
    for times in (1.5, [1.0, 5.0, 10.0], "5", torch.tensor([1.0, 10.0])):
        with pytest.raises((TypeError, ValueError)):
            ddpm.respace(ddpm.make_schedule(10), times)


def test_fewer_steps_are_meant_by_their_values():
    """As numbers or times of NumPy or torch, or in any sequence."""
    s, steps = ddpm.make_schedule(10), torch.tensor(4)
    want = ddpm.respace(s, 4)
    for times in (steps, steps.int(), (1, 4, 7, 10), range(1, 11, 3), torch.arange(1, 11, 3)):
        same(ddpm.respace(s, times).betas, want.betas)
    assert ddpm.respace(s, torch.tensor(10)) is s


def test_nan_is_no_likelihood():
    """The L_0, the KL and the bound of a NaN are NaN, not the perfect score of 0 nats."""
    s, x = ddpm.make_schedule(10), torch.full((2, 3), float("nan"), dtype=F64)
    t, p = torch.tensor([1, 5]), Gaussian(torch.zeros(2, 3, dtype=F64), torch.ones(2, 1, dtype=F64))
    assert ddpm.vlb_term(s, x, x, t, p).isnan().all() and ddpm.prior_kl(s, x).isnan().all()
    assert ddpm.discretized_gaussian_log_likelihood(x, *p).isnan().all()
    assert ddpm.discretized_gaussian_log_likelihood(p.mean, x, p.sigma2).isnan().all()


# ------------------------------------------------------------------- §4.3, §4.4: coding, mixing

@given(beta_lists(8), numbers)
def test_alg3_alg4_rate_and_distortion_are_the_bound(betas, seed):
    """rate(t) = L_T + Σ_{s>t} L_{s−1} along the sender's chain; with L_0 it is Eq. 5's sum.

    Kills: a term lost or counted twice, x̂_0 of another time, L_0 inside the rate at t = 1."""
    s, x0 = ddpm.schedule_from_betas(betas), images8(seed, 2, 3)
    noise = {t: randn(seed + t, 2, 3) for t in range(1, s.T + 1)}
    model = Model(s, lambda x, t: 0.3 * x)
    sent = list(ddpm.send(model, x0, noise.get))
    assert [c.t for c in sent] == list(range(s.T, -1, -1))

    paid = ddpm.prior_kl(s, x0)
    for c in sent:
        same(c.rate, paid)
        if c.t:
            p = ddpm.p_mean_variance(model, c.x_t, at(c.t, 2))
            same(c.x0_hat, p.x0_hat, 0, 0)
            paid = paid + ddpm.vlb_term(s, x0, c.x_t, at(c.t, 2), p)
    same(sent[-1].x0_hat, x0, 0, 0)


@pytest.mark.parametrize("choices", CHOICES)
def test_alg3_alg4_the_receiver_has_what_the_sender_codes_with(choices):
    """The receiver, given only what is sent, holds the sender's x_t and x̂_0 to the bit, and decodes
    each x_t with the p_θ(x_t | x_{t+1}) whose divergence the sender accounts for.

    Kills: choices that one side loses, p of another time, an x_t that is not the decoder's."""
    s, x0, model = ddpm.make_schedule(10), images8(3, 2, 3), lambda x, t: 0.3 * x
    noise, calls = {t: randn(t, 2, 3) for t in range(1, 11)}, []
    sent = {c.t: c for c in ddpm.send(Model(s, model, **choices), x0, noise.get)}

    def decode(t, p):
        calls.append(t)
        mean, sigma2, _ = step_by_hand(s, t + 1, sent[t + 1].x_t, model(sent[t + 1].x_t, None),
                                       **choices)
        same(p.mean, mean, 1e-8)
        if t:
            same(p.sigma2, sigma2)
            q, variance = conditioned(s, t + 1, x0, sent[t + 1].x_t)
            same(sent[t].x_t, q + math.sqrt(variance) * noise[t], 1e-8)
            ratio = mean_log_ratio((q, torch.tensor(variance, dtype=F64)), (p.mean, p.sigma2))
            same(sent[t].rate - sent[t + 1].rate, ratio.sum(1), 1e-6, 1e-9)
        else:                                              # L_0, where σ_1² is β̃_2
            sigma = math.sqrt(conditioned(s, 2, 0, 0)[1])
            same(sent[0].rate - sent[1].rate, [-sum(
                log_bin_of(round((x + 1) * 127.5), m, sigma) for x, m in zip(*pair))
                for pair in zip(x0.tolist(), mean.tolist())], 1e-6, 1e-9)
        return sent[t].x_t
    received = list(ddpm.receive(Model(s, model, **choices), sent[10].x_t, decode))
    assert calls == list(range(9, -1, -1)) and [r.t for r in received] == list(range(10, -1, -1))
    for r in received:
        assert torch.equal(r.x_t, sent[r.t].x_t) and torch.equal(r.x0_hat, sent[r.t].x0_hat)
    same(sent[10].rate, ddpm.prior_kl(s, x0))


@given(beta_lists(8), st.integers(0, 255))
def test_alg3_the_senders_chain_has_the_marginals_of_eq04(betas, k):
    """x_T, then each x_{t−1} from q(x_{t−1} | x_t, x_0): every x_t ~ N(√ᾱ_t x_0, 1 − ᾱ_t).

    Kills: a sample drawn as μ + σ² ε, the posterior at another t, fresh noise added twice."""
    s, pixel = ddpm.schedule_from_betas(betas), k / 127.5 - 1
    for t in range(1, s.T + 1):
        def run(draws):
            x0 = torch.full((len(draws), 1), pixel, dtype=F64)
            chain = ddpm.send(Model(s, lambda x, u: 0 * x), x0, lambda u: draws[:, u - 1:u])
            return next(c.x_t for c in chain if c.t == t)[:, 0]
        mean, variance = affine(run, s.T)
        a, v = iterated(s, t)
        same([mean, variance], [a * pixel, v], 1e-8, 1e-10)


def test_sec43_distortion():
    """RMSE in pixel values: errors of 3 and −4 levels make √((9 + 16)/2), in each image alone.

    Kills: a mean absolute error (3.5), a sum of squares (5), a mean over images."""
    x0 = images8(0, 2, 3, 4, 4)
    levels = torch.tensor([3.0, -4.0], dtype=F64).repeat(24).view(1, 3, 4, 4)
    same(ddpm.distortion(x0, x0 + torch.cat([levels, 2 * levels]) / 127.5), [12.5 ** 0.5, 50 ** 0.5])


@given(st.integers(1, 12), st.floats(0, 1), numbers)
def test_sec44_interpolation(t, lam, seed):
    """x̄_t = (1 − λ) x_t + λ x'_t is what the network sees first, at that same t; then Algorithm 2,
    or the loop that is asked for.

    Kills: encoded at t and decoded from t − 1, images mixed instead of latents, λ exchanged, a
    loop or its η that gets lost."""
    s = ddpm.make_schedule(12)
    x0, other, eps, eps_other = (randn(seed + i, 2, 3) for i in range(4))
    z, lams = {u: randn(seed + 4 + u, 2, 3) for u in range(13)}, torch.full((2,), lam, dtype=F64)
    a, v = iterated(s, t)
    seen = []

    def model(x, u):
        seen.append((int(u[0]), x))
        return 0.1 * x

    list(ddpm.interpolate(Model(s, model), x0, other, lams, t, eps, eps_other, z.get))
    mixed = ((1 - lam) * (a * x0 + math.sqrt(v) * eps)
             + lam * (a * other + math.sqrt(v) * eps_other))
    assert [u for u, _ in seen] == list(range(t, 0, -1))
    same(seen[0][1], mixed, 1e-9, 1e-9)
    for loop in (None, ddpm.ddim_loop, functools.partial(ddpm.ddim_loop, eta=0.5)):
        for choices in CHOICES:
            chosen = Model(s, model, **choices)
            states = list(ddpm.interpolate(chosen, x0, other, lams, t, eps, eps_other, z.get,
                                           **({"loop": loop} if loop else {})))
            same(states[0].x_t, mixed, 1e-9, 1e-9)
            same_states(states, list((loop or ddpm.p_sample_loop)(
                chosen, states[0].x_t, z.get, start=t)))

    asked = []                                             # z at t, …, 2, and none at t = 1
    list(ddpm.interpolate(Model(s, model), x0, other, torch.zeros(2), t, eps, eps_other,
                          lambda u: asked.append(u) or z[u]))
    assert asked == list(range(t, 1, -1))
