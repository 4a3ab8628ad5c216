"""What a value of a config group is.

A run is composed from the groups `weights`, `adapter`, `optimizer`, `activations`, `recompute`, `model` and `task`. A value stands
in two places: `conf/<group>/<value>.yaml` gives its settings, and a class in `velora/config/<group>.py`, found by its `kind`, has
the keys that it takes, what can be wrong with them, and what it does. Several YAML files may share a kind
(`llama_60m` and `llama_7b` are both `kind: causal_lm`). A kind with a dot is the import path of a module with one class, so other
people's values need no change here: `kind: my_package.my_adapter`.

These files import no torch at their top: a configuration is composed, checked and refused in under a second, and
everything heavy is imported inside the methods. The torch code itself is in `velora/nn`, `optim`, `models` and `data`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, field_validator

from velora.config.read import moved_value, shown
from velora.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config.run import Config
    from velora.memory.ledger import Ledger

Modality = Literal["causal_lm", "sequence_classification", "image_classification"]


class Part(BaseModel):
    """One value of one config group. Unknown keys are refused; values do not change after they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    kind: str

    def problems(self, config: Config) -> Iterator[str]:
        """Sentences about what is wrong with this value in this run, as far as the configuration alone can tell."""
        yield from ()


@dataclass(frozen=True)
class Head:
    """What a network must end in to serve a task; known from the configuration, without reading data."""

    modality: Modality
    num_labels: int | None = None  # None for a language model
    regression: bool = False


@dataclass(frozen=True)
class Phase:
    """One training and its evaluations. `validation` maps a split name ("" for the only one) to its data set.

    With `stop_at_best_of` the phase runs the same schedule, but ends after the epoch that was the best of that earlier
    phase (VTAB-1k: select on the validation images, then train on all). With `lengths`, one for each training example, steps
    are made of examples of like length (velora/run/order.py).
    """

    name: str
    train: Any
    validation: dict[str, Any]
    stop_at_best_of: str | None = None
    only_at_end: bool = False  # evaluate once, at the end: these scores must not choose anything
    lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class TaskData:
    """Everything the training loop needs of a task.

    `collate` turns a list of examples into the keyword arguments of the model. `reduce_logits(logits, labels)`, if given,
    shrinks what an evaluation step keeps (per-sequence sums in place of N x vocabulary logits). `metrics(predictions,
    labels)` gets NumPy arrays of all examples and returns named scores, `loss` among them, each a mean over what was summed
    (examples, tokens). `best_metric` names the score that selects an epoch.

    `num_targets(batch)` is what the network's loss of a batch is a mean over (velora/data/metrics.py has the usual ones): with it
    micro-batches and processes add up to the mean over the whole step. `num_items(batch)` counts the `unit` of the speed.
    """

    phases: list[Phase]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    metrics: Callable[[Any, Any], dict[str, float]]
    best_metric: str
    greater_is_better: bool
    unit: Literal["tokens", "images"]
    num_targets: Callable[[dict[str, Any]], torch.Tensor | int]
    num_items: Callable[[dict[str, Any]], torch.Tensor | int]
    reduce_logits: Callable[[Any, Any], Any] | None = None
    benchmark: Any | None = None  # scores the whole network apart from the phases (velora/eval/mmlu.py)
    benchmark_every_epoch: bool = False  # not only at the end
    about: dict[str, Any] = field(default_factory=dict)  # sources, split sizes, protocol: goes into the record


class Weights(Part):
    """How the weights are kept; those that train too, where they can be kept so."""

    quantised: ClassVar[bool] = False  # frozen weights in a form that cannot train

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained` / `from_config`."""
        return {}

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        """Bring a built network to this form."""
        return model


class Adapter(Part):
    """Which parameters train: sets `requires_grad` and may insert modules."""

    trains_base_weights: ClassVar[bool] = False

    def quantiser(self, model: nn.Module, config: Config) -> Callable[..., nn.Module]:
        """`quantise(name, linear, **settings)`, which brings a linear layer to a frozen form where `weights` has one: the last
        that is seen of its dense weight. The settings are those of `velora.nn.quantised.quantise_linear`."""
        from velora.nn.quantised import quantise_linear

        return lambda name, linear, **settings: quantise_linear(linear, **settings)

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        raise NotImplementedError

    def after_step(self, model: nn.Module, config: Config, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called after each optimiser step of a run, the `step`-th; a run that continues counts on."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained: the whole network, as plain layers, in the format of its library (safetensors)."""
        from velora.nn.adapter_state import save_network

        save_network(model, folder)


class Optimizer(Part):
    """What the optimiser keeps per parameter."""

    takes_shards: ClassVar[bool] = True  # works where a process has a part of each parameter (trainer.sharding=fsdp)
    trains_int8: ClassVar[bool] = False  # writes weights back that are kept in eight bits (weights=int8)

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """An optimiser over the trainable parameters; learning rate and weight decay stand in `config.trainer`."""
        raise NotImplementedError


class Activations(Part):
    """What linear layers keep for the backward pass."""

    def apply(self, model: nn.Module, config: Config) -> str | None:
        """Change the network in place; returns a text for the user (what was changed), or None."""
        return None

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> None:
        """Called once, with the micro-batches of the first step, before a fresh (not resumed) run makes it."""

    def pretend_calibrated(self, model: nn.Module) -> None:
        """Called in place of `calibrate` where a batch has no values (velora-memory): any state that trains will do."""

    def warnings(self, model: nn.Module, ledger: Ledger, config: Config) -> list[str]:
        """Sentences for the user before the first step; `ledger` is that of the first batch."""
        return []

    def forget(self, model: nn.Module) -> None:
        """Called after forwards that are no part of the training: drop what they have left behind."""

    def after_step(self, model: nn.Module) -> None:
        """Called after each optimiser step."""


class Recompute(Part):
    """What is computed again in the backward pass in place of being kept. It changes no gradient."""

    def apply(self, model: nn.Module, config: Config) -> str | None:
        """Change the network in place, which has its adapter and its activations; returns a text for the user, or None."""
        return None

    def needs_a_gpu(self) -> str | None:
        """The setting that would change nothing where the CPU trains, as `key=value`, or None."""
        return None


class Model(Part):
    """A network, its preprocessing and its roles."""

    name: str
    path: str | None = None
    pretrained: bool | None = None  # null: whether a path is given
    roles: dict[str, list[str]] | None = None  # None: from the table in velora/config/roles.py

    @field_validator("path")
    @classmethod
    def _can_be_a_path(cls, path: str | None) -> str | None:
        try:
            os.stat(path or ".")
        except FileNotFoundError:
            pass  # the name of a checkpoint on a hub; a kind says what it needs
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.path={shown(path)} cannot be read ({error}); give a checkpoint's folder or name"
            ) from None
        return path

    @property
    def loads_weights(self) -> bool:
        return self.path is not None if self.pretrained is None else self.pretrained

    def modalities(self) -> tuple[Modality, ...]:
        """The kinds of head that the network can be built with."""
        raise NotImplementedError

    def preprocessor(self, config: Config) -> Any:
        """The tokenizer (text) or the image transforms (vision) that belong to the network."""
        raise NotImplementedError

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        """The network on the CPU; its forward takes the collated batch and returns `loss` and `logits`."""
        raise NotImplementedError


class Task(Part):
    """Data, loss and scores."""

    evaluates_alone: ClassVar[bool] = False  # has a benchmark, so that trainer.max_steps=0 makes sense

    name: str

    def head(self, config: Config) -> Head:
        raise NotImplementedError

    def problems(self, config: Config) -> Iterator[str]:
        head, model = self.head(config), config.model
        if head.modality not in model.modalities():
            yield (
                f"task={self.name} needs a model for {head.modality}, and model={model.name} serves "
                f"{', '.join(model.modalities())}; choose another model or task"
            )

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        """Read and prepare the data; raises ConfigError where it is missing or malformed."""
        raise NotImplementedError

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of each tensor of one training batch at full length: all that an estimate needs."""
        raise NotImplementedError


def part_class(group: str, kind: str, base: type[Part]) -> type[Part]:
    """The class behind `kind` of `group`; ConfigError names the known kinds if there is none, or what its module does wrong."""
    kind = str(kind)
    if "." not in kind:
        found = shipped_classes(group).get(kind)
        if found is None:
            raise _unknown_kind(group, kind)
        return found
    with blaming(group, kind):
        if not _exists(kind):
            raise _class_for_module(group, kind) or _unknown_kind(group, kind)
        module = importlib.import_module(kind)
    classes = [
        c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, base) and c.__module__ == kind
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"{group}.kind={kind}: {kind} must define exactly one {base.__name__}, it defines {len(classes)}"
        )
    return classes[0]


def shipped_classes(group: str) -> dict[str, type[Part]]:
    """Kind -> class of a group, from its one file `velora/config/<group>.py`: a class says its kind as `kind: Literal[...]`."""
    module = importlib.import_module(f"velora.config.{group}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Part)]
    return {kind: c for c in classes for kind in get_args(c.model_fields["kind"].annotation)}


def shipped_kinds(group: str) -> list[str]:
    """The kinds of a group that come with this package."""
    return sorted(shipped_classes(group))


@contextmanager
def blaming(group: str, kind: str) -> Iterator[None]:
    """Whatever the module of another person's kind raises, sys.exit too, is a ConfigError with its file and the reason.

    A kind of this package is let through: that is a fault of ours.
    """
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if "." not in kind:
            raise
        raise ConfigError(f"{group}.kind={kind}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """File, line and what went wrong there: the first line outside this package and Python's import machinery."""
    if isinstance(error, SyntaxError):
        return f"{error.filename} line {error.lineno} is not valid Python ({error.msg})"
    ours = str(Path(__file__).parent.parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(("<", ours))]
    frames = [f for f in frames if f"{os.sep}importlib{os.sep}" not in f.filename]
    where = f"{frames[0].filename} line {frames[0].lineno}" if frames else "its module"
    if isinstance(error, ModuleNotFoundError):
        return f"{where} needs the package {error.name}, which is not installed"
    if isinstance(error, SystemExit):
        return f"{where} ends the program (sys.exit); a module must only define its class"
    return f"{where} raises {type(error).__name__}: {error}"


def _unknown_kind(group: str, kind: str) -> ConfigError:
    if moved := moved_value(group, kind):
        return ConfigError(f"{group}.kind={kind} is no kind of {group} any more: {moved}")
    return ConfigError(
        f"{group}.kind={kind} is not known; it is one of {', '.join(shipped_kinds(group))}, or a module's import path"
    )


def _class_for_module(group: str, kind: str) -> ConfigError | None:
    """The sentence for the path of a class in place of that of its module."""
    path, _, name = kind.rpartition(".")
    if not path or not _exists(path) or not inspect.isclass(getattr(importlib.import_module(path), name, None)):
        return None
    shipped = [k for k, c in shipped_classes(group).items() if c.__module__ == path and c.__name__ == name]
    return ConfigError(
        f"{group}.kind={kind} is a class; give its module: {group}.kind={shipped[0] if shipped else path}"
    )


def _exists(path: str) -> bool:
    """Whether a module has this import path; the packages on the way to it are imported, it is not."""
    if not all(part.isidentifier() for part in path.split(".")):
        return False
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the package on the way is there, and misses another one
        return False
