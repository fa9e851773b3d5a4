"""Safetensors files to a GPU: threads read into pinned memory while earlier pieces travel to the device.

Owns the pinned memory, the threads and the order of events; which files there are is `checkpoint.py`'s business. On an
H200 machine, files in the page cache, 5.1 GB arrive in 0.17 s (4 threads, 8 GB/s each); copied from memory-mapped files
they took 0.56 s, whatever the number of threads. File format: https://github.com/huggingface/safetensors#format
"""

import ctypes
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from .api import ConfigError

_NUM_THREADS = 4
_PIECE_BYTES = 16 << 20  # two for each thread are pinned; smaller ones wait longer for their turn on the bus
_MAX_BYTES_AHEAD = 128 << 20  # of device memory, read and not yet placed
_LENGTH_BYTES = 8  # of the header's length, before the header
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """Where a tensor's bytes lie."""

    name: str
    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(file: Path) -> list[StoredTensor]:
    """Return what a safetensors file holds, in the order of its bytes. The file has been opened and checked before."""
    with file.open("rb") as opened:
        header_length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        records = json.loads(opened.read(header_length))
    records.pop("__metadata__", None)
    found = []
    for name, record in records.items():
        start, end = record["data_offsets"]
        if record["dtype"] not in _DTYPES:
            raise ConfigError(f"{file}: tensor {name} has the type {record['dtype']}, which is not supported")
        offset = _LENGTH_BYTES + header_length + start
        found.append(StoredTensor(name, file, offset, end - start, _DTYPES[record["dtype"]], tuple(record["shape"])))
    return sorted(found, key=lambda tensor: tensor.offset)


def read_to_device(
    tensors: Iterable[StoredTensor],
    device: torch.device,
    into: Mapping[str, torch.Tensor],
    *,
    piece_bytes: int = _PIECE_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor once, on the device, ready for work on the current stream.

    It is the tensor of its name in `into` where that has its shape and type, else a new one.
    """
    with ExitStack() as stack:
        lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(_NUM_THREADS):
            lanes.put(_Lane(device, piece_bytes))
        files: dict[Path, int] = {}
        pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="weights")
        stack.callback(pool.shutdown, cancel_futures=True)
        ahead: deque[_Arriving] = deque()
        num_bytes_ahead = 0
        for tensor in tensors:
            if tensor.file not in files:
                files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
                stack.callback(os.close, files[tensor.file])
            # Allocated here, so that all device memory belongs to the current stream, where it is used and freed.
            target = _target(tensor, device, into)
            allocated = torch.cuda.current_stream(device).record_event()
            copied = pool.submit(_copy_in_a_lane, lanes, files[tensor.file], tensor, target, allocated)
            ahead.append(_Arriving(tensor.name, target, copied))
            num_bytes_ahead += tensor.num_bytes
            while num_bytes_ahead > _MAX_BYTES_AHEAD:
                num_bytes_ahead -= ahead[0].target.nbytes
                yield ahead.popleft().arrived()
        while ahead:
            yield ahead.popleft().arrived()


def _target(tensor: StoredTensor, device: torch.device, into: Mapping[str, torch.Tensor]) -> torch.Tensor:
    known = into.get(tensor.name)
    if known is not None and (known.dtype, known.shape) == (tensor.dtype, tensor.shape) and known.is_contiguous():
        return known
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


class _Arriving(NamedTuple):
    name: str
    target: torch.Tensor
    copied: "Future[torch.cuda.Event]"

    def arrived(self) -> tuple[str, torch.Tensor]:
        """Let the current stream wait for the last piece; return name and tensor."""
        torch.cuda.current_stream(self.target.device).wait_event(self.copied.result())
        return self.name, self.target


class _Piece:
    """Pinned memory for one read; `left` tells when its copy to the device is done."""

    def __init__(self, num_bytes: int) -> None:
        self.pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.view = memoryview((ctypes.c_char * num_bytes).from_address(self.pinned.data_ptr())).cast("B")
        self.left = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Lane:
    """What one thread needs: a stream and two pieces, one to fill while the other travels."""

    def __init__(self, device: torch.device, piece_bytes: int) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pieces = (_Piece(piece_bytes), _Piece(piece_bytes))
        self._piece_bytes = piece_bytes

    def copy(self, file: int, tensor: StoredTensor, target: torch.Tensor) -> torch.cuda.Event:
        """Read a tensor's bytes and send them to `target`; return the event of their arrival."""
        memory = target.view(-1).view(torch.uint8)
        with torch.cuda.stream(self._stream):
            for index, start in enumerate(range(0, tensor.num_bytes, self._piece_bytes)):
                piece = self._pieces[index % 2]
                piece.left.synchronize()
                count = min(self._piece_bytes, tensor.num_bytes - start)
                _read_fully(file, piece.view[:count], tensor.offset + start, tensor.file)
                memory[start : start + count].copy_(piece.pinned[:count], non_blocking=True)
                piece.left.record()
        arrived: torch.cuda.Event = self._stream.record_event()
        return arrived

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Let copies start no earlier: until then, earlier work may still use the memory that they fill."""
        self._stream.wait_event(event)


def _copy_in_a_lane(
    lanes: "SimpleQueue[_Lane]", file: int, tensor: StoredTensor, target: torch.Tensor, allocated: torch.cuda.Event
) -> torch.cuda.Event:
    lane = lanes.get()
    try:
        lane.wait_for(allocated)
        return lane.copy(file, tensor, target)
    finally:
        lanes.put(lane)


def _read_fully(file: int, view: memoryview, offset: int, path: Path) -> None:
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise ConfigError(f"{path} ends before its last tensor; download it again")
        view, offset = view[count:], offset + count
