"""The model families as a table of differences: names on disk, config keys, biases, norms. One decoder runs them all.

No torch here and no file access: `model_config` reads config.json with this table, `loader` maps tensor names with it.
A new family is a new row. Sources are the families' public configurations and checkpoints.
"""

from dataclasses import dataclass

# A bias is always there, never there, or there when one of these config keys (old and new spelling) says so.
BiasRule = bool | tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Module names on disk, without their `.weight` or `.qweight`; per-layer ones follow `model.layers.N.`."""

    embedding: str
    final_norm: str
    head: str
    attention_norm: str
    qkv: tuple[str, ...]  # (q, k, v), or one fused module with q, k and v interleaved by key-value head
    output: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    q_norm: str
    k_norm: str

    @property
    def has_fused_qkv(self) -> bool:
        return len(self.qkv) == 1


LLAMA_NAMES = TensorNames(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)

INTERNLM2_NAMES = TensorNames(
    embedding="model.tok_embeddings",
    final_norm="model.norm",
    head="output",
    attention_norm="attention_norm",
    qkv=("attention.wqkv",),
    output="attention.wo",
    mlp_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    q_norm="attention.q_norm",
    k_norm="attention.k_norm",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What makes one family differ from the others. A default of None means that config.json must have the key."""

    name: str
    model_type: str
    architectures: tuple[str, ...]  # the first is the usual one
    names: TensorNames = LLAMA_NAMES
    qkv_bias: BiasRule = False
    output_bias: BiasRule = False
    mlp_bias: BiasRule = False
    bias_default: bool | None = False
    has_qk_norm: bool = False
    has_gqa_key: bool = True  # False: num_key_value_heads may be absent and then equals num_attention_heads
    requires_head_dim: bool = False
    rope_theta_default: float | None = None
    has_sliding_window: bool = False
    tie_word_embeddings_default: bool | None = False


FAMILIES: tuple[Family, ...] = (
    Family(
        name="InternLM2",
        model_type="internlm2",
        architectures=("InternLM2ForCausalLM",),
        names=INTERNLM2_NAMES,
        qkv_bias=("bias",),
        output_bias=("bias",),
        bias_default=None,  # its configuration class says True where every shipped file says false
    ),
    Family(
        name="InternLM",
        model_type="internlm",
        architectures=("InternLMForCausalLM",),
        qkv_bias=("bias",),
        output_bias=("bias",),
        bias_default=None,
        has_gqa_key=False,
        rope_theta_default=10000.0,
    ),
    Family(
        name="InternLM3",
        model_type="internlm3",
        architectures=("InternLM3ForCausalLM", "LlamaForCausalLM"),  # transformers saves it as the latter
        qkv_bias=("qkv_bias", "attention_bias"),
        output_bias=("bias", "mlp_bias"),
        mlp_bias=("bias", "mlp_bias"),
        bias_default=None,
    ),
    Family(
        name="Llama",
        model_type="llama",
        architectures=("LlamaForCausalLM",),
        qkv_bias=("attention_bias",),
        output_bias=("attention_bias",),
        mlp_bias=("mlp_bias",),
        has_gqa_key=False,
        rope_theta_default=10000.0,  # the first Llama 2 files have no such key
    ),
    Family(
        name="Mistral",
        model_type="mistral",
        architectures=("MistralForCausalLM",),
        has_sliding_window=True,
    ),
    Family(
        name="Qwen2",
        model_type="qwen2",
        architectures=("Qwen2ForCausalLM",),
        qkv_bias=True,
        has_sliding_window=True,
        tie_word_embeddings_default=None,
    ),
    Family(
        name="Qwen3",
        model_type="qwen3",
        architectures=("Qwen3ForCausalLM",),
        qkv_bias=("attention_bias",),
        output_bias=("attention_bias",),
        has_qk_norm=True,
        requires_head_dim=True,
        has_sliding_window=True,
        tie_word_embeddings_default=None,
    ),
)
