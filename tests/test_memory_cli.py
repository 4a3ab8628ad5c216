"""velora-memory as a user's process runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from velora.memory.cli import main

PROGRAM = "velora-memory"


def test_one_configuration(cli) -> None:
    done = cli("method=velora", "trainer.device=cpu", program=PROGRAM)
    assert done.returncode == 0, done.stderr
    for text in ("peak", "activations", "saved for backward", "this configuration (velora)", "the paper's accounting"):
        assert text in done.stdout
    assert "warning: VeLoRA on value frees no memory: its input is also kept by query, key" in done.stdout
    assert not (cli.folder / "runs").exists()


def test_comparison_with_records_and_charts(cli) -> None:
    options = [
        "-m",
        "--fit",
        "256MiB",
        "--measure",
        "--save",
        "kept",
        "--storages",
        "method=full,velora_all",
        "trainer.device=cpu",
    ]
    done = cli(*options, program=PROGRAM)
    assert done.returncode == 0, done.stderr
    records = {record["method"]: record for record in map(_read, (cli.folder / "kept").glob("*.json"))}
    assert set(records) == {"full", "velora_all"}
    assert (cli.folder / "kept" / "peak.png").read_bytes().startswith(b"\x89PNG")
    assert (cli.folder / "kept" / "saved.png").read_bytes().startswith(b"\x89PNG")
    for record in records.values():
        assert record["estimate"]["peak_bytes"] == record["measured"]["peak_bytes"]
        assert record["estimate"]["peak_bytes"] == sum(record["estimate"]["peak_terms_bytes"].values())
        assert record["ledger"]["total_bytes"] == record["estimate"]["saved_for_backward_bytes"]
        assert sum(s["num_bytes"] for s in record["ledger"]["storages"]) == record["ledger"]["total_bytes"]
        assert record["command"] == "velora-memory " + " ".join(options)
        assert record["measured"]["rss_bytes"] > 0
    full, velora = records["full"], records["velora_all"]
    chosen = next(choice for choice in velora["freed"] if choice["choice"].startswith("this configuration"))
    assert full["ledger"]["total_bytes"] - velora["ledger"]["total_bytes"] == chosen["saved_bytes"]
    assert velora["largest_batch"] > full["largest_batch"] > 0


REFUSED = {
    "no amount": ("--fit much", "--fit 'much' is not an amount of memory"),
    "no memory": ("--fit 0", "--fit '0' is no memory at all"),
    "less than a byte": ("--fit 0.4", "--fit '0.4' is no memory at all"),
    "negative memory": ("--fit -1", "--fit '-1' is not an amount of memory"),
    "amount left out": ("--fit", "argument --fit: expected one argument"),
    "unknown option": ("--frobnicate", "unrecognized arguments: --frobnicate"),
    "unknown method": ("method=veloar", "method=veloar is not known"),
    "width": ("--no-ledger activations.sub_token_size=7", "does not divide the width"),
    "folder": ("--save taken/below method=full", "--save taken/below cannot be written"),
    "measure on a missing device": ("--measure trainer.device=cuda", "trainer.device=cuda: this machine has no CUDA"),
    "measure elsewhere": ("--measure --device cuda", "--device cuda with --measure: trainer.device=auto runs"),
    "measure what cannot run": ("--measure trainer.precision=fp16", "trainer.precision=fp16 scales the loss"),
    "never padded": ("--padded", "--padded: the batches of task=manual are never padded"),
    "batch": ("trainer.batch_size=1000000000000", "trainer.batch_size=1000000000000: words and labels of one step"),
    "many micro-batches": (
        "trainer.batch_size=1000000000000 trainer.micro_batch_size=1", "trainer.batch_size=1000000000000: words"
    ),
    "no record": ("--storages", "--storages goes into the record of --save DIR"),
    "no ledger": ("--by role --no-ledger", "--by is about the ledger"),
    "full rank": ("method=galore optimizer.rank=128", "rank 128 for model.layers.0.self_attn.q_proj of shape (128, 128)"),
    "all rows": ("method=grass optimizer.rank=128", "shape (128, 128); it must be between 1 and 127: a full rank saves"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_sentence(case: str, tmp_path: Path, monkeypatch, capfd) -> None:
    arguments, sentence = REFUSED[case]
    (tmp_path / "taken").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the program sets it; this puts it back
    monkeypatch.setattr("sys.argv", [PROGRAM])  # likewise
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("velora-memory: ")
    assert not said.out


def test_what_cannot_run_here_is_estimated_all_the_same(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", [PROGRAM])
    with pytest.raises(SystemExit) as ended:
        main(["--no-ledger", "trainer.precision=fp16", "trainer.device=cuda", "--fit", "1000TiB", "task.max_length=4"])
    assert ended.value.code == 0
    said = capfd.readouterr().out
    assert "on cuda" in said
    assert "largest batch within 1000 TiB: at least 1048576" in said  # where the search ends


def test_help_is_quick_and_names_the_options(cli) -> None:
    done = cli("--help", program=PROGRAM, timeout=20)
    assert done.returncode == 0
    assert "--fit" in done.stdout
    assert "--measure" in done.stdout


def _read(path) -> dict:
    return json.loads(path.read_text())
