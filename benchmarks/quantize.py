"""Quantize a checkpoint and print a Markdown row of what it took: seconds of each phase and the most memory.

    python benchmarks/random_model.py --shape internlm2.5-7b --format bf16 --out /tmp/internlm2.5-7b
    python benchmarks/quantize.py /tmp/internlm2.5-7b --calib-samples 128 --calib-seqlen 2048

Options are those of `lmdserve quantize`; the checkpoint is written to a folder that is removed again, and not measured
unless --eval-tokens is given. Speed does not depend on what the weights are.
"""

import dataclasses
import datetime
import platform
import sys
import tempfile
from pathlib import Path

import lmdserve
from lmdserve.engine.quantize.options import QuantizeOptions
from lmdserve.engine.quantize.report import read_report
from lmdserve.engine.torch_setup import prepare_torch
from lmdserve.server.calibration_text import load_encoders
from lmdserve.server.options import OptionParser, add_options, read_options


def main() -> int:
    parser = OptionParser(description=__doc__)
    parser.add_argument("model", type=Path)
    add_options(parser, QuantizeOptions, title="quantization")
    arguments = sys.argv[1:]
    namespace = parser.parse_known(arguments)
    options = read_options(QuantizeOptions, namespace)
    prepare_torch()
    import torch

    from lmdserve.engine.quantize.run import TextSide, quantize

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, {device}\n")
    with tempfile.TemporaryDirectory() as folder:
        options = dataclasses.replace(
            options, work_dir=folder, skip_evaluation="--eval-tokens" not in arguments, overwrite=True
        )
        quantize(namespace.model, options, TextSide(*load_encoders(namespace.model)), lambda progress: None)
        report = read_report(Path(folder))
    phases = list(report.time_s)
    memory = report.peak_memory_bytes
    print(f"| model | windows | {' | '.join(f'{phase}, s' for phase in phases)} | all, s | device, GiB | host, GiB |")
    print("|---" * (len(phases) + 5) + "|")
    times = " | ".join(f"{seconds:.1f}" for seconds in (*report.time_s.values(), sum(report.time_s.values())))
    windows = f"{options.calib_samples} x {options.calib_seqlen}"
    print(f"| {namespace.model.name} | {windows} | {times} | {memory.device / 2**30:.1f} | {memory.host / 2**30:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
