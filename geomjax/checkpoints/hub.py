"""Checkpoints on the Hugging Face hub.

huggingface_hub is imported where it is used: it takes longer than everything else in
reading a local checkpoint.
"""

from pathlib import Path

from geomjax.checkpoints.errors import CheckpointError
from geomjax.checkpoints.safetensors_header import FLOATING_DTYPES
from geomjax.typing import TensorSpec

_ADVICE = (
    "give the path of a local folder, or the name of a public repository with access "
    "to the hub (HF_HUB_OFFLINE unset)"
)


def download(name: str, revision: str | None) -> Path:
    """Downloads the safetensors and JSON files at the top of a repository.

    Args:
        name: `organisation/name`.
        revision: branch, tag or commit; the main branch by default.

    Returns:
        The folder of the local snapshot; nothing is fetched that is in the cache.

    Raises:
        CheckpointError: no such name, or no access to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    _check_name(name)
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=["*/*"],
            )
        )
    except (HFValidationError, OSError) as error:
        raise _not_had(name, error) from error


def hub_specs(name: str, revision: str | None) -> dict[str, TensorSpec]:
    """Shapes and dtypes of a repository's weights, from its files' headers alone.

    Args:
        name: `organisation/name`.
        revision: branch, tag or commit; the main branch by default.

    Returns:
        Name to `TensorSpec`, of the floating-point tensors.

    Raises:
        CheckpointError: no such name, no access to it, or no safetensors in it.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import (
        HFValidationError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    _check_name(name)
    try:
        repository = get_safetensors_metadata(name, revision=revision)
    except (
        HFValidationError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
        OSError,
    ) as error:
        raise _not_had(name, error) from error
    return {
        tensor: TensorSpec(tuple(info.shape), FLOATING_DTYPES[info.dtype])
        for file in repository.files_metadata.values()
        for tensor, info in file.tensors.items()
        if info.dtype in FLOATING_DTYPES
    }


def _check_name(name: str) -> None:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(name, ["no such file or folder", _ADVICE])


def _not_had(name: str, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        name, [f"no such local path, and not had from the hub: {reason}", _ADVICE]
    )
