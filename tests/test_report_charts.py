"""The charts of a report as numbers, and the letters of its marks."""

from __future__ import annotations

from report_helpers import write, write_sweep

from velora.report.charts import MOST_POINTS, charts, on_frontier, sweeps, thinned
from velora.report.records import read_records
from velora.report.table import Notes, letters


def test_letters_go_on_after_z():
    assert [letters(number) for number in (0, 25, 26, 51, 52, 701, 702)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]
    notes = Notes()
    assert [notes.mark("x"), notes.mark("y"), notes.mark("x")] == ["a", "b", "a"]


def test_charts_of_a_sweep(tmp_path):
    write_sweep(tmp_path, (32, 8, 16))
    (chart,) = sweeps(read_records(tmp_path)[0])
    assert chart["ticks"] == [8.0, 16.0, 32.0]
    score, kept = chart["series"]
    assert (score["x"], score["y"], score["axis"]) == ([8.0, 16.0, 32.0], [0.892, 0.884, 0.868], "y")
    assert (kept["x"], kept["y"], kept["axis"]) == ([8.0, 16.0, 32.0], [200.0, 150.0, 125.0], "y2")
    loss, frontier, _ = charts(read_records(tmp_path)[0])
    assert [len(series["x"]) for series in loss["series"]] == [5, 1] * 3
    assert {series["label"] for series in frontier["series"]} == {
        f"velora, sub_token_size {size}" for size in (8, 16, 32)
    }


def test_what_no_other_point_beats():
    assert on_frontier([(3, 3), (1, 1), (2, 0.5), (2, 2), (3, 1), (4, 3)]) == [(1, 1), (2, 2), (3, 3)]
    assert on_frontier([(1, 1), (1, 1)]) == [(1, 1)]


def test_frontiers_are_of_one_device(tmp_path):
    for method, device in (("a", "one"), ("b", "one"), ("c", "two"), ("d", None)):
        write(
            tmp_path,
            method,
            method=method,
            device=device,
            memory={"saved_for_backward_bytes": 5},
            speed={"tokens_per_second": 1.0},
        )
    (frontier,) = charts(read_records(tmp_path)[0])  # two and None have one point each: nothing to weigh up
    assert [series["label"] for series in frontier["series"]] == ["a", "b"]


def test_long_curves_are_thinned_out():
    curve = [(step, 1.0) for step in range(3 * MOST_POINTS + 1)]
    short = thinned(curve)
    assert len(short) <= MOST_POINTS + 1
    assert (short[0], short[-1]) == (curve[0], curve[-1])
    assert thinned(curve[:MOST_POINTS]) == curve[:MOST_POINTS]
