"""Cases of test_bad_inputs.py where the fault lies in a source: the command line, a file, a plug-in, the environment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bad:
    overrides: str  # separated by blanks
    says: tuple[str, ...]  # parts of the sentence: the key or file with its value, and the remedy
    files: dict[str, str | bytes] = field(default_factory=dict)  # below the working directory
    environment: dict[str, str] = field(default_factory=dict)


def method_file(text: str | bytes) -> dict[str, str | bytes]:
    return {"mine/method/mine.yaml": text}


MINE = "--config-dir mine method=mine"

GRAMMAR = {
    "open bracket": Bad("trainer.batch_size=[1", ("trainer.batch_size=[1 cannot be read", "[ and ] do not match")),
    "brackets": Bad("trainer.max_steps=][", ("trainer.max_steps=][ cannot be read", "quoted")),
    "no value": Bad("trainer", ("trainer cannot be read", "write group=choice or key=value")),
    "no key": Bad("=3", ("=3 cannot be read", "is not a key")),
    "half a key": Bad("trainer.=3", ("trainer. before the = is not a key",)),
    "tilde in a path": Bad("data.root=~/data", ("data.root=~/data", "'data.root=\"~/data\"'")),
    "equals in a path": Bad("data.root=/a=b", ("data.root=/a=b", "'data.root=\"/a=b\"'")),
    "comma in a path": Bad("data.root=/a,b", ("data.root=/a,b", "'data.root=\"/a,b\"'", "-m")),
    "bracket in a path": Bad("data.root=/a(1)", ("data.root=/a(1)", "'data.root=\"/a(1)\"'")),
    "open bracket in a path": Bad("data.root=/a(1", ("data.root=/a(1", "'data.root=\"/a(1\"'")),
    "sweep without -m": Bad("trainer.batch_size=4,8", ("gives several values", "add -m")),
    "glob without -m": Bad("task=glob(glue/s*)", ("task=glob(glue/s*) gives several values", "add -m")),
    "open sweep": Bad("-m trainer.batch_size=range(1", ("trainer.batch_size=range(1", "( and ) do not match")),
    "unknown function": Bad("-m seed=rnge(1,2)", ("seed=rnge(1,2)", "Unknown function 'rnge'")),
    "empty sweep": Bad("-m seed=range(5,3)", ("seed=range(5,3)", "nothing would run")),
    "glob of a list without a match": Bad("-m task=glob([manul])", ("task=glob([manul]) matches nothing", "manual")),
    "glob that excludes all": Bad("-m task=glob(*,exclude=*)", ("task=glob(*,exclude=*) matches nothing", "manual")),
    "glob without a match": Bad("-m task=glob(gleu/*)", ("matches nothing", "glue/sst2")),
    "glob without a group": Bad("-m tsk=glob(*)", ("tsk=glob(*)", "tsk is none of", "task")),
    "glob of a key": Bad("-m trainer.batch_size=glob(*)", ("trainer.batch_size is none of",)),
    "empty glob": Bad("-m task=glob()", ("task=glob() cannot be read", "include")),
    "unknown option": Bad("--frobnicate", ("unrecognized arguments: --frobnicate", "--help")),
    "option without a value": Bad("--config-dir", ("--config-dir", "expected one argument")),
    "one point of a sweep": Bad("-m seed=-1", ("seed=-1 is not valid",)),
    "unknown value among several": Bad("-m method=full,veloar", ("method=veloar is not known", "did you mean velora?")),
    "key of a sweep without -m": Bad("sweep.jobs=2", ("sweep.jobs=2", "add -m")),
    "sweep over a key of the sweep": Bad("-m sweep.jobs=1,2", ("sweep.jobs=1,2", "give one value")),
    "unknown key of a sweep": Bad("-m sweep.job=2", ("sweep.job is not a key", "did you mean sweep.jobs?")),
    "number of jobs": Bad("-m sweep.jobs=0", ("sweep.jobs=0 is not valid",)),
    "what to try again": Bad("-m sweep.retry=ok", ("sweep.retry=ok is not valid", "failed", "all")),
    "what to do on a failure": Bad("-m sweep.on_failure=wait", ("sweep.on_failure=wait is not valid", "stop")),
    "name of a sweep": Bad("-m sweep.name=a/../b", ("sweep.name=a/../b is not valid",)),
    "options without a cluster": Bad(
        "-m sweep.cluster_options={timeout_min:5}", ("sweep.cluster_options has no effect", "sweep.cluster=slurm")
    ),
    "option of no cluster": Bad(
        "-m sweep.cluster=local sweep.cluster_options={timeot_min:5}", ("sweep.cluster_options", "timeot_min")
    ),
    "interval without a sweeper that searches": Bad(
        "-m trainer.learning_rate=interval(0.1,0.2)", ("does not support sweep type",)
    ),
    "variable that is not set": Bad(
        "trainer.max_steps=${oc.env:VELORA_NOT_SET}",
        ("trainer.max_steps", "the environment variable VELORA_NOT_SET is not set"),
    ),
    "key that is not there": Bad("trainer.max_steps=${nope}", ("trainer.max_steps", "'nope' not found")),
    "resolver that is not there": Bad("trainer.max_steps=${nope:1}", ("trainer.max_steps", "nope")),
}

FILES = {
    "no such folder": Bad("--config-dir nowhere", ("--config-dir nowhere is not a folder",)),
    "no YAML": Bad(MINE, ("mine/method/mine.yaml line 2", "expected ',' or ']'"), method_file("a: [1\nb: 2\n")),
    "tabs": Bad(MINE, ("mine/method/mine.yaml line 1", "cannot start any token"), method_file("\tx: 1\n")),
    "duplicate key": Bad(MINE, ("mine/method/mine.yaml line 2", "duplicate key a"), method_file("a: 1\na: 2\n")),
    "unknown tag": Bad(MINE, ("mine/method/mine.yaml line 1", "'!mine'"), method_file("a: !mine 3\n")),
    "object": Bad(MINE, ("mine.yaml line 1", "python/object"), method_file("a: !!python/object:os.system {}\n")),
    "not text": Bad(MINE, ("mine/method/mine.yaml", "no UTF-8 text"), method_file(b"\xff\xfea: 1\n")),
    "a list": Bad(MINE, ("method=['a'] is not valid", "method holds keys"), method_file("- a\n")),
    "defaults that are none": Bad(MINE, ("method/mine", "defaults must be a list"), method_file("defaults: 3\n")),
    "defaults without a file": Bad(
        MINE, ("method/mine.yaml names method/nothing", "no such file"), method_file("defaults: [nothing]\n")
    ),
    "misspelt key in a file": Bad(
        MINE,
        ("activations.sub_tokensize is not a key", "activations.sub_token_size?"),
        method_file(
            "# @package _global_\ndefaults:\n  - override /activations: velora\n  - _self_\n"
            "method: {name: mine}\nactivations: {sub_tokensize: 8}\n"
        ),
    ),
    "key of another kind in the file of the chosen value": Bad(
        "--config-dir mine method=velora optimizer=mine",
        ("optimizer.update_proj_gap is a key of optimizer=galore and q_galore, not of optimizer=adamw",),
        {"mine/optimizer/mine.yaml": "defaults: [adamw]\nupdate_proj_gap: 3\n"},
    ),
    "moved value in a file": Bad(
        MINE,
        ("activations=checkpoint is no value of activations any more", "recompute=blocks"),
        method_file("# @package _global_\ndefaults:\n  - override /activations: checkpoint\nmethod: {name: mine}\n"),
    ),
    "misspelt key in an experiment": Bad(
        "--config-dir mine experiment=e",
        ("trainer.lr is not a key", "did you mean trainer.learning_rate?"),
        {"mine/experiment/e.yaml": "# @package _global_\nexperiment: {name: e}\ntrainer: {lr: 1.0e-3}\n"},
    ),
    "unknown section in an experiment": Bad(
        "--config-dir mine experiment=e",
        ("trainr is not a key", "did you mean trainer?"),
        {"mine/experiment/e.yaml": "# @package _global_\nexperiment: {name: e}\ntrainr: {max_steps: 1}\n"},
    ),
}

PLUGIN_CLASS = "from velora.config.parts import Adapter\nclass Mine(Adapter):\n    pass\n"
PLUGIN = "adapter.kind=pack.plugin"


def package(code: str, init: str = "") -> dict[str, str | bytes]:
    return {"pack/__init__.py": init, "pack/plugin.py": code}


PLUGINS = {
    "raises": Bad(
        PLUGIN, ("adapter.kind=pack.plugin", "plugin.py line 2 raises KeyError: 'x'"), package("\nraise KeyError('x')")
    ),
    "package raises": Bad(
        PLUGIN, ("__init__.py line 1 raises ValueError: no"), package(PLUGIN_CLASS, "raise ValueError('no')")
    ),
    "syntax": Bad(PLUGIN, ("plugin.py line 1 is not valid Python",), package("class Mine(:\n")),
    "lacks a package": Bad(
        PLUGIN,
        ("plugin.py line 1 needs the package package_that_is_not_there, which is not installed",),
        package("import package_that_is_not_there\n"),
    ),
    "sys.exit": Bad(PLUGIN, ("plugin.py line 2 ends the program (sys.exit)",), package("import sys\nsys.exit(0)\n")),
    "no class": Bad(PLUGIN, ("pack.plugin must define exactly one Adapter, it defines 0",), package("x = 1\n")),
    "class in place of its module": Bad(
        PLUGIN + ".Mine", ("is a class; give its module: adapter.kind=pack.plugin",), package(PLUGIN_CLASS)
    ),
    "its check raises": Bad(
        PLUGIN,
        ("plugin.py line 4 raises ZeroDivisionError",),
        package(PLUGIN_CLASS.replace("    pass", "    def problems(self, config):\n        yield str(1 / 0)")),
    ),
    "its key": Bad(
        PLUGIN + " +adapter.rnak=2",
        ("adapter.rnak is not a key", "did you mean adapter.rank?"),
        package(PLUGIN_CLASS.replace("pass", "rank: int = 1")),
    ),
}

RANKS = {
    "no number": Bad("", ("WORLD_SIZE=abc", "unset WORLD_SIZE"), environment={"WORLD_SIZE": "abc"}),
    "no process": Bad("", ("WORLD_SIZE=0", "unset WORLD_SIZE"), environment={"WORLD_SIZE": "0"}),
    "negative": Bad("", ("RANK=-1", "unset RANK"), environment={"RANK": "-1"}),
    "LOCAL_RANK alone": Bad(
        "", ("LOCAL_RANK=0 in the environment without WORLD_SIZE, RANK", "torchrun"), environment={"LOCAL_RANK": "0"}
    ),
    "RANK left over": Bad("", ("RANK=1", "without WORLD_SIZE", "or unset RANK"), environment={"RANK": "1"}),
    "WORLD_SIZE left over": Bad("", ("WORLD_SIZE=4", "without RANK"), environment={"WORLD_SIZE": "4"}),
    "no address": Bad(
        "",
        ("without MASTER_ADDR, MASTER_PORT", "torchrun"),
        environment={"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    ),
    "rank too large": Bad(
        "",
        ("RANK=2", "must be below WORLD_SIZE"),
        environment={
            "WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"
        },
    ),
}  # fmt: skip
