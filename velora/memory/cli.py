"""`velora-memory [options] [overrides]`: what a configuration of velora-train would use, without training it.

    velora-memory method=velora                                   the default run, on any machine
    velora-memory method=qlora_velora model=llama_13b task=c4 task.max_length=512 trainer.batch_size=16
    velora-memory --fit 24GiB method=lora_velora model=llama_7b   the largest batch that fits
    velora-memory -m method=full,lora,galore,velora               a comparison, as a table and a chart
    velora-memory --measure trainer.device=cpu                    the estimate beside real steps on this machine

The overrides are those of velora-train. Of the task only the shapes count: no data, no weights, no device are needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora.cli import Parser, launch, report
from velora.config.run import Config
from velora.errors import ConfigError
from velora.report.text import human_bytes

if TYPE_CHECKING:
    from velora.memory.explain import Explanation, Questions

GROUPINGS = ("holders", "role", "kind", "term", "module")
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 2 ** (10 * power) for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", 1)}


def main(argv: Sequence[str] | None = None) -> None:
    """Console script `velora-memory`. Exit status 2 for a wrong configuration or option, as for velora-train."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options, overrides = _parser().parse_known_args(argv)
    try:
        fit_bytes = None if options.fit is None else parse_bytes(options.fit)
        _check(options)
    except ConfigError as error:
        sys.exit(report("velora-memory", str(error), 2))
    found: list[Explanation] = []

    def job(config: Config) -> None:
        if config.trainer.max_steps == 0:
            raise ConfigError(
                f"trainer.max_steps=0: task={config.task.name} trains nothing here, so there is no training memory to count; give "
                "a task that trains, and its steps"
            )
        if options.save is not None:
            _take_folder(options.save)
        from velora.memory.explain import Questions, explain

        quiet()
        questions = Questions(options.device, options.padded, not options.no_ledger, options.measure, fit_bytes)
        explanation = explain(config, questions)
        found.append(explanation)
        _print(explanation, questions, options.by or "holders")
        if options.save is not None:
            _save(explanation, options.save, argv, options.storages)

    sys.argv = [sys.argv[0], *overrides]
    status = launch("velora-memory", job)
    if len(found) > 1:
        _compare(found, options.save)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="velora-memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--fit", metavar="SIZE", help="find the largest batch whose peak stays within SIZE, like 24GiB")
    parser.add_argument("--by", choices=GROUPINGS, help="how the ledger is grouped (default: holders)")
    parser.add_argument("--no-ledger", action="store_true", help="only the estimate")
    parser.add_argument(
        "--measure", action="store_true", help="also run two real steps here (random weights) and measure"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="the device to estimate for (default: trainer.device; auto means cuda)",
    )
    parser.add_argument("--padded", action="store_true", help="one sequence has padding, so attention masks exist")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write one JSON record per configuration, and charts")
    parser.add_argument(
        "--storages", action="store_true", help="with --save: every storage of the ledger with its holders"
    )
    return parser


def parse_bytes(text: str) -> int:
    """ "24GiB", "8 GB", "512MiB" or plain bytes as a number of bytes; ConfigError for anything else, and for nothing."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"--fit {text!r} is not an amount of memory; write it like 24GiB, 8GB or 512MiB")
    num_bytes = int(float(match[1]) * _UNITS[match[2]])
    if num_bytes < 1:
        raise ConfigError(f"--fit {text!r} is no memory at all; write what there is, like 24GiB, 8GB or 512MiB")
    return num_bytes


def _check(options: argparse.Namespace) -> None:
    """ConfigError for an option that would have no effect."""
    if options.storages and options.save is None:
        raise ConfigError("--storages goes into the record of --save DIR; give both, or leave it out")
    for name in ("by", "storages"):
        if options.no_ledger and getattr(options, name):
            raise ConfigError(f"--{name} is about the ledger, and --no-ledger leaves it out; give one of the two")


def _print(explanation: Explanation, questions: Questions, by: Any) -> None:
    from rich.console import Console

    from velora.memory.estimate import LARGEST_SEARCHED
    from velora.memory.tables import figures_table, freed_table, ledger_table

    console = Console(width=None if sys.stdout.isatty() else 150)
    config, figures = explanation.config, explanation.figures
    batch = f"{config.trainer.accumulation_steps} x {config.trainer.examples_per_forward}"
    console.print(
        f"\n{config.name}: two training steps, batch {batch}, on {figures.device}", style="bold", highlight=False
    )
    title = f"peak {human_bytes(figures.peak.num_bytes)} in {figures.peak.moment}"
    console.print(figures_table(figures, explanation.measured, title))
    counted = sum(explanation.accounting.values())
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in explanation.accounting.items())
    console.print(f"the paper's accounting (Tables 3, 5b, 6): {human_bytes(counted)} = {parts}", highlight=False)
    for name, value in explanation.paper.items():
        console.print(f"the paper prints {name} = {value}; {explanation.beside(name)}", highlight=False)
    if explanation.ledger is not None:
        console.print(ledger_table(explanation.ledger, by, "\nheld by autograd between forward and backward"))
        console.print(freed_table(explanation.freed, "\nwhat VeLoRA would free of the exact network"))
    for warning in explanation.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    if explanation.largest_batch is not None and questions.fit_bytes is not None:
        limit = human_bytes(questions.fit_bytes)
        least = "at least " if explanation.largest_batch >= LARGEST_SEARCHED else ""
        text = (
            f"largest batch within {limit}: {least}{explanation.largest_batch}"
            if explanation.largest_batch
            else f"no batch fits {limit}"
        )
        console.print(text, style="bold", highlight=False)


def _compare(found: list[Explanation], folder: Path | None) -> None:
    from rich.console import Console

    from velora.memory.tables import columns_table, draw_columns, mebibytes

    labels = _labels(found)
    peaks = {label: e.figures.peak.terms for label, e in zip(labels, found, strict=True)}
    extra: dict[str, dict[str, str]] = {
        "saved MiB": {label: mebibytes(e.figures.saved_bytes) for label, e in zip(labels, found, strict=True)},
        "moment": {label: str(e.figures.peak.moment) for label, e in zip(labels, found, strict=True)},
    }
    if any(e.paper for e in found):
        extra["paper GB"] = {
            label: ", ".join(f"{v}" for v in e.paper.values()) for label, e in zip(labels, found, strict=True)
        }
    if any(e.largest_batch is not None for e in found):
        extra["largest batch"] = {label: str(e.largest_batch) for label, e in zip(labels, found, strict=True)}
    Console(width=None if sys.stdout.isatty() else 180).print(columns_table(peaks, "\nat the peak, MiB", extra))
    if folder is None:
        return
    draw_columns(peaks, folder / "peak.png", "memory at the peak, by term")
    ledgers = {label: e.ledger.grouped("role") for label, e in zip(labels, found, strict=True) if e.ledger is not None}
    if ledgers:
        draw_columns(ledgers, folder / "saved.png", "saved for backward, by who holds it first")
    print(f"charts: {folder / 'peak.png'}" + (f", {folder / 'saved.png'}" if ledgers else ""))


def _labels(found: list[Explanation]) -> list[str]:
    """Names of methods; where these repeat, what tells the configurations apart."""

    def experiment(e: Explanation) -> str:
        return (e.config.experiment.name if e.config.experiment else e.config.name).rpartition("/")[2]

    for name in (
        lambda e: e.config.method.name,
        lambda e: f"{e.config.model.name} {e.config.method.name}",
        experiment,
        lambda e: f"{e.config.model.name} {experiment(e)}",
        lambda e: e.config.name,
    ):
        labels = [name(e) for e in found]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}: {e.config.name}" for index, e in enumerate(found)]


def _save(explanation: Explanation, folder: Path, argv: list[str], storages: bool) -> None:
    from velora.run.environment import git_state, versions

    ledger = explanation.ledger
    record = {
        **explanation.to_json(),
        **({"ledger": ledger.to_json()} if storages and ledger is not None else {}),
        "versions": versions(),
        "git": git_state(),
        "command": " ".join(["velora-memory", *argv]),
        "config": explanation.config.raw,
    }
    path = folder / (re.sub(r"[^\w.=+,-]+", "_", explanation.config.name) + ".json")
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"record: {path}")


def _take_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--save {folder} cannot be written ({error.strerror}); name another folder") from None


def quiet() -> None:
    """Keep libraries from talking beside a table."""
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
