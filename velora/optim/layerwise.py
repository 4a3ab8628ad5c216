"""Updating each weight inside the backward pass, so that the gradients of a network never exist all at once.

A hook runs as soon as the gradient of a parameter is complete: it updates the parameter and frees the gradient. Published
optimisers of this form step at every backward pass, so that gradient accumulation silently becomes several small steps
(GaLore's issue 78), and the global norm that clipping needs is never known. Here

- accumulation is true accumulation: until the last micro-batch of a step, a gradient waits in the compressed form that the
  optimiser has for it (GaLore: projected; FLoRA: sketched), or as usual in `p.grad` where there is none;
- a backward pass too many is an error, not a second step;
- clipping by the global norm costs a second backward pass: the first, inside `measure_norm()`, only sums the norm.

`step()` ends a step. It applies what the hooks have not (the last step of an epoch may have fewer micro-batches), so such
an optimiser is driven like any other: backward, `step()`, schedule.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from velora.errors import ConfigError
from velora.optim.exact_state import ExactState


class LayerwiseOptimizer(ExactState):
    """Base of the optimisers that can run in the backward pass; with `layerwise=False` an ordinary optimiser.

    A subclass defines `update`, and where a gradient has a smaller form, `compress` and `update_compressed`.

    `accumulation_steps` is the number of backward passes of one step (only read when `layerwise`). `max_grad_norm` clips by
    the norm of all gradients together, when `layerwise`; otherwise clip `p.grad` as usual. `peak_gradient_bytes` is the most
    that gradients took at one time, as the hooks saw it (0 without them): by the time of `step()` most are gone.

    Backward passes that are not part of the training (a measurement, say) must run before this object exists or after
    `remove_hooks()`.

    Raises ConfigError for settings that cannot work: accumulation with clipping, several processes (the hook would see a
    gradient before it is averaged), sharded parameters.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        layerwise: bool = False,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ConfigError(f"accumulation_steps={accumulation_steps} must be at least 1")
        if max_grad_norm is not None and not layerwise:
            raise ConfigError(f"max_grad_norm={max_grad_norm} is for layerwise=true; clip the gradients before step()")
        if max_grad_norm is not None and accumulation_steps > 1:
            raise ConfigError(
                f"max_grad_norm={max_grad_norm} with accumulation_steps={accumulation_steps}: a layer-wise optimiser never "
                "holds the sum of the gradients, so its norm is not known; set one of the two to null or 1"
            )
        if layerwise and _world_size() > 1:
            raise ConfigError(
                f"a layer-wise optimiser runs in one process, here are {_world_size()}: its hooks see gradients that are not "
                "averaged yet; use layerwise=false"
            )
        self.layerwise = layerwise
        self.accumulation_steps = accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.peak_gradient_bytes = 0
        self._arrivals: dict[Tensor, int] = {}
        self._held: dict[Tensor, Tensor] = {}
        self._waiting_bytes: dict[Tensor, int] = {}
        self._group_of: dict[Tensor, int] = {}
        self._handles: list[Any] = []
        self._squared_norms: list[Tensor] | None = None
        self._factor: Tensor | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if not self.layerwise:
            return
        for p in self.param_groups[-1]["params"]:
            refuse_sharded(p)
            self._group_of[p] = len(self.param_groups) - 1
            self._handles.append(p.register_post_accumulate_grad_hook(_weak_hook(self)))

    def update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Change `p` by one step along its full gradient."""
        raise NotImplementedError

    def compress(self, p: Tensor, gradient: Tensor, group: dict[str, Any], *, first: bool) -> Tensor | None:
        """The small form, linear in the gradient, in which it waits for the other micro-batches; None: there is none.

        `first` says that this is the first micro-batch of the step.
        """
        return None

    def update_compressed(self, p: Tensor, compressed: Tensor, group: dict[str, Any]) -> None:
        """Change `p` by one step along the sum of its compressed gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End a step: update what has a gradient that is not applied yet. Returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if self.layerwise:
                    self._apply(p, group)
                elif p.grad is not None:
                    self.update(p, p.grad, group)
        self._arrivals.clear()
        self._factor = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._held.clear()
        self._arrivals.clear()
        self._waiting_bytes.clear()

    def held_gradients(self) -> dict[Tensor, Tensor]:
        """What waits for further micro-batches in compressed form, by parameter: gradient memory that is not in `p.grad`."""
        return dict(self._held)

    def remove_hooks(self) -> None:
        """Let go of the parameters: backward passes no longer update them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def measure_norm(self) -> Iterator[None]:
        """Around the first of two backward passes (with `retain_graph=True`): sums the gradient norm, updates nothing."""
        self._squared_norms = []
        try:
            yield
            norm = torch.stack(self._squared_norms).sum().sqrt()
            self._factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm else None
        finally:
            self._squared_norms = None

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        if self._squared_norms is not None:
            self._squared_norms.append(p.grad.float().square().sum())
            p.grad = None
            return
        group, count = self._arrival(p, p.grad.nbytes)
        if self.accumulation_steps > 1:
            self._hold(p, group, first=count == 1)
        if count == self.accumulation_steps:
            self._apply(p, group)

    def _arrival(self, p: Tensor, num_bytes: int) -> tuple[dict[str, Any], int]:
        """The group of a parameter whose gradient (or what stands for it, of that many bytes) has arrived, and which one of
        the step it is."""
        if self.max_grad_norm is not None and self._factor is None:
            raise RuntimeError("max_grad_norm is set: each step needs a first backward pass inside measure_norm()")
        self._count_bytes(p, num_bytes)
        count = self._arrivals[p] = self._arrivals.get(p, 0) + 1
        if count > self.accumulation_steps:
            raise RuntimeError(
                f"backward pass {count} of a step, but accumulation_steps={self.accumulation_steps}: call step() after each "
                "step, or set accumulation_steps to the number of backward passes"
            )
        return self.param_groups[self._group_of[p]], count

    def _count_bytes(self, p: Tensor, num_bytes: int) -> None:
        """Before anything happens to a gradient: what waits, and this one. One that waits in `p.grad` is the same tensor."""
        waiting = sum(self._waiting_bytes.values())
        if p in self._waiting_bytes and p not in self._held:
            waiting -= self._waiting_bytes[p]
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, waiting + num_bytes)

    def _hold(self, p: Tensor, group: dict[str, Any], *, first: bool) -> None:
        compressed = self.compress(p, p.grad, group, first=first)
        if compressed is None:  # it accumulates in p.grad, as autograd does anyway
            self._waiting_bytes[p] = p.grad.nbytes
            return
        p.grad = None
        self._keep(p, compressed, first=first)

    def _keep(self, p: Tensor, compressed: Tensor, *, first: bool) -> None:
        if first:
            self._held[p] = compressed
            self._waiting_bytes[p] = compressed.nbytes
        else:
            self._held[p].add_(compressed)

    def _apply(self, p: Tensor, group: dict[str, Any]) -> None:
        held = self._held.pop(p, None)
        self._waiting_bytes.pop(p, None)
        if held is not None:
            self.update_compressed(p, held, group)
        elif p.grad is not None:
            if self._factor is not None:
                p.grad.mul_(self._factor)
            self.update(p, p.grad, group)
            p.grad = None


def refuse_sharded(p: Tensor) -> None:
    """ConfigError for a parameter of which this process holds only a part (FSDP2)."""
    if hasattr(p, "placements"):
        raise ConfigError(
            f"a parameter of shape {tuple(p.shape)} is sharded over several processes; this optimiser needs whole matrices, "
            "so train on one device or with plain data parallelism"
        )


def _weak_hook(optimizer: LayerwiseOptimizer) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimiser alive: a dropped optimiser no longer trains the network."""
    reference = weakref.ref(optimizer)

    def hook(p: Tensor) -> None:
        alive = reference()
        if alive is not None and p.grad is not None:  # None: a layer has handed over what stands for it
            alive._on_gradient(p)

    return hook


def _world_size() -> int:
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
