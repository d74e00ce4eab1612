"""Device and dtype, as a user names them."""

import importlib

import torch

from .errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """None or "auto" picks CUDA, then MPS, then the CPU. Raises InputError if the device is not on this machine."""
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} can't be used here: {str(error).splitlines()[0]}. "
                         'Use "cpu", "cuda" or "auto".') from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """None or "auto" is bfloat16 on an accelerator (the precision of training) and float32 on the CPU."""
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
        raise InputError(f"dtype {dtype} is no compute precision. Use one of {', '.join(DTYPES)}.")
    name = DTYPE_ALIASES.get(dtype, dtype)
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown. Use one of {', '.join([*DTYPES, *DTYPE_ALIASES])} or auto.")
    return DTYPES[name]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is about memory, of an accelerator or of the machine: for the latter torch has no class of its own.

    "could not create a primitive" is what oneDNN, which computes convolutions on the CPU, says of an allocation that failed.
    """
    texts = ("can't allocate memory", "Cannot allocate memory", "could not create a primitive")
    said = isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in texts)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def first_line(error: BaseException) -> str:
    """What it says in short; its class if it says nothing, as MemoryError often does."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require_package(name: str, *, extra: str, purpose: str):
    """The imported optional package. Raises InputError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{purpose} needs the package {name} ({error}). Install it: pip install 'comfyui-blip3o[{extra}]', or in a "
                         f"clone of the repository pip install -e '.[{extra}]'.") from error
