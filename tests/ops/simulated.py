"""Runs Gluon kernels on the CPU, which Triton's interpreter cannot: each group of warps of a program is a thread.

A kernel's numbers, masks and barriers are the real ones; layouts mean nothing here. What a card does at its own time is
done at the worst: a copy's target is NaN until its barrier is told, and a matrix product reads its operands only when it
is waited for. A program whose groups wait for each other for ever ends with an error.
"""

from __future__ import annotations

import math
import random
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction, JITFunction

PATIENCE = 20.0  # seconds that a wait may last
ADDING = threading.Lock()
here = threading.local()  # .program, .programs, .copies of the running thread, and .threads of the group that it is


@dataclass
class Pointer:
    """An address, or a tensor of addresses, in the memory of `base`."""

    base: Tensor
    offset: Tensor

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.base.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + other)

    def unsqueeze(self, axis: int) -> Pointer:
        return Pointer(self.base, self.offset.unsqueeze(axis))

    def where(self, mask: Any) -> tuple[Tensor, Tensor]:
        """The mask, and offsets that may be read, as tensors of one shape; an address outside of `base` is an error."""
        mask = torch.as_tensor(True if mask is None else mask)
        offset, mask = torch.broadcast_tensors(self.offset.long(), mask)
        inside = (offset >= 0) & (offset < self.base.numel())
        assert bool((inside | ~mask).all()), "an address outside of the tensor"
        return mask, offset.where(mask, 0)


@dataclass
class Shared:
    """Shared memory; a view of it shares its bytes."""

    data: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> Any:
        found = self.data[int(i)]
        return found if isinstance(found, Barrier) else Shared(found)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)


class Barrier:
    """An mbarrier: a phase ends with its last arrival; `wait(parity)` waits while the current phase has that parity."""

    def __init__(self) -> None:
        self.changed, self.expected, self.pending, self.phase = threading.Condition(), 0, 0, 0
        self.bytes = 0  # on their way, of the current phase

    def init(self, count: int) -> None:
        self.expected = self.pending = count

    def arrive(self, count: int, expected_bytes: int = 0) -> None:
        _hesitate()
        with self.changed:
            self.pending -= count
            self.bytes += expected_bytes
            assert self.pending >= 0, "more arrivals than the barrier expects"
            self._end()

    def receive(self, received: int) -> None:
        with self.changed:
            self.bytes -= received
            self._end()

    def _end(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.expected, self.phase + 1
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        _hesitate()
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE), "a wait for a phase that never ends"


def _hesitate() -> None:
    """Give way to the other groups, now and then for long."""
    time.sleep(random.choice((0.0, 0.0, 0.0, 1e-3)))


def _copy(into: Shared, source: Pointer, mask: Any = None) -> None:
    into.data.fill_(math.nan if into.dtype.is_floating_point else -1)  # words of bfloat16 are NaN too
    here.copies.append((into, source, mask))


def _arrive_with_copies(barrier: Barrier, increment_count: bool = True) -> None:
    assert not increment_count
    _hesitate()
    for into, source, mask in here.copies:
        into.data.copy_(_load(source, mask, 0))
    here.copies = []
    barrier.arrive(here.threads)


def _fetch(source: SimpleNamespace, corner: list[Any], barrier: Barrier, into: Shared) -> None:
    """A box of a tensor, zeros outside of it, which the copy engine brings at its own time."""
    into.data.fill_(math.nan)
    assert list(into.data.shape) == list(source.block_shape)
    first = [int(i) for i in corner]

    def bring() -> None:
        _hesitate()
        box = source.base[tuple(slice(i, i + n) for i, n in zip(first, source.block_shape))]
        into.data.zero_()
        into.data[tuple(slice(0, n) for n in box.shape)] = box
        barrier.receive(into.data.nbytes)

    threading.Thread(target=bring, daemon=True).start()


def _add(pointer: Pointer, value: Tensor, mask: Any, sem: str) -> None:
    mask, offset = pointer.where(mask)
    with ADDING:
        pointer.base.index_put_((offset[mask],), value.expand(offset.shape)[mask], accumulate=True)


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    mask, offset = pointer.where(mask)
    found = pointer.base[offset] if pointer.base.numel() else torch.zeros(offset.shape, dtype=pointer.base.dtype)
    if found.dtype == torch.float8_e4m3fn:  # of which torch has no `where` on a CPU
        return torch.where(mask, found.float(), float(other)).to(found.dtype)
    return torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    assert value.dtype == pointer.base.dtype
    mask, offset = pointer.where(mask)
    pointer.base[offset[mask]] = value.expand(offset.shape)[mask]


def _multiply(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Callable[[], Tensor]:
    def product() -> Tensor:
        left = a.data if isinstance(a, Shared) else a
        before = acc() if callable(acc) else acc
        made = left.float() @ b.data.float()
        return before + made if use_acc else made

    assert is_async
    return product


def _wait(outstanding: int, deps: list[Any]) -> Any:
    found = tuple(x() if callable(x) else x for x in deps)
    return found if len(found) > 1 else found[0]


def _reinterpret(x: Shared, dtype: torch.dtype, shape: tuple[int, ...], layout: Any) -> Shared:
    found = Shared(x.data.view(dtype))
    assert found.data.shape == torch.Size(shape)
    return found


def _split(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The parts of each number's bits, lowest first, as numbers of a smaller dtype."""
    return list(x.unsqueeze(-1).contiguous().view(dtype).unbind(-1))


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda x: _split(x, torch.int16),
    "cvt.rn.f16x2.e4m3x2": lambda x: torch.stack([code.half() for code in _split(x, torch.float8_e4m3fn)], -1).view(torch.int32).squeeze(-1),
    "cvt.f32.f16": lambda x: x.view(torch.float16).float(),
    "mul.f32": torch.mul,
    "and.b32": torch.bitwise_and,
    "setp.ne.b32": torch.ne,
    "selp.f32": lambda yes, no, holds: torch.where(holds, yes, no),
    "cvt.rn.bf16x2.f32": lambda high, low: torch.stack((low, high), -1).bfloat16().view(torch.int32).squeeze(-1),
}


def _constant(text: str) -> Any:
    """An integer, or the float32 of the bits behind 0f."""
    return struct.unpack("!f", bytes.fromhex(text[2:]))[0] if text.startswith("0f") else int(text)


def _assemble(asm: str, constraints: str, args: list[Tensor], dtype: Any, is_pure: bool, pack: int) -> Tensor | tuple[Tensor, ...]:
    """What lines of PTX make of each element of `args`."""
    assert is_pure and pack == 1
    outputs = constraints.count("=")
    registers: dict[str, Any] = {f"${outputs + i}": x for i, x in enumerate(torch.broadcast_tensors(*args))}
    for line in asm.strip().strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and name != ".reg":
            names = re.findall(r"[\w$]+", operands)
            into = len(names) - 1 if "{" in operands else 1
            found = INSTRUCTIONS[name](*(registers[x] if x in registers else _constant(x) for x in names[into:] if into == 1 or x == names[-1]))
            registers.update(zip(names[:into], found if into > 1 else [found]))
    made = tuple(registers[f"${i}"] for i in range(outputs))
    return made if outputs > 1 else made[0]


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:  # barriers
        return Barrier() if len(shape) == 1 else Shared([Barrier() for _ in range(shape[0])])  # type: ignore[arg-type]
    return Shared(torch.full(shape, -7 if dtype == torch.int32 else math.nan, dtype=dtype))


def _specialise(groups: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    failures: list[BaseException] = []

    def work(program: int, programs: int, warps: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        here.program, here.programs, here.threads, here.copies = program, programs, 32 * warps, []
        try:
            function(*args)
        except BaseException as error:  # noqa: BLE001  handed to the caller below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(here.program, here.programs, n, *group), daemon=True) for n, group in zip((4, *warps), groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _range(*bounds: Any) -> Iterator[Tensor]:
    return (torch.tensor(i, dtype=torch.int32) for i in range(*map(int, bounds)))


def _nothing(*args: Any, **options: Any) -> None:
    return None


LANGUAGE = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("uint8", "int32", "int64", "float32", "bfloat16", "float16")},
    **{name: getattr(torch, name) for name in ("abs", "exp", "exp2", "log2", "permute", "where", "zeros_like")},
    maximum=lambda a, b: torch.fmax(torch.as_tensor(a), torch.as_tensor(b)),  # of NaN and a number the number, as on a card
    minimum=lambda a, b: torch.fmin(torch.as_tensor(a), torch.as_tensor(b)),
    constexpr=None,
    float8e4nv=torch.float8_e4m3fn,
    uint32=torch.int32,  # of which torch has next to nothing; here for bits that are no negative number
    cast=lambda x, dtype, bitcast=False: x.view(dtype) if bitcast else x.to(dtype),
    join=lambda a, b: torch.stack((a, b), -1),
    split=lambda x: x.unbind(-1),
    reshape=lambda x, shape: x.reshape(shape),
    BlockedLayout=_nothing,
    SliceLayout=_nothing,
    DistributedLinearLayout=_nothing,
    DotOperandLayout=_nothing,
    NVMMADistributedLayout=_nothing,
    program_id=lambda axis: torch.tensor(here.program, dtype=torch.int32),
    num_programs=lambda axis: torch.tensor(here.programs, dtype=torch.int32),
    cdiv=lambda a, b: (a + b - 1) // b,
    static_range=range,
    arange=lambda low, high, layout: torch.arange(low, high, dtype=torch.int32),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    convert_layout=lambda x, layout: x,
    max=lambda x, axis: x.amax(axis),
    min=lambda x, axis: x.amin(axis),
    sum=lambda x, axis: x.sum(axis),
    inline_asm_elementwise=_assemble,
    load=_load,
    store=_store,
    atomic_add=_add,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialise,
)
MBARRIER = SimpleNamespace(
    MBarrierLayout=_nothing,
    init=lambda barrier, count: barrier.init(count),
    wait=lambda barrier, parity: barrier.wait(int(parity)),
    arrive=lambda barrier, count: barrier.arrive(count),
    expect=lambda barrier, size: barrier.arrive(1, size),
)
WAIT = {"warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait, "fence_async_shared": _nothing}
NAMES = {
    "gl": LANGUAGE,
    "range": _range,
    "mbarrier": MBARRIER,
    "async_copy": SimpleNamespace(mbarrier_arrive=_arrive_with_copies),
    "copy": _copy,
    "fetch": _fetch,
    "reinterpret": _reinterpret,
    **WAIT,
}


def _pointer(x: Tensor) -> Pointer:
    return Pointer(torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage()), torch.tensor(x.storage_offset()))


def _memory(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return SimpleNamespace(base=x.base.detach(), dtype=x.base.dtype, block_shape=x.block_shape)
    return _pointer(x) if isinstance(x, Tensor) else x


def _python(kernel: JITFunction, globals_: dict[str, Any]) -> FunctionType:
    return FunctionType(kernel.fn.__code__, globals_, kernel.fn.__name__)


class Simulated:
    """A kernel to be launched as `kernel[grid](...)` over tensors of the CPU."""

    def __init__(self, kernel: JITFunction) -> None:
        self.modules: dict[str, dict[str, Any]] = {}
        self.globals = self._globals(kernel.fn.__globals__)
        self.kernel = _python(kernel, self.globals)

    def _globals(self, module: dict[str, Any]) -> dict[str, Any]:
        """What the functions of a module see, of this kernel's modules."""
        if module["__name__"] not in self.modules:
            seen = self.modules[module["__name__"]] = {"__builtins__": __builtins__}
            for name, value in module.items():
                if isinstance(value, JITFunction):
                    seen[name] = _python(value, self._globals(value.fn.__globals__))
                elif isinstance(value, gl.constexpr):
                    seen[name] = value.value
                elif isinstance(value, ConstexprFunction):  # layouts
                    seen[name] = _nothing
            seen |= NAMES
        return self.modules[module["__name__"]]

    def replace(self, name: str, value: Any) -> None:
        """Another value of a name, wherever its functions see it."""
        for seen in self.modules.values():
            if name in seen:
                seen[name] = value

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            memory = [_memory(x) for x in args]
            here.programs = grid[0]
            for here.program in range(grid[0]):
                self.kernel(*memory)

        return launch
