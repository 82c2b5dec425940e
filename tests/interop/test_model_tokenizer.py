"""A model directory's own tokenizer: tokenizer.json, Kimi's tiktoken.model, chat templates, what ends a text."""

import base64
import json

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from attnres_jax.interop import InteropError, load_tokenizer
from attnres_jax.interop.tokenizer import KIMI_PATTERN, MAX_RUN

TEMPLATE = (
    "{%- for message in messages %}\n"
    "<|im_{{ message['role'] }}|>{{ message['content'] }}<|im_end|>{{ '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}<|im_assistant|>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}]
SPECIAL = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>"]


@pytest.fixture
def fast(tmp_path):
    """A directory with a byte-level tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": {"content": "[BOS]"}, "eos_token": "[EOS]", "chat_template": "{{ bos_token }}" + TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 258}))
    return tmp_path


@pytest.fixture
def kimi(tmp_path):
    """A directory with ranks for all bytes and a few merges, as Kimi's models have them."""
    tokens = [bytes([i]) for i in range(256)] + [
        b"he",
        b"ll",
        b"hell",
        b"hello",
        b" w",
        "你".encode()[:2],
        "你".encode(),
    ]
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_bytes(b"".join(lines))
    named = {str(263 + i): {"content": token} for i, token in enumerate(SPECIAL)}
    settings = {"added_tokens_decoder": named, "eos_token": "[EOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [265]}))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_tokenizer_json(fast):
    tokenizer = load_tokenizer(fast)
    ids = tokenizer.encode("naïve 你好<|im_end|>")
    assert ids[-1] == 258 and tokenizer.decode(ids) == "naïve 你好<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "naïve 你好"
    assert tokenizer.stop_ids == (258, 257)
    assert tokenizer.chat(MESSAGES) == "[BOS]<|im_user|>hi<|im_end|>\n<|im_assistant|>"
    ids = tokenizer.encode_chat(MESSAGES, add_generation_prompt=False)
    assert (ids[0], ids[1], ids[-2]) == (256, 259, 258)


def test_documents_of_tokenizer_json(fast):
    tokenizer = load_tokenizer(fast)
    assert (tokenizer.size, tokenizer.end_id) == (261, 257)  # of tokenizer_config.json, before those of other files
    text = "naïve 你好<|im_end|>"
    (document,) = tokenizer.documents([text])
    assert document.dtype == np.int32 and document.tolist() == [257, *tokenizer.encode(text), 257]
    sizes = tokenizer.token_bytes(300)
    assert sizes.shape == (300,) and sizes[document].sum() == len("naïve 你好".encode()) and not sizes[256:].any()
    # What the tokenizer puts before a text begins it; an end that it puts behind is not written twice.
    library = Tokenizer.from_file(str(fast / "tokenizer.json"))
    around = [("[BOS]", 256), ("[EOS]", 257)]
    library.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=around)
    library.add_tokens(["<tool>"])  # with a meaning of its own and yet text
    library.save(str(fast / "tokenizer.json"))
    other = load_tokenizer(fast)
    first, second = other.documents(["a<tool>", ""])
    assert first.tolist() == [256, *tokenizer.encode("a"), 261, 257] and second.tolist() == [256, 257]
    assert other.token_bytes(262)[first].tolist() == [0, 1, 6, 0] and other.digest != tokenizer.digest
    (fast / "config.json").unlink()
    (fast / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InteropError, match="names no token that ends a text"):
        list(load_tokenizer(fast).documents(["a"]))


def test_bytes_of_a_tokenizer_that_is_not_byte_level(tmp_path):
    vocabulary = {"<0xE4>": 0, "<0xBD>": 1, "<0xA0>": 2, "\u2581": 3, "\u2581é": 4, "é": 5, "x": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "é")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 6}))
    (document,) = load_tokenizer(tmp_path).documents(["你 é"])
    assert document.tolist() == [6, 0, 1, 2, 4, 6]
    assert load_tokenizer(tmp_path).token_bytes(7)[document[1:-1]].sum() == len("你 é".encode())


def test_documents_of_tiktoken_model(kimi):
    tokenizer = load_tokenizer(kimi)
    (document,) = tokenizer.documents(["hello 你"])
    assert document.tolist() == [264, 259, 32, 262, 264]
    assert tokenizer.token_bytes(600)[document].tolist() == [0, 5, 1, 3, 0]
    digest = tokenizer.digest
    (kimi / "chat_template.jinja").unlink()
    assert load_tokenizer(kimi).digest == digest  # which decides no token of a document
    (kimi / "tiktoken.model").write_bytes((kimi / "tiktoken.model").read_bytes() + base64.b64encode(b"zz") + b" 263\n")
    assert load_tokenizer(kimi).digest != digest


def test_tiktoken_model(kimi):
    tokenizer = load_tokenizer(kimi)
    assert tokenizer.encode("hello 你") == [259, 32, 262]
    assert tokenizer.encode("[BOS]hello<|im_end|>") == [263, 259, 265]
    assert tokenizer.encode("<|reserved_token_300|>") == [300]
    assert tokenizer.decode([263, 259, 300], skip_special_tokens=True) == "hello"
    assert tokenizer.decode([0xE4]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.stop_ids == (265, 264)
    assert tokenizer.chat(MESSAGES) == "<|im_user|>hi<|im_end|>\n<|im_assistant|>"
    text = "x" * (2 * MAX_RUN + 3) + " " * (MAX_RUN + 1) + "é\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind, last", [("fast", 260), ("kimi", 518)])
def test_ids_beyond_the_tokenizers(kind, last, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    assert tokenizer.decode([last])
    for index in (last + 1, 10**6, -1, 1 << 40):
        with pytest.raises(InteropError, match=rf"^id {index} is none of the tokenizer's, which are 0 to {last}$"):
            tokenizer.decode([65, index])


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("你好world", ["你好", "world"]),
        ("HelloWorld isn't", ["Hello", "World", " isn't"]),
        ("HTTPServer 12345", ["HTTPServer", " ", "123", "45"]),
        ("a+=b;\n\n  c", ["a", "+=", "b", ";\n\n", " ", " c"]),
        ("x  \n y", ["x", "  \n", " y"]),
        ("ends   ", ["ends", "   "]),
        ("WE'RE", ["WE'RE"]),
    ],
)
def test_the_split_pattern(text, pieces):
    assert regex.findall(f"(?V1){KIMI_PATTERN}", text) == pieces


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tiktoken.model", "not base64", "is not lines of a base64 token and its rank"),
        ("tiktoken.model", "aGU= 7\n", "does not have each rank from 0 on once"),
        ("tiktoken.model", "", "does not have each rank from 0 on once"),
    ],
)
def test_damaged_files(file, content, message, tmp_path):
    with pytest.raises(InteropError, match="has neither"):
        load_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InteropError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "no chat template"),
        ("{% for %}", "cannot be applied"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be applied"),
        ("{{ messages.append(1) }}", "cannot be applied"),
        ("{{ '<' + none }}", "cannot be applied"),
        ("{{ 1 / 0 }}", "cannot be applied"),
    ],
)
def test_templates_that_fail_or_reach_out(template, message, fast):
    settings = {} if template is None else {"chat_template": [{"name": "default", "template": template}]}
    (fast / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InteropError, match=message):
        load_tokenizer(fast).chat(MESSAGES)


def test_what_hugging_faces_templates_may_say(fast):
    template = (
        "{% generation %}{{ {'é': 1} | tojson(ensure_ascii=True, indent=1) }}{%- endgeneration -%} {{ 'é' | tojson }}"
    )
    (fast / "chat_template.jinja").write_text(template)
    assert load_tokenizer(fast).chat(MESSAGES) == '{\n "\\u00e9": 1\n}"é"'
    (fast / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InteropError, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer(fast)
