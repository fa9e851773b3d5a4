"""config.json of every family, in old and new spellings, and every refusal with the key and the file in it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from family_checkpoints import FAMILY_CASES, FamilyCase, case_named

from lmdserve.engine.api import ConfigError
from lmdserve.engine.model_config import ModelConfig

FIXTURE = Path(__file__).parents[3] / "shared" / "fixtures" / "internlm_arch.json"


def read(folder: Path, keys: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(keys))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


@pytest.fixture(scope="module")
def architectures() -> dict[str, Any]:
    if not FIXTURE.is_file():
        pytest.skip("the shared fixtures are not beside this checkout")
    return json.loads(FIXTURE.read_text())


@pytest.mark.parametrize("size", ["internlm2/2.5-1.8b", "internlm2/2.5-7b", "internlm2/2.5-20b"])
def test_internlm2_sizes(architectures: dict[str, Any], size: str, tmp_path: Path) -> None:
    facts = architectures[size]
    config = read(tmp_path, architectures["internlm2_common_config"]["values"] | facts)
    norms = (2 * config.num_layers + 1) * config.hidden_size
    assert config.num_parameters + norms == facts["parameters"]
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (facts["num_attention_heads"], 8, 128)
    assert config.dtype_name == "bfloat16"
    assert not config.qkv_bias
    assert config.eos_token_ids == {2}


def test_ntk_bases_equal_the_reference(architectures: dict[str, Any], tmp_path: Path) -> None:
    tables = architectures["dynamic_ntk"]
    internlm2 = read(tmp_path, architectures["internlm2_common_config"]["values"] | architectures["internlm2/2.5-7b"])
    internlm3 = read(tmp_path, architectures["internlm3-8b"])
    for config, title in ((internlm2, "internlm2.5 (theta 1e6"), (internlm3, "internlm3 (theta 5e7")):
        table = next(values for name, values in tables.items() if name.startswith(title))
        for num_tokens, base in table.items():
            assert config.rope_base(int(num_tokens)) == pytest.approx(base, rel=1e-12)


NATIVE_CASES = [case for case in FAMILY_CASES if case.rename is None and case.id != "internlm1"]


@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.id)
def test_transformers_spelling_reads_the_same(case: FamilyCase, tmp_path: Path) -> None:
    """What transformers 5 writes (rope_parameters, dtype) means what the family's own file says."""
    ours = read(tmp_path, case.config_json())
    case.reference_model().save_pretrained(tmp_path)
    theirs = ModelConfig.from_folder(tmp_path)
    for name in ("family", "head_dim", "num_kv_heads", "qkv_bias", "mlp_bias", "sliding_window", "tie_word_embeddings"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.rope.kind == ours.rope.kind
    assert theirs.rope_base(1000) == ours.rope_base(1000)
    assert theirs.dtype_name == "float32"


def test_end_of_sequence_ids_come_from_both_files(tmp_path: Path) -> None:
    keys = case_named("internlm2").config_json(eos_token_id=[2, 5])
    assert read(tmp_path, keys, {"eos_token_id": 7}).eos_token_ids == {2, 5, 7}
    assert read(tmp_path, keys | {"eos_token_id": None}, {"eos_token_id": [7, 8]}).eos_token_ids == {7, 8}
    with pytest.raises(ConfigError, match=r"generation_config\.json.*eos_token_id"):
        read(tmp_path, keys, {"eos_token_id": "two"})


def test_the_base_is_theta_unless_dynamic_and_past_the_limit(tmp_path: Path) -> None:
    config = read(tmp_path, case_named("internlm2").config_json(max_position_embeddings=100))
    assert config.rope_base(1) == config.rope_base(100) == 1e6
    assert config.rope_base(101) > 1e6
    assert read(tmp_path, case_named("llama3.1").config_json()).rope_base(10**6) == 5e5


@pytest.mark.parametrize(
    "key",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "bias", "rope_theta", "model_type"),
    ],
)
def test_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    keys = case_named("internlm2").config_json()
    del keys[key]
    with pytest.raises(ConfigError, match=rf"config\.json.*{key}"):
        read(tmp_path, keys)


@pytest.mark.parametrize(
    ("case_id", "changes", "complaint"),
    [
        (
            "llama2",
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            r"mixtral.*InternLM2ForCausalLM, ",
        ),
        ("internlm2", {"architectures": ["InternLM2ForRewardModel"]}, "InternLM2ForRewardModel"),
        ("llama2", {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'.*default, dynamic"),
        ("llama2", {"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ("llama2", {"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}, "'factor' must be at least 1"),
        ("llama2", {"rope_scaling": "dynamic"}, "rope_scaling.*object"),
        ("llama3.1", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama2", {"rope_theta": -1.0}, "rope_theta"),
        ("llama2", {"rope_theta": "big"}, "'rope_theta' must be a number"),
        ("llama2", {"hidden_act": "gelu"}, "'gelu'"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama2", {"vocab_size": "many"}, "'vocab_size' must be an integer, not 'many'"),
        ("llama2", {"vocab_size": 0}, "'vocab_size' must be at least 1"),
        ("llama2", {"num_hidden_layers": 1.5}, "'num_hidden_layers' must be an integer"),
        ("llama2", {"attention_bias": "yes"}, "'attention_bias' must be true or false"),
        ("llama2", {"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ("llama2", {"hidden_size": 66}, "66 is not a multiple of num_attention_heads 4"),
        ("llama2", {"head_dim": 15}, "head_dim 15"),
        ("llama2", {"torch_dtype": "float64"}, "float64.*bfloat16"),
        ("qwen3", {"head_dim": None}, "'head_dim' is missing"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "max_window_layers 1 of 2",
        ),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama2", {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    case_id: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint) as raised:
        read(tmp_path, case_named(case_id).config_json(**changes))
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    ("case_id", "changes", "window"),
    [
        ("mistral", {}, None),
        ("mistral", {"sliding_window": 4096}, 4096),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ("qwen3", {"sliding_window": 8, "layer_types": ["full_attention"] * 2, "use_sliding_window": True}, None),
        ("qwen3", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2, "use_sliding_window": True}, 8),
        ("llama2", {"sliding_window": 8}, None),
    ],
)
def test_sliding_windows(case_id: str, changes: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    assert read(tmp_path, case_named(case_id).config_json(**changes)).sliding_window == window


def test_folders_without_a_readable_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist; --model needs a folder"):
        ModelConfig.from_folder(tmp_path)
    for name, advice in (("adapter_config.json", "adapters are not read"), ("model.Q4_K_M.gguf", "GGUF files are not")):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=rf"config\.json does not exist.*{advice}"):
            ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        ModelConfig.from_folder(tmp_path)


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import lmdserve.engine.model_config"
    subprocess.run([sys.executable, "-c", code], check=True)
