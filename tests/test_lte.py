"""LTE against its equations in float64 loops: outputs, gradients, merges over steps, what is kept, VeLoRA's one code, a resume."""

from __future__ import annotations

import math

import adapters
import numpy as np
import pytest
import reference
import torch
from loop_helpers import (
    FAMILIES,
    LLAMA,
    Killed,
    config_of,
    curve,
    kill_when,
    lines_of,
    train,
    train_in_two_processes,
)
from text_helpers import composed
from torch import nn

from velora import apply_velora, calibrate
from velora.errors import ConfigError
from velora.memory.estimate import estimate
from velora.memory.meter import measure, network_without_weights, random_batch
from velora.nn.adapter_state import load_adapter, merge_adapter, save_adapter
from velora.nn.apply import remove_velora, velora_layers
from velora.nn.heads import HeadsLinear, VeloraHeadsLinear
from velora.nn.lte import LTELinear, as_plain, lte_layers, merge_heads

HEADS, EXAMPLES, LENGTH, D, M, RANK, ALPHA = 2, 4, 3, 16, 7, 3, 6.0
SCALE = ALPHA / RANK


def layer(*, num_heads: int = HEADS, rank: int = RANK, alpha: float = ALPHA, reset: bool = False) -> LTELinear:
    torch.manual_seed(0)
    made = LTELinear(nn.Linear(D, M), num_heads=num_heads, rank=rank, alpha=alpha, reset=reset)
    made.base.requires_grad_(False)
    return made


def trained_for_a_while(*, reset: bool = False) -> LTELinear:
    """Its heads have moved, been merged, and moved again."""
    made = layer(reset=reset)
    adapters.perturb(made, size=0.3)
    merge_heads(made)
    adapters.perturb(made, seed=2, size=0.3)
    return made


def stack(x: torch.Tensor | None, like: torch.Tensor) -> np.ndarray:
    """float64 with its three dimensions; zeros for None."""
    return np.zeros(like.shape) if x is None else x.detach().double().numpy().copy()


def of_slice(x: torch.Tensor, head: int) -> np.ndarray:
    """The tokens of a head's examples."""
    share = len(x) // HEADS
    return reference.array(x[head * share : (head + 1) * share])


@pytest.mark.parametrize("velora", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_each_head_adds_to_its_slice_and_gets_its_gradient(reset, velora):
    """With VeLoRA dA_h takes the slice of x̂ = v z, of one direction."""
    made, x = trained_for_a_while(reset=reset), torch.randn(EXAMPLES, LENGTH, D, requires_grad=True)
    dy = torch.randn(EXAMPLES, LENGTH, M)
    if velora:
        apply_velora(made, ["*down"], sub_token_size=4)
        calibrate(made, x)
        assert list(velora_layers(made)) == ["down"]
    y = made(x)
    y.backward(dy)
    w, b = reference.array(made.base.weight), reference.array(made.base.bias)
    down, up = stack(made.down.weight, made.down.weight), stack(made.up, made.up)
    merged_down, merged_up = stack(made.merged_down, made.down.weight), stack(made.merged_up, made.up)
    for h in range(HEADS):
        tokens, gradients, kept = of_slice(x, h), of_slice(dy, h), of_slice(x, h)
        if velora:
            v = reference.array(made.down.direction)
            kept = reference.reconstruct(reference.compress(tokens, v), v)
        da, db = np.zeros((RANK, D)), np.zeros((M, RANK))
        expected, dx = np.zeros((len(tokens), M)), np.zeros((len(tokens), D))
        for n, token in enumerate(tokens):
            low = [sum(down[h, k, d] * token[d] for d in range(D)) for k in range(RANK)]
            low_before = [sum(merged_down[h, k, d] * token[d] for d in range(D)) for k in range(RANK)]
            for m in range(M):
                expected[n, m] = b[m] + sum(w[m, d] * token[d] for d in range(D))
                for k in range(RANK):
                    expected[n, m] += SCALE * (up[h, m, k] * low[k] - merged_up[h, m, k] * low_before[k])
                    db[m, k] += SCALE * gradients[n, m] * low[k]
                    da[k] += SCALE * gradients[n, m] * up[h, m, k] * kept[n]
                    dx[n] += (
                        SCALE * gradients[n, m] * (up[h, m, k] * down[h, k] - merged_up[h, m, k] * merged_down[h, k])
                    )
                dx[n] += gradients[n, m] * w[m]
        for found, value in (
            (of_slice(y, h), expected), (stack(made.down.weight.grad, made.down.weight)[h], da),
            (stack(made.up.grad, made.up)[h], db), (of_slice(x.grad, h), dx),
        ):  # fmt: skip
            np.testing.assert_allclose(
                found, value, rtol=1e-5, atol=1e-4
            )  # float32 sums of tens of terms of size about 5


def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (y - target).square().sum()


@pytest.mark.parametrize(("num_heads", "rank", "merge_every"), [(2, RANK, 2), (2, RANK, 1), (1, D, 1)])
def test_training_with_merges_follows_the_equations(num_heads, rank, merge_every):
    """SGD over five steps in float64, also with T = 1, one head and full rank; the weights between merges and at the end."""
    made = layer(num_heads=num_heads, rank=rank, alpha=float(rank) / 2).double()
    optimizer = torch.optim.SGD([made.down.weight, made.up], lr=0.02)
    w, bias = reference.array(made.base.weight), reference.array(made.base.bias)
    a, b = stack(made.down.weight, made.down.weight), stack(made.up, made.up)
    merged_a, merged_b = a.copy(), b.copy()
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 6):
        x = torch.randn(EXAMPLES, D, generator=generator, dtype=torch.float64)
        target = torch.randn(EXAMPLES, M, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss(made(x), target).backward()
        optimizer.step()
        if step % merge_every == 0:
            assert merge_heads(made) == []
        share = EXAMPLES // num_heads
        for h in range(num_heads):
            rows, goals = (t[h * share : (h + 1) * share].numpy() for t in (x, target))
            own = w + 0.5 * (b[h] @ a[h] - merged_b[h] @ merged_a[h])
            dw = 0.5 * (rows @ own.T + bias - goals).T @ rows
            a[h], b[h] = a[h] - 0.02 * b[h].T @ dw, b[h] - 0.02 * dw @ a[h].T
        if step % merge_every == 0:
            w = w + 0.5 / num_heads * sum(b[h] @ a[h] - merged_b[h] @ merged_a[h] for h in range(num_heads))
            merged_a, merged_b = a.copy(), b.copy()
        for found, value in ((made.base.weight, w), (made.down.weight, a), (made.up, b)):
            np.testing.assert_allclose(found.detach().numpy(), value, rtol=0, atol=1e-12)  # float64, values of size 1


@pytest.mark.parametrize("num_heads", [1, 2])
def test_with_a_merge_at_each_step_full_rank_and_reset_it_is_training_of_the_weight(num_heads):
    """B starts at zero and A is orthogonal then, so that SGD moves W by s² / H times its own gradient, A gone."""
    made = layer(num_heads=num_heads, rank=D, alpha=0.5 * D, reset=True).double()
    with torch.no_grad():
        for matrix in made.down.weight:  # from float32: orthogonal to the last digit of float64 only now
            matrix.copy_(torch.linalg.qr(matrix).Q)
    plain = nn.Linear(D, M).double()
    plain.load_state_dict(made.base.state_dict())
    plain.bias.requires_grad_(False)
    heads = torch.optim.SGD([made.down.weight, made.up], lr=0.02)
    whole = torch.optim.SGD([plain.weight], lr=0.02 * 0.5**2 / num_heads)
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        x = torch.randn(EXAMPLES, D, generator=generator, dtype=torch.float64)
        for module, optimizer in ((made, heads), (plain, whole)):
            optimizer.zero_grad()
            loss(module(x), torch.ones(EXAMPLES, M)).backward()
            optimizer.step()
        merge_heads(made, seed=str(step))
        # float64 at the first merge; later ones have A drawn in float32, orthogonal to 1e-6
        torch.testing.assert_close(made.base.weight, plain.weight.detach(), rtol=0, atol=1e-6 if step else 1e-12)
    assert not torch.allclose(plain.weight, layer().base.weight.double(), atol=0.01)


def test_heads_start_orthogonal_and_start_again_with_reset():
    made = layer(reset=True)
    seen = [made.down.weight.detach().clone()]
    for seed in ("0/1", "0/2", "0/1"):
        made.up.data.fill_(1.0)
        assert [id(p) for p in merge_heads(made, seed)] == [id(made.down.weight), id(made.up)]
        assert not made.up.any()
        seen.append(made.down.weight.detach().clone())
    assert torch.equal(seen[1], seen[3])  # a run that continues draws the same
    for drawn in seen:
        for matrix in drawn:
            # float32
            torch.testing.assert_close(matrix @ matrix.T, D / RANK * torch.eye(RANK), rtol=0, atol=1e-5)
    assert len({m.sum().item() for drawn in seen[:3] for m in drawn}) == 3 * HEADS


def test_after_a_merge_every_head_starts_from_the_new_weight():
    made, x = trained_for_a_while(), torch.randn(EXAMPLES, LENGTH, D)
    assert not torch.equal(made(x), made.eval()(x))
    merge_heads(made.train())
    assert torch.equal(made(x), made.eval()(x))
    assert torch.equal(made(x), made.base(x))


def test_a_short_batch_is_filled_up():
    """Five examples for two heads: three and two."""
    made, x = trained_for_a_while(), torch.randn(5, LENGTH, D)
    longer = torch.cat([x, torch.zeros(1, LENGTH, D)])
    assert torch.equal(made(x), made(longer)[:5])
    made(x).sum().backward()
    assert made.up.grad.abs().sum(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_evaluation_is_the_merged_network(family, tmp_path):
    config, inputs = adapters.config(), adapters.batch(family)
    frozen, model = adapters.network(family).eval(), adapters.lte().apply(adapters.network(family), config)
    assert torch.equal(adapters.logits(model.eval(), inputs), adapters.logits(frozen, inputs))
    for seed in (1, 2):
        adapters.perturb(model.train(), seed=seed)
        merge_heads(model)
    adapters.perturb(model, seed=3)
    before, state = adapters.logits(model.eval(), inputs), model.state_dict()
    assert (before - adapters.logits(frozen, inputs)).abs().max() > 1e-3
    with as_plain(model) as plain:
        assert not lte_layers(plain)
        assert torch.equal(adapters.logits(plain, inputs), before)
    assert model.state_dict().keys() == state.keys()
    save_adapter(model, tmp_path / "alone")
    again = adapters.lte().apply(adapters.network(family), adapters.config(seed=5))
    load_adapter(again, tmp_path / "alone")
    assert torch.equal(adapters.logits(again.eval(), inputs), before)
    assert torch.equal(adapters.logits(again.train(), inputs), adapters.logits(model.train(), inputs))
    assert torch.equal(adapters.logits(merge_adapter(model).eval(), inputs), before)


def test_a_run_saves_a_plain_network_that_transformers_reads(tmp_path):
    from transformers import LlamaForCausalLM

    adapter, inputs = adapters.lte(), adapters.batch("llama")
    model = adapter.apply(adapters.network("llama"), adapters.config())
    adapters.perturb(model)
    adapter.save(model, tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(adapters.logits(again.eval(), inputs), adapters.logits(model.eval(), inputs))


def test_query_and_key_layers_take_the_root_of_alpha():
    config = adapters.config()
    for family, names in (("llama", {"q_proj", "k_proj"}), ("vit", {"qkv"})):
        model = adapters.lte(alpha=16.0, rank=2).apply(adapters.network(family), config)
        scales = {n.rpartition(".")[2]: m.scale for n, m in model.named_modules() if isinstance(m, LTELinear)}
        assert {name for name, scale in scales.items() if scale == 2.0} == names
        assert {scale for name, scale in scales.items() if name not in names} == {8.0}
    plain = adapters.lte(alpha=16.0, rank=2, root_alpha=False).apply(adapters.network("vit"), config)
    assert {m.scale for m in lte_layers(plain)} == {8.0}


def test_kept_for_backward_are_the_input_and_the_features_of_one_head():
    """However many heads there are; with VeLoRA the input is one code of D / S numbers a token."""
    made = layer(reset=False)
    x = torch.randn(100, D)

    def kept() -> int:
        return reference.saved_bytes(lambda: made(x).sum(), [*made.parameters(), *made.buffers()])

    assert kept() == 4 * 100 * (D + RANK)
    apply_velora(made, ["*down"], sub_token_size=4)
    calibrate(made, x)
    assert type(made.down) is VeloraHeadsLinear
    assert kept() == 4 * 100 * (D // 4 + RANK)
    remove_velora(made)
    assert type(made.down) is HeadsLinear


def test_half_precision():
    """A bfloat16 network has float32 heads, and its weights are rounded once at a merge; under autocast products are bfloat16."""
    config = adapters.config()
    model = adapters.lte().apply(adapters.dense("bf16").apply(adapters.network("llama"), config), config)
    adapters.perturb(model)
    assert {p.dtype for p in adapters.trained(model).values()} == {torch.float32}
    adapters.loss(model, adapters.batch("llama")).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.trained(model).values())
    first = lte_layers(model)[0]
    exact = first.base.weight.double() + first.unmerged().double()
    merge_heads(model)
    assert first.base.weight.dtype == torch.bfloat16
    # half a unit in the last of 8 bits
    torch.testing.assert_close(first.base.weight.double(), exact, rtol=2**-8, atol=1e-6)
    made, x = trained_for_a_while(), torch.randn(EXAMPLES, LENGTH, D)
    whole = {mode: made.train(mode)(x) for mode in (True, False)}
    apply_velora(made, ["*down"], sub_token_size=4)
    calibrate(made.train(), x)
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = made.train(mode)(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), whole[mode], rtol=0.05, atol=0.1)  # 8 bits, outputs of size about 5
    merged = made.merged_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.merged_weight(), merged)


@pytest.mark.parametrize("method", ["lte", "lte_velora"])
def test_what_is_computed_again_changes_no_gradient(method):
    found = {}
    for recompute in ("none", "lean", "mlp", "blocks"):
        config = composed(f"method={method}", f"recompute={recompute}", *LLAMA, "trainer.batch_size=4")
        network = network_without_weights(config).train()
        adapters.perturb(network)
        merge_heads(network)
        adapters.perturb(network, seed=2)
        batch = random_batch(config, network)
        config.activations.calibrate(network, [batch])
        network(**batch).loss.backward()
        found[recompute] = {name: p.grad for name, p in adapters.trained(network).items()}
    for gradients in found.values():
        assert gradients.keys() == found["none"].keys()
        for name, gradient in gradients.items():
            # float32: lean norms and losses sum in another order
            torch.testing.assert_close(gradient, found["none"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lte", "lte_velora"])
def test_the_estimate_is_what_is_measured(method):
    config = composed(f"method={method}", *LLAMA, "trainer.batch_size=4", "trainer.device=cpu")
    estimated, measured = estimate(config), measure(config)
    assert estimated.saved_bytes == measured.saved_bytes
    assert estimated.peak == measured.peak


@pytest.mark.parametrize(("reset", "save_every"), [(False, 5), (True, 3)])
def test_a_run_continues_bit_for_bit(reset, save_every, monkeypatch, tmp_path):
    """From a checkpoint between two merges, and from one just after a merge that has dropped the moments; micro-batches add up."""
    common = [*LLAMA, "method=lte_velora", f"adapter.reset={reset}", "adapter.merge_every=3", "trainer.micro_batch_size=4",
              "trainer.max_steps=7", f"trainer.save_every={save_every}", "trainer.save_model=true"]  # fmt: skip
    whole, broken = (config_of(tmp_path / name, *common) for name in ("whole", "broken"))
    assert train(whole)["status"] == "ok"
    kill_when(monkeypatch, "training_step", lambda trainer: trainer.state.global_step == 6)
    with pytest.raises(Killed):
        train(broken)
    train(broken)
    assert lines_of(broken) == lines_of(whole)
    assert len({line["loss"] for line in lines_of(whole) if "loss" in line}) == 7
    one, other = ((config.folder / "model" / "model.safetensors").read_bytes() for config in (whole, broken))
    assert one == other


def test_two_processes_share_the_heads(tmp_path):
    """Head h sees slice h of both processes' micro-batches: those that one process has in two rounds."""
    common = [*LLAMA, "method=lte_velora", "adapter.merge_every=2", "adapter.reset=true", "trainer.max_steps=5"]
    train_in_two_processes({"lte": common}, tmp_path)
    one, two = (config_of(tmp_path / number / "lte", *common, *more) for number, more in (
        ("one", ["trainer.micro_batch_size=4"]), ("two", []),
    ))  # fmt: skip
    train(one)
    assert len(curve(two)) == 5
    # fp32: sums in another order, and AdamW divides by roots of small numbers in the steps after the first
    np.testing.assert_allclose(curve(two)[:1], curve(one)[:1], rtol=1e-5)
    np.testing.assert_allclose(curve(two), curve(one), rtol=1e-3)


def test_a_reset_forgets_the_moments_of_the_heads_alone():
    adapter = adapters.lte(reset=True, merge_every=2, also_train=["norm"])
    config = adapters.config(adapter=adapter)
    model = adapter.apply(adapters.network("llama"), config)
    optimizer = torch.optim.AdamW(adapters.trained(model).values())
    for step in (1, 2):
        adapters.loss(model, adapters.batch("llama")).backward()
        optimizer.step()
        adapter.after_step(model, config, optimizer, step)
        known = {name for name, p in adapters.trained(model).items() if p in optimizer.state}
        assert known == ({"model.norm.weight"} if step == 2 else adapters.trained(model).keys())


@pytest.mark.parametrize("family", ["roberta", "vit"])
def test_smoke(family, tmp_path):
    config = config_of(tmp_path, *FAMILIES[family], "method=lte_velora", "adapter.merge_every=2")
    record = train(config)
    assert record["status"] == "ok"
    assert math.isfinite(record["metrics"]["loss"])


def test_refuses_what_is_no_linear_layer_and_an_unknown_network():
    with pytest.raises(ConfigError, match="norm1: a LayerNorm takes no LTE heads"):
        adapters.lte(targets=["norm1"]).apply(adapters.network("vit"), adapters.config())
    with pytest.raises(ConfigError, match=r"adapter.targets=\[all\] stands for all roles"):
        adapters.lte().apply(nn.Sequential(nn.Linear(4, 4)), adapters.config())
