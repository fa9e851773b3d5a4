"""The 16-bit checkpoint that is quantized, a layer at a time. Owns the way from names on disk to a layer."""

import hashlib
from pathlib import Path

import torch

from ..api import ConfigError
from ..checkpoint import Checkpoint
from ..loader import IGNORED_NAMES
from ..model_config import ModelConfig
from .architectures import LinearKey, LinearPlan, layer_prefix, linear_plans, norm_names
from .layer import LayerWeights, Weight


class SourceModel:
    """A checkpoint's weights by their place in the model; every tensor is checked when it is read.

    A tensor that is missing, of another shape than config.json implies, not finite or of no use to this family is a
    ConfigError that names it.
    """

    def __init__(self, folder: Path) -> None:
        """Read config.json; ConfigError when it is not of a supported family, or of weights in 4 bits already."""
        self.folder = folder
        self.config = ModelConfig.from_folder(folder)
        if self.config.quantization is not None:
            raise ConfigError(
                f"{folder} is quantized already ({self.config.quantization.method}); give the 16-bit checkpoint it was "
                "made from"
            )
        self.plans: dict[LinearKey, LinearPlan] = linear_plans(self.config)
        self._checkpoint = Checkpoint(folder)
        self._refuse_unknown_tensors()

    def fingerprint(self) -> str:
        """Return a digest that changes when config.json or a weight file does, by their sizes and times."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".bin"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        config = (self.folder / "config.json").read_bytes()
        return hashlib.sha256(config + repr(stats).encode()).hexdigest()

    def layer(self, index: int, device: torch.device) -> LayerWeights:
        """Return a layer as it is stored, rows of linears in the order of `LinearPlan`."""
        norms = {
            name: self._vector(f"{layer_prefix(index)}{on_disk}.weight", device)
            for name, on_disk in norm_names(self.config).items()
        }
        return LayerWeights(norms, {key: self._linear(index, plan, device) for key, plan in self.plans.items()})

    def embedding(self) -> torch.Tensor:
        """Return the embedding as it is stored, [vocab_size, hidden_size], on the CPU."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self._read(f"{self.config.family.names.embedding}.weight", shape, torch.device("cpu"))

    def final_norm_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights after the last layer; a tied head is the embedding."""
        names, tensors = self.config.family.names, self.outer_tensors()
        head = names.embedding if self.config.tie_word_embeddings else names.head
        return tensors[f"{names.final_norm}.weight"], tensors[f"{head}.weight"]

    def outer_tensors(self) -> dict[str, torch.Tensor]:
        """Return what lies outside of the layers, by name on disk: embedding first, last norm, head unless tied."""
        names, config = self.config.family.names, self.config
        tensors = {
            f"{names.embedding}.weight": self.embedding(),
            f"{names.final_norm}.weight": self._vector(f"{names.final_norm}.weight", torch.device("cpu")),
        }
        if not config.tie_word_embeddings:
            head = f"{names.head}.weight"
            tensors[head] = self._read(head, (config.vocab_size, config.hidden_size), torch.device("cpu"))
        return tensors

    def _refuse_unknown_tensors(self) -> None:
        """What has no place in the model would be lost: it may be old buffers and a tied head's copy, nothing else."""
        config, names = self.config, self.config.family.names
        known = {f"{name}.weight" for name in (names.embedding, names.final_norm, names.head)}
        for prefix in map(layer_prefix, range(config.num_layers)):
            known.update(f"{prefix}{name}.weight" for name in norm_names(config).values())
            for plan in self.plans.values():
                suffixes = ("weight", "bias") if plan.has_bias else ("weight",)
                known.update(f"{prefix}{name}.{suffix}" for name, _ in plan.modules for suffix in suffixes)
        unknown = [name for name in self._checkpoint.tensor_names() if name not in known]
        unknown = [name for name in unknown if IGNORED_NAMES.search(name) is None]
        if unknown:
            raise ConfigError(
                f"{self.folder} has {len(unknown)} tensors that a {config.family.name} model does not use, such as "
                f"{unknown[0]}, and they would be lost; check that config.json belongs to these weights"
            )

    def _linear(self, index: int, plan: LinearPlan, device: torch.device) -> Weight:
        names = [(layer_prefix(index) + name, size) for name, size in plan.modules]
        weight = torch.cat([self._read(f"{name}.weight", (size, plan.in_features), device) for name, size in names])
        bias = (
            torch.cat([self._read(f"{name}.bias", (size,), device) for name, size in names]) if plan.has_bias else None
        )
        if plan.disk_rows is None:
            return Weight(weight, bias)
        rows = plan.disk_rows.to(device)
        return Weight(weight[rows], None if bias is None else bias[rows])

    def _vector(self, name: str, device: torch.device) -> torch.Tensor:
        size = self.config.head_dim if "q_norm" in name or "k_norm" in name else self.config.hidden_size
        return self._read(name, (size,), device)

    def _read(self, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        tensor = self._checkpoint.read(name)
        if tensor is None:
            raise ConfigError(f"{self.folder} lacks the tensor {name} that config.json implies; download it again")
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{self.folder}: tensor {name} has shape {list(tensor.shape)}, and config.json implies {list(shape)}; "
                "check that config.json belongs to these weights"
            )
        tensor = tensor.to(device)
        if not tensor.isfinite().all():
            raise ConfigError(
                f"{self.folder}: tensor {name} holds NaN or infinity, so the model is broken before it is quantized; "
                "download it again, or take the checkpoint before the training that broke it"
            )
        return tensor
