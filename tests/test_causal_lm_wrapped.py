"""Causal language models without logits inside PEFT, DDP, accelerate, Trainer, torch.compile and autocast."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from causal_lm_helpers import assert_close_to_largest, assert_same_training, batch_of, lean_and_plain
from tiny import tiny_llama
from torch import nn

from velora.nn.causal_lm import make_lean_causal_lm, make_plain_causal_lm


def test_a_model_under_autocast():
    lean, plain = lean_and_plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_training(lean, plain, torch.bfloat16, **batch_of())


@pytest.mark.parametrize("where", ["before", "after"])
def test_inside_peft(where):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    plain = peft.get_peft_model(tiny_llama(), config)
    lean = copy.deepcopy(plain)
    if where == "before":
        model = tiny_llama()
        make_lean_causal_lm(model)
        lean = peft.get_peft_model(model, config)
        lean.load_state_dict(plain.state_dict())
    else:
        assert make_lean_causal_lm(lean.get_base_model())
    assert_same_training(lean, plain, **batch_of())
    merged = lean.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert merged(**batch_of()).logits is None


def test_lora_on_the_head_gets_the_plain_forward():
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    make_lean_causal_lm(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    assert wrapped(**batch_of()).logits is not None


def test_inside_ddp(tmp_path):
    lean, plain = lean_and_plain()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_same_training(nn.parallel.DistributedDataParallel(lean), plain, **batch_of())
    finally:
        torch.distributed.destroy_process_group()


def test_accelerate_wraps_and_unwraps():
    from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

    lean, plain = lean_and_plain()
    lean._original_forward = lean.forward  # as Accelerator.prepare_model does in mixed precision
    lean.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(lean.forward.__func__)).__get__(
        lean
    )
    assert lean(**batch_of()).logits is None
    unwrapped = extract_model_from_parallel(lean, keep_fp32_wrapper=False)
    assert_same_training(unwrapped, plain, **batch_of())
    assert make_plain_causal_lm(unwrapped)
    assert unwrapped(**batch_of()).logits is not None


def test_transformers_trainer(tmp_path):
    """Three steps of two micro-batches each, with different numbers of targets, and an evaluation."""
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[0] for key, value in batch_of(1, 7, seed, seed % 4).items()} for seed in range(12)]
    results = []
    for model in lean_and_plain():
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.1,
            optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        results.append((trainer.evaluate()["eval_loss"], [p.detach() for p in model.parameters()]))
    (mine, mine_weights), (theirs, their_weights) = results
    assert math.isclose(mine, theirs, rel_tol=1e-6)  # losses of float32
    for a, b in zip(mine_weights, their_weights, strict=True):
        assert_close_to_largest(a, b)


def test_a_model_under_compile():
    lean, plain = lean_and_plain()
    assert_same_training(torch.compile(lean, backend="aot_eager"), plain, **batch_of())
