"""A backward pass in two stages: the gradients of inputs first, those of weights later (2BP, arXiv 2405.18047).

    stage 1    dx = dy W      at once: the pipeline stage before this one waits for it
    stage 2    dW = dyᵀ x     where the pipeline would be idle

**One graph, twice.** torch.distributed.pipelining's schedules with a split backward go through the graph twice and ask the engine
for some of the gradients each time. An operator of torch is told which; an autograd function in Python is not:
ctx.needs_input_grad is what its forward was given (pytorch issue 174017). It would compute both products
in both stages, rightly and for nothing. `wanted` asks the engine, so that each product is computed once, in its stage.
One node stays one node: the forward, what is kept and the ordinary backward are what they were.

**No graph in between.** To go through it again, the whole graph has to be kept. `defer_weight_gradients` needs none of it: stage 1
is an ordinary backward, which lets go of everything, and leaves z and dy of each VeLoRA layer: all that C = dyᵀ z needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from velora.nn.twin import VeloraTwin

Gradients = tuple[Tensor | None, Tensor | None]  # of weight and bias
Compute = Callable[[], Gradients]


def wanted(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad without the gradients that this backward would throw away; call it inside backward.

    The function's tensors have to come first among its inputs; a None, or what is no tensor, may only precede tensors that
    need no gradient.
    """
    needed = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return needed
    flags = list(needed)
    for index, (node, _) in enumerate(ctx.next_functions):
        if needed[index]:
            try:
                flags[index] = torch._C._will_engine_execute_node(node)
            except RuntimeError:  # the engine's answer for a leaf whose gradient torch.autograd.grad returns
                flags[index] = True
    return tuple(flags)


class DeferredGradients:
    """The gradients that a stage has put off; calling it hands over those since the last call, as something to run.

    That is the `dw_builder` of torch.distributed.pipelining.PipelineStage.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[VeloraTwin, Compute]] = []

    def put(self, twin: VeloraTwin, compute: Compute) -> None:
        self._pending.append((twin, compute))

    def __call__(self) -> Callable[[], None]:
        pending, self._pending = self._pending, []
        return partial(_add_up, pending)


@torch.no_grad()
def _add_up(pending: list[tuple[VeloraTwin, Compute]]) -> None:
    while pending:
        twin, compute = pending.pop(0)
        for parameter, gradient in zip((twin.weight, twin.bias), compute(), strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def defer_weight_gradients(module: nn.Module) -> DeferredGradients:
    """Put off the gradients of weights and biases of all VeLoRA layers in `module`; return what hands them over.

        PipelineStage(module, index, num_stages, device, dw_builder=defer_weight_gradients(module))

    or `backward()`, then the returned object, then what that returns. All other parameters get their gradients in backward().
    Hooks on the gradients do not run, so that DDP, FSDP and optimizers that work inside backward miss them, and
    torch.autograd.grad does not find them.
    `remove_velora` and `defer_weight_gradients` again, which forgets what is pending, end it.
    """
    deferred = DeferredGradients()
    for twin in module.modules():
        if isinstance(twin, VeloraTwin):
            twin.deferred = deferred
    return deferred


def weight_gradients(ctx: Any, needed: tuple[bool, ...], compute: Callable[..., Gradients], *tensors: Any) -> Gradients:
    """Those of a twin's weight and bias, its function's third and fourth input, as far as they are `needed`; None for the
    others, and for both where they are put off.

    They are `compute(*tensors, scale, of_weight, bias_dtype)`; `bias_dtype` is None where no gradient of the bias is wanted.
    """
    if not (needed[2] or needed[3]):
        return None, None
    now = partial(compute, *tensors, ctx.scale, needed[2], ctx.bias_dtype if needed[3] else None)
    if ctx.later is None:
        return now()
    ctx.later(now)
    return None, None
