"""A model directory's own tokenizer and chat template."""

import base64
import binascii
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from attnres_jax.data import chunks
from attnres_jax.interop.errors import InteropError, need
from attnres_jax.interop.hub import local_directory
from attnres_jax.interop.store import read_json

# A word: a capitalised run and a lower-case one, at least one of them, none of Han, and an English contraction.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How Kimi's models (Moonlight, K2, Kimi Linear, K3) split a text before byte pairs are merged."""

KIMI_SPECIAL = 256
"""Ids behind the ranks that are special; those without a name are `<|reserved_token_{id}|>`."""

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Names under which a chat template sees special tokens."""

MAX_CHARS, MAX_RUN = 400_000, 25_000
"""Kimi cuts a text into pieces of so many characters, and runs of blanks or of others that are longer than this: the
pattern's engine is not made for longer ones."""

GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
"""A tag of Hugging Face's templates around what the model says: for training masks, without effect on the text."""


@runtime_checkable
class Encoder(Protocol):
    """Text to ids and back."""

    size: int
    """One more than the largest id."""
    digest: str
    """A hash of what it was made from."""

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids of each text, in which special tokens are recognised."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of ids."""

    def id_of(self, token: str) -> int | None:
        """The id of a special token."""

    def sizes(self) -> dict[int, int]:
        """How many bytes of text each id stands for that is not special."""


class ModelTokenizer:
    """The tokenizer of a directory, with its special tokens and chat template."""

    def __init__(self, encoder: Encoder, settings: Mapping[str, Any], template: str | None, stop_ids: Sequence[int]):
        self.encoder = encoder
        self.template = template
        self.stop_ids = tuple(stop_ids)
        """Ids that end a text: of the tokenizer and of the model's settings, which may differ."""
        self.special = {key: _content(settings.get(key)) for key in SPECIAL}

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text. Special tokens in it count as what they stand for, as chat templates need it.

        Args:
          text: any text.
          add_special_tokens: put what the tokenizer puts around a text, such as a token at its beginning.
        """
        return self.encoder.encode([text], add_special_tokens)[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 give the replacement character.

        Raises:
          InteropError: for an id beyond the tokenizer's.
        """
        ids = [int(index) for index in ids]
        if outside := [index for index in ids if not 0 <= index < self.encoder.size]:
            raise InteropError(f"id {outside[0]} is none of the tokenizer's, which are 0 to {self.encoder.size - 1}")
        return self.encoder.decode(ids, skip_special_tokens)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **more: Any) -> str:
        """Messages (`{"role": ..., "content": ...}`) as the text that the model was trained on.

        Raises:
          InteropError: if there is no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise InteropError("this model has no chat template; give it a plain text")
        sandbox = need("jinja2.sandbox")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        given = {key: value for key, value in self.special.items() if value is not None} | more
        try:
            template = environment.from_string(GENERATION.sub(_as_condition, self.template))
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # jinja2's own, and whatever the template's expressions come to
            raise InteropError(f"the chat template cannot be applied: {' '.join(str(error).split())}") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> list[int]:
        """`chat`, as ids."""
        return self.encode(self.chat(messages, **more))

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return self.encoder.size

    @functools.cached_property
    def end_id(self) -> int:
        """What ends a document: the token that the tokenizer names, else the first of `stop_ids`.

        Raises:
          InteropError: if there is neither.
        """
        named = self.special["eos_token"]
        known = [index for index in (named and self.encoder.id_of(named), *self.stop_ids) if index is not None]
        if not known:
            raise InteropError("this tokenizer names no token that ends a text (eos_token in tokenizer_config.json)")
        return known[0]

    @property
    def digest(self) -> str:
        """A hash of all that decides which tokens a document has."""
        return f"{self.encoder.digest} {self.end_id}"

    def documents(self, texts: Iterable[str]) -> Iterator[Int32[np.ndarray, "n"]]:
        """Each text between what the tokenizer puts before one, else `end_id`, and `end_id`."""
        opens = self.encode("", add_special_tokens=True)[:1] not in ([], [self.end_id])
        for chunk in chunks(texts):
            for ids in self.encoder.encode(chunk, True):
                before, after = [] if opens else [self.end_id], [] if ids[-1:] == [self.end_id] else [self.end_id]
                yield np.array([*before, *ids, *after], np.int32)

    def token_bytes(self, vocab_size: int) -> Int32[np.ndarray, "V"]:
        """How many bytes of text each id stands for; 0 for special and unused ones."""
        sizes = np.zeros(vocab_size, np.int32)
        for index, size in self.encoder.sizes().items():
            sizes[index] = size
        return sizes


def load_tokenizer(directory_or_repo_id: Path | str) -> ModelTokenizer:
    """The tokenizer of a model: `tokenizer.json`, or `tiktoken.model` as Kimi's models have it.

    Raises:
      InteropError: one line, if there is none or it cannot be read.
    """
    directory = local_directory(directory_or_repo_id)
    settings = _optional_json(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").exists():
        encoder: Encoder = _FastEncoder(directory / "tokenizer.json")
    elif (directory / "tiktoken.model").exists():
        encoder = _KimiEncoder(directory / "tiktoken.model", settings)
    else:
        raise InteropError(f"{directory} has neither tokenizer.json nor tiktoken.model")
    stop_ids = _stop_ids(directory, encoder, settings)
    return ModelTokenizer(encoder, settings, _template(directory, settings), stop_ids)


class _FastEncoder:
    """`tokenizer.json`, by the tokenizers library."""

    def __init__(self, path: Path):
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise InteropError(f"{path} is not a tokenizer: {' '.join(str(error).split())[:200]}") from None
        self.size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        self.digest = _hash(path.read_bytes())

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def sizes(self) -> dict[int, int]:
        decoder = json.loads(self.tokenizer.to_str())["decoder"]
        if '"ByteLevel"' in json.dumps(decoder):  # its alphabet writes every byte as one character
            length = len
        else:  # blanks are written as a character of their own, bytes of what has no token as numbers

            def length(token):
                return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("\u2581", " ").encode())

        own = {index: length(token) for token, index in self.tokenizer.get_vocab(with_added_tokens=False).items()}
        added = self.tokenizer.get_added_tokens_decoder()
        return own | {i: 0 if token.special else len(token.content.encode()) for i, token in added.items()}


class _KimiEncoder:
    """`tiktoken.model`: a rank a line, with Kimi's split pattern and special tokens behind the ranks."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        ranks = _ranks(path)
        named = settings.get("added_tokens_decoder", {})
        try:
            names = {int(index): _content(token) for index, token in named.items()}
        except (AttributeError, ValueError):
            raise InteropError(f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is not ids") from None
        first = len(ranks)
        self.special = {
            names.get(index) or f"<|reserved_token_{index}|>": index for index in range(first, first + KIMI_SPECIAL)
        }
        try:
            self.encoding = need("tiktoken").Encoding(
                path.name, pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
            )
        except (ValueError, KeyError) as error:
            raise InteropError(f"{path} is not a tokenizer: {error}") from None
        self.size = self.encoding.n_vocab
        self.lengths = {rank: len(token) for token, rank in ranks.items()}
        self.digest = _hash(path.read_bytes() + json.dumps(self.special).encode())

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [
            [
                index
                for start in range(0, len(text), MAX_CHARS)
                for piece in _pieces(text[start : start + MAX_CHARS])
                for index in self.encoding.encode(piece, allowed_special="all")
            ]
            for text in texts
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        special = set(self.special.values()) if skip_special_tokens else ()
        return self.encoding.decode([index for index in ids if index not in special], errors="replace")

    def id_of(self, token: str) -> int | None:
        return self.special.get(token)

    def sizes(self) -> dict[int, int]:
        return self.lengths


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise InteropError(f"{path} is not lines of a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise InteropError(f"{path} does not have each rank from 0 on once")
    return ranks


def _pieces(text: str) -> Iterator[str]:
    """The text, cut where a run of blanks or of others is longer than `MAX_RUN`."""
    start = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InteropError(f"{path} cannot be read: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _stop_ids(directory: Path, encoder: Encoder, settings: Mapping[str, Any]) -> list[int]:
    ids = []
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(directory / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    token = _content(settings.get("eos_token"))
    ids.append(None if token is None else encoder.id_of(token))
    return list(dict.fromkeys(index for index in ids if type(index) is int))


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: Any) -> str | None:
    """A token is written as itself or as a group that has it as `content`."""
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None


def _refuse(message: str) -> None:
    raise need("jinja2").TemplateError(message)


def _as_condition(tag: re.Match[str]) -> str:
    return f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}"


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(style: str) -> str:
    return datetime.datetime.now().strftime(style)
