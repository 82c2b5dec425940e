"""Corpora: where documents come from, and which of them are held out."""

import dataclasses
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from attnres_jax.config import DataConfig
from attnres_jax.errors import UserError


class DataError(UserError, ValueError):
    """Text that cannot be used as it is; the message names the file or the key, and the way out."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, its name within the corpus, and whether it is kept for evaluation."""

    name: str
    text: str
    heldout: bool


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, read again at every iteration; documents without text are left out.

    `read` gives (name, text) pairs. A document's split depends on its name and `heldout_percent` alone: it stays where
    it is when other documents come or go.
    """

    read: Callable[[], Iterator[tuple[str, str]]]
    heldout_percent: int

    def __iter__(self) -> Iterator[Document]:
        for name, text in self.read():
            if text:
                yield Document(name, text, _bucket(name) < self.heldout_percent)

    def digest(self) -> str:
        """A hash of every document's name, split and text (32 hex digits).

        Raises:
          DataError: if there is no document to train on or none to hold out.
        """
        total, buckets = hashlib.sha256(), set()
        for document in self:
            content = document.text.encode()
            total.update(_bytes(f"{document.name}\0{document.heldout}\0{len(content)}\0") + content)
            buckets.add(_bucket(document.name))
        self._check_split(buckets)
        return total.hexdigest()[:32]

    def _check_split(self, buckets: set[int]) -> None:
        setting = f"data.heldout_percent={self.heldout_percent}"
        if not buckets:
            raise DataError(f"the corpus holds no text ({setting}); point data.files at documents that are not empty")
        if any(bucket < self.heldout_percent for bucket in buckets) and max(buckets) >= self.heldout_percent:
            return
        side = "train on" if max(buckets) < self.heldout_percent else "hold out"
        # The two splits are both filled by any percentage above the smallest bucket and up to the largest.
        near = min(
            range(max(1, min(buckets) + 1), min(50, max(buckets)) + 1),
            key=lambda percent: abs(percent - self.heldout_percent),
            default=None,
        )
        advice = (
            f"nearest: data.heldout_percent={near}" if near else "add documents (a document is a file or a .jsonl line)"
        )
        raise DataError(f"{setting} leaves no document to {side}; {advice}")


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.source` names.

    Raises:
      DataError: if its files cannot be found, or are not .txt or .jsonl. Iterating raises it for a file that cannot be
        read, is not UTF-8, or holds a malformed JSON line.
    """
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = stdlib_paths(root)
        if not paths:
            raise DataError(
                f"data.source='stdlib': no Python source under {str(root)!r}; use data.source='text' with data.files"
            )
        return Corpus(lambda: _read_stdlib(root, paths), config.heldout_percent)
    root, paths = _matching(config.files)
    return Corpus(lambda: _read_text(root, paths), config.heldout_percent)


_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}
_TABLES = {"html/entities.py"}
_GENERATED = re.compile(rb"auto-?generated|automatically generated|file is generated", re.IGNORECASE)


def stdlib_paths(root: Path) -> list[str]:
    """The standard library's own modules under `root`, sorted, as relative posix paths.

    Left out: installed packages, tests, the codecs (a hundred copies of one page, which would stand on both sides of
    the split) and what a program wrote: tables, pydoc's topics, the build's variables.
    """
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            written = name.endswith(".py") and not name.startswith("_sysconfigdata") and relative not in _TABLES
            if written and path.is_file() and os.access(path, os.R_OK):
                with path.open("rb") as file:
                    if not _GENERATED.search(file.read(400)):
                        paths.append(relative)
    return sorted(paths)


def _read_stdlib(root: Path, paths: list[str]) -> Iterator[tuple[str, str]]:
    for name in paths:
        try:
            yield name, (root / name).read_bytes().decode()
        except UnicodeDecodeError:  # Declares another encoding; not for the user to mend.
            continue


def _matching(pattern: str) -> tuple[Path, list[Path]]:
    """The files that `pattern` matches, sorted, and the folder that their names in the corpus are relative to."""
    pattern = os.path.expanduser(pattern)
    paths = sorted(Path(path) for path in set(glob.glob(pattern, recursive=True)) if os.path.isfile(path))
    if not paths:
        raise DataError(
            f"data.files={pattern!r} matches no file, taken as {os.path.abspath(pattern)!r}; give a glob of .txt or "
            ".jsonl files such as 'corpus/*.txt'"
        )
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise DataError(
                f"data.files={pattern!r} matches {str(path)!r}, which is neither .txt nor .jsonl; narrow the glob"
            )
    # The part before the first wildcard: a corpus keeps its split when the folder around it moves.
    return Path(re.split(r"[*?[]", pattern, maxsplit=1)[0] + "_").parent, paths


def _read_text(root: Path, paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            if path.suffix == ".txt":
                yield name, _decode(path.read_bytes(), path)
                continue
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name}:{number}", _json_text(line, f"{path}:{number}")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; mend it or narrow data.files") from None


def _decode(content: bytes, where: object) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}); convert it to UTF-8"
        ) from None


def _json_text(line: bytes, where: str) -> str:
    line = _decode(line, where)
    try:
        text = json.loads(line)["text"]
        text.encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}; mend or delete the line") from None
    except (KeyError, TypeError, AttributeError, IndexError):
        raise DataError(f'{where} has no string "text" field; each line must be like {{"text": "..."}}') from None
    except UnicodeEncodeError:
        raise DataError(
            f"{where} escapes half a surrogate pair, which is no character; mend or delete the line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{where} is JSON that Python cannot read: {error}; mend or delete the line") from None
    return text


def _bucket(name: str) -> int:
    """0 to 99, the same for a name on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(_bytes(name)).digest()[:8]) % 100


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # A file's name need not be UTF-8.
