"""Head and loss in one, against F.cross_entropy(F.linear(...)) in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from twin_helpers import ROUNDING

from velora.memory.ledger import measure_saved_bytes
from velora.memory.storages import AllocationTracker
from velora.nn.linear_loss import linear_cross_entropy, tokens_in_chunk

N, D, V, CHUNK = 23, 12, 40, 5  # four full chunks and three tokens


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


def assert_close(mine: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within 8 roundings of `dtype`, of the largest number (the sums have terms of that size): logits, softmax, a product
    and its scaling are rounded once each; up to 6 were seen, and as many with the plain loss in the same dtype."""
    tolerance = 8 * ROUNDING[dtype] * exact.abs().max().item()
    torch.testing.assert_close(mine.double(), exact.double(), rtol=0, atol=tolerance)


def detached(leaves: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if leaf is None else leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("num_items", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_loss_and_gradients_equal_float64s(dtype, bias, num_items):
    leaves, labels = factors(dtype, bias), some_labels()
    exact_leaves = detached(leaves, torch.float64)
    exact = plain_loss(*exact_leaves, labels, num_items)
    loss = linear_cross_entropy(*leaves, labels, num_items=num_items, chunk_size=CHUNK)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.shape == ()
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
    assert tokens_in_chunk(32_000) == 256
    assert tokens_in_chunk(128_256) == 256
    assert tokens_in_chunk(4_096) == 2_048


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 7])
def test_without_a_label_that_counts(num_items):
    """NaN, or zero, with zero gradients: what torch does, and what keeps the weights alive."""
    leaves, labels = factors(), some_labels(N)
    expected = plain_loss(*leaves, labels, None if num_items is None else torch.tensor(int(num_items)))
    loss = linear_cross_entropy(*leaves, labels, num_items=torch.tensor(0) if num_items == 0 else num_items)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
    for mine, theirs in zip(gradients_of(loss, leaves), gradients_of(expected, leaves), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.any()


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
        assert torch.equal(a, b)
        assert torch.equal(a, c)
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
            assert h.grad.shape == (N, D)
            assert w.grad.shape == (V, D)


def test_no_label_looks_beyond_its_token():
    """Gradients of ignored tokens are exactly zero."""
    leaves, labels = factors(), some_labels()
    (dh, *_) = gradients_of(linear_cross_entropy(*leaves, labels, chunk_size=CHUNK), leaves)
    assert not dh[labels == -100].any()
    assert dh[labels != -100].any(1).all()
