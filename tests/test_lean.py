"""Lean networks against the plain ones of torch, transformers and timm: equal numbers, fewer bytes."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import velora.nn.twin
from velora import apply_lean, apply_velora, calibrate, remove_lean
from velora.errors import ConfigError
from velora.memory.ledger import measure_saved_bytes, take_ledger
from velora.nn.image_classifier import ImageClassifier
from velora.nn.lean_layers import plain_class_of
from velora.nn.recipe import recipe_of

FAMILIES: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "llama": lambda: (tiny.tiny_llama(), tiny.token_batch()),
    "grouped and tied llama": lambda: (
        tiny.tiny_llama(num_key_value_heads=2, tie_word_embeddings=True),
        tiny.token_batch(),
    ),
    "roberta": lambda: (
        tiny.tiny_roberta(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
        tiny.token_batch(num_labels=2),
    ),
    "vit": lambda: (
        ImageClassifier(tiny.tiny_vit(proj_drop_rate=0.1, drop_path_rate=0.1)).train(),
        {"pixel_values": tiny.image_batch(), "labels": torch.tensor([1, 3])},
    ),
}
LEVELS = {"lean": False, "mlp": True}


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False)
    )


def step(
    model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one forward and backward from a fixed random state."""
    torch.manual_seed(7)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max()
        assert (ours[name] - gradient).abs().max() <= tolerance * largest + 1e-9, name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["full", "lora", "velora", "checkpointed", "bf16 autocast", "bf16 weights"])
def test_the_same_loss_and_gradients(family: str, level: str, how: str) -> None:
    plain, batch = FAMILIES[family]()
    dtype = torch.bfloat16 if how == "bf16 autocast" else None
    if how == "lora":
        plain = lora(plain)
    if how == "velora":
        apply_velora(plain, "all", sub_token_size=8)
        calibrate(plain, batch)
    if how == "bf16 weights":
        plain = plain.to(torch.bfloat16)
        batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
    if how == "checkpointed" and family != "vit":
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    elif how == "checkpointed":
        plain.vit.set_grad_checkpointing(True)
    lean = copy.deepcopy(plain)
    apply_lean(lean, mlp=LEVELS[level])
    assert any(plain_class_of(module) is not type(module) for module in lean.modules())
    loss, gradients = step(plain, batch, dtype)
    lean_loss, lean_gradients = step(lean, batch, dtype)
    # float32: sums in another order, a dozen roundings of 6e-8 in a row. bfloat16 rounds at 4e-3, in another order, and
    # what a few roundings do to one entry of a bias or a norm is seen beside the largest entry
    half = how.startswith("bf16")
    assert lean_loss == pytest.approx(loss, rel=1e-2 if half else 1e-6)
    assert_close(lean_gradients, gradients, 6e-2 if half else 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_float64(family: str, level: str) -> None:
    """RoBERTa computes in float64 throughout; the plain LLaMA's norms and losses, and our ViT's loss, are float32 inside."""
    plain, batch = FAMILIES[family]()
    plain = plain.double()
    lean = copy.deepcopy(plain)
    apply_lean(lean, mlp=LEVELS[level])
    loss, gradients = step(plain, batch)
    lean_loss, lean_gradients = step(lean, batch)
    tolerance = 1e-11 if family == "roberta" else 1e-5
    assert lean_loss == pytest.approx(loss, rel=tolerance)
    assert_close(lean_gradients, gradients, tolerance)


@pytest.mark.parametrize("level", LEVELS)
def test_a_graph_that_is_used_twice_and_accumulation(level: str) -> None:
    plain, batch = FAMILIES["roberta"]()
    lean = copy.deepcopy(plain)
    apply_lean(lean, mlp=LEVELS[level])
    found = []
    for model in (plain, lean):
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        loss.backward()
        model(**tiny.token_batch(seed=5, num_labels=2)).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert_close(found[1], found[0], 1e-5)


N, D, FEATURES, HEADS, BLOCKS, WORDS = 16, 32, 48, 4, 2, tiny.VOCABULARY  # of tiny_llama and its batch
ATTENTION = BLOCKS * 4 * (4 * N * D + N * HEADS) + 4 * 2 * 8 * 8  # q, k, v, output; sums; cos and sin
NORMS = (2 * BLOCKS + 1) * 4 * (N * D + N)  # x, and one number per token
HEAD = 4 * (N * D + WORDS * D)  # gradients of the head's input and weight
COUNTS = 9  # the number of targets (int64), and whether there are any


def test_bytes_of_a_llama() -> None:
    """All that is kept, and what has gone: of the norms x̂ and y, of the MLP act(gate) and the product, and the logits."""
    model, batch = FAMILIES["llama"]()
    plain = measure_saved_bytes(lambda: model(**batch).loss)
    apply_lean(model)
    lean = measure_saved_bytes(lambda: model(**batch).loss)
    assert lean == ATTENTION + NORMS + BLOCKS * 4 * 2 * N * FEATURES + HEAD + COUNTS
    labels_and_sum = 8 * N + 4
    gone = 4 * ((2 * BLOCKS + 1) * 2 * N * D + BLOCKS * 2 * N * FEATURES + N * WORDS) + labels_and_sum
    assert plain - lean == gone - HEAD - COUNTS
    remove_lean(model)
    apply_lean(model, mlp=True)
    assert measure_saved_bytes(lambda: model(**batch).loss) == ATTENTION + NORMS + HEAD + COUNTS


def test_bytes_with_velora_are_codes_and_what_attention_keeps() -> None:
    model, batch = FAMILIES["llama"]()
    apply_velora(model, "all", sub_token_size=8)
    calibrate(model, batch)
    apply_lean(model, mlp=True)
    ledger = take_ledger(model, lambda: model(**batch).loss)
    codes = BLOCKS * 4 * N * (3 * D + FEATURES) // 8  # one for query, key and value, one for gate and up
    assert sum(e.num_bytes for e in ledger.entries if e.term == "VeLoRA codes") == codes
    assert ledger.total_bytes == ATTENTION + NORMS + codes + HEAD + COUNTS


def test_bytes_of_adapters() -> None:
    """LoRA with dropout holds neither dropped inputs nor masks; what stays is the input of B, and of the first norm y."""
    model, batch = FAMILIES["llama"]()
    model = lora(model)
    apply_lean(model)
    inputs_of_b = BLOCKS * 7 * 4 * N * 2
    first_norm = 4 * N * D - 4 * (N * D + N)  # the embedding is frozen: y in place of x and its number
    gate_up, head = BLOCKS * 4 * 2 * N * FEATURES, 4 * N * D
    expected = ATTENTION + NORMS + first_norm + gate_up + inputs_of_b + head + COUNTS
    assert measure_saved_bytes(lambda: model(**batch).loss) == expected


def test_dropout_keeps_random_numbers_and_draws_the_plain_ones() -> None:
    plain, lean = nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.3))
    apply_lean(lean)
    x = torch.randn(50, 40)
    found = []
    for module in (plain, lean):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        after = torch.rand(3)  # the generator went on as far
        gradient = torch.autograd.grad(y, leaf, torch.ones_like(y))[0]
        found.append((y.detach(), gradient, after))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    leaf = x.clone().requires_grad_()
    assert measure_saved_bytes(lambda: plain(leaf).sum()) >= x.numel()  # a mask
    assert measure_saved_bytes(lambda: lean(leaf).sum()) == 0  # the state is made outside the dispatcher: 5 kB


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_in_checkpointed_regions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward of a region computes no codes; a recipe that was left outside of it is not used inside."""
    model, batch = FAMILIES[family]()
    apply_velora(model, "all", sub_token_size=8)
    calibrate(model, batch)
    plain_loss, plain_gradients = step(model, batch)
    apply_lean(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    compress = velora.nn.twin.compress
    monkeypatch.setattr(velora.nn.twin, "compress", lambda *args: calls.append(1) or compress(*args))
    torch.manual_seed(7)
    loss = model(**batch).loss
    assert not calls
    model.zero_grad()
    loss.backward()
    assert len(calls) == BLOCKS * 4  # inputs: of the attention, its output, of the MLP, of the down projection
    assert loss.item() == pytest.approx(plain_loss, rel=1e-6)
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain_gradients, 1e-5)


def test_codes_of_a_first_forward_are_not_taken_for_codes() -> None:
    """A tensor that is read inside a region first and outside of it afterwards."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    apply_velora(model, "*", sub_token_size=4)
    x = torch.randn(6, 8)
    for layer in model:
        layer.set_direction(torch.full((4,), 0.5))

    def loss(inside: Any) -> Tensor:
        leaf = (x * 1).requires_grad_()
        return (inside(model[0], leaf) + model[1](leaf)).square().sum()

    gradients = []
    for inside in (lambda layer, leaf: layer(leaf), lambda layer, leaf: checkpoint(layer, leaf, use_reentrant=False)):
        model.zero_grad()
        loss(inside).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_layers_with_other_directions_share_nothing() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)])
    apply_velora(model, "*", sub_token_size=4)
    directions = F.normalize(torch.randn(2, 4), dim=1)
    for layer, v in zip(model, directions, strict=True):
        layer.set_direction(v)
    x, dy = torch.randn(6, 8), torch.randn(6, 3)
    (model[0](x) + model[1](x)).backward(dy)
    for layer, v in zip(model, directions, strict=True):
        x_hat = (x.view(6, 2, 4) @ v).unsqueeze(-1) * v  # (6, 2, 4), as the paper writes it
        torch.testing.assert_close(layer.weight.grad, dy.T @ x_hat.view(6, 8))


def test_a_direction_that_is_loaded_gives_new_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3, bias=False))
    apply_velora(model, "*", sub_token_size=4)
    x, dy = torch.randn(6, 8), torch.randn(6, 3)
    for v in F.normalize(torch.randn(2, 4), dim=1):
        model.load_state_dict(model.state_dict() | {"0.direction": v})
        model.zero_grad()
        model(x).backward(dy)
        x_hat = (x.view(6, 2, 4) @ v).unsqueeze(-1) * v
        torch.testing.assert_close(model[0].weight.grad, dy.T @ x_hat.view(6, 8))


def test_a_tensor_changed_in_place_has_no_recipe() -> None:
    norm = nn.Sequential(nn.LayerNorm(8))
    apply_lean(norm)
    y = norm(torch.randn(2, 8))
    assert recipe_of(y) is not None
    with torch.no_grad():
        y += 1
    assert recipe_of(y) is None


def test_half_the_gradients() -> None:
    """Frozen weights, and inputs that need no gradient: nothing is computed for them, the others are right."""
    for frozen in ("norm", "gate_proj", "embed"):
        plain, batch = FAMILIES["llama"]()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(frozen not in name)
        lean = copy.deepcopy(plain)
        apply_lean(lean, mlp=True)
        assert_close(step(lean, batch)[1], step(plain, batch)[1], 1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_compiled(level: str) -> None:
    plain, batch = FAMILIES["llama"]()
    lean = copy.deepcopy(plain)
    apply_lean(lean, mlp=LEVELS[level])
    loss, gradients = step(plain, batch)
    compiled = torch.compile(lean, backend="aot_eager")
    lean.zero_grad()
    found = compiled(**batch).loss
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert_close({n: p.grad for n, p in lean.named_parameters() if p.grad is not None}, gradients, 1e-5)


def test_back_to_plain() -> None:
    for family, make in FAMILIES.items():
        model, batch = make()
        classes, state = [type(m) for m in model.modules()], list(model.state_dict())
        summary = apply_lean(model, mlp=True)
        assert sum(summary.counts.values()) == sum(
            c is not type(m) for c, m in zip(classes, model.modules(), strict=True)
        )
        assert list(model.state_dict()) == state
        assert all(isinstance(m, c) for c, m in zip(classes, model.modules(), strict=True)), family
        model.eval()(**batch)
        remove_lean(model)
        assert [type(m) for m in model.modules()] == classes


def test_the_order_with_velora_is_said() -> None:
    model = tiny.tiny_llama()
    apply_lean(model)
    with pytest.raises(ConfigError, match="call apply_velora before apply_lean"):
        apply_velora(model, "all", sub_token_size=8)


def test_nothing_to_make_leaner_is_refused() -> None:
    with pytest.raises(ConfigError, match="apply_lean: Sequential has no norm, activation, dropout or head"):
        apply_lean(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()))


def test_another_forward_is_left_alone() -> None:
    """Gemma's norm multiplies by 1 + w: its code is another one, so it stays."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    model = nn.Sequential(GemmaRMSNorm(8), nn.LayerNorm(8))
    apply_lean(model)
    assert type(model[0]) is GemmaRMSNorm
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    model[0].forward = model[0].forward  # as accelerate's hooks leave it
    apply_lean(model)
    assert type(model[0]) is nn.LayerNorm
    assert type(model[1]) is not nn.LayerNorm


def test_second_derivatives_are_refused() -> None:
    model, batch = FAMILIES["llama"]()
    apply_lean(model)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    y = model.model(inputs_embeds=embedded).last_hidden_state.square().sum()
    (gradient,) = torch.autograd.grad(y, embedded, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_evaluation_and_no_grad_are_plain() -> None:
    for make in FAMILIES.values():
        model, batch = make()
        model.eval()
        with torch.no_grad():
            expected = model(**batch).logits
            apply_lean(model, mlp=True)
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_norms_of_all_families(family: str) -> None:
    """Against torch's formula in float64; transformers' own norms compute in float32."""
    package = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    norm = nn.Sequential(
        getattr(importlib.import_module(package), f"{family}RMSNorm")(8, eps=1e-3), nn.RMSNorm(8)
    ).double()
    with torch.no_grad():
        norm[0].weight.normal_()
    assert apply_lean(norm).counts == {"norms": 2}
    x = torch.randn(300, 8, dtype=torch.float64)
    gradients = []
    for function in (norm, lambda x: F.rms_norm(F.rms_norm(x, (8,), norm[0].weight, 1e-3), (8,), norm[1].weight)):
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        (function(leaf) * torch.arange(8)).square().sum().backward()
        gradients.append((leaf.grad, norm[0].weight.grad, norm[1].weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)  # sums in another order
