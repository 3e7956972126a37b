from typing import Any

cpu_isa: str
cuda_architectures: str
openmp: bool

def __getattr__(name: str) -> Any: ...
