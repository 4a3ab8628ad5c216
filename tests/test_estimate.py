"""The estimate (fake tensors) against the meter (real steps of the same configuration), and both against real training.

Fake tensors have the same storages as real ones and both run the same operators, so the peaks are
asserted to be equal to the byte; the meter itself is checked against the allocator in test_meter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from text_helpers import composed
from torch import nn

from velora.config.run import Config
from velora.memory.estimate import AsOnCuda, estimate, largest_batch, pretend, target_device
from velora.memory.ledger import take_ledger
from velora.memory.meter import Meter, measure
from velora.memory.timeline import TERMS
from velora.models.build import build_network

LLAMA = ["task=manual", "model=llama_tiny", "task.max_length=32", "trainer.batch_size=2"]
LLAMA += [f"model.architecture.{size}" for size in ("hidden_size=64", "intermediate_size=128", "num_hidden_layers=2")]
LLAMA += ["model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=4"]
FAMILIES = {
    "llama": LLAMA,
    "roberta": ["task=glue/sst2", "model=roberta_tiny", "task.max_length=32", "trainer.batch_size=2"],
    "vit": ["task=digits", "model=vit_tiny", "trainer.batch_size=2"],
}
METHODS = [
    "full", "linear_probe", "lora", "lora_velora", "qlora", "qlora_velora", "ssf", "ssf_velora", "hydra",
    "hydra_velora", "multilora", "multilora_velora", "qpissa", "galore", "flora", "velora", "checkpoint",
]  # fmt: skip
NO_CLIPPING = "trainer.max_grad_norm=null"
ALONG_THE_AXES = [
    ["method=velora_all"],
    ["method=full", "trainer.batch_size=6", "trainer.micro_batch_size=2"],
    ["method=velora", "trainer.precision=bf16"],
    ["method=full", "weights.dtype=bf16"],
    ["method=full", "optimizer=lomo", NO_CLIPPING],
    ["method=full", "optimizer=adafactor"],
    ["method=full", "optimizer=adamw_8bit"],
    ["method=galore", "optimizer.layerwise=true", NO_CLIPPING],
    ["method=galore", "optimizer.layerwise=true", NO_CLIPPING, "trainer.micro_batch_size=1"],
    ["method=galore", "optimizer.bits=8"],
    ["method=q_galore"],
    ["method=q_galore", "weights=dense", "optimizer.bits=32"],
    ["method=q_galore", "recompute=lean", "weights.dtype=fp32", "trainer.precision=bf16"],
    ["method=q_galore_velora", "optimizer.layerwise=true", NO_CLIPPING, "trainer.micro_batch_size=1"],
    ["method=grass"],
    ["method=grass_velora", "optimizer.selection=sampled"],
    ["method=grass_velora_factored"],
    ["method=grass", "optimizer.layerwise=true", NO_CLIPPING, "trainer.micro_batch_size=1"],
    ["method=checkpoint", "recompute.every_n_layers=2"],
    ["method=lora", "recompute=blocks", "recompute.lean=false"],
    ["method=velora_all", "recompute=blocks", "recompute.lean=false"],
    ["method=velora_all", "recompute=lean"],
    ["method=full", "recompute=mlp"],
    ["method=velora_all", "recompute=blocks"],
]


def configured(*overrides: str, device: str = "cpu") -> Config:
    return composed(*overrides, f"trainer.device={device}")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


QUICK = {("roberta", m) for m in ("velora", "qlora_velora", "galore")} | {
    ("vit", m) for m in ("full", "velora", "lora", "ssf_velora", "hydra_velora")
}
GRID = [
    pytest.param(family, method, marks=[] if family == "llama" or (family, method) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for method in METHODS
]


@pytest.mark.parametrize(("family", "method"), GRID)
def test_every_method_on_every_family(family: str, method: str) -> None:
    config = configured(*FAMILIES[family], f"method={method}")
    assert_equal_to_the_meter(config)


@pytest.mark.parametrize("overrides", ALONG_THE_AXES, ids=" ".join)
def test_along_the_axes(overrides: list[str]) -> None:
    assert_equal_to_the_meter(configured(*FAMILIES["llama"], *overrides))


def test_fp16_takes_what_bf16_takes() -> None:
    """A CPU refuses to train in fp16, so there is nothing to measure; the estimate runs the same operators."""
    fp16, bf16 = (configured(*FAMILIES["llama"], "method=full", f"trainer.precision={p}") for p in ("fp16", "bf16"))
    assert estimate(fp16).peak == estimate(bf16).peak == measure(bf16).peak


def assert_equal_to_the_meter(config: Config) -> None:
    estimated, measured = estimate(config), measure(config)
    assert estimated.peak == measured.peak
    assert estimated.term_peaks == measured.term_peaks
    assert estimated.saved_bytes == measured.saved_bytes
    for phase, peak in measured.by_phase.items():
        assert estimated.by_phase[phase].num_bytes == peak.num_bytes


def test_padding_brings_the_masks() -> None:
    config = configured("task=c4", *LLAMA[1:], "method=full")
    full, padded = estimate(config), estimate(config, padded=True)
    assert padded.saved_bytes > full.saved_bytes
    assert padded.peak == measure(config, padded=True).peak


@pytest.mark.parametrize("method", ["full", "lora", "checkpoint"])
def test_equals_a_real_training_run(method: str, tmp_path: Path) -> None:
    """Steps of transformers' Trainer on the embedded text, from the runner's own loop, under the meter."""
    from velora.run.arguments import training_arguments
    from velora.run.figures import Figures
    from velora.run.train import PhaseTrainer

    config = configured(
        *FAMILIES["llama"], f"method={method}", "trainer.max_steps=2", f"runs_dir={tmp_path}", "wandb.mode=disabled"
    )
    preprocessor = config.model.preprocessor(config)
    data = config.task.load(preprocessor, config)
    network, _ = build_network(config, config.task.head(config), preprocessor)
    arguments = training_arguments(config, tmp_path, "end")
    figures = Figures(arguments.device, data.unit)
    trainer = PhaseTrainer(config, data, data.phases[0], figures, lambda step: None, model=network, args=arguments)
    meter = Meter(network.train())
    with meter.measuring():
        trainer.train()
        meter.timeline.follow(trainer.optimizer.optimizer)
    expected = estimate(config)
    # beside the step itself, Trainer keeps a few scalars for its log; and its batches are counted as transient
    assert meter.figures.peak.num_bytes == pytest.approx(expected.peak.num_bytes, rel=0.002)
    for term in ("weights", "gradients", "optimizer"):
        assert meter.figures.term_peaks[term] == expected.term_peaks[term]
    assert meter.figures.saved_bytes == pytest.approx(expected.saved_bytes, abs=32)


def test_large_networks_need_no_memory_and_no_tokenizer() -> None:
    config = configured("task=c4", "model=llama_7b", "method=qlora_velora", "model.architecture.num_hidden_layers=1")
    figures = estimate(config)
    block = 4 * 4096**2 + 3 * 4096 * 11008  # nf4: half a byte, and with double quantisation 0.127 bits of scales each
    dense = (2 * 32000 * 4096 + 3 * 4096) * 2  # embedding, head and norms in bf16
    scales = block / 64 * 1.0 + block / 64 / 256 * 4
    lora = sum(p.numel() * 4 for p in pretend(config).network.parameters() if p.requires_grad)
    assert figures.term_peaks["weights"] == pytest.approx(block / 2 + scales + dense + lora, rel=1e-3)
    assert set(figures.peak.terms) == set(TERMS)


def test_ledger_of_fake_tensors_equals_that_of_real_ones() -> None:
    config = configured(*FAMILIES["llama"], "method=velora")
    pretended = pretend(config)
    with pretended.context():
        ledger = take_ledger(pretended.network, pretended.losses[0])
    assert ledger.total_bytes == measure(config).saved_bytes
    assert "VeLoRA codes" in ledger.grouped("term")


def test_checkpointing_and_velora_lower_the_peak() -> None:
    peaks = {m: estimate(configured(*LLAMA, f"method={m}")).peak.num_bytes for m in ("full", "velora", "checkpoint")}
    assert peaks["checkpoint"] < peaks["velora"] < peaks["full"]


@pytest.mark.parametrize(
    ("available", "expected"), [(99, 0), (110, 1), (139, 3), (140, 4), (141, 4), (5_000, 490), (10**6, 99_990)]
)
def test_largest_batch_of_a_straight_line(available: int, expected: int) -> None:
    calls: list[int] = []

    def peak_at(size: int) -> int:
        calls.append(size)
        return 100 + 10 * size

    assert largest_batch(peak_at, available) == expected
    assert len(calls) <= 5


def test_largest_batch_of_a_bent_line() -> None:
    def peak_at(size: int) -> int:  # the optimizer's step is the peak of small batches
        return max(1000 + size, 100 * size + 7 * (size % 3 == 0))

    assert largest_batch(peak_at, 12_345) == 123
    assert peak_at(123) <= 12_345 < peak_at(124)


def test_estimate_for_a_given_memory_fits_and_one_more_does_not() -> None:
    config = configured(*LLAMA, "method=velora")
    available = 10 * 2**20
    found = largest_batch(lambda size: estimate(config, batch_size=size).peak.num_bytes, available)
    assert estimate(config, batch_size=found).peak.num_bytes <= available
    assert estimate(config, batch_size=found + 1).peak.num_bytes > available


def test_target_device() -> None:
    assert target_device(configured(*LLAMA, device="auto")) == "cuda"
    assert target_device(configured(*LLAMA, device="cpu")) == "cpu"


def saved_dtypes(run: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[torch.dtype, int]]:
    x = torch.randn(4, 8, requires_grad=True)
    ledger = take_ledger(nn.Identity(), lambda: run(x).sum())
    return [(getattr(torch, entry.dtype), entry.num_bytes) for entry in ledger.entries]


def test_as_on_cuda_dropout_keeps_one_byte_per_element() -> None:
    assert saved_dtypes(lambda x: nn.functional.dropout(x, 0.5)) == [(torch.float32, 128)]
    with AsOnCuda():
        assert saved_dtypes(lambda x: nn.functional.dropout(x, 0.5)) == [(torch.bool, 32)]


def test_as_on_cuda_autocast_normalises_in_float32() -> None:
    weight = torch.ones(8)

    def normalise(x: torch.Tensor) -> torch.dtype:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = nn.functional.linear(x, torch.ones(8, 8))
            assert half.dtype == torch.bfloat16
            return nn.functional.layer_norm(half, (8,), weight, weight).dtype

    assert normalise(torch.ones(4, 8)) == torch.bfloat16
    with AsOnCuda():
        assert normalise(torch.ones(4, 8)) == torch.float32


def test_as_on_cuda_attention_with_dropout_keeps_no_probabilities() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        heads = (x * torch.ones(2, 1, 64, 8, 1)).sum(-1).transpose(1, 2) if x.dim() > 4 else x.view(1, 1, 4, 8)
        heads = heads.repeat(1, 1, 64, 1)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)

    num_tokens = 4 * 64
    assert max(size for _, size in saved_dtypes(attend)) >= num_tokens**2 * 4
    with AsOnCuda():
        assert max(size for _, size in saved_dtypes(attend)) < num_tokens**2


def test_as_on_cuda_reaches_what_checkpointed_regions_compute_again() -> None:
    config = configured(*FAMILIES["roberta"], "method=checkpoint", device="auto")
    assert config.recompute.kind == "blocks"
    assert estimate(config).peak.num_bytes > 0  # a region that computes otherwise the second time is an error of torch


def test_inputs_of_blocks_that_are_offloaded_take_nothing_on_the_device() -> None:
    here, elsewhere = (
        estimate(configured(*FAMILIES["llama"], "method=checkpoint", f"recompute.offload={offload}", device="auto"))
        for offload in ("false", "true")
    )
    assert here.saved_bytes - elsewhere.saved_bytes == 2 * 2 * 32 * 64 * 4  # two blocks, B N D, float32
