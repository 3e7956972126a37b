"""Runs calls of the extension in the folder argv[1], each buffer in an allocation of its exact size."""

import ctypes
import pickle
import sys

sys.path.insert(0, sys.argv[1])
import _C  # type: ignore[import-not-found]

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
results = []
for name, arguments in pickle.load(sys.stdin.buffer):
    values, outputs = [], []
    for kind, value in arguments:
        if kind == "value":
            values.append(value)
            continue
        size = value if kind == "output" else len(value)
        address = libc.malloc(ctypes.c_size_t(size))
        ctypes.memmove(address, b"\xff" * size if kind == "output" else value, size)
        values.append(address)
        if kind == "output":
            outputs.append((address, size))
    getattr(_C, name)(*values)
    results.append([ctypes.string_at(address, size) for address, size in outputs])
pickle.dump(results, sys.stdout.buffer)
