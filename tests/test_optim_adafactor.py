import optim_helpers as helpers
import pytest
import torch
from transformers.optimization import Adafactor as TransformersAdafactor

from velora.optim import Adafactor

RECIPE = {"lr": 1e-2, "scale_parameter": False, "relative_step": False, "warmup_init": False}  # GaLore's Adafactor rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_resume_is_exact(dtype, beta1):
    helpers.assert_resume_is_exact(lambda model: Adafactor(model.parameters(), beta1=beta1, **RECIPE), dtype)


def test_transformers_class_alone_does_not_resume_in_bf16():
    """The reason for the subclass; if this fails, it is no longer needed."""
    with pytest.raises(AssertionError, match="differs after a restart"):
        helpers.assert_resume_is_exact(
            lambda model: TransformersAdafactor(model.parameters(), beta1=0.9, **RECIPE), torch.bfloat16
        )


def test_state_bytes():
    p = torch.nn.Parameter(torch.randn(24, 12))
    optimizer = Adafactor([p], **RECIPE)
    p.grad = torch.randn(24, 12)
    optimizer.step()
    rms = 4  # transformers keeps the root mean square of the parameter as a tensor
    assert helpers.state_bytes(optimizer) == 4 * (24 + 12) + rms
