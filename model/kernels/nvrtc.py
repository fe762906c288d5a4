"""CUDA C++ kernels compiled when they are first used, by the compiler library that torch brings along (NVRTC).

So nothing has to be built to install them, and no CUDA toolkit need be there. Kernels take one argument, a structure by
value. Compiling takes about two seconds for a kernel and process.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...


class Kernel:
    """One kernel, loaded on the devices that it is launched on.

    Args:
        source: a .cu file; what it includes lies beside it.
        name: of an `extern "C" __global__` function in it.
        defines: macros.
    """

    def __init__(self, source: Path, name: str, defines: Mapping[str, int]) -> None:
        self.source, self.name, self.defines = source, name, dict(defines)
        self._functions: dict[int, ctypes.c_void_p] = {}

    def __call__(
        self,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        argument: ctypes.Structure,
        device: torch.device,
    ) -> None:
        """Launches on the current stream of `device`, with 1 to 3 grid sizes.

        Raises:
            RuntimeError: it does not compile, or the driver refuses it; the message is theirs.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(index):
            function = self._functions.get(index) or self._load(index, shared_bytes)
            sizes = [*grid, 1, 1][:3]
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            code = _driver().cuLaunchKernel(function, *sizes, threads, 1, 1, shared_bytes, stream, pointers, None)
            _check(code, self.name)

    def _load(self, index: int, shared_bytes: int) -> ctypes.c_void_p:
        torch.cuda.current_stream().synchronize()  # makes sure that there is a context
        major, minor = torch.cuda.get_device_capability(index)
        binary = compiled(self.source, tuple(sorted(self.defines.items())), f"sm_{major}{minor}")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), binary), self.name)
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, self.name.encode()), self.name)
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes), self.name)
        self._functions[index] = function
        return function


@functools.cache
def compiled(source: Path, defines: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """A .cu file as machine code for one architecture, e.g. `sm_90`."""
    library = _compiler()
    program = ctypes.c_void_p()
    text = source.read_bytes()
    _compile_check(library.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", f"--include-path={source.parent}"]
    options += [f"--define-macro={name}={value}" for name, value in defines]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if library.nvrtcCompileProgram(program, len(options), words):
            raise RuntimeError(f"{source.name} does not compile:\n{_text(program, 'nvrtcGetProgramLog').decode()}")
        return _text(program, "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _compile_check(getattr(_compiler(), f"{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _compile_check(getattr(_compiler(), what)(program, buffer))
    return buffer.raw


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _compiler() -> Any:
    """NVRTC of torch's own CUDA version: torch has loaded it, or it lies with its other libraries."""
    major = str(torch.version.cuda).split(".")[0]
    name = f"libnvrtc.so.{major}"
    packages = Path(torch.__file__).parents[1]
    beside = [packages / "nvidia" / f"cu{major}" / "lib", packages / "nvidia" / "cuda_nvrtc" / "lib"]
    for path in [name, *(str(folder / name) for folder in beside), str(Path(torch.__file__).parent / "lib" / name)]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise RuntimeError(f"{name}, which belongs to torch {torch.__version__}, is not there")


def _check(code: int, name: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


def _compile_check(code: int) -> None:
    if code:
        _compiler().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {_compiler().nvrtcGetErrorString(code).decode()}")
