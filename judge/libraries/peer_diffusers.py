"""diffusers behind the judge's interface: DDPMScheduler and DDIMScheduler with their defaults.

The library's timestep is t − 1, and its noise comes from torch.randn, which is replaced during a
step. It builds its tables in float32; torch.float32 means float64 while it does, so that its
formulas are judged, not its rounding. It has no loss, no likelihood and no interpolation.
"""
from unittest import mock

import torch
from diffusers import DDIMScheduler, DDPMScheduler


def _scheduler(config, kind=DDPMScheduler, **settings):
    with mock.patch.object(torch, "float32", torch.float64):
        return kind.from_config(config, **settings)


def _rows(step, t, z):
    with mock.patch.object(torch, "randn", lambda *_, **__: z):
        return torch.cat([step(u.item(), slice(i, i + 1)) for i, u in enumerate(t - 1)])


def schedule(betas):
    return _scheduler({"num_train_timesteps": len(betas), "trained_betas": list(betas)})


def q_sample(s, x0, t, eps):
    return s.add_noise(x0, eps, t - 1)


def q_posterior(s, x0, x_t, t):
    s = _scheduler(s.config, prediction_type="sample", clip_sample=False)
    return p_mean_variance(s, lambda x, t: x0, x_t, t)


def predict_x0(s, x_t, t, eps):
    s = _scheduler(s.config, clip_sample=False)
    return _rows(lambda u, i: s.step(eps[i], u, x_t[i]).pred_original_sample, t, eps[:1])


def p_mean_variance(s, model, x_t, t):
    out, nil = model(x_t, t), torch.zeros_like(x_t)
    return (_rows(lambda u, i: s.step(out[i], u, x_t[i]).prev_sample, t, nil[:1]),
            _rows(lambda u, i: s.step(nil[i], u, nil[i]).prev_sample, t, nil[:1] + 1) ** 2)


def sample(s, model, x_T, noise):
    x = x_T
    for i, u in zip(range(len(s.timesteps), 0, -1), s.timesteps):
        with mock.patch.object(torch, "randn", lambda *_, i=i, **__: noise(i)):
            x = s.step(model(x, torch.full((len(x),), u + 1)), u, x).prev_sample
    return x


def respaced(s, times):
    s = _scheduler(s.config)
    s.set_timesteps(timesteps=[t - 1 for t in reversed(times)])
    return s


def ddim(s, model, x_T, noise, eta):
    for spacing in ("leading", "trailing", "linspace"):  # the lists of times that it has
        d, x = _scheduler(s.config, DDIMScheduler, timestep_spacing=spacing), x_T
        d.set_timesteps(len(s.timesteps))
        if d.timesteps.equal(s.timesteps):
            break
    for i, u in zip(range(len(d.timesteps), 0, -1), d.timesteps):
        out = model(x, torch.full((len(x),), u + 1))
        x = d.step(out, u, x, eta=eta, variance_noise=noise(i)).prev_sample
    return x
