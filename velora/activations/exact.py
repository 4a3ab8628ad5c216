"""Autograd keeps what it always keeps."""

from typing import Literal

from velora.group import Activations


class Exact(Activations):
    kind: Literal["exact"]
