"""Whole tables of the paper as one command: `velora-train -m table=table2 level=small`.

    plan.py   which runs a table has at a level: rows, columns, seeds, and the values that are searched
    run.py    carries them out as one sweep (velora/sweep/)

What a table is stands in conf/table/; what became of it is said by `velora-report`.
"""
