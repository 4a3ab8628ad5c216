"""VeLoRA written as loops in float64, one equation a line; and an independent count of what autograd keeps.

N tokens, D in-features, M out-features, G groups, S sub-token size; x (N, D), dy (N, M) or (N, D), v (S), D = G S;
of a convolution x (N, C, pixels), weight (O, C / groups, kernel)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


def array(x: Tensor | ArrayLike) -> Array:
    """float64 copy; all leading dimensions of a tensor become N."""
    if isinstance(x, Tensor):
        x = x.detach().double().reshape(-1, x.shape[-1]) if x.dim() > 1 else x.detach().double()
        return x.numpy().copy()
    return np.array(x, dtype=np.float64)


def sub_tokens(x: Array, size: int) -> list[Array]:
    return [token[start : start + size] for token in x for start in range(0, len(token), size)]


def fixed_average(x: Array, size: int) -> Array:
    total, count = np.zeros(size), 0
    for u in sub_tokens(x, size):
        total += u
        count += 1
    mean = total / count
    return mean / np.sqrt(sum(m * m for m in mean))


def compress(x: Array, v: Array) -> Array:
    num_groups, size = x.shape[1] // len(v), len(v)
    z = np.zeros((x.shape[0], num_groups))
    for n in range(x.shape[0]):
        for g in range(num_groups):
            for s in range(size):
                z[n, g] += x[n, g * size + s] * v[s]
    return z


def reconstruct(z: Array, v: Array) -> Array:
    x_hat = np.zeros((z.shape[0], z.shape[1] * len(v)))
    for n in range(z.shape[0]):
        for g in range(z.shape[1]):
            for s in range(len(v)):
                x_hat[n, g * len(v) + s] = z[n, g] * v[s]
    return x_hat


def linear_gradients(x: Array, weight: Array, dy: Array, v: Array, scale: float) -> tuple[Array, Array, Array]:
    """dx, dW and db of y = x Wᵀ + b with x̂ in place of x in dW."""
    x_hat = reconstruct(compress(x, v), v)
    dx, dw, db = np.zeros_like(x), np.zeros_like(weight), np.zeros(weight.shape[0])
    for n in range(x.shape[0]):
        for m in range(weight.shape[0]):
            db[m] += dy[n, m]
            for d in range(weight.shape[1]):
                dx[n, d] += dy[n, m] * weight[m, d]
                dw[m, d] += scale * dy[n, m] * x_hat[n, d]
    return dx, dw, db


def scale_shift_gradients(x: Array, gamma: Array, dy: Array, v: Array, scale: float) -> tuple[Array, Array, Array]:
    """dx, dγ and dβ of y = x * γ + β with x̂ in place of x in dγ."""
    x_hat = reconstruct(compress(x, v), v)
    dx, dgamma, dbeta = np.zeros_like(x), np.zeros_like(gamma), np.zeros_like(gamma)
    for n in range(x.shape[0]):
        for d in range(x.shape[1]):
            dx[n, d] = dy[n, d] * gamma[d]
            dgamma[d] += scale * dy[n, d] * x_hat[n, d]
            dbeta[d] += dy[n, d]
    return dx, dgamma, dbeta


def padded(conv: nn.Module, x: Array) -> Array:
    """x (N, C, pixels) as a convolution pads it, by NumPy."""
    sides = []
    for i, (k, d) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        total = d * (k - 1) if conv.padding == "same" else 0
        sides.append((total // 2, total - total // 2) if isinstance(conv.padding, str) else (conv.padding[i],) * 2)
    mode = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}[conv.padding_mode]
    return np.pad(x, [(0, 0), (0, 0), *sides], mode=mode)


def conv_weight_gradient(conv: nn.Module, x: Tensor, dy: Tensor, v: Array, scale: float) -> Array:
    """dW of a convolution with x̂ in place of x, pixel by pixel: x̂ is made of the padded input, channel by channel."""
    images, gradient = padded(conv, x.double().numpy()), dy.detach().double().numpy()
    pixels = np.moveaxis(images, 1, -1)  # (N, padded pixels, C)
    flat = pixels.reshape(-1, pixels.shape[-1])
    x_hat = np.moveaxis(reconstruct(compress(flat, v), v).reshape(pixels.shape), -1, 1)
    dw = np.zeros(tuple(conv.weight.shape))
    out_per_group, in_per_group = dw.shape[0] // conv.groups, dw.shape[1]
    for o, c, *k in np.ndindex(*dw.shape):
        channel = o // out_per_group * in_per_group + c
        for p in np.ndindex(*gradient.shape[2:]):
            place = tuple(at * s + i * d for at, s, i, d in zip(p, conv.stride, k, conv.dilation, strict=True))
            for n in range(len(gradient)):
                dw[(o, c, *k)] += scale * gradient[(n, o, *p)] * x_hat[(n, channel, *place)]
    return dw


def saved_bytes(forward: Callable[[], Tensor], apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd saves in a forward, each storage once, those of `apart_from` not counted."""
    storages: dict[int, int] = {}
    keep = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        keep.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in apart_from:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
