"""Handing the chunks of a compiled function to threads, at an address: what shares them out is then the same for all.

numba takes long to compile a parallel loop, around whatever it calls, and a kernel twice, for one thread and for
several. Here there is one such loop, which calls an address with a number, and a kernel is one function, which has
itself called by it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["address_of", "call_chunk", "limit_threads", "set_threads", "share_out"]

# void chunk(void* arguments, intp number)
_CHUNK = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, cgutils.intp_t])
# void share(uintp chunk, uintp arguments, intp how many)
_SHARE = ir.FunctionType(ir.VoidType(), [cgutils.intp_t] * 3)


@intrinsic
def call_chunk(typing, chunk, arguments, number):
    """Call what lies at an address with the address of its arguments and the number of a chunk."""

    def code(context, builder, signature, given):
        function, memory, which = given
        function = builder.inttoptr(function, _CHUNK.as_pointer())
        builder.call(function, [builder.inttoptr(memory, cgutils.voidptr_t), which])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), code


def _setting(builder: Any, name: str, kind: Any) -> Any:
    """A function of numba's pool (its threads have been started: they exist then). numba's own get_num_threads and
    set_num_threads cannot be cached, and the latter compares with a number of the process that compiled it.
    """
    return cgutils.get_or_insert_function(builder.module, kind, name)


@intrinsic
def set_threads(typing, n):
    """Have this many threads share the parallel loops of this Python thread: numba.set_num_threads, unchecked."""

    def code(context, builder, signature, given):
        change = _setting(builder, "set_num_threads", ir.FunctionType(ir.VoidType(), [cgutils.int32_t]))
        builder.call(change, [builder.trunc(given[0], cgutils.int32_t)])
        return context.get_dummy_value()

    return types.void(types.intp), code


@intrinsic
def limit_threads(typing, most):
    """As `set_threads`, but no more than there are, and at least one; how many there were."""

    def code(context, builder, signature, given):
        # As numba's own loops declare it. It is an int: the upper half of the register means nothing.
        ask = _setting(builder, "get_num_threads", ir.FunctionType(cgutils.intp_t, []))
        change = _setting(builder, "set_num_threads", ir.FunctionType(ir.VoidType(), [cgutils.int32_t]))
        before = builder.trunc(builder.call(ask, []), cgutils.int32_t)
        most, one = builder.trunc(given[0], cgutils.int32_t), ir.Constant(cgutils.int32_t, 1)
        fewer = builder.select(builder.icmp_signed("<", most, before), most, before)
        builder.call(change, [builder.select(builder.icmp_signed(">", fewer, one), fewer, one)])
        return builder.sext(before, cgutils.intp_t)

    return types.intp(types.intp), code


@intrinsic
def share_out(typing, chunk, n_chunks):
    """Call the kernel in which this stands for the number of every chunk, by what lies at the address ``-chunk``.

    The kernel's other arguments are those that it was called with, borrowed: whoever called it waits. As in numba's own
    loops, an exception in a chunk ends that chunk and is not told.
    """

    def code(context, builder, signature, given):
        address, n_chunks = builder.neg(given[0]), given[1]
        # numba's functions have two arguments first, for their result and exception; each call gets its own.
        kernel = builder.function
        passed = kernel.args[2:-1]
        memory = cgutils.alloca_once(builder, ir.LiteralStructType([argument.type for argument in passed]))
        for place, argument in enumerate(passed):
            builder.store(argument, cgutils.gep_inbounds(builder, memory, 0, place))

        name = builder.module.get_unique_name(f"{kernel.name}.chunk")
        one = ir.Function(builder.module, _CHUNK, name)
        one.linkage = "internal"
        inner = ir.IRBuilder(one.append_basic_block())
        own = [inner.alloca(argument.type.pointee) for argument in kernel.args[:2]]
        there = inner.bitcast(one.args[0], memory.type)
        read = [inner.load(cgutils.gep_inbounds(inner, there, 0, place)) for place in range(len(passed))]
        inner.call(kernel, [*own, *read, one.args[1]])
        inner.ret_void()

        share = builder.inttoptr(address, _SHARE.as_pointer())
        builder.call(share, [*(builder.ptrtoint(start, cgutils.intp_t) for start in (one, memory)), n_chunks])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), code


def address_of(dispatcher: Any, *kinds: Any) -> int:
    """Where C finds a function that is compiled for arguments of these types."""
    dispatcher.compile(kinds)
    found = dispatcher.overloads[kinds]
    return found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)
