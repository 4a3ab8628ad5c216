"""Checkpointed blocks against the same networks without: equal gradients, counted forwards, counted bytes.

The arithmetic of both is the same, in the same order, and so are the random numbers: everything is compared by torch.equal.
(A LLaMA with dropout in its attention differs by 4e-8 here, with transformers' own checkpointing too; the others have dropout.)
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from text_helpers import composed
from tiny import image_batch, tiny_llama, tiny_roberta, tiny_vit, token_batch
from torch import Tensor, nn

import velora.nn.blocks
from velora import apply_lean, apply_velora, calibrate
from velora.errors import ConfigError
from velora.memory.ledger import REGION, measure_saved_bytes, take_ledger
from velora.models.build import build_network
from velora.nn.blocks import checkpoint_blocks, find_blocks, from_host, is_checkpointed, to_host
from velora.run.device import training_device


def adapted_llama(**sizes: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        tiny_llama(**sizes), LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "down_proj"])
    )


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": lambda n=2: tiny_llama(num_hidden_layers=n),
    "roberta": lambda n=2: tiny_roberta(num_hidden_layers=n, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    "vit": lambda n=2: tiny_vit(depth=n, proj_drop_rate=0.1, drop_path_rate=0.3),
    "peft": lambda n=2: adapted_llama(num_hidden_layers=n),
}
BLOCK_INPUT = {
    "llama": 2 * 8 * 32,
    "roberta": 2 * 8 * 32,
    "vit": 2 * 5 * 32,
    "peft": 2 * 8 * 32,
}  # B N D; ViT: 4 patches + 1


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    if hasattr(model, "patch_embed"):
        return nn.functional.cross_entropy(model(image_batch(seed=seed)).float(), torch.tensor([1, 3]))
    labels = 2 if hasattr(model, "roberta") else None
    return model(**token_batch(seed=seed, num_labels=labels)).loss


def gradients(
    model: nn.Module, context: Callable[[], AbstractContextManager[object]] = nullcontext
) -> dict[str, Tensor]:
    """Of two micro-batches."""
    torch.manual_seed(0)
    for seed in (0, 1):
        with context():
            value = loss(model, seed)
        value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def count_forwards(model: nn.Module, kind: type[nn.Module]) -> Counter[str]:
    """How often each module of a class runs."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda _module, _args, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_those_of_the_plain_network(family: str, precision: str) -> None:
    plain, again = FAMILIES[family](), FAMILIES[family]()
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "autocast" else nullcontext
    text = checkpoint_blocks(again)
    assert text.startswith("computed again in backward: 2 of 2 blocks (")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert_same(gradients(again, context), gradients(plain, context))


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_of_velora_serve_both_forwards(family: str) -> None:
    plain, again = FAMILIES[family](), FAMILIES[family]()
    for model in (plain, again):
        batch = {"x": image_batch()} if family == "vit" else token_batch(num_labels=2 if family == "roberta" else None)
        apply_velora(model, ["down"], sub_token_size=2 if family == "peft" else 8)
        if model is again:
            checkpoint_blocks(model)
        torch.manual_seed(1)
        calibrate(model, batch)
    assert_same(gradients(again), gradients(plain))


@pytest.mark.parametrize(("every", "twice"), [(1, (0, 1, 2)), (2, (0, 2)), (3, (0,))])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_nth_block_runs_twice(family: str, every: int, twice: tuple[int, ...]) -> None:
    plain, again = FAMILIES[family](3), FAMILIES[family](3)
    checkpoint_blocks(again, every_n_layers=every)
    inner = {"llama": "LlamaMLP", "peft": "LlamaMLP", "roberta": "RobertaIntermediate", "vit": "Mlp"}[family]
    kind = next(type(module) for module in again.modules() if type(module).__name__ == inner)
    calls = count_forwards(again, kind)
    assert_same(gradients(again), gradients(plain))
    assert list(calls.values()) == [4 if index in twice else 2 for index in range(3)]  # two micro-batches
    assert [is_checkpointed(block) for block in find_blocks(again)] == [index in twice for index in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_block_its_input_is_kept_and_nothing_else(family: str) -> None:
    """Each further block costs its input, 4 bytes a number; without dropout, whose random states the ledger does not count."""
    totals = {}
    for num_blocks in (2, 3):
        model = FAMILIES[family](num_blocks)
        checkpoint_blocks(model)
        totals[num_blocks] = measure_saved_bytes(lambda model=model: loss(model))
        regions = take_ledger(model, lambda model=model: loss(model)).grouped("term")[REGION]
        assert regions == num_blocks * BLOCK_INPUT[family] * 4
    assert totals[3] - totals[2] == BLOCK_INPUT[family] * 4


@pytest.mark.parametrize("how", ["exact", "velora"])
@pytest.mark.parametrize("family", ["llama", "roberta", "vit"])
def test_lean_blocks_keep_no_more_than_plain_ones(family: str, how: str) -> None:
    """Of one further block its input is kept and nothing else: no source of a recipe that was left in the one before."""
    kept = []
    for blocks in (2, 3):
        model = FAMILIES[family](blocks)
        if how == "velora":
            apply_velora(model, "all", sub_token_size=8, init="random")
        apply_lean(model)
        checkpoint_blocks(model)
        kept.append(measure_saved_bytes(lambda model=model: loss(model)))
    assert kept[1] - kept[0] == 4 * BLOCK_INPUT[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_offload_moves_the_inputs_of_blocks_and_brings_them_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []
    back: list[torch.Size] = []
    monkeypatch.setattr(velora.nn.blocks, "to_host", lambda t: (moved.append(t.shape), to_host(t))[1])
    monkeypatch.setattr(velora.nn.blocks, "from_host", lambda away: (back.append(away[0].shape), from_host(away))[1])
    plain, again = FAMILIES[family](), FAMILIES[family]()
    assert "wait in the CPU's memory" in checkpoint_blocks(again, offload=True)
    assert_same(gradients(again), gradients(plain))
    assert [shape.numel() for shape in moved] == [BLOCK_INPUT[family]] * 4  # two blocks, two micro-batches
    assert back == moved


def test_offload_where_the_cpu_trains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = composed("method=checkpoint", "recompute.offload=true")
    with pytest.raises(ConfigError, match=r"recompute\.offload=true has no effect where the CPU trains.*leave it out"):
        training_device(config)


@pytest.mark.gpu
def test_offload_on_a_gpu_keeps_the_inputs_elsewhere() -> None:
    plain, again = FAMILIES["vit"](4).cuda(), FAMILIES["vit"](4).cuda()
    checkpoint_blocks(again, offload=True)
    checkpoint_blocks(plain)
    images, found = image_batch().cuda(), []
    for model in (plain, again):
        torch.cuda.manual_seed(0)
        before = torch.cuda.memory_allocated()
        value = model(images).square().mean()
        held = torch.cuda.memory_allocated() - before
        value.backward()
        found.append((held, {name: p.grad for name, p in model.named_parameters()}))
    (on_gpu, expected), (elsewhere, gradient) = found
    assert_same(gradient, expected)
    assert on_gpu - elsewhere == 4 * 1536  # 2 x 5 x 32 x 4 = 1280 bytes each, in steps of 512


def test_an_evaluation_computes_nothing_twice() -> None:
    model = tiny_llama()
    checkpoint_blocks(model)
    calls = count_forwards(model, nn.Linear)
    model.eval()
    loss(model).backward()
    model.train()
    with torch.no_grad():
        loss(model)
    assert set(calls.values()) == {2}


def test_a_cache_of_keys_and_values_is_not_filled_twice() -> None:
    plain, again = tiny_llama(use_cache=False), tiny_llama(use_cache=True)
    checkpoint_blocks(again)
    assert_same(gradients(again), gradients(plain))


def test_a_copy_computes_with_its_own_weights() -> None:
    model = tiny_vit()
    checkpoint_blocks(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.blocks[0].parameters()).zero_()
    loss(twin).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(is_checkpointed(block) for block in find_blocks(twin))


def test_compiled_it_computes_the_same() -> None:
    plain, again = tiny_vit(), tiny_vit()
    checkpoint_blocks(again)
    compiled = torch.compile(again, backend="aot_eager")
    assert_same({n.removeprefix("_orig_mod."): g for n, g in gradients(compiled).items()}, gradients(plain))


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r"recompute=blocks: no blocks were found in Sequential.*recompute=none"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"recompute\.every_n_layers=3: the network has 2 blocks.*give at most that"):
        checkpoint_blocks(tiny_vit(), every_n_layers=3)


@pytest.mark.parametrize("family", ["model=llama_tiny", "model=roberta_tiny", "model=vit_tiny"])
@pytest.mark.parametrize("method", ["full", "lora", "hydra", "ssf", "velora_all"])
def test_every_method_has_its_blocks_found(method: str, family: str) -> None:
    config = composed(f"method={method}", family, "task=embedded", "recompute=blocks", "recompute.lean=false")
    network, text = build_network(config, config.task.head(config), config.model.preprocessor(config))
    blocks = find_blocks(network)
    assert f"{len(blocks)} of {len(blocks)} blocks" in (text or "")
    assert len(blocks) == 4
