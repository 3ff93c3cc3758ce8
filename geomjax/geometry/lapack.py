"""Symmetric eigenproblems on the host, by LAPACK, in float64.

They are solved here whatever the accelerator is: XLA's own solver takes minutes to
compile for a TPU from a few hundred rows on, and what comes before and after it, the
products along the long side, stays on the devices.

A symmetric eigenproblem with all vectors spends half of its time on vectors that nobody
asks for. Here the matrix is reduced to tridiagonal form, solved by divide and conquer,
and the leading vectors alone are turned back; without vectors, all that costs is the
reduction. The routines are called by the pointers that SciPy publishes for Cython,
outside of Python's lock: several matrices are solved at a time.
"""

import ctypes
import re
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.linalg import cython_lapack

_BLOCK = 64
"""Rows for which LAPACK's workspaces have room, at least its own block sizes."""
_KINDS = re.compile(r"(char|int|\w+_d) \*")


def eigenvalues(lower: Float[np.ndarray, "r r"]) -> Float[np.ndarray, " r"]:
    """Eigenvalues of a symmetric matrix, in descending order.

    Args:
        lower: the matrix in float64, rows contiguous; only its lower triangle is read,
            and all of it is overwritten.

    Returns:
        The eigenvalues; NaN if LAPACK did not find them, or the matrix is not finite.

    Raises:
        ValueError: an array that is not such a matrix, or cannot be written.
    """
    _check(lower)
    scaled = _scale(lower)
    if scaled is None:
        return np.full(len(lower), _unsolved(lower))
    diagonal, beside, _ = _tridiagonal(lower)
    if _call("dsterf", len(lower), diagonal, beside):
        return np.full(len(lower), np.nan)
    return np.ldexp(diagonal[::-1], scaled)


def eigenpairs(
    lower: Float[np.ndarray, "r r"], k: int
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, "k r"]]:
    """All eigenvalues in descending order, and the leading k eigenvectors as rows.

    Args:
        lower: see `eigenvalues`.
        k: vectors wanted, from 1 to r.

    Returns:
        Values and vectors; both NaN if LAPACK did not find them, or the matrix is not
        finite.

    Raises:
        ValueError: as `eigenvalues`, or another k.
    """
    _check(lower)
    r = len(lower)
    if not 1 <= k <= r:
        raise ValueError(f"k: got {k}, expected 1 to {r}, the rows of the matrix")
    scaled = _scale(lower)
    if scaled is None:
        return np.full(r, _unsolved(lower)), np.eye(k, r) + _unsolved(lower)
    diagonal, beside, reflectors = _tridiagonal(lower)
    vectors = np.empty((r, r))
    work, integers = np.empty(1 + 4 * r + r * r), np.empty(3 + 5 * r, np.int32)
    failed = _call(
        "dstedc",
        *(b"I", r, diagonal, beside, vectors, r),
        *(work, work.size, integers, integers.size),
    )
    leading = vectors[r - k :]
    work = np.empty(_BLOCK * (max(r, k) + _BLOCK + 1))
    failed |= _call(
        "dormtr",
        *(b"L", b"U", b"N", r, k, lower, r, reflectors),
        *(leading, r, work, work.size),
    )
    if failed:
        return np.full(r, np.nan), np.full((k, r), np.nan)
    return np.ldexp(diagonal[::-1], scaled), leading[::-1].copy()


def _check(lower: np.ndarray) -> None:
    """Raises ValueError unless LAPACK may be given a pointer to the array."""
    shape = lower.shape
    square = len(shape) == 2 and shape[0] == shape[1] > 0
    if not (square and lower.dtype == np.float64 and lower.flags.carray):
        order = "rows contiguous" if lower.flags.c_contiguous else "rows not contiguous"
        access = "writeable" if lower.flags.writeable else "read-only"
        raise ValueError(
            f"got {lower.dtype} of shape {shape}, {order}, {access}; expected an "
            "aligned, writeable float64 matrix, square, its rows contiguous"
        )


def _scale(lower: Float[np.ndarray, "r r"]) -> int | None:
    """Divides by a power of two, to be near one; None for what needs no solving."""
    largest = max(lower.max(), -lower.min())
    if not (np.isfinite(largest) and largest > 0):
        return None
    exponent = int(np.frexp(largest)[1])
    np.ldexp(lower, -exponent, out=lower)
    return exponent


def _unsolved(lower: Float[np.ndarray, "r r"]) -> float:
    """The eigenvalues of a zero matrix, or NaN for one that is not finite."""
    return 0.0 if not lower.any() else np.nan


def _tridiagonal(
    lower: Float[np.ndarray, "r r"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Diagonal, what is beside it, and the factors of the reflectors left in place."""
    r = len(lower)
    diagonal, beside, reflectors = np.empty(r), np.empty(r), np.empty(r)
    work = np.empty(_BLOCK * r)
    # Its rows are the columns of Fortran, its lower triangle the upper one.
    _call(
        "dsytrd",
        *(b"U", r, lower, r, diagonal, beside, reflectors, work, work.size),
    )
    return diagonal, beside, reflectors


def _call(name: str, *args: bytes | int | np.ndarray) -> int:
    """Calls a routine, and returns the `info` that it ends with."""
    info = ctypes.c_int()
    given: list[Any] = []
    for arg in args:
        if isinstance(arg, np.ndarray):
            given.append(ctypes.c_void_p(arg.ctypes.data))
        elif isinstance(arg, bytes):
            given.append(ctypes.c_char_p(arg))
        elif arg >= 1 << 31:
            raise ValueError(f"{name}: {arg} is too large for it")
        else:
            given.append(ctypes.byref(ctypes.c_int(arg)))
    _routine(name)(*given, ctypes.byref(info))
    if info.value < 0:
        raise ValueError(f"{name}: argument {-info.value} is wrong")
    return info.value


@lru_cache
def _routine(name: str) -> Any:
    """A routine of the LAPACK that SciPy is linked to."""
    capsule = cython_lapack.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = api.PyCapsule_GetName(capsule)
    kinds = signature.decode().removeprefix("void (").removesuffix(")").split(", ")
    if not all(_KINDS.fullmatch(kind) for kind in kinds):
        raise ImportError(f"SciPy's {name} is of another kind: {signature.decode()}")
    return ctypes.CFUNCTYPE(None)(api.PyCapsule_GetPointer(capsule, signature))
