"""The second model's training on tiny sizes: what is held out, packed tokens, that it learns, and its Llama folder."""

import argparse
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from lmdserve.demo import train_prose
from lmdserve.demo.export import write_llama_checkpoint
from lmdserve.demo.network import Network, Shape, packed_dense_attention
from lmdserve.demo.train_prose import BOS, EOS, ProseTraining, prepare, split_text

TINY = Shape(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
LINES = [f"Line {number}: the quick brown fox jumps over {number} lazy dogs.\n" for number in range(2000)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("".join(LINES))
    (texts / "b.txt").write_text("狐狸和西瓜。\n" * 3000, encoding="utf-8")
    prepare(argparse.Namespace(text=texts, data=tmp_path / "data", vocab_size=320))
    return tmp_path / "data"


def test_the_end_of_a_text_is_held_out_in_whole_lines() -> None:
    train, held_out = split_text("".join(LINES))
    assert train + "\n" + held_out == "".join(LINES)
    assert held_out.startswith("Line ")
    assert 0.015 < len(held_out) / len("".join(LINES)) < 0.02
    assert split_text("one line") == ("one line", "")


def test_what_is_packed_is_the_text(data: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    token_ids = torch.frombuffer(bytearray((data / "tokens.bin").read_bytes()), dtype=torch.uint16).tolist()
    assert (token_ids[0], token_ids[-1]) == (BOS, EOS)
    text = tokenizer.decode(token_ids)
    held_out = (data / "heldout.txt").read_text(encoding="utf-8")
    assert LINES[0] in text
    assert LINES[-1] in held_out
    assert LINES[-1] not in text
    assert "西瓜" in held_out


def test_training_learns_and_writes_a_folder_that_transformers_reads(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_prose, "prose_shape", lambda vocab_size: TINY)
    monkeypatch.setattr(train_prose, "WINDOW_TOKENS", 64)
    out = tmp_path / "model"
    training = ProseTraining(argparse.Namespace(data=data, out=out, seconds=1e-9, rate=3e-3, rows=4, seed=1))
    before = training.held_out_loss()
    for _ in range(12):
        training.step(0.2)
    assert training.held_out_loss() < before - 0.2
    training.run()
    assert transformers.AutoTokenizer.from_pretrained(out)("Line 7").input_ids[0] == BOS
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 320


def test_the_llama_folder_is_the_same_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(TINY, packed_dense_attention)
    for parameter in network.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    network.bfloat16().float()  # as it is written
    write_llama_checkpoint(network.state_dict(), TINY, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = torch.randint(320, (50,))
    with torch.no_grad():
        states = network(token_ids, torch.arange(50), torch.tensor([0, 50], dtype=torch.int32), 50)
        torch.testing.assert_close(theirs(token_ids[None]).logits[0], network.output(states), rtol=1e-4, atol=1e-4)
