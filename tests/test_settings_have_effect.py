"""Every key of the configuration changes something: nothing is accepted and then not used.

`EFFECTS` has an entry for every key of every section and of every kind of every group; a key without one fails
`test_every_key_has_an_entry`. An entry says what another value changes:

    Network(...)    weights, state or gradients after three training steps of the built network, or how it is built
    Arguments(...)  the arguments of transformers' Trainer
    Shapes(...)     the tensors of a batch, or the head
    Read(...)       no more than what the source shows: the file that reads the key, by the end of its path. For what needs
                    a hub, a data folder or a whole run; other tests, named in it, show what it does
    Label(...)      a text for people that goes into the record with the rest of the configuration

The values of the groups have theirs in `PARTS` below; trainer, sweep and the top level in effects_of_sections.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from effects_helpers import (
    SMALL,
    TINY_RESNET,
    TINY_VIT,
    Arguments,
    Label,
    Network,
    Read,
    Shapes,
    both,
    composed_once,
    shapes,
    trained,
    trainer_arguments,
)
from effects_of_sections import SECTIONS, SWEEP, TRAINER

import velora
from velora.config.parts import part_class, shipped_kinds
from velora.config.read import model_in
from velora.config.run import GROUPS, Config
from velora.config.sweep import SweepConfig

SOURCE = Path(velora.__file__).parent

GALORE, Q_GALORE, GRASS, FLORA, LORA = (
    "method=galore",
    "method=q_galore",
    "method=grass",
    "method=flora optimizer.scale_parameter=false",
    "method=lora",
)
TURNING = "optimizer.update_proj_gap=1 optimizer.cos_threshold=0.001"
LTE = "method=lte"
ADAMW_8BIT = "method=full optimizer=adamw_8bit"
ADAFACTOR = "method=full optimizer=adafactor"
GRASS_VELORA = "method=grass_velora optimizer.layerwise=true trainer.max_grad_norm=null"
VELORA = "method=velora activations.layers=[value,down] activations.sub_token_size=16"

PARTS: dict[str, dict[str, Any]] = {
    "weights=dense": {"dtype": Network("bf16")},
    "weights=int8": {"dtype": Network("fp32", "method=q_galore")},
    "weights=nf4": {
        "quant_type": Network("fp4", "method=qlora"),
        "double_quant": Network(False, "method=qlora"),
        "dtype": Network("fp32", "method=qlora"),
        "compute_dtype": Network("fp32", "method=qlora"),
    },
    "adapter=full": {},
    "adapter=linear_probe": {},
    "adapter=lora": {
        "rank": Network(2, LORA),
        "alpha": Network(3.0, LORA),
        "scaling": Network("alpha", LORA),
        "dropout": Network(0.5, LORA),
        "targets": Network(["down"], LORA),
        "init": Network("olora", LORA),
        "pissa_rounds": Network(1, "method=qpissa"),
        "also_train": Network(["*.norm"], LORA),
    },
    "adapter=hydra": {
        "rank": Network(2, "method=hydra"),
        "scale": Network(3.0, "method=hydra"),
        "dropout": Network(0.5, "method=hydra"),
        "targets": Network(["up"], "method=hydra"),
        "per_task": Network({"manual": {"scale": 3.0, "dropout": 0.0}}, "method=hydra"),
        "also_train": Network(["*.norm"], "method=hydra"),
    },
    "adapter=multilora": {
        "num_branches": Network(2, "method=multilora"),
        "rank": Network(2, "method=multilora"),
        "dropout": Network(0.5, "method=multilora"),
        "targets": Network(["down"], "method=multilora"),
        "also_train": Network(["*.norm"], "method=multilora"),
    },
    "adapter=lte": {
        "num_heads": Network(2, LTE),
        "rank": Network(2, LTE),
        "alpha": Network(3.0, LTE),
        "root_alpha": Network(False, LTE),
        "merge_every": Network(2, LTE),
        "reset": Network(True, f"{LTE} adapter.merge_every=2"),
        "targets": Network(["down"], LTE),
        "also_train": Network(["*.norm"], LTE),
    },
    "adapter=ssf": {
        "targets": Network(["value"], "method=ssf"),
        "also_train": Network(["*.norm"], "method=ssf adapter.targets=[value]"),
    },
    "optimizer=adamw": {
        "betas": Network([0.5, 0.9]),
        "eps": Network(0.1),
        "fused": Network(True),
    },
    "optimizer=adamw_8bit": {
        "betas": Network([0.5, 0.9], ADAMW_8BIT),
        "eps": Network(0.1, ADAMW_8BIT),
        "min_8bit_size": Network(1, ADAMW_8BIT),
    },
    "optimizer=adafactor": {
        "beta1": Network(0.5, ADAFACTOR),
        "eps": Network([0.1, 1e-3], ADAFACTOR),
        "clip_threshold": Network(0.1, ADAFACTOR),
        "decay_rate": Network(-0.1, ADAFACTOR),
        "scale_parameter": Network(True, ADAFACTOR),
    },
    "optimizer=galore": {
        "layers": Network(["value"], GALORE),
        "rank": Network(2, GALORE),
        "layerwise": Network(True, GALORE),
        "update_proj_gap": Network(1, GALORE),
        "scale": Network(3.0, GALORE),
        "proj_type": Network("full", GALORE),
        "svd": Network("randomized", GALORE),
        "bits": Network(8, GALORE),
        "betas": Network([0.5, 0.9], GALORE),
        "eps": Network(0.1, GALORE),
    },
    "optimizer=q_galore": {
        "layers": Network(["value"], Q_GALORE),
        "rank": Network(2, Q_GALORE),
        "layerwise": Network(True, Q_GALORE),
        "update_proj_gap": Network(1, Q_GALORE),
        "scale": Network(3.0, Q_GALORE),
        "svd": Network("randomized", Q_GALORE),
        "cos_threshold": Network(1.0, f"{Q_GALORE} {TURNING} optimizer.queue_size=1"),
        "queue_size": Network(1, f"{Q_GALORE} {TURNING}"),
        "bits": Network(32, Q_GALORE),
        "betas": Network([0.5, 0.9], Q_GALORE),
        "eps": Network(0.1, Q_GALORE),
    },
    "optimizer=grass": {
        "layers": Network(["value"], GRASS),
        "rank": Network(2, GRASS),
        "layerwise": Network(True, GRASS),
        "selection": Network("sampled", GRASS),
        "update_gap": Network(1, GRASS),
        "scale": Network(3.0, GRASS),
        "factored": Network(True, GRASS_VELORA),
        "betas": Network([0.5, 0.9], GRASS),
        "eps": Network(0.1, GRASS),
    },
    "optimizer=flora": {
        "layers": Network(["value"], FLORA),
        "rank": Network(2, FLORA),
        "layerwise": Network(True, FLORA),
        "kappa": Network(1, FLORA),
        "beta1": Network(0.5, FLORA),
        "sketched": Network("all", FLORA),
        "eps": Network([0.1, 1e-3], FLORA),
        "clip_threshold": Network(0.1, FLORA),
        "decay_rate": Network(-0.1, FLORA),
        "scale_parameter": Network(True, FLORA),
    },
    "optimizer=lomo": {"max_grad_value": Network(1e-4, "method=full optimizer=lomo")},
    "activations=exact": {},
    "activations=velora": {
        "layers": Network(["down"], VELORA),
        "sub_token_size": Network(8, VELORA),
        "num_groups": Network(2, VELORA, besides=(("activations.sub_token_size", None),)),
        "init": Network("svd", VELORA),
        "scale": Network(3.0, VELORA),
    },
    "recompute=none": {},
    "recompute=lean": {},
    "recompute=mlp": {},
    "recompute=blocks": {
        "lean": Network(True, "method=checkpoint"),
        "every_n_layers": Network(2, "method=checkpoint"),
        "offload": Network(True, "method=checkpoint"),
    },
    "model=causal_lm": {
        "name": Label(),
        "path": Read("models/pretrained.py"),  # test_hub
        "pretrained": Read("config/parts.py"),  # test_hub
        "roles": Network({"value": ["q_proj"], "down": ["down_proj"]}, VELORA),
        "tokenizer": Read("models/tokenizer.py"),  # test_tokenizer
        "tokenizer_folder": Read("models/tokenizer.py"),  # test_tokenizer
        "architecture": Network({"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}),
        "attention": Network("eager"),
        "hub": Read("config/model.py"),
    },
    "model=vit": {
        "name": Label(),
        "path": Read("models/vit.py"),  # test_vit
        "pretrained": Read("config/parts.py"),  # test_vit
        "roles": Network({"value": ["mlp.fc1"], "down": ["mlp.fc2"]}, VELORA, vision=True),
        "timm_name": Network("deit_tiny_distilled_patch16_224", vision=True),
        "image_size": Network(64, vision=True),
        "split_qkv": Network(True, vision=True),
        "drop_path": Network(0.9, vision=True),
        "normalization": Network("imagenet", vision=True),
        "overrides": Network({"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}, vision=True),
    },
    "model=convnet": {
        "name": Label(),
        "path": Read("models/vit.py"),  # test_convnet
        "pretrained": Read("config/parts.py"),  # test_convnet
        "roles": Network({"value": ["layer1.0.conv2"], "down": ["layer2.0.conv2"]}, VELORA, vision=True),
        "timm_name": Network("resnet26.bt_in1k", vision=True),
        "image_size": Network(64, vision=True),
        "drop_path": Network(0.9, vision=True),
        "normalization": Network("none", vision=True),
        "overrides": Network({"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32]}, vision=True),
    },
    "task=manual": {"name": Label(), "max_length": Shapes(32), "published_eval_batch_size": Read("data/language_model.py")},
    "task=topics": {
        "name": Label(),
        "max_length": Shapes(32, "task=topics method=full"),
        "num_topics": Shapes(6, "task=topics method=full"),
    },
    "task=digits": {"name": Label(), "protocol": Read("data/digits.py")},  # test_digits
    "task=embedded": {"name": Label(), "options": Shapes({
        "manual": {"max_length": 32, "published_eval_batch_size": 16},
        "topics": {"num_topics": 4, "max_length": 64},
        "digits": {"protocol": "last"},
    }, "task=embedded")},
    "task=c4": {
        "name": Label(),
        "packing": Shapes("pack", "task=c4"),
        "max_length": Shapes(32, "task=c4"),
        "published_eval_batch_size": Read("data/language_model.py"),
        **{key: Read("data/c4.py") for key in (  # test_task_c4
            "folder", "eval_tokens", "data_seed", "shuffle_buffer", "hub", "hub_subset", "revision",
        )},
    },
    "task=alpaca": {
        "name": Label(),
        "max_length": Shapes(32, "task=alpaca"),
        "file": Read("config/task_alpaca.py"),
        **{key: Read("data/alpaca.py") for key in (  # test_alpaca
            "train_on", "group_by_length", "held_out", "eval_size", "data_seed", "hub", "revision",
        )},
    },
    "task=glue": {
        "name": Read("config/task_text.py"),  # which of the nine tasks it is
        "max_length": Shapes(32, "task=glue/sst2 method=full"),
        "folder": Read("config/task_text.py"),
        **{key: Read("data/glue.py") for key in ("train_size", "eval_size", "hub", "revision")},
    },
    "task=mmlu": {
        "name": Label(),
        "max_length": Shapes(32, "task=mmlu model=llama_60m task.max_length=64 method=full"),
        **{key: Read("data/mmlu.py") for key in ("hub", "revision", "num_shots", "split", "questions", "sample_seed")},
        **{key: Read("config/mmlu.py") for key in ("folder", "subjects")},
        "prompt": Read("data/mmlu_prompt.py"),  # test_mmlu, test_mmlu_prompt
    },
    "task=vtab": {
        "name": Label(),
        "num_classes": Shapes(7, "task=vtab/svhn method=full"),
        **{key: Read("data/vtab.py") for key in ("folder", "group", "protocol", "keep_decoded", "hub")},
    },
}  # fmt: skip
PARTS["task=alpaca_mmlu"] = {
    **PARTS["task=alpaca"],
    "max_length": Shapes(32, "task=alpaca_mmlu"),
    **{key: Read("config/task_alpaca.py") for key in ("mmlu", "mmlu_every")},  # test_alpaca_mmlu
}
PARTS["model=encoder"] = {**PARTS["model=causal_lm"], "roles": Read("models/build.py")}
PARTS["model=encoder"] |= {key: Read("models/pretrained.py") for key in ("architecture", "attention")}
PARTS["model=minilm"] = {
    **PARTS["model=encoder"],
    **{key: Read("config/model.py") for key in ("path", "tokenizer", "tokenizer_folder", "architecture")},  # refused
}
PARTS["model=smollm2"] = {
    **PARTS["model=encoder"],
    **{
        key: Read("config/model.py") for key in ("path", "tokenizer", "tokenizer_folder", "architecture")
    },  # refused, but the last
}

EFFECTS: dict[str, Any] = {
    **{f"sweep.{key}": effect for key, effect in SWEEP.items()},
    **SECTIONS,
    **{f"trainer.{key}": effect for key, effect in TRAINER.items()},
    **{f"{part}.{key}": effect for part, effects in PARTS.items() for key, effect in effects.items()},
}


def every_key() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        if name in GROUPS:
            for kind in shipped_kinds(name):
                keys = part_class(name, kind, GROUPS[name]).model_fields
                yield from (f"{name}={kind}.{key}" for key in keys if key != "kind")
        elif section := model_in(field.annotation):
            yield from (f"{name}.{key}" for key in section.model_fields)
        else:
            yield name
    yield from (f"sweep.{key}" for key in SweepConfig.model_fields)


def entries(form: type) -> list[Any]:
    return [key for key, effect in EFFECTS.items() if type(effect) is form]


def test_every_key_has_an_entry() -> None:
    keys = set(every_key())
    assert keys - EFFECTS.keys() == set(), "keys without an entry in EFFECTS"
    assert EFFECTS.keys() - keys == set(), "entries for keys that are not there"


@pytest.mark.parametrize("key", entries(Network))
def test_it_changes_the_network_or_its_training(key: str) -> None:
    effect = EFFECTS[key]
    if key.startswith("optimizer=adamw_8bit") or effect.value == 8 or "method=q" in effect.base:
        pytest.importorskip("bitsandbytes", minversion="0.50")
    vision = TINY_RESNET if key.startswith("model=convnet") else TINY_VIT
    overrides = vision if effect.vision else ("method=full", *SMALL)
    if "method=" in effect.base:
        overrides = tuple(override for override in overrides if override != "method=full")
    one, other = both(key, effect, *overrides)
    assert trained(one) == trained(one), "three steps are not reproducible, so they show nothing"
    assert trained(one) != trained(other)


@pytest.mark.parametrize("key", entries(Arguments))
def test_it_changes_the_arguments_of_the_trainer(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (
        trainer_arguments(config, tmp_path) for config in both(key, EFFECTS[key], *SMALL, "trainer.max_grad_norm=1.0")
    )
    assert one != other


@pytest.mark.parametrize("key", entries(Shapes))
def test_it_changes_the_batch_or_the_head(key: str) -> None:
    one, other = both(key, EFFECTS[key])
    assert shapes(one) != shapes(other)


@pytest.mark.parametrize("key", entries(Read))
def test_it_is_read(key: str) -> None:
    """`<section>.<field>` or `self.<field>` stands in an expression of the file (a declaration is none)."""
    field = key.rpartition(".")[2]
    (file,) = [file for file in SOURCE.rglob("*.py") if str(file).endswith(f"/{EFFECTS[key].file}")]
    tree = ast.parse(file.read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert field in read


def test_labels_stand_in_the_composed_configuration_which_the_record_holds() -> None:
    raw = composed_once("experiment=table1/velora", "+experiment.note=why").raw
    for key in entries(Label):
        section, _, field = key.partition(".")
        assert raw[section.partition("=")[0]][field]
