"""The CPU meter against the profiler's record of the allocator, byte for byte.

The allocator's log knows nothing of tensors, so it can only confirm sums: the peak, what is left, what is held at
the end of a forward. The terms are confirmed by counting parameters.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from memory_helpers import loss_of
from tiny import tiny_llama, tiny_roberta, tiny_vit
from torch import nn
from torch.autograd.profiler import profile

from velora.memory.ledger import measure_saved_bytes
from velora.memory.meter import Meter, measure_steps, training_steps
from velora.memory.storages import unique_bytes
from velora.memory.timeline import TERMS
from velora.optim import Lomo


def allocator_peak(run: Callable[[], None]) -> int:
    """The largest sum of what the CPU allocator handed out in `run`, over what was there before."""
    gc.collect()
    with profile(profile_memory=True) as record:
        run()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize("make", [tiny_llama, tiny_roberta, tiny_vit])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_peak_equals_the_allocators(make: Callable[[], nn.Module], num_micro_batches: int) -> None:
    model = make()
    forward, optimizer = loss_of(model), adamw(model)
    loss_of(make())().backward()  # what the first call ever makes and keeps
    expected = allocator_peak(
        lambda: training_steps(model, [forward] * num_micro_batches, optimizer, max_grad_norm=1.0)
    )
    model = make()
    figures = measure_steps(model, [loss_of(model)] * num_micro_batches, adamw(model), max_grad_norm=1.0)
    # Made inside operators, where no dispatch mode looks: a few scalars, and at the ViT's convolution a buffer of 2 kB
    unseen = 2048 if make is tiny_vit else 64
    assert expected - unseen <= figures.peak.num_bytes - figures.after_load_bytes <= expected


@pytest.mark.parametrize("make", [tiny_llama, tiny_roberta, tiny_vit])
def test_terms_are_what_they_are_called(make: Callable[[], nn.Module]) -> None:
    model = make()
    optimizer = adamw(model)
    figures = measure_steps(model, [loss_of(model)], optimizer)
    weights = unique_bytes([*model.parameters(), *model.buffers()])
    trained = [p for state in optimizer.state.values() for p in state.values()]
    assert figures.term_peaks["weights"] == figures.after_load_bytes == weights
    assert figures.term_peaks["optimizer"] == unique_bytes(trained)
    used = sum(p.numel() * 4 for p in optimizer.state)
    assert figures.term_peaks["gradients"] == used
    assert figures.term_peaks["activations"] == figures.saved_bytes == measure_saved_bytes(loss_of(model))
    assert set(figures.peak.terms) == set(TERMS)
    assert sum(figures.peak.terms.values()) == figures.peak.num_bytes


def test_a_meter_in_a_loop_of_somebody_else() -> None:
    model = tiny_llama()
    optimizer, forward, meter = adamw(model), loss_of(model), Meter(model)
    with meter.measuring(optimizer):
        for _ in range(2):
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()
    told = measure_steps(model := tiny_llama(), [loss_of(model)], adamw(model))
    figures = meter.figures
    assert figures.num_steps == told.num_steps == 2
    assert figures.peak.num_bytes == told.peak.num_bytes
    assert figures.saved_bytes - told.saved_bytes == 8  # the loss and autograd's first gradient, not told apart here
    assert figures.rss_bytes is not None
    assert figures.rss_bytes > figures.peak.num_bytes


def test_measuring_changes_nothing() -> None:
    plain, metered = tiny_roberta(hidden_dropout_prob=0.1), tiny_roberta(hidden_dropout_prob=0.1)
    torch.manual_seed(3)
    training_steps(plain, [loss_of(plain)], adamw(plain), num_steps=3, max_grad_norm=1.0)
    torch.manual_seed(3)
    measure_steps(metered, [loss_of(metered)], adamw(metered), num_steps=3, max_grad_norm=1.0)
    for expected, actual in zip(plain.parameters(), metered.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_large_activations_make_the_peak_in_the_forward_or_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(10_000, 4)
    figures = measure_steps(model, [lambda: model(x).mean()], adamw(model))
    assert figures.peak.moment.phase in ("forward", "backward")
    assert figures.peak.terms["activations"] >= 2 * 160_000
    assert figures.by_phase["step"].num_bytes < 10_000


def test_updating_inside_backward_shows_one_gradient_at_a_time() -> None:
    model = tiny_llama()
    figures = measure_steps(model, [loss_of(model)], Lomo(model.parameters(), lr=1e-3))
    largest = max(p.nbytes for p in model.parameters())
    assert largest <= figures.term_peaks["gradients"] < 2 * largest
    assert figures.term_peaks["optimizer"] == 0


def test_checkpointing_moves_bytes_from_activations_to_transient() -> None:
    plain, checkpointed = tiny_llama(), tiny_llama()
    checkpointed.gradient_checkpointing_enable()
    before = measure_steps(plain, [loss_of(plain)], adamw(plain))
    after = measure_steps(checkpointed, [loss_of(checkpointed)], adamw(checkpointed))
    assert after.saved_bytes < before.saved_bytes
    assert after.by_phase["backward"].terms["transient"] > before.by_phase["backward"].terms["transient"]


def test_the_allocators_peaks_are_read_and_reset_at_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA side of the books, with a stand-in for the allocator (this machine may have no GPU)."""
    model = tiny_llama()
    meter, resets, readings = Meter(model), [], iter(range(10**6, 2 * 10**6))
    meter.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: next(readings))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 2**21)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a stand-in")
    with meter.measuring(optimizer := adamw(model)):
        training_steps(model, [loss_of(model)], optimizer, timeline=meter.timeline)
    figures = meter.figures
    # load, then forward, backward, step twice: seven phases end, each is read once and reset
    assert figures.device_peaks == {
        "after load": {"allocated": 10**6, "reserved": 2**21},
        "forward": {"allocated": 10**6 + 4, "reserved": 2**21},
        "backward": {"allocated": 10**6 + 5, "reserved": 2**21},
        "step": {"allocated": 10**6 + 6, "reserved": 2**21},
    }
    assert len(resets) == 1 + 7
    assert figures.unexplained_bytes == 10**6 + 6 - figures.peak.num_bytes
    assert figures.device == "a stand-in"


@pytest.mark.gpu
def test_on_cuda_the_allocators_peak_is_explained() -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=688).cuda()
    ids = torch.zeros(8, 64, dtype=torch.long, device="cuda")
    figures = measure_steps(model, [lambda: model(input_ids=ids, labels=ids, use_cache=False).loss], adamw(model))
    allocated = max(peaks["allocated"] for peaks in figures.device_peaks.values())
    assert set(figures.device_peaks) >= {"forward", "backward", "step"}
    assert figures.unexplained_bytes == allocated - figures.peak.num_bytes
    assert abs(figures.unexplained_bytes) < 0.1 * allocated + 32 * 2**20  # the workspace of cuBLAS
