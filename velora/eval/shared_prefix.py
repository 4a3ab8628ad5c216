"""Log-probabilities of the next token after many prompts that begin alike.

The solved examples of a benchmark stand before each of its questions, and a causal network's keys and values at a token depend
on the tokens before it only. So those of the common beginning are computed once, for one sequence, and every batch of
endings reads them: `SharedPrefix` is a cache layer that hands a layer the common keys and values before the batch's own, and
keeps neither. With a beginning of P tokens and endings of S that is P + n S tokens in place of n (P + S).

Endings are batched by length and padded at the right, where causal attention does not see the padding. Of each sequence only
the last position goes through the output layer.

Shapes: B sequences in a batch, P tokens of the common beginning, S of the longest ending, C candidates, V words, H hidden size,
K key-value heads, D features of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from velora.data.mmlu_prompt import common_prefix

Ids = Sequence[int]


class SharedPrefix(DynamicLayer):
    """Keys and values (1, K, P, D) of one layer, for any batch of sequences that continue them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The batch's own (B, K, S, D) after the common ones; nothing is kept."""
        size = (len(key_states), -1, -1, -1)
        keys = torch.cat([self.keys.expand(size), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(size), value_states], dim=-2)


@torch.no_grad()
def next_token_log_probs(
    network: nn.Module,
    prompts: Sequence[Ids],
    candidates: Ids,
    *,
    batch_size: int,
    padding_id: int = 0,
    share: bool = True,
    after_batch: Callable[[int], None] = lambda number: None,
) -> Tensor:
    """Log-probabilities (number of prompts, C) of the candidates after each prompt, over all V words, in float32 on the CPU.

    The network is in evaluation mode already, and any autocast is the caller's. `share=False` computes each prompt in full.
    `after_batch` is told how many prompts are done.
    """
    found = torch.full((len(prompts), len(candidates)), torch.nan)
    if not prompts:
        return found
    prefix = min(common_prefix(prompts), min(map(len, prompts)) - 1) if share and len(prompts) > 1 else 0
    cache = _prefix_cache(network, prompts[0][:prefix]) if prefix else None
    prefix = prefix if cache is not None else 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the largest batch first: memory fails early
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        logits = _last_logits(network, [prompts[i][prefix:] for i in rows], prefix, cache, padding_id)  # (B, V)
        chosen = logits.float().log_softmax(dim=-1)[:, list(candidates)]
        found[rows] = chosen.cpu()
        after_batch(len(rows))
    return found


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _prefix_cache(network: Any, ids: Ids) -> Cache | None:
    """Keys and values of the common beginning; None where a layer keeps something else (a window, a recurrent state)."""
    tokens = torch.tensor([ids], device=_device(network))
    with _only_positions(network, torch.zeros(1, dtype=torch.int64)):
        past = network(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True).past_key_values
    layers = getattr(past, "layers", None)
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    return Cache(layers=[SharedPrefix(layer.keys, layer.values) for layer in layers])


def _last_logits(network: Any, endings: list[Ids], prefix: int, cache: Cache | None, padding_id: int) -> Tensor:
    """Logits (B, V) after the last token of each ending."""
    lengths = torch.tensor([len(ids) for ids in endings])
    tokens = torch.full((len(endings), int(lengths.max())), padding_id)  # (B, S)
    mask = torch.zeros(len(endings), prefix + tokens.shape[1], dtype=torch.int64)  # (B, P + S)
    for row, ids in enumerate(endings):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : prefix + len(ids)] = 1
    device = _device(network)
    options = {"past_key_values": cache} if cache is not None else {}
    with _only_positions(network, lengths - 1) as cut:
        outputs = network(
            input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=cache is not None, **options
        )
    logits = outputs["logits"]
    return logits[:, 0] if cut else logits[torch.arange(len(endings)), (lengths - 1).to(logits.device)]


@contextlib.contextmanager
def _only_positions(network: Any, positions: Tensor) -> Iterator[bool]:
    """The output layer gets one position of each sequence, (B, 1, H) of (B, S, H); False if there is no such layer."""
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    if head is None:
        yield False
        return

    def cut(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        rows = torch.arange(len(hidden), device=hidden.device)
        return (hidden[rows, positions.to(hidden.device)][:, None], *others)

    handle = head.register_forward_pre_hook(cut)
    try:
        yield True
    finally:
        handle.remove()
