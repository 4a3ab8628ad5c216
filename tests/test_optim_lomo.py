import optim_helpers as helpers
import pytest
import torch
from torch import nn

from velora.errors import ConfigError
from velora.optim import Lomo


def test_equals_sgd_with_decoupled_decay():
    ours, theirs = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    data = helpers.batches(10, torch.float64)
    optimizer = Lomo(ours.parameters(), lr=0.1, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step, batch in enumerate(data):
        helpers.loss_of(ours, batch).backward()
        optimizer.step()
        scheduler.step()
        lr = 0.1 / (step + 1)
        gradients = torch.autograd.grad(helpers.loss_of(theirs, batch), list(theirs.parameters()))
        with torch.no_grad():
            for p, gradient in zip(theirs.parameters(), gradients, strict=True):
                p.copy_(p - lr * 0.01 * p - lr * gradient)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)  # float64


def test_clipping_by_value():
    p = nn.Parameter(torch.zeros(3))
    optimizer = Lomo([p], lr=1.0, max_grad_value=0.5)
    (p * torch.tensor([2.0, 0.25, -2.0])).sum().backward()
    optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([-0.5, -0.25, 0.5]))


def test_bf16_weights_are_updated_in_fp32():
    """1 - 3 * 2**-9 is a tie in bf16 and fp32 keeps it until the end: decay and gradient together round once."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Lomo([p], lr=2.0**-9, weight_decay=1.0)
    p.sum().backward()
    optimizer.step()
    expected = torch.tensor([1 - 2.0**-9 - 2.0**-9]).bfloat16()  # rounding twice would give 1 - 2**-9 -> 1 and again 1
    assert torch.equal(p.detach(), expected)
    assert expected.item() != 1.0


def test_no_state():
    model = helpers.tiny_network()
    optimizer = Lomo(model.parameters())
    helpers.train(model, optimizer, helpers.batches(2))
    assert helpers.state_bytes(optimizer) == 0
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype):
    helpers.assert_resume_is_exact(lambda model: Lomo(model.parameters(), lr=0.1), dtype)


def test_two_ways_of_clipping_are_refused():
    with pytest.raises(ConfigError, match="at most one"):
        Lomo(helpers.tiny_network().parameters(), max_grad_norm=1.0, max_grad_value=1.0)
