"""What all VeLoRA layers have in common: a direction, where it comes from, and how a module becomes its twin.

A twin subclasses a plain module, computes the same forward bit for bit, and differs only in what it keeps for backward.
A module is turned into its twin by changing its class and adding a buffer, never by making another object: its
Parameters, hooks, name and everything that refers to it (optimizer, DDP, FSDP, tied layers) stay what they were.

    S  sub-token size      D  features of a token, D = G S      G  groups      N  tokens
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from velora.nn.projection import INITS, SubTokenStatistics, compress, random_direction, split_width
from velora.nn.recipe import Product, forward_is_repeated, forward_may_stop
from velora.nn.surroundings import autocast_dtype, cast, cast_type

MOMENTUM = 0.1
"""Weight of the newest step in the running average, as in nn.BatchNorm; the paper does not state one."""

BUFFERS = ("direction", "average")
CODES = "VeLoRA codes"
NO_SECOND_DERIVATIVE = (
    "VeLoRA has no second derivative: its weight gradient is an approximation that belongs to no function. "
    "Call remove_velora(model), or eval(), where a second derivative is needed"
)
_SHARED = "_velora_codes"  # attribute of an input: what was computed of it already
_ATTRIBUTES = (
    "num_groups", "sub_token_size", "scale", "init", "seed", "_calibrated", "_plain", "_batch_statistics", "_after_loading",
    "_code_key",
)  # fmt: skip

_Self = TypeVar("_Self", bound="VeloraTwin")


class VeloraTwin(nn.Module):
    """Base of the twins; subclasses name their `plain_class` and give `forward` and `width_of`.

    A twin is usually made out of a plain module, by `velora.apply_velora`. It can be constructed too, with the arguments of
    the plain class and:

        num_groups, sub_token_size: G or S, exactly one; the other is derived from the width D.
        scale: factor on the weight gradient (the authors' velora_scale).
        init: where the direction comes from: fixed_average, running_average, svd or random.
        seed: of a random direction.

    Raises ConfigError for sizes that do not fit.

    Buffers, both saved in the state_dict: `direction` (S), a unit vector, NaN until it is set, zero where calibration
    has passed the layer by, which then works as the plain one; with init="running_average" also `average` (S), the
    mean sub-token of which it is the direction. Both are float32 (float64 where the weight is), whatever the weight's
    dtype is or becomes: an average in bfloat16 would not move.
    """

    plain_class: ClassVar[type[nn.Module]]
    saved_term: ClassVar[str] = CODES  # what a ledger calls the one new tensor that it saves
    features_dim: ClassVar[int] = -1  # which dimension of an input is cut into sub-tokens
    deferred: Any = None  # where the weight's gradient is put off, see split_backward.defer_weight_gradients
    factor_taker: Any = None  # offered dy, z and v in place of the weight's gradient, see optim/grass_factors.py
    direction: Tensor
    average: Tensor
    weight: Tensor
    num_groups: int
    sub_token_size: int
    scale: float
    init: str
    seed: int
    _calibrated: bool  # cached checks of `direction`, no state: False means "look"
    _plain: bool  # the direction is zero; compressing would lose everything
    _batch_statistics: SubTokenStatistics | None
    _code_key: Any  # the direction as something to compare; None: not looked at yet
    _after_loading: Any  # the handle of a hook

    def __init__(
        self,
        *plain_args: Any,
        num_groups: int | None = None,
        sub_token_size: int | None = None,
        scale: float = 1.0,
        init: str = "fixed_average",
        seed: int = 0,
        **plain_kwargs: Any,
    ) -> None:
        super().__init__(*plain_args, **plain_kwargs)
        sizes = split_width(self.width_of(self), num_groups, sub_token_size)
        self._init_velora(*sizes, scale, init, seed)

    @staticmethod
    def width_of(module: Any) -> int:
        """D of a plain module or of a twin."""
        raise NotImplementedError

    @staticmethod
    def refusal(module: Any) -> str | None:
        """Why a plain module of the right class can have no twin all the same, in words; None where it can."""
        return None

    @classmethod
    def convert_(
        cls: type[_Self], module: nn.Module, *, num_groups: int, sub_token_size: int, scale: float, init: str, seed: int
    ) -> _Self:
        """Make a plain module its twin, in place, and return it. The sizes must fit (see projection.split_width)."""
        assert type(module) is cls.plain_class
        module.__class__ = cls
        assert isinstance(module, cls)
        module._init_velora(num_groups, sub_token_size, scale, init, seed)
        return module

    def later(self) -> Callable[[Callable[[], Any]], None] | None:
        """Where backward leaves the computation of the weight's gradient; None: nowhere, it is done at once."""
        if self.deferred is None or torch.compiler.is_compiling() or not self.weight.is_leaf:
            return None
        return partial(self.deferred.put, self)

    def with_codes(self, function: Any, compute: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
        """`product` of an input as the module got it: statistics are taken, codes computed, and it is cast as autocast does."""
        self.observe(x)
        dtype = autocast_dtype(x.device)
        with torch.no_grad():
            z = self.codes(x, cast_type(x, dtype))
        return self.product(function, compute, cast(x, dtype), z, dtype, *more)

    def product(
        self: Any, function: Any, compute: Callable[..., Tensor], x: Tensor, z: Tensor, dtype: Any, *more: Any
    ) -> Tensor:
        """The output `compute(x, weight, bias, dtype)`, by an autograd function that keeps z in place of x; `more` is for that.

        In a checkpointed region the function has saved before the product is computed, which nobody may need: see
        recipe.Product.
        """
        early = not torch.compiler.is_compiling() and forward_may_stop()
        y = function.apply(x, z, self.weight, self.bias, self.direction, self.scale, self.later(), dtype, early, *more)
        return Product.apply(y, partial(compute, x, self.weight, self.bias, dtype)) if early else y

    def own_forwards(self) -> list[str]:
        """Attributes of the instance that hold the twin's own forward, as accelerate's hooks keep it in `_old_forward`."""
        own = MethodType(type(self).forward, self)
        return [key for key, value in vars(self).items() if isinstance(value, MethodType) and value == own]

    def revert_(self) -> nn.Module:
        """Make the twin its plain module again, in place, and return it."""
        for key in self.own_forwards():
            setattr(self, key, MethodType(self.plain_class.forward, self))
        self._after_loading.remove()
        for name in (*self._own_buffers(), *_ATTRIBUTES):
            delattr(self, name)
        for name in ("deferred", "factor_taker"):
            if name in vars(self):
                delattr(self, name)
        self.__class__ = self.plain_class  # type: ignore[assignment]
        return self

    def _init_velora(self, num_groups: int, sub_token_size: int, scale: float, init: str, seed: int) -> None:
        assert num_groups * sub_token_size == self.width_of(self)
        assert init in INITS
        self.num_groups, self.sub_token_size = num_groups, sub_token_size
        self.scale, self.init, self.seed = scale, init, seed
        self._calibrated = self._plain = False
        self._batch_statistics = self._code_key = None
        vector = torch.full((sub_token_size,), torch.nan, dtype=self._wide_dtype(), device=self.weight.device)
        self.register_buffer("direction", vector)
        if init == "running_average":
            self.register_buffer("average", vector.clone())
        self._after_loading = self.register_load_state_dict_post_hook(_look_again)
        self.reset_direction()

    def _own_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.named_buffers(recurse=False) if name in BUFFERS}

    def _wide_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Where the module goes (.to, .half, .cuda, ...), the buffers go as well, but they do not become half precision."""
        before = self._own_buffers()
        super()._apply(fn, recurse)
        self._widen(before)
        return self

    def _widen(self, values: dict[str, Tensor]) -> None:
        """Make buffers that have become another type what they should be, with these values."""
        for name, value in values.items():
            buffer = getattr(self, name)
            if buffer.dtype != self._wide_dtype():
                setattr(self, name, value.to(buffer.device, self._wide_dtype()))

    def reset_parameters(self) -> None:
        """Reset the plain module's parameters, and forget the direction (draw it from the seed where it is random)."""
        super().reset_parameters()  # type: ignore[misc]
        if self._own_buffers():
            self.reset_direction()

    @torch.no_grad()
    def reset_direction(self) -> None:
        """The state before calibration: NaN, or with init="random" the direction that belongs to the seed."""
        if self.init == "random":
            self.set_direction(random_direction(self.sub_token_size, self.seed))
            return
        self.direction.fill_(torch.nan)
        if self.init == "running_average":
            self.average.fill_(torch.nan)
        self._calibrated = self._plain = False
        self._code_key = None

    @torch.no_grad()
    def set_direction(self, direction: Tensor, average: Tensor | None = None) -> None:
        """Copy in a unit vector (S) and, for a running average, the mean sub-token (S) that it belongs to."""
        self.direction.copy_(direction)
        if self.init == "running_average":
            assert average is not None
            self.average.copy_(average)
        self._calibrated, self._plain = not self.direction.is_meta, False
        self._code_key = None

    def has_direction(self) -> bool:
        """Whether there is a vector to compress with."""
        if not self._calibrated:
            self._look()
        return self._calibrated and not self._plain

    @torch.no_grad()
    def stay_plain(self) -> None:
        """Compute as the plain module until a direction is set; the zero vector says so, in checkpoints too."""
        for buffer in self._own_buffers().values():
            buffer.zero_()
        self._calibrated = self._plain = not self.direction.is_meta

    def needs_statistics(self) -> bool:
        """Whether the direction comes from data."""
        return self.init != "random"

    def new_statistics(self) -> SubTokenStatistics:
        return SubTokenStatistics(self.sub_token_size, self.direction.device, with_moment=self.init == "svd")

    def direction_from(self, statistics: SubTokenStatistics) -> Tensor:
        """The direction (S) that the sums over a calibration batch give; ConfigError where they give none."""
        return statistics.principal_direction() if self.init == "svd" else statistics.mean_direction()

    def take_batch_statistics(self) -> SubTokenStatistics:
        """What `observe` has summed since the last call, and start afresh (running average)."""
        statistics, self._batch_statistics = self._batch_statistics, None
        return statistics or self.new_statistics()

    def move_average(self, statistics: SubTokenStatistics) -> None:
        """One step of the running average: average += 0.1 (mean of the step - average).

        Nothing moves where the step says nothing (no sub-tokens, or zeros) or would leave no direction.
        """
        if statistics.is_zero() or not self.has_direction():
            return
        average = torch.lerp(self.average.to(statistics.flat.dtype), statistics.mean(), MOMENTUM)
        direction = average / torch.linalg.vector_norm(average)
        if torch.isfinite(direction).all():
            self.set_direction(direction, average)

    def compresses(self) -> bool:
        """Whether this forward keeps codes: in training, with gradients on, for a weight that trains. Else it is plain,
        as it is where calibration has passed the layer by.

        Raises RuntimeError where nothing has set the direction yet.
        """
        if not (self.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return False
        if not self._calibrated:
            self._check_calibrated()
        return not self._plain

    def codes(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """z (N, G) of the input x (..., D), computed in `dtype`: one for all layers that read x with the same direction.

        In the first forward of a checkpointed region, whose saved tensors are thrown away, it has the shape and no memory.
        """
        dtype = dtype or x.dtype
        if torch.compiler.is_compiling():
            return self.compress(x.detach().to(dtype))
        if forward_is_repeated():
            return x.new_empty((), dtype=dtype).expand(self.code_shape(x))
        if self.init == "running_average":  # a direction that changes at each step would have to be read each time
            return self.compress(x.detach().to(dtype))
        known: dict[Any, TensorWeakRef] = vars(x).setdefault(_SHARED, {})
        key = (self._direction_key(), self.features_dim, dtype, x._version)
        z = known[key]() if key in known else None
        if z is None:
            z = self.compress(x.detach().to(dtype))
            known[key] = TensorWeakRef(z)  # only the layers' graph keeps it
        return z

    def compress(self, x: Tensor) -> Tensor:
        """z of the input x, see projection.compress."""
        return compress(x, self.direction)

    def code_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of z: (N, G)."""
        return x.numel() // x.shape[-1], self.num_groups

    def tokens(self, x: Tensor) -> Tensor:
        """The input x with its features last (..., D), for statistics."""
        return x.movedim(self.features_dim, -1)

    def _direction_key(self) -> Any:
        """Equal for equal directions. Where they have no values (an estimate), layers with data-driven ones are taken to agree."""
        if self._code_key is None:
            pretended = isinstance(self.direction, FakeTensor) or self.direction.is_meta
            values = (self.init, self.seed if self.init == "random" else 0) if pretended else self.direction.tolist()
            self._code_key = (self.sub_token_size, *values)
        return self._code_key

    def observe(self, x: Tensor) -> None:
        """Take the input x of a forward into the running average of this step."""
        if self.init == "running_average":
            if self._batch_statistics is None:
                self._batch_statistics = self.new_statistics()
            self._batch_statistics.add(self.tokens(x))

    def _check_calibrated(self) -> None:
        self._look()
        if not self._calibrated:
            raise RuntimeError(
                f"{type(self).__name__}({self.extra_repr()}) has no direction yet: "
                "call velora.calibrate(model, batch) with the first batch, before training"
            )

    def _look(self) -> None:
        self._code_key = None
        self._calibrated = not self.direction.is_meta and bool(torch.isfinite(self.direction).all())
        self._plain = self._calibrated and not bool(self.direction.any())

    def extra_repr(self) -> str:
        sizes = f"num_groups={self.num_groups}, sub_token_size={self.sub_token_size}"
        return f"{super().extra_repr()}, {sizes}, scale={self.scale}, init={self.init}"


def _look_again(twin: VeloraTwin, _keys: Any) -> None:
    """After a state dict was loaded: its direction, widened where it was assigned as half precision, is another one."""
    twin._widen(twin._own_buffers())
    twin._look()
