"""Write a checkpoint folder with random weights at a known model's geometry, for benchmarks and memory measurements.

    python benchmarks/random_model.py --shape internlm2.5-7b --format awq --out /tmp/internlm2.5-7b-awq

The folder is complete: config.json with the family's names, safetensors shards, a byte-level tokenizer of the model's
vocabulary (words of syllables are one token, all else falls back to bytes), generation_config.json. Weights are sized
so that activations keep their magnitude through all layers. Every bit follows from the seed and the tensor's name,
whatever device computes it; on a GPU the speed is the disk's. Owns no model code and reads nothing.
"""

import argparse
import itertools
import json
import math
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmdserve.engine.families import FAMILIES, Family

WeightFormat = Literal["awq", "fp16", "bf16"]

GROUP_SIZE = 128
WORD_MASK = 0xFFFFFFFF
MAX_SHARD_BYTES = 1_000_000_000
NUM_WRITERS = 4  # more than one core's page faults to fill a page cache, few enough to leave cores to a reader
LINEAR_GAIN = 1.0  # standard deviation of a product's outputs for inputs of deviation 1
HEAD_GAIN = 2.0  # of logits: some tokens stand out, so that sampling has work to do
UNIFORM_DEVIATION = 1 / math.sqrt(3)  # of numbers uniform in -1..1
CODE_DEVIATION = math.sqrt((16**2 - 1 + 4**2 - 1) / 12)  # of code - zero: codes uniform in 0..15, zeros in 6..9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's geometry and the keys of config.json that its family needs beside it."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    vocab_size: int
    max_position_embeddings: int
    family_keys: tuple[tuple[str, Any], ...]

    @property
    def family(self) -> Family:
        return next(family for family in FAMILIES if family.model_type == self.model_type)


def internlm2(hidden: int, intermediate: int, layers: int, heads: int, **changes: Any) -> Shape:
    """Return an InternLM2.5 geometry."""
    shape = Shape(
        model_type="internlm2",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        vocab_size=92544,
        max_position_embeddings=32768,
        family_keys=(("rope_theta", 1000000.0), ("rope_scaling", {"type": "dynamic", "factor": 2.0})),
    )
    return replace(shape, **changes)


def llama2(hidden: int, intermediate: int, layers: int, heads: int) -> Shape:
    """Return a Llama 2 geometry without grouped queries."""
    return Shape(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        vocab_size=32000,
        max_position_embeddings=4096,
        family_keys=(("rope_theta", 10000.0), ("rope_scaling", None)),
    )


SHAPES = {
    "internlm2.5-1.8b": internlm2(2048, 8192, 24, 16),
    "internlm2.5-7b": internlm2(4096, 14336, 32, 32),
    "internlm2.5-20b": internlm2(6144, 16384, 48, 48),
    "llama-2-7b": llama2(4096, 11008, 32, 32),
    "llama-2-13b": llama2(5120, 13824, 40, 40),
    "tiny": internlm2(256, 512, 2, 4, num_kv_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=2048),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--format", choices=("awq", "fp16", "bf16"), default="awq")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for quick checks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, num_layers=arguments.layers)
    start_s = time.perf_counter()
    num_bytes = write_model(shape, arguments.format, arguments.out, seed=arguments.seed)
    print(f"{arguments.out}: {num_bytes / 1e9:.2f} GB in {time.perf_counter() - start_s:.1f} s")
    return 0


def write_model(shape: Shape, weight_format: WeightFormat, folder: Path, *, seed: int = 0) -> int:
    """Write the folder and return how many bytes of weights it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = list(plan_tensors(shape, weight_format))
    shards = list(split_into_shards(plans))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    generator = WordGenerator(seed, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with ThreadPoolExecutor(NUM_WRITERS) as writers:
        list(writers.map(lambda name, shard: write_shard(folder / name, shard, generator), names, shards))
    num_bytes = sum(plan.num_bytes for plan in plans)
    weight_map = {plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config_json(shape, weight_format))
    end_tokens = [2, shape.vocab_size - 2] if shape.model_type == "internlm2" else 2
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": end_tokens, "pad_token_id": 2})
    write_tokenizer(shape, folder)
    return num_bytes


class TensorPlan(NamedTuple):
    """A tensor before it is computed. Words are 32 random bits; `kind` says what becomes of them."""

    name: str
    kind: Literal["uniform", "ones", "codes", "zeros", "scales"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    deviation: float = 1.0  # of the values, or for scales of the weights that they scale

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_tensors(shape: Shape, weight_format: WeightFormat) -> Iterator[TensorPlan]:
    """Yield every tensor of the checkpoint, in the order of the files."""
    dtype = torch.bfloat16 if weight_format == "bf16" else torch.float16
    names, hidden = shape.family.names, shape.hidden_size
    query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv_sizes = (query_size + 2 * kv_size,) if names.has_fused_qkv else (query_size, kv_size, kv_size)
    linears = [
        *((name, hidden, size) for name, size in zip(names.qkv, qkv_sizes, strict=True)),
        (names.output, query_size, hidden),
        (names.gate, hidden, shape.intermediate_size),
        (names.up, hidden, shape.intermediate_size),
        (names.down, shape.intermediate_size, hidden),
    ]
    yield TensorPlan(f"{names.embedding}.weight", "uniform", (shape.vocab_size, hidden), dtype)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        yield TensorPlan(f"{prefix}{names.attention_norm}.weight", "ones", (hidden,), dtype)
        yield TensorPlan(f"{prefix}{names.mlp_norm}.weight", "ones", (hidden,), dtype)
        for name, in_features, out_features in linears:
            yield from plan_linear(prefix + name, in_features, out_features, weight_format, dtype)
    yield TensorPlan(f"{names.final_norm}.weight", "ones", (hidden,), dtype)
    deviation = HEAD_GAIN / math.sqrt(hidden)
    yield TensorPlan(f"{names.head}.weight", "uniform", (shape.vocab_size, hidden), dtype, deviation)


def plan_linear(
    name: str, in_features: int, out_features: int, weight_format: WeightFormat, dtype: torch.dtype
) -> Iterator[TensorPlan]:
    deviation = LINEAR_GAIN / math.sqrt(in_features)
    if weight_format != "awq":
        yield TensorPlan(f"{name}.weight", "uniform", (out_features, in_features), dtype, deviation)
        return
    groups = in_features // GROUP_SIZE
    yield TensorPlan(f"{name}.qweight", "codes", (in_features, out_features // 8), torch.int32)
    yield TensorPlan(f"{name}.qzeros", "zeros", (groups, out_features // 8), torch.int32)
    yield TensorPlan(f"{name}.scales", "scales", (groups, out_features), dtype, deviation)


class WordGenerator:
    """Random 32-bit words as a hash of seed, tensor name and index: the same on every device, in any order."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self.device = device

    def words(self, name: str, count: int) -> Tensor:
        """Return int32 [count]."""
        key = zlib.crc32(f"{self._seed}/{name}".encode())
        mixed = mix_bits(mix_bits(torch.arange(count, dtype=torch.int64, device=self.device)) ^ key)
        return mixed.to(torch.int32)

    def tensor(self, plan: TensorPlan) -> Tensor:
        """Return the tensor that `plan` describes, on the generator's device."""
        count = math.prod(plan.shape)
        if plan.kind == "ones":
            return torch.ones(plan.shape, dtype=plan.dtype, device=self.device)
        if plan.kind == "codes":
            return self.words(plan.name, count).view(plan.shape)
        if plan.kind == "zeros":  # 6 + two random bits in every nibble
            return ((self.words(plan.name, count) & 0x33333333) + 0x66666666).view(plan.shape)
        halves = self.words(plan.name, -(-count // 2)).view(torch.int16)[:count].view(plan.shape)
        if plan.kind == "uniform":
            return halves.float().mul_(plan.deviation / UNIFORM_DEVIATION / 2**15).to(plan.dtype)
        return halves.float().div_(2**17).add_(1.0).mul_(plan.deviation / CODE_DEVIATION).to(plan.dtype)


def mix_bits(words: Tensor) -> Tensor:
    """Return int64 words below 2**32, mixed in place by the two-round multiply-xorshift hash lowbias32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words ^= words >> shift
        words *= factor
        words &= WORD_MASK
    words ^= words >> 16
    return words


def split_into_shards(plans: Iterable[TensorPlan]) -> Iterator[list[TensorPlan]]:
    shard: list[TensorPlan] = []
    size = 0
    for plan in plans:
        if shard and size + plan.num_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(plan)
        size += plan.num_bytes
    yield shard


def write_shard(path: Path, plans: list[TensorPlan], generator: WordGenerator) -> None:
    """Write one safetensors file; tensors are copied from the device straight into the mapped file."""
    dtype_names = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}
    ends = list(itertools.accumulate(plan.num_bytes for plan in plans))
    records: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for plan, end in zip(plans, ends, strict=True):
        offsets = [end - plan.num_bytes, end]
        records[plan.name] = {"dtype": dtype_names[plan.dtype], "shape": plan.shape, "data_offsets": offsets}
    header = json.dumps(records, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that every tensor begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + ends[-1])
    mapped = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    data = mapped[8 + len(header) :]
    for plan, end in zip(plans, ends, strict=True):
        data[end - plan.num_bytes : end].view(plan.dtype).view(plan.shape).copy_(generator.tensor(plan))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def config_json(shape: Shape, weight_format: WeightFormat) -> dict[str, Any]:
    """Return config.json."""
    config = {
        "architectures": [shape.family.architectures[0]],
        "model_type": shape.model_type,
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16" if weight_format == "bf16" else "float16",
        "vocab_size": shape.vocab_size,
        **dict(shape.family_keys),
    }
    if weight_format == "awq":
        config["quantization_config"] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "zero_point": True,
            "modules_to_not_convert": None,
        }
    return config


FIRST_TOKENS = ("<unk>", "<s>", "</s>")
CONTROL_TOKENS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
SPACE = "Ġ"  # how byte-level vocabularies write a space
CHATML_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
)


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; the InternLM2 control tokens are the vocabulary's last."""
    last_tokens = CONTROL_TOKENS if shape.model_type == "internlm2" else ()
    tokens = [*FIRST_TOKENS, *byte_characters()]
    merges = list(itertools.islice(merged_pairs(), shape.vocab_size - len(tokens) - len(last_tokens)))
    tokens += [*("".join(pair) for pair in merges), *last_tokens]
    special = {index: text for index, text in enumerate(tokens) if text in (*FIRST_TOKENS, *last_tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {text: index for index, text in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = {
        "added_tokens_decoder": {str(index): {"content": text, **flags} for index, text in special.items()},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHATML_TEMPLATE if last_tokens else PLAIN_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)


def byte_characters() -> list[str]:
    """Return the 256 characters that stand for bytes: printable Latin-1 for itself, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merged_pairs() -> Iterator[tuple[str, str]]:
    """Yield BPE merges by rank: syllables, then a space with one, two and three of them."""
    syllables = ["".join(pair) for pair in itertools.product("bcdfghjklmnpqrstvwxyz", "aeiou")]
    yield from itertools.product("bcdfghjklmnpqrstvwxyz", "aeiou")
    stems = [SPACE]
    for _ in range(3):
        yield from itertools.product(stems, syllables)
        stems = [stem + syllable for stem in stems for syllable in syllables]


if __name__ == "__main__":
    sys.exit(main())
