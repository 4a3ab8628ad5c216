"""A training that is interrupted and continued from Trainer's checkpoint ends bit for bit where the other ends."""

from __future__ import annotations

import adapters
import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from velora import apply_velora, calibrate
from velora.config.adapter import LinearProbe
from velora.nn.apply import velora_layers

ADAPTERS = {
    "linear_probe": (lambda: LinearProbe(kind="linear_probe"), []),
    "lora": (lambda: adapters.lora(dropout=0.1), ["value", "down"]),
    "lora_and_embedding": (lambda: adapters.lora(also_train=["word_embeddings"]), ["value", "down"]),
    "ssf": (adapters.ssf, ["value", "up"]),
    "hydra": (lambda: adapters.hydra(dropout=0.1), ["output", "down"]),
    "multilora": (lambda: adapters.multilora(dropout=0.1), ["value", "down"]),
    "pissa": (lambda: adapters.lora(dropout=0.1, init="pissa"), ["value", "down"]),
}
STEPS, BREAK = 6, 3


class Sentences(Dataset):
    def __len__(self):
        return 4 * STEPS

    def __getitem__(self, index):
        batch = tiny.token_batch(num_sequences=1, seed=index, num_labels=2)
        return {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]}


def make(name: str, weights: str, fresh: bool) -> nn.Module:
    build, layers = ADAPTERS[name]
    config = adapters.config(adapter=build(), weights=getattr(adapters, weights)())
    model = config.adapter.apply(config.weights.apply(adapters.network("roberta"), config), config)
    if layers:
        apply_velora(model, layers, sub_token_size=8)
        if fresh:
            calibrate(model.train(), tiny.token_batch(num_sequences=4, num_labels=2))
    return model


def train(model: nn.Module, folder, resume=None) -> nn.Module:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, save_steps=BREAK, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, label_names=["labels"], logging_steps=1000, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.filterwarnings(
    "ignore:.*invalid shape"
)  # PEFT 0.21 takes a one-dimensional tensor under lora_A for a shard
@pytest.mark.parametrize("weights", ["dense", "nf4"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_resume_is_exact(name, weights, tmp_path):
    whole = train(make(name, weights, fresh=True), tmp_path / "run")
    resumed = train(
        make(name, weights, fresh=False), tmp_path / "again", resume=str(tmp_path / "run" / f"checkpoint-{BREAK}")
    )
    start = make(name, weights, fresh=True)
    trained = adapters.trained(whole)
    assert adapters.trained(resumed).keys() == trained.keys()
    assert any(not torch.equal(p, start.get_parameter(n)) for n, p in trained.items())
    for key, parameter in trained.items():
        assert torch.equal(resumed.get_parameter(key), parameter), key
    for key, layer in velora_layers(whole).items():
        assert torch.equal(resumed.get_submodule(key).direction, layer.direction), key
    inputs = adapters.batch("roberta")
    assert torch.equal(adapters.logits(resumed.eval(), inputs), adapters.logits(whole.eval(), inputs))
