"""Causal language models that make their loss without logits, against the plain models of transformers."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from causal_lm_helpers import (
    EXTRA_BYTES,
    assert_close_to_largest,
    assert_same_training,
    batch_of,
    gradients,
    lean_and_plain,
)
from tiny import VOCABULARY, tiny_llama
from torch import nn

import velora
from velora.memory.estimate import pretend
from velora.memory.ledger import measure_saved_bytes, take_ledger
from velora.memory.meter import network_without_weights
from velora.nn.causal_lm import LEAN_CLASSES, LeanCausalLM, make_lean_causal_lm, make_plain_causal_lm


# float64: the plain loss casts the logits to float32, so that its own gradients are no better than that
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, torch.float32), (torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_a_model_trains_as_the_plain_one(dtype, precision, tied):
    lean, plain = lean_and_plain(dtype, tie_word_embeddings=tied)
    for seed in (0, 1):  # gradients accumulate
        assert_same_training(lean, plain, precision, **batch_of(seed=seed))


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_parts(frozen):
    lean, plain = lean_and_plain()
    for model in (lean, plain):
        getattr(model, frozen).requires_grad_(False)
    assert_same_training(lean, plain, **batch_of())
    words, tokens = VOCABULARY * 32 * 4, 3 * 7 * 32 * 4
    kept = take_ledger(lean, lambda: lean(**batch_of()).loss).grouped("term")["gradients from the loss"]
    assert kept == (tokens if frozen == "lm_head" else words) + EXTRA_BYTES


def test_a_frozen_model_still_has_a_loss():
    lean, plain = lean_and_plain()
    for model in (lean, plain):
        model.requires_grad_(False)
    torch.testing.assert_close(lean(**batch_of()).loss, plain(**batch_of()).loss)


@pytest.mark.parametrize(
    "inputs",
    [
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31)},
        {"ignore_index": 5},
        {"shift_labels": torch.full((3, 7), 9)},
        {"attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])},
        {"use_cache": True},
        {"return_dict": True},
        {"position_ids": torch.arange(7).repeat(3, 1) + 2},
    ],
    ids=lambda inputs: next(iter(inputs)),
)
def test_all_that_the_plain_forward_takes(inputs):
    lean, plain = lean_and_plain()
    batch = batch_of() | ({"labels": torch.full((3, 7), 5)} if "ignore_index" in inputs else {})
    if "ignore_index" in inputs:
        batch["labels"][:, ::2] = 6
    assert_same_training(lean, plain, **batch, **inputs)


def test_all_that_the_plain_output_has():
    lean, plain = lean_and_plain()
    wanted = {"output_hidden_states": True, "use_cache": True}
    mine, theirs = lean(**batch_of(), **wanted), plain(**batch_of(), **wanted)
    assert set(mine.keys()) == set(theirs.keys()) - {"logits"}
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert mine.past_key_values.get_seq_length() == 7


def test_positional_arguments():
    lean, plain = lean_and_plain()
    words, labels = batch_of().values()
    mine, theirs = (model(words, None, None, None, None, labels) for model in (lean, plain))
    assert mine.logits is None
    torch.testing.assert_close(mine.loss, theirs.loss)


def test_micro_batches_with_different_numbers_of_targets():
    """Divided by the number of all targets, two micro-batches give the gradient of both together."""
    lean, plain = lean_and_plain()
    parts = [batch_of(seed=0, num_ignored=0), batch_of(seed=1, num_ignored=7)]
    num_items = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
    for part in parts:
        lean(**part, num_items_in_batch=num_items).loss.backward()
    plain(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]}).loss.backward()
    for mine, theirs in zip(gradients(lean), gradients(plain), strict=True):
        assert_close_to_largest(mine, theirs)


@pytest.mark.parametrize("inputs", [{"logits_to_keep": 7}, {"logits_to_keep": torch.arange(7)}, {"return_dict": False}])
def test_a_request_for_logits_gets_them(inputs):
    lean, plain = lean_and_plain()
    mine, theirs = lean(**batch_of(), **inputs), plain(**batch_of(), **inputs)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])


def test_what_is_not_training_is_plain():
    lean, plain = lean_and_plain()
    batch = batch_of()
    assert torch.equal(lean(batch["input_ids"]).logits, plain(batch["input_ids"]).logits)
    with torch.no_grad():
        assert torch.equal(lean(**batch).logits, plain(**batch).logits)
    lean.eval(), plain.eval()
    assert torch.equal(lean(**batch).logits, plain(**batch).logits)
    assert torch.equal(lean(**batch).loss, plain(**batch).loss)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(lean.generate(batch["input_ids"], **options), plain.generate(batch["input_ids"], **options))


class _Head(nn.Linear):
    pass


def with_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 2)


def with_pre_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def with_backward_hook(model: nn.Module) -> None:
    model.lm_head.register_full_backward_hook(lambda _module, grad_input, _grad_output: grad_input)


def with_another_class(model: nn.Module) -> None:
    model.lm_head.__class__ = _Head


def with_another_forward(model: nn.Module) -> None:
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight * 2)


def with_parametrisation(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def with_velora(model: nn.Module) -> None:
    from velora import apply_velora

    apply_velora(model, ["lm_head"], num_groups=4, init="random")


def with_another_loss(model: nn.Module) -> None:
    model.loss_function = lambda logits, labels, **_: logits.square().mean()


@pytest.mark.parametrize(
    "change",
    [with_hook, with_pre_hook, with_backward_hook, with_another_class, with_another_forward, with_parametrisation,
     with_velora, with_another_loss],
)  # fmt: skip
def test_what_else_a_head_may_be_gets_the_plain_forward(change):
    lean, plain = lean_and_plain()
    for model in (lean, plain):
        change(model)
    mine, theirs = lean(**batch_of()), plain(**batch_of())
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.loss, theirs.loss)


def test_a_lean_linear_layer_is_a_plain_head():
    lean, plain = lean_and_plain()
    lean.lm_head.__class__ = type("Lean", (nn.Linear,), {"_plain_class": nn.Linear})
    assert_same_training(lean, plain, **batch_of())


def test_there_and_back():
    model = tiny_llama()
    plain_class, names = type(model), list(model.state_dict())
    assert make_lean_causal_lm(model)  # twice is once
    assert make_lean_causal_lm(model)
    assert isinstance(model, LeanCausalLM)
    assert isinstance(model, plain_class)
    assert type(model).__name__ == plain_class.__name__
    assert type(model) is not plain_class
    assert inspect.signature(model.forward) == inspect.signature(plain_class.forward.__get__(model))
    assert list(model.state_dict()) == names
    assert make_plain_causal_lm(model)
    assert type(model) is plain_class
    assert not make_plain_causal_lm(model)
    assert model(**batch_of()).logits is not None
    assert not make_lean_causal_lm(nn.Linear(2, 2))
    assert not make_lean_causal_lm(model.model)


def test_subclasses_of_others_are_left_alone():
    """A class of the same name may compute something else."""
    model = tiny_llama()
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "elsewhere"})
    assert not make_lean_causal_lm(model)


def test_saving_copying_and_pickling(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    lean, plain = lean_and_plain()
    lean.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    for other in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert type(other) is type(lean)
        assert_same_training(other, copy.deepcopy(plain), **batch_of())
    plain.load_state_dict(lean.state_dict())


def body(cls: type) -> str:
    """The statements of a forward, without what only names or documents."""
    source = inspect.getsource(inspect.unwrap(cls.forward))
    source = re.sub(r'r?""".*?"""', "", source[source.index(") ->") :], flags=re.S)
    return " ".join(re.sub(r"outputs: \w+ =", "outputs =", source).split())


@pytest.mark.parametrize("name", sorted(LEAN_CLASSES))
def test_every_class_in_the_table_has_llamas_forward(name):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    assert body(getattr(transformers, name)) == body(transformers.LlamaForCausalLM)


@pytest.mark.parametrize(
    "kind", ["Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Phi", "Phi3", "Olmo2", "Starcoder2"]
)
def test_other_families(kind):
    """Phi's head has a bias, the heads of Gemma, SmolLM3 and Starcoder2 are tied to the embedding."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 4, "head_dim": 8}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **sizes, **tokens, **dropout)
    torch.manual_seed(0)
    plain = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    lean = copy.deepcopy(plain)
    assert make_lean_causal_lm(lean)
    assert_same_training(lean, plain, **batch_of())


def test_the_ledger_of_a_model():
    """dh (B T D) and dW (V D) in place of the logits, their float32 copy's softmax and the head's input."""
    lean, plain = lean_and_plain()
    batch = batch_of()
    ledgers = [take_ledger(model, lambda m=model: m(**batch).loss) for model in (lean, plain)]
    tokens, words = 3 * 7 * 32 * 4, VOCABULARY * 32 * 4
    assert ledgers[0].grouped("term")["gradients from the loss"] == tokens + words + EXTRA_BYTES
    # the plain one keeps: log-softmax (N V), the head's input (N D), the shifted labels (N int64), the weight of all (4)
    head = 3 * 7 * VOCABULARY * 4 + tokens + 3 * 7 * 8 + 4
    assert ledgers[1].total_bytes - head == ledgers[0].total_bytes - (tokens + words + EXTRA_BYTES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_estimate_of_a_lean_model(device):
    """Fake tensors give the bytes of real ones; as on CUDA, nothing is asked of their values."""
    config = velora.compose("method=full", "task=c4", "model=llama_tiny", "task.max_length=32", "trainer.batch_size=2")
    pretended = pretend(config, device=device)
    assert make_lean_causal_lm(pretended.network)
    with pretended.context():
        ledger = take_ledger(pretended.network, pretended.losses[0])
        pretended.losses[0]().backward()
    network = network_without_weights(config).train()
    assert make_lean_causal_lm(network)
    assert "gradients from the loss" in ledger.grouped("term")
    if device == "cpu":
        assert ledger.total_bytes == measure_saved_bytes(lambda: network(**pretended.batches[0]).loss)
