"""The decoder for CUDA with 16-bit types: the same model as `decoder.py`, in few launches and without temporaries.

Owns the weights and the order of the kernels; all intermediate results live in `StepBuffers`, at fixed addresses, so
that a step of decode rows can be captured in a CUDA graph. The residual stream is float32: the products of a layer add
to it where it lies. A step's rows are its decode rows, then its prefill tokens.

A decode layer of 4-bit weights is seven launches: norm, qkv, attention (with RoPE, quantization and append), output,
norm, gate and up with SwiGLU, down.
"""

import math
from dataclasses import dataclass

import torch

from lmdserve.kernels.attention_workspace import AttentionWorkspace
from lmdserve.kernels.embedding import embed
from lmdserve.kernels.kv_cache import append_kv
from lmdserve.kernels.paged_attention import decode_attention
from lmdserve.kernels.prefill_attention import prefill_attention
from lmdserve.kernels.rms_norm import rms_norm
from lmdserve.kernels.rope_tables import rope_tables

from ..fused_linear import FusedLinear, Head
from ..kv_cache import KVCache
from ..model_config import ModelConfig
from ..step_buffers import SlotTables, StepBuffers


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRows:
    """The sequences of a step that bring several tokens; all tensors int32 on the device."""

    query_starts: torch.Tensor  # [num_seqs + 1], from 0: which of the step's prefill tokens belong to which sequence
    slots: torch.Tensor  # [num_seqs]
    context_lens: torch.Tensor  # [num_seqs], tokens in the cache once this step has appended
    max_query_len: int
    max_context_len: int
    total_context_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedStep:
    """One step's work; all tensors int32 on the device, rows in order: decode rows, then prefill tokens."""

    token_ids: torch.Tensor  # [num_tokens]; -1: the token its slot sampled last, which the host has not seen yet
    positions: torch.Tensor  # [num_tokens], position in its own sequence; -1 for a padding row
    slots: torch.Tensor  # [num_tokens], the row of the slot tables that belongs to the token's sequence
    context_lens: torch.Tensor  # [num_decode_rows], including the row's own token; 0 for a padding row
    has_drafts: bool  # several decode rows may belong to one sequence, so all keys and values are appended first
    is_deterministic: bool
    prefill: PrefillRows | None

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return len(self.token_ids)

    @property
    def num_decode_rows(self) -> int:
        """Rows that bring a sequence's newest token, or a guess at one to come."""
        return len(self.context_lens)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What a step reads and changes beside the weights."""

    kv_cache: KVCache
    tables: SlotTables
    buffers: StepBuffers
    attention: AttentionWorkspace


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLayer:
    """The weights of one layer."""

    index: int
    attention_norm: torch.Tensor
    qkv: FusedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: FusedLinear
    mlp_norm: torch.Tensor
    gate_up: FusedLinear
    down: FusedLinear
    # int32 [hidden_size], where a weight has its inputs sorted by scale group (input_order.py): input i is order[i].
    qkv_order: torch.Tensor | None = None
    gate_up_order: torch.Tensor | None = None


class FusedDecoder:
    """A loaded model. `forward` changes the memory it is given, and nothing else."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: torch.Tensor,
        layers: list[FusedLayer],
        final_norm: torch.Tensor,
        head: Head,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self.head = head
        self._softmax_scale = 1.0 / math.sqrt(config.head_dim)

    def first_layer_alone(self) -> "FusedDecoder":
        """Return a decoder that launches every kernel that this one launches, once."""
        return FusedDecoder(
            self.config,
            embedding=self._embedding,
            layers=self._layers[:1],
            final_norm=self._final_norm,
            head=self.head,
        )

    @torch.inference_mode()
    def forward(self, step: FusedStep, memory: StepMemory) -> None:
        """Append the step's tokens to the cache and leave their last hidden states in the residual buffer."""
        buffers, tables, rows = memory.buffers, memory.tables, slice(0, step.num_tokens)
        embed(self._embedding, step.token_ids, tables.last_token_ids, step.slots, buffers.residual[rows])
        rope_tables(step.positions, tables.frequencies, step.slots, buffers.cosines[rows], buffers.sines[rows])
        for layer in self._layers:
            self._attend(layer, step, memory)
            self._transform(layer, step, buffers)

    @torch.inference_mode()
    def logits(self, step: FusedStep, rows: torch.Tensor | None, memory: StepMemory) -> torch.Tensor:
        """Return the fp32 logits of these rows (int32 [num_rows]; None: all) of the step that ran last.

        They are in a buffer that the next call overwrites; it has room for `StepLimits.max_logit_rows`.
        """
        num_rows = step.num_tokens if rows is None else len(rows)
        x, logits = memory.buffers.head_inputs[:num_rows], memory.buffers.logits[:num_rows]
        self.hidden_states(step, rows, memory, x)
        self.head.store(x, logits, deterministic=step.is_deterministic)
        return logits

    @torch.inference_mode()
    def hidden_states(self, step: FusedStep, rows: torch.Tensor | None, memory: StepMemory, out: torch.Tensor) -> None:
        """Write what the head multiplies to `out`, [num_rows, hidden_size]; rows as in `logits`."""
        residual = memory.buffers.residual[: step.num_tokens]
        rms_norm(residual, self._final_norm, self.config.rms_norm_eps, out, rows=rows)

    def _attend(self, layer: FusedLayer, step: FusedStep, memory: StepMemory) -> None:
        """Add the attention block of one layer to the residual."""
        buffers, num_tokens, num_decode_rows = memory.buffers, step.num_tokens, step.num_decode_rows
        attended, residual = buffers.attended[:num_tokens], buffers.residual[:num_tokens]
        qkv = self._project(layer, step, buffers)
        if step.has_drafts:
            self._append(layer, step, memory, qkv, slice(0, num_decode_rows))
        if num_decode_rows:
            self._attend_decode_rows(layer, step, memory, qkv[:num_decode_rows], attended[:num_decode_rows])
        if step.prefill is not None:
            prefill_rows = slice(num_decode_rows, num_tokens)
            self._append(layer, step, memory, qkv, prefill_rows)
            self._attend_prefill_rows(
                layer, step, step.prefill, memory, buffers.queries[prefill_rows], attended[prefill_rows]
            )
        layer.output.add(attended, residual, deterministic=step.is_deterministic)

    def _project(self, layer: FusedLayer, step: FusedStep, buffers: StepBuffers) -> torch.Tensor:
        """Return the rows' queries, keys and values, as the product gives them."""
        num_tokens, eps = step.num_tokens, self.config.rms_norm_eps
        x, residual = buffers.normed[:num_tokens], buffers.residual[:num_tokens]
        if layer.qkv.accumulates(num_tokens) and not step.is_deterministic:
            sums = buffers.qkv_sums[:num_tokens]
            rms_norm(residual, layer.attention_norm, eps, x, zero=sums, order=layer.qkv_order)
            layer.qkv.add(x, sums, deterministic=False)
            return sums
        qkv = buffers.qkv[:num_tokens]
        rms_norm(residual, layer.attention_norm, eps, x, order=layer.qkv_order)
        layer.qkv.store(x, qkv, deterministic=step.is_deterministic)
        return qkv

    def _append(self, layer: FusedLayer, step: FusedStep, memory: StepMemory, qkv: torch.Tensor, rows: slice) -> None:
        """Rotate the rows' queries into their buffer, and their keys, with the values, into the cache."""
        buffers, kv_cache = memory.buffers, memory.kv_cache
        append_kv(
            qkv[rows],
            buffers.cosines[rows],
            buffers.sines[rows],
            *kv_cache.layer(layer.index),
            memory.tables.block_tables,
            step.slots[rows],
            step.positions[rows],
            buffers.queries[rows],
            bits=kv_cache.bits,
            num_heads=self.config.num_heads,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            norm_eps=self.config.rms_norm_eps,
        )

    def _attend_decode_rows(
        self, layer: FusedLayer, step: FusedStep, memory: StepMemory, qkv: torch.Tensor, attended: torch.Tensor
    ) -> None:
        buffers, kv_cache, rows = memory.buffers, memory.kv_cache, slice(0, step.num_decode_rows)
        decode_attention(
            buffers.queries[rows].flatten(1) if step.has_drafts else qkv,
            buffers.cosines[rows],
            buffers.sines[rows],
            *kv_cache.layer(layer.index),
            memory.tables.block_tables,
            step.slots[rows],
            step.context_lens,
            attended,
            memory.attention,
            bits=kv_cache.bits,
            softmax_scale=self._softmax_scale,
            num_heads=self.config.num_heads,
            sliding_window=self.config.sliding_window,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            norm_eps=self.config.rms_norm_eps,
            appends=not step.has_drafts,
        )

    def _attend_prefill_rows(
        self,
        layer: FusedLayer,
        step: FusedStep,
        prefill: PrefillRows,
        memory: StepMemory,
        queries: torch.Tensor,
        attended: torch.Tensor,
    ) -> None:
        kv_cache = memory.kv_cache
        prefill_attention(
            queries,
            *kv_cache.layer(layer.index),
            memory.tables.block_tables,
            prefill.slots,
            prefill.query_starts,
            prefill.context_lens,
            attended,
            memory.attention,
            max_query_len=prefill.max_query_len,
            max_context_len=prefill.max_context_len,
            max_total_context_len=prefill.total_context_len,
            bits=kv_cache.bits,
            softmax_scale=self._softmax_scale,
            sliding_window=self.config.sliding_window,
            deterministic=step.is_deterministic,
        )

    def _transform(self, layer: FusedLayer, step: FusedStep, buffers: StepBuffers) -> None:
        """Add the MLP block of one layer to the residual."""
        num_tokens = step.num_tokens
        x, residual = buffers.normed[:num_tokens], buffers.residual[:num_tokens]
        activated = buffers.activated[:num_tokens]
        rms_norm(residual, layer.mlp_norm, self.config.rms_norm_eps, x, order=layer.gate_up_order)
        layer.gate_up.swiglu(x, activated, deterministic=step.is_deterministic)
        layer.down.add(activated, residual, deterministic=step.is_deterministic)
