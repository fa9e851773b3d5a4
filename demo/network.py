"""The demo model as it is trained: InternLM2's decoder in plain torch over packed documents, and nothing else.

One flat row of tokens holds many documents; `starts` says where each begins, attention stays inside a document and
positions begin at 0 in each. The engine has its own implementation of the same model; `export.py` writes what it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of the model."""

    vocab_size: int = 3328
    hidden_size: int = 384
    intermediate_size: int = 640
    num_layers: int = 8
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError("InternLM2 has no head_dim of its own: hidden_size must be num_heads * head_dim")


def packed_flash_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention inside each document on a GPU; tensors are [num_tokens, num_heads, head_dim]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, 0.0, True, False
    )[0]
    return output


def packed_dense_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """The same in plain torch with a full mask: for a CPU, and to check the other one."""
    positions = torch.arange(query.shape[0], device=query.device)
    document = torch.searchsorted(starts, positions, right=True)  # [num_tokens]
    mask = (document[:, None] == document[None, :]) & (positions[:, None] >= positions[None, :])
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, heads, tokens, head_dim]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return output[0].transpose(0, 1)


def rotary_tables(shape: Shape, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each [num_positions, head_dim], in the half-and-half layout."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim)
    angles = torch.arange(num_positions, device=device).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([angles.sin(), angles.sin()], -1)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply RoPE; `states` is [..., heads, head_dim], the tables [..., head_dim]."""
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return (states * cosine[..., None, :] + turned * sine[..., None, :]).to(states.dtype)


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight).to(states.dtype)


class Layer(nn.Module):
    """One decoder layer; q, k and v are separate here and interleaved on export."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, kv_size = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        self.attention_norm = Norm(hidden, shape.rms_norm_eps)
        self.wq = nn.Linear(hidden, hidden, bias=False)
        self.wk = nn.Linear(hidden, kv_size, bias=False)
        self.wv = nn.Linear(hidden, kv_size, bias=False)
        self.wo = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = Norm(hidden, shape.rms_norm_eps)
        self.w1 = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.w3 = nn.Linear(hidden, shape.intermediate_size, bias=False)
        self.w2 = nn.Linear(shape.intermediate_size, hidden, bias=False)

    def project(self, states: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries, rotated keys and values, each [..., heads, head_dim]."""
        normed = self.attention_norm(states)
        query = self.wq(normed).unflatten(-1, (self.shape.num_heads, self.shape.head_dim))
        key = self.wk(normed).unflatten(-1, (self.shape.num_kv_heads, self.shape.head_dim))
        value = self.wv(normed).unflatten(-1, (self.shape.num_kv_heads, self.shape.head_dim))
        return rotate(query, cosine, sine), rotate(key, cosine, sine), value

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """Add attention's output and the MLP to the residual stream."""
        states = states + self.wo(attended.flatten(-2))
        normed = self.ffn_norm(states)
        change: Tensor = self.w2(F.silu(self.w1(normed)) * self.w3(normed))
        return states + change


class Network(nn.Module):
    """The decoder with its embeddings and output head."""

    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.shape = shape
        self.attention = attention
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.output = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            if name.endswith(("wo.weight", "w2.weight", "output.weight")):
                nn.init.zeros_(parameter)
            elif name.startswith("tok_embeddings"):
                nn.init.normal_(parameter, std=0.2)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, token_ids: Tensor, positions: Tensor, starts: Tensor, longest: int) -> Tensor:
        """Return the final hidden states [num_tokens, hidden] of packed documents."""
        cosine, sine = rotary_tables(self.shape, self.shape.max_position_embeddings, token_ids.device)
        cosine, sine = cosine[positions], sine[positions]
        states = self.tok_embeddings(token_ids)
        if torch.is_autocast_enabled(token_ids.device.type):
            states = states.to(torch.get_autocast_dtype(token_ids.device.type))
            cosine, sine = cosine.to(states.dtype), sine.to(states.dtype)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            query, key, value = layer.project(states, cosine, sine)
            states = layer.finish(states, self.attention(query, key, value, starts, longest))
        normed: Tensor = self.norm(states)
        return normed

    def loss(self, token_ids: Tensor, weights: Tensor, positions: Tensor, starts: Tensor, longest: int) -> Tensor:
        """Return the weighted mean loss of predicting each token from those before it in its document.

        `weights` [num_tokens] belongs to the predicted token and is 0 for the first of each document. A small penalty
        on the log-partition keeps logits from drifting.
        """
        states = self.forward(token_ids, positions, starts, longest)
        logits = self.output(states[:-1]).float()
        partition = logits.logsumexp(-1)
        chosen = logits.gather(1, token_ids[1:, None])[:, 0]
        weight = weights[1:]
        loss: Tensor = ((partition - chosen + 1e-5 * partition**2) * weight).sum() / weight.sum()
        return loss
