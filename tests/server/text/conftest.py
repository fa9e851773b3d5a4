"""Tokenizers for these tests: InternLM2's real one where it is at hand, and small ones of each kind built here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lmdserve.server.text import Tokenizer

SHARED_FIXTURES = Path(__file__).parents[3].parent / "shared" / "fixtures"

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "一只狐狸和一个西瓜的小故事。狐狸喜欢西瓜，西瓜不喜欢狐狸。",
    "def add(a, b):\n    return a + b  # adds   two numbers",
    "Numbers such as 3.14159 and 2,718 and 42 are numbers; so is ½, and Ｆｕｌｌ－ｗｉｄｔｈ ones.",
    "naïve café, façade; Ελληνικά, русский язык, العربية.",
]


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    if not SHARED_FIXTURES.is_dir():
        pytest.skip(f"no reference data at {SHARED_FIXTURES}")
    return SHARED_FIXTURES


@pytest.fixture(scope="session")
def internlm2_folder(shared_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternLM2's own tokenizer.model, with no other tokenizer file beside it."""
    folder = tmp_path_factory.mktemp("internlm2")
    shutil.copy(shared_fixtures / "tokenizer_internlm2.model", folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "internlm2", "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="session")
def internlm2_tokenizer(internlm2_folder: Path) -> Tokenizer:
    return Tokenizer.load(internlm2_folder)


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a small SentencePiece model and return its folder; keywords are the trainer's."""

    def train(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("sentencepiece")
        settings: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": 420,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "hard_vocab_limit": False,
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 20), model_prefix=str(folder / "tokenizer"), **(settings | options)
        )
        return folder

    return train


@pytest.fixture(scope="session")
def write_tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a folder with a tokenizer.json of one of the kinds below; further keywords are further JSON files."""

    def write(kind: str, control_tokens: list[str | tokenizers.AddedToken], **files: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        pipeline = PIPELINES[kind]()
        for token in control_tokens:
            added = token if isinstance(token, tokenizers.AddedToken) else tokenizers.AddedToken(token, special=True)
            (pipeline.add_special_tokens if added.special else pipeline.add_tokens)([added])
        if pipeline.token_to_id("<s>") is not None:
            pipeline.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", pipeline.token_to_id("<s>"))]
            )
        pipeline.save(str(folder / "tokenizer.json"))
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


def _byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind, as Qwen and Llama 3 have it."""
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pipeline.train_from_iterator(CORPUS, trainer)
    return pipeline


def _byte_fallback() -> tokenizers.Tokenizer:
    symbols = ["▁", *"abcdefghijklmnopqrstuvwxyzTHUS|<>[]_/.,"]
    pairs = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "m"), ("e", "n"), ("en", "d"), ("▁", "▁")]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *symbols, *(left + right for left, right in pairs)]
    return tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, pairs, unk_token="<unk>", byte_fallback=True)
    )


def _llama_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _prefix_everywhere() -> tokenizers.Tokenizer:
    """Llama 2's: a space before every span between control tokens."""
    pipeline = _byte_fallback()
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pipeline.decoder = _llama_decoder()
    return pipeline


def _prefix_first() -> tokenizers.Tokenizer:
    """Mistral's newer ones: a space before a text, but not before spans after a control token."""
    pipeline = _byte_fallback()
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    pipeline.decoder = _llama_decoder()
    return pipeline


PIPELINES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": _byte_level,
    "prefix_everywhere": _prefix_everywhere,
    "prefix_first": _prefix_first,
}


# Small templates in the manner of each family: what they share with the real ones is the features they use.
QWEN_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{%- continue %}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n' }}
{%- for tool in tools or [] %}
    {{- tool | tojson(indent=4) }}
{%- endfor %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role in ('tool', 'ipython') else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('only one call at once') }}{%- endif %}
        {%- set function = message.tool_calls[0].function %}
        {{- '{"name": "' + function.name + '", "parameters": ' + function.arguments | tojson + '}' }}
    {%- else %}
        {%- generation %}{{- message.content | trim }}{%- endgeneration %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL_TEMPLATE = """\
{{ bos_token }}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
            {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + {'content': message.content, 'call_id': message.tool_call_id} | tojson }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""

THINK_AND_TOOL_MARKS = [
    tokenizers.AddedToken(text, special=False, normalized=False)
    for text in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
]
MISTRAL_MARKS = [
    f"[{slash}{name}]"
    for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
    for slash in ("", "/")
] + ["[TOOL_CALLS]"]  # fmt: skip
INTERNLM2_MARKS = [
    f"<|{name}|>" for name in ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start")
]


@pytest.fixture(scope="session")
def family_folders(write_tokenizer_json: Callable[..., Path]) -> dict[str, Path]:
    """One small checkpoint folder per family, by name."""

    def named(template: str | None, **tokens: str) -> dict[str, Any]:
        return tokens if template is None else tokens | {"chat_template": template}

    def config(model_type: str) -> dict[str, Any]:
        return {"model_type": model_type}

    llama2_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return {
        "internlm2": write_tokenizer_json(
            "byte_level",
            ["<s>", "</s>", *INTERNLM2_MARKS],
            tokenizer_config=named(None, **llama2_tokens),
            config=config("internlm2"),
        ),
        "internlm": write_tokenizer_json(
            "prefix_everywhere",
            ["<s>", "</s>", "<eoh>", "<eoa>"],
            tokenizer_config=named(None, **llama2_tokens),
            config=config("internlm"),
        ),
        "qwen": write_tokenizer_json(
            "byte_level",
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *THINK_AND_TOOL_MARKS],
            tokenizer_config=named(QWEN_TEMPLATE, eos_token="<|im_end|>"),
            config=config("qwen3"),
        ),
        "llama3": write_tokenizer_json(
            "byte_level",
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
            tokenizer_config=named(LLAMA3_TEMPLATE, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
            config=config("llama"),
        ),
        "llama2": write_tokenizer_json(
            "prefix_everywhere",
            ["<s>", "</s>"],
            tokenizer_config=named(None, **llama2_tokens),
            config=config("llama"),
        ),
        "mistral": write_tokenizer_json(
            "prefix_first",
            ["<s>", "</s>", *MISTRAL_MARKS],
            tokenizer_config=named(MISTRAL_TEMPLATE, **llama2_tokens),
            config=config("mistral"),
        ),
    }
