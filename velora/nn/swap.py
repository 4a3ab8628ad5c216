"""Finding modules by name and replacing them: used by apply_velora and by every adapter.

`find_modules` is the one way from a pattern to modules. `replace_modules` puts another module in the place of each; it
makes all of the new ones before it touches the model, so that a refusal leaves the model as it was.

A matched module may be the container of an adapter: what trains then is not the module but some of its children. PEFT's
LoRA layers hold their A matrices under `lora_A`; a container of this package names its children in a class
attribute `velora_children: tuple[str, ...]`. `expand_container` goes down to them.

`twin_of` is the one way from a plain class to its VeLoRA twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from velora.config.roles import matches
from velora.errors import ConfigError
from velora.nn.conv import VeloraConv1d, VeloraConv2d, VeloraConv3d
from velora.nn.heads import HeadsLinear, VeloraHeadsLinear
from velora.nn.int8 import Int8Linear, VeloraInt8Linear
from velora.nn.lean_layers import plain_class_of
from velora.nn.linear import VeloraLinear
from velora.nn.scale_shift import ScaleShift, VeloraScaleShift
from velora.nn.twin import VeloraTwin

TWINS: dict[type[nn.Module], type[VeloraTwin]] = {
    nn.Linear: VeloraLinear,
    Int8Linear: VeloraInt8Linear,
    nn.Conv1d: VeloraConv1d,
    nn.Conv2d: VeloraConv2d,
    nn.Conv3d: VeloraConv3d,
    ScaleShift: VeloraScaleShift,
    HeadsLinear: VeloraHeadsLinear,
}
"""Plain class -> its VeLoRA twin, but for transformers' Conv1D; `twin_of` knows that too."""

_COMPILED = "_orig_mod"
"""The name under which torch.compile keeps the module that it wraps."""


def twin_of(plain: type[nn.Module]) -> type[VeloraTwin] | None:
    """The VeLoRA twin of a plain class. Exact classes only: a subclass may compute or store something else."""
    if (plain.__module__, plain.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        from velora.nn.transposed import VeloraTransposedLinear  # not before somebody has imported transformers

        return VeloraTransposedLinear
    return TWINS.get(plain)


def refusal_of(module: nn.Module) -> str | None:
    """Why a module whose class has a twin can have none itself (a depthwise convolution)."""
    twin = twin_of(type(module))
    return None if twin is None else twin.refusal(module)


def can_be_twin(module: nn.Module) -> bool:
    """Whether VeLoRA can take this plain module, where its width can be split."""
    return twin_of(type(module)) is not None and refusal_of(module) is None


def variant_problems(name: str, module: nn.Module) -> Iterator[str]:
    """Sentences about an adapter's container whose layers are read in another way than VeLoRA knows."""
    for adapter, variant in getattr(module, "lora_variant", {}).items():
        what = getattr(variant, "__name__", type(variant).__name__)
        yield f"{name}: the adapter {adapter!r} uses PEFT's {what}, which calls lora_A in another way; only plain LoRA has VeLoRA"


def twin_problems(name: str, module: nn.Module) -> Iterator[str]:
    """A sentence if a module can have no VeLoRA twin."""
    if isinstance(module, VeloraTwin):
        yield f"{name}: it is a VeLoRA layer already; call remove_velora(model) first"
    elif twin_of(plain_class_of(module)) and plain_class_of(module) is not type(module):
        yield f"{name}: it is a lean layer; call apply_velora before apply_lean, or remove_lean(model) first"
    elif twin_of(type(module)) is None:
        known = ", ".join(sorted(["Conv1D of transformers", *(plain.__name__ for plain in TWINS)]))
        yield f"{name}: {type(module).__name__} has no VeLoRA twin (exactly {known} have one)"
    elif (refusal := refusal_of(module)) is not None:
        yield f"{name}: {refusal}"
    elif "forward" in module.__dict__:
        yield f"{name}: its forward was replaced on the instance (an accelerate hook?), which a twin would not run"


def width_of(module: nn.Module) -> int:
    """D of a plain module that has a twin."""
    twin = twin_of(type(module))
    assert twin is not None
    return twin.width_of(module)


def raise_problems(problems: Sequence[str]) -> None:
    """One ConfigError that names them all; nothing where there are none."""
    if problems:
        raise ConfigError("; ".join(problems))


def plain_name(name: str) -> str:
    """A dotted name as it is without torch.compile."""
    return name.replace(f"{_COMPILED}.", "")


def unwrap(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    """The network inside the wrappers of torch.compile, DDP and DataParallel, and what undoes it.

    Compiled parts of the network are replaced by what they wrap, so that every name is the plain network's.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    parts = [
        (name, child)
        for name, child in model.named_modules(remove_duplicate=False)
        if name.rpartition(".")[2] != _COMPILED and _compiled(child) is not None
    ]
    for name, child in reversed(parts):  # the inner ones first, so that their names are still right
        while (inner := _compiled(child)) is not None:
            child = inner
        model.set_submodule(name, child)

    def wrap_again() -> None:
        for name, child in parts:
            model.set_submodule(name, child)

    return model, wrap_again


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """`unwrap` for as long as it is entered."""
    network, wrap_again = unwrap(model)
    try:
        yield network
    finally:
        wrap_again()


def _wrapped(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return model.module
    return _compiled(model)


def _compiled(module: nn.Module) -> nn.Module | None:
    """What torch.compile has wrapped, if this is such a wrapper (not by attribute: PEFT's wrappers hand those through)."""
    return dict(module.named_children()).get(_COMPILED)


def module_names(model: nn.Module) -> list[str]:
    """All dotted names in a model, those of modules registered twice too, without the model itself."""
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def find_modules(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Name -> module for every module that some pattern matches (see velora/config/roles.py), in the model's order.

    A module that is registered twice stands once, under its first matching name. Raises ConfigError that names each
    pattern without a match.
    """
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    patterns = list(patterns)
    unmatched = [p for p in patterns if not any(matches(name, p) for name, _ in modules)]
    raise_problems([f"the pattern {pattern!r} matches no module of {type(model).__name__}" for pattern in unmatched])
    for name, module in modules:
        if id(module) not in seen and any(matches(name, pattern) for pattern in patterns):
            seen.add(id(module))
            found[name] = module
    return found


def expand_container(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named modules that stand for a matched one: itself, or what an adapter's container trains."""
    children = getattr(type(module), "velora_children", ("lora_A",) if hasattr(module, "lora_A") else ())
    if not children:
        yield name, module
    for attribute in children:
        child = getattr(module, attribute)
        several = isinstance(child, nn.ModuleDict | nn.ModuleList | nn.Sequential)
        for key, inner in child.named_children() if several else [("", child)]:
            yield from expand_container(".".join(filter(None, (name, attribute, key))), inner)


def bare_layers(model: nn.Module) -> list[str]:
    """Names of layers whose forward never runs, since the network reads their weights itself: whatever stands in the place of
    such a layer would do nothing, or not be read. In transformers' Mamba the convolution and the time step's projection."""
    mixers = [name for name, module in model.named_modules() if type(module).__name__ == "MambaMixer"]
    return [f"{name}.{child}" for name in mixers for child in ("conv1d", "dt_proj")]


def replace_modules(
    model: nn.Module, patterns: Iterable[str], make: Callable[[str, nn.Module], nn.Module]
) -> dict[str, nn.Module]:
    """Put `make(name, module)` in the place of each module that some pattern matches; return the new ones by name.

    All names of a module that is registered twice get the same new one. A ConfigError of `make` is collected with those of
    the other modules and of the patterns; the model is untouched then, if `make` leaves it untouched.
    """
    found = find_modules(model, patterns)
    made: dict[str, nn.Module] = {}
    problems = []
    for name, module in found.items():
        try:
            made[name] = make(name, module)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
    raise_problems(problems)
    new_of = {id(found[name]): made[name] for name in found}
    for name, module in reversed(
        list(model.named_modules(remove_duplicate=False))
    ):  # inner ones before what holds them
        if id(module) in new_of:
            model.set_submodule(name, new_of[id(module)])
    return made
