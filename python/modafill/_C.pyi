from typing import Any

cpu_isa: str
cuda_architectures: str
openmp: bool

def prefer_huge_pages(address: int, bytes: int) -> None: ...
def __getattr__(name: str) -> Any: ...
