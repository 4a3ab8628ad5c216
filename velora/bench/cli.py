"""velora-bench: speed and bytes.

    velora-bench                                     one layer (operator) with VeLoRA and without, beside PEFT's
    velora-bench step                                whole steps: what is kept x what is computed again
    velora-bench step --model llama_60m --points velora_all,velora_all+lean trainer.batch_size=8
    velora-bench figure2 --picture figure2.png       Figure 2 of the paper, on a small network in some minutes
    velora-bench figure2 model=llama_60m task=c4     the same of another network; overrides as for velora-train
    velora-bench gpu                                 all that needs a GPU, in under ten minutes

The candidates run in turn, A B C A B C ..., so that whatever else the machine does meets all of them alike; what is
reported is the median over the rounds and ratios of medians. Of a layer N is tokens, D in-features, M out-features, G groups.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from velora.bench.convolution import CONVOLUTIONS
from velora.bench.operator import SHAPES
from velora.bench.step import DEFAULT_MODELS, POINTS, SETTINGS
from velora.cli import Parser, report
from velora.errors import ConfigError, RunError

GPU_PARTS = ("tests", "operator", "step", "table7", "estimate")
MODES = ("operator", "step", "figure2", "gpu")
OPTIONS = {
    "shape": ("operator",), "conv": ("operator",),
    "model": ("step",), "points": ("step",), "picture": ("step", "figure2"), "optimizer": ("step",),
    "json": ("operator", "step", "figure2"), "repeats": ("operator", "step"), "dtype": ("operator", "step"),
    "out": ("gpu",), "parts": ("gpu",), "minutes": ("gpu",), "tiny": ("gpu",), "overrides": ("step", "figure2"),
    "groups": ("figure2",), "steps": ("figure2",),
}  # fmt: skip
"""Options that not every mode has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Console script `velora-bench`; returns the exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        _check(arguments)
        return {"operator": _operator, "step": _step, "figure2": _figure2, "gpu": _gpu}[arguments.mode](arguments)
    except ConfigError as error:
        return report("velora-bench", str(error), 2)
    except (_NotWritten, RunError) as error:
        return report("velora-bench", str(error), 1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("velora-bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=MODES, default="operator", help="operator is the default")
    parser.add_argument(
        "overrides", nargs="*", help="step, figure2: overrides of velora-train, for all points or networks"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: cpu, cuda of gpu, what there is of figure2")
    parser.add_argument("--threads", type=_positive, metavar="T", help="CPU threads of torch (all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32")
    parser.add_argument("--repeats", type=_positive, metavar="R", help="measured rounds (operator: 20, step: 9)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the record there, too; {model} stands for the model's name"
    )
    shapes = "\n".join(f"  {','.join(map(str, shape))}  {what}" for shape, what in SHAPES.items())
    group = parser.add_argument_group("operator")
    group.add_argument(
        "--shape", type=_shape, action="append", metavar="N,D,M,G", help=f"repeatable; default:\n{shapes}"
    )
    sizes = "\n".join(f"  {','.join(map(str, size))}  {what}" for size, what in CONVOLUTIONS.items())
    group.add_argument(
        "--conv", type=_convolution, action="append", metavar="N,C,P,M,G",
        help=f"a 3 x 3 convolution of N images of P x P pixels; repeatable; default, without --shape:\n{sizes}",
    )  # fmt: skip
    group = parser.add_argument_group("step")
    group.add_argument(
        "--model", type=_among(SETTINGS), metavar="A,B", help=f"default: {','.join(DEFAULT_MODELS)};\nalso llama_tiny"
    )
    group.add_argument("--points", type=_among(POINTS), metavar="A,B", help="default: all:\n" + "\n".join(POINTS))
    group.add_argument("--optimizer", action="store_const", const=True, help="with the optimiser's step (AdamW)")
    group.add_argument(
        "--picture",
        metavar="FILE",
        help="draw bytes against time, with the frontier; {model} as in --json\n(figure2: its three panels)",
    )
    group = parser.add_argument_group("figure2")
    group.add_argument("--groups", type=_groups, metavar="A,B", help="a network for each number of groups (1,2,4,8,16)")
    group.add_argument("--steps", type=_positive, metavar="N", help="training steps of each network (1000)")
    group = parser.add_argument_group("gpu")
    group.add_argument("--parts", type=_among(GPU_PARTS), metavar="A,B", help=f"default: {','.join(GPU_PARTS)}")
    group.add_argument("--out", type=Path, metavar="DIR", help="records are appended there (runs/records/gpu)")
    group.add_argument("--minutes", type=_positive, help="what has not begun by then is not run, and named (9)")
    group.add_argument(
        "--tiny", action="store_const", const=True, help="tiny networks, to see that it all works, also on a CPU"
    )
    return parser


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        n, d, m, g = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be four integers N,D,M,G") from None
    if min(n, d, m, g) < 1 or d % g:
        raise argparse.ArgumentTypeError(f"{text!r}: N, D, M, G must be positive and G={g} must divide D={d}")
    return n, d, m, g


def _convolution(text: str) -> tuple[int, int, int, int, int]:
    try:
        n, c, p, m, g = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be five integers N,C,P,M,G") from None
    if min(n, c, p, m, g) < 1 or c % g:
        raise argparse.ArgumentTypeError(f"{text!r}: N, C, P, M, G must be positive and G={g} must divide C={c}")
    return n, c, p, m, g


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def _groups(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def _among(known: Any) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if wrong := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(map(repr, wrong))} is not one of {', '.join(known)}")
        return list(dict.fromkeys(found))

    return names


def _check(arguments: argparse.Namespace) -> None:
    """ConfigError for an option that would have no effect."""
    for name, modes in OPTIONS.items():
        if getattr(arguments, name) and arguments.mode not in modes:
            given = " ".join(arguments.overrides) if name == "overrides" else f"--{name}"
            raise ConfigError(f"{given} has no effect on `{arguments.mode}`; it belongs to `{'`, `'.join(modes)}`")


class _NotWritten(Exception):
    """Its sentence names the file; the measurement itself went well."""


def _take_file(option: str, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be written ({error.strerror}); name another file") from None


def _write(record: dict[str, Any], file: Path) -> None:
    try:
        file.write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise _NotWritten(f"--json {file} cannot be written ({error.strerror})") from None


def _operator(arguments: argparse.Namespace) -> int:
    from velora.bench.operator import operator

    if arguments.json is not None:
        _take_file("--json", Path(arguments.json))  # before the minutes of measuring
    chosen = arguments.shape or arguments.conv
    record = operator(
        arguments.shape or [] if chosen else list(SHAPES), arguments.conv or [] if chosen else list(CONVOLUTIONS),
        device_name=arguments.device or "cpu", dtype_name=arguments.dtype or "float32",
        repeats=arguments.repeats or 20, threads=arguments.threads,
    )  # fmt: skip
    if arguments.json is not None:
        _write(record, Path(arguments.json))
    return 0


def _step(arguments: argparse.Namespace) -> int:
    from velora.bench.machine import device_called
    from velora.bench.step import Wishes, compare_points, table
    from velora.memory.cli import quiet
    from velora.run.environment import git_state, versions

    models = arguments.model or list(DEFAULT_MODELS)
    files = {option: _files(option, getattr(arguments, option), models) for option in ("json", "picture")}
    wishes = Wishes(
        device_called(arguments.device or "cpu", arguments.threads), arguments.dtype or "float32", arguments.repeats or 9,
        bool(arguments.optimizer), tuple(arguments.overrides),
    )  # fmt: skip
    quiet()
    for model in models:
        record = compare_points(model, arguments.points or list(POINTS), wishes)
        record |= {"versions": versions(), "git": git_state(), "command": " ".join(["velora-bench", *sys.argv[1:]])}
        print(table(record), end="\n\n", flush=True)
        if arguments.json is not None:
            _write(record, files["json"][model])
        if arguments.picture is not None:
            from velora.bench.picture import draw

            _draw(draw, record, files["picture"][model])
    return 0


def _draw(draw: Callable[[dict[str, Any], Path], None], record: dict[str, Any], file: Path) -> None:
    try:
        draw(record, file)
    except OSError as error:
        raise _NotWritten(f"--picture {file} cannot be written ({error.strerror})") from None


def _figure2(arguments: argparse.Namespace) -> int:
    from velora.bench.figure2 import GROUPS, figure2, table
    from velora.bench.machine import device_called
    from velora.run.environment import git_state, versions

    for option in ("json", "picture"):
        if (given := getattr(arguments, option)) is not None:
            _take_file(f"--{option}", Path(given))  # before the minutes of training
    device = device_called(arguments.device or "cpu", arguments.threads)
    about = {"versions": versions(), "git": git_state(), "command": " ".join(["velora-bench", *sys.argv[1:]])}
    record = figure2(
        arguments.overrides, groups=arguments.groups or GROUPS, steps=arguments.steps or 1000,
        device=device if arguments.device else None,
    )  # fmt: skip
    record |= about
    print(table(record))
    if arguments.json is not None:
        _write(record, Path(arguments.json))
    if arguments.picture is not None:
        from velora.bench.figure2_picture import draw

        _draw(draw, record, Path(arguments.picture))
    return 0


def _files(option: str, given: str | None, models: list[str]) -> dict[str, Path]:
    """The file of each model; ConfigError before the minutes of measuring."""
    if given is None:
        return {}
    if len(models) > 1 and "{model}" not in given:
        raise ConfigError(f"--{option} {given} is one file for {len(models)} models; write {{model}} in its name")
    files = {model: Path(given.replace("{model}", model)) for model in models}
    for file in files.values():
        _take_file(f"--{option}", file)
    return files


def _gpu(arguments: argparse.Namespace) -> int:
    from velora.bench.gpu import Job, earlier, run_gpu
    from velora.bench.machine import device_called
    from velora.memory.cli import quiet

    parts = arguments.parts or list(GPU_PARTS)
    if arguments.device == "cpu" and not arguments.tiny:
        raise ConfigError("--device cpu runs the parts of `gpu` with --tiny only, to see that they work; give both")
    device = device_called(arguments.device or "cuda", arguments.threads)
    out = arguments.out or Path("runs/records/gpu")
    for part in parts:
        earlier(out / f"{part}.json")  # before the minutes of measuring
    quiet()
    job = Job(device, bool(arguments.tiny), 60.0 * (arguments.minutes or 9))
    return run_gpu(job, parts, out)
