"""velora-bench: that it runs, what it records, and what it refuses. No times are asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from velora import bench


def test_record(tmp_path, capsys):
    pytest.importorskip("peft.tuners.lora.velora")
    file = tmp_path / "new" / "bench.json"
    assert bench.main(["--shape", "16,12,8,3", "--shape", "4,8,6,1", "--repeats", "2", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert [row["shape"] for row in record["results"]] == [
        {"N": 16, "D": 12, "M": 8, "G": 3},
        {"N": 4, "D": 8, "M": 6, "G": 1},
    ]
    for row in record["results"]:
        medians = row["median_milliseconds"]
        assert list(medians) == ["nn.Linear", "VeloraLinear", "rebuilt", "PEFT"]
        for other, ratio in row["velora_linear_relative_to"].items():
            assert ratio == pytest.approx(medians["VeloraLinear"] / medians[other])
        assert row["weight_gradient_difference"] < 1e-6  # fp32: the same sums in another order
    assert {"device", "threads", "torch", "load_average"} <= record["machine"].keys()
    printed = capsys.readouterr().out
    assert "16, 12, 8, 3" in printed
    assert "/ nn.Linear" in printed


def test_candidates_run_in_turn():
    import torch

    order = []
    candidates = {name: lambda name=name: order.append(name) for name in ("VeloraLinear", "other")}
    bench.timed(candidates, repeats=2, device=torch.device("cpu"))
    assert order == ["VeloraLinear", "other"] * (bench.WARM_UP + 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "1,2,3"], "must be four integers"),
        (["--shape", "4,8,4,3"], "G=3 must divide D=8"),
        (["--repeats", "0"], "must be a positive integer"),
        (["--dtype", "int8"], "invalid choice"),
        (["sideways"], "invalid choice"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_a_missing_device_is_one_sentence(capsys):
    assert bench.main(["--device", "warp", "--shape", "4,8,4,2"]) == 2
    assert "velora-bench: --device warp is not available here" in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = (
        "import sys, velora.bench as b\n"
        "try: b.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "operator", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "file").write_text("")
    assert bench.main(["--json", str(tmp_path / "file" / "bench.json")]) == 2
    assert bench.main(["--json", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("velora-bench: --json ") and "cannot be written" in line for line in said)
