"""Greedy decoding of many prompts at once with a KV cache, for scoring a network while it is being trained.

Serving is the engine's work; this exists so that training depends on nothing but torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .network import Layer, Network, rotary_tables

KVTransform = Callable[[Tensor], Tensor]


def unchanged(states: Tensor) -> Tensor:
    """Keep keys and values as computed."""
    return states


@dataclass(slots=True)
class _Cache:
    """Keys and values of every layer, [num_layers, batch, kv_heads, num_positions, head_dim]."""

    keys: Tensor
    values: Tensor


@torch.no_grad()
def greedy(
    network: Network,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    batch_size: int = 256,
    kv_transform: KVTransform = unchanged,
) -> list[list[int]]:
    """Return what the network writes after each prompt, without the stop token."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    outputs: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        written = _greedy_batch(network, [prompts[index] for index in chosen], stop_ids, max_new_tokens, kv_transform)
        for index, tokens in zip(chosen, written, strict=True):
            outputs[index] = tokens
    return outputs


def _greedy_batch(
    network: Network,
    prompts: list[Sequence[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    kv_transform: KVTransform,
) -> list[list[int]]:
    device = network.output.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    token_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)] = torch.tensor(prompt)
    shape = network.shape
    size = (shape.num_layers, len(prompts), shape.num_kv_heads, longest + max_new_tokens, shape.head_dim)
    dtype = (
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else network.output.weight.dtype
    )
    cache = _Cache(torch.zeros(size, device=device, dtype=dtype), torch.zeros(size, device=device, dtype=dtype))
    positions = torch.arange(longest, device=device).expand(len(prompts), longest)
    states = _forward(network, token_ids.to(device), positions, cache, kv_transform)
    logits = network.output(states[torch.arange(len(prompts), device=device), lengths - 1])
    stops = torch.tensor(sorted(stop_ids), device=device)
    written: list[Tensor] = []
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        tokens = logits.argmax(-1)
        written.append(tokens)
        finished |= torch.isin(tokens, stops)
        if step % 8 == 7 and bool(finished.all()):
            break
        states = _forward(network, tokens[:, None], (lengths + step)[:, None], cache, kv_transform)
        logits = network.output(states[:, 0])
    rows = torch.stack(written, 1).tolist()
    return [_until_stop(row, stop_ids) for row in rows]


def _until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:index]
    return tokens


def _forward(
    network: Network, token_ids: Tensor, positions: Tensor, cache: _Cache, kv_transform: KVTransform
) -> Tensor:
    """Compute `token_ids` [batch, n] at `positions` [batch, n]; slots after a position are masked."""
    num_slots = int(cache.keys.shape[3])
    cosine, sine = rotary_tables(network.shape, num_slots, token_ids.device)
    cosine, sine = cosine[positions].to(cache.keys.dtype), sine[positions].to(cache.keys.dtype)
    last = num_slots if token_ids.shape[1] == 1 else token_ids.shape[1]
    mask = torch.arange(last, device=token_ids.device)[None, None, :] <= positions[:, :, None]  # [batch, n, slots]
    states = network.tok_embeddings(token_ids).to(cache.keys.dtype)
    rows = torch.arange(token_ids.shape[0], device=token_ids.device)[:, None]
    for index, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        query, key, value = layer.project(states, cosine, sine)
        cache.keys[index].transpose(1, 2)[rows, positions] = kv_transform(key).to(cache.keys.dtype)
        cache.values[index].transpose(1, 2)[rows, positions] = kv_transform(value).to(cache.keys.dtype)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            cache.keys[index, :, :, :last],
            cache.values[index, :, :, :last],
            attn_mask=mask[:, None],
            enable_gqa=True,
        )
        states = layer.finish(states, attended.transpose(1, 2))
    normed: Tensor = network.norm(states)
    return normed
