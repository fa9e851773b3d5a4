"""A whole run: calibration text through the model layer by layer, each layer quantized and stored, then the checkpoint.

Owns the order of things and what is on the device: one layer, its sample, and the hidden states where they fit. A layer
sees the text as the 16-bit model before it leaves it. Whatever ends a run early leaves `.quantize` in the output
folder, from which `resume` goes on: layers that are done are only passed, and the bytes are those of a run without end.
"""

import hashlib
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save

from ..api import ConfigError
from ..checkpoint_writer import check_space
from .architectures import LINEAR_KEYS, layer_prefix
from .awq import LayerQuantizer, Searches
from .calibration import Calibration
from .datasets import Split
from .evaluation import evaluate, window_tokens
from .hidden_states import HiddenStates
from .layer import Layer, LayerWeights
from .layer_store import LayerStore
from .layered_reference import layered_reference
from .options import QuantizeOptions
from .precision import SCALE_DTYPES, choose_device, compute_dtype, stored_dtype
from .progress import Progress, ProgressMeter
from .quality import Quality
from .report import FormatOfWeights, LayerRow, PeakMemory, Report, SizeBytes, read_report, write_report
from .rounding import Rounding
from .source import SourceModel
from .text import Encode, EncodeChat, TokenSource, calibration_windows, evaluation_windows, held_out_text, read_text
from .writer import layer_tensors, needed_bytes, write_checkpoint

_SEARCH_VERSION = 2  # counted up when the same model, text and options give other bytes
_BATCH_TOKENS = {"cuda": 8192, "cpu": 1}
# A 7B model takes 10 s for as many on an H200, the demo 50 s on two cores, where the search takes 41.
_EVALUATED_TOKENS = {"cuda": 16384, "cpu": 8192}
# Options that change no bit of the checkpoint.
_WITHOUT_EFFECT = frozenset(
    {"work_dir", "calib_dataset", "calib_data_dir", "device", "resume", "overwrite", "eval_dataset", "eval_tokens"}
    | {"skip_evaluation"}
)


@dataclass(frozen=True, slots=True)
class TextSide:
    """The model's tokenizer, as functions: the engine knows none."""

    encode: Encode
    encode_chat: EncodeChat | None


def quantize(
    source_folder: Path, options: QuantizeOptions, text: TextSide, on_progress: Callable[[Progress], None]
) -> Path:
    """Quantize the checkpoint in `source_folder` into `options.work_dir`, and return that folder.

    Raises ConfigError for whatever the user can put right: the source, its weights, the text, the options, the disk,
    the GPU's memory.
    """
    try:
        with torch.inference_mode():
            return _Run(source_folder, options, text, on_progress).run()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU has too little free memory ({str(error).partition('.')[0]}); give --batch-size 1 and a lower "
            "--calib-seqlen, or --device cpu"
        ) from None


class _Run:
    def __init__(
        self, source_folder: Path, options: QuantizeOptions, text: TextSide, on_progress: Callable[[Progress], None]
    ) -> None:
        self._options = options
        self._source = SourceModel(source_folder)
        self._output = Path(options.work_dir).expanduser()
        self._store = LayerStore(self._output)
        self._device = choose_device(options.device)
        self._compute_dtype = compute_dtype(self._device)
        self._rounding = Rounding(options.w_group_size, options.w_sym, SCALE_DTYPES[options.dtype])
        self._text = text
        self._num_evaluated_tokens = options.eval_tokens or _EVALUATED_TOKENS[self._device.type]
        evaluation_share = _evaluation_share(options, self._num_evaluated_tokens, self._device)
        self._meter = ProgressMeter(self._source.config.num_layers, on_progress, evaluation_share=evaluation_share)
        self._quantizer = LayerQuantizer(
            self._source.config,
            self._source.plans,
            self._rounding,
            Searches(scale=options.search_scale, clip=options.search_clip),
        )

    def run(self) -> Path:
        self._meter.begin("read")
        if self._is_finished():
            self._meter.finish()
            return self._output
        self._check_output()
        if len(self._quantizer.misfits) == len(LINEAR_KEYS):
            reasons = "; ".join(f"{key}: {reason}" for key, reason in self._quantizer.misfits.items())
            raise ConfigError(f"nothing of {self._source.folder} can be quantized like this ({reasons})")
        largest_outer = max(float(tensor.abs().amax()) for tensor in self._source.outer_tensors().values())
        windows = self._windows()
        evaluated = None if self._options.skip_evaluation else self._evaluated_windows()
        self._prepare_store(windows)
        try:
            self._search(windows)
        except ConfigError:  # the same model would end the same way, so there is nothing to go on with
            self._store.remove()
            raise
        self._meter.begin("write")
        self._write(largest_outer)
        quality = None if evaluated is None else self._evaluate(evaluated)
        self._meter.end()
        write_report(self._output, self._report(quality))
        self._store.remove()
        self._meter.finish()
        return self._output

    def _is_finished(self) -> bool:
        """Say whether a run that is to be resumed had come to its end, all but the saying so."""
        if not self._options.resume or self._options.overwrite or self._store.exists():
            return False
        try:
            report = read_report(self._output)
        except ConfigError:
            return False
        is_same = (report.source, report.format) == (str(self._source.folder), self._format())
        return is_same and (self._output / "config.json").is_file()

    def _check_output(self) -> None:
        """Raise ConfigError when the output folder may not be written to."""
        options, output = self._options, self._output
        if output.exists() and not output.is_dir():
            raise ConfigError(f"--work-dir {output} is a file; give a folder")
        if output.is_dir() and output.samefile(self._source.folder):
            raise ConfigError(f"--work-dir {output} is the folder of the model itself; give another one")
        if self._store.exists():
            if not (options.resume or options.overwrite):
                raise ConfigError(
                    f"{output} holds a run that was interrupted; give --resume to go on with it, or --overwrite"
                )
        elif not options.overwrite and (any(output.glob("*.safetensors")) or (output / "config.json").exists()):
            raise ConfigError(f"{output} holds a checkpoint already; give another --work-dir, or --overwrite")

    def _windows(self) -> torch.Tensor | None:
        """Return the calibration text, int64 [num_windows, seqlen]; None when none is asked for."""
        options, config = self._options, self._source.config
        if options.calib_samples == 0:
            return None
        if options.calib_seqlen > config.max_position_embeddings:
            raise ConfigError(
                f"--calib-seqlen {options.calib_seqlen} is longer than the model's context of "
                f"{config.max_position_embeddings} tokens; give less"
            )
        tokens = self._read_text(options.calib_dataset, "calibration")
        windows = calibration_windows(
            tokens, num_samples=options.calib_samples, seqlen=options.calib_seqlen, seed=options.seed
        )
        if int(windows.max()) >= config.vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {int(windows.max())} and the model has {config.vocab_size}; check that the "
                f"tokenizer in {self._source.folder} belongs to the model"
            )
        return windows

    def _read_text(self, source: str, split: Split) -> TokenSource:
        data_dir = self._options.calib_data_dir
        return read_text(
            source,
            data_dir=None if data_dir is None else Path(data_dir).expanduser(),
            split=split,
            encode=self._text.encode,
            encode_chat=self._text.encode_chat,
        )

    def _prepare_store(self, windows: torch.Tensor | None) -> None:
        options = {key: value for key, value in asdict(self._options).items() if key not in _WITHOUT_EFFECT}
        text = "none" if windows is None else hashlib.sha256(save({"windows": windows})).hexdigest()
        identity = {
            **options,
            "search": _SEARCH_VERSION,
            "model": self._source.fingerprint(),
            "text": text,
            "computed in": f"{self._compute_dtype} on {self._device.type}",
        }
        if self._store.exists() and self._options.resume:
            difference = self._store.difference(identity)
            if difference is None:
                return
            if not self._options.overwrite:
                raise ConfigError(
                    f"the run in {self._output} was begun with something else ({difference}); give the same again, or "
                    "--overwrite to start anew"
                )
        check_space(self._output, needed_bytes(self._source, self._rounding))
        try:
            self._store.begin(identity)
        except OSError as error:
            raise ConfigError(
                f"--work-dir {self._output} cannot be written to ({error.strerror}); give another one"
            ) from None

    def _search(self, windows: torch.Tensor | None) -> None:
        """Quantize and store every layer that is not stored yet; those before the first such are only passed."""
        num_layers, num_finished = self._source.config.num_layers, self._store.num_finished()
        self._meter.begin("search")
        self._meter.skip_layers(num_finished)
        if num_finished == num_layers:
            return
        calibration = None if windows is None else self._calibration(windows)
        for index in range(0 if calibration else num_finished, num_layers):
            self._meter.layer(index)
            stored = self._source.layer(index, self._device)
            layer = Layer(self._source.config, stored.to(self._compute_dtype))
            if index >= num_finished:
                self._quantize_layer(index, layer, stored, calibration)
            elif calibration is not None:
                calibration.skip_layer(layer)

    def _quantize_layer(self, index: int, layer: Layer, stored: LayerWeights, calibration: Calibration | None) -> None:
        sample, largest = None, 0.0
        if calibration is not None:
            try:
                sample, largest = calibration.pass_layer(layer, lambda done: self._meter.layer(index, done / 2))
            except ConfigError as error:
                raise ConfigError(f"{self._source.folder}, layer {index}: {error}") from None
        result = self._quantizer.quantize(layer, stored, sample)
        largest_weight = max(float(tensor.abs().amax()) for tensor in (*result.norms.values(), *result.kept.values()))
        notes = {
            "outcomes": [asdict(outcome) for outcome in result.outcomes],
            "largest_activation": largest,
            "largest_weight": largest_weight,
        }
        self._store.save(index, layer_tensors(self._source, index, result), notes)

    def _calibration(self, windows: torch.Tensor) -> Calibration:
        options, source = self._options, self._source
        embedding = source.embedding().to(self._compute_dtype)
        batch_size = self._batch_size(options.calib_seqlen)
        states = HiddenStates(windows, embedding, batch_size=batch_size, device=self._device)
        return Calibration(
            source.config,
            states,
            {key: plan.in_features for key, plan in source.plans.items()},
            group_size=options.w_group_size if options.search_clip else None,
            dtype=self._compute_dtype,
            device=self._device,
            seed=options.seed,
        )

    def _write(self, largest_outer: float) -> None:
        notes = [self._store.notes(layer) for layer in range(self._source.config.num_layers)]
        dtype = stored_dtype(
            self._options.dtype,
            largest_activation=max(note["largest_activation"] for note in notes),
            largest_weight=max(largest_outer, *(note["largest_weight"] for note in notes)),
        )
        write_checkpoint(
            self._source,
            self._store,
            self._output,
            rounding=self._rounding,
            dtype=dtype,
            unquantized_modules=[
                f"{layer_prefix(layer)}{name}"
                for layer, note in enumerate(notes)
                for outcome in note["outcomes"]
                if outcome["reason"] is not None
                for name, _ in self._source.plans[outcome["linear"]].modules
            ],
        )

    def _evaluated_windows(self) -> torch.Tensor:
        """Return text that was not calibrated on; read at the start, so that what is wrong with it is said then."""
        return evaluation_windows(
            self._read_text(self._evaluated_text(), "evaluation"),
            seqlen=min(window_tokens(self._source.config), self._num_evaluated_tokens),
            max_tokens=self._num_evaluated_tokens,
        )

    def _evaluated_text(self) -> str:
        return self._options.eval_dataset or held_out_text(self._options.calib_dataset)

    def _evaluate(self, windows: torch.Tensor) -> Quality:
        """Measure the checkpoint against its source."""
        self._meter.begin("evaluate")
        known, row = layered_reference(
            self._source,
            windows,
            batch_size=self._batch_size(windows.shape[1]),
            device=self._device,
            on_share_done=lambda done: self._meter.part(done / 4),
        )
        rows = evaluate(
            self._output,
            windows,
            device=self._device,
            reference=known,
            on_progress=lambda done: self._meter.part(0.25 + 0.75 * done),
        )
        return Quality(text=self._evaluated_text(), num_tokens=windows.numel(), rows=[row, *rows])

    def _batch_size(self, seqlen: int) -> int:
        return self._options.batch_size or max(1, _BATCH_TOKENS[self._device.type] // seqlen)

    def _report(self, quality: Quality | None) -> Report:
        options, plans = self._options, self._source.plans
        return Report(
            source=str(self._source.folder),
            output=str(self._output),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            format=self._format(),
            size_bytes=SizeBytes(before=_weight_bytes(self._source.folder), after=_weight_bytes(self._output)),
            layers=[
                LayerRow(
                    layer=layer,
                    linear=" + ".join(name for name, _ in plans[outcome["linear"]].modules),
                    relative_error=outcome["relative_error"],
                    bits=options.w_bits if outcome["reason"] is None else 16,
                    reason=outcome["reason"],
                )
                for layer in range(self._source.config.num_layers)
                for outcome in self._store.notes(layer)["outcomes"]
            ],
            quality=quality,
            time_s=self._meter.seconds,
            peak_memory_bytes=PeakMemory(device=_peak_device_bytes(self._device), host=_peak_host_bytes()),
        )

    def _format(self) -> FormatOfWeights:
        options = self._options
        return FormatOfWeights(
            method="awq", bits=options.w_bits, group_size=options.w_group_size, symmetric=options.w_sym
        )


def _evaluation_share(options: QuantizeOptions, num_evaluated_tokens: int, device: torch.device) -> float:
    """Return which part of the time the evaluation will take, as measured at a 7B model's size and at the demo's."""
    if options.skip_evaluation:
        return 0.0
    if device.type == "cuda":
        return 0.2  # most of it is loading
    # On a CPU a token that is measured takes as long as twenty that are calibrated on, and each search as 40000.
    measured = 20 * num_evaluated_tokens
    return measured / (measured + options.calib_samples * options.calib_seqlen + 40000)


def _weight_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def _peak_device_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def _peak_host_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
