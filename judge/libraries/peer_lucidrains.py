"""denoising-diffusion-pytorch behind the judge's interface: GaussianDiffusion with pred_noise.

The library's timestep is t − 1 and its images are (B, C, H, W). linear_beta_schedule and
torch.linspace give the β and the times that are judged, torch.randn and torch.randn_like the
noise; torch.float32 means float64 while tables are built. Fewer steps are its DDIM with η = 1.
"""
import math
import sys
import types
from unittest import mock

import torch

sys.modules["torchvision"] = mock.Mock()  # only its pictures need it
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as _plain
from denoising_diffusion_pytorch import learned_gaussian_diffusion as _learned

NOTES = dict.fromkeys(["eq13_each_bin_is_an_integral", "eq13_the_outermost_bins_are_open"], (
    "choice", "The normal distribution function is a tanh, “approx_standard_normal_cdf”.")) | {
        "eq05_the_last_term": ("convention", "σ_1² is β̃_1 = 0, floored at 10⁻²⁰.")}
_image = lambda x: x[:, :, None, None]
_flat = lambda mean, variance, *_: (mean[..., 0, 0], variance[:, 0, 0, 0])

def _network(s, model, then=lambda eps: eps):
    s.shown, s.model = [], lambda x, u, *_: (
        s.shown.append(u[0].item() + 1) or then(_image(model(x[..., 0, 0], u + 1))))
    return s


def schedule(betas, kind=_plain.GaussianDiffusion, channels=1, **settings):
    shape = types.SimpleNamespace(channels=1, out_dim=channels, self_condition=False)
    betas = torch.as_tensor(betas, dtype=torch.float64)
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(
            _plain, "linear_beta_schedule", lambda timesteps: betas):
        return kind(shape, image_size=1, timesteps=len(betas), objective="pred_noise",
                    beta_schedule="linear", auto_normalize=False, **settings)


q_sample = lambda s, x0, t, eps: s.q_sample(_image(x0), t - 1, _image(eps))[..., 0, 0]
q_posterior = lambda s, x0, x_t, t: _flat(*s.q_posterior(_image(x0), _image(x_t), t - 1))
predict_x0 = lambda s, x, t, e: s.predict_start_from_noise(_image(x), t - 1, _image(e))[..., 0, 0]
p_mean_variance = lambda s, model, x_t, t: _flat(
    *_network(s, model).p_mean_variance(_image(x_t), t - 1))
loss = lambda s, model, x0, t, eps: _network(s, model).p_losses(
    _image(x0), t - 1, _image(eps), loss_reduction="none")
log_likelihood = lambda x0, mean, variance: _learned.discretized_gaussian_log_likelihood(
    x0, means=mean, log_scales=variance.log() / 2)
kl = lambda mean_q, variance_q, mean_p, variance_p: _learned.normal_kl(
    mean_q, variance_q.log(), mean_p, variance_p.log())


def vlb_term(s, model, x0, x_t, t):  # a part of its loss, in bits for each dimension there
    learned = schedule(s.betas, _learned.LearnedGaussianDiffusion, channels=2, vb_loss_weight=1.0)
    _network(learned, model, lambda eps: torch.cat([eps, 0 * eps - 1], 1))
    eps = s.predict_noise_from_start(_image(x_t), t - 1, _image(x0))
    total = learned.p_losses(_image(x0), t - 1, eps, loss_reduction="none")
    return (total - loss(s, model, x0, t, eps[..., 0, 0])) * x0.shape[1] * math.log(2)


def sample(s, model, x_T, noise, eta=1.0):
    times, x = getattr(s, "times", torch.arange(-1, s.num_timesteps)), _image(x_T)
    _network(s, model).ddim_sampling_eta = eta
    with mock.patch.multiple(torch, randn=lambda *_, **__: x, linspace=lambda *_, **__: times,
                             randn_like=lambda _: _image(noise(len(times) - len(s.shown)))):
        return (s.ddim_sample if hasattr(s, "times") else s.p_sample_loop)(x.shape)[..., 0, 0]

ddim = sample


def respaced(s, times):
    s = schedule(s.betas, sampling_timesteps=len(times))
    s.times = torch.tensor([0, *times]) - 1
    return s


def interpolate(s, model, x0, other, lam, t, eps, eps_other, noise):
    draws, _ = [eps_other, eps], _network(s, model)
    with mock.patch.object(torch, "randn_like", lambda _: _image(
            noise(s.shown[-1]) if s.shown else draws.pop())):
        return s.interpolate(_image(x0), _image(other), t - 1, _image(lam[:, None]))[..., 0, 0]
