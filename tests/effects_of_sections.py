"""Entries of test_settings_have_effect.py for the keys that belong to no value of a group: trainer, sweep and the top level."""

from __future__ import annotations

from effects_helpers import Arguments, Label, Network, Read

TRAINER = {
    "num_epochs": Arguments(3.0, "trainer.max_steps=null trainer.num_epochs=2"),
    "max_steps": Arguments(7),
    "batch_size": Arguments(8),
    "micro_batch_size": Arguments(2),
    "eval_batch_size": Arguments(3),
    "drop_last": Arguments(True),
    "learning_rate": Arguments(0.5),
    "weight_decay": Network(0.5),
    "warmup_steps": Arguments(3, "trainer.warmup_ratio=0"),
    "warmup_ratio": Arguments(0.5, "trainer.warmup_steps=0"),
    "schedule": Arguments("constant", "trainer.min_lr_ratio=0"),
    "min_lr_ratio": Arguments(0.5),
    "max_grad_norm": Arguments(0.5),
    "precision": Arguments("bf16"),
    "eval_every": Arguments(5),
    "save_every": Arguments("end"),
    "log_every": Arguments(3),
    "num_workers": Arguments(2),
    "compile": Arguments(True),
    "save_model": Read("run/run.py"),  # test_run
    "device": Read("device.py"),  # test_memory_cli
    "measure_memory": Read("train.py"),  # test_run
    "sharding": Read("run/train.py"),  # test_sharding
}

SECTIONS = {
    "name": Read("config/run.py"),  # the folder of the run: test_record
    "seed": Network(5),
    "runs_dir": Read("config/run.py"),  # likewise
    "resume": Read("record.py"),
    "overwrite": Read("record.py"),
    "objective": Read("velora/cli.py"),  # test_cli
    "method.name": Label(),
    "experiment.name": Label(),
    "experiment.table": Label(),
    "experiment.row": Label(),
    "experiment.level": Read("config/run.py"),  # has_only_shapes: test_shapes
    "experiment.searched": Read("report/paper.py"),  # test_report_tables
    "experiment.judged_by": Read("config/level.py"),  # test_tables
    "experiment.published": Label(),
    "experiment.inferred": Label(),
    "experiment.unknown": Label(),
    "experiment.note": Label(),
    "experiment.settings": Read("compose.py"),  # test_experiments
    "experiment.paper": Read("memory/explain.py"),  # test_paper, test_report
    "data.root": Read("data/glue.py"),  # test_task_glue, test_vtab, test_task_c4
    "wandb.mode": Read("run/tracker.py"),
    "wandb.project": Read("tracker.py"),
    "wandb.entity": Read("tracker.py"),
    "wandb.tags": Read("tracker.py"),
}

# How the runs of a sweep are carried out: test_sweep, test_sweep_engines
SWEEP = {
    "name": Read("sweep/launcher.py"),
    "jobs": Read("sweep/sweep.py"),
    "retry": Read("sweep/sweep.py"),
    "on_failure": Read("sweep/sweep.py"),
    "cluster": Read("sweep/sweep.py"),
    "cluster_options": Read("sweep/sweep.py"),
}
