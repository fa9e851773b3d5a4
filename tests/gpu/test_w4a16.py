"""W4A16 products at a model's own sizes, with the tiles that would serve it: values, races, and invariance of rows."""

import pytest
import torch

from lmdserve.kernels.w4a16 import Workspace, launch_tile, w4a16_add, w4a16_matmul, w4a16_swiglu
from lmdserve.kernels.w4a16_plan import DEQUANTIZE, HopperTile, Operation
from lmdserve.kernels.w4a16_tune import Product, random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MULTIPLY = {Operation.ADD: w4a16_add, Operation.STORE: w4a16_matmul, Operation.SWIGLU: w4a16_swiglu}
ROWS = (1, 7, 16, 31, 64, 100, 250, 500, 2100)
ROWS_WITH_BIAS = (1, 31, 500)  # each bias is one more compilation
# Of the root mean square: the output's rounding, and the weights' where scales come before the product.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def workspace(device: torch.device) -> Workspace:
    return Workspace(device)


def _expected(x: torch.Tensor, truth: torch.Tensor, operation: Operation, bias: torch.Tensor | None) -> torch.Tensor:
    product = x.float() @ truth.t()
    if bias is not None:
        product += bias.float()
    if operation is not Operation.SWIGLU:
        return product
    gate, up = product.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("operation", "out_features", "in_features", "dtype"),
    [
        (Operation.ADD, 4096, 4096, torch.bfloat16),
        (Operation.ADD, 4096, 14336, torch.float16),
        (Operation.STORE, 6144, 4096, torch.float16),
        (Operation.SWIGLU, 28672, 4096, torch.float16),
        (Operation.SWIGLU, 22016, 4096, torch.bfloat16),
        (Operation.STORE, 1040, 384, torch.float16),
    ],
    ids=str,
)
def test_every_bucket_s_tile_multiplies(
    operation: Operation,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    workspace: Workspace,
) -> None:
    product = Product(operation=operation, out_features=out_features, in_features=in_features)
    weight, truth = random_weight(product, dtype, device)
    columns = out_features // 2 if operation is Operation.SWIGLU else out_features
    bias = torch.randn(out_features, device=device).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, in_features, device=device).to(dtype)
        for added in (None, bias) if rows in ROWS_WITH_BIAS else (None,):
            expected = _expected(x, truth, operation, added)
            for _ in range(3):  # a race shows now and then
                if operation is Operation.ADD:
                    out = torch.ones(rows, columns, device=device)
                else:
                    out = torch.full((rows, columns), float("nan"), device=device, dtype=dtype)
                MULTIPLY[operation](x, weight, out, workspace, bias=added)
                error = _error(out - 1 if operation is Operation.ADD else out, expected)
                assert error < TOLERANCE[dtype], f"{rows} rows: relative error {error:.2e}"
    assert not workspace.counters.any()


@pytest.mark.parametrize("num_stages", [4, 5, 8])
def test_programs_of_the_first_wave_know_their_tile(
    num_stages: int, device: torch.device, workspace: Workspace
) -> None:
    """A late barrier once overwrote where a program's tile is, and its results were zeros, in programs that start on an
    empty processor."""
    tile = HopperTile(block_m=8, num_groups=1, num_stages=num_stages, programs_per_processor=4)
    product = Product(operation=Operation.ADD, out_features=28672, in_features=4096)
    weight, truth = random_weight(product, torch.float16, device)
    x = torch.randn(3, 4096, device=device).half()
    expected = _expected(x, truth, Operation.ADD, None)
    for _ in range(10):
        out = torch.zeros(3, 28672, device=device)
        launch_tile(Operation.ADD, x, weight, out, workspace, None, tile)
        assert _error(out, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("operation", list(Operation))
def test_deterministic_rows_have_the_same_bits_in_every_company(
    operation: Operation, device: torch.device, workspace: Workspace
) -> None:
    product = Product(operation=operation, out_features=4096, in_features=4096)
    weight, truth = random_weight(product, torch.bfloat16, device)
    columns = 2048 if operation is Operation.SWIGLU else 4096
    dtype = torch.float32 if operation is Operation.ADD else torch.bfloat16
    x = torch.randn(1500, 4096, device=device).to(torch.bfloat16)
    together = torch.zeros(1500, columns, dtype=dtype, device=device)
    MULTIPLY[operation](x, weight, together, workspace, deterministic=True)
    assert _error(together, _expected(x, truth, operation, None)) < TOLERANCE[torch.bfloat16]
    for first, last in ((0, 1), (1499, 1500), (3, 20), (64, 128), (63, 600)):
        part = torch.zeros(last - first, columns, dtype=dtype, device=device)
        MULTIPLY[operation](x[first:last], weight, part, workspace, deterministic=True)
        assert torch.equal(part, together[first:last])


def test_a_graph_replays_the_same_sums(device: torch.device, workspace: Workspace) -> None:
    product = Product(operation=Operation.STORE, out_features=4096, in_features=4096)
    weight, truth = random_weight(product, torch.float16, device)
    x = torch.randn(40, 4096, device=device).half()
    out = torch.empty(40, 4096, device=device, dtype=torch.float16)
    w4a16_matmul(x, weight, out, workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            w4a16_matmul(x, weight, out, workspace)
    for seed in range(3):
        x.copy_(torch.randn(40, 4096, device=device, generator=torch.Generator(device).manual_seed(seed)))
        graph.replay()
        assert _error(out, x.float() @ truth.t()) < TOLERANCE[torch.float16]


def test_small_groups_are_never_given_to_hopper_s_kernel(device: torch.device, workspace: Workspace) -> None:
    from lmdserve.kernels.layout import pack_rows
    from lmdserve.kernels.reference import w4a16_weight
    from lmdserve.kernels.w4a16 import pack_weight

    for group_size in (32, 64):
        codes = pack_rows(torch.randint(0, 16, (4096, 4096), dtype=torch.uint8, device=device))
        zeros = torch.randint(0, 17, (4096, 4096 // group_size), device=device)
        scales = torch.rand(zeros.shape, device=device).half() * 0.01
        weight = pack_weight(codes, zeros, scales, torch.float16)
        truth = w4a16_weight(codes, zeros.half(), scales, torch.float16).float()
        for rows in (1, 60, 900):
            x = torch.randn(rows, 4096, device=device).half()
            out = torch.full((rows, 4096), float("nan"), device=device, dtype=torch.float16)
            w4a16_matmul(x, weight, out, workspace)
            assert _error(out, x.float() @ truth.t()) < TOLERANCE[torch.float16]
        tiles = [tile for key, tile in weight.cache.items() if key != "descriptors"]
        assert not any(isinstance(tile, HopperTile) for tile in tiles)
        assert DEQUANTIZE in tiles
