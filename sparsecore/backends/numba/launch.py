"""Handing the chunks of a compiled function to threads, at an address: what shares them out is then the same for all.

numba takes long to compile a parallel loop, around whatever it calls. Here there is one such loop,
which calls an address with a number; a kernel adds a function of its own, which reads the arguments from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["call_chunk", "launcher"]

# void chunk(void* arguments, intp number)
_CHUNK = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, cgutils.intp_t])


@intrinsic
def call_chunk(typing, chunk, arguments, number):
    """Call what lies at an address with the address of its arguments and the number of a chunk."""

    def code(context, builder, signature, given):
        function, memory, which = given
        function = builder.inttoptr(function, _CHUNK.as_pointer())
        builder.call(function, [builder.inttoptr(memory, cgutils.voidptr_t), which])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), code


def launcher(work: Any, share: Any) -> Callable[..., None]:
    """An intrinsic of one tuple, the arguments of `work` without the last: `work` is called for every chunk's number.

    The last in the tuple is how many there are. share(chunk, arguments, n) calls an address that many times. Both are
    dispatchers. Arrays are borrowed from the caller, who waits. As in numba's own loops, an exception in a chunk ends
    that chunk and is not told.
    """

    @intrinsic
    def launch(typing, given):
        kinds = tuple(given)
        called = _signature(typing, work, (*kinds, types.intp))
        shared = _signature(typing, share, (types.uintp, types.uintp, types.intp))

        def code(context, builder, signature, arguments):
            callee, sharer = work.overloads[called.args], share.overloads[shared.args]
            context.add_linking_libs((callee.library, sharer.library))
            values = cgutils.unpack_tuple(builder, arguments[0], len(kinds))
            memory = cgutils.alloca_once(builder, ir.LiteralStructType([v.type for v in values]))
            for place, value in enumerate(values):
                builder.store(value, cgutils.gep_inbounds(builder, memory, 0, place))

            name = builder.module.get_unique_name(f"{builder.function.name}.chunk")
            chunk = ir.Function(builder.module, _CHUNK, name)
            chunk.linkage = "internal"
            inner = ir.IRBuilder(chunk.append_basic_block())
            there = inner.bitcast(chunk.args[0], memory.type)
            read = [inner.load(cgutils.gep_inbounds(inner, there, 0, place)) for place in range(len(kinds))]
            context.call_internal_no_propagate(inner, callee.fndesc, called, [*read, chunk.args[1]])
            inner.ret_void()

            addresses = [builder.ptrtoint(one, cgutils.intp_t) for one in (chunk, memory)]
            n_chunks = context.cast(builder, values[-1], kinds[-1], types.intp)
            context.call_internal_no_propagate(builder, sharer.fndesc, shared, [*addresses, n_chunks])
            return context.get_dummy_value()

        return types.void(given), code

    return launch


def _signature(typing: Any, dispatcher: Any, arguments: tuple[Any, ...]) -> Any:
    """That of a dispatcher for these types, for which it is compiled."""
    return types.Dispatcher(dispatcher).get_call_type(typing, arguments, {})
