"""A checkpoint read straight into four bits: the same network as a dense one that is quantised, and less memory on the way."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_helpers import composed
from tiny import tiny_llama
from torch import Tensor, nn

from velora.config.run import Config
from velora.errors import ConfigError
from velora.memory.storages import AllocationTracker, model_tensors, unique_bytes
from velora.models import pretrained, quantised
from velora.nn.quantised import is_quantised

pytest.importorskip("bitsandbytes", minversion="0.50")

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
SHARD = 400_000  # bytes; a block of this network has 0.85 MB in float32


class Tokenizer:
    pad_token_id = 0


def checkpoint(folder: Path, **sizes: Any) -> nn.Module:
    network = tiny_llama(**(SIZES | sizes))
    network.save_pretrained(folder, max_shard_size=f"{SHARD // 1000}KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return network


def run(folder: Path, *more: str) -> Config:
    return composed(
        "model=causal_lm", f"model.path={folder}", "model.tokenizer=byte", "method=qlora", "task.max_length=32", *more
    )


def built(config: Config) -> nn.Module:
    return config.weights.apply(config.model.build(config.task.head(config), Tokenizer(), config), config)


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_equals_the_dense_network_quantised(tmp_path: Path, sizes: Any, monkeypatch) -> None:
    checkpoint(tmp_path, **sizes)
    streamed = built(run(tmp_path))
    monkeypatch.setattr(pretrained, "read_quantised", lambda *_, **__: None)
    dense = built(run(tmp_path))
    ours, expected = streamed.state_dict(), dense.state_dict()  # codes and scales too
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert sum(is_quantised(module) for module in streamed.modules()) == 7 * 6
    ours_trains, expected_trains = (
        {name: p.requires_grad for name, p in network.named_parameters()} for network in (streamed, dense)
    )
    assert ours_trains == expected_trains
    assert not any(p.is_meta for p in [*streamed.parameters(), *streamed.buffers()])
    words = torch.arange(3, 20)[None]
    assert torch.equal(streamed(input_ids=words).logits, dense(input_ids=words).logits)


class Peak(AllocationTracker):
    """The largest sum of living storages that operators have allocated; meta tensors take nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def on_operator(self, operator: Any, inputs: list[Tensor], outputs: list[Tensor], fresh: list[Tensor]) -> None:
        for tensor in fresh:
            if not tensor.is_meta:
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.ended, size)

    def ended(self, size: int) -> None:
        self.now -= size


def peak_of(folder: Path) -> tuple[int, nn.Module]:
    config = run(folder, "weights.dtype=fp32")
    with Peak() as tracker:
        network = built(config)
    return tracker.peak, network


def test_no_more_than_one_shard_beside_the_quantised_network(tmp_path: Path, monkeypatch) -> None:
    """What the file itself maps is no operator's: it is one shard, and goes with the last reference to it."""
    dense = checkpoint(tmp_path)
    peak, network = peak_of(tmp_path)
    own = unique_bytes(model_tensors(network))
    assert peak < own + SHARD
    whole, kept, place = unique_bytes(model_tensors(dense)), [], quantised._place

    def hoard(network: nn.Module, name: str, tensor: Tensor, *rest: Any) -> None:
        kept.append(tensor.clone())
        place(network, name, tensor, *rest)

    monkeypatch.setattr(quantised, "_place", hoard)
    assert peak_of(tmp_path)[0] > whole + own > own + 10 * SHARD  # the dense weights beside it would be seen


def test_no_shard_stays_mapped(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    network = built(run(tmp_path))
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("only Linux tells what is mapped")
    assert network is not None
    assert str(tmp_path) not in maps.read_text()


def test_other_checkpoints_are_read_as_before(tmp_path: Path) -> None:
    """Without the output layer the names are not the network's own: transformers reads it, and says what is missing."""
    tiny_llama(**SIZES).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["model.layers.3.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"1 parameters are missing or of another shape, model\.layers\.3\.mlp\.up_proj"
    ):
        built(run(tmp_path))


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    state = load_file(shard)
    name = next(n for n in state if "proj" in n)
    state[name][1, 2] = float("inf")
    save_file(state, shard, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"the weights {name} are not finite"):
        built(run(tmp_path))
    shard.write_bytes(content[:2000])
    with pytest.raises(ConfigError, match="cannot be loaded: SafetensorError"):
        built(run(tmp_path))
    shard.unlink()
    with pytest.raises(ConfigError, match="cannot be loaded: "):
        built(run(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="cannot be loaded: "):
        built(run(tmp_path))


# Training over four bits


def test_gradients_over_four_bits_are_those_over_the_dequantised_weights(tmp_path: Path) -> None:
    """QLoRA + VeLoRA against LoRA + VeLoRA whose frozen weights are what bitsandbytes dequantises: float32 on both sides."""
    from velora.models.build import build_network
    from velora.nn.quantised import dense_linear

    checkpoint(tmp_path)
    velora = (
        "adapter.targets=[query,value,up,down]",
        "activations.layers=[value,down]",
        "activations.sub_token_size=16",
    )
    four = run(tmp_path, "method=qlora_velora", "weights.dtype=fp32", *velora)
    network, _ = build_network(four, four.task.head(four), Tokenizer())
    with torch.no_grad():  # B starts at zero, which would hide A
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    plain = four.model.build(four.task.head(four), Tokenizer(), four)
    for name in [n for n, module in plain.named_modules() if is_quantised(module)]:
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, dense_linear(plain.get_submodule(name)))
    lora = run(tmp_path, "method=lora_velora", *velora)
    plain.velora_roles = network.get_base_model().velora_roles
    plain = lora.adapter.apply(plain, lora)
    lora.activations.apply(plain, lora)
    ours, theirs = (
        {n: p for n, p in model.named_parameters() if p.requires_grad} for model in (network.train(), plain.train())
    )
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    words = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": words, "labels": words}
    for model, config in ((network, four), (plain, lora)):
        config.activations.calibrate(model, [batch])
        model(**batch).loss.backward()
    for name, parameter in ours.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
        # float32 through six blocks; bitsandbytes' product sums in another order than nn.Linear's
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
