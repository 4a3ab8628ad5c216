"""velora-bench figure2: ranks against NumPy's singular values, equation 3 against scipy, and a run of a few steps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

import velora
from velora.bench import cli, figure2
from velora.bench import figure2_measure as measuring
from velora.config.compose import compose
from velora.memory.meter import training_loss
from velora.models.build import build_network
from velora.nn.apply import remove_velora, velora_layers

QUICK = ("model=llama_tiny", "task=manual", "task.max_length=16", "trainer.batch_size=2", "trainer.eval_batch_size=64")
TIGHT = 1e-10  # float64; the Gram matrix squares the condition, of which the largest singular value knows nothing


def by_svd(a: np.ndarray) -> float:
    singular = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    return float((singular**2).sum() / singular[0] ** 2)


@pytest.mark.parametrize("shape", [(40, 6), (5, 30), (1, 8), (7, 1)])
def test_stable_rank_is_that_of_the_singular_values(shape):
    a = np.random.default_rng(0).standard_normal(shape) + 0.5
    assert measuring.stable_rank(torch.tensor(a)) == pytest.approx(by_svd(a), rel=TIGHT)


def test_stable_rank_of_float32_is_computed_in_float64():
    a = np.random.default_rng(1).standard_normal((300, 9)).astype(np.float32) + np.float32(100)
    assert measuring.stable_rank(torch.tensor(a)) == pytest.approx(by_svd(a), rel=TIGHT)


def test_stable_rank_of_what_is_known():
    assert measuring.stable_rank(torch.eye(5)) == pytest.approx(5)
    assert measuring.stable_rank(torch.ones(4, 3)) == pytest.approx(1)
    assert measuring.stable_rank(torch.zeros(4, 3)) == 0


def test_each_reading_against_the_matrix_that_it_names():
    rng = np.random.default_rng(2)
    x, v = rng.standard_normal((20, 12)) + 0.3, rng.standard_normal(4)
    v /= np.linalg.norm(v)
    rebuilt = x @ scipy.linalg.block_diag(*[np.outer(v, v)] * 3)  # each sub-token onto v
    expected = {
        "tokens": x,
        "sub_tokens": np.concatenate([x[:, :4], x[:, 4:8], x[:, 8:]]),
        "reconstruction": rebuilt,
        "group_blocks": scipy.linalg.block_diag(x[:, :4], x[:, 4:8], x[:, 8:]),
    }
    found = measuring.stable_ranks(torch.tensor(x), torch.tensor(v))
    assert found.keys() == measuring.READINGS.keys()
    for reading, matrix in expected.items():
        assert found[reading] == pytest.approx(by_svd(matrix), rel=TIGHT), reading


def test_with_one_group_every_reading_but_one_is_that_of_the_input():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    found = measuring.stable_ranks(x, torch.ones(8) / math.sqrt(8))
    assert found["sub_tokens"] == found["group_blocks"] == found["tokens"]
    assert found["reconstruction"] == pytest.approx(1)


def test_sparsity_by_hand():
    gradient = torch.tensor([[10.0, 0.0, -0.009], [0.5, -0.09, 0.009]])  # rms: 4.09
    found = measuring.sparsity(gradient)
    assert found["max"] == pytest.approx({"0.001": 3 / 6, "0.01": 4 / 6, "0.1": 5 / 6})
    assert found["rms"] == pytest.approx({"0.01": 3 / 6, "0.1": 4 / 6, "0.5": 5 / 6})


def test_movements_are_those_of_some_pair():
    rng = np.random.default_rng(3)
    x, v = rng.standard_normal((2, 6)), np.array([0.6, 0.0, 0.8])
    unit = [u / np.linalg.norm(u) for u in x.reshape(-1, 3)]
    onto = np.outer(v, v)
    pairs = {round(abs(u @ w - (onto @ u) @ (onto @ w)), 9) for u in unit for w in unit}
    codes = {round(float(np.linalg.norm(onto @ u) ** 2), 9) for u in unit}
    found = measuring.movements(torch.tensor(x), torch.tensor(v))
    assert {round(float(value), 9) for value in found["pair"]} == pairs  # of 8192 draws each of 10 pairs is there
    assert {round(float(value), 9) for value in found["code"]} == codes


def test_sub_tokens_of_zeros_have_no_similarity():
    x = torch.zeros(3, 4)
    x[0, :2] = torch.tensor([3.0, 4.0])
    found = measuring.movements(x, torch.tensor([1.0, 0.0]))
    assert torch.allclose(found["code"], torch.tensor(0.36, dtype=torch.float64))
    assert measuring.movements(torch.zeros(3, 4), torch.tensor([1.0, 0.0]))["pair"].shape == (0,)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_equation_3_against_scipy_and_against_chance(sigma):
    squares = (np.random.default_rng(7).normal(0, sigma, 200_000)) ** 2
    for k in (0.0, 0.1, 0.5, 1.0):
        expected = 2 * (1 - scipy.stats.norm.cdf(math.sqrt(k) / sigma))
        assert measuring.equation_3(k, sigma) == pytest.approx(expected, abs=1e-14)  # 1 - cdf loses 1e-16
        assert measuring.equation_3(k, sigma) == pytest.approx((squares > k).mean(), abs=0.006)  # 5 standard errors
    (curve,) = measuring.simulated([sigma], draws=100_000)
    assert curve["largest_difference"] < 0.008  # 5 standard errors


def test_measured_moves_beside_the_equation():
    assert measuring.exceeding([0.0, 0.05, 0.5, 2.0])[:2] == [0.75, 0.5]  # above 0 and above 0.05
    normal = 0.5 * np.random.default_rng(4).standard_normal(100_000)
    agrees = measuring.against_equation(normal**2)
    assert agrees["sigma"] == pytest.approx(0.5, rel=0.02)
    assert agrees["largest_difference_to_equation"] < 0.01  # chance, and that of sigma
    moves = np.random.default_rng(5).beta(0.5, 3, 400)
    found = measuring.against_equation(moves)
    square = scipy.stats.chi2(1, scale=moves.mean())  # of a normal variable
    assert found["largest_at_any_k"] == pytest.approx(scipy.stats.kstest(moves, square.cdf).statistic, abs=1e-12)
    constant = measuring.against_equation(np.full(100, 0.25))
    assert constant["largest_difference_to_equation"] == pytest.approx(1 - measuring.equation_3(0.2, 0.5))
    nothing = measuring.against_equation(np.zeros(10))
    assert (nothing["largest_difference_to_equation"], nothing["largest_at_any_k"]) == (0, 0)


def test_verdict():
    found = figure2.verdict({"0": {"16": 18.0, "2": 7.0, "1": 6.0}, "5": {"1": 6.5, "2": 6.5, "16": 9.0}})
    assert found == {
        "rises_with_groups": {"0": True, "5": False}, "range": [6.0, 18.0], "within_printed_range": True,
    }  # fmt: skip
    assert not figure2.verdict({"0": {"1": 5.9, "2": 7.0}})["within_printed_range"]
    assert figure2.verdict({"0": {"4": 7.0}})["rises_with_groups"] == {"0": None}


@pytest.fixture
def network(request):
    method = getattr(request, "param", "velora")
    config = compose(f"method={method}", *QUICK, "trainer.max_steps=1")
    built, _ = build_network(config, config.task.head(config), config.model.preprocessor(config))
    batch = {"input_ids": torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"].clone()
    config.activations.calibrate(built, [batch])
    return config, built.train(), batch


def test_measuring_leaves_no_trace_and_the_exact_gradient_is_that_of_plain_layers(network):
    config, model, batch = network
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = measuring.measure(model, batch, training_loss(model, batch, config))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())

    names = list(velora_layers(model))
    assert list(found["layers"]) == names
    assert {layer["role"] for layer in found["layers"].values()} == {"value", "down"}
    model.train()
    model(**batch).loss.backward()
    ours = {name: measuring.sparsity(model.get_submodule(name).weight.grad) for name in names}
    model.zero_grad()
    remove_velora(model)
    model(**batch).loss.backward()
    plain = {name: measuring.sparsity(model.get_submodule(name).weight.grad) for name in names}
    assert all(found["layers"][name]["sparsity"] == {"velora": ours[name], "exact": plain[name]} for name in names)
    assert ours != plain


@pytest.mark.parametrize("network", ["lora_velora"], indirect=True)
def test_an_adapter_has_the_role_of_its_layer_and_its_zero_gradient_is_sparse(network):
    config, model, batch = network
    found = measuring.measure(model, batch, training_loss(model, batch, config))["layers"]
    roles = {name.split(".")[-3]: layer["role"] for name, layer in found.items()}
    assert roles["v_proj"] == "value"
    assert None not in roles.values()
    for layer in found.values():  # lora_B is zero before the first step, so lora_A has no gradient
        assert set(layer["sparsity"]["exact"]["rms"].values()) == {1.0}


def test_padding_is_not_measured(network):
    config, model, batch = network
    short = {name: tensor[:, :10] for name, tensor in batch.items()}
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 10:] = 0
    padded = {**batch, "attention_mask": mask}
    padded["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    ranks = []
    for each in (short, padded):
        found = measuring.measure(model, each, training_loss(model, each, config))["layers"]
        ranks.append([value for layer in found.values() for value in layer["stable_rank"].values()])
    assert ranks[1] == pytest.approx(ranks[0], rel=1e-4)  # float32 forwards with and without a mask


def test_record_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["velora-bench", "figure2", "..."])
    monkeypatch.chdir(tmp_path)
    files = ["--json", "new/figure2.json", "--picture", "new/figure2.png"]
    assert cli.main(["figure2", "--groups", "4,2", "--steps", "5", *files, *QUICK]) == 0
    record = json.loads((tmp_path / "new" / "figure2.json").read_text())
    assert (tmp_path / "new" / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]  # nothing left of the networks' runs
    assert (record["groups"], record["steps"], record["level"]) == ([2, 4], [0, 1, 2, 3, 4, 5], "small")
    assert record["held_out"]["input_ids"] == [64, 16]
    assert {"versions", "git", "command", "machine", "device", "definitions"} <= record.keys()
    ranks = record["a"]["tokens"]["stable_rank"]
    assert ranks.keys() == {"value", "down", "all"}
    assert ranks["all"]["0"]["2"] == ranks["all"]["0"]["4"]  # one seed: before the first step the networks are the same
    assert ranks["all"]["5"]["2"] != ranks["all"]["0"]["2"]
    layers = record["networks"][1]["measured"]["5"]
    down = [layer["stable_rank"]["group_blocks"] for name, layer in layers.items() if name.endswith("down_proj")]
    assert record["a"]["group_blocks"]["stable_rank"]["down"]["5"]["4"] == pytest.approx(np.mean(down), rel=1e-5)
    assert record["b"]["exact"]["2"]["0"] == record["b"]["exact"]["4"]["0"] != record["b"]["velora"]["4"]["0"]
    assert record["c"]["measured_at_the_last_step"].keys() == {"2", "4"}
    printed = capsys.readouterr().out
    assert "stable rank, group_blocks, all" in printed
    assert "perplexity" not in printed  # the networks' own summaries go to stderr, with the progress

    config = compose(
        "method=velora", *QUICK, "trainer.max_steps=5", "activations.num_groups=4", "activations.sub_token_size=null",
        "runs_dir=other", "wandb.mode=disabled",
    )  # fmt: skip
    plain = velora.train(config)["metrics"]
    assert record["networks"][1]["metrics"]["loss"] == pytest.approx(plain["loss"], rel=1e-5)  # six digits are kept


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["activations.num_groups=4"], "figure2 sets activations.num_groups itself; leave it out"),
        (["trainer.max_steps=4"], "figure2 sets trainer.max_steps itself; leave it out (--groups and --steps"),
        (["activations=exact"], "activations=exact: figure2 measures VeLoRA layers; use activations=velora"),
        (["trainer.batch_sise=2"], "trainer.batch_sise"),
        (["method=full"], "activations=exact: figure2 measures VeLoRA layers; use activations=velora"),
        (["--groups", "2,3"], "num_groups=3 does not divide the width 128"),
        (["--json", "."], "--json . cannot be written"),
        (["--optimizer"], "--optimizer has no effect on `figure2`; it belongs to `step`"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["figure2", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("velora-bench: ")
    assert sentence in said[-1]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("--groups=2,x", "must be a positive integer"), ("--steps=0", "must be a positive integer")],
)
def test_wrong_options_exit_with_2(option, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["figure2", option])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
