"""velora-bench: how long one layer takes, forward and backward, with VeLoRA and without.

The candidates run in turn, A B C A B C ..., so that whatever else the machine does meets all of them alike; what is
reported is the median over the rounds and ratios of medians. All have the same weight, input and direction.

    N  tokens      D  in-features      M  out-features      G  groups: sub-tokens in a token
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from velora.cli import Parser, report
from velora.errors import ConfigError

if TYPE_CHECKING:
    import torch

SHAPES = ["2048,1376,512,86", "1024,3072,768,64", "512,4096,4096,32", "256,11008,4096,32"]
"""LLaMA-60M's down projection, ViT-B's and RoBERTa-base's second MLP layer, LLaMA-7B's value and down projections."""

WARM_UP = 3
Step = Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Console script `velora-bench`; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.json is not None:
            _take_file(arguments.json)  # before the minutes of measuring
        result = operator(arguments.shape or [_shape(shape) for shape in SHAPES], arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    except ConfigError as error:
        return report("velora-bench", str(error), 2)
    except OSError as error:
        return report("velora-bench", f"--json {arguments.json} cannot be written ({error.strerror})", 1)
    return 0


def _take_file(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json {file} cannot be written ({error.strerror}); name another file") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser("velora-bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=["operator"], default="operator", help="one layer (the default)")
    parser.add_argument(
        "--shape", type=_shape, action="append", metavar="N,D,M,G", help=f"repeatable; default: {' '.join(SHAPES)}"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    parser.add_argument("--repeats", type=_positive, default=20, metavar="R", help="measured rounds (20)")
    parser.add_argument("--threads", type=_positive, metavar="T", help="CPU threads of torch (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    return parser


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        n, d, m, g = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be four integers N,D,M,G") from None
    if min(n, d, m, g) < 1 or d % g:
        raise argparse.ArgumentTypeError(f"{text!r}: N, D, M, G must be positive and G={g} must divide D={d}")
    return n, d, m, g


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def operator(shapes: Sequence[tuple[int, int, int, int]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every candidate at every shape, print a table, and return the record.

    Times are milliseconds of one forward and backward; `weight_gradient_difference` is the largest deviation of
    VeloraLinear's weight gradient from PEFT's, relative to the largest entry.
    """
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.empty(0, device=arguments.device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {arguments.device} is not available here ({str(error).splitlines()[0]})") from None
    dtype = getattr(torch, arguments.dtype)
    about = machine(device)
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}; milliseconds, medians"
    )
    rows = []
    for shape in shapes:
        torch.manual_seed(0)
        candidates, difference = layer_candidates(shape, device, dtype)
        rows.append({"shape": dict(zip("NDMG", shape, strict=True)), **timed(candidates, arguments.repeats, device)})
        rows[-1]["weight_gradient_difference"] = difference
        _print_row(rows[-1], first=len(rows) == 1)
    return {
        "mode": "operator",
        "machine": about,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "results": rows,
    }


def layer_candidates(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Step], float | None]:
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


def timed(candidates: dict[str, Step], repeats: int, device: torch.device) -> dict[str, Any]:
    """Median and quartiles in milliseconds of each candidate, run in turn, and VeloraLinear's ratios to the others."""
    import torch

    def synchronise() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(WARM_UP + repeats):
        for name, step in candidates.items():
            synchronise()
            start = time.perf_counter()
            step()
            synchronise()
            if round_ >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: median(values) for name, values in times.items()}
    mine = medians["VeloraLinear"]
    return {
        "median_milliseconds": medians,
        "quartiles_milliseconds": {
            name: quantiles(values, n=4)[::2] if len(values) > 1 else [values[0]] * 2 for name, values in times.items()
        },
        "velora_linear_relative_to": {name: mine / value for name, value in medians.items() if name != "VeloraLinear"},
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the times belong to; `load_average` of the minute before tells whether the machine was otherwise idle."""
    import torch

    name = _processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print_row(row: dict[str, Any], first: bool) -> None:
    medians, ratios = row["median_milliseconds"], row["velora_linear_relative_to"]
    heads = ["N, D, M, G", *medians, *(f"/ {name}" for name in ratios)]
    cells = [", ".join(str(size) for size in row["shape"].values())]
    cells += [f"{value:.2f}" for value in medians.values()] + [f"{value:.2f}" for value in ratios.values()]
    widths = [22, *(max(len(head), 10) for head in heads[1:])]
    for line in [heads, cells] if first else [cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)
