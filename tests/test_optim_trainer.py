"""Every optimiser below transformers.Trainer: schedule, accumulation, checkpoint and resume, without any hook of ours."""

from __future__ import annotations

import optim_helpers as helpers
import pytest
import torch
from torch import nn

from velora.optim import Adafactor, Flora, GaLoreAdamW, Lomo


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = helpers.tiny_network()

    def forward(self, inputs, targets):
        return {"loss": helpers.loss_of(self.body, (inputs, targets))}


class Rows(torch.utils.data.Dataset):
    def __init__(self, num):
        inputs, targets = helpers.batches(1, size=num)[0]
        self.rows = list(zip(inputs, targets, strict=True))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    inputs, targets = zip(*rows, strict=True)
    return {"inputs": torch.stack(inputs), "targets": torch.stack(targets)}


def low_rank(model, **options):
    matrices, vectors = helpers.matrices_and_vectors(model)
    return [{"params": matrices, "rank": 4, **options}, {"params": vectors}]


BUILD = {
    "galore": lambda m: GaLoreAdamW(low_rank(m, update_proj_gap=2), lr=1e-2),
    "galore layer-wise": lambda m: GaLoreAdamW(
        low_rank(m, update_proj_gap=2), lr=1e-2, layerwise=True, accumulation_steps=2
    ),
    "flora": lambda m: Flora(low_rank(m), lr=1e-2, kappa=2),
    "flora layer-wise": lambda m: Flora(low_rank(m), lr=1e-2, kappa=2, layerwise=True, accumulation_steps=2),
    "adafactor": lambda m: Adafactor(m.parameters(), lr=1e-2, relative_step=False, scale_parameter=False),
    "lomo": lambda m: Lomo(m.parameters(), lr=1e-2),
}


def train(build, folder, *, accumulation, resume=None, until=None):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = WithLoss()
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation, lr_scheduler_type="linear", max_grad_norm=0.0, save_strategy="steps",
        save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, logging_steps=1, remove_unused_columns=False,
        label_names=["targets"],
    )  # fmt: skip

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == until

    trainer = Trainer(
        model=model, args=arguments, train_dataset=Rows(20), data_collator=collate, optimizers=(build(model), None),
        callbacks=[Stop()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.state


@pytest.mark.parametrize("name", BUILD)
def test_an_interrupted_run_ends_like_one_that_was_not(name, tmp_path):
    """20 rows in batches of 4 are 5 a batch: with accumulation over 2, the last step of an epoch has one micro-batch."""
    accumulation = 1 if name == "lomo" else 2
    straight, state = train(BUILD[name], tmp_path / "straight", accumulation=accumulation)
    assert state.global_step == (10 if name == "lomo" else 6)
    train(BUILD[name], tmp_path / "stopped", accumulation=accumulation, until=3)
    resumed, _ = train(
        BUILD[name], tmp_path / "stopped", accumulation=accumulation, resume=str(tmp_path / "stopped" / "checkpoint-3")
    )
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    rates = [line["learning_rate"] for line in state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([1e-2 * (1 - step / len(rates)) for step in range(len(rates))])


def test_the_schedule_reaches_the_update_in_the_backward_pass(tmp_path):
    """Layer-wise and ordinary GaLore follow the same schedule: the same weights at the end."""
    models = [
        train(
            lambda m, layerwise=layerwise: GaLoreAdamW(low_rank(m, update_proj_gap=2), lr=1e-2, layerwise=layerwise),
            tmp_path / str(layerwise),
            accumulation=1,
        )[0]
        for layerwise in (False, True)
    ]
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)
