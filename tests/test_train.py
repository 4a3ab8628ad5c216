"""The training loop on tiny networks of every family: what a step's loss is, schedules, scores, timing, and continuing."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loop_helpers import FAMILIES, LLAMA, ROBERTA, VIT, config_of, lines_of, steps_of, train, write_texts

from velora.config.parts import Phase
from velora.errors import ConfigError, Diverged
from velora.run import train as loop
from velora.run.arguments import training_arguments, use_one_device
from velora.run.chrono import Chrono
from velora.run.figures import Figures
from velora.run.order import SeededExamples


@pytest.fixture(scope="module")
def regression(tmp_path_factory) -> list[str]:
    """STS-B's layout with a few sentences: an encoder whose head has one output and a squared error."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "glue" / "STS-B"
    folder.mkdir(parents=True)
    header = [
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ]
    draw = random.Random(0)
    for name, rows in (("train", 64), ("dev", 16)):
        lines = ["\t".join(header)]
        for i in range(rows):
            first, second = (" ".join("word" * draw.randint(1, 3) for _ in range(draw.randint(1, 6))) for _ in "ab")
            lines.append("\t".join([str(i), *["x"] * 6, first, second, f"{draw.uniform(0, 5):.2f}"]))
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return [*ROBERTA, "task=glue/stsb", f"data.root={root}"]


@pytest.fixture(scope="module")
def families(regression, tmp_path_factory) -> dict[str, list[str]]:
    """Every family and every head; `padded` has texts of different length, so that micro-batches have different weights."""
    root = write_texts(tmp_path_factory.mktemp("text"))
    padded = [*LLAMA[1:], "task=c4", "task.folder=short", "task.shuffle_buffer=4", f"data.root={root}"]
    return {**FAMILIES, "padded": padded, "regression": regression}


NAMES = ["llama", "padded", "roberta", "regression", "vit"]


def curve(config):
    return [(line["loss"], line["grad_norm"]) for line in steps_of(config)]


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_do_not_depend_on_accumulation(families, name, tmp_path):
    """8 x 1, 4 x 2 and 2 x 4 examples: the same mean over the step. SGD-like methods and clipping feel every factor."""
    curves = []
    for micro in (8, 4, 2):
        config = config_of(tmp_path / str(micro), *families[name], "method=full", f"trainer.micro_batch_size={micro}")
        train(config)
        curves.append(curve(config))
    assert len(curves[0]) == 4
    for other in curves[1:]:
        for (loss, norm), (other_loss, other_norm) in zip(curves[0], other, strict=True):
            # fp32: sums in another order, and AdamW divides by roots of small numbers in the steps after the first
            assert other_loss == pytest.approx(loss, rel=1e-4)
            assert other_norm == pytest.approx(norm, rel=1e-3)
        assert other[0] == pytest.approx(curves[0][0], rel=1e-5)


def train_in_two_processes(runs: dict[str, list[str]], folder: Path) -> None:
    """Two gloo processes under torchrun's environment, all runs in one start, into <folder>/two/<name>."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "runs.json").write_text(json.dumps(runs))
    worker = Path(__file__).parent / "loop_worker.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error[-3000:]


def test_loss_and_gradient_do_not_depend_on_the_number_of_processes(families, tmp_path):
    """Every family and head: the curve of one process."""
    runs = {name: [*families[name], "method=full"] for name in NAMES}
    train_in_two_processes(runs, tmp_path)
    for name in NAMES:
        one, two = (config_of(tmp_path / number / name, *runs[name]) for number in ("one", "two"))
        train(one)
        assert curve(two)[0] == pytest.approx(curve(one)[0], rel=1e-5), name


def test_network_says_the_same_as_transformers_own_division(tmp_path):
    """An independent path for the mean over a step: the network's own loss on all eight examples at once."""
    from velora.models.build import build_network

    config = config_of(tmp_path, *ROBERTA, "method=full", "trainer.micro_batch_size=2", "trainer.max_steps=1")
    train(config)
    tokenizer = config.model.preprocessor(config)
    data = config.task.load(tokenizer, config)
    network, _ = build_network(config, config.task.head(config), tokenizer)
    order = torch.randperm(len(data.phases[0].train), generator=torch.Generator().manual_seed(config.seed))[:8].tolist()
    loss = network.train()(**data.collate([data.phases[0].train[i] for i in order])).loss
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None))
    assert curve(config)[0] == pytest.approx((loss.item(), norm), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["trainer.schedule=constant"], [1.0] * 8),
        (["trainer.schedule=constant", "trainer.warmup_steps=4"], [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        (["trainer.schedule=linear"], [1 - k / 8 for k in range(8)]),
        (["trainer.schedule=linear", "trainer.warmup_steps=2"], [0, 0.5, *(1 - k / 6 for k in range(6))]),
        (["trainer.schedule=linear", "trainer.warmup_ratio=0.25"], [0, 0.5, *(1 - k / 6 for k in range(6))]),
        (["trainer.schedule=cosine"], [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
        (
            ["trainer.schedule=cosine", "trainer.min_lr_ratio=0.1", "trainer.warmup_steps=2"],
            [0, 0.5, *(0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6))],
        ),
    ],
    ids=["constant", "constant warm-up", "linear", "linear warm-up", "linear ratio", "cosine", "cosine to a tenth"],
)
def test_learning_rates_of_each_schedule(settings, expected, tmp_path):
    config = config_of(tmp_path, *ROBERTA, "method=linear_probe", "trainer.max_steps=8", *settings)
    train(config)
    assert [line["learning_rate"] / 1e-3 for line in steps_of(config)] == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, capsys):
    train(config_of(tmp_path, *ROBERTA, "method=linear_probe", "trainer.warmup_steps=40"))
    assert "the warm-up (40 steps) is not shorter than the run (4 steps):" in capsys.readouterr().out


def test_an_interval_that_a_protocol_does_not_use_is_said(tmp_path, capsys):
    common = [*VIT, "method=linear_probe", "trainer.max_steps=1"]
    for interval, said in (("2", True), ("end", False)):
        train(config_of(tmp_path / interval, *common, f"trainer.eval_every={interval}"))
        assert (f"trainer.eval_every={interval} is not used with this protocol" in capsys.readouterr().out) == said


def test_drop_last(tmp_path):
    """1000 images in batches of 64: 15 steps an epoch with it, 16 without."""
    counts = []
    for drop_last in ("true", "false"):
        config = config_of(
            tmp_path / drop_last, *VIT, "method=linear_probe", "trainer.batch_size=64", "trainer.max_steps=null",
            "trainer.num_epochs=1", f"trainer.drop_last={drop_last}",
        )  # fmt: skip
        train(config)
        counts.append(len(steps_of(config)))
    assert counts == [15, 16]


def state(*scores, key="accuracy"):
    return SimpleNamespace(
        log_history=[{"step": 10 * (i + 1), "epoch": i + 1.0, f"eval_{key}": score} for i, score in enumerate(scores)]
    )


PHASE = Phase("train", None, {"": None})
UP = SimpleNamespace(best_metric="accuracy", greater_is_better=True)
DOWN = SimpleNamespace(best_metric="accuracy", greater_is_better=False)


@pytest.mark.parametrize(
    ("scores", "data", "step"),
    [
        ([0.1, 0.3, 0.2], UP, 20),
        ([0.3, 0.1, 0.1], DOWN, 20),
        ([0.2, 0.3, 0.3], UP, 20),
        ([math.nan, 0.1, 0.2], UP, 30),
        ([math.nan, 0.2, 0.1], DOWN, 30),
        ([0.1, math.nan], UP, 10),
        ([math.nan, math.nan], UP, 20),
    ],
)
def test_best_evaluation(scores, data, step):
    final, best = loop.choose_scores(state(*scores), data, PHASE)
    assert best["step"] == step
    assert best["epoch"] == step / 10
    assert final["accuracy"] == scores[-1] or math.isnan(scores[-1])


def test_the_first_validation_split_selects():
    history = SimpleNamespace(
        log_history=[{"step": s, "epoch": s, "eval_a_accuracy": a, "eval_b_accuracy": b} for s, a, b in [(1, 2, 1), (2, 1, 2)]]
    )  # fmt: skip
    assert loop.choose_scores(history, UP, Phase("train", None, {"a": None, "b": None}))[1]["step"] == 1


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


class Stepping:
    """An optimiser as accelerate wraps it."""

    def __init__(self, skipped, state):
        self.step_was_skipped, self.state = skipped, state


def watch(tmp_path):
    config = config_of(tmp_path, *ROBERTA)
    logged = []
    run = SimpleNamespace(log=logged.append, writes=True)
    trainer = SimpleNamespace(order=None, data=None, figures=Figures(torch.device("cpu"), "tokens"))
    watch = loop.Watch(config, run, PHASE, trainer, SimpleNamespace(signal_name=None), None)
    return watch, trainer.figures, logged


def test_a_step_that_the_gradient_scaler_skips_is_no_divergence(tmp_path):
    watching, figures, logged = watch(tmp_path)
    progress = SimpleNamespace(global_step=1, epoch=0.1)
    figures.memory["gradients_bytes"] = 0
    logs = {"loss": 0.5, "grad_norm": math.inf, "learning_rate": 1e-3}
    watching.on_optimizer_step(None, progress, None, optimizer=Stepping(True, {}))
    assert "optimizer_bytes" not in figures.memory  # nothing was kept yet
    watching.on_log(None, progress, None, logs=logs, optimizer=Stepping(True, {}))
    assert logged[0]["grad_norm"] == math.inf
    moments = {"p": {"exp_avg": torch.zeros(10), "exp_avg_sq": torch.zeros(10)}}
    watching.on_optimizer_step(None, progress, None, optimizer=Stepping(False, moments))
    assert figures.memory["optimizer_bytes"] == 80
    with pytest.raises(Diverged, match="grad_norm is inf at step 1"):
        watching.on_log(None, progress, None, logs=logs, optimizer=Stepping(False, {}))
    with pytest.raises(Diverged, match="loss is nan"):
        watching.on_log(None, progress, None, logs={"loss": math.nan}, optimizer=Stepping(True, {}))


def test_gradients_that_overflow_for_ever_are_a_divergence(tmp_path):
    watching, _, _ = watch(tmp_path)
    progress = SimpleNamespace(global_step=7, epoch=0.1)
    for _ in range(49):
        watching.on_optimizer_step(None, progress, None, optimizer=Stepping(True, {}))
    with pytest.raises(Diverged, match=r"overflowed in 50 steps in a row before step 7.*precision=bf16"):
        watching.on_optimizer_step(None, progress, None, optimizer=Stepping(True, {}))


def test_fp16_with_a_gradient_scaler_on_the_cpu(tmp_path, monkeypatch):
    """A real scaler whose first factors overflow: steps are skipped, the run goes on and ends well."""
    from accelerate import Accelerator

    original = loop.PhaseTrainer.__init__

    def with_scaler(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    monkeypatch.setattr(loop.PhaseTrainer, "__init__", with_scaler)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    config = config_of(tmp_path, *LLAMA, "method=full", "trainer.max_steps=160")
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 150)
    record = train(config)
    norms = [line["grad_norm"] for line in steps_of(config)]
    assert record["status"] == "ok"
    assert record["memory"]["optimizer_bytes"] > 0
    assert norms[0] is None  # not finite, so null in JSON
    assert norms[-1] is not None


def test_fp16_without_cuda_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match=r"trainer.precision=fp16 .*needs a CUDA device.*bf16 or fp32"):
        train(config_of(tmp_path, *ROBERTA, "trainer.precision=fp16"))


def test_one_process_takes_one_device(capsys):
    arguments = SimpleNamespace(n_gpu=4, _n_gpu=4)
    use_one_device(arguments)
    assert arguments._n_gpu == 1
    assert "4 GPUs are visible and one is used; torchrun --nproc_per_node 4" in capsys.readouterr().out


def test_memory_is_not_pinned_for_a_run_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = training_arguments(config_of(tmp_path, *ROBERTA, "trainer.device=cpu"), tmp_path, "end")
    assert arguments.dataloader_pin_memory is False


class Noisy(SeededExamples):
    """Examples of a task with random noise, as an augmentation would add it."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitems__(self, numbers):
        return [self[number] for number in numbers]

    def __getitem__(self, number):
        image, label = self.examples[number]
        noise = random.randint(0, 9) + int(torch.randint(10, ()))
        return (image.int() + noise).clamp(max=255).to(torch.uint8), label


@pytest.fixture
def noisy(monkeypatch):
    from velora.data import digits

    original = digits.image_task_data

    def with_noise(protocol, splits, transform, about):
        splits = {name: Noisy(split) if name.startswith("train") else split for name, split in splits.items()}
        return original(protocol, splits, transform, about)

    monkeypatch.setattr(digits, "image_task_data", with_noise)


class Killed(BaseException):
    """Ends a run as a kill would: nothing of ours catches it."""


def kill_when(monkeypatch, method, moment):
    """Raise out of PhaseTrainer.<method> the first time that `moment(trainer)` holds; the later start is not disturbed."""
    original = getattr(loop.PhaseTrainer, method)
    killed = []

    def until(self, *args, **kwargs):
        if not killed and moment(self):
            killed.append(True)
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(loop.PhaseTrainer, method, until)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("save_every", [3, 16])
def test_a_run_with_random_examples_continues_on_its_curve(noisy, monkeypatch, tmp_path, num_workers, save_every):
    """In the middle of an epoch and at its end (16 steps); with dropout in the network's drop-path."""
    common = [*VIT, "method=full", "trainer.batch_size=64", "trainer.max_steps=20", f"trainer.save_every={save_every}",
              f"trainer.num_workers={num_workers}", "model.drop_path=0.3"]  # fmt: skip
    whole, broken = (config_of(tmp_path / name, *common) for name in ("whole", "broken"))
    train(whole)
    kill_when(monkeypatch, "training_step", lambda trainer: trainer.state.global_step == 18)
    with pytest.raises(Killed):
        train(broken)
    assert len(steps_of(broken)) == 18
    train(broken)
    assert lines_of(broken) == lines_of(whole)


TWO_PHASES = [*VIT[:-1], "task.protocol=select_then_retrain", "trainer.batch_size=100", "trainer.max_steps=null",
              "trainer.num_epochs=2", "trainer.eval_every=epoch", "trainer.save_every=epoch",
              "trainer.measure_memory=true"]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        [*LLAMA, "method=velora", "activations.init=running_average", "trainer.max_steps=20", "trainer.save_every=10",
         "trainer.measure_memory=true"],
        TWO_PHASES,
    ],
    ids=["steps", "two phases"],
)  # fmt: skip
def test_a_run_killed_in_its_last_evaluation_trains_no_further(overrides, monkeypatch, tmp_path):
    whole, broken = (config_of(tmp_path / name, *overrides) for name in ("whole", "broken"))
    expected = train(whole)
    last = max(line["step"] for line in lines_of(whole))
    final_phase = lines_of(whole)[-1]["phase"]
    kill_when(
        monkeypatch, "evaluate",
        lambda t: t.state.global_step == last and (final_phase == "train" or "retrain" in t.args.output_dir),
    )  # fmt: skip
    with pytest.raises(Killed):
        train(broken)
    record = train(broken)
    assert lines_of(broken) == lines_of(whole)
    assert record["metrics"] == expected["metrics"]
    assert record["memory"] == expected["memory"]
    for key, value in expected["speed"].items():
        assert (record["speed"][key] is None) == (value is None), key


def test_a_checkpoint_that_cannot_be_written_is_a_sentence_and_leaves_no_half(monkeypatch, tmp_path):
    from velora.errors import RunError

    def full(self, *args, **kwargs):
        folder = Path(self.args.output_dir) / "checkpoint-4"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_checkpoint", full)
    config = config_of(tmp_path, *ROBERTA, "trainer.save_every=4")
    with pytest.raises(RunError, match=r"checkpoint-4 cannot be written .*No space left.* runs_dir="):
        train(config)
    assert not list(config.folder.glob("checkpoint-*"))
    assert json.loads((config.folder / "result.json").read_text())["status"] == "failed"


def test_out_of_memory_on_a_cpu_is_called_so(monkeypatch, tmp_path):
    from velora.errors import RunError

    def too_much(self, *args, **kwargs):
        torch.empty(2**60)

    monkeypatch.setattr(loop.PhaseTrainer, "training_step", too_much)
    config = config_of(tmp_path, *ROBERTA)
    with pytest.raises(RunError, match=r"out of memory: .*lower trainer.micro_batch_size"):
        train(config)
    assert json.loads((config.folder / "result.json").read_text())["status"] == "out_of_memory"


def test_each_run_of_a_process_has_a_wandb_run_of_its_own(tmp_path, monkeypatch):
    """Offline; a stand-in for wandb notes what it is told, since the real one starts a service."""
    opened, logged, finished = [], [], []

    class Stub:
        def __init__(self, **options):
            opened.append(options)
            self.name = options["name"]

        def log(self, values):
            logged.append((self.name, values))

        def finish(self, exit_code):
            finished.append((self.name, exit_code))

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: Stub(**options))
    for seed in (0, 1):
        train(config_of(tmp_path, *ROBERTA, "wandb.mode=offline", "wandb.tags=[a,b]", f"seed={seed}"))
    assert [options["name"] for options in opened] == ["test/seed0", "test/seed1"]
    assert {options["dir"] for options in opened} == {str(tmp_path / "test" / f"seed{seed}") for seed in (0, 1)}
    assert all(options["mode"] == "offline" and options["tags"] == ["a", "b"] for options in opened)
    assert finished == [("test/seed0", 0), ("test/seed1", 0)]
    assert [name for name, _ in logged] == ["test/seed0"] * 5 + ["test/seed1"] * 5


def test_wandb_that_fails_costs_no_training(tmp_path, monkeypatch, capsys):
    import wandb

    def broken(**options):
        raise RuntimeError("no answer from the server")

    monkeypatch.setattr(wandb, "init", broken)
    record = train(config_of(tmp_path, *ROBERTA, "wandb.mode=online"))
    assert record["status"] == "ok"
    assert "the run goes on without it" in capsys.readouterr().out


def test_wrong_data_costs_no_earlier_run(tmp_path, monkeypatch):
    """overwrite=true gives up what is there only when the new run can begin."""
    config = config_of(tmp_path, *ROBERTA)
    train(config)
    before = (config.folder / "result.json").read_text()
    again = config_of(tmp_path, *ROBERTA, "overwrite=true", "trainer.max_steps=3")

    def missing(self, preprocessor, config):
        raise ConfigError("data.root=nowhere has no file")

    monkeypatch.setattr(type(again.task), "load", missing)
    with pytest.raises(ConfigError, match="nowhere"):
        train(again)
    assert (config.folder / "result.json").read_text() == before


def test_required_resume_of_a_run_whose_second_phase_has_no_checkpoint_yet(monkeypatch, tmp_path):
    """Killed in the first of two phases: the second one starts from its beginning, as it would have."""
    overrides = [*TWO_PHASES, "trainer.save_every=1"]
    whole, broken = (config_of(tmp_path / name, *overrides) for name in ("whole", "broken"))
    train(whole)
    kill_when(monkeypatch, "training_step", lambda trainer: trainer.state.global_step == 4)
    with pytest.raises(Killed):
        train(broken)
    train(config_of(tmp_path / "broken", *overrides, "resume=required"))
    assert lines_of(broken) == lines_of(whole)


def test_measuring_leaves_no_trace(tmp_path):
    """The forwards that only measure are no part of the running average, which accumulation would weight by them."""
    common = [*LLAMA, "method=velora", "activations.init=running_average", "trainer.micro_batch_size=2"]
    curves = []
    for measured in ("true", "false"):
        config = config_of(tmp_path / measured, *common, f"trainer.measure_memory={measured}")
        train(config)
        curves.append(lines_of(config))
    assert curves[0] == curves[1]


def test_architecture_that_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"model.architecture.*attention heads \(6\)"):
        train(
            config_of(
                tmp_path,
                *[o for o in LLAMA if "num_attention_heads" not in o],
                "model.architecture.num_attention_heads=6",
            )
        )


def test_loss_that_is_not_finite(tmp_path):
    config = config_of(
        tmp_path,
        *LLAMA,
        "method=full",
        "trainer.learning_rate=1e30",
        "trainer.max_grad_norm=null",
        "trainer.max_steps=16",
    )
    with pytest.raises(Diverged, match=r"at step \d+; a lower trainer.learning_rate"):
        train(config)
    record = json.loads((config.folder / "result.json").read_text())
    assert record["status"] == "diverged"
    assert "step" in record["error"]
