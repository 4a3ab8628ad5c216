"""Checkpoints as other people publish them: tiny networks with random weights and a small tokenizer, saved to a folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from text_helpers import composed

from velora.config.parts import Head
from velora.config.run import Config

NO_SDPA = ("deberta", "deberta-v2", "gemma2", "gptj", "gpt_neo", "mpnet")
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 16}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# model type -> sizes, and whether its classifier is a decoder's, whose published checkpoints often name no padding token
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (SIZES, True), "mistral": (GROUPED, True), "qwen2": (SIZES | {"num_key_value_heads": 1}, True),
    "qwen3": (GROUPED, True), "gemma": (GROUPED, True), "gemma2": (GROUPED, True), "olmo": (SIZES, True), "olmo2": (SIZES, True),
    "phi": (SIZES, True), "phi3": (SIZES, True), "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, True),
    "gpt_neox": (SIZES, True), "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, True),
    "gpt_neo": ({"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}, True),
    "opt": ({"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32,
             "max_position_embeddings": 64}, True),
    "bart": (BART, False), "bert": (SIZES, False), "roberta": (SIZES, False), "xlm-roberta": (SIZES, False),
    "electra": (SIZES | {"embedding_size": 32}, False), "albert": (SIZES | {"embedding_size": 16}, False),
    "deberta": (SIZES, False), "deberta-v2": (SIZES, False), "mpnet": (SIZES, False),
    "distilbert": ({"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}, False),
}  # fmt: skip


def save_tokenizer(folder: Path, *, padding: str | None = "<pad>", num_words: int = 40) -> None:
    """Whole words w0 ... and the tokens <s> 0, <pad> 1, </s> 2, <unk> 3 as in RoBERTa; a text is <s> words </s>.

    In folder/words: beside a network's config.json transformers takes the class of its family, whatever stands there.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(num_words))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=padding
    ).save_pretrained(folder / "words")


def save_network(folder: Path, model_type: str, *, base: bool = False, num_labels: int = 2, **changes: Any) -> Any:
    """A network of one family with random weights large enough to tell texts apart; `base`: without a head. Returns it."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    settings = tokens | FAMILIES[model_type][0] | {"vocab_size": 44, "num_labels": num_labels} | changes
    torch.manual_seed(5)
    network_config = AutoConfig.for_model(model_type, **settings)
    network = (AutoModel if base else AutoModelForSequenceClassification).from_config(
        network_config, **(network_options(model_type))
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(folder)
    return network.eval()


def network_options(model_type: str) -> dict[str, str]:
    return {"attn_implementation": "eager"} if model_type in NO_SDPA else {}


_plain = functools.cache(composed)
_TASKS = {"encoder": ("topics", "roberta_tiny"), "causal_lm": ("manual", "llama_tiny")}


def run(folder: Path | str | None, kind: str = "encoder", *, length: int = 16, seed: int = 0, **model: Any) -> Config:
    """A run whose network is such a checkpoint."""
    task, ours = _TASKS[kind]
    config = _plain("method=full", f"task={task}", f"model={ours}", f"task.max_length={length}")
    values = {
        "kind": kind,
        "name": "theirs",
        "path": folder and str(folder),
        "pretrained": True,
        "tokenizer": f"{folder}/words",
        "tokenizer_folder": None,
        "architecture": None,
        "attention": "sdpa",
    } | model
    return config.model_copy(update={"seed": seed, "model": type(config.model)(**values)})


def built(config: Any, num_labels: int | None = 2) -> tuple[Any, Any]:
    """The network in eval mode and its tokenizer, built as a run builds them."""
    head = Head("causal_lm" if num_labels is None else "sequence_classification", num_labels)
    tokenizer = config.model.preprocessor(config)
    return config.model.build(head, tokenizer, config).eval(), tokenizer
