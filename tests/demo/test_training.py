"""The parts of training on tiny sizes: packing, attention within documents, decoding, export, and that it learns."""

import random
from array import array
from pathlib import Path

import pytest
import torch

from lmdserve.demo.batches import ANSWER, BOS, EOS, PROMPT, Batch, Markers, pack, roles_of
from lmdserve.demo.corpus.dialogue import Dialogue, render
from lmdserve.demo.decoding import greedy
from lmdserve.demo.export import from_checkpoint, interleaved, separated, write_checkpoint
from lmdserve.demo.fake_quantization import quantize_linears, quantized_kv, quantized_weight
from lmdserve.demo.network import Network, Shape, packed_dense_attention
from lmdserve.demo.optimizer import Optimizer, orthogonalised

TINY = Shape(vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = Network(TINY, packed_dense_attention)
    for parameter in network.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def batch_of(documents: list[list[int]]) -> Batch:
    ids = [token for document in documents for token in document]
    return pack([(array("H", ids).tobytes(), bytes([ANSWER] * len(ids)))])


def test_packing_knows_documents_by_their_first_token() -> None:
    batch = batch_of([[BOS, 5, 6], [BOS], [BOS, 7]])
    assert batch.token_ids.tolist() == [BOS, 5, 6, BOS, BOS, 7]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.starts.tolist()[:1] == [0]


def test_only_the_models_own_turns_are_answers(tokenizer) -> None:
    dialogue = Dialogue("chat", "en")
    dialogue.say("Hi", "Hello!")
    dialogue.say("assistant\n", "Yes.")
    ids = tokenizer.encode(render(dialogue), add_special_tokens=False).ids
    roles = roles_of(ids, Markers.of(tokenizer))
    answers = tokenizer.decode([token for token, role in zip(ids, roles, strict=True) if role == ANSWER], False)
    assert answers == "Hello!<|im_end|>Yes.<|im_end|>"
    plain = tokenizer.encode("<s>Once</s>", add_special_tokens=False).ids
    assert roles_of(plain, Markers.of(tokenizer)) == [PROMPT] + [ANSWER] * (len(plain) - 1)
    assert plain[-1] == EOS


def test_documents_in_one_row_do_not_see_each_other(network: Network) -> None:
    one, two = [BOS, 10, 11, 12, 13], [BOS, 20, 21]
    together, alone = batch_of([one, two]), batch_of([two])
    states = network(together.token_ids, together.positions, torch.tensor([0, 5, 8]), 64)
    expected = network(alone.token_ids, alone.positions, torch.tensor([0, 3]), 64)
    torch.testing.assert_close(states[5:], expected)


def test_greedy_decoding_equals_one_forward_per_token(network: Network) -> None:
    prompts = [[BOS, 3, 9], [BOS, 30, 31, 32, 33, 34, 35], [BOS]]
    written = greedy(network, prompts, stop_ids=frozenset(), max_new_tokens=5, batch_size=2)
    for prompt, tokens in zip(prompts, written, strict=True):
        sequence = list(prompt)
        for token in tokens:
            ids = torch.tensor(sequence)
            states = network(ids, torch.arange(len(sequence)), torch.tensor([0, len(sequence)]), 64)
            assert int(network.output(states[-1]).argmax()) == token
            sequence.append(token)
        assert len(tokens) == 5


def test_decoding_ends_before_a_stop_token(network: Network) -> None:
    (free,) = greedy(network, [[BOS, 3]], stop_ids=frozenset(), max_new_tokens=8)
    (stopped,) = greedy(network, [[BOS, 3]], stop_ids=frozenset({free[2]}), max_new_tokens=8)
    assert stopped == free[: free.index(free[2])]


def test_interleaving_puts_each_key_head_behind_its_queries() -> None:
    rows = torch.arange(8 * 2).view(8, 2).float()  # 4 query heads of 2 rows
    key, value = rows[:4] + 100, rows[:4] + 200  # 2 kv heads of 2 rows
    fused = interleaved(rows, key, value, head_dim=2)
    expected = torch.cat([rows[:4], key[:2], value[:2], rows[4:], key[2:], value[2:]])
    assert torch.equal(fused, expected)
    shape = Shape(hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2)
    assert all(torch.equal(one, two) for one, two in zip(separated(fused, shape), (rows, key, value), strict=True))


def test_a_written_checkpoint_reads_back(network: Network, tmp_path: Path) -> None:
    write_checkpoint(network.state_dict(), TINY, tmp_path)
    state = from_checkpoint(tmp_path, TINY)
    assert set(state) == set(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor.bfloat16().float())


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(1)
    for rows, columns in ((16, 48), (48, 16), (32, 32)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(3, rows, columns)).float())
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_training_learns_to_copy() -> None:
    """A sequence said twice: after a few steps the second half is foretold, which chance would not do."""
    torch.manual_seed(2)
    rng = random.Random(0)
    network = Network(TINY, packed_dense_attention)
    optimizer = Optimizer(network)
    losses = []
    for _ in range(150):
        halves = [[rng.randrange(3, 64) for _ in range(8)] for _ in range(24)]
        batch = batch_of([[BOS, *half, *half] for half in halves])
        weights = (batch.positions > 9).float()
        starts = torch.arange(0, 17 * 25, 17)
        loss = network.loss(batch.token_ids, weights, batch.positions, starts, 64)
        loss.backward()
        optimizer.step(2e-2)
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert sum(losses[-5:]) / 5 < 1.0


def test_rounding_to_four_bits_moves_weights_by_half_a_step_at_most() -> None:
    torch.manual_seed(3)
    weight = torch.randn(5, 256)
    rounded = quantized_weight(weight)
    for row in range(5):
        for group in (slice(0, 128), slice(128, 256)):
            values = weight[row, group]
            step = (values.max() - values.min()) / 15
            # The zero point is an integer too, so the ends of the range may move by half a step more.
            assert (rounded[row, group] - values).abs().max() <= step * 1.01
            assert rounded[row, group].unique().numel() <= 16


def test_only_matrices_of_layers_are_rounded(network: Network) -> None:
    state = dict(Network(Shape(num_layers=1), packed_dense_attention).state_dict())
    for tensor in state.values():
        torch.nn.init.normal_(tensor)
    rounded = quantize_linears(state)
    changed = {name for name in state if not torch.equal(state[name], rounded[name])}
    assert changed == {f"layers.0.{name}.weight" for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}


@pytest.mark.parametrize("bits", [8, 4])
def test_kv_rounding_is_per_token_and_head(bits: int) -> None:
    torch.manual_seed(4)
    states = torch.randn(3, 2, 64) * torch.tensor([1.0, 100.0])[:, None]
    rounded = quantized_kv(bits)(states)
    step = (states.amax(-1) - states.amin(-1)) / (2**bits - 1)
    error = (rounded - states).abs().amax(-1)
    assert (error <= step * 0.75).all()  # half a step, and the rounding of scale and zero to fp16
    assert (error > 0).all()
