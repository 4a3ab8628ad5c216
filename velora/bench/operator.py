"""How long one layer takes, forward and backward, with VeLoRA and without.

All candidates have the same weight, input and direction, and run in turn.

    N  tokens      D  in-features      M  out-features      G  groups: sub-tokens in a token
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from velora.bench.machine import Step, device_called, in_turn, machine, quartiles

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int, int]

SHAPES: dict[Shape, str] = {
    (2048, 1376, 512, 86): "LLaMA-60M's down projection",
    (1024, 3072, 768, 64): "the second MLP layer of ViT-B and RoBERTa-base",
    (512, 4096, 4096, 32): "LLaMA-7B's value projection",
    (256, 11008, 4096, 32): "LLaMA-7B's down projection",
}


def operator(
    shapes: Sequence[Shape],
    convolutions: Sequence[tuple[int, int, int, int, int]] = (),
    *,
    device_name: str,
    dtype_name: str,
    repeats: int,
    threads: int | None,
) -> dict[str, Any]:
    """Time every candidate at every shape, of linear layers and of `convolutions`, print a table, and return the record.

    Times are milliseconds of one forward and backward; `weight_gradient_difference` is the largest deviation of
    VeloraLinear's weight gradient from PEFT's, relative to the largest entry.
    """
    import torch

    device = device_called(device_name, threads)
    dtype = getattr(torch, dtype_name)
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {dtype_name}; milliseconds, medians")
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        torch.manual_seed(0)
        candidates, difference = layer_candidates(shape, device, dtype)
        rows.append({"shape": dict(zip("NDMG", shape, strict=True)), **timed(candidates, repeats, device)})
        rows[-1]["weight_gradient_difference"] = difference
        print_row(rows[-1], "N, D, M, G", first=len(rows) == 1)
    record = {"mode": "operator", "machine": about, "dtype": dtype_name, "repeats": repeats, "results": rows}
    if convolutions:
        from velora.bench.convolution import convolutions as measure

        record["convolutions"] = measure(convolutions, device, dtype, repeats)
    return record


def layer_candidates(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Step], float | None]:
    """Candidate name -> one forward and backward, gradients of input and weight from scratch; and the difference
    of the weight gradients of VeloraLinear and PEFT's VeLoRA (None where PEFT has none)."""
    import torch
    from torch import nn

    from velora.nn.linear import VeloraLinear
    from velora.nn.projection import SubTokenStatistics

    n, d, m, g = shape
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    x = (torch.randn(n, d, **factory) + 0.1).requires_grad_()
    dy = torch.randn(n, m, **factory)
    plain = nn.Linear(d, m, bias=False, **factory)
    layer = VeloraLinear(d, m, bias=False, **factory, num_groups=g)
    layer.weight = plain.weight
    statistics = SubTokenStatistics(d // g, device)
    statistics.add(x)
    layer.set_direction(statistics.mean_direction())
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"nn.Linear": plain, "VeloraLinear": layer}
    functions["rebuilt"] = _rebuilding(plain.weight, layer.direction)
    try:
        from peft.tuners.lora.velora import VeloraFunction
    except ImportError:
        print("PEFT has no VeLoRA here (peft >= 0.20 has); it is left out", file=sys.stderr)
    else:
        functions["PEFT"] = lambda x: VeloraFunction.apply(x, plain.weight, None, layer.direction, g, 1.0)

    def step_of(function: Callable[[torch.Tensor], torch.Tensor]) -> Step:
        def step() -> None:
            x.grad = plain.weight.grad = None
            function(x).backward(dy)

        return step

    candidates = {name: step_of(function) for name, function in functions.items()}
    gradients = {}
    for name in candidates:
        candidates[name]()
        assert plain.weight.grad is not None
        gradients[name] = plain.weight.grad.float()
    if "PEFT" not in gradients:
        return candidates, None
    theirs = gradients["PEFT"]
    return candidates, float((gradients["VeloraLinear"] - theirs).abs().max() / theirs.abs().max())


def _rebuilding(weight: torch.Tensor, direction: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """VeLoRA as it is written in the paper: rebuild the input in backward, and multiply in full."""
    import torch
    import torch.nn.functional as F

    from velora.nn.projection import compress, reconstruct

    class Rebuilding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(compress(x, direction), weight)
            return F.linear(x, weight)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            z, weight = ctx.saved_tensors
            return grad_outputs[0] @ weight, grad_outputs[0].T @ reconstruct(z, direction)

    return lambda x: Rebuilding.apply(x, weight)


def timed(
    candidates: dict[str, Step], repeats: int, device: torch.device, ours: str = "VeloraLinear"
) -> dict[str, Any]:
    """Median and quartiles in milliseconds of each candidate, run in turn, and the ratios of ours to the others."""
    times = {name: [1e3 * value for value in values] for name, values in in_turn(candidates, repeats, device).items()}
    medians = {name: median(values) for name, values in times.items()}
    relative = {"VeloraLinear": "velora_linear_relative_to", "VeloraConv2d": "velora_conv_relative_to"}[ours]
    return {
        "median_milliseconds": medians,
        "quartiles_milliseconds": {name: quartiles(values) for name, values in times.items()},
        relative: {name: medians[ours] / value for name, value in medians.items() if name != ours},
    }


def print_row(row: dict[str, Any], letters: str, first: bool) -> None:
    medians = row["median_milliseconds"]
    ratios = next(value for key, value in row.items() if key.endswith("_relative_to"))
    heads = [letters, *medians, *(f"/ {name}" for name in ratios)]
    cells = [", ".join(str(size) for size in row["shape"].values())]
    cells += [f"{value:.2f}" for value in medians.values()] + [f"{value:.2f}" for value in ratios.values()]
    widths = [22, *(max(len(head), 10) for head in heads[1:])]
    for line in [heads, cells] if first else [cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)
