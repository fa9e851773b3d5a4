"""The offline compiler sees what it is there to find."""

import dataclasses

import pytest
from offline_compile import SHARED_BYTES_LIMIT, assert_fits, compile_for_all, compile_kernel

from lmdserve.kernels.rms_norm import _rms_norm_kernel

POINTERS = ("x", "weight", "out", "rows", "zero", "order")
INTEGERS = ("x_stride", "out_stride", "num_columns", "part_columns", "zero_size")
SIGNATURE = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(INTEGERS, "i32") | {"eps": "fp32"}
CONSTEXPRS = {
    "HAS_ROWS": False, "HAS_ZERO": False, "HAS_ORDER": False, "RELEASES_FIRST": False, "BLOCK": 4096,
    "PART_BLOCK": 4096, "ZERO_BLOCK": 1024,
}  # fmt: skip


def test_each_architecture_gets_its_own_binary() -> None:
    compiled = compile_for_all(_rms_norm_kernel, SIGNATURE, CONSTEXPRS, wants_sass=True)
    assert list(compiled) == [80, 86, 89, 90]
    for arch, kernel in compiled.items():
        assert_fits(kernel)
        assert f"sm_{arch}" in kernel.ptx
        assert kernel.count("LDG") > 0
        assert kernel.shared_bytes > 0
        assert ("griddepcontrol" in kernel.ptx) == (arch == 90), "PDL is left to the launcher's rule"


def test_spills_and_too_much_shared_memory_are_failures() -> None:
    constexprs = CONSTEXPRS | {"PDL": False}
    crowded = compile_kernel(_rms_norm_kernel, SIGNATURE, constexprs, 80, num_warps=1, maxnreg=32)
    with pytest.raises(AssertionError, match="bytes a thread outside registers"):
        assert_fits(crowded)
    large = dataclasses.replace(crowded, local_bytes=0, shared_bytes=SHARED_BYTES_LIMIT[80] + 1)
    with pytest.raises(AssertionError, match="of shared memory, limit 166912"):
        assert_fits(large)


def test_an_argument_without_a_type_is_named() -> None:
    with pytest.raises(AssertionError, match="no type and no value for \\['x', "):
        compile_kernel(_rms_norm_kernel, {}, CONSTEXPRS, 80)
