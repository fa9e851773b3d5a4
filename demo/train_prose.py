"""Trains a small Llama on prose, to measure on it what quantization costs: 42M parameters, a minute on one H200.

The text is the user's own: `prepare` takes a folder of .txt files, trains a byte-level BPE on them, packs all but the
last part of each file as tokens and keeps those parts as held-out text. `train` learns from that folder alone:

    python -m lmdserve.demo.train_prose prepare --text TEXTS --data DATA
    python -m lmdserve.demo.train_prose train --data DATA --out MODEL --seconds 65
"""

import argparse
import time
from array import array
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from .export import write_json, write_llama_checkpoint
from .network import Network, Shape, packed_dense_attention, packed_flash_attention
from .optimizer import Optimizer
from .train import learning_rate

BOS, EOS = 1, 2
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
HELD_OUT_SHARE = 0.02  # of each file, at its end
WINDOW_TOKENS = 1024
HELD_OUT_BATCHES = 2


def prose_shape(vocab_size: int) -> Shape:
    """Return the model: heads of 128 and sides that groups of 128 divide, as in models of 7B; ten layers deep."""
    return Shape(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        max_position_embeddings=WINDOW_TOKENS,
    )


def split_text(text: str) -> tuple[str, str]:
    """Return what is trained on and what is held out, cut at the end of a line."""
    cut = text.find("\n", int(len(text) * (1 - HELD_OUT_SHARE)))
    return (text, "") if cut < 0 else (text[:cut], text[cut + 1 :])


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE; BOS is put in front of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", BOS)])
    return tokenizer


def prepare(options: argparse.Namespace) -> None:
    """Write tokenizer files, tokens.bin and heldout.bin (uint16), heldout.txt."""
    options.data.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text(encoding="utf-8") for path in sorted(options.text.glob("*.txt"))]
    if not texts:
        raise SystemExit(f"{options.text} has no .txt files")
    parts = [split_text(text) for text in texts]
    tokenizer = train_tokenizer([train for train, _ in parts], options.vocab_size)
    tokenizer.save(str(options.data / "tokenizer.json"))
    write_json(options.data / "tokenizer_config.json", tokenizer_config())
    held_out = "\n\n".join(held_out for _, held_out in parts)
    (options.data / "heldout.txt").write_text(held_out, encoding="utf-8")
    _write_tokens(options.data / "tokens.bin", tokenizer, [train for train, _ in parts])
    _write_tokens(options.data / "heldout.bin", tokenizer, [held_out])


def tokenizer_config() -> dict[str, object]:
    """Return tokenizer_config.json for a model that only continues text."""
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {
            str(index): {"content": token, **special} for index, token in enumerate(SPECIAL_TOKENS)
        },
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_tokens(path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    token_ids = array("H")
    for text in texts:
        token_ids.extend([*tokenizer.encode(text).ids, EOS])
    path.write_bytes(token_ids.tobytes())
    print(f"{path}: {len(token_ids) / 1e6:.2f}M tokens")


class Windows:
    """Random windows of a packed text."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.token_ids = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint16).to(device, torch.int64)
        self._offsets = torch.arange(WINDOW_TOKENS, device=device)

    def draw(self, count: int) -> Tensor:
        """Return [count * WINDOW_TOKENS]: windows that begin anywhere."""
        starts = torch.randint(len(self.token_ids) - WINDOW_TOKENS, (count, 1), device=self.token_ids.device)
        return self.token_ids[starts + self._offsets].flatten()

    def spread(self, count: int) -> Tensor:
        """Return `count` windows at equal distances."""
        starts = torch.linspace(0, len(self.token_ids) - WINDOW_TOKENS, count, device=self.token_ids.device).long()
        return self.token_ids[starts[:, None] + self._offsets].flatten()


class ProseTraining:
    """One run; the schedule is by wall time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        self.shape = prose_shape(Tokenizer.from_file(str(options.data / "tokenizer.json")).get_vocab_size())
        attention = packed_flash_attention if self.device.type == "cuda" else packed_dense_attention
        self.network = Network(self.shape, attention).to(self.device)
        self.optimizer = Optimizer(self.network)
        self.loss = torch.compile(self.network.loss) if self.device.type == "cuda" else self.network.loss
        self.text = Windows(options.data / "tokens.bin", self.device)
        self.held_out = Windows(options.data / "heldout.bin", self.device)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def mean_loss(self, token_ids: Tensor) -> Tensor:
        """Return the mean loss of windows laid end to end, each a document of its own."""
        positions = torch.arange(len(token_ids), device=self.device) % WINDOW_TOKENS
        starts = torch.arange(0, len(token_ids) + 1, WINDOW_TOKENS, dtype=torch.int32, device=self.device)
        with self.autocast():
            loss: Tensor = self.loss(token_ids, (positions > 0).float(), positions, starts, WINDOW_TOKENS)
        return loss

    def step(self, progress: float) -> Tensor:
        """Learn from one batch; return its loss."""
        loss = self.mean_loss(self.text.draw(self.options.rows))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.optimizer.adam.param_groups[0]["params"], 1.0)
        self.optimizer.step(learning_rate(progress, self.options.rate))
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss on the held-out text, in nats a token."""
        parts = self.held_out.spread(HELD_OUT_BATCHES * self.options.rows).view(HELD_OUT_BATCHES, -1)
        return float(torch.stack([self.mean_loss(part) for part in parts]).mean())

    def run(self) -> None:
        """Train for the time given, then write the model."""
        self.step(0.0)  # compiles, as the next does; not counted in the time
        self.held_out_loss()
        begin = time.monotonic()
        step, next_report = 0, 0.0
        while (progress := (time.monotonic() - begin) / self.options.seconds) < 1:
            loss = self.step(progress)
            step += 1
            if step % 8:
                continue
            now = loss.item()  # waits, so that the schedule sees the time that steps take
            if progress >= next_report:
                tokens = step * self.options.rows * WINDOW_TOKENS / 1e6
                held_out = self.held_out_loss()
                print(f"{progress:4.0%} {tokens:.0f}M tokens: loss {now:.4f}, held out {held_out:.4f}", flush=True)
                next_report += 0.1
        print(f"{step} steps, held-out loss {self.held_out_loss():.4f} nats a token", flush=True)
        write_llama_checkpoint(self.network.state_dict(), self.shape, self.options.out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (self.options.out / name).write_bytes((self.options.data / name).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    preparing.add_argument("--data", type=Path, required=True)
    preparing.add_argument("--vocab-size", type=int, default=10_240)
    preparing.set_defaults(run=prepare)
    training = commands.add_parser("train")
    training.add_argument("--data", type=Path, required=True, help="folder that `prepare` wrote")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--seconds", type=float, default=65)
    training.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    training.add_argument("--rows", type=int, default=64, help=f"windows of {WINDOW_TOKENS} tokens in a batch")
    training.add_argument("--seed", type=int, default=1)
    training.set_defaults(run=lambda options: ProseTraining(options).run())
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
