"""The network of the released code: its size, its wiring, and the mistakes that its shape hides."""
import pytest
import torch

import unet

SMALL = dict(channels=64, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8)


def randomised(**settings) -> unet.UNet:
    """A small network with every parameter random: at its initialisation half of it is silent."""
    net = unet.UNet(**{**SMALL, **settings})
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.5))
    return net


@pytest.mark.parametrize("settings, number", [({}, 35_746_307), (unet.SETTINGS_256, 113_673_219)])
def test_appendix_b_parameter_counts(settings, number):
    """CIFAR-10's network has 35.7 million parameters, the 256×256 one 114 million."""
    with torch.device("meta"):
        assert sum(p.numel() for p in unet.UNet(**settings).parameters()) == number


def test_every_parameter_matters():
    """Every gradient is non-zero, but those of the keys' biases, which the softmax cancels.

    Kills: an unused normalisation layer, a block that never sees t, a skip that is not consumed."""
    net, g = randomised().eval(), torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 3, 8, 8, generator=g), torch.tensor([1, 500, 1000])
    net(x, t).square().mean().backward()
    for name, p in net.named_parameters():
        if name.endswith("attention.k.bias"):
            assert p.grad.abs().max() < 1e-7, name
        else:
            assert p.grad.abs().max() > 1e-5, name


def test_first_output_is_zero():
    """The last layer of each branch, and of the network, begins at 0; all other layers do not."""
    net = unet.UNet(**SMALL)
    assert net(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).abs().max() == 0
    block = net.down[0]
    x, emb = torch.randn(1, 64, 8, 8), torch.randn(1, 256)
    assert torch.equal(block(x, emb), x)
    assert block.conv1.weight.abs().max() > 0
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5                       # uniform, variance 1/fan_avg
    assert 0.98 * bound < block.conv1.weight.abs().max() <= bound


def test_softmax_is_over_the_keys():
    """If every value is the same, so is what attention returns, whatever the queries.

    Kills: attention's softmax over the wrong axis, no scale C^(−1/2)."""
    attention = unet.Attention(32).eval()
    torch.nn.init.normal_(attention.out.weight)
    torch.nn.init.zeros_(attention.v.weight)
    torch.nn.init.normal_(attention.v.bias)
    x = torch.randn(2, 32, 4, 4)
    added = attention(x) - x
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-5)

    # Two pixels by hand: the weights of query i are softmax_j(q_i · k_j / √C).
    torch.nn.init.normal_(attention.v.weight)
    x = torch.randn(1, 32, 1, 2)
    h = attention.norm(x)
    q, k, v = (f(h)[0, :, 0].T for f in (attention.q, attention.k, attention.v))
    mixed = torch.stack([sum(w * v[j] for j, w in enumerate(torch.softmax(
        torch.stack([q[i] @ k[j] for j in range(2)]) / 32 ** 0.5, 0))) for i in range(2)])
    want = x + attention.out(mixed.T[None, :, None])
    torch.testing.assert_close(attention(x), want, rtol=1e-5, atol=1e-5)


def test_time_1_is_embedded_as_0():
    """Released checkpoints count from 0: t = 1 is sin 0, cos 0; frequencies run from 1 to 10⁻⁴.

    Kills: t embedded without the shift, sines and cosines exchanged, i/half for i/(half − 1)."""
    e = unet.time_embedding(torch.tensor([1, 2]), 128)
    assert torch.equal(e[0], torch.cat([torch.zeros(64), torch.ones(64)]))
    angle = torch.tensor([1.0, 1e-4])
    torch.testing.assert_close(e[1, [0, 63]], angle.sin())
    torch.testing.assert_close(e[1, [64, 127]], angle.cos())


def test_downsampling_pads_right_and_below():
    """TensorFlow's SAME padding: the first output sees pixels 0 … 2, the last one zeros beyond
    7."""
    layer = unet.Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    y = layer(torch.arange(64.0).view(1, 1, 8, 8), None)
    assert y.shape == (1, 1, 4, 4)
    assert y[0, 0, 0, 0] == sum(8 * r + c for r in range(3) for c in range(3))
    assert y[0, 0, 3, 3] == 54 + 55 + 62 + 63


def test_dropout_drops_a_tenth_and_is_off_when_sampling():
    """E dropout(x) = x, p of the elements are 0, none in evaluation; the CPU's own form of it.

    Kills: dropout on while sampling, the scale 1/(1 − p) forgotten."""
    torch.manual_seed(0)
    layer, x = unet.Dropout(0.1), torch.ones(4, 32, 33, 31)
    y = layer(x)
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - 0.1) < 5 * (0.09 / x.numel()) ** 0.5
    assert abs(y.max().item() - 1 / 0.9) < 1e-4 and abs(y.double().mean() - 1) < 0.005
    assert torch.equal(layer.eval()(x), x)
    pairs = (y[:, :, :, 1:] == 0) & (y[:, :, :, :-1] == 0)       # neighbours are independent
    assert abs(pairs.double().mean() - 0.01) < 0.001


def test_dropout_is_before_the_second_convolution_of_every_block():
    """What the second convolution sees is SiLU(norm(h)), a part of it 0 and the rest scaled; its
    output is added to the shortcut as it is. The blocks drop with the probability of the network.

    Kills: dropout before the norm, after the convolution, on the shortcut, in some blocks only."""
    net, seen, made = randomised(dropout=0.25), {}, {}
    blocks = [m for m in net.modules() if isinstance(m, unet.Block)]
    assert len(blocks) == 8
    for block in blocks:
        block.norm2.register_forward_hook(lambda _, __, y, b=block: seen.update({(b, "norm"): y}))
        block.conv2.register_forward_hook(lambda _, x, y, b=block: (
            seen.update({(b, "conv"): x[0]}) or made.update({(b, "conv"): y})))
        block.attention.register_forward_pre_hook(lambda _, x, b=block: made.update({(b, "sum"): x[0]}))
        block.shortcut.register_forward_hook(lambda _, x, y, b=block: made.update({(b, "short"): y}))
    torch.manual_seed(0)
    net.train()(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))
    for block in blocks:
        whole, part = torch.nn.functional.silu(seen[block, "norm"]), seen[block, "conv"]
        dropped = part == 0
        assert abs(dropped.double().mean() - 0.25) < 5 * (0.1875 / part.numel()) ** 0.5
        torch.testing.assert_close(part[~dropped], whole[~dropped] / 0.75, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(made[block, "sum"], made[block, "short"] + made[block, "conv"])


def test_attention_levels_follow_the_configured_size():
    """16×16 of a 32×32 network is its second level, also for images of another size."""
    net = unet.UNet(channels=32)
    attends = [isinstance(m.attention, unet.Attention) for m in net.down if isinstance(m, unet.Block)]
    assert attends == [False, False, True, True, False, False, False, False]
    attends = [isinstance(m.attention, unet.Attention) for m in net.up if isinstance(m, unet.Block)]
    assert attends == [False] * 6 + [True] * 3 + [False] * 3
    assert [isinstance(m.attention, unet.Attention) for m in net.middle] == [True, False]
    x = torch.randn(1, 3, 16, 24)
    assert unet.UNet(**SMALL)(x, torch.tensor([3])).shape == x.shape


def test_what_cannot_be_built_or_halved():
    """Sides not divisible by 2^(levels − 1), channels not by 32: ValueError in words."""
    with pytest.raises(ValueError, match="divisible by 2"):
        unet.UNet(**SMALL)(torch.zeros(1, 3, 9, 8), torch.tensor([1]))
    with pytest.raises(ValueError, match="multiple of 32"):
        unet.UNet(channels=48)


def test_bfloat16_is_close_to_float32():
    """Under autocast the output differs from float32's by bfloat16's rounding only."""
    net = randomised().eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([7, 900])
    with torch.no_grad():
        full = net(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, t).float()
    assert (half - full).norm() / full.norm() < 0.03
