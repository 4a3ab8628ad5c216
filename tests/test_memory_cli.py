"""velora-memory as a user's process runs it."""

from __future__ import annotations

import json

import pytest

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fit", "much"], "is not an amount of memory"),
        (["method=veloar"], "method=veloar is not known"),
        (["activations.sub_token_size=7"], "does not divide the width"),
        (["--save", "taken/below", "method=full"], "cannot be written"),
    ],
)
def test_refused_with_one_sentence(cli, arguments: list[str], said: str) -> None:
    (cli.folder / "taken").write_text("a file")
    done = cli("--no-ledger", *arguments, program=PROGRAM)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick_and_names_the_options(cli) -> None:
    done = cli("--help", program=PROGRAM, timeout=20)
    assert done.returncode == 0
    assert "--fit" in done.stdout
    assert "--measure" in done.stdout


def _read(path) -> dict:
    return json.loads(path.read_text())
