"""The tables of runs in the documentation are those of the records."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from make_result_tables import PAGES, RECORDS, updated

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_records(page):
    text = (ROOT / page).read_text()
    assert updated(text) == text, "run python docs/make_result_tables.py"


def test_every_record_that_a_table_names_is_in_it():
    """Read once more without velora: the score of each run, in the table of its task."""
    text = (ROOT / "docs" / "results.md").read_text()
    places = {
        "sst2_minilm": "accuracy",
        "glue_minilm/glue/mrpc": "f1",
        "glue_minilm/glue/stsb": "pearson",
        "vtab_scratch": "accuracy",
    }
    for folder, score in places.items():
        for file in (RECORDS / folder).rglob("result.json"):
            record = json.loads(file.read_text())
            value = f"{record['metrics'][score]:.4g}"
            rows = [line.replace(" ", "") for line in text.splitlines() if line.startswith("| ")]
            assert [row for row in rows if f"|{record['method']}|" in row and f"|{value}|" in row], file


def test_a_table_that_is_not_there_is_an_error():
    with pytest.raises(KeyError):
        updated("<!-- runs: smoke | embedded, no_such_model | method -->\n<!-- end -->")
    with pytest.raises(ValueError, match="no_such_column"):
        updated("<!-- runs: smoke | embedded, llama_tiny, smoke | no_such_column -->\n<!-- end -->")
    assert updated("<!-- step: x -->\n<!-- end -->") == "<!-- step: x -->\n<!-- end -->"


def test_no_record_is_kept_out_of_the_history():
    """A pattern of .gitignore that is too wide has hidden rows from everybody but the machine that made them."""
    files = [str(file) for file in RECORDS.rglob("result.json")]
    found = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"],
        input="\n".join(files),
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode == 128:
        pytest.skip("this is no git checkout")
    assert not found.stdout, "ignored by .gitignore"
