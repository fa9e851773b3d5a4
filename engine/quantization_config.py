"""A checkpoint's quantization as it states it: which linears are stored in 4 bits, and how each of them is.

No torch here. Owns the configuration keys of AWQ, GPTQ and compressed-tensors; what cannot be served (other bit widths,
quantized activations, layouts of single kernels) is refused by name. How tensors look is `formats`' business.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config_keys import ConfigKeys, read_json

Method = Literal["awq", "gptq", "compressed-tensors"]

# Where older tools keep what config.json lacks, and the method that such a file is of.
_SEPARATE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_OLD_AWQ_KEYS = {"bits": "w_bit", "group_size": "q_group_size"}
_INSTEAD = "take its 16-bit checkpoint, or quantize that with `lmdserve quantize`"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationScheme:
    """How one linear is stored in 4 bits."""

    method: Method
    layout: str  # awq: gemm, gemv; gptq: gptq (zero points less one), gptq_v2; compressed-tensors: pack-quantized
    group_size: int  # inputs that share a scale; -1: all of them
    has_zeros: bool  # False: no zero points are stored, and all are 8
    reorders_inputs: bool  # groups need not be runs of neighbouring inputs: a tensor says which input is in which

    def num_inputs_per_group(self, in_features: int) -> int:
        """Return the group size in inputs."""
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True, slots=True)
class QuantizationRule:
    """A linear in whose name `pattern` is found has this scheme, or with None plain weights."""

    pattern: re.Pattern[str]
    scheme: QuantizationScheme | None


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The rules of a checkpoint, of which the first that fits a linear's name decides; without one it is plain."""

    method: Method
    rules: tuple[QuantizationRule, ...]

    def scheme_of(self, module: str) -> QuantizationScheme | None:
        """Return how the linear of this name on disk is stored; None: as plain weights."""
        return next((rule.scheme for rule in self.rules if rule.pattern.search(module)), None)

    @property
    def schemes(self) -> tuple[QuantizationScheme, ...]:
        """Return the schemes that occur in the rules."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))

    @property
    def reorders_inputs(self) -> bool:
        """Say whether any linear may have its groups out of order."""
        return any(scheme.reorders_inputs for scheme in self.schemes)


def read_quantization(keys: ConfigKeys) -> QuantizationConfig | None:
    """Return what config.json (`keys`), or a file of older tools beside it, says; None for plain weights."""
    section = keys.section("quantization_config") or keys.section("compression_config")
    if section is None:
        section = _separate_section(keys.path.parent)
    if section is None:
        return None
    method = str(section.values.get("quant_method")).lower()
    if method not in _READERS:
        supported = ", ".join(_READERS)
        raise section.fail(f"quant_method {method!r} is not supported; supported: {supported}, or plain weights")
    return _READERS[method](section)


def _separate_section(folder: Path) -> ConfigKeys | None:
    for name, method in _SEPARATE_FILES.items():
        path = folder / name
        if path.is_file():
            return ConfigKeys({"quant_method": method, **read_json(path)}, path)
    return None


def _read_awq(section: ConfigKeys) -> QuantizationConfig:
    renamed = {new: section.values[old] for new, old in _OLD_AWQ_KEYS.items() if section.has(old)}
    section = ConfigKeys({**renamed, **section.values}, section.path)
    _check_bits(section, "bits")
    layout = str(_first(section.values, "version", "checkpoint_format", "format", default="gemm")).lower()
    if layout not in ("gemm", "gemv"):
        raise section.fail(f"AWQ version {layout!r} is not supported; supported: gemm, gemv. Else {_INSTEAD}")
    scheme = QuantizationScheme(
        method="awq",
        layout=layout,
        group_size=_group_size(section),
        has_zeros=section.boolean("zero_point"),
        reorders_inputs=False,
    )
    if layout == "gemv" and not scheme.has_zeros:
        raise section.fail(f"AWQ's gemv without zero points is not supported: its writer has them always; {_INSTEAD}")
    plain = [_contains(part, None) for part in _strings(section, "modules_to_not_convert")]
    return QuantizationConfig("awq", (*plain, _everything(scheme)))


def _read_gptq(section: ConfigKeys) -> QuantizationConfig:
    _check_bits(section, "bits")
    layout = str(_first(section.values, "checkpoint_format", "format", default="gptq")).lower()
    if section.values.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise section.fail(
            f"GPTQ checkpoint_format {layout!r} is not supported: it is the layout of one kernel; supported: gptq, "
            f"gptq_v2. Else {_INSTEAD}"
        )
    if section.values.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise section.fail(f"GPTQ pack_dtype {section.values['pack_dtype']!r} is not supported; supported: int32")
    if section.values.get("lm_head"):
        raise section.fail(f"lm_head true is not supported: output heads are stored in 16 bits; {_INSTEAD}")
    rules = [_gptq_override(section, pattern, changes, layout) for pattern, changes in _object(section, "dynamic")]
    scheme = _gptq_scheme(section, layout)
    blocks = section.values.get("modules_in_block_to_quantize")
    if not blocks:
        return QuantizationConfig("gptq", (*rules, _everything(scheme)))
    names = [str(name) for block in blocks for name in (block if isinstance(block, list) else [block])]
    ends = [QuantizationRule(re.compile(rf"(^|\.){re.escape(name)}\Z"), scheme) for name in names]
    return QuantizationConfig("gptq", (*rules, *ends))


def _gptq_scheme(section: ConfigKeys, layout: str) -> QuantizationScheme:
    group_size = _group_size(section)
    return QuantizationScheme(
        method="gptq",
        layout=layout,
        group_size=group_size,
        has_zeros=True,
        reorders_inputs=section.boolean("desc_act", False) and group_size != -1,
    )


def _gptq_override(section: ConfigKeys, pattern: str, changes: Any, layout: str) -> QuantizationRule:
    """Read one entry of `dynamic`: `-:pattern` leaves linears plain, `+:pattern` or `pattern` changes keys for them."""
    regex = _regex(section, pattern.removeprefix("-:").removeprefix("+:"))
    if pattern.startswith("-:"):
        return QuantizationRule(regex, None)
    if not isinstance(changes, dict):
        raise section.fail(f"key 'dynamic' must give an object for {pattern!r}, not {changes!r}")
    changed = ConfigKeys({**section.values, **changes}, section.path)
    _check_bits(changed, "bits")
    return QuantizationRule(regex, _gptq_scheme(changed, layout))


def _read_compressed_tensors(section: ConfigKeys) -> QuantizationConfig:
    status = str(section.values.get("quantization_status", "compressed"))
    if status != "compressed":
        raise section.fail(
            f"quantization_status {status!r} is not supported: only compressed weights are 4-bit weights"
        )
    for key in ("kv_cache_scheme", "transform_config"):
        if section.values.get(key):
            raise section.fail(f"{key} is not supported; {_INSTEAD}")
    sparsity = section.values.get("sparsity_config")
    if sparsity and str(sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity) != "dense":
        raise section.fail(f"sparsity_config is not supported: sparse weights cannot be read; {_INSTEAD}")
    plain = [_target(section, name, None) for name in _strings(section, "ignore")]
    whole_format = section.values.get("format")
    by_name: list[QuantizationRule] = []
    by_class: list[QuantizationRule] = []
    for name, group in _object(section, "config_groups"):
        scheme = _compressed_scheme(section, name, group, whole_format)
        for target in group.get("targets") or []:
            (by_class if target == "Linear" else by_name).append(_target(section, str(target), scheme))
    if not by_name and not by_class:
        raise section.fail("key 'config_groups' names no linears; take config.json from the original checkpoint")
    return QuantizationConfig("compressed-tensors", (*plain, *by_name, *by_class))


def _compressed_scheme(section: ConfigKeys, name: str, group: Any, whole_format: Any) -> QuantizationScheme:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise section.fail(f"config_groups has no 'weights' in {name!r}; take config.json from the original checkpoint")
    layout = str(group.get("format") or whole_format)
    if layout != "pack-quantized":
        raise section.fail(f"compressed-tensors format {layout!r} is not supported; supported: pack-quantized")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise section.fail(f"{key} in {name!r} is not supported: activations are computed in 16 bits; {_INSTEAD}")
    weights = ConfigKeys(group["weights"], section.path)
    _check_bits(weights, "num_bits")
    kind, strategy = str(weights.values.get("type", "int")), str(weights.values.get("strategy", "group"))
    if kind != "int":
        raise section.fail(f"weights of type {kind!r} are not supported; supported: int")
    if strategy not in ("group", "channel"):
        raise section.fail(f"weights of strategy {strategy!r} are not supported; supported: group, channel")
    return QuantizationScheme(
        method="compressed-tensors",
        layout=layout,
        group_size=-1 if strategy == "channel" else _group_size(weights),
        has_zeros=not weights.boolean("symmetric", True),
        reorders_inputs=strategy == "group" and weights.values.get("actorder") in ("group", "dynamic", True),
    )


_READERS = {"awq": _read_awq, "gptq": _read_gptq, "compressed-tensors": _read_compressed_tensors}


def _check_bits(section: ConfigKeys, key: str) -> None:
    bits = section.integer(key)
    if bits != 4:
        raise section.fail(f"weights of {bits} bits are not supported; supported: 4. Else {_INSTEAD}")


def _group_size(section: ConfigKeys) -> int:
    group_size = section.integer("group_size")
    if group_size != -1 and group_size < 1:
        raise section.fail(f"group_size {group_size} is not supported; it must be -1 (one group) or at least 1")
    return group_size


def _first(values: Mapping[str, Any], *names: str, default: Any) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), default)


def _strings(section: ConfigKeys, key: str) -> Iterable[str]:
    value = section.values.get(key) or []
    if not isinstance(value, list):
        raise section.fail(f"key '{key}' must be a list of names or null, not {value!r}")
    return [str(name) for name in value]


def _object(section: ConfigKeys, key: str) -> Iterable[tuple[str, Any]]:
    found = section.section(key)
    return [] if found is None else list(found.values.items())


def _everything(scheme: QuantizationScheme) -> QuantizationRule:
    return QuantizationRule(re.compile(""), scheme)


def _contains(part: str, scheme: QuantizationScheme | None) -> QuantizationRule:
    return QuantizationRule(re.compile(re.escape(part)), scheme)


def _target(section: ConfigKeys, target: str, scheme: QuantizationScheme | None) -> QuantizationRule:
    """Return the rule of a target: `Linear`, all of them; `re:PATTERN`, matched from a name's beginning; or a name."""
    if target == "Linear":
        return QuantizationRule(re.compile(""), scheme)
    if target.startswith("re:"):
        return QuantizationRule(_regex(section, target.removeprefix("re:")), scheme)
    return QuantizationRule(re.compile(rf"\A{re.escape(target)}\Z"), scheme)


def _regex(section: ConfigKeys, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"\A(?:{pattern})")
    except re.error as error:
        raise section.fail(f"{pattern!r} is no regular expression ({error})") from None
