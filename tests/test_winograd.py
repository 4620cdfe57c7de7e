"""Convolutions by Winograd's algorithm are convolutions: their values, their gradients, and where they are used."""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import ddpm
from helpers import CPU
from support import winograd
from support.checkpoint import inference_model
from unet import UNet

sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))


def case(n, c, k, h, w, seed, dtype=torch.float64):
    """x (n, c, 4h, 4w), weight, bias, and a gradient of the result."""
    g = torch.Generator().manual_seed(seed)
    shapes = (n, c, 4 * h, 4 * w), (k, c, 3, 3), (k,), (n, k, 4 * h, 4 * w)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@given(sizes)
@settings(max_examples=30)
def test_it_is_the_convolution(size):
    """y = Σ over channels and 3×3 offsets, for images of any shape, in any memory format and number of images.

    Kills: a wrong entry of a transform, tiles in another order, a border that is not 0."""
    x, weight, bias, _ = case(*size)
    want = F.conv2d(x, weight, bias, padding=1)
    for one in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(winograd.Winograd.apply(one, weight, bias), want, rtol=1e-12, atol=1e-12)


def test_the_parts_of_a_batch_are_joined():
    """More images than fit at a time, and images larger than that."""
    for size in ((11, 2, 3, 4, 4), (3, 2, 3, 13, 13)):
        x, weight, bias, dy = case(*size, seed=1)
        assert len(list(winograd.inputs(x.permute(0, 2, 3, 1)))) > 1
        x.requires_grad_(), weight.requires_grad_()
        grads = [torch.autograd.grad(y, (x, weight), dy) for y in (
            F.conv2d(x, weight, bias, padding=1), winograd.Winograd.apply(x, weight, bias))]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_its_gradients_are_those_of_finite_differences():
    """Of the images, the weights and the bias."""
    for size in ((2, 2, 3, 1, 2), (1, 3, 1, 2, 1)):
        x, weight, bias, _ = case(*size, seed=2)
        torch.autograd.gradcheck(winograd.Winograd.apply, [z.requires_grad_() for z in (x, weight, bias)])


def test_a_second_derivative_is_refused():
    """It would lack the part of the weights."""
    x, weight, bias, dy = case(1, 2, 3, 1, 1, seed=4)
    y = winograd.Winograd.apply(x.requires_grad_(), weight.requires_grad_(), bias)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(y, x, dy, create_graph=True)


def test_its_rounding_in_float32():
    """With 256 channels the root mean square of the error is below 1e-5 of that of the result."""
    x, weight, bias, dy = case(2, 256, 128, 4, 4, seed=3)
    exact = F.conv2d(x, weight, bias, padding=1)
    found = winograd.Winograd.apply(x.float(), weight.float(), bias.float())
    assert ((found - exact).square().mean() / exact.square().mean()).sqrt() < 1e-5
    assert found.is_contiguous(memory_format=torch.channels_last)


def ways(net, x, t, training: bool = False) -> set:
    """Which convolutions compute by the algorithm, in training or not: their names."""
    used, hooks = set(), []
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            hooks.append(conv.register_forward_hook(
                lambda conv, given, out, name=name: used.add(name) if not torch.equal(
                    out, F.conv2d(given[0], conv.weight, conv.bias, conv.stride, conv.padding)) else None))
    with torch.set_grad_enabled(training):
        net(x, t)
    for hook in hooks:
        hook.remove()
    return used


def network():
    torch.manual_seed(0)
    net = UNet(channels=64, multipliers=(1, 2, 2), blocks=1, attention=(), dropout=0.0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    return net.eval()


def test_where_it_is_used():
    """With 128 channels or more in and out, at 16×16 or more, in float32; neither in float64, in 16 bits nor under
    autocast, and not otherwise for more images."""
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([1, 5, 9])
    net = CPU.placed(network())
    used = ways(net, x, t)
    assert used == ways(net, x[:1], t[:1]) and used
    for name, conv in net.named_modules():
        if name in used:
            assert min(conv.in_channels, conv.out_channels) >= 128 and conv.kernel_size == (3, 3) and conv.stride == (1, 1)
    assert not {name for name in used if name.startswith("middle")}  # 8×8
    assert {"down.2.conv2"} <= used and "conv_in" not in used
    more = ways(net, x, t, True)  # in training at 8×8, too
    assert more == ways(net, x[:1], t[:1], True) and more - used == {
        name for name, conv in net.named_modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
        and name.split(".")[0] == "middle"} | {"down.4.conv1", "down.4.conv2", "up.0.conv1", "up.0.conv2", "up.1.conv1", "up.1.conv2"}
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x, t)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(network().to(memory_format=torch.channels_last)(x, t), before)
    assert torch.equal(net.double()(x.double(), t), network().double().to(memory_format=torch.channels_last)(x.double(), t))


def test_a_network_is_the_same_with_it():
    """Output and gradients to rounding; the names of the weights, and copies."""
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 5])
    slow, fast = network(), winograd.fast(network())
    assert slow.state_dict().keys() == fast.state_dict().keys()
    outs = [net(x, t) for net in (slow, fast, copy.deepcopy(fast))]
    grads = [torch.autograd.grad(out.square().mean(), list(net.parameters())) for out, net in zip(outs, (slow, fast))]
    for one, two in zip((outs[0], *grads[0]), (outs[1], *grads[1])):  # some gradients are 0 but for rounding
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * max(one.abs().max().item(), 1e-6))
    assert torch.equal(outs[1], outs[2])


@pytest.mark.parametrize("inference", [False, True])
def test_new_weights_have_new_filters(inference):
    """The filters of sampling are kept as long as the weights stay what they are. Kills: the filters of older weights."""
    x, t, other = torch.randn(1, 3, 32, 32), torch.tensor([1]), network()
    with torch.inference_mode(inference):
        net = CPU.placed(network())
        with torch.no_grad():
            first, second = net(x, t), net(x, t)
            assert torch.equal(first, second)
            net.load_state_dict({name: 1.1 * value for name, value in other.state_dict().items()})
            third = net(x, t)
            plain = network()
            plain.load_state_dict(net.state_dict())
            torch.testing.assert_close(third, plain(x, t), rtol=1e-3, atol=1e-4 * third.abs().max().item())
            assert not torch.equal(first, third)


def test_the_filters_of_sampling_are_those_of_now():
    """The copy that sampling uses keeps its filters from call to call, and takes new ones of the network's weights
    whenever it is asked for, in whatever way these were changed. Kills: the filters of older weights."""
    x, t, trained = torch.randn(1, 3, 32, 32), torch.tensor([1]), CPU.placed(network())
    with torch.no_grad():
        for change in (lambda p: p.mul_(1.1), lambda p: p.data.mul_(1.1), lambda p: setattr(p, "data", 1.1 * p.data)):
            net = inference_model(ddpm.Model(ddpm.make_schedule(), trained), CPU).net
            assert torch.equal(net(x, t), net(x, t))
            trained(x, t)
            before = net(x, t)
            for p in trained.parameters():
                change(p)
            plain = network()
            plain.load_state_dict(trained.state_dict())
            for now in (inference_model(ddpm.Model(ddpm.make_schedule(), trained), CPU).net, trained):
                torch.testing.assert_close(now(x, t), plain(x, t), rtol=1e-3, atol=1e-4 * before.abs().max().item())
                assert not torch.allclose(now(x, t), before, rtol=1e-2)


def test_samples_of_an_image_alone_and_among_others():
    """Image i is the same in any batch, up to the rounding of the network."""
    net, x = CPU.placed(network()), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        whole = ddpm.predict_x0(ddpm.Model(ddpm.make_schedule(), net), x, torch.full((5,), 500))[0]
        alone = ddpm.predict_x0(ddpm.Model(ddpm.make_schedule(), net), x[3:4], torch.full((1,), 500))[0]
    torch.testing.assert_close(whole[3:4], alone, rtol=1e-3, atol=1e-4)
