"""The weights' arena: copies lie where they are put, and a full arena leaves tensors where they are."""

import torch

from lmdserve.engine.memory_sizes import aligned_bytes
from lmdserve.engine.weight_arena import WeightArena


def test_copies_follow_each_other_and_keep_type_and_shape() -> None:
    sources = [torch.arange(5, dtype=torch.float16), torch.randn(3, 7), torch.arange(100, dtype=torch.int32)]
    arena = WeightArena(sum(aligned_bytes(source.nbytes) for source in sources), torch.device("cpu"))
    placed = [arena.place(source) for source in sources]
    for source, copy in zip(sources, placed, strict=True):
        assert torch.equal(copy, source)
        assert (copy.dtype, copy.shape, copy.is_contiguous()) == (source.dtype, source.shape, True)
    starts = [copy.data_ptr() - placed[0].data_ptr() for copy in placed]
    assert starts == [0, 256, 512]
    assert arena.place(sources[0]) is sources[0]


def test_an_arena_of_nothing_places_nothing() -> None:
    tensor = torch.ones(1)
    assert WeightArena(0, torch.device("cpu")).place(tensor) is tensor
