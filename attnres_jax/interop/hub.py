"""Where a model is: a directory, or a repository of the Hugging Face hub, fetched into its cache."""

import re
import shutil
from pathlib import Path

from attnres_jax.interop.errors import InteropError, need

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
)
"""What belongs to a model beside its weights and `config.json`. Code is never fetched, copied or run."""


def local_directory(name: Path | str) -> Path:
    """A directory as it is; a repository id (`owner/name`), fetched without anything that is not weights or settings.

    Raises:
      InteropError: if it is neither, or cannot be fetched.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or ".." in str(name):
        raise InteropError(f"{str(name)!r} is neither a directory nor a repository id such as Qwen/Qwen3-0.6B")
    hub = need("huggingface_hub")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]
    try:
        return Path(hub.snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # of many libraries below the hub's
        reason = " ".join(str(error).split())[:200]
        raise InteropError(
            f"{str(name)!r} is not a directory here and cannot be fetched from the hub: {reason}"
        ) from None


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer and generation settings."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
