"""3×3 convolutions with fewer multiplications, for float32 on a CPU.   [Lavin and Gray 2016]

    y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        F(4×4, 3×3)

g is a filter of 3×3 weights, d a tile of 6×6 inputs, y the 4×4 outputs that it gives. ⊙ takes 36
products where the direct sum takes 144. Summed over the input channels, each of the 36 is a matrix
product. Written with (X ⊗ X) vec(d) = vec(X d Xᵀ), the transforms are matrix products, too.
"""
from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor, nn

B_T = torch.tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                    [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]).double()
G = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4],
                  [1, 2, 4], [1, -2, 4], [0, 0, 24]]).double() / 24
A_T = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0],
                    [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]).double()
BB, GG, AA = (torch.kron(x, x) for x in (B_T, G, A_T))
PIXELS = 2048  # at a time, so that their tiles stay in the cache

def filters(weight: Tensor) -> Tensor:
    """G g Gᵀ: (K, C, 3, 3) → (36, K, C)."""
    k, c = weight.shape[:2]
    return (GG.to(weight.dtype) @ weight.permute(2, 3, 0, 1).reshape(9, k * c)).view(36, k, c)

def tiles(x: Tensor, side: int) -> Tensor:
    """All tiles of side × side pixels, 4 apart: (n, H, W, C) → (side², n · tiles · C)."""
    x = x.contiguous()
    (n, h, w, c), s = x.shape, x.stride()
    shape = side, side, n, (h - side) // 4 + 1, (w - side) // 4 + 1, c
    strides = s[1], s[2], s[0], 4 * s[1], 4 * s[2], 1
    return x.as_strided(shape, strides).reshape(side * side, -1)

def inputs(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Bᵀ d B of the tiles of x, padded by one pixel, some images at a time: (n, H, W, C) → which
    images, (36, n · tiles, C)."""
    n, h, w, c = x.shape
    step = min(max(1, PIXELS // (h * w)), n)
    padded = x.new_zeros(step, h + 2, w + 2, c)
    for i in range(0, n, step):
        part = slice(i, min(i + step, n))
        few = padded[:part.stop - i]
        few[:, 1:-1, 1:-1] = x[part]
        yield part, (BB.to(x.dtype) @ tiles(few, 6)).view(36, -1, c)

def convolve(x: Tensor, u: Tensor) -> Tensor:
    """Aᵀ [u ⊙ (Bᵀ d B)] A: (n, C, H, W), H and W divisible by 4, and (36, K, C) → (n, K, H, W)."""
    x, k = x.permute(0, 2, 3, 1), u.shape[1]
    n, h, w, _ = x.shape
    y = x.new_empty(n, h // 4, 4, w // 4, 4, k)
    for part, v in inputs(x):
        out = AA.to(x.dtype) @ (v @ u.transpose(1, 2)).view(36, -1)
        y[part] = out.view(4, 4, -1, h // 4, w // 4, k).permute(2, 3, 0, 4, 1, 5)
    return y.view(n, h, w, k).permute(0, 3, 1, 2)

def untiles(dtiles: Tensor, n: int, h: int, w: int) -> Tensor:
    """The sum of tiles of 6×6 pixels, 4 apart, where they overlap, without the padding: the adjoint
    of `tiles`, (36, n · tiles · C) → (n, H, W, C)."""
    d = dtiles.view(6, 6, n, h // 4, w // 4, -1).permute(2, 3, 0, 4, 1, 5)
    total = d.new_zeros(n, h // 4 + 1, 4, w // 4 + 1, 4, d.shape[-1])
    total[:, :-1, :, :-1] = d[:, :, :4, :, :4]
    total[:, 1:, :2, :-1] += d[:, :, 4:, :, :4]
    total[:, :-1, :, 1:, :2] += d[:, :, :4, :, 4:]
    total[:, 1:, :2, 1:, :2] += d[:, :, 4:, :, 4:]
    return total.view(n, h + 4, w + 4, -1)[:, 1:h + 1, 1:w + 1]

class Winograd(torch.autograd.Function):
    """x (n, C, H, W), weight (K, C, 3, 3), bias (K,) → F.conv2d(x, weight, bias, padding=1).

    The gradient is that of the formula above: every transform of it, transposed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        u = filters(weight)
        ctx.save_for_backward(x, u)
        return convolve(x, u).add_(bias[:, None, None])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        if torch.is_grad_enabled():  # with create_graph; u was computed outside the graph
            raise NotImplementedError("no second derivative here: use the network without `placed`")
        x, u = ctx.saved_tensors
        (_, k, c), x, dy = u.shape, x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
        dx, du = torch.empty_like(x), torch.empty_like(u)
        for part, v in inputs(x):
            dm = (AA.T.to(x.dtype) @ tiles(dy[part], 4)).view(36, -1, k)
            du.baddbmm_(dm.transpose(1, 2), v, beta=float(part.start > 0))  # 0: the first one
            dv = (dm @ u).view(36, -1)
            dx[part] = untiles(BB.T.to(x.dtype) @ dv, part.stop - part.start, *x.shape[1:3])
        dw = (GG.T.to(x.dtype) @ du.view(36, -1)).view(3, 3, k, c).permute(2, 3, 0, 1)
        return dx.permute(0, 3, 1, 2), dw, dy.sum((0, 1, 2))

class Conv(nn.Conv2d):
    """The same convolution, by Winograd's algorithm in float32 on a CPU: at 16×16 or more, and in
    training at 8×8, too, where a single image gains nothing."""
    keeps, u = False, None  # whether the filters are kept (see `keep_filters`), and they

    def forward(self, x: Tensor) -> Tensor:
        least = 8 if torch.is_grad_enabled() else 16
        if (x.dtype != torch.float32 or x.device.type != "cpu" or self.weight.dtype != x.dtype
                or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
                or min(x.shape[2:]) < least or x.shape[2] % 4 or x.shape[3] % 4):
            return super().forward(x)
        if torch.is_grad_enabled():
            return Winograd.apply(x, self.weight, self.bias)
        u = filters(self.weight) if self.u is None else self.u
        if self.keeps:
            self.u = u
        return convolve(x, u).add_(self.bias[:, None, None])

def keep_filters(net: nn.Module) -> None:
    """From now on the filters of `net` are computed once, until this is called again: for a copy
    whose weights nobody else changes."""
    for conv in net.modules():
        if isinstance(conv, Conv):
            conv.keeps, conv.u = True, None

def fast(net: nn.Module) -> nn.Module:
    """`net` itself, whose 3×3 convolutions of 128 channels or more become `Conv`.

    Which ones use the algorithm depends on channels and sides alone, not on the batch. With fewer
    channels or smaller sides it is slower for some batches (docs/measurements.md).
    """
    for conv in net.modules():
        if (type(conv) is nn.Conv2d and (conv.kernel_size, conv.stride, conv.padding, conv.groups)
                == ((3, 3), (1, 1), (1, 1), 1) and min(conv.in_channels, conv.out_channels) >= 128
                and conv.bias is not None and conv.dilation == (1, 1)):
            conv.__class__ = Conv
    return net
