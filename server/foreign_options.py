"""Options of vLLM, SGLang, llama.cpp and LMDeploy that have another name here, or none: what an error then says.

Nothing here is an option; a name in these tables is refused like any unknown one, with better advice.
"""

from collections.abc import Mapping

OUR_NAMES: Mapping[str, str] = {
    "--host": "--server-name",
    "--port": "--server-port",
    "--api-key": "--api-keys",
    "--admin-api-key": "--admin-keys",
    "--served-model-name": "--model-name",
    "--alias": "--model-name",
    "--model-path": "--model",
    "-m": "--model",
    "--max-model-len": "--session-len",
    "--context-length": "--session-len",
    "--ctx-size": "--session-len",
    "-c": "--session-len",
    "--tensor-parallel-size": "--tp",
    "--tp-size": "--tp",
    "-tp": "--tp",
    "--quantization": "--model-format",
    "--load-format": "--model-format",
    "-q": "--model-format",
    "--kv-cache-dtype": "--quant-policy",
    "--cache-type-k": "--quant-policy",
    "--gpu-memory-utilization": "--cache-max-entry-count",
    "--mem-fraction-static": "--cache-max-entry-count",
    "--kv-cache-memory-bytes": "--max-gpu-memory",
    "--max-num-seqs": "--max-batch-size",
    "--max-running-requests": "--max-batch-size",
    "--parallel": "--max-batch-size",
    "--max-num-batched-tokens": "--max-prefill-token-num",
    "--chunked-prefill-size": "--max-prefill-token-num",
    "--max-num-queued-reqs": "--max-queue-size",
    "--max-queued-requests": "--max-queue-size",
    "--block-size": "--cache-block-seq-len",
    "--page-size": "--cache-block-seq-len",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--enable-deterministic-inference": "--deterministic",
    "--speculative-config": "--speculate",
    "--speculative-algorithm": "--speculate",
    "--allowed-origins": "--allow-origins",
    "--sse-keep-alive-interval": "--keep-alive-interval",
    "--uvicorn-log-level": "--log-level",
    "--max-concurrency": "--concurrency",
    "--random-input-len": "--input-len",
    "--random-output-len": "--output-len",
}
"""What their options are called here."""

NEEDLESS: Mapping[str, str] = {
    "--trust-remote-code": "no code of a checkpoint is run",
    "--tokenizer": "the tokenizer is read from the model's folder",
    "--download-dir": "hub models are kept where HF_HOME says",
    "--backend": "there is one engine",
    "--enforce-eager": "nothing is compiled by torch",
    "--enable-chunked-prefill": "long prompts are always computed in parts",
    "--enable-auto-tool-choice": "tool calls are always parsed",
    "--tool-call-parser": "how a model calls tools is read from its files",
    "--reasoning-parser": "how a model reasons is read from its template",
    "--jinja": "chat templates are always used",
    "--enable-metrics": "/metrics is always there",
}
"""Options that a server without them does right: why they can be left out."""
