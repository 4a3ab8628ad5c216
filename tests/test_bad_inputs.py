"""Everything that a user can get wrong on the command line, in a file or in the environment, in one table.

Each case is what `velora-train` is given and what the sentence must say. For all of them: exit status 2, one line on stderr,
nothing written, and training is never reached. The cases run in this process; that it answers before the heavy imports is
tested in test_cli.py.

To add a case, add an entry: `Bad(overrides, says, files=..., environment=...)`. Wrong choices, keys and values are below; how the
command line is written, files, plug-ins and the environment are in bad_inputs_sources.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from bad_inputs_sources import FILES, GRAMMAR, PLUGINS, RANKS, Bad

from velora.cli import train

CHOICES = {
    "unknown method": Bad("method=veloar", ("method=veloar is not known", "did you mean velora?")),
    "unknown model": Bad("model=llama_61m", ("model=llama_61m is not known", "llama_60m")),
    "unknown task": Bad("task=glue/sst3", ("task=glue/sst3 is not known", "did you mean glue/sst2?")),
    "a folder of values": Bad("experiment=table1", ("experiment=table1 is a folder", "table1/velora")),
    "a folder as group": Bad("task/glue=cola", ("task/glue=cola", "choose with task=glue/cola")),
    "nothing as method": Bad("method=null", ("method=null chooses nothing", "leave it out", "lora_velora")),
    "nothing as experiment": Bad("experiment=null", ("experiment=null chooses nothing", "leave it out")),
    "a number as task": Bad("task=5", ("task=5 is not known", "glue/sst2")),
    "keys for a group": Bad("trainer={max_steps:1}", ("trainer is a group", "set trainer.<key>=...")),
    "a list for a group": Bad("method=[velora,lora]", ("a run has one method", "-m method=velora,lora")),
    "method left out": Bad("~method", ("method is missing",)),
    "trainer left out": Bad("~trainer", ("trainer.precision is missing",)),
    "a key left out": Bad("~trainer.batch_size", ("trainer.batch_size is missing",)),
    "unknown launcher": Bad("hydra/launcher=slurm", ("hydra/launcher=slurm is not known", "basic")),
    "unknown configuration": Bad("--config-name=mine", ("--config-name mine", "no such file")),
    "task for another family": Bad(
        "task=glue/sst2 model=llama_tiny", ("task=glue/sst2 needs a model", "choose another model or task")
    ),
    "model without a path": Bad("model=causal_lm", ("model.path has no value", "give model.path=")),
    "pretrained without a path": Bad(
        "model=llama_60m model.pretrained=true", ("model.pretrained=true", "model.path=DIR")
    ),
}

KEYS = {
    "misspelt key": Bad("trainer.lerning_rate=1", ("trainer.lerning_rate is not a key", "trainer.learning_rate?")),
    "added key": Bad("+trainer.lerning_rate=1", ("trainer.lerning_rate is not a key", "trainer.learning_rate?")),
    "lr": Bad("trainer.lr=1e-3", ("trainer.lr is not a key", "did you mean trainer.learning_rate?")),
    "bare lr": Bad("lr=1e-3", ("lr is not a key", "did you mean trainer.learning_rate?")),
    "epochs": Bad("trainer.epochs=3", ("did you mean trainer.num_epochs?",)),
    "bs": Bad("bs=3", ("did you mean trainer.batch_size?",)),
    "grad_accum": Bad("trainer.grad_accum=2", ("did you mean trainer.micro_batch_size?",)),
    "wd": Bad("trainer.wd=0.1", ("did you mean trainer.weight_decay?",)),
    "warmup": Bad("trainer.warmup=10", ("did you mean trainer.warmup_steps?",)),
    "lora_alpha": Bad("method=lora adapter.lora_alpha=8", ("did you mean adapter.alpha?",)),
    "renamed key": Bad(
        "trainer.gradient_accumulation_steps=2", ("is no key any more", "give trainer.micro_batch_size")
    ),
    "another section": Bad("batch_size=2", ("batch_size is not a key", "did you mean trainer.batch_size?")),
    "far from every key": Bad("qwertz=1", ("qwertz is not a key of this configuration", "--cfg job")),
    "another value's key": Bad(
        "method=lora_velora activations=exact activations.layers=[value]",
        ("activations.layers is a key of activations=velora", "the command line sets it"),
    ),
    "moved value": Bad(
        "method=lora activations=checkpoint",
        ("activations=checkpoint is no value of activations any more", "recompute=blocks"),
    ),
    "moved kind": Bad("activations.kind=checkpoint", ("activations.kind=checkpoint is no kind", "recompute=blocks")),
    "moved key": Bad("method=checkpoint activations.use_reentrant=false", ("is no key any more", "recompute=blocks")),
    "moved key, added": Bad("+activations.use_reentrant=true", ("is no key any more", "leave it out")),
    "key of a value not chosen": Bad(
        "method=full activations.layers=[value]", ("activations.layers is a key of another value", "activations=...")
    ),
    "embedded task": Bad("task=embedded +task.options.manul.max_length=9", ("task.options.manul is not", "manual")),
    "embedded task's key": Bad(
        "task=embedded +task.options.manual.max_lenght=9", ("manual.max_lenght is not", "options.manual.max_length?")
    ),
    "embedded task of another family": Bad(
        "task=embedded +task.options.topics.num_topiks=9", ("options.topics.num_topiks", "options.topics.num_topics?")
    ),
    "entry of a size": Bad(
        "activations.sub_token_size={value:8,down:8,upp:16}",
        ("activations.sub_token_size.upp=16", "activations.layers=['value', 'down'] does not name upp"),
    ),
    "misspelt entry of a size": Bad(
        "activations.sub_token_size={value:8,dwon:16}", ("sub_token_size.dwon=16", "did you mean down?")
    ),
    "entry of a size for all": Bad(
        "activations.layers=[all] activations.sub_token_size={valeu:8}", ("sub_token_size.valeu=8", "mean value?")
    ),
}

VALUES = {
    "wrong type": Bad("trainer.batch_size=many", ("trainer.batch_size=many", "integer")),
    "negative": Bad("trainer.batch_size=-1", ("trainer.batch_size=-1", "greater than 0")),
    "true as integer": Bad("trainer.batch_size=true", ("trainer.batch_size=true is not valid", "an integer")),
    "true as number": Bad("trainer.learning_rate=true", ("trainer.learning_rate=true is not valid", "a number")),
    "true as interval": Bad("trainer.eval_every=true", ("trainer.eval_every=true", "a number of steps")),
    "one as truth": Bad("trainer.compile=1", ("trainer.compile=1 is not valid", "true or false")),
    "float as integer": Bad("trainer.max_steps=10.0", ("trainer.max_steps=10.0 is not valid", "an integer")),
    "float as rank": Bad("method=galore optimizer.rank=1.0", ("optimizer.rank=1.0", "an integer or less than 1")),
    "cosine": Bad(
        "method=q_galore optimizer.cos_threshold=1.5", ("optimizer.cos_threshold=1.5", "less than or equal to 1")
    ),
    "length of a queue": Bad("method=q_galore optimizer.queue_size=0", ("optimizer.queue_size=0", "greater than 0")),
    "selection of rows": Bad(
        "method=grass optimizer.selection=best", ("optimizer.selection=best", "'top' or 'sampled'")
    ),
    "factors without VeLoRA": Bad(
        "method=grass_velora_factored activations=exact",
        ("optimizer.factored=true", "activations=exact", "use activations=velora"),
    ),
    "factors of a moving direction": Bad(
        "method=grass_velora_factored activations.init=running_average",
        ("activations.init=running_average", "hold for one direction", "use activations.init=fixed_average"),
    ),
    "factors at once": Bad(
        "method=grass_velora optimizer.factored=true", ("optimizer.layerwise=false", "set optimizer.layerwise=true")
    ),
    "factors of a traced layer": Bad(
        "method=grass_velora_factored trainer.compile=true", ("trainer.compile=true", "set trainer.compile=false")
    ),
    "text as integer": Bad(
        "trainer.batch_size='16'", ("trainer.batch_size=16", "an integer; leave out the quotes", "${oc.decode:")
    ),
    "number as text": Bad("name=5", ("name=5 is not valid", "write it in quotes: 'name=\"5\"'")),
    "number as path": Bad("data.root=5", ("data.root=5", "'data.root=\"5\"'")),
    "number in a list of texts": Bad("activations.layers=[1]", ("activations.layers.0=1", 'in quotes: "1"')),
    "text as list": Bad("wandb.tags=first", ("wandb.tags=first", "a list, like [a,b]")),
    "nothing as integer": Bad("seed=null", ("seed=null", "an integer")),
    "text for a section": Bad("wandb=disabled", ("wandb=disabled", "give wandb.<key>=...")),
    "half a step": Bad("trainer.eval_every=1.5", ("trainer.eval_every=1.5", "a fraction of the run below 1")),
    "one as a fraction": Bad("trainer.save_every=1.0", ("trainer.save_every=1.0", "a fraction of the run below 1")),
    "nan interval": Bad("trainer.eval_every=nan", ("trainer.eval_every=nan", "a finite number")),
    "inf interval": Bad("trainer.eval_every=inf", ("trainer.eval_every=inf", "a finite number")),
    "inf eps": Bad("optimizer.eps=inf", ("optimizer.eps=inf", "a finite number")),
    "nan learning rate": Bad("trainer.learning_rate=nan", ("trainer.learning_rate=nan", "a finite number")),
    "nan in a list": Bad("optimizer.betas=[0.9,nan]", ("optimizer.betas.1=nan", "a finite number")),
    "inf inside": Bad("model.architecture.rms_norm_eps=inf", ("model.architecture.rms_norm_eps=inf", "finite")),
    "beyond 64 bits": Bad("trainer.num_workers=10000000000000000000", ("trainer.num_workers=1000", "64 bits")),
    "empty path": Bad("data.root=", ("data.root= is empty",)),
    "empty folder": Bad("runs_dir=", ("runs_dir= is empty",)),
    "path that is too long": Bad(f"data.root={'a' * 400}", ("data.root=aaa", "is not a folder")),
    "model path that is too long": Bad(f"model.path={'a' * 400}", ("model.path=aaa", "cannot be read")),
    "convnet's weights": Bad(
        "task=digits model=resnet_tiny model.path=x.npz",
        ("model.path=x.npz is no file with weights", "give a .safetensors file"),
        files={"x.npz": b"x"},
    ),
    "convnet's published weights": Bad(
        "task=digits model=resnet_tiny model.pretrained=true",
        ("model.pretrained=true with model.overrides=", "set model.pretrained=false"),
    ),
    "a convnet reads no text": Bad(
        "model=resnet_tiny task=manual", ("task=manual needs a model for causal_lm", "resnet_tiny")
    ),
    "patch size": Bad("task=digits method=full model.overrides={patch_size:x}", ("model.overrides.patch_size=x",)),
    "moment out of range": Bad("optimizer.betas=[0.9,1.5]", ("optimizer.betas.1=1.5", "less than 1")),
    "one moment": Bad("optimizer.betas=[0.9]", ("optimizer.betas.1 is missing",)),
    "unknown word": Bad("trainer.schedule=cosin", ("trainer.schedule=cosin", "'linear', 'cosine' or 'constant'")),
    "objective": Bad("objective=accuracy", ("objective=accuracy is not a score", "like metrics.accuracy")),
    "no data folder": Bad("data.root=nowhere", ("data.root=nowhere is not a folder", "leave it out")),
    "name outside": Bad("name=a/../../b", ("name=a/../../b leaves runs_dir", "without ..")),
    "nothing to continue": Bad("resume=required", ("resume=required", "resume=auto")),
    "no branch": Bad("method=multilora adapter.num_branches=0", ("adapter.num_branches=0", "greater than 0")),
    "no head": Bad("method=lte adapter.num_heads=0", ("adapter.num_heads=0", "greater than 0")),
    "no round": Bad("method=qpissa adapter.pissa_rounds=0", ("adapter.pissa_rounds=0", "greater than 0")),
    "no such package": Bad("adapter.kind=nowhere.to.be.found", ("adapter.kind=nowhere.to.be.found", "import path")),
    "no kind": Bad("adapter.kind=_inserted", ("adapter.kind=_inserted is not known", "lora")),
    "class of ours": Bad(
        "optimizer.kind=velora.config.optimizer.AdamW", ("is a class; give its module: optimizer.kind=adamw",)
    ),
}

TOGETHER = {
    "frozen int8 weights": Bad(
        "method=lora weights=int8",
        ("weights=int8 with adapter=lora: int8 weights are there to be trained", "weights=nf4"),
    ),
    "int8 weights with another optimiser": Bad(
        "method=q_galore optimizer=galore", ("weights=int8 with optimizer=galore: only Q-GaLore", "or weights=dense")
    ),
    "compiled int8 weights": Bad(
        "method=q_galore trainer.compile=true", ("trainer.compile=true with weights=int8", "set trainer.compile=false")
    ),
    "int8 weights in two halves": Bad(
        "method=q_galore weights.dtype=fp16 trainer.precision=fp16",
        ("weights.dtype=fp16 with trainer.precision=fp16", "set weights.dtype=fp32"),
    ),
    "heads that do not divide": Bad(
        "method=lte adapter.num_heads=3 trainer.micro_batch_size=4",
        ("adapter.num_heads=3", "the 4 examples", "trainer.micro_batch_size=4", "give another number"),
    ),
    "heads over four bits": Bad("method=lte weights=nf4", ("adapter=lte with weights=nf4", "use weights=dense")),
    "both sizes": Bad("activations.num_groups=4", ("both are given", "set the other to null")),
    "no size": Bad("activations.sub_token_size=null", ("none is given", "exactly one")),
    "no end": Bad("trainer.max_steps=null", ("trainer.max_steps=null", "give one of them")),
    "both warm-ups": Bad(
        "trainer.warmup_steps=5 trainer.warmup_ratio=0.1", ("trainer.warmup_ratio=0.1: both are given", "to 0")
    ),
    "minimum of a linear schedule": Bad(
        "trainer.schedule=linear trainer.min_lr_ratio=0.2", ("trainer.min_lr_ratio=0.2 has no effect", "cosine")
    ),
    "nowhere to move inputs to": Bad(
        "recompute=blocks recompute.offload=true trainer.device=cpu",
        ("recompute.offload=true has no effect with trainer.device=cpu", "leave it out"),
    ),
    "layers of an adapter without targets": Bad(
        "method=lora_velora adapter=ssf", ("activations.layers=null", "activations.layers=[value,down]")
    ),
    "tokenizer for a package": Bad(
        "task=topics model=minilm model.tokenizer=byte", ("model.tokenizer=byte: model=minilm", "model=encoder")
    ),
    "tokenizer for the package of a decoder": Bad(
        "model=smollm2_135m model.tokenizer=byte", ("model.tokenizer=byte: model=smollm2_135m", "model=causal_lm")
    ),
    "folder for the package of a decoder": Bad(
        "model=smollm2_135m model.path=.", ("model.path=.: model=smollm2_135m", "model=causal_lm")
    ),
    "package of a decoder without its architecture": Bad(
        "model=smollm2_135m model.architecture=null",
        ("model.architecture=null: model=smollm2_135m", "leave it as it is"),
    ),
    "instructions that are not there": Bad(
        "task=alpaca method=lora data.root=.", ("data.root=. has no alpaca/alpaca_data.json", "task.file=NAME")
    ),
    "instructions of another name": Bad(
        "task=alpaca method=lora data.root=. task.file=x.json",
        ("data.root=. has no alpaca/x.json", "another data.root"),
    ),
    "more evaluated than held out": Bad(
        "task=alpaca method=lora task.eval_size=2000", ("task.eval_size=2000 is more than", "task.held_out=1024")
    ),
    "loss on nothing": Bad("task=alpaca method=lora task.train_on=prompt", ("task.train_on=prompt", "answer")),
    "instructions of one token": Bad(
        "task=alpaca method=lora task.max_length=1", ("task.max_length=1", "give at least 2")
    ),
    "nothing held out": Bad("task=alpaca method=lora task.held_out=0", ("task.held_out=0", "greater than")),
    "nothing to train": Bad("trainer.max_steps=0", ("trainer.max_steps=0: task=manual has no scores", "at least 1")),
    "nothing to train on": Bad(
        "task=mmlu model=llama_60m task.max_length=1024 trainer.max_steps=5",
        ("trainer.max_steps=5: task=mmlu has nothing to train on", "trainer.max_steps=0"),
    ),
    "prompts longer than the network": Bad(
        "task=mmlu model=llama_60m", ("task.max_length=2048 is more than the 1024 positions of model=llama_60m",)
    ),
    "unknown subject": Bad(
        "task=mmlu model=llama_60m task.max_length=1024 task.subjects=[astronmy]",
        ("task.subjects: astronmy is no subject of MMLU", "did you mean astronomy?"),
    ),
    "no subject": Bad(
        "task=mmlu model=llama_60m task.max_length=1024 task.subjects=[]",
        ("task.subjects=[] asks nothing", "null for all 57"),
    ),
    "more shots than there are": Bad(
        "task=mmlu model=llama_60m task.max_length=1024 task.num_shots=6",
        ("task.num_shots=6", "less than or equal to 5"),
    ),
    "no folder of questions": Bad(
        "task=mmlu model=llama_60m task.max_length=1024 data.root=data",
        ("data.root=data has no folder mmlu (task.folder)", "leave it out to read the hub"),
        files={"data/x": ""},
    ),
    "a file of questions is missing": Bad(
        "task=mmlu model=llama_60m task.max_length=1024 data.root=data task.subjects=[anatomy]",
        ("data/mmlu/test/anatomy_test.csv is missing", "task.subjects"),
        files={"data/mmlu/dev/anatomy_dev.csv": "q,1,2,3,4,A\n"},
    ),
    "sketch of nothing": Bad(
        "method=flora optimizer.beta1=null optimizer.layerwise=true optimizer.sketched=all "
        "trainer.max_grad_norm=null trainer.micro_batch_size=8",
        ("optimizer.sketched=all has no effect with optimizer.beta1=null", "optimizer.sketched=past"),
    ),
    "several": Bad(
        "trainer.batch_size=0 ++optimizer.bettas=[0,0] activations.init=best",
        ("3 problems", "trainer.batch_size=0", "did you mean optimizer.betas?", "activations.init=best"),
    ),
}

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
FSDP = "trainer.sharding=fsdp"
SHARDED = {
    "int8 weights": Bad(
        "method=q_galore",
        ("weights=int8 in 2 processes", "train in one process, or use weights=dense"),
        environment=TWO,
    ),
    "in one process": Bad(FSDP, ("trainer.sharding=fsdp has no effect in one process", "torchrun")),
    "no training": Bad(
        f"task=mmlu trainer.max_steps=0 {FSDP}", ("no effect with trainer.max_steps=0",), environment=TWO
    ),
    "a benchmark": Bad(
        f"task=alpaca_mmlu {FSDP}", ("its benchmark needs a whole network", "task=mmlu"), environment=TWO
    ),
    "four bits": Bad(
        f"method=qlora {FSDP}", ("weights=nf4 with trainer.sharding=fsdp", "use weights=dense"), environment=TWO
    ),
    "heads": Bad(
        f"method=lte {FSDP}", ("adapter=lte with trainer.sharding=fsdp", "trainer.sharding=none"), environment=TWO
    ),
    "loss scaling": Bad(
        f"{FSDP} trainer.precision=fp16", ("trainer.precision=fp16 with", "bf16 or fp32"), environment=TWO
    ),
    "compiled": Bad(f"{FSDP} trainer.compile=true", ("trainer.compile=true with", "compile=false"), environment=TWO),
    **{
        optimizer: Bad(
            f"method=full optimizer={optimizer} trainer.max_grad_norm=null {FSDP}",
            (f"optimizer={optimizer} with trainer.sharding=fsdp: it needs whole parameters", "use optimizer=adamw"),
            environment=TWO,
        )
        for optimizer in ("adafactor", "adamw_8bit", "galore", "q_galore", "grass", "flora", "lomo")
    },
    "another word": Bad("trainer.sharding=zero3", ("trainer.sharding=zero3", "'none' or 'fsdp'")),
}

TABLES = {
    "choices": CHOICES, "keys": KEYS, "values": VALUES, "together": TOGETHER, "grammar": GRAMMAR, "files": FILES,
    "plugins": PLUGINS, "ranks": RANKS, "sharded": SHARDED,
}  # fmt: skip
CASES = {f"{table}: {name}": bad for table, cases in TABLES.items() for name, bad in cases.items()}


@pytest.fixture
def velora_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the console script in this process up to the point where it would train; gives exit status and stderr."""

    def not_refused(*_: object) -> None:
        raise AssertionError("the input was not refused: training would start")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the program sets it; this puts it back
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("velora.run.run.execute", not_refused)

    def run(bad: Bad) -> tuple[int | str | None, str]:
        for name, content in bad.files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        for name, value in bad.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("pack", "pack.plugin"):  # each case has its own
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr("sys.argv", ["velora-train", *bad.overrides.split()])
        with pytest.raises(SystemExit) as ended:
            train()
        return ended.value.code, capfd.readouterr().err

    return run


@pytest.mark.parametrize("case", CASES)
def test_refused_with_one_sentence(velora_train, case: str, tmp_path: Path) -> None:
    bad = CASES[case]
    status, said = velora_train(bad)
    assert status == 2, said
    for part in bad.says:
        assert part in said
    assert len(said.splitlines()) == 1
    assert re.match(r"velora-train: \S", said)
    assert "Traceback" not in said
    assert {path.name for path in (tmp_path / "runs").glob("*")} <= {".sweep"}  # which is Hydra's


def test_a_process_of_torchrun_and_a_run_of_one_process_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from velora.config.processes import check_processes

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    check_processes()
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    check_processes()
