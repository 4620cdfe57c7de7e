"""MONAI behind the judge's interface: its two schedulers and DiffusionInferer, with defaults.

The library's timestep is t − 1, and its noise comes from torch.randn, which is replaced during a
step. NoiseSchedules takes β in double precision. It has no loss, no KL and no interpolation.
"""
from unittest import mock

import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, NoiseSchedules

NOTES = dict.fromkeys(["eq13_each_bin_is_an_integral", "eq13_the_outermost_bins_are_open"], (
    "choice", "The normal distribution function is a tanh, “a fast approximation”.")) | {
        "eq05_the_last_term": ("convention", "σ_1² is β̃_1 = 0, floored at 10⁻²⁰.")}
NoiseSchedules.add_def("given", "β as they are given")(
    lambda num_train_timesteps, betas: torch.tensor(betas, dtype=torch.float64))


def _rows(step, t, z=None):
    with mock.patch.object(torch, "randn", lambda *_, **__: z):
        return torch.cat([step(u.item(), slice(i, i + 1)) for i, u in enumerate(t - 1)])


def _likelihood(s, x0, network):
    return DiffusionInferer(s).get_likelihood(
        x0, lambda x, timesteps, context: network(x, timesteps + 1), scaled_input_range=(-1, 1),
        save_intermediates=True, verbose=False)[1][0]


def schedule(betas, kind=DDPMScheduler, **settings):
    return kind(len(betas), schedule="given", betas=[*map(float, betas)], **settings)


q_sample = lambda s, x0, t, eps: s.add_noise(x0, eps, t - 1)
q_posterior = lambda s, x0, x_t, t: p_mean_variance(
    schedule(s.betas, prediction_type="sample", clip_sample=False), lambda x, t: x0, x_t, t)
respaced = lambda s, times: s.set_timesteps(len(times)) or s  # which times, it says itself


def predict_x0(s, x_t, t, eps):
    s = schedule(s.betas, clip_sample=False)
    return _rows(lambda u, i: s.step(eps[i], u, x_t[i])[1], t, eps[:1])


def p_mean_variance(s, model, x_t, t):
    out, nil = model(x_t, t), torch.zeros_like(x_t)
    return (_rows(lambda u, i: s.step(out[i], u, x_t[i])[0], t, nil[:1]),
            _rows(lambda u, i: s.step(nil[i], u, nil[i])[0], t, nil[:1] + 1) ** 2)


def sample(s, model, x_T, noise):
    left = iter(range(len(s.timesteps), 0, -1))
    with mock.patch.object(torch, "randn", lambda *_, **__: noise(next(left))):
        return DiffusionInferer(s).sample(x_T, lambda x, timesteps, context: model(
            x, timesteps.long().expand(len(x)) + 1), verbose=False)


def log_likelihood(x0, mean, variance):
    def one(x, m, v):  # at timestep 0 the mean is the predicted x_0, and the variance is β_1
        s = schedule([v], variance_type="fixed_large", prediction_type="sample", clip_sample=False)
        return -_likelihood(s, x[None, None], lambda x, t: m[None, None])
    return torch.cat([*map(one, x0.flatten(), mean.flatten(), variance.flatten())]).view_as(x0)


def vlb_term(s, model, x0, x_t, t):
    def one(u, i):
        a, s.timesteps = s.alphas_cumprod[u], torch.tensor([u])
        eps = (x_t[i] - a ** 0.5 * x0[i]) / (1 - a) ** 0.5
        with mock.patch.object(torch, "randn_like", lambda _: eps):
            return _likelihood(s, x0[i], model).sum(1)
    return _rows(one, t)


def ddim(s, model, x_T, noise, eta):
    d, x, left = schedule(s.betas, DDIMScheduler), x_T, iter(range(len(s.timesteps), 0, -1))
    d.set_timesteps(len(s.timesteps))
    with mock.patch.object(torch, "randn", lambda *_, **__: noise(next(left))):
        for u in d.timesteps:
            x = d.step(model(x, torch.full((len(x),), u + 1)), u, x, eta=eta)[0]
    return x
