"""apply_velora, calibrate, update_directions and remove_velora on whole models."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import reference
import tiny
import torch
from torch import Tensor, nn

from velora import VeloraLinear, apply_velora, calibrate, remove_velora, update_directions
from velora.errors import ConfigError
from velora.nn.scale_shift import ScaleShift

MODELS = {
    "llama": (tiny.tiny_llama, lambda seed=0: tiny.token_batch(seed=seed)),
    "roberta": (tiny.tiny_roberta, lambda seed=0: tiny.token_batch(num_labels=2, seed=seed)),
    "vit": (tiny.tiny_vit, lambda seed=0: tiny.image_batch(seed=seed)),
}


def loss_of(model: nn.Module, batch) -> Tensor:
    if isinstance(batch, Tensor):
        return model(batch).square().mean()
    return model(**batch).loss


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.GELU())])


def observed(model: nn.Module, names: list[str], run) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output gradient of the named modules while `run()` does one forward and backward."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda dy: seen[name].append(dy))

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].detach()))
        )
        handles.append(module.register_forward_hook(lambda _m, _a, output, name=name: note(name, output)))
    run()
    for handle in handles:
        handle.remove()
    return {name: (tensors[0], tensors[-1]) for name, tensors in seen.items()}


def test_summary_names_layers_roles_and_derived_sizes():
    summary = apply_velora(tiny.tiny_llama(), ["value", "down"], num_groups={"value": 4, "down": 6})
    first = summary.layers[0]
    assert (first.name, first.role) == ("model.layers.0.self_attn.v_proj", "value")
    assert (first.width, first.num_groups, first.sub_token_size) == (32, 4, 8)
    assert [layer.role for layer in summary.layers] == ["value", "down", "value", "down"]
    lines = [line.split() for line in str(summary).splitlines()]
    assert lines[1:] == [["value", "2", "32", "4", "8"], ["down", "2", "48", "6", "8"]]


def test_a_fused_layer_has_all_its_roles():
    summary = apply_velora(tiny.tiny_vit(), ["query", "value"], sub_token_size={"query": 8, "value": 8})
    assert {layer.role for layer in summary.layers} == {"query+key+value"}
    with pytest.raises(ConfigError, match=r"blocks.0.attn.qkv and 1 more: .* has several entries \(4, 8\)"):
        apply_velora(tiny.tiny_vit(), ["query", "value"], sub_token_size={"query": 8, "value": 4})


@pytest.mark.parametrize("family", MODELS)
def test_only_the_chosen_weights_gradients_change(family):
    build, batch = MODELS[family]
    plain, model = build(), build()
    loss_of(plain, batch()).backward()
    summary = apply_velora(model, ["value", "down"], sub_token_size=8, scale=0.5)
    calibrate(model, batch())
    chosen = [layer.name for layer in summary.layers]
    seen = observed(model, chosen, lambda: loss_of(model, batch()).backward())
    assert torch.equal(loss_of(model, batch()), loss_of(plain, batch()))
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        module, _, what = name.rpartition(".")
        if module not in chosen or what == "bias":
            assert torch.equal(mine.grad, theirs.grad), name
            continue
        x, dy = (reference.array(tensor) for tensor in seen[module])
        v = reference.fixed_average(x, 8)
        dw = reference.linear_gradients(x, reference.array(mine), dy, v, 0.5)[1]
        # fp32: v and z are rounded to 6e-8, sums over 16 tokens
        np.testing.assert_allclose(mine.grad.numpy(), dw, rtol=0, atol=1e-6 * abs(dw).max(), err_msg=name)


def test_everything_that_refers_to_a_layer_still_holds():
    model = mlp(8, 8)
    layer, weight, called = model[0], model[0].weight, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = layer.register_forward_hook(lambda *_: called.append(1))
    apply_velora(model, "0", sub_token_size=4)
    assert model[0] is layer
    assert type(layer) is VeloraLinear
    assert layer.weight is weight
    calibrate(model, torch.ones(2, 8))
    before = weight.clone()
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert called == [1, 1]
    handle.remove()
    model(torch.ones(2, 8))
    assert called == [1, 1]


def test_scale_and_shift_and_containers_are_reached():
    class Ssf(nn.Module):
        velora_children = ("scale_shift",)

        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer, self.scale_shift = layer.requires_grad_(False), ScaleShift(layer.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale_shift(self.layer(x))

    model = nn.Sequential(Ssf(nn.Linear(4, 12)), nn.GELU())
    summary = apply_velora(model, "fc", roles={"fc": ["0"]}, sub_token_size=4)
    assert [(layer.name, layer.role, layer.width) for layer in summary.layers] == [("0.scale_shift", "fc", 12)]
    x = torch.randn(5, 4)
    calibrate(model, x)
    expected = reference.fixed_average(reference.array(model[0].layer(x)), 4)
    np.testing.assert_allclose(model[0].scale_shift.direction, expected, rtol=0, atol=1e-7)  # fp32
    model(x).sum().backward()


def test_one_module_under_two_names_is_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.GELU(), shared)
    summary = apply_velora(model, ["0", "2"], sub_token_size=4)
    assert [layer.name for layer in summary.layers] == ["0"]
    calibrate(model, torch.randn(3, 8))
    model(torch.randn(3, 8)).sum().backward()


# What is refused, and that the model is untouched then


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        ({"layers": ["value"]}, ["num_groups=None and sub_token_size=None: give exactly one"]),
        ({"layers": ["value"], "num_groups": 2, "sub_token_size": 4}, ["give exactly one"]),
        ({"layers": [], "num_groups": 2}, ["layers is empty"]),
        ({"layers": "value", "num_groups": 2, "init": "mean", "scale": 0}, ["init='mean' must be", "scale=0 must be"]),
        (
            {"layers": ["value", "model.norm", "*.mlp", "*.wq", "down"], "num_groups": 7},
            ["'*.wq' matches no module", "model.norm: LlamaRMSNorm has no VeLoRA twin", "layers.1.mlp: LlamaMLP has no",
             "layers.0.self_attn.v_proj and 1 more: num_groups=7 does not divide the width 32 (4 or 8 would)",
             "layers.0.mlp.down_proj and 1 more: num_groups=7 does not divide the width 48 (6 or 8 would)"],
        ),
        ({"layers": ["value", "down"], "num_groups": {"value": 4}}, ["num_groups={'value': 4} has no entry for it (down)"]),
        ({"layers": ["value"], "num_groups": 4, "roles": {"up": ["up_proj"]}}, ["no role 'value': its roles are up"]),
    ],
)  # fmt: skip
def test_all_problems_are_refused_at_once(arguments, sentences):
    model = tiny.tiny_llama()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError) as refused:
        apply_velora(model, **arguments)
    for sentence in sentences:
        assert sentence in str(refused.value)
    assert [type(module) for module in model.modules()] == classes
    assert not any("direction" in name for name in model.state_dict())


def test_unknown_architecture_says_what_to_give():
    with pytest.raises(ConfigError, match=r"Sequential has no role 'value': its architecture is not in .*give roles"):
        apply_velora(mlp(8, 8), ["value"], sub_token_size=4)
    model = mlp(8, 8)
    model.velora_roles = {"value": ["0"]}
    assert apply_velora(nn.ModuleDict({"wrapped": model}), ["value"], sub_token_size=4).layers[0].name == "wrapped.0"


def test_modules_in_place_of_names_are_refused_with_their_names():
    model = mlp(8, 8)
    name = r"Linear: an entry is a role or a glob pattern .* give the name of the module \('0'\)"
    for layers in ([model[0]], model[0], ["0", model[0]]):
        with pytest.raises(ConfigError, match=name):
            apply_velora(model, layers, sub_token_size=4)
    with pytest.raises(ConfigError, match="layers: int: an entry is a role or a glob pattern"):
        apply_velora(model, [0], sub_token_size=4)


def test_all_of_an_unknown_architecture_says_what_to_give():
    with pytest.raises(ConfigError) as refused:
        apply_velora(mlp(8, 8), "all", sub_token_size=4)
    assert str(refused.value) == (
        "layers: 'all' stands for all roles, and the architecture of Sequential is not in velora/config/roles.py; give "
        "roles={'value': ['*.v_proj'], ...} (the key model.roles), or glob patterns of module names"
    )


def test_a_compiled_model_is_changed_under_its_compilation():
    inner, plain, exact, x = mlp(8, 8), mlp(8, 8), mlp(8, 8), torch.randn(3, 8)
    compiled = torch.compile(inner, backend="aot_eager")

    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        model(x).sum().backward()
        return next(model.parameters()).grad.clone()

    torch.testing.assert_close(gradient(compiled), gradient(exact), rtol=0, atol=1e-6)  # fp32
    for model in (compiled, plain):
        apply_velora(model, "0", sub_token_size=4, init="random")
    with pytest.raises(ConfigError, match="0: it is a VeLoRA layer already; call remove_velora"):
        apply_velora(compiled, "0", sub_token_size=4)
    assert torch.equal(inner[0].direction, plain[0].direction)  # drawn for the layer's name, the plain one
    torch.testing.assert_close(gradient(compiled), gradient(plain), rtol=0, atol=1e-6)
    remove_velora(compiled)
    torch.testing.assert_close(gradient(compiled), gradient(exact), rtol=0, atol=1e-6)


def test_two_layers_with_one_weight():
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    model, x = nn.Sequential(first, nn.GELU(), second), torch.randn(3, 8)
    apply_velora(model, "2", sub_token_size=8)
    calibrate(model, x)
    assert model[0].weight is model[2].weight
    inner = torch.nn.functional.gelu(first(x)).detach()
    model(x).sum().backward()
    alone = nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU())
    alone[0].weight.data.copy_(first.weight)
    (alone(x) @ first.weight.detach().T).sum().backward()
    v = torch.nn.functional.normalize(inner.mean(0), dim=0)
    expected = alone[0].weight.grad + (inner @ v).sum() * v  # dy is one everywhere
    torch.testing.assert_close(first.weight.grad, expected, rtol=0, atol=1e-5)  # fp32


def test_twice_patched_and_quantised_layers_are_refused():
    model = mlp(8, 8, 8, 8)
    apply_velora(model, "0", sub_token_size=4)
    model[2].forward = model[2].forward  # as accelerate's hooks do
    model[4].__class__ = type("Linear4bit", (nn.Linear,), {})
    with pytest.raises(ConfigError) as refused:
        apply_velora(model, ["0", "2", "4"], sub_token_size=4)
    assert "0: it is a VeLoRA layer already; call remove_velora" in str(refused.value)
    assert "2: its forward was replaced" in str(refused.value)
    assert "4: Linear4bit has no VeLoRA twin (exactly Conv1D of transformers, Conv1d, " in str(refused.value)


def test_frozen_layers_warn_and_all_frozen_is_refused():
    model = mlp(8, 8, 8)
    model[0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="changes nothing in layers whose weight is frozen: 0"):
        apply_velora(copy.deepcopy(model), ["0", "2"], sub_token_size=4)
    with pytest.raises(ConfigError, match="all chosen layers are frozen"):
        apply_velora(model, "0", sub_token_size=4)


# State


@pytest.mark.parametrize("init", ["fixed_average", "running_average", "svd", "random"])
def test_resuming_from_a_state_dict_is_exact(init):
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        loss_of(model, tiny.token_batch(seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_directions(model)

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny.tiny_llama()
        apply_velora(model, ["value", "down"], sub_token_size=8, init=init)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = start()
    calibrate(model, tiny.token_batch())
    step(model, optimizer, 1)
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer, 2)
    resumed, its_optimizer = start()
    state, its_state = pickle.loads(saved)
    resumed.load_state_dict(state)
    its_optimizer.load_state_dict(its_state)
    step(resumed, its_optimizer, 2)
    assert model.state_dict().keys() == resumed.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_remove_velora_gives_the_plain_model_back():
    plain, model = tiny.tiny_llama(), tiny.tiny_llama()
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    apply_velora(model, ["value", "down"], sub_token_size=8, init="running_average")
    calibrate(model, tiny.token_batch())
    remove_velora(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.state_dict().keys() == plain.state_dict().keys()
    for each in (plain, model):
        loss_of(each, tiny.token_batch()).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    apply_velora(model, ["value"], sub_token_size=8)


def test_hooks_of_accelerate_survive_remove_velora():
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = mlp(8, 8), torch.randn(3, 8)
    apply_velora(model, "0", sub_token_size=4)
    calibrate(model, x)
    plain = mlp(8, 8)
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    model(x).sum().backward()
    remove_velora(model)
    for _ in range(2):
        for each in (model, plain):
            each.zero_grad()
            each(x).sum().backward()
        assert torch.equal(model[0].weight.grad, plain[0].weight.grad)
        hooks.remove_hook_from_module(model[0])
    assert model[0].forward.__func__ is nn.Linear.forward


def test_a_forward_that_hides_the_layers_own_is_not_taken_off():
    model = mlp(8, 8)
    apply_velora(model, "0", sub_token_size=4)
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    with pytest.raises(
        ConfigError, match="0: its forward was replaced after apply_velora; undo that before remove_velora"
    ):
        remove_velora(model)
    del model[0].forward
    remove_velora(model)
    assert type(model[0]) is nn.Linear


def test_copies_and_pickles():
    model = mlp(8, 8)
    apply_velora(model, "0", sub_token_size=4, init="running_average")
    calibrate(model, torch.randn(4, 8))
    model(torch.randn(4, 8))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other[0].direction, model[0].direction)
        other(torch.randn(4, 8)).sum().backward()


def test_what_is_kept_for_backward_in_a_llama():
    """Query, key and value read one tensor: it goes when all three are compressed, which share one code; value alone adds codes."""
    tokens, hidden, inner, groups = 2 * 8, 32, 48, 4

    def kept(layers: list[str]) -> int:
        model = tiny.tiny_llama()
        if layers:
            apply_velora(model, layers, num_groups=groups)
            calibrate(model, tiny.token_batch())
        return reference.saved_bytes(
            lambda: loss_of(model, tiny.token_batch()), [*model.parameters(), *model.buffers()]
        )

    codes, blocks, exact = tokens * groups * 4, 2, kept([])
    assert kept(["value"]) - exact == blocks * codes
    assert kept(["query", "key", "value"]) - exact == blocks * (codes - tokens * hidden * 4)
    assert kept(["down"]) - exact == blocks * (codes - tokens * inner * 4)


def test_all_stands_for_every_role_of_the_architecture():
    summary = apply_velora(tiny.tiny_roberta(), "all", sub_token_size=8)
    assert {layer.role for layer in summary.layers} == {"query", "key", "value", "output", "up", "down"}
