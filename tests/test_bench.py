"""velora-bench: that it runs, what it records, and what it refuses. No times are asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from velora.bench import cli, machine, operator


def test_record(tmp_path, capsys):
    pytest.importorskip("peft.tuners.lora.velora")
    file = tmp_path / "new" / "bench.json"
    assert cli.main(["--shape", "16,12,8,3", "--shape", "4,8,6,1", "--repeats", "2", "--json", str(file)]) == 0
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


def test_convolutions(tmp_path, capsys):
    file = tmp_path / "conv.json"
    assert cli.main(["--conv", "2,16,6,8,4", "--repeats", "2", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["results"] == []
    (row,) = record["convolutions"]
    assert row["shape"] == {"N": 2, "C": 16, "P": 6, "M": 8, "G": 4}
    medians = row["median_milliseconds"]
    assert row["velora_conv_relative_to"] == {"nn.Conv2d": medians["VeloraConv2d"] / medians["nn.Conv2d"]}
    assert row["saved_bytes"] == {"nn.Conv2d": 2 * 16 * 36 * 4, "VeloraConv2d": 2 * 4 * 36 * 4}
    assert "2, 16, 6, 8, 4" in capsys.readouterr().out


def test_candidates_run_in_turn():
    import torch

    order = []
    candidates = {name: lambda name=name: order.append(name) for name in ("VeloraLinear", "other")}
    operator.timed(candidates, repeats=2, device=torch.device("cpu"))
    assert order == ["VeloraLinear", "other"] * (machine.WARM_UP + 2)


def test_what_follows_a_step_is_not_timed(monkeypatch):
    import torch

    now = [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        now[0] += seconds

    times = machine.in_turn(
        {"a": lambda: takes(2.0), "b": lambda: takes(3.0)}, 2, torch.device("cpu"), warm_up=1, tidy=lambda _name: takes(50.0)
    )  # fmt: skip
    assert times == {"a": [2.0, 2.0], "b": [3.0, 3.0]}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "1,2,3"], "must be four integers"),
        (["--shape", "4,8,4,3"], "G=3 must divide D=8"),
        (["--conv", "1,2,3,4"], "must be five integers"),
        (["--conv", "2,8,6,4,3"], "G=3 must divide C=8"),
        (["--repeats", "0"], "must be a positive integer"),
        (["--dtype", "int8"], "invalid choice"),
        (["sideways"], "invalid choice"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["step", "--model", "llama_60m,gpt"], "'gpt' is not one of llama_60m"),
        (["step", "--points", "velora_all+more"], "'velora_all+more' is not one of exact"),
        (["gpu", "--parts", "everything"], "'everything' is not one of tests"),
        (["gpu", "--minutes", "soon"], "must be a positive integer"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--points", "exact"], "--points has no effect on `operator`; it belongs to `step`"),
        (["step", "--shape", "4,8,4,2"], "--shape has no effect on `step`; it belongs to `operator`"),
        (["gpu", "--json", "file"], "--json has no effect on `gpu`; it belongs to `operator`, `step`"),
        (["operator", "seed=1"], "seed=1 has no effect on `operator`; it belongs to `step`"),
        (["step", "--json", "one.json"], "--json one.json is one file for 3 models; write {model} in its name"),
        (["step", "--model", "llama_tiny", "trainer.batch_sise=2"], "trainer.batch_sise"),
        (["gpu", "--device", "cpu"], "--device cpu runs the parts of `gpu` with --tiny only"),
        (["--device", "warp", "--shape", "4,8,4,2"], "--device warp is not available here"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(arguments, sentence, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("velora-bench: ")
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_without_a_gpu_its_benchmarks_are_one_sentence(capsys, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("velora-bench: --device cuda is not available here (")
    assert len(said.splitlines()) == 1


def test_help_does_not_import_torch():
    code = (
        "import sys, velora.bench.cli as b\n"
        "try: b.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("mode", ["operator", "step"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(mode, tmp_path, monkeypatch, capsys):
    from velora.bench import step

    monkeypatch.setattr(operator, "operator", lambda *_args, **_options: pytest.fail("it measured first"))
    monkeypatch.setattr(step, "compare_points", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "file").write_text("")
    more = ["--model", "llama_tiny"] if mode == "step" else []
    assert cli.main([mode, *more, "--json", str(tmp_path / "file" / "bench.json")]) == 2
    assert cli.main([mode, *more, "--json", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("velora-bench: --json ") and "cannot be written" in line for line in said)
