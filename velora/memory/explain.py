"""Everything that `velora-memory` says about one configuration: peak, ledger, what would be freed, the paper's accounting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from velora.config.level import printed_for
from velora.config.parts import Activations
from velora.config.run import Config
from velora.errors import ConfigError
from velora.memory.estimate import Device, Pretended, estimate, largest_batch, pretend
from velora.memory.freed import Freed, what_velora_would_free
from velora.memory.ledger import Ledger, take_ledger
from velora.memory.meter import measure
from velora.memory.paper import accounting
from velora.memory.storages import plain_tensors
from velora.memory.timeline import MemoryFigures
from velora.models.build import parameter_counts
from velora.run.device import training_device


@dataclass(frozen=True)
class Questions:
    """What to find out beside the estimate. `fit_bytes`: the memory that the largest batch is asked for."""

    device: Device | None = None
    padded: bool = False
    ledger: bool = True
    measure: bool = False
    fit_bytes: int | None = None


@dataclass(frozen=True)
class Explanation:
    config: Config
    figures: MemoryFigures
    accounting: Mapping[str, int]
    parameters: Mapping[str, int]
    paper: Mapping[str, float]
    ledger: Ledger | None
    freed: tuple[Freed, ...]
    warnings: tuple[str, ...]
    measured: MemoryFigures | None
    largest_batch: int | None
    fit_bytes: int | None

    @property
    def sums(self) -> dict[str, int]:
        """The sums that Tables 3, 5b and 6 print, by our count, under the names of result.json."""
        inputs = self.accounting["inputs of trained layers"]
        return {"accounting_bytes": sum(self.accounting.values()), "input_activations_bytes": inputs}

    def beside(self, printed: str) -> str:
        """Our figure for one that the paper prints, with its unit: the sum of that name, or the estimated peak."""
        num_bytes = self.sums.get(printed.replace("_gib", "_bytes"))
        if num_bytes is not None:
            return f"by its accounting {num_bytes / 2**30:.2f} GiB"
        return f"estimated {self.figures.peak.num_bytes / 1e9:.2f} GB"

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, without the ledger's single storages: `Ledger.to_json` has them."""
        config, ledger = self.config, self.ledger
        return {
            "name": config.name,
            "method": config.method.name,
            "model": config.model.name,
            "task": config.task.name,
            "batch_size": config.trainer.examples_per_forward,
            "estimate": self.figures.to_json(),
            "measured": self.measured.to_json() if self.measured else None,
            "paper_accounting_bytes": dict(self.accounting),
            "paper": dict(self.paper),
            "ledger": ledger.summary() if ledger else None,
            "freed": [{**asdict(choice), "saved_bytes": choice.saved_bytes} for choice in self.freed],
            "warnings": list(self.warnings),
            "largest_batch": self.largest_batch,
            "fit_bytes": self.fit_bytes,
        }


def explain(config: Config, questions: Questions) -> Explanation:
    """Answer the questions about a configuration; nothing is downloaded, and nothing runs but with `measure`.

    Raises ConfigError for a question that has no answer here.
    """
    questions = _answerable(config, questions)
    device, padded = questions.device, questions.padded
    figures = estimate(config, device=device, padded=padded)
    pretended = pretend(config, device=device, padded=padded)
    ledger: Ledger | None = None
    freed: tuple[Freed, ...] = ()
    warnings: tuple[str, ...] = ()
    if questions.ledger:
        ledger = _ledger(pretended)
        freed = tuple(_what_would_be_freed(config, pretended.network, questions))
        warnings = tuple(config.activations.warnings(pretended.network, ledger, config))
    largest = None
    if questions.fit_bytes is not None:

        def peak_at(batch_size: int) -> int:
            return estimate(config, device=device, batch_size=batch_size, padded=padded).peak.num_bytes

        largest = largest_batch(peak_at, questions.fit_bytes)
    return Explanation(
        config=config,
        figures=figures,
        accounting=_accounting(config, pretended),
        parameters=parameter_counts(pretended.network),
        paper=papers_figures(config),
        ledger=ledger,
        freed=freed,
        warnings=(*warnings, *_not_in_the_estimate(config)),
        measured=measure(config, padded=padded) if questions.measure else None,
        largest_batch=largest,
        fit_bytes=questions.fit_bytes,
    )


def _answerable(config: Config, questions: Questions) -> Questions:
    """The questions, the device settled: what is measured stands beside an estimate for the same device."""
    if questions.padded and "attention_mask" not in config.task.batch_shapes(1, config):
        raise ConfigError(f"--padded: the batches of task={config.task.name} are never padded; leave it out")
    if not questions.measure:
        return questions
    here: Device = "cuda" if training_device(config).type == "cuda" else "cpu"
    if questions.device not in (None, here):
        raise ConfigError(
            f"--device {questions.device} with --measure: trainer.device={config.trainer.device} runs the steps on {here} here; "
            "leave out one of the two"
        )
    return replace(questions, device=here)


def _not_in_the_estimate(config: Config) -> Iterator[str]:
    if config.trainer.compile:
        yield "trainer.compile=true is not in these figures: they are those of the uncompiled network"


def papers_figures(config: Config) -> dict[str, float]:
    """The bytes that the paper prints for this experiment, task and model: a peak (`memory_gb`), or a sum (`..._gib`)."""
    if config.experiment is None:
        return {}
    found = printed_for(config.experiment.paper, config.task.name, config.model.name)
    return {name: value for name, value in found.items() if name.endswith(("_gb", "_gib"))}


def _ledger(pretended: Pretended) -> Ledger:
    with pretended.context():
        return take_ledger(pretended.network, pretended.losses[0])


def _what_would_be_freed(config: Config, configured: nn.Module, questions: Questions) -> list[Freed]:
    """Out of the ledger of the plain network."""
    plain = config.model_copy(update={"activations": Activations(kind="exact")})
    pretended = pretend(plain, device=questions.device, padded=questions.padded)
    return what_velora_would_free(_ledger(pretended), pretended.network, configured, config)


def _accounting(config: Config, pretended: Pretended) -> Mapping[str, int]:
    inputs = pretended.batches[0]
    words = inputs.get("input_ids")
    num_tokens = words.numel() if words is not None else _num_patches(pretended)
    half = config.trainer.precision != "fp32" or getattr(config.weights, "dtype", "fp32") != "fp32"
    return accounting(pretended.network, num_tokens, 2 if half else 4)


def _num_patches(pretended: Pretended) -> int:
    """Tokens of an image batch: what the first linear layer gets."""
    seen: list[int] = []
    first = next(module for module in pretended.network.modules() if isinstance(module, nn.Linear))

    def note(_module: nn.Module, args: Any) -> None:
        tensor = next(plain_tensors(args))
        seen.append(tensor.numel() // tensor.shape[-1])

    handle = first.register_forward_pre_hook(note)
    with pretended.context():
        pretended.losses[0]()
    handle.remove()
    return seen[0]
