"""Chat templates by name, rendered by transformers; and which one most models have."""

import pytest
from helpers import tiny_tokenizer, words, write_json

from surgery.checkpoint.chat_templates import TEMPLATES, commonest, template_of

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
ALPACA = "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye"
CHATML = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
LLAMA3 = "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in MESSAGES)
EXPECTED = {
    "alpaca": (ALPACA, "\n\n### Response:\n"),
    "chatml": (CHATML, "<|im_start|>assistant\n"),
    "exaone": (
        "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n",
        "[|assistant|]",
    ),
    "llama3": ("<s>" + LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": ("<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]", ""),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), words(8)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered(name, tokenizer):
    text, prompt = EXPECTED[name]
    how = {"chat_template": TEMPLATES[name], "tokenize": False}
    assert tokenizer.apply_chat_template(MESSAGES, **how) == text
    assert tokenizer.apply_chat_template(MESSAGES, **how, add_generation_prompt=True) == text + prompt


def test_first_messages(tokenizer):
    def told(name, messages):
        return tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False)

    assert told("exaone", MESSAGES[1:2]) == "[|system|][|endofturn|]\n[|user|]Hi\n"
    assert told("mistral", MESSAGES[1:3]) == "<s>[INST] Hi [/INST] Hello</s>"
    assert told("alpaca", [MESSAGES[1], {"role": "user_context", "content": "x"}]).endswith("\n\n### Input:\nx")
    with pytest.raises(Exception, match="take turns"):
        told("mistral", MESSAGES[2:])


def test_where_templates_are_found(tmp_path):
    assert template_of(tmp_path) is None
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "in config"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": several})
    assert template_of(tmp_path) == "in config"
    write_json(tmp_path / "chat_template.json", {"chat_template": "in json"})
    assert template_of(tmp_path) == "in json"
    (tmp_path / "chat_template.jinja").write_text("in jinja")
    assert template_of(tmp_path) == "in jinja"


def test_the_commonest(tmp_path):
    folders = [tiny_tokenizer(tmp_path / str(i), words(8), chat_template=t) for i, t in enumerate("abb")]
    assert commonest(folders) == "b" and commonest(folders[:2]) == "a"
    assert commonest([tiny_tokenizer(tmp_path / "none", words(8), chat_template=None)]) is None
