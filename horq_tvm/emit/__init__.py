"""From a lowered module to a library that needs nothing but libc: `standalone`; or TVM's runtime: `virtual_machine`.

plan.py     the calls of main, in order, and the buffers between them
memory.py   where each buffer lies: caller's memory, weights, or one arena
kernels.py  the kernels as one object file
driver.py   plan and placement as constant tables in C
link.py     all of it, with the C runtime, into one .so
"""

from horq_tvm.emit.standalone import EmitTarget, standalone
from horq_tvm.emit.virtual_machine import virtual_machine

__all__ = ["EmitTarget", "standalone", "virtual_machine"]
