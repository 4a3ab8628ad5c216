"""Hydra against its published equations in float64, its settings per task, and its places."""

from __future__ import annotations

import adapters
import numpy as np
import pytest
import reference_vit
import tiny
import torch
import yaml
from conftest import REPOSITORY
from pydantic import ValidationError
from torch import nn

from velora.config.adapter import Hydra
from velora.errors import ConfigError
from velora.nn.hydra import HydraLinear

PLACES = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.proj", "mlp.fc2")]


def adapted(family: str = "vit", seed: int = 0, **changes) -> nn.Module:
    return adapters.hydra(**changes).apply(adapters.network(family), adapters.config(seed))


def branch(w: dict, name: str, x: np.ndarray, scale: float) -> np.ndarray:
    """s (U (A x + a) + u), token by token."""
    down, a, up, u = (w[f"{name}.{k}"] for k in ("down.weight", "down.bias", "up.weight", "up.bias"))
    out = np.zeros((*x.shape[:-1], len(u)))
    for index in np.ndindex(*x.shape[:-1]):
        low = [sum(down[r, d] * x[index][d] for d in range(x.shape[-1])) + a[r] for r in range(len(a))]
        for m in range(len(u)):
            out[index][m] = scale * (sum(up[m, r] * low[r] for r in range(len(a))) + u[m])
    return out


def test_outputs_equal_the_equations():
    model, images = adapted(), tiny.image_batch()
    adapters.perturb(model, size=0.2)
    w = reference_vit.parameters(model)

    def around(name, x, layer):
        y = layer(x)
        if name not in PLACES:
            return y
        return y + branch(w, f"{name}.parallel", x, 0.5) + branch(w, f"{name}.sequential", y, 0.5)

    frozen = {name.replace(".base.", "."): value for name, value in w.items()}
    expected = reference_vit.forward(frozen, images.double().numpy(), num_heads=4, patch=8, act=around)
    # float32 against float64, outputs of size about 1
    torch.testing.assert_close(model.eval()(images), torch.from_numpy(expected).float(), rtol=0, atol=2e-6)


def test_gradients_are_those_of_the_frozen_layer_with_branches():
    torch.manual_seed(0)
    layer = HydraLinear(nn.Linear(6, 5), rank=2, scale=0.5, dropout=0.0).double()
    layer.base.requires_grad_(False)
    adapters.perturb(layer, size=0.5)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *adapters.trained(layer).values())

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(adapters.trained(layer), parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, inputs)


def test_starts_as_the_frozen_network():
    images = tiny.image_batch()
    assert torch.equal(adapted().eval()(images), adapters.network("vit").eval()(images))


def test_places_and_what_trains():
    for family, names in {
        "vit": PLACES,
        "llama": [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.o_proj", "mlp.down_proj")],
        "roberta": [
            f"roberta.encoder.layer.{i}.{n}" for i in range(2) for n in ("attention.output.dense", "output.dense")
        ],
    }.items():
        model = adapted(family)
        assert [name for name, module in model.named_modules() if isinstance(module, HydraLinear)] == names
        outside = {name for name in adapters.trained(model) if ".parallel." not in name and ".sequential." not in name}
        assert all(name.split(".")[0] in ("head", "classifier") for name in outside)
        assert bool(outside) == (family != "llama")


def test_folding_over_a_layer_without_a_bias():
    torch.manual_seed(0)
    layer = HydraLinear(nn.Linear(6, 5, bias=False), rank=2, scale=1.5, dropout=0.3).eval()
    adapters.perturb(layer, size=0.3)
    x = torch.randn(4, 6)
    before = layer(x)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), before, rtol=0, atol=1e-5)  # float32, values of size about 3


def test_dropout_acts_on_the_low_rank_features():
    layer = HydraLinear(nn.Linear(6, 5), rank=2, scale=1.0, dropout=0.5).train()
    seen = []
    layer.parallel.up.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    layer(torch.randn(100, 6))
    assert seen[0].shape == (100, 2)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7


def test_scale_and_dropout_per_task():
    settings = yaml.safe_load((REPOSITORY / "conf" / "adapter" / "hydra.yaml").read_text())
    published = Hydra.model_validate(settings)
    assert len(published.per_task) == 19
    # paper, Table 9, in the order of Table 1
    order = "caltech101 cifar dtd oxford_flowers102 oxford_iiit_pet svhn sun397 patch_camelyon eurosat resisc45 "
    order += "diabetic_retinopathy clevr_count dmlab kitti smallnorb_azi smallnorb_ele"
    found = [published.settings(f"vtab/{task}") for task in order.split()]
    assert [s.scale for s in found] == [4.0, 0.1, 0.1, 0.1, 0.1, 3.0, 0.1, 0.1, 0.1, 0.1, 4.5, 1.5, 4.5, 4.5, 3.0, 1.0]
    assert [s.dropout for s in found] == [0.1, 0.2, 0.2, 0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert published.settings("glue/sst2").scale == 1.0
    overridden = Hydra.model_validate(settings | {"scale": 2.0})
    assert overridden.settings("vtab/caltech101").scale == 2.0
    assert overridden.settings("vtab/caltech101").dropout == 0.1
    model = overridden.apply(adapters.network("vit"), adapters.config(task="vtab/caltech101"))
    assert model.blocks[0].attn.proj.parallel.scale == 2.0
    assert model.blocks[0].attn.proj.parallel.dropout.p == 0.1
    with pytest.raises(ValidationError, match="greater than 0"):
        Hydra.model_validate(settings | {"scale": -1.0})


def test_refuses_what_is_no_linear_layer():
    with pytest.raises(ConfigError, match="norm1: a LayerNorm takes no Hydra branches"):
        adapted(targets=["norm1"])
