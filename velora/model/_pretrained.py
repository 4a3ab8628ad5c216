"""What the transformers families share: architecture from YAML, a folder or a hub; weights random or loaded and checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from velora.errors import ConfigError
from velora.group import Head, Model

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class PretrainedModel(Model):
    """A network of the transformers library. `architecture` holds the keys of its transformers config, `model_type` first."""

    tokenizer: str  # "byte", a local folder, or a hub name
    tokenizer_folder: str | None = None  # its folder below data.root/tokenizers, used where it exists
    architecture: dict[str, Any] | None = None
    attention: str = "sdpa"  # transformers' attn_implementation

    head_prefixes: ClassVar[tuple[str, ...]] = ()  # parameters that a checkpoint need not have: the task's own head

    def problems(self, config: Config) -> Iterator[str]:
        if self.pretrained and self.path is None:
            yield (
                f"model.pretrained=true and model.path=null: model={self.name} has no published weights of its own; "
                "give model.path=DIR or a hub name, or model.pretrained=false"
            )
        if self.architecture is None and self.path is None:
            yield f"model.path=null: model={self.name} describes no architecture; give model.path=DIR or a hub name"
        if self.path is not None and _looks_local(self.path) and not (Path(self.path) / "config.json").is_file():
            yield f"model.path={self.path} is no checkpoint folder: it has no config.json"

    def preprocessor(self, config: Config) -> Any:
        from velora.tokenizer import tokenizer

        return tokenizer(config)

    def source(self) -> str | None:
        """Folder or hub name of the checkpoint; None for a network that stands in the YAML alone."""
        return self.path

    def build(self, head: Head, preprocessor: Any, config: Config) -> nn.Module:
        from transformers import set_seed

        set_seed(config.seed)
        network_config = self._network_config(head, preprocessor)
        options = {**config.weights.load_options(), "attn_implementation": self.attention}
        if not self.pretrained:
            return self.auto_class(head).from_config(network_config, **options)
        model, info = self._load(
            lambda: self.auto_class(head).from_pretrained(
                self.source(), config=network_config, output_loading_info=True, trust_remote_code=False,
                use_safetensors=None, **options,
            )
        )  # fmt: skip
        missing = [k for k in info["missing_keys"] if not k.startswith(self.head_prefixes)]
        mismatched = [str(k[0] if isinstance(k, tuple) else k) for k in info["mismatched_keys"]]
        mismatched = [k for k in mismatched if not k.startswith(self.head_prefixes)]
        if missing or mismatched:
            wrong = sorted({*missing, *mismatched})
            raise ConfigError(
                f"model.path={self.source()} is a checkpoint of another architecture: {len(wrong)} parameters are missing "
                f"or of another shape, {wrong[0]} among them; choose the model= that belongs to it"
            )
        return model

    def auto_class(self, head: Head) -> Any:
        """The transformers class that builds the network with this head."""
        raise NotImplementedError

    def _load(self, function: Any) -> Any:
        from velora.hub import load

        local = Path(self.source() or "").is_dir()
        return load(
            f"model.path={self.source()}", "give model.path=DIR, a folder with a checkpoint", function, local=local
        )

    def _network_config(self, head: Head, preprocessor: Any) -> Any:
        from transformers import AutoConfig

        declared = dict(self.architecture or {})
        model_type = declared.pop("model_type", None)
        if self.source() is not None and (self.pretrained or model_type is None):
            found = self._load(lambda: AutoConfig.from_pretrained(self.source(), trust_remote_code=False))
            self._refuse_other_architecture(found, model_type, declared)
        else:
            if declared.get("vocab_size", 0) is None:
                declared["vocab_size"] = len(preprocessor)
            special = {f"{n}_token_id": getattr(preprocessor, f"{n}_token_id", None) for n in ("bos", "eos", "pad")}
            try:
                found = AutoConfig.for_model(model_type, **{**special, **declared})
            except Exception as error:  # transformers validates with classes of its own
                reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
                raise ConfigError(f"model.architecture={self.architecture} is not valid: {reason}") from None
        if head.num_labels is not None:
            found.num_labels = head.num_labels
            found.problem_type = "regression" if head.regression else "single_label_classification"
        found.use_cache = False
        return found

    def _refuse_other_architecture(self, found: Any, model_type: str | None, declared: dict[str, Any]) -> None:
        if model_type is None:
            return
        wanted = {"model_type": model_type, **declared}
        for key in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
            value = getattr(found, key, None)
            if key in wanted and value != wanted[key]:
                raise ConfigError(
                    f"model.path={self.source()} is a checkpoint of another architecture: its {key} is {value}, "
                    f"model={self.name} has {wanted[key]}; choose the model= that belongs to it"
                )


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).exists()
