"""Score the demo model as served, at every width of weights and KV cache, and print one Markdown row for each.

    python benchmarks/demo_quality.py --cases 400
    python benchmarks/demo_quality.py --cases 1000 --rows float32 --without-grammars

The 4-bit weights are an AWQ checkpoint written here by rounding to nearest in groups of 128, without calibration; the
8-bit head is a checkpoint whose head is rounded as `--lm-head-bits 8` rounds it on a GPU, computed in float32. Every
row is a server process of its own, asked over HTTP by `demo/evaluate.py` for the same held-out cases; `--rows` picks
some. `--without-grammars` serves a model whose calls nothing holds to their schemas, as no server would.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lmdserve
from lmdserve.kernels.layout import pack_awq
from lmdserve.kernels.w8a16 import quantize_rows

DEMO = Path(lmdserve.__file__).parent / "demo" / "model"
GROUP_SIZE = 128
LINEAR = re.compile(r"\.(attention\.w\w+|feed_forward\.w\d)\.weight$")
HEAD = "output.weight"
_UNCONSTRAINED = """
import sys
from lmdserve.server import output_rules
from lmdserve.server.cli import main
async def plan_nothing(*arguments, **options):
    return output_rules.OutputPlan()
output_rules.OutputRules.plan = plan_nothing
sys.exit(main())
"""
WITHOUT_GRAMMARS = ["-c", _UNCONSTRAINED]
ROWS = [("float32", 0), ("float32", 8), ("float32", 4), ("8-bit head", 0), ("AWQ 4-bit", 0), ("AWQ 4-bit", 4)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="400")
    parser.add_argument("--rows", default="float32,8-bit head,AWQ 4-bit")
    parser.add_argument("--without-grammars", action="store_true")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, lmdserve {lmdserve.__version__}, torch {torch.__version__}, CPU\n")
    print("| weights | KV bits | exact calls | calls |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        models = {"float32": DEMO, "8-bit head": Path(folder) / "head", "AWQ 4-bit": Path(folder) / "demo-awq"}
        write_8_bit_head(DEMO, models["8-bit head"])
        write_awq(DEMO, models["AWQ 4-bit"])
        for weights, quant_policy in ROWS:
            if weights not in arguments.rows.split(","):
                continue
            model = str(models[weights])
            server = WITHOUT_GRAMMARS if arguments.without_grammars else ["-m", "lmdserve"]
            share, count = score(server, model, quant_policy, arguments.cases)
            print(f"| {weights} | {quant_policy or 32} | {share} | {count} |", flush=True)
    return 0


def write_8_bit_head(source: Path, target: Path) -> None:
    """Write a copy of `source` whose head has what 8 bits leave of it."""
    shutil.copytree(source, target)
    (shard,) = (path for path in target.glob("*.safetensors") if HEAD in load_file(path))
    tensors = load_file(shard)
    head = quantize_rows(tensors[HEAD])
    tensors[HEAD] = head.codes * head.scales.unsqueeze(1)
    save_file(tensors, shard)


def write_awq(source: Path, target: Path) -> None:
    """Write an AutoAWQ "gemm" checkpoint of `source`: linears of the layers rounded to nearest, the rest as it is."""
    target.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, target)
    (target / "model.safetensors.index.json").unlink()
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if LINEAR.search(name):
                tensors |= quantize(name.removesuffix(".weight"), tensor.float())
            else:
                tensors[name] = tensor
    save_file(tensors, target / "model.safetensors")


def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round a weight [out, in] to 4 bits, a scale and a zero point for each group of inputs."""
    out_features, in_features = weight.shape
    groups = weight.t().reshape(in_features // GROUP_SIZE, GROUP_SIZE, out_features)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float().unsqueeze(1)).round_().add_(zeros.unsqueeze(1)).clamp_(0, 15)
    return {
        f"{name}.qweight": pack_awq(codes.view(in_features, out_features)),
        f"{name}.qzeros": pack_awq(zeros),
        f"{name}.scales": scales,
    }


def score(server: list[str], model: str, quant_policy: int, cases: str) -> tuple[str, str]:
    """Serve a model and return evaluate's share of exact calls and how many calls there were."""
    command = [sys.executable, *server, "--model", model, "--server-port", "0"]
    command += ["--quant-policy", str(quant_policy), "--log-level", "ERROR"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(300.0, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        url = next(found.group() for line in process.stdout if (found := re.search(r"http://\S+?:\d+", line)))
        watchdog.cancel()
        command = [sys.executable, "-m", "lmdserve.demo.evaluate", url, "--cases", cases]
        report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    finally:
        process.terminate()
        process.wait()
    found = re.search(r"^all calls \(exact\)\s+(\S+%)\s+\S+\s+(\d+)", report, re.MULTILINE)
    if found is None:
        raise SystemExit(f"the evaluation printed no score:\n{report}")
    return found[1], found[2]


if __name__ == "__main__":
    sys.exit(main())
