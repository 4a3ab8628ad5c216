"""One phase of a run: `transformers.Trainer` with our optimiser, order of examples, loss, scores and measuring.

`train_phase` reads from top to bottom. What the subclass of Trainer changes: where the batches come from (velora/run/order.py),
how the loss of a step is a mean over its items (`compute_loss`), and that evaluations and checkpoints are kept out of the
figures. `Watch` writes the lines of metrics.jsonl and knows the reasons to stop.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from velora.config.parts import Phase, TaskData
from velora.config.run import Config
from velora.errors import Diverged, Interrupted, RunError, first_line
from velora.memory.ledger import take_ledger
from velora.memory.meter import autocast_dtype, training_loss
from velora.nn.apply import without_a_trace
from velora.nn.surroundings import autocast_as
from velora.run.arguments import training_arguments
from velora.run.benchmark import judge
from velora.run.checkpoints import non_finite_tensors, step_of
from velora.run.device import device_name
from velora.run.figures import Figures
from velora.run.notes import note
from velora.run.order import TrainingData
from velora.run.record import Run
from velora.run.sharding import Sharded, gathered_outside_blocks, shard
from velora.run.signals import StopRequest

MAX_SKIPPED_STEPS = 50  # in a row: the gradient scaler halves its factor at each, and starts at 2^16


@dataclass
class Outcome:
    """What a phase found; filled as it goes, so that a run that fails records what there is."""

    figures: Figures | None = None
    final_scores: dict[str, float] = field(default_factory=dict)
    best_scores: dict[str, float] = field(default_factory=dict)  # with `step` and `epoch`
    device: str | None = None
    network: nn.Module | None = None
    step: int = 0  # optimiser steps at its end


def train_phase(
    config: Config, run: Run, data: TaskData, phase: Phase, network: nn.Module, outcome: Outcome, stop_after_epoch: float | None
) -> None:  # fmt: skip
    """Calibrate, train (from the last checkpoint if there is one), evaluate at the end."""
    phase_folder = phase.name if len(data.phases) > 1 else ""
    folder = run.folder / phase_folder
    arguments = training_arguments(config, folder, "end" if phase.only_at_end else config.trainer.eval_every)
    if phase.only_at_end and len(data.phases) == 1 and config.trainer.eval_every != "end":
        note(
            f"trainer.eval_every={config.trainer.eval_every} is not used with this protocol: its scores must not choose an epoch, "
            "so they are taken once, at the end"
        )
    if config.trainer.sharding == "fsdp":
        shard(network, arguments.device)
    figures = Figures(arguments.device, data.unit)
    seal = partial(run.seal, phase=phase_folder)
    outcome.figures, outcome.device = figures, device_name(arguments.device)
    trainer_class = PhaseTrainer if config.trainer.sharding == "none" else ShardedTrainer
    trainer = trainer_class(config, data, phase, figures, seal, model=network, args=arguments)
    stop, bar = StopRequest(), _Bar()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Watch(config, run, phase, trainer, stop, stop_after_epoch))
    trainer.add_callback(bar)  # after it: a note of the start stands above the bar

    checkpoint = run.last_checkpoint(phase_folder)
    run.rewind_metrics(phase.name, (step_of(checkpoint) or 0) if checkpoint else 0)
    if checkpoint is None:
        prepare(network, trainer.order.first_step(), config, figures)
    else:
        if broken := non_finite_tensors(checkpoint):
            raise Diverged(
                f"{checkpoint} holds values that are not finite ({broken[0]} and {len(broken) - 1} more tensors)"
            )
        figures.load(checkpoint, first_process=arguments.process_index == 0)
        if run.writes:
            print(f"continuing from {checkpoint}")
    try:
        with stop.listening():
            trainer.fit(checkpoint)
            if stop.signal_name is not None:
                raise Interrupted(f"stopped by {stop.signal_name} at step {trainer.state.global_step}")
            figures.finish(trainer.sum_over_processes)
            if trainer.state.global_step not in scores_by_step(trainer.state):
                trainer.evaluate()
            trainer.accelerator.wait_for_everyone()  # no rank writes into a checkpoint that another one deletes
    finally:
        bar.close()
    outcome.network = trainer.accelerator.unwrap_model(trainer.model)
    outcome.step = trainer.state.global_step
    outcome.final_scores, outcome.best_scores = choose_scores(trainer.state, data, phase)


@torch.no_grad()
def prepare(network: nn.Module, step: Iterator[dict[str, Any]], config: Config, figures: Figures) -> None:
    """Before the first step: calibrate the activations axis on all its micro-batches, so that the directions do not depend on how
    it is divided, and count what autograd keeps of the first one. Leaves no trace in random numbers or buffers.
    """
    device = figures.device
    batches = (send_to_device(each, device) for each in step)
    batch = next(batches)
    network.train()
    loss = training_loss(network, batch, config)
    with (
        gathered_outside_blocks(network),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        autocast_as(autocast_dtype(config), device),
    ):
        config.activations.calibrate(network, itertools.chain([batch], batches))
    if not config.trainer.measure_memory:
        return
    with gathered_outside_blocks(network), without_a_trace(network), torch.enable_grad():
        ledger = take_ledger(network, loss)
    config.activations.forget(network)
    figures.note_forward(network, ledger.total_bytes)
    for sentence in config.activations.warnings(network, ledger, config):
        note(sentence)


class PhaseTrainer(Trainer):
    """Trainer with the configuration's optimiser, with our order of examples, and with a loss that is a mean over a step."""

    optimizer: Any

    def __init__(
        self,
        config: Config,
        data: TaskData,
        phase: Phase,
        figures: Figures,
        seal: Callable[[int], None],
        **arguments: Any,
    ) -> None:
        self.config, self.data, self.figures, self.seal = config, data, figures, seal
        validation = phase.validation
        super().__init__(
            data_collator=data.collate,
            train_dataset=phase.train,
            eval_dataset=validation[""] if list(validation) == [""] else validation,
            compute_metrics=self._scores,
            preprocess_logits_for_metrics=data.reduce_logits,
            **arguments,
        )
        self.model_accepts_loss_kwargs = False  # many forwards take **kwargs and ignore them; the division is ours
        self.order = TrainingData(
            phase.train, data.collate,
            batch_size=config.trainer.batch_size, micro_batch_size=config.trainer.examples_per_forward,
            drop_last=config.trainer.drop_last, seed=config.seed,
            rank=self.args.process_index, num_processes=self.args.world_size, lengths=phase.lengths,
        )  # fmt: skip

    def fit(self, checkpoint: Path | None) -> None:
        """`train`, which would train one step too many where the checkpoint is that of the last step."""
        with contextlib.suppress(_NothingLeft):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="sum")

    def get_train_dataloader(self) -> DataLoader:
        loader = self.order.loader(
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory
        )
        return self.accelerator.prepare(loader) if isinstance(self.train_dataset, IterableDataset) else loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.config.optimizer.build(self.model if model is None else model, self.config)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of a step and the number of its targets in all of them, on all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        targets = sum(torch.as_tensor(self.data.num_targets(batch)) for batch in batches)
        return batches, self.sum_over_processes(torch.as_tensor(targets, device=device, dtype=torch.float32))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.figures.chrono.count(self.data.num_items(inputs))
        model.train()
        inputs = send_to_device(inputs, self.args.device)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the targets of this forward; in training, its share of the mean over the targets of the step.

        Networks return the mean over their own targets. Times the number of these, over the targets of the whole step, the
        micro-batches of all processes add up to the mean over all; DDP averages over processes, hence their number.
        """
        outputs = model(**inputs)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            share = torch.as_tensor(self.data.num_targets(inputs), device=loss.device) / num_items_in_batch
            loss = loss * (share * self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.figures.aside():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self.figures.aside():
            try:
                super()._save_checkpoint(*args, **kwargs)
                self.figures.save(folder, self.sum_over_processes, writes=self.args.process_index == 0)
                self.accelerator.wait_for_everyone()
                self.seal(self.state.global_step)
            except RunError:
                raise
            except Exception as error:  # of the file system, as OSError, torch's writer or safetensors have it
                if not _is_about_files(error):
                    raise
                shutil.rmtree(folder, ignore_errors=True)
                raise RunError(
                    f"{folder} cannot be written ({first_line(error)}); make room or give another runs_dir=, then the same "
                    "command continues from the checkpoint before it"
                ) from error

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        return dict(self.data.metrics(prediction.predictions, prediction.label_ids))


class ShardedTrainer(Sharded, PhaseTrainer):
    """PhaseTrainer for a network that `shard` has sharded."""


class _NothingLeft(Exception):
    """The checkpoint that was loaded is that of the last step."""


class _Bar(ProgressCallback):
    """Trainer's progress bar with the latest loss in it, instead of a line for each logged step."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}", refresh=False)

    def close(self) -> None:
        """End the bars' line: what is printed next begins on its own."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


class Watch(TrainerCallback):
    """Lines for metrics.jsonl, the moments that the figures need, and the reasons to stop."""

    def __init__(
        self, config: Config, run: Run, phase: Phase, trainer: PhaseTrainer, stop: StopRequest, stop_after_epoch: float | None
    ) -> None:  # fmt: skip
        self.config, self.run, self.phase, self.stop = config, run, phase, stop
        self.order, self.figures, self.data = trainer.order, trainer.figures, trainer.data
        self.stop_after_epoch = stop_after_epoch
        self.num_skipped = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps or self._is_past_stop(state):
            raise _NothingLeft
        warmup = args.get_warmup_steps(state.max_steps)
        if warmup >= state.max_steps:
            note(
                f"the warm-up ({warmup} steps) is not shorter than the run ({state.max_steps} steps): the learning rate "
                "never reaches trainer.learning_rate"
            )
        self.figures.start(state.max_steps - state.global_step)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.order.start_epoch(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.figures.note_gradients(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not _was_skipped(optimizer):
            self.num_skipped = 0
            self.figures.note_optimizer(optimizer)
            return
        self.num_skipped += 1
        if self.num_skipped >= MAX_SKIPPED_STEPS:
            raise Diverged(
                f"the gradients overflowed in {self.num_skipped} steps in a row before step {state.global_step}, although the "
                "loss scale was halved each time; use trainer.precision=bf16, or a lower trainer.learning_rate"
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.config.after_step(model, kwargs["optimizer"], state.global_step)
        self.figures.chrono.step()
        if self.stop.signal_name is not None:
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._is_past_stop(state):
            control.should_training_stop = True
        last = state.global_step >= state.max_steps or control.should_training_stop  # judged when the run has ended
        if self.data.benchmark_every_epoch and not last:
            with self.figures.aside():
                judge(self.config, self.run, self.data, model, state.global_step, epoch=state.epoch, check=self._check)

    def _check(self) -> None:
        if self.stop.signal_name is not None:
            raise Interrupted(f"stopped by {self.stop.signal_name} in the benchmark")

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        values = {k: v for k, v in logs.items() if k != "epoch" and not k.endswith(_NOISE)}
        self.run.log({"phase": self.phase.name, "step": state.global_step, "epoch": state.epoch, **values})
        if _was_skipped(kwargs.get("optimizer")):
            values.pop("grad_norm", None)  # infinite, which is why the step was skipped; the weights are as before
        check_finite(values, state.global_step)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.stop.signal_name is not None:
            raise Interrupted(f"stopped by {self.stop.signal_name} in the evaluation at step {state.global_step}")

    def _is_past_stop(self, state: TrainerState) -> bool:
        return self.stop_after_epoch is not None and (state.epoch or 0) >= self.stop_after_epoch - 1e-6


def check_finite(values: dict[str, float], step: int) -> None:
    """Losses and gradient norms must be finite; a score need not be (the correlation of constant predictions is not)."""
    for key, value in values.items():
        if key.endswith(("loss", "grad_norm")) and not math.isfinite(value):
            raise Diverged(
                f"{key} is {value} at step {step}; a lower trainer.learning_rate, trainer.warmup_steps or "
                "trainer.max_grad_norm may help"
            )


_NOISE = ("_runtime", "_per_second", "_preparation_time")


def scores_by_step(state: TrainerState) -> dict[int, dict[str, float]]:
    """The scores of each evaluated step; Trainer keeps them in its state, so they survive a resume."""
    found: dict[int, dict[str, float]] = {}
    for line in state.log_history:
        scores = {
            k.removeprefix("eval_"): v for k, v in line.items() if k.startswith("eval_") and not k.endswith(_NOISE)
        }
        if scores:
            found.setdefault(line["step"], {}).update(scores)
    return found


def choose_scores(state: TrainerState, data: TaskData, phase: Phase) -> tuple[dict[str, float], dict[str, float]]:
    """The scores at the end, and those of the best evaluation with its `step` and `epoch`.

    The earliest of equally good ones is best. A score that is not a number (a correlation of constant predictions) is never
    better than one that is; where none is, the last evaluation stands.
    """
    by_step = scores_by_step(state)
    last = max(by_step)
    key = data.best_metric
    if key not in by_step[last]:  # several validation splits: the first one selects
        key = f"{next(iter(phase.validation))}_{key}"
    sign = 1 if data.greater_is_better else -1
    defined = [step for step in by_step if not math.isnan(by_step[step][key])]
    best = max(defined, key=lambda step: (sign * by_step[step][key], -step), default=last)
    epochs = {line["step"]: line.get("epoch") for line in state.log_history}
    return by_step[last], {**by_step[best], "step": best, "epoch": epochs[best]}


def _was_skipped(optimizer: Any) -> bool:
    """Whether the gradient scaler of fp16 left out the last step."""
    return bool(getattr(optimizer, "step_was_skipped", False))


def _is_about_files(error: Exception) -> bool:
    return isinstance(error, OSError) or any(
        sign in str(error) for sign in ("PytorchStreamWriter", "I/O error", "No space left", "IoError", "file write")
    )
