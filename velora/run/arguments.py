"""From our configuration to the TrainingArguments of transformers, and what the machine must have for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from velora.config.processes import num_processes
from velora.config.run import Config, TrainerConfig
from velora.run.device import training_device
from velora.run.notes import note


def training_arguments(config: Config, folder: Path, eval_every: int | float | str) -> TrainingArguments:
    """Raises ConfigError for what this machine cannot do."""
    trainer = config.trainer
    on_cpu = training_device(config).type == "cpu"
    kind = TrainingArguments if trainer.sharding == "none" else _ForSharded
    arguments = kind(
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
        ddp_backend="gloo" if on_cpu and num_processes() > 1 else None,
        torch_compile=trainer.compile,
        logging_steps=trainer.log_every,
        logging_nan_inf_filter=False,
        dataloader_num_workers=trainer.num_workers,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=False,
        report_to=[],
        run_name=f"{config.name}/seed{config.seed}",
        **_strategy("eval", eval_every),
        **_strategy("save", trainer.save_every),
        **_schedule(trainer),
    )
    use_one_device(arguments)
    return arguments


class _ForSharded(TrainingArguments):
    """For a network whose parts are on their devices already."""

    @property
    def place_model_on_device(self) -> bool:
        return False


def use_one_device(arguments: Any) -> None:
    """One process trains on one device. With several in sight Trainer would take DataParallel and multiply the batch."""
    if arguments.n_gpu > 1:
        note(
            f"{arguments.n_gpu} GPUs are visible and one is used; torchrun --nproc_per_node {arguments.n_gpu} uses all, "
            "with the same trainer.batch_size"
        )
        arguments._n_gpu = 1


def _strategy(name: str, every: int | float | str) -> dict[str, Any]:
    if every == "end":
        return {f"{name}_strategy": "no"}
    if every == "epoch":
        return {f"{name}_strategy": "epoch"}
    return {f"{name}_strategy": "steps", f"{name}_steps": every}


def _schedule(trainer: TrainerConfig) -> dict[str, Any]:
    if trainer.schedule == "constant" and (trainer.warmup_steps or trainer.warmup_ratio):
        return {"lr_scheduler_type": "constant_with_warmup"}
    if trainer.schedule == "cosine" and trainer.min_lr_ratio > 0:
        return {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": trainer.min_lr_ratio},
        }
    return {"lr_scheduler_type": trainer.schedule}
