"""Reading checkpoints: every file layout, and every mismatch named in one sentence."""

import fnmatch
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from cache_driver import CacheDriver
from family_checkpoints import Tensors, case_named, write_checkpoint
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from lmdserve.engine import model_folder
from lmdserve.engine.api import ConfigError
from lmdserve.engine.checkpoint import Checkpoint
from lmdserve.engine.loader import load_model
from lmdserve.engine.model_config import ModelConfig
from lmdserve.engine.model_folder import resolve_model_folder
from lmdserve.engine.models.decoder import Decoder

TOKENS = list(range(1, 40))


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    case = case_named("internlm2")
    return case.tensors(case.reference_model())


@pytest.fixture
def config() -> dict[str, Any]:
    return case_named("internlm2").config_json()


def load(folder: Path) -> Decoder:
    return load_model(folder, ModelConfig.from_folder(folder), dtype=torch.float32, device=torch.device("cpu"))


def logits(folder: Path) -> torch.Tensor:
    return CacheDriver(load(folder)).run("all", TOKENS, [20])


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, tensors: Tensors, stem: str, suffix: str, save: Callable[[Tensors, Path], None]) -> None:
    names = sorted(tensors)
    weight_map = {}
    for shard in range(3):
        file = f"{stem}-0000{shard + 1}-of-00003{suffix}"
        part = {name: tensors[name].contiguous() for name in names[shard::3]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_all_file_layouts_hold_the_same_model(tensors: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    """Shards hold tensors of each layer in all files, so a fused linear is filled across files."""
    expected = logits(write_checkpoint(tmp_path / "single", config, tensors))
    folder = write_config(tmp_path / "shards", config)
    write_shards(folder, tensors, "model", ".safetensors", lambda part, file: save_file(part, file))
    assert torch.equal(logits(folder), expected)
    folder = write_config(tmp_path / "bin", config)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(logits(folder), expected)
    folder = write_config(tmp_path / "bin-shards", config)
    write_shards(folder, tensors, "pytorch_model", ".bin", torch.save)
    assert torch.equal(logits(folder), expected)
    (folder / "pytorch_model.bin.index.json").rename(folder / "unused.json")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_every_tensor_is_read_once(
    tensors: Tensors, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Checkpoint.tensors

    def spy(self: Checkpoint, device: torch.device, **options: Any) -> Any:
        for name, tensor in original(self, device, **options):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(Checkpoint, "tensors", spy)
    load(write_checkpoint(tmp_path, config, tensors))
    assert sorted(read) == sorted(tensors)


def test_16_bit_weights_compute_in_float32(tensors: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    half = write_checkpoint(tmp_path / "half", config, rounded)
    full = write_checkpoint(tmp_path / "full", config, {name: tensor.float() for name, tensor in rounded.items()})
    assert torch.equal(logits(half), logits(full))


def test_old_buffers_and_a_tied_heads_copy_are_ignored(tmp_path: Path) -> None:
    case = case_named("qwen2.5-tied")
    reference = case.reference_model()
    tensors = case.tensors(reference)
    expected = logits(write_checkpoint(tmp_path / "plain", case.config_json(), tensors))
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["model.rotary_emb.cos_cached"] = torch.zeros(8)
    assert torch.equal(logits(write_checkpoint(tmp_path / "more", case.config_json(), tensors)), expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("output.weight"), r"lacks 1 tensors.*output\.weight"),
        (lambda t: t.pop("model.layers.1.attention.wqkv.weight"), r"lacks 1 .*layers\.1\.attention\.wqkv\.weight"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], r"lacks 7 .* and 3 more"),
        (lambda t: t.update({"model.layers.0.attention.wqkv.bias": torch.zeros(128)}), r"has 1 .*wqkv\.bias"),
        (lambda t: t.update({"v_head.weight": torch.zeros(1, 64)}), r"has 1 .*v_head\.weight"),
        (
            lambda t: t.update({"output.weight": torch.zeros(131, 63)}),
            r"output\.weight has shape \[131, 63\].*\[131, 64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}),
            r"model\.norm\.weight is torch\.int32",
        ),
    ],
)
def test_mismatches_are_named(
    change: Callable[[Tensors], Any], complaint: str, tensors: Tensors, config: dict[str, Any], tmp_path: Path
) -> None:
    changed = dict(tensors)
    change(changed)
    with pytest.raises(ConfigError, match=complaint) as raised:
        load(write_checkpoint(tmp_path, config, changed))
    assert "\n" not in str(raised.value)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("must-not-exist"),))


def test_bin_files_run_no_code(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_config(tmp_path / "model", config)
    torch.save({"output.weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="convert it to safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ConfigError, match="convert it to safetensors"):
        load(folder)
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no dictionary of tensors"):
        load(folder)
    assert not (tmp_path / "must-not-exist").exists()


def test_unreadable_folders_are_named(tensors: Tensors, config: dict[str, Any], tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", config)
    with pytest.raises(ConfigError, match="holds no weights"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        load(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ConfigError, match=r"model\.safetensors is a pointer of git-lfs.*git lfs pull"):
        load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(pointer)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pointer of git-lfs"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    write_shards(folder, tensors, "model", ".safetensors", lambda part, file: save_file(part, file))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 shards.*model-00002-of-00003"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a weight index"):
        load(folder)


def test_local_folders_resolve_to_themselves(tmp_path: Path) -> None:
    assert resolve_model_folder(str(tmp_path), None) == tmp_path
    with pytest.raises(ConfigError, match="--revision v2 is for hub names"):
        resolve_model_folder(str(tmp_path), "v2")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model_folder(str(file), None)
    for missing in (str(tmp_path / "nothing" / "here"), "./nothing", "../nothing"):
        with pytest.raises(ConfigError, match="no local folder and no hub name"):
            resolve_model_folder(missing, None)


def test_demo_is_the_packages_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called `demo` in the working directory does not shadow it."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    shipped = Path(model_folder.__file__).parent.parent / "demo" / "model"
    monkeypatch.setattr(model_folder, "_demo_folder", lambda: tmp_path / "package" / "demo" / "model")
    with pytest.raises(ConfigError, match="install the package again"):
        resolve_model_folder("demo", None)
    monkeypatch.undo()
    assert model_folder._demo_folder() == shipped


class FakeHub:
    """Stands for huggingface_hub: what it has, and what it was asked for."""

    def __init__(self, folder: Path, files: list[str], *, is_cached: bool = False) -> None:
        self.folder = folder
        self.files = files
        self.is_cached = is_cached
        self.patterns: list[str] | None = None
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def model_info(self, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(self, name: str, *, revision: str | None, **options: Any) -> str:
        self.revisions.append(revision)
        if options.get("local_files_only"):
            if not self.is_cached:
                raise LocalEntryNotFoundError("not cached")
        else:
            self.patterns = options["allow_patterns"]
            self.fetched = [
                file
                for file in self.files
                if any(fnmatch.fnmatch(file, pattern) for pattern in options["allow_patterns"])
                and not fnmatch.fnmatch(file, options["ignore_patterns"])
            ]
        return str(self.folder)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["consolidated.safetensors", "pytorch_model-00001-of-00002.bin"], ["pytorch_model-00001-of-00002.bin"]),
    ],
)
def test_hub_names_download_the_weights_once(
    files: list[str], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's checkpoints hold all weights a second time, in their own tool's layout."""
    hub = FakeHub(tmp_path, files)
    hub.install(monkeypatch)
    assert resolve_model_folder("internlm/internlm2_5-1_8b-chat", "main") == tmp_path
    assert hub.patterns is not None
    assert hub.fetched == wanted
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in hub.patterns)
    assert set(hub.revisions) == {"main"}


def test_a_cached_model_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path, [], is_cached=True)
    hub.install(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "model_info", MagicMock(side_effect=ConnectionError("offline")))
    assert resolve_model_folder("internlm/internlm2_5-1_8b-chat", None) == tmp_path
    assert hub.patterns is None


def test_what_the_hub_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(tmp_path, []).install(monkeypatch)

    def missing(*_: Any, **__: Any) -> list[str]:
        raise RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "model_info", missing)
    with pytest.raises(ConfigError, match="no such model; check the name"):
        resolve_model_folder("nobody/nothing", None)

    def offline(*_: Any, **__: Any) -> list[str]:
        raise ConnectionError("name resolution failed\nand more")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    with pytest.raises(ConfigError, match=r"name resolution failed.*check the network") as raised:
        resolve_model_folder("nobody/nothing", None)
    assert "\n" not in str(raised.value)
