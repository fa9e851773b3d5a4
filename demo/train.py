"""Trains the demo model from scratch: `python -m lmdserve.demo.train --minutes 20 --out FOLDER` on one GPU.

The schedule is by wall time: warm up, hold, and fall linearly to zero over the second half. Every batch is new text.
"""

import argparse
import json
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .batches import ANSWER, EOS, Batch, BatchStream, Markers
from .decoding import KVTransform, greedy, unchanged
from .export import from_checkpoint, write_checkpoint
from .fake_quantization import quantize_linears, quantized_kv
from .network import Network, Shape, packed_dense_attention, packed_flash_attention
from .optimizer import Optimizer
from .scoring import Verdict, call_accuracy, held_out_cases, judge, parse_output, table

WARM_UP = 0.02  # shares of the whole time
DECAY = 0.6
PROMPT_WEIGHT = 0.1  # of tokens that are only read, at the beginning; none after a third of the time


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate after this share of the time."""
    if progress < WARM_UP:
        return peak * (progress + 1e-3) / WARM_UP
    return peak * min(1.0, (1 - progress) / DECAY)


class Training:
    """One run: the network, its optimizer and its log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        self.tokenizer = Tokenizer.from_file(str(options.tokenizer))
        self.shape = Shape(vocab_size=self.tokenizer.get_vocab_size(), num_layers=options.layers)
        attention = packed_flash_attention if self.device.type == "cuda" else packed_dense_attention
        self.network = Network(self.shape, attention).to(self.device)
        if options.resume:
            self.network.load_state_dict(from_checkpoint(options.resume, self.shape))
        self.optimizer = Optimizer(self.network)
        self.loss = torch.compile(self.network.loss) if self.device.type == "cuda" else self.network.loss
        self.num_tokens = 0
        options.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (options.out / "train.log").open("a", encoding="utf-8")

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def log(self, text: str) -> None:
        print(text, flush=True)
        self.log_file.write(text + "\n")
        self.log_file.flush()

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Learn from one batch; return its loss."""
        prompt_weight = 0.0 if self.options.resume else PROMPT_WEIGHT * max(0.0, 1 - 3 * progress)
        token_ids, roles, positions, starts = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        weights = torch.where(roles == ANSWER, 1.0, prompt_weight) * (positions > 0)
        with self.autocast():
            loss: Tensor = self.loss(token_ids, weights, positions, starts, self.options.longest)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.optimizer.adam.param_groups[0]["params"], 1.0)
        self.optimizer.step(learning_rate(progress, self.options.rate))
        self.num_tokens += token_ids.numel()
        return loss.detach()

    def run(self) -> None:
        options = self.options
        stream = BatchStream(
            options.tokenizer,
            num_workers=options.workers,
            seed=options.seed,
            longest=options.longest,
            rows_per_batch=options.rows,
        )
        batches = iter(stream)
        self.step(next(batches), 0.0)  # compiles; not counted in the time
        begin = last_report = time.monotonic()
        step, reported, next_score = 0, 0, options.score_every
        while (progress := (time.monotonic() - begin) / (options.minutes * 60)) < 1:
            loss = self.step(next(batches), progress)
            step += 1
            if step % 100 == 0:
                now, done = time.monotonic(), self.num_tokens
                rate = (done - reported) / (now - last_report)
                self.log(
                    f"step {step} progress {progress:.3f} loss {loss.item():.4f} tokens {done / 1e6:.0f}M "
                    f"rate {rate / 1e6:.2f}M/s rows waiting {stream.num_waiting_rows()}"
                )
                last_report, reported = now, done
            if progress > next_score:
                self.log(f"  exact calls {call_accuracy(self.score(400, seed=1)):.3f}")
                next_score += options.score_every
        stream.close()
        minutes = (time.monotonic() - begin) / 60
        self.log(f"trained on {self.num_tokens / 1e6:.0f}M tokens in {step} steps, {minutes:.1f} minutes")
        write_checkpoint(self.network.state_dict(), self.shape, options.out)

    def score(self, count: int, seed: int, kv_transform: KVTransform = unchanged) -> list[Verdict]:
        """Answer held-out cases greedily."""
        cases = held_out_cases(count, seed)
        prompts = [self.tokenizer.encode(case.prompt, add_special_tokens=False).ids for case in cases]
        stop_ids = frozenset({EOS, Markers.of(self.tokenizer).im_end})
        with self.autocast():
            written = greedy(self.network, prompts, stop_ids=stop_ids, max_new_tokens=320, kv_transform=kv_transform)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=False) for ids in written]
        return [judge(case, *parse_output(text)) for case, text in zip(cases, texts, strict=True)]

    def final_scores(self) -> None:
        """Score the trained network, then with 4-bit weights, and with KV of 8 and 4 bits; keep the failures."""
        verdicts = self.score(self.options.final_cases, seed=2)
        self.log(table(verdicts))
        with (self.options.out / "failures.jsonl").open("w", encoding="utf-8") as file:
            for verdict in verdicts:
                if not verdict.right:
                    file.write(verdict.report() + "\n")
        scores = {"as trained": call_accuracy(verdicts)}
        for bits in (8, 4):
            scores[f"kv int{bits}"] = call_accuracy(
                self.score(self.options.final_cases, seed=2, kv_transform=quantized_kv(bits))
            )
        trained = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(quantize_linears(trained))
        scores["weights int4 g128 (round to nearest)"] = call_accuracy(self.score(self.options.final_cases, seed=2))
        self.network.load_state_dict(trained)
        self.log(json.dumps(scores, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent / "model" / "tokenizer.json")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--resume", type=Path, help="folder of a trained model to go on from")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="rows of 16384 tokens in a batch")
    parser.add_argument("--longest", type=int, default=4096, help="longest document, tokens")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--score-every", type=float, default=0.2, help="share of the time between scores")
    parser.add_argument("--final-cases", type=int, default=2000)
    training = Training(parser.parse_args())
    training.run()
    training.final_scores()


if __name__ == "__main__":
    main()
