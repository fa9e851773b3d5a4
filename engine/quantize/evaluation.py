"""Perplexity, KL divergence and agreement of a checkpoint, computed by the decoder and kernels that would serve it.

Convention: a window of n tokens gives n - 1 predictions, each from the tokens before it in the window; perplexity is
exp of the mean negative log-likelihood over all of them. With windows of 2048 tokens of wikitext2's test split that is
the usual figure of the quantization papers (GPTQ's `wikitext2`). KL divergence is the mean of KL(reference || model)
over the same predictions, in nats. Errors are those of a mean of independent windows: predictions of one text are
alike, and taken as independent they made the error of a divergence on prose an eighth of this one. The error of the
increase is that of the two models' differences, which is far smaller than that of either perplexity.

Models are in memory one after the other: of the reference its final hidden states are kept, on the host, and its head.
Logits exist for a few rows at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch.nn import functional

from ..api import ConfigError
from ..config import Dtype, EngineConfig, QuantPolicy
from ..loader import load_model
from ..memory import resolve_dtype_name
from ..model_config import ModelConfig
from .forward_pass import Head, head_of, make_forward_pass
from .quality import QualityRow

KV_POLICIES: tuple[QuantPolicy, ...] = (0, 8, 4)
WINDOW_TOKENS = 2048  # the usual convention; a model of a shorter context has shorter windows
_LOGIT_BYTES = 64 << 20  # of one chunk's logits; a few such tensors exist at once

OnProgress = Callable[[float], None]  # the share that is done, 0 to 1


def window_tokens(config: ModelConfig) -> int:
    """Return the window that a model is evaluated with."""
    return min(WINDOW_TOKENS, config.max_position_embeddings)


class Reference:
    """What other models are measured against: final hidden states on the host, and the head that belongs to them."""

    def __init__(self, hidden_states: torch.Tensor, head: Head, vocab_size: int, surprisals: torch.Tensor) -> None:
        """On the host: hidden_states [num_windows, seqlen, hidden_size], surprisals as `_Scores` has them."""
        self._hidden_states = hidden_states
        self._head = head
        self.vocab_size = vocab_size
        self.surprisals = surprisals

    def log_probabilities(self, first: int, count: int, device: torch.device) -> Iterator[torch.Tensor]:
        """Yield fp32 [num_rows, vocab_size] for the predictions of `count` windows, in chunks as everywhere here."""
        hidden = self._hidden_states[first : first + count].to(device)
        for rows in _prediction_rows(hidden, self.vocab_size):
            yield functional.log_softmax(self._head(rows), -1)


class LoadedModel:
    """One checkpoint in memory, to be measured with several KV policies."""

    def __init__(self, folder: Path, *, device: torch.device, dtype: Dtype = "auto") -> None:
        """Load as a server on this device would, and raise ConfigError as there."""
        self.config = ModelConfig.from_folder(folder)
        dtype_name = resolve_dtype_name(EngineConfig(dtype=dtype), self.config, device.type)
        self._folder = folder
        self._dtype: torch.dtype = getattr(torch, dtype_name)
        self._device = device
        self._model = load_model(folder, self.config, dtype=self._dtype, device=device)

    def reference(self, windows: torch.Tensor, on_progress: OnProgress | None = None) -> tuple[Reference, QualityRow]:
        """Return this model with its KV cache in 16 bits as what others are measured against, and its own row."""
        hidden_states = torch.cat([hidden.cpu() for _, hidden in self._passes(windows, 0, on_progress)])
        return reference_from(windows, hidden_states, head_of(self._model), self.config, self._device)

    def measure(
        self,
        windows: torch.Tensor,
        quant_policy: QuantPolicy,
        reference: Reference | None,
        on_progress: OnProgress | None = None,
    ) -> QualityRow:
        """Return what this model answers with one KV policy; without a reference only its perplexity."""
        if reference is not None and reference.vocab_size != self.config.vocab_size:
            raise ConfigError(
                f"{self._folder} has {self.config.vocab_size} tokens and the model it is compared with "
                f"{reference.vocab_size}; only models of one vocabulary can be compared"
            )
        head, scores, first = head_of(self._model), _Scores(len(windows)), 0
        for part, hidden in self._passes(windows, quant_policy, on_progress):
            predictions = _predictions(part, hidden, self.config.vocab_size)
            if reference is None:
                for rows, targets in predictions:
                    scores.add(functional.log_softmax(head(rows), -1), targets, expected=None)
            else:
                known = reference.log_probabilities(first, len(part), self._device)
                for (rows, targets), expected in zip(predictions, known, strict=True):
                    scores.add(functional.log_softmax(head(rows), -1), targets, expected=expected)
            first += len(part)
        return _row(self.config, quant_policy, scores, reference)

    def _passes(
        self, windows: torch.Tensor, quant_policy: QuantPolicy, on_progress: OnProgress | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield a few windows at a time, on the device, and their final hidden states [count, seqlen, hidden_size]."""
        num_windows, seqlen = windows.shape
        self._check_windows(windows)
        forward_pass = make_forward_pass(
            self._model, seqlen=seqlen, quant_policy=quant_policy, dtype=self._dtype, device=self._device
        )
        done = 0
        for part in torch.split(windows, forward_pass.num_windows):
            part = part.to(self._device)
            yield part, forward_pass.hidden_states(part).view(len(part), seqlen, -1)
            done += len(part)
            if on_progress is not None:
                on_progress(done / num_windows)

    def _check_windows(self, windows: torch.Tensor) -> None:
        seqlen, context_len = windows.shape[1], self.config.max_position_embeddings
        if seqlen > context_len:
            raise ConfigError(f"windows have {seqlen} tokens and the model's context {context_len}; take shorter ones")
        if int(windows.max()) >= self.config.vocab_size:
            raise ConfigError(
                f"the text has token {int(windows.max())} and the model's vocabulary ends at "
                f"{self.config.vocab_size - 1}; the tokenizer belongs to another model"
            )


def reference_from(
    windows: torch.Tensor, hidden_states: torch.Tensor, head: Head, config: ModelConfig, device: torch.device
) -> tuple[Reference, QualityRow]:
    """Return final hidden states (on the host, after the norm) as what others are measured against, and their own row.

    hidden_states [num_windows, seqlen, hidden_size] of a model with its KV cache in 16 bits, whoever computed them.
    """
    scores = _Scores(len(windows))
    for part, hidden in zip(windows, hidden_states, strict=True):
        for rows, targets in _predictions(part[None].to(device), hidden[None].to(device), config.vocab_size):
            log_probabilities = functional.log_softmax(head(rows), -1)
            scores.add(log_probabilities, targets, expected=log_probabilities)
    reference = Reference(hidden_states, head, config.vocab_size, scores.surprisals())
    return reference, _row(config, 0, scores, reference)


class ProgressShares:
    """Joins the progress of several measurements of equal length."""

    def __init__(self, on_progress: OnProgress | None, count: int) -> None:
        self._on_progress = on_progress
        self._count = count
        self._begun = 0

    def next(self, count: int = 1) -> OnProgress | None:
        """Return what the next measurement, or the next few in one, reports to."""
        on_progress, begun = self._on_progress, self._begun
        self._begun += count
        return None if on_progress is None else lambda share: on_progress((begun + count * share) / self._count)


def evaluate(
    folder: Path,
    windows: torch.Tensor,
    *,
    device: torch.device,
    dtype: Dtype = "auto",
    kv_policies: Sequence[QuantPolicy] = KV_POLICIES,
    reference: Reference | None = None,
    on_progress: OnProgress | None = None,
) -> list[QualityRow]:
    """Measure one checkpoint on windows (int64 [num_windows, seqlen]), a row for each KV policy in their order."""
    model = LoadedModel(folder, device=device, dtype=dtype)
    progress = ProgressShares(on_progress, len(kv_policies))
    return [model.measure(windows, policy, reference, progress.next()) for policy in kv_policies]


class _Scores:
    """Numbers for each prediction, kept on the device until they are asked for."""

    def __init__(self, num_windows: int) -> None:
        self._num_windows = num_windows
        self._surprisals: list[torch.Tensor] = []
        self._divergences: list[torch.Tensor] = []
        self._agreements: list[torch.Tensor] = []

    def add(self, log_probabilities: torch.Tensor, targets: torch.Tensor, *, expected: torch.Tensor | None) -> None:
        """Add rows of log-probabilities [num_rows, vocab_size]: what was said, what came, and what was expected."""
        self._surprisals.append(-log_probabilities.gather(1, targets[:, None]).flatten())
        if expected is not None:
            divergence = functional.kl_div(log_probabilities, expected, reduction="none", log_target=True)
            self._divergences.append(divergence.sum(-1, dtype=torch.float64))
            self._agreements.append(log_probabilities.argmax(-1) == expected.argmax(-1))

    def surprisals(self) -> torch.Tensor:
        """Return the negative log-likelihood of what came, in nats; float64 [num_windows, seqlen - 1], on the host."""
        return self._by_window(self._surprisals)

    def divergences(self) -> torch.Tensor:
        """Return KL(expected || said), in nats; float64 [num_windows, seqlen - 1], on the host."""
        return self._by_window(self._divergences)

    def top1_agreement(self) -> float:
        """Return the share of predictions with the same likeliest token."""
        return float(self._by_window(self._agreements).mean())

    def _by_window(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to("cpu", torch.float64).view(self._num_windows, -1)


def _row(config: ModelConfig, quant_policy: QuantPolicy, scores: _Scores, reference: Reference | None) -> QualityRow:
    surprisals = scores.surprisals()
    row = QualityRow(
        weights="16-bit" if config.quantization is None else "4-bit",
        kv_bits=quant_policy or 16,
        perplexity=_finite(surprisals.mean().exp()),
    )
    if reference is None:
        return row
    difference, divergences = surprisals - reference.surprisals, scores.divergences()
    return msgspec.structs.replace(
        row,
        perplexity_increase=_finite(difference.mean().expm1()),
        perplexity_increase_error=_finite(difference.mean().exp() * _error_of_mean(difference)),
        kl_divergence=_finite(divergences.mean().clamp(min=0)),  # rounding may leave less than nothing of a zero
        kl_divergence_error=_finite(_error_of_mean(divergences)),
        top1_agreement=scores.top1_agreement(),
    )


def _error_of_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the standard error of the mean of [num_windows, any]; not a number when there is only one window."""
    means = values.mean(1)
    return means.std() / len(means) ** 0.5 if len(means) > 1 else torch.tensor(torch.nan)


def _predictions(
    windows: torch.Tensor, hidden: torch.Tensor, vocab_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield chunks of hidden states that predict something, and the tokens that came [num_rows]."""
    chunks = _prediction_rows(hidden, vocab_size)
    targets = windows[:, 1:].flatten()
    return zip(chunks, torch.split(targets, _chunk_rows(vocab_size)), strict=True)


def _prediction_rows(hidden: torch.Tensor, vocab_size: int) -> Sequence[torch.Tensor]:
    """Return the rows [num_rows, hidden_size] of all but each window's last token, as many as logits have room for."""
    return torch.split(hidden[:, :-1].flatten(0, 1), _chunk_rows(vocab_size))


def _chunk_rows(vocab_size: int) -> int:
    return max(1, _LOGIT_BYTES // (4 * vocab_size))


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if value.isfinite() else None
