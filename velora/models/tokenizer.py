"""Which tokenizer belongs to a text model, where its files come from, and whether texts and tokenizer fit the network.

The first of these that applies: `model.tokenizer=byte` (one token a byte, no files); the folder
`data.root/tokenizers/<model.tokenizer_folder>`; `model.tokenizer` as a local folder; `model.tokenizer` as a hub name.

A folder may hold a complete tokenizer as transformers saves it, or only the vocabulary as it was published (`vocab.json` and
`merges.txt`, `spiece.model`, `tokenizer.model`, `vocab.txt`). The second says nothing about the special tokens around
a text, so each file name stands for the family that published it: RoBERTa, T5, LLaMA, BERT. For LLaMA the merges are made here
from the scores of the sentencepiece model, since transformers 5 orders them by id, which splits double blanks otherwise
than sentencepiece does.

Text is text: what spells a special token (`</s>`, `<pad>`, `[SEP]`) is encoded as any other characters. That is impossible
only where the vocabulary itself has the spelling as an ordinary word and nothing splits it before (a word-level vocabulary).

Padding. Labels and losses are masked by the true length of a text, never by comparing with the padding token, so any
token serves, as long as network and tokenizer agree on it: the network's own goes first, since networks read classes
and positions by it, then the tokenizer's. LLaMA has neither; its unknown token (id 0) is used, not its end token: transformers
freezes the embedding of the padding token, and the end token must train.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora.config.model import Limits, limits_of
from velora.errors import ConfigError
from velora.models.hub import load

if TYPE_CHECKING:
    from velora.config.run import Config

SENTINELS = (
    100  # words of T5's tokenizer beyond the 32,000 that language models embed; they stand for nothing in a text
)
COMPLETE = ("tokenizer.json", "tokenizer_config.json")
VOCABULARIES = ("vocab.json and merges.txt", "spiece.model", "tokenizer.model", "vocab.txt")


def tokenizer(config: Config) -> Any:
    """The tokenizer of `config.model`, with a padding token; ConfigError where its files are missing or of no known form."""
    model: Any = config.model
    if model.tokenizer == "byte":
        return prepared(byte_tokenizer())
    folder = local_folder(config)
    if folder is not None:
        return from_folder(folder)
    return prepared(_from_hub(model.tokenizer, model.tokenizer_folder))


def local_folder(config: Config) -> Path | None:
    """The folder that the tokenizer is read from, or None if the hub is asked."""
    model: Any = config.model
    if config.data.root is not None and model.tokenizer_folder is not None:
        folder = config.data.root / "tokenizers" / model.tokenizer_folder
        if folder.is_dir():
            return folder
    return Path(model.tokenizer) if Path(model.tokenizer).is_dir() else None


def byte_tokenizer() -> Any:
    """One token per byte of UTF-8: id = byte + 3, with padding 0, end 1 and unknown 2 as in ByT5; 259 tokens."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=0)


def from_folder(folder: Path) -> Any:
    """The tokenizer of a local folder; nothing is asked of the hub."""
    import transformers

    present = {path.name for path in folder.iterdir()}
    if present & set(COMPLETE):
        make: Any = lambda: transformers.AutoTokenizer.from_pretrained(  # noqa: E731
            str(folder), local_files_only=True, trust_remote_code=False
        )
    elif {"vocab.json", "merges.txt"} <= present:
        make = lambda: transformers.RobertaTokenizer.from_pretrained(str(folder))  # noqa: E731
    elif "spiece.model" in present:
        make = lambda: transformers.T5Tokenizer.from_pretrained(str(folder), extra_ids=0)  # noqa: E731
    elif "tokenizer.model" in present:
        make = lambda: llama_tokenizer(folder / "tokenizer.model")  # noqa: E731
    elif "vocab.txt" in present:
        make = lambda: transformers.BertTokenizer.from_pretrained(str(folder))  # noqa: E731
    else:
        raise ConfigError(
            f"the tokenizer folder {folder} has neither {' nor '.join(COMPLETE)} nor a vocabulary "
            f"({', '.join(VOCABULARIES)}); give model.tokenizer=DIR, a folder that has"
        )
    remedy = "give model.tokenizer=DIR, a folder with a whole one"
    return prepared(load(f"the tokenizer in {folder}", remedy, make, local=True))


def gguf_tokenizer(folder: Path, file: str) -> Any:
    """The tokenizer inside a gguf file; it pads with its unknown token, since such files name the end token for that."""
    import transformers

    remedy = "install the package again"
    found = load(
        f"the tokenizer in {folder / file}", remedy,
        lambda: transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file, trust_remote_code=False), local=True,
    )  # fmt: skip
    found.pad_token = found.unk_token
    return prepared(found)


def llama_tokenizer(file: Path) -> Any:
    """LLaMA's tokenizer from its sentencepiece model alone: the same ids as sentencepiece, after a begin token (id 1)."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    blank = "\u2581"  # sentencepiece's sign for a blank; one goes before every text
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin = pieces.id_to_piece(pieces.bos_id())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, pieces.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=pieces.id_to_piece(pieces.eos_id()), unk_token="<unk>"
    )


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """The pairs that a byte-pair encoding joins, best score first, for every way to cut a piece in two pieces."""
    plain = {
        pieces.id_to_piece(i): i
        for i in range(len(pieces))
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    found = [
        (-pieces.get_score(i), i, plain[piece[:cut]], plain[piece[cut:]])
        for piece, i in plain.items()
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    return [(pieces.id_to_piece(left), pieces.id_to_piece(right)) for *_, left, right in sorted(found)]


def prepared(tokenizer: Any) -> Any:
    """The same tokenizer, which pads at the right and takes no text for a special token.

    One without a padding token gets its unknown token for it, or its end token if it has none.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token is not None else tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            "this tokenizer has no padding, unknown or end token to fill a batch with: give the model.tokenizer of a "
            "folder whose tokenizer_config.json names a pad_token"
        )
    tokenizer.padding_side = "right"
    tokenizer.split_special_tokens = True
    _keep_special_pieces_out_of_text(tokenizer)
    return tokenizer


def padded_as(network_id: int | None, tokenizer: Any) -> Any:
    """The same tokenizer, which pads with the network's own padding token, if that is a word of its vocabulary."""
    if network_id is not None and 0 <= network_id < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(network_id)
    return tokenizer


def _keep_special_pieces_out_of_text(tokenizer: Any) -> None:
    """Split a text within what spells a special piece of a unigram vocabulary (T5, XLM-R, ALBERT), after its first character.

    sentencepiece does not look for its control pieces in a text; the tokenizers library does, in each word by itself.
    """
    from tokenizers import Regex, models, pre_tokenizers

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(getattr(backend, "model", None), models.Unigram):
        return
    pieces = [t for t in tokenizer.all_special_tokens if len(t) > 1 and backend.model.token_to_id(t) is not None]
    pattern = "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in pieces)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "merged_with_previous")
        before = [backend.pre_tokenizer] if backend.pre_tokenizer is not None else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def _from_hub(name: str, tokenizer_folder: str | None) -> Any:
    from transformers import AutoTokenizer

    remedy = "give model.tokenizer=DIR, a folder with its files"
    if tokenizer_folder is not None:
        remedy += f", or data.root=DIR with tokenizers/{tokenizer_folder} in it"
    return load(f"model.tokenizer={name}", remedy, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=False))


def network_limits(config: Config) -> Limits:
    """The limits of this run's network; reads the checkpoint's config.json where it has one."""
    find = getattr(config.model, "limits", None)
    return find() if find is not None else limits_of(getattr(config.model, "architecture", None))


def check_length(max_length: int, limits: Limits, config: Config) -> None:
    """ConfigError if the texts are longer than the network's positions."""
    for sentence in limits.problems(max_length, config):
        raise ConfigError(sentence)


def vocabulary_size(tokenizer: Any, limits: Limits) -> int:
    """Words that the network embeds: its own figure, or else the tokenizer's length."""
    return len(tokenizer) if limits.vocabulary is None else int(limits.vocabulary)


def check_vocabulary(tokenizer: Any, limits: Limits, config: Config, spare: int = 0) -> None:
    """ConfigError where the tokenizer has words (more than `spare` of them) that the network does not embed."""
    words, embedded = len(tokenizer), vocabulary_size(tokenizer, limits)
    if words > embedded + spare:
        raise ConfigError(
            f"the tokenizer of model={config.model.name} has {words} words and the network embeds {embedded}: give the "
            "model.tokenizer that belongs to it"
        )


def check_fit(max_length: int, tokenizer: Any, config: Config, spare: int = 0) -> int:
    """How many words the network embeds; ConfigError where texts or tokenizer do not fit it."""
    limits = network_limits(config)
    check_vocabulary(tokenizer, limits, config, spare)
    check_length(max_length, limits, config)
    return vocabulary_size(tokenizer, limits)
