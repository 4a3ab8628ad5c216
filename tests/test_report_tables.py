"""What stands in the tables of a report: rows, columns, levels, marks, differences and tests over seeds."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import stdev

import pytest
from report_helpers import write, write_sweep

from velora.report.differences import differing, headings, natural, points
from velora.report.records import Record, read_records
from velora.report.seeds import Spread, paired_values, spread
from velora.report.table import Table
from velora.report.tables import NO_REFERENCE, run_tables

RECORDS = Path(__file__).parent.parent / "runs" / "records"


def records(folder: Path) -> list[Record]:
    return read_records(folder)[0]


def rows(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.head, (cell.text for cell in row), strict=True)) for row in table.rows]


def meaning(table: Table, mark: str) -> str:
    return dict(table.notes)[mark]


# What differs


def test_a_sweep_has_a_column_for_its_key_in_natural_order(tmp_path):
    write_sweep(tmp_path, (32, 8, 16))
    (table,) = run_tables(records(tmp_path))
    assert [row["sub_token_size"] for row in rows(table)] == ["8", "16", "32"]
    assert [row["method"] for row in rows(table)] == ["velora"] * 3  # the name of the run is in no cell
    assert [row["saved for backward"] for row in rows(table)] == ["200 MiB", "150 MiB", "125 MiB"]


def test_two_keys_that_differ_are_two_columns(tmp_path):
    for rate in (1e-3, 2e-4):
        for size in (16, 8):
            config = {"activations.sub_token_size": size, "trainer.learning_rate": rate, "trainer.save_every": rate}
            write(tmp_path, f"{size}-{rate}", method="velora", config=config)
    keys, found = points(records(tmp_path))
    assert set(keys) == {
        "activations.sub_token_size",
        "trainer.learning_rate",
    }  # when a checkpoint is saved changes nothing
    place = [keys.index(key) for key in ("trainer.learning_rate", "activations.sub_token_size")]
    assert sorted((p.values[place[0]], p.values[place[1]]) for p in found) == [
        (2e-4, 8),
        (2e-4, 16),
        (1e-3, 8),
        (1e-3, 16),
    ]


def test_what_follows_from_the_method_has_no_column_and_what_the_user_chose_has(tmp_path):
    write(tmp_path, "a", method="full", config={"optimizer.kind": "adamw", "trainer.learning_rate": 1e-3})
    write(tmp_path, "b", method="galore", config={"optimizer.kind": "galore", "trainer.learning_rate": 2e-3})
    assert differing(records(tmp_path)) == ["trainer.learning_rate"]
    write(tmp_path, "c", method="galore", config={"optimizer.kind": "adamw_8bit", "trainer.learning_rate": 2e-3})
    assert set(differing(records(tmp_path))) == {"optimizer.kind", "trainer.learning_rate"}


def test_a_key_that_older_records_lack_is_no_difference(tmp_path):
    write(tmp_path, "a", config={"optimizer.fused": False})
    write(tmp_path, "b", seed=1)
    keys, (point,) = points(records(tmp_path)[:1])
    assert keys == []
    assert differing(records(tmp_path)) == []
    assert len(points(records(tmp_path))[1]) == 1
    assert point.label(keys) == "full"


def test_natural_order():
    values = ["m16", 32, None, 8, "m8", 0.5, "[value,down]", True]
    assert sorted(values, key=natural) == [None, 0.5, True, 8, 32, "[value,down]", "m8", "m16"]


def test_headings_are_short_where_they_stay_apart():
    keys = ["activations.kind", "adapter.kind", "trainer.max_steps", "adapter.rank", "optimizer.rank", "seed"]
    assert headings(keys) == ["activations.kind", "adapter.kind", "max_steps", "adapter.rank", "optimizer.rank", "seed"]


# Seeds


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    for place, seed, score in (("a", 0, 0.2), ("b", 0, 0.4), ("a", 1, 0.9)):
        write(tmp_path, place, seed=seed, metrics={"accuracy": score})
    found = spread(records(tmp_path), lambda record: record.scores["accuracy"])
    assert found == Spread(pytest.approx(0.6), pytest.approx(stdev([0.3, 0.9])), 2)  # of two seeds, not of three runs
    (row,) = rows(run_tables(records(tmp_path))[0])
    assert row["seeds"] == "2 (3 runs)"
    assert row["accuracy"] == f"0.6 ± {stdev([0.3, 0.9]):.2g}"


def test_paired_t_has_the_p_of_the_textbook():
    """With two degrees of freedom p = 1 - t / sqrt(2 + t^2); differences 1, 2, 3 have t = 2 sqrt(3)."""
    found = paired_values([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)])
    t = 2 * math.sqrt(3)
    assert found.t_p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)  # rounding of one float64 formula
    assert found.wilcoxon_p is None
    assert str(found) == "+2 ± 1, n=3: paired t p=0.074"


def test_wilcoxon_has_the_p_of_counting_signs():
    """Of the 64 sign patterns of six ranks, one has no negative rank sum; two have at most 1."""
    up = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert paired_values([(0.0, d) for d in up]).wilcoxon_p == pytest.approx(2 / 64)
    assert paired_values([(0.0, d) for d in (-0.1, *up[1:])]).wilcoxon_p == pytest.approx(4 / 64)
    assert paired_values([(0.0, d) for d in (0.1, 0.1, *up[2:])]).wilcoxon_p is None  # ties: another distribution


def test_too_few_pairs_are_no_test():
    assert paired_values([]) is None
    assert str(paired_values([(0.5, 0.75)])) == "+0.25, n=1 (too few for a test)"
    assert str(paired_values([(0.5, 0.75), (0.5, 0.5)])) == "+0.125 ± 0.18, n=2 (too few for a test)"
    same = paired_values([(0.1 * k, 0.1 * k + 0.3) for k in range(4)])
    assert same.t_p is None
    assert str(same).endswith("n=4 (all differences are the same: no test)")


def test_methods_are_compared_at_the_seeds_of_both(tmp_path):
    for seed, (full, lora) in enumerate([(0.1, 0.2), (0.2, 0.4), (0.3, 0.6), (0.9, None)]):
        write(tmp_path, "full", seed=seed, metrics={"accuracy": full})
        if lora:
            write(tmp_path, "lora", method="lora", seed=seed, metrics={"accuracy": lora})
    (table,) = run_tables(records(tmp_path))
    (said,) = table.remarks
    t = 0.2 / (stdev([0.1, 0.2, 0.3]) / math.sqrt(3))
    assert said.startswith("accuracy, lora less full, at the same seeds: +0.2 ± 0.1, n=3: paired t p=")
    assert float(said.rpartition("=")[2]) == pytest.approx(
        1 - t / math.sqrt(2 + t * t), rel=0.05
    )  # two digits are printed


# Runs without a result


def test_runs_without_a_result_are_marked_and_explained(tmp_path):
    write(tmp_path, "full", metrics={"accuracy": 0.5})
    write(tmp_path, "full", seed=1, status="failed", error="disk full")
    write(tmp_path, "lora", method="lora", status="diverged", error="loss is nan at step 3")
    write(tmp_path, "ssf", method="ssf", status="out_of_memory", error=None)
    (table,) = run_tables(records(tmp_path))
    by_method = {row["method"]: row for row in rows(table)}
    assert by_method["full"]["accuracy"] == "0.5"
    assert [by_method[m]["seeds"] for m in ("full", "lora", "ssf")] == ["1", "diverged", "out of memory"]
    assert [by_method[m]["accuracy"] for m in ("lora", "ssf")] == ["-", "-"]
    seeds = table.head.index("seeds")
    marks = [meaning(table, row[seeds].marks[0]) for row in table.rows]
    assert marks == [
        "full, seed 1, failed: disk full",
        "lora, seed 0, diverged: loss is nan at step 3",
        "ssf, seed 0, out of memory",
    ]


def test_speeds_of_two_devices_are_no_ratio(tmp_path):
    write(tmp_path, "full", speed={"tokens_per_second": 100.0}, device="cpu, 2 threads")
    write(tmp_path, "lora", method="lora", speed={"tokens_per_second": 150.0}, device="cpu, 2 threads")
    write(tmp_path, "ssf", method="ssf", speed={"tokens_per_second": 900.0}, device="a GPU")
    (table,) = run_tables(records(tmp_path))
    assert [row["tokens/s, full = 1"] for row in rows(table)] == ["1.00", "1.50", "-"]
    assert [row["device"] for row in rows(table)] == ["cpu, 2 threads", "cpu, 2 threads", "a GPU"]
    (mark,) = table.rows[2][table.head.index("tokens/s, full = 1")].marks
    assert meaning(table, mark) == f"{NO_REFERENCE} (a GPU)"


def test_what_is_the_same_for_all_rows_is_said_once(tmp_path):
    write(tmp_path, "a", lines=7)
    assert run_tables(records(tmp_path))[0].about == [
        "All on cpu, 2 threads, 7 steps."
    ]  # as logged: 100 were configured
    write(tmp_path, "b", seed=1, device=None)
    (table,) = run_tables(records(tmp_path))
    assert (table.about, rows(table)[0]["steps"], rows(table)[0]["device"]) == ([], "7, 100", "cpu, 2 threads, -")
