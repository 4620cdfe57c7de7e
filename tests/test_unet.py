"""The network of the released code: its size, its wiring, and the mistakes that its shape hides."""
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import ddpm
import unet
from extras import weights
from helpers import (CONFIG, GOLDEN, HERE, TINY, assert_equal, assert_same_log, checkpoint, layout, losses, outputs,
                     read_png, state)
from support.checkpoint import inference_model
from support.machine import Machine

SMALL = dict(channels=64, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8)
LARGE = dict(image_size=256, multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)


def randomised(**settings) -> unet.UNet:
    """A small network with every parameter random: at its initialisation half of it is silent."""
    net = unet.UNet(**{**SMALL, **settings})
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.5))
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_compiler_sees_one_graph(training, dtype):
    """Nothing breaks the graph of the network, with dropout in training or cast for sampling."""
    machine, net = Machine(torch.device("cpu"), dtype), randomised().train(training)
    model = machine.network(net) if training else inference_model(ddpm.Model(ddpm.make_schedule(), net), machine).net
    with torch.set_grad_enabled(training):
        seen = torch._dynamo.explain(model)(torch.zeros(2, 3, 8, 8), torch.tensor([7, 900]))
    assert (seen.graph_count, seen.graph_break_count) == (1, 0) and seen.op_count > 100


@pytest.mark.parametrize("settings, number", [({}, 35_746_307), (LARGE, 113_673_219)])
def test_appendix_b_parameter_counts(settings, number):
    """CIFAR-10's network has 35.7 million parameters, the 256×256 one 114 million."""
    with torch.device("meta"):
        assert sum(p.numel() for p in unet.UNet(**settings).parameters()) == number


@pytest.mark.parametrize("variance, times", [("fixed_large", 1), ("fixed_small", 1),
                                             ("learned", 2)])
@pytest.mark.parametrize("channels_of_image", [1, 3])
def test_table2_a_learned_variance_doubles_the_output_channels(variance, times, channels_of_image):
    """Every setting of a run reaches its network, which has C output channels, or 2C if they hold
    log σ² too.

    Kills: settings exchanged or lost on the way, twice the input channels."""
    settings = dict(in_channels=channels_of_image, variance=variance, channels=32,
                    multipliers=[1, 3, 2], blocks=2, attention=[6], image_size=12, dropout=0.25)
    net = unet.build_network(settings).eval()
    y = net(torch.zeros(2, channels_of_image, 12, 8), torch.tensor([1, 7]))
    assert y.shape == (2, times * channels_of_image, 12, 8)
    wanted = unet.UNet(in_channels=channels_of_image, out_channels=times * channels_of_image,
                       channels=32, multipliers=(1, 3, 2), blocks=2, attention=(6,), image_size=12,
                       dropout=0.25)
    assert repr(net) == repr(wanted)  # torch shows each layer with its sizes and its p
    assert "p=0.25" in repr(net) and "Attention" in repr(net.down[3])


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


def test_initial_weights_are_uniform_with_variance_2_over_fan_in_plus_fan_out():
    """This holds for every convolution and linear layer but the last of each branch and of the
    network, whose weights are 0. All biases are 0, and normalisations begin as the identity."""
    torch.manual_seed(0)
    last = ("conv2", "attention.out", "conv_out")
    for name, module in unet.UNet(**SMALL).named_modules():
        if not hasattr(module, "weight"):
            continue
        weight = module.weight.detach()
        assert not module.bias.any(), name
        if isinstance(module, unet.Norm):
            assert (weight == 1).all(), name
        elif name.endswith(last):
            assert not weight.any(), name
        else:
            variance = 2 / (weight[0].numel() + weight[:, 0].numel())
            assert weight.abs().max() <= (3 * variance) ** 0.5, name
            assert abs(weight.var() / variance - 1) < 5 * (0.8 / weight.numel()) ** 0.5, name


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


@pytest.mark.parametrize("width", [32, 64, 128])
def test_time_embedding_is_its_formula_in_double_precision(width):
    """sin and cos of ω_i (t − 1), where ω_i = 10000^(−i/(half − 1)), for all i and large t too."""
    times, half = [1, 2, 17, 1000, 4000], width // 2
    angles = [[(t - 1) * 10000 ** (-i / (half - 1)) for i in range(half)] for t in times]
    want = [[*map(math.sin, row), *map(math.cos, row)] for row in angles]
    torch.testing.assert_close(unet.time_embedding(torch.tensor(times), width, torch.float64),
                               torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-11)


def test_time_embedding_has_the_dtype_asked_for_and_the_device_of_t():
    """The dtype is float32 if none is asked for, and never that of t."""
    for t in (torch.tensor([1, 500]), torch.tensor([1.0, 500.0], dtype=torch.float64)):
        assert unet.time_embedding(t, 64).dtype == torch.float32
        assert unet.time_embedding(t, 64, torch.float64).dtype == torch.float64
    with torch.device("meta"):  # elsewhere than t
        assert unet.time_embedding(t, 64).device == t.device


def test_a_network_of_doubles_computes_in_doubles():
    """Every layer's output is float64. The network's is that of float32, but for the rounding."""
    net, kinds, g = randomised().eval(), set(), torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 3, 8, 8, generator=g), torch.tensor([7, 900])
    with torch.no_grad():
        single = net(x, t)
        net.double()
        for module in net.modules():
            module.register_forward_hook(lambda _, __, y: kinds.add(y.dtype))
        double = net(x.double(), t)
    assert kinds == {torch.float64}
    assert (double - single).norm() / double.norm() < 1e-5


def test_a_block_adds_the_time_to_its_first_convolution():
    """What the second normalisation sees is conv(SiLU(norm(x))) + time, the same at all pixels."""
    block, seen, g = randomised().down[0].eval(), [], torch.Generator().manual_seed(3)
    block.norm2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x, emb = torch.randn(2, 64, 4, 4, generator=g), torch.randn(2, 256, generator=g)
    block(x, emb)
    first = block.conv1(torch.nn.functional.silu(block.norm1(x)))
    torch.testing.assert_close(seen[0] - first, block.time(emb)[..., None, None].expand_as(first))


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
    """A tenth of what each block's second convolution sees is 0 in training. In evaluation nothing
    is, the output is that of a network without dropout, and no random number is drawn.

    Kills: dropout on while sampling, or off in training, another p."""
    net, never, seen = randomised(), randomised(dropout=0.0).eval(), []
    blocks = [m for m in net.modules() if isinstance(m, unet.Block)]
    for block in blocks:
        block.conv2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([1, 30, 500, 1000])
    torch.manual_seed(0)
    net.train()(x, t)
    assert len(seen) == len(blocks) == 8
    for part in seen:
        assert abs((part == 0).double().mean() - 0.1) < 5 * (0.09 / part.numel()) ** 0.5
    seen.clear()
    before = torch.get_rng_state()
    assert torch.equal(net.eval()(x, t), never(x, t))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == 8 and all((part == 0).double().mean() < 1e-4 for part in seen)


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
        torch.testing.assert_close(part[~dropped], whole[~dropped] / 0.75)
        torch.testing.assert_close(made[block, "sum"], made[block, "short"] + made[block, "conv"])


@pytest.mark.parametrize("settings, levels", [
    ({}, {1}), (LARGE, {4}), (dict(attention=()), set()), (dict(attention=(32,)), {0}),
    (dict(image_size=37, attention=(9,)), {2}), (dict(image_size=37, attention=(4, 37)), {0, 3})])
def test_attention_levels_follow_the_configured_size(settings, levels):
    """16×16 of a 32×32 network is its second level. A side that cannot be halved is rounded down.

    The levels are the same on both ways. In the middle, the first of the two blocks attends."""
    with torch.device("meta"):
        net = unet.UNet(**settings)

    def attends(part) -> list[bool]:
        return [isinstance(m.attention, unet.Attention) for m in part if isinstance(m, unet.Block)]

    order = [level in levels for level in range(net.levels)]
    assert attends(net.down) == [attend for attend in order for _ in range(2)]
    assert attends(net.up) == [attend for attend in reversed(order) for _ in range(3)]
    assert attends(net.middle) == [True, False]


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_accepted_sides_are_the_multiples_of_2_to_the_number_of_halvings(levels):
    """With L levels there are L − 1 halvings. The output has the size of the input. A refusal names
    the sides."""
    unit, t = 2 ** (levels - 1), torch.tensor([1, 2])
    net = unet.UNet(channels=32, multipliers=(1,) * levels, blocks=1).eval()
    for side in range(1, 13):
        for shape in ((2, 3, side, unit), (2, 3, unit, side)):
            if side % unit:
                with pytest.raises(ValueError) as error:
                    net(torch.zeros(shape), t)
                assert all(str(length) in str(error.value) for length in shape[2:])
            else:
                assert net(torch.zeros(shape), t).shape == shape


def test_channels_must_be_a_positive_multiple_of_32():
    """Others are refused in words of our own, which name the number."""
    for channels in (-32, 0, 1, 31, 33, 48, 144):
        with pytest.raises(ValueError) as error:
            unet.UNet(channels=channels)
        assert str(error.value).startswith(str(channels))
    for channels in (32, 96):
        with torch.device("meta"):
            assert unet.UNet(channels=channels).conv_in.out_channels == channels


def test_bfloat16_is_close_to_float32():
    """Under autocast the output differs from float32's by bfloat16's rounding only."""
    net = randomised().eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([7, 900])
    with torch.no_grad():
        full = net(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, t).float()
    assert (half - full).norm() / full.norm() < 0.03


@pytest.mark.parametrize("c, height, width", [(32, 31, 33), (32, 32, 32), (480, 4, 4), (512, 4, 4)])
def test_norm_has_float32_statistics(c, height, width):
    """Against the definition in float64, only the rounding of the output is left. This holds for
    bfloat16 far from 0, whose own statistics would be useless, and where ε = 10⁻⁶ matters."""
    g = torch.Generator().manual_seed(0)
    norm = unet.Norm(c)
    with torch.no_grad():
        norm.weight.normal_(generator=g), norm.bias.normal_(generator=g)
    for dtype, error, mean, scale in ((torch.float32, 1e-6, 0, 1), (torch.float32, 1e-6, 0, 1e-3),
                                      (torch.bfloat16, 2 ** -8, 100, 1),
                                      (torch.bfloat16, 2 ** -8, 0, 1e-3)):
        x = (mean + scale * torch.randn(2, c, height, width, generator=g)).to(dtype)
        groups = x.double().reshape(2, 32, -1)
        away = groups - groups.mean(2, keepdim=True)
        want = (away / (away.square().mean(2, keepdim=True) + 1e-6).sqrt()).view_as(x)
        want = want * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
        y = norm(x)
        assert y.dtype == dtype
        assert ((y.double() - want).abs() < error * (1 + want.abs())).all()


@pytest.mark.parametrize("inside", [torch.float32, torch.float64])
@pytest.mark.parametrize("outside", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("c, side", [(32, 4), (32, 32), (512, 4)])
def test_norm_computes_in_the_precision_of_its_weights(inside, outside, c, side):
    """To the bit the normalisation of torch in the precision of the weights, under autocast too. The
    result has the precision of x."""
    g = torch.Generator().manual_seed(0)
    norm, x = unet.Norm(c).to(inside), (3 + torch.randn(2, c, side, side, generator=g)).to(outside)
    with torch.no_grad():
        norm.weight.normal_(generator=g), norm.bias.normal_(generator=g)
        want = torch.nn.functional.group_norm(x.to(inside), 32, norm.weight, norm.bias, 1e-6).to(outside)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = norm(x)
            assert y.dtype == outside and torch.equal(y, want)

# ------------------------------------------------------------------ against the UNet2DModel of diffusers


def test_golden_outputs_of_diffusers():
    """The same function as UNet2DModel with the same weights, whose names there are known.

    Kills: a missing nonlinearity before the time projection, symmetric padding, another order."""
    net, theirs = unet.UNet(channels=32, multipliers=(1, 2), blocks=1, image_size=16).eval(), state()
    own = net.state_dict()
    assert {weights.names(net)[name] for name in own} == theirs.keys()
    net.load_state_dict({here: theirs[there].reshape(own[here].shape)
                         for here, there in weights.names(net).items()})
    torch.testing.assert_close(outputs(net), torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)


# Other networks of the family: the widths, blocks in a level, channels and the level that attends.
FAMILY = [([32, 64], 1, 3, 0), ([32, 32, 64], 3, 1, 1), ([64, 128, 128, 64], 2, 2, 3),
          ([128, 128, 256, 256, 512, 512], 2, 3, 4)]


def config_of(widths: list[int], blocks: int, channels: int, attending: int) -> dict:
    """The config.json of one that attends at 16×16."""
    kinds = ["DownBlock2D"] * len(widths)
    kinds[attending] = "AttnDownBlock2D"
    return {**CONFIG, "block_out_channels": widths, "layers_per_block": blocks,
            "in_channels": channels, "out_channels": channels, "down_block_types": kinds,
            "sample_size": 16 * 2 ** attending,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)]}


@pytest.mark.parametrize("member", FAMILY)
def test_the_layers_of_both_layouts_are_in_one_to_one_correspondence(member):
    """Each layer of UNet2DModel has one name here, and there are no others; the shapes agree, but
    for the 1×1 convolutions in attention, which are linear layers there."""
    config, (widths, blocks, channels, attending) = config_of(*member), member
    with torch.device("meta"):
        net = unet.UNet(channels, channels, widths[0], [w // widths[0] for w in widths], blocks, [16],
                        16 * 2 ** attending)
    names, ours, theirs = weights.names(net), net.state_dict(), layout(config)
    assert len(set(names.values())) == len(names)
    assert names.keys() == ours.keys() and set(names.values()) == theirs.keys()
    for here, there in names.items():
        shape = list(ours[here].shape)
        assert (shape[:2] if ".attentions." in there and len(shape) == 4 else shape) == theirs[there]


# ------------------------------------------------------------ a network and a schedule of one's own

class Tokens(nn.Module):
    """A network without any convolution: patches of 2×2 pixels are tokens of a small mixer."""

    def __init__(self, settings: dict):
        super().__init__()
        self.side = settings["image_size"] // 2
        tokens, width = self.side ** 2, 4 * settings["in_channels"]
        self.time = nn.Embedding(settings["timesteps"] + 1, width)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, width)
        self.across, self.along = nn.Linear(tokens, tokens), nn.Linear(width, width)

    def forward(self, x, t):
        h = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)      # (B, tokens, 4C)
        h = h + self.time(t)[:, None]
        h = h + self.across(self.norm(h).transpose(1, 2)).transpose(1, 2)
        h = self.last(torch.relu(self.along(self.norm(h))))
        return nn.functional.pixel_shuffle(h.transpose(1, 2).unflatten(2, 2 * [self.side]), 2)


ALL_COMMANDS = """
import importlib, json, sys, torch, train
from extras import compress
from support import checkpoint, machine
status = lambda line: importlib.import_module(line[0]).main(line[1:])
cpu = machine.Machine(torch.device("cpu"), torch.float32)
trained = [status(line) for line in LINES] and checkpoint.load(machine=cpu)
image = torch.load("images.pt")[0]
assert torch.equal(compress.decode(trained, compress.encode(trained, image, 4))[0], image)
run = train.begin(train.decide(train.parse(LINES[0][1:]), image.shape, {}, cpu), image[None], cpu, "x")
print(json.dumps([run.model.s.alpha_bars.tolist(), trained.s.alpha_bars.tolist(), [status(line) for line in LINES[-1:]]]))
torch.save(trained.net.state_dict(), "loaded.pt")
"""


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_network_and_a_schedule_of_ones_own(tmp_path):
    """In a clone in which `build_network` is another kind of network, and `make_schedule` has a branch
    more, all commands work: training, resuming to the bit, samples, evaluation, compression, in
    either precision and with the ᾱ_t of that schedule; diffusers has no network like it.

    Kills: a command that knows the layers of the U-Net, its settings or their precision, or that
    checks the name of a schedule."""
    def cosine(t: int) -> float:  # ᾱ_t of Nichol and Dhariwal, T = 20
        angle = lambda u: math.cos((u / 20 + 0.008) / 1.008 * math.pi / 2) ** 2
        return angle(t) / angle(0)
    clone = tmp_path / "clone"
    for folder in ("support", "extras"):
        shutil.copytree(HERE / folder, clone / folder)
    for file in HERE.glob("*.py"):
        shutil.copy(file, clone)
    with open(clone / "unet.py", "a") as file:
        file.write(f"\n\n{inspect.getsource(Tokens)}\nbuild_network = Tokens\n")
    betas, source = [min(1 - cosine(t) / cosine(t - 1), 0.999) for t in range(1, 21)], (HERE / "ddpm.py").read_text()
    end = source.index('"""', source.index('"""', source.index("def make_schedule(")) + 3) + 3
    branch = f"\n    if kind == 'cosine':\n        return schedule_from_betas({betas})"
    (clone / "ddpm.py").write_text(source[:end] + branch + source[end:])
    lines = []
    for precision in ("bf16", "fp32"):
        flags = [*TINY, "--schedule", "cosine", "--precision", precision]
        lines += [["train", *flags, "--steps", "6", "--out", f"whole-{precision}"],
                  ["train", *flags, "--steps", "3", "--out", f"runs/{precision}"],
                  ["train", *flags, *"--steps 6 --samples 1 --sample-steps 3 --out".split(), f"runs/{precision}"],
                  ["sample", *f"--n 2 --steps 4 --out {precision}.pt --device cpu --precision {precision}".split()],
                  ["evaluate", "--n", "2", "--terms", "2"]]
    lines += [["extras.weights", "runs/fp32", "folder"]]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"LINES = {lines}\n{ALL_COMMANDS}"],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    *bars, statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [1] and not Path("folder").exists() and "Traceback" not in done.stderr
    for found in bars:
        assert found[:20] == pytest.approx([cosine(t) for t in range(20)])
    assert_equal(dict(torch.load("loaded.pt")), dict(checkpoint("runs/fp32")["ema"]))
    for precision in ("bf16", "fp32"):
        parts, whole = checkpoint(f"runs/{precision}"), checkpoint(f"whole-{precision}")
        assert [name for name in parts["net"] if "weight" in name] == [
            "time.weight", "norm.weight", "last.weight", "across.weight", "along.weight"]
        for part in ("net", "ema", "adam"):
            assert_equal(parts[part], whole[part])
        assert_same_log(f"runs/{precision}", f"whole-{precision}")
        log = losses(f"runs/{precision}")
        assert log[-1]["loss"] < log[0]["loss"] and parts["settings"]["schedule"] == "cosine"
        assert read_png(f"runs/{precision}/samples-0000006.png").shape[1:] == (480, 480)
        x = torch.load(f"{precision}.pt")
        assert x.shape == (2, 3, 8, 8) and not torch.equal(x[0], x[1])


def test_the_network_of_settings():
    """Every setting of the network reaches it, and shows; a learned variance doubles the output channels."""
    plain = {"in_channels": 1, "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [7, 5],
             "image_size": 11, "dropout": 0.2}
    shown = []
    for change, variance, doubled in (
            ({}, "fixed_small", 1), ({}, "learned", 2), ({"in_channels": 3}, "fixed_large", 3),
            ({"in_channels": 3}, "learned", 6), ({"channels": 64}, "fixed_small", 1),
            ({"multipliers": [2, 1]}, "fixed_small", 1), ({"blocks": 2}, "fixed_small", 1),
            ({"attention": [11]}, "fixed_small", 1), ({"image_size": 16}, "fixed_small", 1),
            ({"dropout": 0.3}, "fixed_small", 1)):
        shown.append(str(unet.build_network({**plain, **change, "variance": variance})))
        assert shown[-1] == str(unet.UNet(out_channels=doubled, **plain | change))
    assert len(set(shown)) == len(shown) == 10


@pytest.mark.skipif(not importlib.util.find_spec("setuptools") or not importlib.util.find_spec("pip"),
                    reason="setuptools or pip is not installed")
def test_the_mathematics_and_the_network_can_be_installed(tmp_path):
    """A wheel of this folder holds ddpm and unet and nothing else; they import outside the clone,
    without the commands."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77 or newer")
    clone = tmp_path / "clone"
    shutil.copytree(HERE, clone, ignore=lambda folder, names: [
        name for name in names if Path(folder) == HERE and name != "support"
        and name not in ("pyproject.toml", "README.md", "LICENSE") and not name.endswith(".py")])
    (tmp_path / "wheels").mkdir()
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", build, tmp_path / "wheels"], cwd=clone, capture_output=True,
                           text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    wheel, = (tmp_path / "wheels").glob("ddpm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == {"ddpm.py", "unet.py"}
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = "import ddpm, unet; print(ddpm.__file__, unet.__file__, ddpm.make_schedule().T)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path / "elsewhere", text=True,
                         check=True, capture_output=True, timeout=120,
                         env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert run.stdout.split() == [str(tmp_path / "site" / "ddpm.py"), str(tmp_path / "site" / "unet.py"), "1000"]
