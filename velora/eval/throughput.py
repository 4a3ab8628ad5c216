"""How many questions of MMLU a second: shared examples against full prompts, the same network and questions.

    python -m velora.eval.throughput [--rounds 3] [--threads 2] [--json FILE] task=mmlu model=... [overrides of velora-train]

Both take the same questions in the same batches; they run in turn, subject by subject, so that whatever else the machine does
meets both alike. What counts is the ratio of the medians of a subject's times; predictions are compared question by question.
`cpu_seconds` are those of this process on all its threads: on a machine that others use too they say more than the clock does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import velora
from velora.config.run import Config
from velora.data.mmlu_prompt import prompts
from velora.errors import ConfigError
from velora.eval.mmlu import Benchmark
from velora.eval.shared_prefix import next_token_log_probs
from velora.memory.meter import autocast_dtype
from velora.models.build import build_network
from velora.run.device import device_name, training_device
from velora.run.environment import versions
from velora.run.files import write_whole


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m velora.eval.throughput", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each subject is asked both ways (3)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        config = velora.compose(*overrides)
        if config.task.kind != "mmlu":
            raise ConfigError(f"task={config.task.name} is not MMLU; give task=mmlu")
        found = measured(config, arguments.rounds)
    except ConfigError as error:
        print(f"velora.eval.throughput: {error}", file=sys.stderr)
        return 2
    found["command"] = " ".join(["python -m velora.eval.throughput", *(argv if argv is not None else sys.argv[1:])])
    print(json.dumps({key: found[key] for key in ("speedup", "speedup_in_cpu_seconds", "questions", "same_choice")}))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.json, json.dumps(found, indent=2) + "\n")
    return 0


def measured(config: Config, rounds: int) -> dict[str, Any]:
    """The record: questions a second of both ways, in all and for each subject, and how far their log-probabilities differ."""
    device = training_device(config)
    preprocessor = config.model.preprocessor(config)
    benchmark = config.task.load(preprocessor, config).benchmark
    assert isinstance(benchmark, Benchmark)
    network, _ = build_network(config, config.task.head(config), preprocessor)
    network = network.to(device).eval()
    rows = [_subject(network, benchmark, index, rounds, config) for index in range(len(benchmark.subjects))]
    seconds, cpu = (
        {way: sum(row[key][way] for row in rows) for way in ("shared", "full")} for key in ("seconds", "cpu_seconds")
    )
    questions = sum(row["questions"] for row in rows)
    return {
        "speedup": seconds["full"] / seconds["shared"],
        "speedup_in_cpu_seconds": cpu["full"] / cpu["shared"],
        "questions": questions,
        "questions_per_second": {way: questions / value for way, value in seconds.items()},
        "same_choice": sum(row["same_choice"] for row in rows),
        "largest_difference_of_log_probs": max(row["largest_difference"] for row in rows),
        "rounds": rounds,
        "model": config.model.name,
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "precision": config.trainer.precision,
        "batch_size": config.trainer.eval_batch_size,
        "device": device_name(device),
        "versions": versions(),
        "benchmark": benchmark.about,
        "subjects": rows,
    }


def _subject(network: nn.Module, benchmark: Benchmark, index: int, rounds: int, config: Config) -> dict[str, Any]:
    """One subject, both ways in turn: medians of seconds over the rounds."""
    subject = benchmark.subjects[index]
    asked = prompts(subject, benchmark.keys, benchmark.encoder)
    contexts, dtype = [prompt.context for prompt in asked], autocast_dtype(config)
    device = next(network.parameters()).device
    seconds: dict[str, list[float]] = {"shared": [], "full": []}
    cpu: dict[str, list[float]] = {"shared": [], "full": []}
    found: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for way, times in seconds.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                found[way] = next_token_log_probs(
                    network,
                    contexts,
                    asked[0].letters,
                    batch_size=config.trainer.eval_batch_size,
                    share=way == "shared",
                )
            times.append(time.perf_counter() - started)  # the figures are on the CPU by then
            cpu[way].append(time.process_time() - cpu_started)
    middle = {way: median(times) for way, times in seconds.items()}
    row = {
        "subject": subject.name,
        "questions": len(contexts),
        "tokens_of_a_prompt": sum(map(len, contexts)) / len(contexts),
        "seconds": middle,
        "cpu_seconds": {way: median(times) for way, times in cpu.items()},
        "speedup": middle["full"] / middle["shared"],
        "same_choice": int((found["shared"].argmax(1) == found["full"].argmax(1)).sum()),
        "largest_difference": float((found["shared"] - found["full"]).abs().max()),
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
