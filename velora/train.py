"""The training loop: `transformers.Trainer` with our optimiser, our scores and honest measuring around it.

What the subclass adds, and nothing else: the first batch calibrates the activations axis and is measured, evaluations and
checkpoints are kept out of speed and peak memory, and a loss that is not finite stops the run.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    EvalPrediction,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from velora.build import weights_bytes
from velora.chrono import Chrono
from velora.config import Config, TrainerConfig
from velora.errors import ConfigError, Diverged, Interrupted
from velora.group import Phase, TaskData
from velora.memory.ledger import take_ledger
from velora.memory.storages import plain_tensors, unique_bytes
from velora.record import Run
from velora.signals import StopRequest


class Loop:
    """One phase of one run. After `train()`: `final_scores`, `best_scores`, `memory` (bytes) and `speed` are filled."""

    def __init__(
        self, config: Config, run: Run, data: TaskData, phase: Phase, network: nn.Module, stop_after_epoch: float | None
    ) -> None:
        several = len(data.phases) > 1
        self.config, self.run, self.data, self.phase = config, run, data, phase
        self.phase_folder = phase.name if several else ""
        self.memory: dict[str, int] = {}
        self.speed: dict[str, float] = {}
        self.final_scores: dict[str, float] = {}
        self.best_scores: dict[str, float] = {}
        self.stop = StopRequest()
        validation = phase.validation
        self.trainer = MeasuringTrainer(
            owner=self,
            model=network,
            args=_arguments(
                config, run.folder / self.phase_folder, "end" if phase.only_at_end else config.trainer.eval_every
            ),
            data_collator=data.collate,
            train_dataset=phase.train,
            eval_dataset=validation[""] if list(validation) == [""] else validation,
            compute_metrics=self._scores,
            preprocess_logits_for_metrics=data.reduce_logits,
            callbacks=[_Watch(self, stop_after_epoch)],
        )
        self.trainer.remove_callback(ProgressCallback)
        self.trainer.add_callback(_Bar)

    @property
    def device_name(self) -> str:
        device = self.trainer.args.device
        return (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        )

    def train(self) -> None:
        """Run the phase, from its last checkpoint if there is one, and evaluate at its end."""
        trainer = self.trainer
        checkpoint = self.run.last_checkpoint(self.phase_folder) if self.config.resume != "never" else None
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self.run.rewind_metrics(self.phase.name, step)
        if checkpoint is not None and self.run.writes:
            print(f"continuing from {checkpoint}")
        trainer.first_batch_pending = checkpoint is None
        trainer.measuring_pending = self.config.trainer.measure_memory
        with self.stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self.stop.signal_name is not None:
                raise Interrupted(f"stopped by {self.stop.signal_name} at step {trainer.state.global_step}")
            self._measure_speed()
            if trainer.state.global_step not in _scores_by_step(trainer.state):
                trainer.evaluate()
            trainer.accelerator.wait_for_everyone()  # no rank writes into a checkpoint that another one deletes
        self._collect_scores()

    def save(self, folder: Path) -> None:
        """What was trained (safetensors), as the adapter keeps it: the adapter alone, or the network with its configuration."""
        self.config.adapter.save(self.trainer.accelerator.unwrap_model(self.trainer.model), folder)

    def check_finite(self, line: dict[str, float]) -> None:
        """Losses and gradient norms must be finite; a score need not be (the correlation of constant predictions is not)."""
        for key, value in line.items():
            if key.endswith(("loss", "grad_norm")) and not math.isfinite(value):
                raise Diverged(
                    f"{key} is {value} at step {self.trainer.state.global_step}; a lower trainer.learning_rate, "
                    "trainer.warmup_steps or trainer.max_grad_norm may help"
                )

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        return dict(self.data.metrics(prediction.predictions, prediction.label_ids))

    def _collect_scores(self) -> None:
        by_step = _scores_by_step(self.trainer.state)
        self.final_scores = by_step[max(by_step)]
        key = self.data.best_metric
        if key not in self.final_scores:  # several validation splits: the first one selects
            key = f"{next(iter(self.phase.validation))}_{key}"
        sign = 1 if self.data.greater_is_better else -1
        best = max(by_step, key=lambda step: (sign * by_step[step][key], -step))
        epochs = {line["step"]: line.get("epoch") for line in self.trainer.state.log_history}
        self.best_scores = {**by_step[best], "step": best, "epoch": epochs[best]}

    def _measure_speed(self) -> None:
        chrono, unit = self.trainer.chrono, self.data.unit
        items = self.trainer.accelerator.reduce(chrono.items(self.trainer.args.device), reduction="sum").item()
        if chrono.seconds > 0:
            self.speed = {
                "steps_per_second": chrono.steps / chrono.seconds,
                f"{unit}_per_second": items / chrono.seconds,
                "train_seconds": chrono.total_seconds,
            }


class MeasuringTrainer(Trainer):
    """Trainer with the optimiser of the configuration, and with measuring that does not disturb."""

    optimizer: Any

    def __init__(self, owner: Loop, **arguments: Any) -> None:
        self.owner = owner
        self.chrono = Chrono()
        self.first_batch_pending = False
        self.measuring_pending = False
        super().__init__(**arguments)
        # The models' own losses average over the tokens or examples of a micro-batch; told the number of items in the
        # whole step, those that can divide by it instead, so that accumulation does not change the mean.
        self.can_return_loss = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.owner.config.optimizer.build(
                self.model if model is None else model, self.owner.config
            )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.first_batch_pending or self.measuring_pending:
            self._prepare_first_batch(model, self._prepare_inputs(inputs))
        self.chrono.count(_items(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._aside():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._aside():
            super()._save_checkpoint(*args, **kwargs)

    def note_peak(self) -> None:
        """Carry the device's peak over; it is reset around everything that is not training."""
        if self.args.device.type == "cuda":
            memory = self.owner.memory
            for key, read in (
                ("allocated", torch.cuda.max_memory_allocated),
                ("reserved", torch.cuda.max_memory_reserved),
            ):
                memory[f"peak_{key}_bytes"] = max(memory.get(f"peak_{key}_bytes", 0), read(self.args.device))

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What happens inside is not training: neither its time nor its memory counts."""
        self.note_peak()
        with self.chrono.paused():
            yield
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)

    def _prepare_first_batch(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Calibrate on the first batch and count what autograd keeps of it; leaves no trace in random numbers or buffers."""
        model.train()
        config = self.owner.config
        network = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self._aside(), torch.random.fork_rng(devices=devices):
            if self.first_batch_pending:
                with self.compute_loss_context_manager():
                    config.activations.calibrate(network, inputs)
            if self.measuring_pending:
                buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
                with self.compute_loss_context_manager():
                    ledger = take_ledger(network, partial(self.compute_loss, network, inputs), config.model.roles)
                warnings = config.activations.warnings(network, ledger, config)
                if self.owner.run.writes:
                    tqdm.write("".join(f"note: {sentence}\n" for sentence in warnings), end="")
                self.owner.memory["saved_for_backward_bytes"] = ledger.total_bytes
                self.owner.memory["weights_bytes"] = weights_bytes(network)
                for name, buffer in network.named_buffers():
                    buffer.copy_(buffers[name])
                config.activations.forget(network)
        self.first_batch_pending = self.measuring_pending = False


class _Bar(ProgressCallback):
    """Trainer's progress bar with the latest loss in it, in place of a line for each logged step."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}", refresh=False)


class _Watch(TrainerCallback):
    """Lines for metrics.jsonl, bytes of gradients and optimiser state, and the reasons to stop."""

    def __init__(self, owner: Loop, stop_after_epoch: float | None) -> None:
        self.owner = owner
        self.stop_after_epoch = stop_after_epoch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.owner.trainer
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        trainer.chrono.start(state.max_steps - state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "gradients_bytes" not in self.owner.memory:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            self.owner.memory["gradients_bytes"] = unique_bytes(list(plain_tensors(gradients)))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "optimizer_bytes" not in self.owner.memory:
            held = list(plain_tensors(list(kwargs["optimizer"].state.values())))
            self.owner.memory["optimizer_bytes"] = unique_bytes(held)
            # an optimiser that updates inside the backward pass frees each gradient at once and knows the most it held
            peak = getattr(getattr(kwargs["optimizer"], "optimizer", None), "peak_gradient_bytes", 0)
            self.owner.memory["gradients_bytes"] = max(self.owner.memory["gradients_bytes"], peak)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.owner.config.activations.after_step(kwargs["model"])
        self.owner.trainer.chrono.step()
        if state.global_step >= state.max_steps:
            self.owner.trainer.note_peak()
        if self.owner.stop.signal_name is not None:
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stop_after_epoch is not None and (state.epoch or 0) >= self.stop_after_epoch - 1e-6:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        values = {k: v for k, v in logs.items() if k != "epoch" and not k.endswith(_NOISE)}
        self.owner.run.log({"phase": self.owner.phase.name, "step": state.global_step, "epoch": state.epoch, **values})
        self.owner.check_finite(values)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.owner.stop.signal_name is not None:
            raise Interrupted(f"stopped by {self.owner.stop.signal_name} in the evaluation at step {state.global_step}")


_NOISE = ("_runtime", "_per_second", "_preparation_time")


def _scores_by_step(state: TrainerState) -> dict[int, dict[str, float]]:
    """The scores of each evaluated step; Trainer keeps them in its state, so they survive a resume."""
    found: dict[int, dict[str, float]] = {}
    for line in state.log_history:
        scores = {
            k.removeprefix("eval_"): v for k, v in line.items() if k.startswith("eval_") and not k.endswith(_NOISE)
        }
        if scores:
            found.setdefault(line["step"], {}).update(scores)
    return found


def _items(inputs: dict[str, Any]) -> Tensor | int:
    """Tokens that are not padding, or images, of one micro-batch; a tensor stays on its device (no synchronisation)."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum()
    return inputs["input_ids"].numel() if "input_ids" in inputs else len(inputs["pixel_values"])


def _strategy(name: str, every: int | float | str) -> dict[str, Any]:
    if every == "end":
        return {f"{name}_strategy": "no"}
    if every == "epoch":
        return {f"{name}_strategy": "epoch"}
    return {f"{name}_strategy": "steps", f"{name}_steps": every}


def _arguments(config: Config, folder: Path, eval_every: int | float | str) -> TrainingArguments:
    trainer: TrainerConfig = config.trainer
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda: this machine has no CUDA device; use trainer.device=auto or cpu")
    on_cpu = trainer.device == "cpu" or not torch.cuda.is_available()
    schedule: dict[str, Any] = {"lr_scheduler_type": trainer.schedule}
    if trainer.schedule == "constant" and (trainer.warmup_steps or trainer.warmup_ratio):
        schedule = {"lr_scheduler_type": "constant_with_warmup"}
    elif trainer.schedule == "cosine" and trainer.min_lr_ratio > 0:
        schedule = {
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": trainer.min_lr_ratio}
        }  # fmt: skip
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=trainer.num_epochs or 1.0,
        max_steps=trainer.max_steps or -1,
        per_device_train_batch_size=trainer.examples_per_forward,
        per_device_eval_batch_size=trainer.eval_batch_size,
        gradient_accumulation_steps=trainer.accumulation_steps,
        learning_rate=trainer.learning_rate,
        weight_decay=trainer.weight_decay,
        warmup_steps=trainer.warmup_steps or trainer.warmup_ratio,
        max_grad_norm=trainer.max_grad_norm or 0.0,
        bf16=trainer.precision == "bf16",
        fp16=trainer.precision == "fp16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        torch_compile=trainer.compile,
        logging_steps=trainer.log_every,
        logging_nan_inf_filter=False,
        dataloader_num_workers=trainer.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=False,
        report_to=[] if config.wandb.mode == "disabled" else ["wandb"],
        run_name=f"{config.name}/seed{config.seed}",
        **_strategy("eval", eval_every),
        **_strategy("save", trainer.save_every),
        **schedule,
    )
