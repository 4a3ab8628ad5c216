"""MMLU's keys: which questions, in which words, with how many examples before them; and the task that only evaluates.

A task that trains holds the same keys as one of its sections (`task.mmlu`), and is evaluated with the same code
(velora/eval/mmlu.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from velora.config.model import limits_of
from velora.config.parts import Head, Task, TaskData

if TYPE_CHECKING:
    from velora.config.run import Config

Split = Literal["test", "val"]

_BY_CATEGORY = {
    "stem": "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics high_school_physics "
    "high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
CATEGORIES: dict[str, str] = {
    subject: category for category, subjects in _BY_CATEGORY.items() for subject in subjects.split()
}
"""Subject -> category, by the table of the benchmark's authors (anatomy is in `other`; lm-evaluation-harness has it in STEM)."""

SUBJECTS = tuple(sorted(CATEGORIES))
NUM_DEV = 5  # examples of each subject's dev split


class MMLUKeys(BaseModel):
    """Which questions of MMLU are asked, and how.

    `prompt`: "hendrycks" is the original program's text (two blanks before the subject's name; whole examples are dropped
    from the end where a prompt is too long), "lm_eval" that of lm-evaluation-harness's `mmlu`. `questions`: so many in place of
    all, drawn uniformly over all subjects with `sample_seed`: a sample is the same in every run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str  # below data.root
    hub: str
    revision: str | None
    prompt: Literal["hendrycks", "lm_eval"]
    num_shots: int = Field(ge=0, le=NUM_DEV)
    split: Split
    subjects: list[str] | None
    questions: PositiveInt | None
    sample_seed: NonNegativeInt
    max_length: PositiveInt

    @property
    def chosen(self) -> tuple[str, ...]:
        """The subjects in the order in which they are asked."""
        return SUBJECTS if self.subjects is None else tuple(sorted(set(self.subjects)))

    def faults(self, prefix: str, config: Config) -> Iterator[str]:
        """Sentences about keys that cannot be; `prefix` is their section ("task", "task.mmlu")."""
        if self.subjects is not None and not self.subjects:
            yield f"{prefix}.subjects=[] asks nothing; name subjects, or give null for all {len(SUBJECTS)}"
        for name in self.subjects or []:
            if name not in CATEGORIES:
                close = difflib.get_close_matches(name, SUBJECTS, n=1) or [SUBJECTS[0]]
                yield f"{prefix}.subjects: {name} is no subject of MMLU; did you mean {close[0]}?"
        if getattr(config.model, "path", None) is None:  # else its config.json tells, when it is loaded
            positions = limits_of(getattr(config.model, "architecture", None)).positions
            if sentence := too_long(self.max_length, positions, prefix, config):
                yield sentence
        root = config.data.root
        if root is not None and root.is_dir():
            yield from self._missing(root, prefix)

    def files(self, root: Path) -> dict[str, tuple[Path, Path]]:
        """Each chosen subject's files: the examples, and the questions."""
        folder = root / self.folder
        return {
            name: (folder / "dev" / f"{name}_dev.csv", folder / self.split / f"{name}_{self.split}.csv")
            for name in self.chosen
        }

    def _missing(self, root: Path, prefix: str) -> Iterator[str]:
        if not (root / self.folder).is_dir():
            yield (
                f"data.root={root} has no folder {self.folder} ({prefix}.folder) with MMLU's dev/, val/ and test/; give "
                "another data.root, or leave it out to read the hub"
            )
            return
        known = [name for name in self.chosen if name in CATEGORIES]
        missing = [path for name in known for path in self.files(root)[name] if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more files are" if len(missing) > 1 else " is"
            yield f"{missing[0]}{more} missing; put them there, or choose others with {prefix}.subjects"


def too_long(max_length: int, positions: int | None, prefix: str, config: Config) -> str | None:
    """The sentence for prompts that may be longer than the network's positions."""
    if positions is None or max_length <= positions:
        return None
    return (
        f"{prefix}.max_length={max_length} is more than the {positions} positions of model={config.model.name}; give at "
        "most that many (a prompt that is longer loses whole examples)"
    )


class MMLU(MMLUKeys, Task):
    """The task that only evaluates: `trainer.max_steps=0`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    evaluates_alone: ClassVar[bool] = True

    kind: Literal["mmlu"]

    def head(self, config: Config) -> Head:
        return Head("causal_lm")

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from self.faults("task", config)
        if config.trainer.max_steps != 0:
            yield (
                f"trainer.max_steps={config.trainer.max_steps}: task={self.name} has nothing to train on; give "
                "trainer.max_steps=0, or a task that trains"
            )

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.eval.mmlu import evaluation_only

        return evaluation_only(self, preprocessor, config)

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        return dict.fromkeys(("input_ids", "attention_mask"), ((batch_size, self.max_length), "int64"))
