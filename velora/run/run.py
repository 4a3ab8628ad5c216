"""One run: data -> network -> weights -> adapter -> activations -> recompute -> calibrate -> train -> evaluate -> record."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any

from velora.config.parts import Phase, TaskData
from velora.config.run import Config
from velora.errors import ConfigError, Diverged, Interrupted, RunError, original_text
from velora.run.record import Run
from velora.run.schema import parse_json
from velora.run.signals import terminate_as_interrupt


@dataclass
class Measured:
    """What a run has found out so far; whatever stands here when it ends, well or badly, goes into the record."""

    metrics: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    device: str | None = None


def train(config: Config) -> dict[str, Any]:
    """Train, evaluate and record one run, or continue it; returns its record, as it stands in result.json.

        record = velora.train(velora.compose("method=velora", "trainer.max_steps=20"))
        record["metrics"]

    A run that has finished is not run again: its record is read (`overwrite=true` runs it again). Raises ConfigError where the
    configuration, the data or the folder is wrong, RunError where the run ends badly (its record says how), or is stopped.
    """
    run = Run(config)  # refuses a folder that cannot be written or holds another run, before the heavy imports
    if run.is_finished():
        print(f"{run.folder} holds this run already, finished; overwrite=true runs it again")
        record: dict[str, Any] = parse_json((run.folder / "result.json").read_bytes())
        return record
    return execute(config, run)


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Train, evaluate and record; returns the record. Every failure is recorded before it is raised again."""
    try:
        return _guarded(config, run)
    finally:
        run.release()


def _guarded(config: Config, run: Run) -> dict[str, Any]:
    _quiet()

    measured = Measured()
    try:
        with terminate_as_interrupt():
            if config.has_only_shapes:
                from velora.run.shapes import measure_shapes

                run.start()
                measure_shapes(config, measured)
            else:
                _load_and_execute(config, run, measured)
    except ConfigError as error:
        _fail(run, measured, "failed", str(error))
        raise
    except Diverged as error:
        _fail(run, measured, "diverged", str(error))
        raise
    except (KeyboardInterrupt, Interrupted) as error:
        sentence = str(error) or "stopped"
        _fail(run, measured, "failed", sentence)
        continues = (run.has_checkpoint() or run.has_answers()) and config.resume != "never" and not config.overwrite
        raise Interrupted(
            f"{sentence}; the same command {'continues it' if continues else 'starts it again'}"
        ) from None
    except RunError as error:
        _fail(run, measured, "failed", str(error))
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            sentence = " ".join(str(error).split())[:300]
            _fail(run, measured, "out_of_memory", sentence)
            raise RunError(f"out of memory: {sentence}; lower trainer.micro_batch_size or see velora-memory") from None
        _fail(run, measured, "failed", f"{type(error).__name__}: {original_text(error)}")
        kept = run.keep_traceback(traceback.format_exc())
        if os.environ.get("VELORA_TRACEBACK"):
            raise
        where = f" (the traceback is in {kept})" if kept else ""
        raise RunError(f"{type(error).__name__}: {original_text(error)}{where}") from None
    record = run.finish("ok", None, vars(measured))
    if run.writes:
        _print_summary(record, run)
    return record


def _load_and_execute(config: Config, run: Run, measured: Measured) -> None:
    preprocessor = config.model.preprocessor(config)
    data = config.task.load(preprocessor, config)
    measured.data = data.about
    run.start()  # gives up an earlier run that is to be replaced: not before the data are there
    if run.writes:
        run.tracker.start(config, run.folder)
    _execute(config, run, measured, data, preprocessor)


def _execute(config: Config, run: Run, measured: Measured, data: TaskData, preprocessor: Any) -> None:
    if config.trainer.max_steps == 0:
        _evaluate(config, run, measured, data, preprocessor)
        return
    best_epochs: dict[str, float] = {}
    for index, phase in enumerate(data.phases):
        final = index == len(data.phases) - 1
        best_epoch = _train_phase(config, run, measured, data, phase, preprocessor, best_epochs, final)
        if best_epoch is not None:
            best_epochs[phase.name] = best_epoch


def _evaluate(config: Config, run: Run, measured: Measured, data: TaskData, preprocessor: Any) -> None:
    """Score the network as it is; nothing is trained."""
    from velora.models.build import build_network, parameter_counts, weights_bytes
    from velora.run.benchmark import flat_scores, judge
    from velora.run.device import device_name, training_device

    device = training_device(config)
    network, _ = build_network(config, config.task.head(config), preprocessor)
    measured.parameters, measured.device = parameter_counts(network), device_name(device)
    network = network.to(device)
    measured.memory["weights_bytes"] = weights_bytes(network)
    scores = judge(config, run, data, network, 0)
    measured.metrics.update({**scores, "best": {**flat_scores(scores), "step": 0}})


def _train_phase(
    config: Config, run: Run, measured: Measured, data: TaskData, phase: Phase, preprocessor: Any,
    best_epochs: dict[str, float], final: bool,
) -> float | None:  # fmt: skip
    """Train one phase from the start (or from its checkpoint); returns the epoch of its best score."""
    from velora.models.build import build_network, parameter_counts
    from velora.run.benchmark import judge
    from velora.run.sharding import gather
    from velora.run.train import Outcome, train_phase

    network, changes = build_network(config, config.task.head(config), preprocessor)
    measured.parameters = parameter_counts(network)
    if run.writes and changes:
        print(changes)
    outcome = Outcome()
    try:
        train_phase(config, run, data, phase, network, outcome, best_epochs.get(phase.stop_at_best_of or ""))
    finally:
        measured.device = outcome.device
        if outcome.figures is not None:
            measured.memory.update(outcome.figures.memory)
            measured.speed.update(outcome.figures.speed)
    scores = {**outcome.final_scores, "best": outcome.best_scores}
    if final:
        measured.metrics.update(scores)
        measured.metrics.update(judge(config, run, data, outcome.network, outcome.step))
        if config.trainer.save_model and config.trainer.sharding != "none" and outcome.network is not None:
            gather(outcome.network, keep=run.writes)
        if config.trainer.save_model and run.writes:
            config.adapter.save(outcome.network, run.folder / "model")
            if hasattr(preprocessor, "save_pretrained"):
                preprocessor.save_pretrained(run.folder / "model")
    else:
        measured.metrics[phase.name] = scores
    return outcome.best_scores.get("epoch")


def _fail(run: Run, measured: Measured, status: str, sentence: str) -> None:
    """Record a failure; one before the run has started takes the place of nothing that an earlier run has left."""
    if not run.started:
        if run.holds_results():
            return
        run.start()
    run.finish(status, sentence, vars(measured))


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has an error of its own; on a CPU it is Python's, or the text of torch's allocator."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _quiet() -> None:
    """Settings that libraries read when they are imported, and their chatter."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message="Image size|Palette images|Corrupt EXIF")  # see velora/models/images.py
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    warnings.filterwarnings(
        "ignore", message=".*LoRA tensor.*invalid shape.*"
    )  # PEFT on our one-dimensional directions
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # those of reading and writing files; the training keeps its own


def _print_summary(record: dict[str, Any], run: Run) -> None:
    from velora.report.text import summary

    print(summary(record))
    print(f"record: {run.folder / 'result.json'}")
