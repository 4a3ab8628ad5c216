"""What Figure 2 of the paper (arXiv 2405.17991) measures of a network in training: ranks, sparsity, similarities.

    N  tokens of the held-out batch      D  features of a layer's input      G  groups: sub-tokens in a token, D = G S
    S  sub-token size                    P  pairs of sub-tokens              K  values of k

The stable rank of a matrix is ||A||_F^2 / ||A||_2^2: its squared singular values, summed, over the largest. Of which matrix the
paper shows it, when tokens are cut into G groups, is not stated in what we have; `READINGS` are the plausible ones, and all
are computed. On llama_tiny (docs/figure2.md) `group_blocks` is the one that rises with the groups as printed and has about
the printed range; `reconstruction` rises too, and stays below 4. For one and the same input `group_blocks` cannot fall when
groups are cut in two: the sum stays, and no part of a matrix has a larger norm. Nor is a gradient's sparsity defined there:
here it is the share of entries of at most a threshold.

Equation 3 is 2 (1 - Phi(sqrt(k) / sigma)). That is the probability that X^2 > k for X normal with mean 0 and standard
deviation sigma. So it holds for a similarity whose movement is the square of a normal variable; `MOVEMENTS` are two that real
inputs have, and how far their distribution is from the equation with the same mean is part of the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velora.config.roles import Roles, role_of, roles_of
from velora.nn.apply import velora_layers, without_a_trace
from velora.nn.projection import compress, split

READINGS = {
    "tokens": "the input x (N, D) itself; the groups act through the training alone",
    "sub_tokens": "the matrix of all sub-tokens (N G, D / G)",
    "reconstruction": "what VeLoRA rebuilds of x, (N, D): equal to that of the codes (N, G), so at most G",
    "group_blocks": "the G matrices (N, D / G), one for each group, as the blocks of a diagonal",
}
THRESHOLDS = {"rms": (0.01, 0.1, 0.5), "max": (0.001, 0.01, 0.1)}  # of the entries of one weight gradient
MOVEMENTS = {
    "pair": "|u . w - (u . v)(w . v)|: how far the similarity of two sub-tokens of unit length moves by projection onto v",
    "code": "(u . v)^2: what the projection leaves of the similarity of a sub-token of unit length with itself",
}
K_GRID = tuple(round(0.05 * i, 2) for i in range(21))
NUM_PAIRS = 8192  # in each layer: a share of 0.5 has a standard error of 0.006


def stable_rank(matrices: Tensor) -> float:
    """||A||_F^2 / ||A||_2^2 of the block-diagonal matrix A of one matrix (N, D) or several (G, N, D); 0 where A is 0."""
    a = matrices.double()
    gram = a.mT @ a if a.shape[-1] <= a.shape[-2] else a @ a.mT
    largest = float(torch.linalg.eigvalsh(gram)[..., -1].max())
    return float(gram.diagonal(dim1=-2, dim2=-1).sum()) / largest if largest > 0 else 0.0


def stable_ranks(x: Tensor, direction: Tensor) -> dict[str, float]:
    """Reading -> stable rank, of the tokens x (N, D) with sub-tokens of the direction's size."""
    size = direction.shape[0]
    x = x.double()
    grouped = x.view(len(x), -1, size)  # (N, G, S)
    return {
        "tokens": stable_rank(x),
        "sub_tokens": stable_rank(split(x, size)),
        "reconstruction": stable_rank(compress(x, direction.double())),
        "group_blocks": stable_rank(grouped.transpose(0, 1)),
    }


def sparsity(gradient: Tensor) -> dict[str, dict[str, float]]:
    """The share of entries with a magnitude of at most a fraction of the gradient's rms and of its largest entry."""
    size = gradient.detach().double().abs()
    scale = {"rms": float(size.square().mean().sqrt()), "max": float(size.max())}
    return {
        of: {str(t): float((size <= t * scale[of]).double().mean()) for t in fractions}
        for of, fractions in THRESHOLDS.items()
    }


def movements(x: Tensor, direction: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Movement -> its values (P) at random pairs of the sub-tokens of x (N, D) that are not zero."""
    v = direction.double()
    u = split(x.double(), len(v))
    u = F.normalize(u[u.square().sum(-1) > 0], dim=-1)
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(max(len(u), 1), (2, NUM_PAIRS if len(u) else 0), generator=generator).to(u.device)
    codes = u @ v
    pair = ((u[first] * u[second]).sum(-1) - codes[first] * codes[second]).abs()
    return {"pair": pair, "code": codes[first].square()}


def equation_3(k: float, sigma: float) -> float:
    """2 (1 - Phi(sqrt(k) / sigma)) for sigma > 0."""
    return math.erfc(math.sqrt(k / 2) / sigma)


def exceeding(values: Any) -> list[float]:
    """The share of `values` above each k of the grid (K)."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return [1 - float(np.searchsorted(ordered, k, side="right")) / len(ordered) for k in K_GRID]


def against_equation(values: Any) -> dict[str, Any]:
    """Measured movements beside equation 3 with the sigma that has their mean: E[X^2] = sigma^2.

    The largest difference is over the grid of k; that at any k is the Kolmogorov-Smirnov distance, which also sees what lies
    below the first k of the grid.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    sigma = math.sqrt(ordered.mean())
    shares = exceeding(ordered)
    if not sigma:
        return {"sigma": 0.0, "share_above_k": shares, "largest_difference_to_equation": 0.0, "largest_at_any_k": 0.0}
    gaps = [abs(share - equation_3(k, sigma)) for k, share in zip(K_GRID, shares, strict=True)]
    above = np.array([equation_3(k, sigma) for k in ordered])
    steps = 1 - np.arange(len(ordered) + 1) / len(ordered)  # the share above, just before and at each value
    anywhere = max(np.abs(above - steps[:-1]).max(), np.abs(above - steps[1:]).max())
    return {
        "sigma": sigma, "share_above_k": shares, "largest_difference_to_equation": max(gaps),
        "largest_at_any_k": float(anywhere),
    }  # fmt: skip


def simulated(sigmas: Sequence[float], draws: int = 1_000_000, seed: int = 0) -> list[dict[str, Any]]:
    """Equation 3 for each sigma, beside squares of normal numbers."""
    rng = np.random.default_rng(seed)
    found = []
    for sigma in sigmas:
        exact = [equation_3(k, sigma) for k in K_GRID]
        shares = exceeding((sigma * rng.standard_normal(draws)) ** 2)
        gap = max(abs(a - b) for a, b in zip(exact, shares, strict=True))
        found.append({"sigma": sigma, "equation": exact, "simulated": shares, "largest_difference": gap})
    return found


def measure(
    network: nn.Module, batch: Mapping[str, Tensor], loss: Callable[[], Tensor], movements_too: bool = True
) -> dict[str, Any]:
    """All that the figure needs of the VeLoRA layers, of one forward without gradient and two gradients; leaves no trace.

    `loss` computes that of `batch`. Layer -> its role, width, groups, `stable_rank` by reading, `sparsity` of its weight
    gradient, VeLoRA's and the exact one at the same weights; and `movements`, of all layers together, against equation 3.
    """
    layers = velora_layers(network)
    roles = roles_of(network)
    found: dict[str, dict[str, Any]] = {}
    moved: dict[str, list[Tensor]] = {name: [] for name in MOVEMENTS}

    def look(name: str, x: Tensor) -> None:
        layer = layers[name]
        tokens = _tokens(x.detach(), batch.get("attention_mask"))
        found[name] = {
            "role": _role(name, roles), "width": tokens.shape[1], "num_groups": layer.num_groups,
            "stable_rank": stable_ranks(tokens, layer.direction),
        }  # fmt: skip
        if movements_too:
            for kind, values in movements(tokens, layer.direction).items():
                moved[kind].append(values)

    with without_a_trace(network), _mode(network):
        network.eval()
        with torch.no_grad(), _watching(layers, look):
            loss()
        exact = _gradients(loss, layers)
        network.train()
        ours = _gradients(loss, layers)
    for name in found:
        found[name]["sparsity"] = {"velora": sparsity(ours[name]), "exact": sparsity(exact[name])}
    together = {kind: against_equation(torch.cat(values).cpu()) for kind, values in moved.items() if values}
    return {"layers": found, "movements": together}


def _role(name: str, roles: Roles) -> str | None:
    """Of a layer, or of the nearest module around it that has one (an adapter's)."""
    parts = name.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((role for path in paths if (role := role_of(path, roles))), None)


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (..., D) as (N, D), without padding."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _gradients(loss: Callable[[], Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradients of the layers' weights, which are not left in `.grad`."""
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), [layer.weight for layer in layers.values()])
    return dict(zip(layers, found, strict=True))


@contextmanager
def _watching(layers: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`look(name, input)` at each forward of a layer."""

    def hook_of(name: str) -> Any:
        return lambda _module, args, kwargs: look(name, args[0] if args else kwargs["input"])

    handles = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _mode(network: nn.Module) -> Iterator[None]:
    """Each module's training flag is at the end what it was."""
    before = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
