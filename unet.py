"""ε_θ(x_t, t): the U-Net of Ho, Jain, Abbeel 2020 (Appendix B), as in their released code.

A U-Net of residual blocks with group normalisation. It has self-attention at 16×16, and the time t
enters every residual block through a sinusoidal embedding. `UNet()` is the network for CIFAR-10
with 35,746,307 parameters; the one for 256×256 images (multipliers 1, 1, 2, 2, 4, 4) has
113,673,219. It computes the same function as the released code, from almost the same initial
weights (`initialize`).
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

def build_network(settings: dict) -> nn.Module:
    """The network of a run's settings: return another one here, and every command uses it.

    x_t (B, C, H, W), t (B,) int64 in 1 … T → (B, C, H, W); (B, 2C, H, W) for a learned variance.
    In sampling its convolutions and linear layers are cast to the precision of the machine.
    """
    c = settings["in_channels"]
    return UNet(c, 2 * c if settings["variance"] == "learned" else c, settings["channels"],
                tuple(settings["multipliers"]), settings["blocks"], tuple(settings["attention"]),
                settings["image_size"], settings["dropout"])

class UNet(nn.Module):
    """ε_θ(x_t, t) of Eq. 11: x (B, in_channels, H, W), t (B,) → (B, out_channels, H, W).

    channels: width of the first level, a multiple of 32. Take 64 or more: with 32 each group of the
    first level is one channel, and its normalisation removes what the time embedding has added.
    multipliers: width of each level, in units of `channels`. blocks: residual blocks in each level
    on the way down; there is one more on the way up. attention: the resolutions with self-attention
    (the middle block always has it), for an image of side image_size: attention levels are fixed at
    construction. ValueError if `channels` is not a multiple of 32. `forward` raises ValueError if
    H or W is not divisible by 2^(levels − 1).
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 3, channels: int = 128,
                 multipliers: tuple[int, ...] = (1, 2, 2, 2), blocks: int = 2,
                 attention: tuple[int, ...] = (16,), image_size: int = 32, dropout: float = 0.1):
        super().__init__()
        if channels < 32 or channels % 32:
            raise ValueError(f"{channels} channels: the normalisation has 32 groups, so it must be "
                             "a multiple of 32")
        self.channels, self.levels = channels, len(multipliers)
        width_time = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, width_time), nn.SiLU(),
                                  nn.Linear(width_time, width_time))

        def block(c_in: int, c_out: int, attend: bool) -> Block:
            return Block(c_in, c_out, width_time, dropout, attend)

        def attends(level: int) -> bool:
            return image_size // 2 ** level in attention

        c = channels
        self.conv_in = nn.Conv2d(in_channels, c, 3, padding=1)
        skips = [c]

        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(block(c, channels * multiplier, attends(level)))
                c = channels * multiplier
                skips.append(c)
            if level < self.levels - 1:
                self.down.append(Downsample(c))
                skips.append(c)

        self.middle = nn.ModuleList([block(c, c, True), block(c, c, False)])

        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), channels * multiplier, attends(level)))
                c = channels * multiplier
            if level > 0:
                self.up.append(Upsample(c))

        self.norm_out = Norm(c)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)
        initialize(self)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if any(side % 2 ** (self.levels - 1) for side in x.shape[2:]):
            raise ValueError(f"an image of {x.shape[2]}×{x.shape[3]} cannot be halved "
                             f"{self.levels - 1} times: its sides must be divisible by "
                             f"{2 ** (self.levels - 1)}")
        # SiLU comes before the time projection of every block. It is computed once, here.
        dtype = self.time[0].weight.dtype
        precise = torch.promote_types(dtype, torch.float32)  # 16 bits confuse most times
        emb = F.silu(self.time(time_embedding(t, self.channels, precise).to(dtype)))
        h = self.conv_in(x)
        skips = [h]

        for module in self.down:
            h = module(h, emb)
            skips.append(h)

        for module in self.middle:
            h = module(h, emb)

        for module in self.up:
            if isinstance(module, Block):
                h = torch.cat([h, skips.pop()], dim=1)
            h = module(h, emb)

        return self.conv_out(F.silu(self.norm_out(h)))

def time_embedding(t: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[sin(ω_i (t − 1)), cos(ω_i (t − 1))] with ω_i = 10000^(−i/(half − 1)), half = width/2.

    t: (B,) → (B, width). This is the released code's variant of the Transformer's position
    encoding. (The original interleaves sines and cosines, and its exponent is −i/half.) The
    released code counts time from 0 to T − 1, so t − 1 is embedded, here and nowhere else.
    """
    half = width // 2
    i = torch.arange(half, device=t.device, dtype=dtype)
    omega = torch.exp(-math.log(10000) / (half - 1) * i)
    angles = (t - 1)[:, None].to(dtype) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)

class Block(nn.Module):
    """A residual block, followed by self-attention in the levels that have it.

    h = conv(SiLU(norm(x))) + time;   output = shortcut(x) + conv(dropout(SiLU(norm(h))))
    """

    def __init__(self, c_in: int, c_out: int, width_time: int, dropout: float, attend: bool):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(width_time, c_out)
        self.norm2 = Norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attend else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)

class Attention(nn.Module):
    """x + W V softmax(QᵀK / √C)ᵀ, where Q, K, V are (C, pixels) maps of norm(x): one head.

    Row i of the softmax holds the weights of all pixels (the keys) for pixel i (the query).
    """

    def __init__(self, c: int):
        super().__init__()
        self.norm = Norm(c)
        self.q, self.k, self.v, self.out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))      # (B, C, N)
        q = q * q.shape[1] ** -0.5      # before the product, which could overflow in float16
        scores = q.transpose(1, 2) @ k                                     # (B, N queries, N keys)
        weights = scores.softmax(dim=2)                                    # over the keys
        h = (weights @ v.transpose(1, 2)).transpose(1, 2)                  # (B, C, N queries)
        return x + self.out(h.unflatten(2, x.shape[2:]))

class Downsample(nn.Module):
    """A 3×3 convolution of stride 2, padded like TensorFlow's SAME: right and bottom only."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))

class Upsample(nn.Module):
    """Every pixel becomes 2×2 equal pixels (nearest neighbour); then a 3×3 convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

class Norm(nn.GroupNorm):
    """Group normalisation with 32 groups and ε = 10⁻⁶, in the precision of its weights."""

    def __init__(self, c: int):
        super().__init__(32, c, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

def initialize(net: UNet) -> None:
    """Weights uniform with variance 2/(fan_in + fan_out), biases 0.

    The last layer of each residual block, of each attention and of the network is 0, so every
    block begins as its shortcut and the first output is 0. (In the released code the variance of
    these weights is scaled by 10⁻¹⁰.)
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)
    nn.init.zeros_(net.conv_out.weight)
