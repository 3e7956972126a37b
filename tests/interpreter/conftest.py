"""Triton's interpreter has to be on before a kernel is decorated: these tests are a pytest process of their own."""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton is imported already: run tests/interpreter in a process of its own", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
