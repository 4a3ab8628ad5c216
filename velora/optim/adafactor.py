"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): row and column sums in place of the second moment.

transformers' class, since it alone can follow the published recipes: torch.optim.Adafactor always scales by the size of the
parameter and always caps the rate at 1/√t. What it lacks is an exact restart: its state is fp32, and loading casts it to the
dtype of the weights.
"""

from __future__ import annotations

from transformers.optimization import Adafactor as _Adafactor

from velora.optim.exact_state import ExactState


class Adafactor(ExactState, _Adafactor):
    """`transformers.optimization.Adafactor` whose state loads bit for bit, also for half-precision weights."""
