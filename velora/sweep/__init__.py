"""Sweeps: `velora-train -m`, several runs under one name, which survive whatever ends one of them or all.

Hydra reads the overrides and makes the list of runs (its sweepers: the product of comma lists, Optuna); what it then calls a
launcher is ours:

    launcher.py   every run is composed and checked; all that is wrong is said before the first one starts
    sweep.py      one run after the other, or as many at once as there are GPUs, each in a process of its own
    workers.py    such a process, here or on a cluster: started, stopped, gone
    job.py        what runs inside of it
    state.py      which runs there are and how far they are, in one file that is replaced whole
    status.py     the line, the table, `velora-report --status`

What a run has reached stands in its own folder; the state adds only what no folder can say: which run failed, which was
stopped, which process is running which one.
"""
