"""Head and loss in one, against F.cross_entropy(F.linear(...)) and against the plain models of transformers."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, tiny_llama, token_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from velora.memory.ledger import measure_saved_bytes, take_ledger
from velora.memory.storages import AllocationTracker
from velora.nn.causal_lm import LEAN_CLASSES, LeanCausalLM, make_lean_causal_lm, make_plain_causal_lm
from velora.nn.linear_loss import linear_cross_entropy, tokens_in_chunk

N, D, V, CHUNK = 23, 12, 40, 5  # four full chunks and three tokens
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


def factors(dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor | None]:
    """h, W and b as leaves. Logits of size about 3, so that the softmax is far from uniform."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return [leaf(N, D), leaf(V, D), leaf(V) if bias else None]


def some_labels(num_ignored: int = 6, ignore_index: int = -100) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(1, V, (N,), generator=generator)
    labels[torch.randperm(N, generator=generator)[:num_ignored]] = ignore_index
    return labels


def plain_loss(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, num_items: object = None) -> Tensor:
    """As transformers.loss.loss_utils.fixed_cross_entropy, but for float64."""
    logits = F.linear(h, w, b)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    return loss if num_items is None else loss / num_items


def gradients_of(loss: Tensor, leaves: list[Tensor | None], factor: float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad(loss * factor, [leaf for leaf in leaves if leaf is not None]))


def assert_close(mine: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int) -> None:
    """Within some roundings of `dtype`, of the largest number: sums have terms of that size."""
    assert mine.dtype == dtype
    tolerance = roundings * ROUNDING[dtype] * exact.abs().max().item()
    torch.testing.assert_close(mine.double(), exact.double(), rtol=0, atol=tolerance)


def assert_close(mine: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within 8 roundings of `dtype`, of the largest number (the sums have terms of that size): logits, softmax, a product
    and its scaling are rounded once each; up to 6 were seen, and as many with the plain loss in the same dtype."""
    tolerance = 8 * ROUNDING[dtype] * exact.abs().max().item()
    torch.testing.assert_close(mine.double(), exact.double(), rtol=0, atol=tolerance)


def detached(leaves: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if leaf is None else leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


def accumulated(leaves: list[Tensor | None]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


# ---------------------------------------------------------------------------------------------- the loss by itself


@pytest.mark.parametrize("num_items", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_loss_and_gradients_equal_float64s(dtype, bias, num_items):
    leaves, labels = factors(dtype, bias), some_labels()
    exact_leaves = detached(leaves, torch.float64)
    exact = plain_loss(*exact_leaves, labels, num_items)
    loss = linear_cross_entropy(*leaves, labels, num_items=num_items, chunk_size=CHUNK)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == ()
    assert_close(loss, exact, dtype)
    for mine, theirs in zip(gradients_of(loss, leaves), gradients_of(exact, exact_leaves), strict=True):
        assert mine.dtype == dtype
        assert_close(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """Float32 leaves; the products, dh and the scaling are rounded to halves, as the plain loss's are."""
    leaves, labels = factors(), some_labels()
    exact_leaves = detached(leaves, torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(*leaves, labels, chunk_size=CHUNK)
    exact = plain_loss(*exact_leaves, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, exact, dtype)
    for mine, theirs in zip(gradients_of(loss, leaves), gradients_of(exact, exact_leaves), strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, dtype)


def test_small_gradients_of_half_precision_do_not_vanish():
    """2^20 items: dl / items is below float16's smallest number (6e-8) almost everywhere; a scaled loss brings it back."""
    leaves, labels = factors(torch.float16), some_labels()
    exact_leaves = detached(leaves, torch.float64)
    loss = linear_cross_entropy(*leaves, labels, num_items=2**20, chunk_size=CHUNK)
    exact = plain_loss(*exact_leaves, labels, 2**20)
    pairs = zip(gradients_of(loss, leaves, 2.0**16), gradients_of(exact, exact_leaves, 2.0**16), strict=True)
    for mine, theirs in pairs:
        assert_close(mine, theirs, torch.float16)


@pytest.mark.parametrize("chunk_size", [1, N - 1, N, 1000])
def test_chunks_of_any_size(chunk_size):
    leaves, labels = factors(torch.float64), some_labels()
    expected = plain_loss(*leaves, labels)
    loss = linear_cross_entropy(*leaves, labels, chunk_size=chunk_size)
    assert_close(loss, expected, torch.float64)
    for mine, theirs in zip(gradients_of(loss, leaves), gradients_of(expected, leaves), strict=True):
        assert_close(mine, theirs, torch.float64)


def test_sizes_of_chunks():
    assert tokens_in_chunk(32_000) == 256 and tokens_in_chunk(128_256) == 256
    assert tokens_in_chunk(4_096) == 2_048


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 7])
def test_without_a_label_that_counts(num_items):
    """NaN, or zero, with zero gradients: what torch does, and what keeps the weights alive."""
    leaves, labels = factors(), some_labels(N)
    expected = plain_loss(*leaves, labels, None if num_items is None else torch.tensor(int(num_items)))
    loss = linear_cross_entropy(*leaves, labels, num_items=torch.tensor(0) if num_items == 0 else num_items)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
    for mine, theirs in zip(gradients_of(loss, leaves), gradients_of(expected, leaves), strict=True):
        assert torch.equal(mine, theirs) and not mine.any()


def test_another_index_may_be_ignored():
    leaves = factors()
    labels = some_labels(ignore_index=3)
    logits = F.linear(*leaves)
    expected = F.cross_entropy(logits, labels, ignore_index=3)
    loss = linear_cross_entropy(*leaves, labels, ignore_index=3, chunk_size=CHUNK)
    assert_close(loss, expected, torch.float32)


def test_labels_that_are_no_words_are_refused():
    leaves, labels = factors(), some_labels()
    for wrong in (V, -1):
        labels[0] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(*leaves, labels)
    with pytest.raises(ValueError, match="23 tokens"):
        linear_cross_entropy(*leaves, labels[:-1])


def test_only_what_trains_gets_a_gradient():
    for trained in range(8):
        leaves = factors()
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(trained >> index & 1))
        loss = linear_cross_entropy(*leaves, some_labels(), chunk_size=CHUNK)
        assert loss.requires_grad == bool(trained)
        if not trained:
            continue
        loss.backward()
        plain = factors()
        plain_loss(*plain, some_labels()).backward()
        for mine, theirs in zip(leaves, plain, strict=True):
            assert (mine.grad is None) != mine.requires_grad
            if mine.requires_grad:
                assert_close(mine.grad, theirs.grad, torch.float32)


def test_a_graph_that_is_used_again_gives_the_same():
    leaves, labels = factors(), some_labels()
    loss = linear_cross_entropy(*leaves, labels, chunk_size=CHUNK)
    present = [leaf for leaf in leaves if leaf is not None]
    first = torch.autograd.grad(loss, present, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, present, torch.tensor(3.0), retain_graph=True)
    last = torch.autograd.grad(loss, present, torch.tensor(3.0))
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert len({t.untyped_storage().data_ptr() for t in (a, b, c)}) == 3
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, present)


def test_a_second_derivative_is_refused():
    leaves = factors()
    loss = linear_cross_entropy(*leaves, some_labels())
    for first in torch.autograd.grad(loss, leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivative"):
            (loss + first.square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpointed_region(use_reentrant):
    h, w, b = factors()
    loss = checkpoint(
        lambda x: linear_cross_entropy(x * 2, w, b, some_labels(), chunk_size=CHUNK), h, use_reentrant=use_reentrant
    )
    loss.backward()
    plain = factors()
    plain_loss(plain[0] * 2, *plain[1:], some_labels()).backward()
    for mine, theirs in zip((h, w, b), plain, strict=True):
        assert_close(mine.grad, theirs.grad, torch.float32)


def test_under_compile():
    leaves, labels = factors(), some_labels()

    def twice(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return linear_cross_entropy(h * 2, w, b, labels, chunk_size=CHUNK) * 3

    compiled = torch.compile(twice, backend="aot_eager")
    for mine, theirs in zip(gradients_of(compiled(*leaves), leaves), gradients_of(twice(*leaves), leaves), strict=True):
        assert torch.equal(mine, theirs)


def test_backward_scales_what_was_kept_in_place():
    """The gradient that arrives is the storage that was kept: no second dW is allocated."""
    leaves = factors(bias=False)
    loss = linear_cross_entropy(*leaves, some_labels(), chunk_size=CHUNK)
    with AllocationTracker() as tracker:
        loss.backward()
    sizes = [key().nbytes() for key in tracker.allocated if key() is not None]
    assert max(sizes, default=0) < N * D * 4
    assert leaves[1].grad.shape == (V, D)


KEPT = {  # bytes of dh, dW and db; fp16 keeps dW and db in float32, for a sum may be beyond its range
    torch.float64: (8 * N * D, 8 * V * D, 8 * V),
    torch.float32: (4 * N * D, 4 * V * D, 4 * V),
    torch.bfloat16: (2 * N * D, 2 * V * D, 2 * V),
    torch.float16: (2 * N * D, 4 * V * D, 4 * V),
}


def extra_bytes(num_items: object = None) -> int:
    """Beside the gradients: the mask `any label counts` (1 byte), and the number that divides (8 bytes of int64)."""
    return 1 + (8 if num_items is None else 0)


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("dtype", KEPT)
def test_what_is_kept(dtype, trained):
    leaves = factors(dtype)
    for leaf, trains in zip(leaves, trained, strict=True):
        leaf.requires_grad_(trains)
    kept = measure_saved_bytes(lambda: linear_cross_entropy(*leaves, some_labels(), chunk_size=CHUNK))
    expected = sum(size for size, trains in zip(KEPT[dtype], trained, strict=True) if trains)
    assert kept == expected + extra_bytes()


class Largest(AllocationTracker):
    """The largest storage that was ever allocated, in elements of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def on_operator(self, operator, inputs, outputs, fresh):
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // 4 for t in fresh)])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_logits_of_all_tokens_never_exist(autocast):
    """With more words than features and tokens, a chunk's logits or dW are the largest there is."""
    words, width, tokens = 1000, 4, 64
    h, w = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width, requires_grad=True)
    labels = torch.arange(tokens)
    with Largest() as largest, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        linear_cross_entropy(h, w, None, labels, chunk_size=4).backward()
    assert largest.elements == words * width
    with Largest() as largest:
        plain_loss(h, w, None, labels).backward()
    assert largest.elements == tokens * words


def test_nothing_is_computed_twice():
    """Three products of N D V multiplications with their additions, and no more."""
    from torch.utils.flop_counter import FlopCounterMode

    leaves = factors(bias=False)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*leaves, some_labels(), chunk_size=CHUNK).backward()
    assert counter.get_total_flops() == 3 * 2 * N * D * V
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(*leaves, some_labels(), chunk_size=CHUNK)
    assert counter.get_total_flops() == 2 * N * D * V


def test_fake_and_meta_tensors():
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        leaves = [torch.empty(N, D, requires_grad=True), torch.empty(V, D, requires_grad=True)]
    for h, w in (leaves, [torch.empty(leaf.shape, device="meta", requires_grad=True) for leaf in leaves]):
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = linear_cross_entropy(h, w, None, some_labels(), chunk_size=CHUNK)  # real labels
            loss.backward()
            assert h.grad.shape == (N, D) and w.grad.shape == (V, D)


def test_no_label_looks_beyond_its_token():
    """Gradients of ignored tokens are exactly zero."""
    leaves, labels = factors(), some_labels()
    (dh, *_) = gradients_of(linear_cross_entropy(*leaves, labels, chunk_size=CHUNK), leaves)
    assert not dh[labels == -100].any() and dh[labels != -100].any(1).all()


# ------------------------------------------------------------------------------------ the loss inside a language model


def lean_and_plain(dtype: torch.dtype = torch.float32, **overrides: object) -> tuple[nn.Module, nn.Module]:
    plain = tiny_llama(**overrides).to(dtype)
    lean = copy.deepcopy(plain)
    assert make_lean_causal_lm(lean)
    return lean, plain


def batch_of(num_sequences: int = 3, length: int = 7, seed: int = 0, num_ignored: int = 4) -> dict[str, Tensor]:
    batch = token_batch(num_sequences, length, seed)
    batch["labels"] = batch["labels"].clone()
    batch["labels"].view(-1)[torch.arange(num_ignored) * 3] = -100
    return batch


def assert_same_training(lean: nn.Module, plain: nn.Module, dtype: torch.dtype = torch.float32, **inputs: object) -> None:
    """One forward and backward of each. 64 roundings: the difference at the head goes through two blocks backwards."""
    outputs, expected = lean(**inputs), plain(**inputs)
    assert outputs.logits is None and expected.logits is not None
    assert outputs.loss.dtype == expected.loss.dtype
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=64 * ROUNDING[dtype], atol=0)
    outputs.loss.backward()
    expected.loss.backward()
    for (name, mine), (_, theirs) in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None) == (not mine.requires_grad), name
        if theirs.grad is not None:
            tolerance = 64 * ROUNDING[dtype] * theirs.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=tolerance, msg=name)


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


def test_a_model_under_autocast():
    lean, plain = lean_and_plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_training(lean, plain, torch.bfloat16, **batch_of())


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_parts(frozen):
    lean, plain = lean_and_plain()
    for model in (lean, plain):
        getattr(model, frozen).requires_grad_(False)
    assert_same_training(lean, plain, **batch_of())
    words, tokens = VOCABULARY * 32 * 4, 3 * 7 * 32 * 4
    kept = take_ledger(lean, lambda: lean(**batch_of()).loss).grouped("term")["gradients from the loss"]
    assert kept == (tokens if frozen == "lm_head" else words) + extra_bytes()


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
    for mine, theirs in zip(accumulated([*lean.parameters()]), accumulated([*plain.parameters()]), strict=True):
        assert_close_to_largest(mine, theirs)


def assert_close_to_largest(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=64 * ROUNDING[torch.float32] * theirs.abs().max().item())


@pytest.mark.parametrize("inputs", [{"logits_to_keep": 7}, {"logits_to_keep": torch.arange(7)}, {"return_dict": False}])
def test_a_request_for_logits_gets_them(inputs):
    lean, plain = lean_and_plain()
    mine, theirs = lean(**batch_of(), **inputs), plain(**batch_of(), **inputs)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


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
    assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.loss, theirs.loss)


def test_a_lean_linear_layer_is_a_plain_head():
    lean, plain = lean_and_plain()
    lean.lm_head.__class__ = type("Lean", (nn.Linear,), {"_plain_class": nn.Linear})
    assert_same_training(lean, plain, **batch_of())


# ------------------------------------------------------------------------------------------------- being a twin


def test_there_and_back():
    model = tiny_llama()
    plain_class, names = type(model), list(model.state_dict())
    assert make_lean_causal_lm(model) and make_lean_causal_lm(model)  # twice is once
    assert isinstance(model, LeanCausalLM) and isinstance(model, plain_class)
    assert type(model).__name__ == plain_class.__name__ and type(model) is not plain_class
    assert inspect.signature(model.forward) == inspect.signature(plain_class.forward.__get__(model))
    assert list(model.state_dict()) == names
    assert make_plain_causal_lm(model) and type(model) is plain_class
    assert not make_plain_causal_lm(model)
    assert model(**batch_of()).logits is not None
    assert not make_lean_causal_lm(nn.Linear(2, 2)) and not make_lean_causal_lm(model.model)


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
    assert type(loaded) is LlamaForCausalLM and loaded.config.architectures == ["LlamaForCausalLM"]
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


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Phi", "Phi3", "Olmo2", "Starcoder2"])
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
    assert type(merged).__name__ == "LlamaForCausalLM" and merged(**batch_of()).logits is None


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
    lean.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(lean.forward.__func__)).__get__(lean)
    assert lean(**batch_of()).logits is None
    unwrapped = extract_model_from_parallel(lean, keep_fp32_wrapper=False)
    assert_same_training(unwrapped, plain, **batch_of())
    assert make_plain_causal_lm(unwrapped) and unwrapped(**batch_of()).logits is not None


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


# ------------------------------------------------------------------------------------------------------- memory


def test_the_ledger_of_a_model():
    """dh (B T D) and dW (V D) in place of the logits, their float32 copy's softmax and the head's input."""
    lean, plain = lean_and_plain()
    batch = batch_of()
    ledgers = [take_ledger(model, lambda m=model: m(**batch).loss) for model in (lean, plain)]
    tokens, words = 3 * 7 * 32 * 4, VOCABULARY * 32 * 4
    assert ledgers[0].grouped("term")["gradients from the loss"] == tokens + words + extra_bytes()
    # the plain one keeps: log-softmax (N V), the head's input (N D), the shifted labels (N int64), the weight of all (4)
    head = 3 * 7 * VOCABULARY * 4 + tokens + 3 * 7 * 8 + 4
    assert ledgers[1].total_bytes - head == ledgers[0].total_bytes - (tokens + words + extra_bytes())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_estimate_of_a_lean_model(device):
    """Fake tensors give the bytes of real ones; as on CUDA, nothing is asked of their values."""
    import velora
    from velora.memory.estimate import pretend

    config = velora.compose("method=full", "task=c4", "model=llama_tiny", "trainer.batch_size=2")
    pretended = pretend(config, device=device)
    assert make_lean_causal_lm(pretended.network)
    with pretended.context():
        kept = measure_saved_bytes(pretended.losses[0])
        pretended.losses[0]().backward()
    if device == "cpu":
        real = tiny_of(config)
        assert kept == measure_saved_bytes(lambda: real(**{k: v for k, v in pretended.batches[0].items()}).loss)


def tiny_of(config) -> nn.Module:
    from velora.memory.meter import network_without_weights

    network = network_without_weights(config).train()
    assert make_lean_causal_lm(network)
    return network


def test_a_model_under_compile():
    lean, plain = lean_and_plain()
    assert_same_training(torch.compile(lean, backend="aot_eager"), plain, **batch_of())
