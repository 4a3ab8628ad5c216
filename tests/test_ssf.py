"""SSF against its published equations in float64: outputs and gradients, places, initial values, folding."""

from __future__ import annotations

import adapters
import numpy as np
import pytest
import reference_vit
import tiny
import torch
from torch import nn

from velora.errors import ConfigError
from velora.nn.scale_shift import ScaleShift
from velora.nn.ssf import SSF, can_have_ssf

BLOCK = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
PLACES = ["patch_embed.proj", *(f"blocks.{i}.{name}" for i in range(2) for name in BLOCK), "norm"]


def adapted(family: str = "vit", seed: int = 0, **changes) -> nn.Module:
    return adapters.ssf(**changes).apply(adapters.network(family), adapters.config(seed))


def test_places_of_the_published_code_in_a_vision_transformer():
    model = adapted()
    assert [name for name, module in model.named_modules() if isinstance(module, SSF)] == PLACES
    widths = {name: model.get_submodule(name).scale_shift.num_features for name in PLACES[:7]}
    assert list(widths.values()) == [32, 32, 96, 32, 32, 64, 32]
    assert {n for n in adapters.trained(model) if "scale_shift" not in n} == {"head.weight", "head.bias"}


def test_every_linear_layer_and_norm_in_the_text_families():
    for family, num_layers, num_norms in (("llama", 14, 5), ("roberta", 12, 5)):  # without lm_head and classifier
        wrapped = [module.base for module in adapted(family).modules() if isinstance(module, SSF)]
        assert sum(isinstance(base, nn.Linear) for base in wrapped) == num_layers
        assert len(wrapped) == num_layers + num_norms


def reference_logits(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    w = reference_vit.parameters(model)
    frozen = {name.replace(".base.", "."): value for name, value in w.items()}

    def scale_and_shift(name, x, layer):
        y = layer(x)
        if name == "head":
            return y
        gamma, beta = w[f"{name}.scale_shift.weight"], w[f"{name}.scale_shift.bias"]
        for d in range(y.shape[-1]):
            y[..., d] = gamma[d] * y[..., d] + beta[d]
        return y

    return reference_vit.forward(frozen, images.double().numpy(), num_heads=4, patch=8, act=scale_and_shift)


def test_outputs_equal_the_equations():
    model, images = adapted().eval(), tiny.image_batch()
    torch.testing.assert_close(
        model(images), torch.from_numpy(reference_logits(model, images)).float(), rtol=0, atol=2e-6
    )  # float32 against float64, outputs of size about 1


def test_gradients_equal_finite_differences_of_the_equations():
    model, images = adapted(), tiny.image_batch()
    model(images).square().sum().backward()
    step = 1e-6  # central differences in float64: error about step² and 1e-16 / step
    for name in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc1", "norm"):
        for parameter in model.get_submodule(name).scale_shift.parameters():
            original = parameter.data.clone()
            index = 5
            values = []
            for sign in (1, -1):
                # the reference reads float64 of float32 values, so the step is made on a float64 copy
                shifted = original.double()
                shifted[index] += sign * step
                parameter.data = shifted
                values.append((reference_logits(model, images) ** 2).sum())
            parameter.data = original
            expected = (values[0] - values[1]) / (2 * step)
            assert parameter.grad[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_initial_values_are_those_of_the_published_code():
    torch.manual_seed(0)
    module = SSF(nn.Linear(4, 40_000, bias=True))
    gamma, beta = module.scale_shift.weight, module.scale_shift.bias
    # a mean of 40,000 has standard error 1e-4, a standard deviation 7e-5: five of them
    assert abs(gamma.mean().item() - 1) < 5e-4
    assert abs(beta.mean().item()) < 5e-4
    for values in (gamma, beta):
        assert abs(values.std().item() - 0.02) < 3.5e-4


def test_the_seed_decides_and_the_global_state_stays():
    networks = [adapters.network("vit") for _ in range(3)]
    state = torch.get_rng_state()
    first, same, other = (
        adapters.ssf().apply(network, adapters.config(seed)) for network, seed in zip(networks, (0, 0, 1), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.blocks[0].attn.qkv.scale_shift.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Linear(6, 5), (3, 4, 6)),
        (nn.Linear(6, 5, bias=False), (3, 6)),
        (nn.LayerNorm(6), (3, 4, 6)),
        (nn.LayerNorm(6, bias=False), (3, 6)),
        (nn.Conv2d(3, 5, kernel_size=2, stride=2), (2, 3, 4, 4)),
        (nn.RMSNorm(6), (3, 6)),
    ],
    ids=["linear", "linear without bias", "norm", "norm without bias", "patches", "rms norm"],
)
def test_folding(base, shape):
    torch.manual_seed(0)
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    module = SSF(base.double())
    module.scale_shift.double()
    adapters.perturb(module.scale_shift, size=0.5)
    x = torch.randn(shape, dtype=torch.float64)
    before = module(x)
    merged = module.merged()
    assert merged is base
    torch.testing.assert_close(merged(x), before, rtol=0, atol=1e-6)  # folded in float32


def test_a_norm_without_a_shift_of_its_own_gets_none():
    module = SSF(nn.RMSNorm(6))
    assert not module.scale_shift.bias.requires_grad
    assert not module.scale_shift.bias.any()


def test_a_norm_that_is_not_a_factor_is_refused_when_merging():
    class OneMoreRMSNorm(nn.RMSNorm):
        def forward(self, x):
            return nn.functional.rms_norm(x, self.normalized_shape) * (1 + self.weight)

    with pytest.raises(ConfigError, match="OneMoreRMSNorm does not simply multiply by its weight"):
        SSF(OneMoreRMSNorm(6)).merged()


def test_targets():
    model = adapted(targets=["value", "norm2"])
    assert [n for n, m in model.named_modules() if isinstance(m, SSF)] == [
        p for p in PLACES if "qkv" in p or "norm2" in p
    ]
    with pytest.raises(ConfigError, match=r"blocks\.0\.mlp\.act: a GELU takes no scale and shift"):
        adapted(targets=["mlp.act"])


def test_what_can_have_a_scale_and_shift():
    assert can_have_ssf(nn.Conv2d(3, 5, kernel_size=3))
    assert not can_have_ssf(nn.Embedding(3, 5))
    assert not can_have_ssf(nn.LayerNorm(3, elementwise_affine=False))
    assert not can_have_ssf(ScaleShift(3))
