"""What the transformers families share: architecture from YAML, a folder or a hub; weights random or loaded and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from velora.config.parts import Head, Model
from velora.errors import ConfigError
from velora.models.fit import SENTINELS, Limits, check_length, check_vocabulary, limits_of

if TYPE_CHECKING:
    from torch import nn

    from velora.config.run import Config

T = TypeVar("T")

_ATTENTION = "attention implementation|attn_implementation|[Ff]lash.?[Aa]ttention|[Ff]lex.?[Aa]ttention"


class PretrainedModel(Model):
    """A network of the transformers library.

    `architecture` holds the keys of its transformers config, `model_type` first. Weights are loaded from `path`, else from
    `hub`, the name under which this network was published; `pretrained`: null where a path alone decides.
    """

    tokenizer: str  # "byte", a local folder, or a hub name
    tokenizer_folder: str | None = None  # its folder below data.root/tokenizers, used where it exists
    architecture: dict[str, Any] | None = None
    attention: str = "sdpa"  # transformers' attn_implementation
    hub: str | None = None

    def problems(self, config: Config) -> Iterator[str]:
        if self.loads_weights and self.source() is None:
            yield (
                f"model.pretrained=true and model.path=null: model={self.name} has no published weights of its own; "
                "give model.path=DIR or a hub name, or model.pretrained=false"
            )
        if self.architecture is None and self.path is None:
            yield f"model.path=null: model={self.name} describes no architecture; give model.path=DIR or a hub name"
        if self.path is not None and _looks_local(self.path) and not (Path(self.path) / "config.json").is_file():
            yield f"model.path={self.path} is no checkpoint folder: it has no config.json"
        if self.path is not None and self.architecture is not None and not self.loads_weights:
            yield (
                f"model.path={self.path} with model.pretrained=false: the weights in it would not be read, and model={self.name} "
                "describes the architecture itself; leave one of the two out"
            )

    def preprocessor(self, config: Config) -> Any:
        from velora.models.tokenizer import padded_as, tokenizer

        return padded_as(self.padding_id(), tokenizer(config))

    def source(self) -> str | None:
        """Folder or hub name of the checkpoint; None for a network that stands in the YAML alone."""
        return self.path or self.hub

    def limits(self) -> Limits:
        """Positions and words of the network, from its checkpoint's config.json or its YAML."""
        return limits_of(self._described())

    def padding_id(self) -> int | None:
        """The padding token that the network itself names; it may be none of the tokenizer's."""
        return self._described().get("pad_token_id")

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        from transformers import set_seed

        from velora.nn.head import new_parts

        network_config = self._network_config(head, preprocessor)
        self._check_fit(network_config, head, preprocessor, config)
        set_seed(config.seed)
        options = {**config.weights.load_options(), "attn_implementation": self.attention, "trust_remote_code": False}
        auto_class, source = self.auto_class(head), self.source()
        if self.loads_weights:
            from velora.models.checkpoint import read_network

            assert source is not None  # `problems` saw to it

            def read() -> Any:
                return auto_class.from_pretrained(
                    source, config=network_config, output_loading_info=True, ignore_mismatched_sizes=True, **options
                )

            return read_network(self._origin(), partial(self._explaining_attention, read), local=Path(source).is_dir())
        model = self._explaining_attention(partial(auto_class.from_config, network_config, **options))
        model.velora_head = new_parts(model)
        return model

    def auto_class(self, head: Head) -> Any:
        """The transformers class that builds the network with this head."""
        raise NotImplementedError

    def _origin(self) -> str:
        return f"model={self.name} ({self.source()})" if self.path is None else f"model.path={self.path}"

    def _reads_configuration(self) -> bool:
        """Whether a checkpoint's config.json describes the network, or else the YAML."""
        return self.path is not None or self.architecture is None

    def _checkpoint_configuration(self) -> Any:
        from transformers import AutoConfig

        from velora.models.architecture import impossible_sizes
        from velora.models.hub import load

        source = self.source()
        assert source is not None
        found = load(
            self._origin(), "give model.path=DIR, a folder with a checkpoint",
            lambda: AutoConfig.from_pretrained(source, trust_remote_code=False), local=Path(source).is_dir(),
        )  # fmt: skip
        for sentence in impossible_sizes(found.to_dict()):
            raise ConfigError(f"{self._origin()}: {sentence} in its config.json; give a whole checkpoint")
        return found

    def _described(self) -> dict[str, Any]:
        """Model type, positions, words and padding token of the network, as far as they are known."""
        return (
            _description(self._checkpoint_configuration()) if self._reads_configuration() else self.architecture or {}
        )

    def _network_config(self, head: Head, preprocessor: Any) -> Any:
        declared = dict(self.architecture or {})
        if self._reads_configuration() or self.loads_weights:
            found = self._checkpoint_configuration()
            self._refuse_other_architecture(found, declared)
        else:
            from velora.models.architecture import configuration

            if declared.get("vocab_size", 0) is None:
                declared["vocab_size"] = len(preprocessor)
            special = {f"{n}_token_id": getattr(preprocessor, f"{n}_token_id", None) for n in ("bos", "eos", "pad")}
            found = configuration(declared, special)
        # A decoder reads its class at the last token that is not padding, and some encoders count positions by it.
        found.get_text_config().pad_token_id = preprocessor.pad_token_id
        if head.num_labels is not None:
            found.num_labels = head.num_labels
            found.problem_type = "regression" if head.regression else "single_label_classification"
        found.use_cache = False
        return found

    def _refuse_other_architecture(self, found: Any, declared: dict[str, Any]) -> None:
        for key in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
            value = getattr(found, key, None)
            if key in declared and value != declared[key]:
                raise ConfigError(
                    f"{self._origin()} is a checkpoint of another architecture: its {key} is {value}, "
                    f"model={self.name} has {declared[key]}; choose the model= that belongs to it"
                )

    def _check_fit(self, network_config: Any, head: Head, preprocessor: Any, config: Config) -> None:
        """ConfigError where texts or tokenizer do not fit; for velora-memory, which loads no data."""
        limits = limits_of(_description(network_config))
        (_, length), _ = config.task.batch_shapes(1, config)["input_ids"]
        check_length(length, limits, config)
        if hasattr(preprocessor, "__len__"):
            check_vocabulary(preprocessor, limits, config, spare=SENTINELS if head.num_labels is None else 0)

    def _explaining_attention(self, function: Callable[[], T]) -> T:
        """What `function` builds; ConfigError where the network has no attention of this kind, or no such sizes."""
        try:
            return function()
        except (ValueError, ImportError) as error:
            reason = str(error).split(". ")[0]
            if self.attention != "eager" and re.search(_ATTENTION, reason):
                raise ConfigError(
                    f"model.attention={self.attention} does not work for model={self.name}: {reason}; "
                    "give model.attention=eager, which every network has"
                ) from error
            if not self.loads_weights and isinstance(error, ValueError):
                raise ConfigError(f"model={self.name} cannot be built: {reason}; see model.architecture") from error
            raise


def _description(found: Any) -> dict[str, Any]:
    text = found.get_text_config()
    keys = ("model_type", "max_position_embeddings", "vocab_size", "pad_token_id")
    return {key: getattr(text, key, None) for key in keys}


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).exists()
