"""Two checkpoints measured one after the other, the second against the first.

Owns their order in memory: neither is there while the other is, and a 16-bit reference that does not fit the GPU goes
through it a layer at a time.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import Dtype, QuantPolicy
from ..memory_sizes import ComputeForm, weight_bytes
from ..model_config import ModelConfig
from .evaluation import KV_POLICIES, LoadedModel, OnProgress, ProgressShares, Reference, evaluate
from .layered_reference import layered_reference
from .quality import QualityRow
from .source import SourceModel

_WORK_BYTES = 4 << 30  # a pass of 8192 tokens through a 7B model takes 2 GiB: KV cache, results between layers, logits


def compare(
    reference_folder: Path,
    folder: Path,
    windows: torch.Tensor,
    *,
    device: torch.device,
    dtype: Dtype = "auto",
    kv_policies: Sequence[QuantPolicy] = KV_POLICIES,
    on_progress: OnProgress | None = None,
) -> list[QualityRow]:
    """Measure both on windows (int64 [num_windows, seqlen]): first the rows of the reference, then the other's.

    The first row is the reference with its KV cache in 16 bits; everything is relative to that one. It is its only row
    when it went through the device a layer at a time.
    """
    other_policies = [policy for policy in kv_policies if policy != 0]
    is_whole = not _is_too_large(reference_folder, device)
    progress = ProgressShares(on_progress, 1 + len(other_policies) * is_whole + len(kv_policies))
    if is_whole:
        reference, rows = _whole_reference(reference_folder, windows, other_policies, device, dtype, progress)
    else:
        on_share_done = progress.next() or (lambda share: None)
        reference, row = layered_reference(
            SourceModel(reference_folder), windows, batch_size=1, device=device, on_share_done=on_share_done
        )
        rows = [row]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows + evaluate(
        folder,
        windows,
        device=device,
        dtype=dtype,
        kv_policies=kv_policies,
        reference=reference,
        on_progress=progress.next(len(kv_policies)),
    )


def _whole_reference(
    folder: Path,
    windows: torch.Tensor,
    other_policies: Sequence[QuantPolicy],
    device: torch.device,
    dtype: Dtype,
    progress: ProgressShares,
) -> tuple[Reference, list[QualityRow]]:
    model = LoadedModel(folder, device=device, dtype=dtype)
    reference, row = model.reference(windows, progress.next())
    others = [model.measure(windows, policy, reference, progress.next()) for policy in other_policies]
    return reference, [row, *others]


def _is_too_large(folder: Path, device: torch.device) -> bool:
    """Say whether a 16-bit checkpoint must be passed in layers; one of 4 bits never is."""
    config = ModelConfig.from_folder(folder)
    if device.type != "cuda" or config.quantization is not None:
        return False
    num_free_bytes, _ = torch.cuda.mem_get_info(device)
    return weight_bytes(config, ComputeForm(itemsize=2, is_fused=True)) + _WORK_BYTES > num_free_bytes
