"""labml-nn behind the judge's interface: DenoiseDiffusion and the Sampler of its evaluation.

The library's timestep is t − 1 and its images are (B, C, H, W). torch.linspace gives the β that are
judged while its tables are built, torch.randn, torch.randn_like and torch.randint the noise and t.
It has no likelihood, no KL, and no list of times (its DDIM is for another model, Stable Diffusion).
"""
import sys
from unittest import mock

import torch

_vision = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
sys.modules |= dict.fromkeys(_vision, mock.Mock())  # only its pictures need it
from labml_nn.diffusion.ddpm import DenoiseDiffusion, gather
from labml_nn.diffusion.ddpm.evaluate import Sampler

_image = lambda x: x[:, :, None, None]


def _network(s, model):
    s.shown, s.diffusion.eps_model = [], lambda x, u: (
        s.shown.append(u[0].item() + 1) or _image(model(x[..., 0, 0], u + 1)))
    return s.diffusion


def schedule(betas):
    betas = torch.tensor(betas, dtype=torch.float64)
    with mock.patch.object(torch, "linspace", lambda *_: betas):
        diffusion = DenoiseDiffusion(eps_model=None, n_steps=len(betas), device=None)
    return Sampler(diffusion, image_channels=5, image_size=1, device=None)


q_sample = lambda s, x0, t, eps: s.diffusion.q_sample(_image(x0), t - 1, _image(eps))[..., 0, 0]
predict_x0 = lambda s, x_t, t, eps: s.p_x0(_image(x_t), t - 1, _image(eps))[..., 0, 0]


def q_posterior(s, x0, x_t, t):  # it has the terms' coefficients in tables, and no sum of them
    first, second, variance = (gather(table, t - 1)[..., 0, 0] for table in (
        s.mu_tilde_coef1, s.mu_tilde_coef2, s.beta_tilde))
    return first * x0 + second * x_t, variance


def p_mean_variance(s, model, x_t, t):
    nil, drawn = torch.zeros_like(x_t), []
    for network, x, z in ((model, x_t, nil), (lambda x, t: nil, nil, nil + 1)):
        with mock.patch.object(torch, "randn", lambda *_, z=z, **__: _image(z)):
            drawn.append(_network(s, network).p_sample(_image(x), t - 1)[..., 0, 0])
    return drawn[0], drawn[1] ** 2


def loss(s, model, x0, t, eps):  # it draws t itself, and its mean is over the batch too
    def of(rows, network):
        with mock.patch.object(torch, "randint", lambda *_, **__: t[rows] - 1):
            return _network(s, network).loss(_image(x0[rows]), _image(eps[rows]))
    out = []
    of(slice(None), lambda x, u: out.append(model(x, u)) or out[0])
    return torch.stack([of([i], lambda x, u, i=i: out[0][[i]]) for i in range(len(t))])


def sample(s, model, x_T, noise):
    _network(s, model)
    s.image_channels, images, draws = x_T.shape[1], [], [x_T]
    s.show_image = images.append
    with mock.patch.object(torch, "randn", lambda *_, **__: _image(
            draws.pop() if draws else noise(s.shown[-1]))):
        s.sample(len(x_T))
    return torch.stack(images)[..., 0, 0]


def interpolate(s, model, x0, other, lam, t, eps, eps_other, noise):
    _network(s, model)
    draws = [eps_other, eps]
    with mock.patch.multiple(torch, randn_like=lambda _: _image(draws.pop()),
                             randn=lambda *_, **__: _image(noise(s.shown[-1]))):
        return s.interpolate(_image(x0), _image(other), _image(lam[:, None]), t - 1)[..., 0, 0]
