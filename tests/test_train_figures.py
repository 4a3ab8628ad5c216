"""What is measured while a run trains: the clock, the peaks, and that measuring changes nothing."""

from __future__ import annotations

import torch
from loop_helpers import LLAMA, config_of, lines_of, train

from velora.run.chrono import Chrono
from velora.run.figures import Figures


def test_timing_with_a_clock_of_its_own():
    now = [0.0]
    chrono = Chrono(torch.device("cpu"), clock=lambda: now[0])
    chrono.start(10)
    for step in range(10):
        chrono.count(5)
        now[0] += 1.0 if step >= 3 else 100.0  # the first three are warm-up
        chrono.step()
        if step == 5:
            with chrono.paused():
                now[0] += 1000.0
    assert (chrono.steps, chrono.seconds, float(chrono.items())) == (7, 7.0, 35.0)
    assert chrono.total_seconds == 307.0


def test_timing_goes_on_in_the_next_process():
    now = [0.0]
    second = Chrono(torch.device("cpu"), clock=lambda: now[0])
    second.load({"seconds": 4.0, "total_seconds": 9.0, "steps": 2, "items": 30}, with_items=True)
    second.start(4)
    for _ in range(4):
        second.count(10)
        now[0] += 2.0
        second.step()
    assert (second.steps, second.seconds, second.total_seconds, float(second.items())) == (6, 12.0, 17.0, 70.0)


def test_a_device_with_a_queue_is_waited_for_where_the_window_begins_pauses_and_ends(monkeypatch):
    """A stand-in for CUDA: steps return at once, the work is done by the time of a synchronisation."""
    now, queued = [0.0], [0.0]

    def synchronize(device=None):
        now[0] += queued[0]
        queued[0] = 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    chrono = Chrono(torch.device("cuda"), clock=lambda: now[0])
    chrono.start(8)
    for step in range(8):
        queued[0] += 1.0
        chrono.step()
        if step == 5:
            with chrono.paused():
                queued[0] += 500.0
    chrono.finish()
    assert (chrono.steps, chrono.seconds) == (5, 5.0)


def test_evaluations_and_checkpoints_are_not_training(monkeypatch, tmp_path):
    """Peaks are carried over and reset around them, and the cache is emptied, or `reserved` would keep what they took."""
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name: calls.append(name))
    peaks = iter([100, 900, 200, 50, 60, 70])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(peaks))
    figures = Figures(torch.device("cuda"), "tokens")
    with figures.aside():
        calls.append("evaluation")
    after = calls[calls.index("evaluation") + 1 :]
    assert after.index("empty_cache") < after.index("reset_peak_memory_stats")
    figures.note_peak()
    assert figures.memory == {"peak_allocated_bytes": 200, "peak_reserved_bytes": 900}


def test_measuring_leaves_no_trace(tmp_path):
    """The forwards that only measure are no part of the running average, which accumulation would weight by them."""
    common = [*LLAMA, "method=velora", "activations.init=running_average", "trainer.micro_batch_size=2"]
    curves = []
    for measured in ("true", "false"):
        config = config_of(tmp_path / measured, *common, f"trainer.measure_memory={measured}")
        train(config)
        curves.append(lines_of(config))
    assert curves[0] == curves[1]
