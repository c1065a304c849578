"""bpf(2), as far as a program needs it that looks and reports, to us alone.

A `Program` is of type BPF_PROG_TYPE_SYSCALL (Linux 5.14): attached to nothing, it runs when it is asked to, in the
thread that asks, and shares memory with us. `iterated` runs one for each object of a kind (Linux 5.8), and what it
writes is read like a file. Both need CAP_BPF and CAP_PERFMON in the initial user namespace, so not in `unshare -Ur`.
Numbers: include/uapi/linux/bpf.h; instructions: Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import struct
import sys

__all__ = [
    "FRAME",
    "INSTRUCTION",
    "PROBE_READ_KERNEL",
    "SHARED",
    "Program",
    "add",
    "add_register",
    "call",
    "call_function",
    "command",
    "instruction",
    "iterated",
    "jump_if_equal",
    "jump_if_less",
    "jump_unless_equal",
    "jump_unless_less",
    "leave",
    "load",
    "mask",
    "move",
    "multiply",
    "put",
    "store",
]

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}  # bpf(2) in asm/unistd.h

_MAP_CREATE, _PROG_LOAD, _PROG_TEST_RUN, _LINK_CREATE, _ITER_CREATE = 0, 5, 10, 28, 33
_MAP_TYPE_ARRAY, _F_MMAPABLE = 2, 1 << 10
_PROG_TYPE_TRACING, _PROG_TYPE_SYSCALL, _F_SLEEPABLE, _TRACE_ITER = 26, 31, 1 << 4, 28
_PSEUDO_MAP_VALUE, _PSEUDO_KFUNC_CALL = 2, 2  # in an instruction's source register
_NAME = b"tcpmig"  # as `bpftool prog` shows it

# union bpf_attr, each command's part as far as it is used
_CREATE = struct.Struct("=5I")  # type, size of key and value, entries, flags
# type, count, instructions, licence, (log), flags, name, (device), attachment, (types of its own), type attached to
_LOAD = struct.Struct("=IIQQ20xI16s4xI36xI")
_LINK = struct.Struct("=IIII")  # program, target, kind of attachment, flags
_ITERATOR = struct.Struct("=II")  # link, flags
_RUN = struct.Struct("=II")  # program, what it returns

# The interpreter's lock is kept: a run takes a microsecond, giving the lock away and back costs as much. Declaring the
# arguments would cost another: integers go as int, buffers as their address.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall

INSTRUCTION = 8  # bytes
SHARED = 6  # the register that holds the address of the shared memory when a program starts
PROBE_READ_KERNEL = 113  # enum bpf_func_id: kernel memory into ours, zeros if it cannot be read
FRAME = 10  # the register that points behind the program's stack


def instruction(opcode: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """Any instruction, by its opcode."""
    registers = source << 4 | to if sys.byteorder == "little" else to << 4 | source
    return struct.pack("=BBhi", opcode, registers, offset, value)


def put(to: int, value: int) -> bytes:
    """A number of 32 bits into a register."""
    return instruction(0xB7, to, value=value)


def move(to: int, source: int) -> bytes:
    """One register into another."""
    return instruction(0xBF, to, source)


def add(to: int, value: int) -> bytes:
    """Add a number to a register."""
    return instruction(0x07, to, value=value)


def add_register(to: int, source: int) -> bytes:
    """Add one register to another."""
    return instruction(0x0F, to, source)


def multiply(to: int, value: int) -> bytes:
    """Multiply a register by a number."""
    return instruction(0x27, to, value=value)


def mask(to: int, value: int) -> bytes:
    """Keep of a register only the bits of ``value``."""
    return instruction(0x57, to, value=value)


def load(to: int, source: int, offset: int, *, width: int = 8) -> bytes:
    """``width`` bytes at ``offset`` from where a register points."""
    return instruction({1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}[width], to, source, offset)


def store(to: int, source: int, offset: int, *, width: int = 8) -> bytes:
    """``width`` bytes of register ``source`` to ``offset`` from where register ``to`` points."""
    return instruction({1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}[width], to, source, offset)


def jump_if_less(register: int, value: int, distance: int) -> bytes:
    """Over ``distance`` instructions if a register is below a number, unsigned."""
    return instruction(0xA5, register, offset=distance, value=value)


def jump_unless_less(register: int, other: int, distance: int) -> bytes:
    """Over ``distance`` instructions if a register is not below another, unsigned."""
    return instruction(0x3D, register, other, distance)


def jump_if_equal(register: int, value: int, distance: int) -> bytes:
    """Over ``distance`` instructions if a register equals a number."""
    return instruction(0x15, register, offset=distance, value=value)


def jump_unless_equal(register: int, value: int, distance: int) -> bytes:
    """Over ``distance`` instructions if a register does not equal a number."""
    return instruction(0x55, register, offset=distance, value=value)


def call(helper: int) -> bytes:
    """Call a helper (enum bpf_func_id): arguments in registers 1 to 5, the result in 0."""
    return instruction(0x85, value=helper)


def call_function(number: int) -> bytes:
    """Call a function of the kernel, by its type number in BTF; otherwise as a helper."""
    return instruction(0x85, source=_PSEUDO_KFUNC_CALL, value=number)


def leave() -> bytes:
    """The end."""
    return instruction(0x95)


class Program:
    """A loaded program; ``memory`` is its memory and ours. Raises OSError where the kernel refuses."""

    def __init__(self, size: int, code: bytes) -> None:
        descriptor = command(_MAP_CREATE, _CREATE.pack(_MAP_TYPE_ARRAY, 4, size, 1, _F_MMAPABLE))
        try:
            code = instruction(0x18, SHARED, _PSEUDO_MAP_VALUE, value=descriptor) + instruction(0) + code
            self.memory = mmap.mmap(descriptor, size)
            self._descriptor = _loaded(_PROG_TYPE_SYSCALL, code, flags=_F_SLEEPABLE)
        finally:
            os.close(descriptor)  # program and mapping keep the memory
        self._run = _number(), _PROG_TEST_RUN, ctypes.create_string_buffer(_RUN.pack(self._descriptor, 0)), _RUN.size

    def run(self) -> None:
        """Run it once, in this thread. Raises OSError."""
        if _syscall(*self._run) < 0:
            raise _failure()

    def close(self) -> None:
        """Give program and memory back. In a forked child, too: both belong to the parent as well."""
        self.memory.close()
        os.close(self._descriptor)


def iterated(code: bytes, target: int) -> bytes:
    """What a program writes that is run for each object of a kind, in this thread's network namespace. Raises OSError.

    ``target`` is the type number of the kernel's function that names the kind, ``bpf_iter_tcp`` for TCP sockets; when
    the program starts register 1 points to that function's argument.
    """
    with contextlib.ExitStack() as opened:

        def kept(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        program = kept(_loaded(_PROG_TYPE_TRACING, code, attachment=_TRACE_ITER, target=target))
        link = kept(command(_LINK_CREATE, _LINK.pack(program, 0, _TRACE_ITER, 0)))
        with open(command(_ITER_CREATE, _ITERATOR.pack(link, 0)), "rb", buffering=0) as results:
            return results.read()


def _loaded(kind: int, code: bytes, *, flags: int = 0, attachment: int = 0, target: int = 0) -> int:
    source, licence = (ctypes.create_string_buffer(text) for text in (code, b"GPL"))
    where = ctypes.addressof(source), ctypes.addressof(licence)
    return command(_PROG_LOAD, _LOAD.pack(kind, len(code) // INSTRUCTION, *where, flags, _NAME, attachment, target))


def command(number: int, attributes: bytes) -> int:
    """bpf(2): the command of that number (enum bpf_cmd); what it returns. Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(_syscall(_number(), number, buffer, len(attributes)))
    if result < 0:
        raise _failure()
    return result


def _number() -> int:
    try:
        return _NUMBERS[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, f"no number of bpf(2) on {platform.machine()}") from None


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"bpf: {os.strerror(number)}")
