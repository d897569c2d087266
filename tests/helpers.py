"""What many tests need: tiny Llama-like checkpoints of a few KB, and safetensors files that are wrong on purpose.

Imported as `from helpers import tiny_checkpoint`. Nothing here is slow: only `real_llama` imports transformers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.checkpoint.header import dtype_code, torch_dtype, torch_name

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def words(count: int) -> list[str]:
    """`count` different tokens, the four special ones first."""
    return [*SPECIAL, *(f"w{i}" for i in range(max(0, count - len(SPECIAL))))][:count]


def tiny_config(
    *, vocab: int = 40, hidden: int = 16, layers: int = 2, tied: bool = False, dtype: str = "float32", **more: Any
) -> dict[str, Any]:
    """`config.json` of a Llama with two heads and one key-value head."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": hidden // 2, "hidden_act": "silu", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3, "use_cache": True,
        "dtype": torch_name(dtype_code(dtype)),
    } | more  # fmt: skip


def tiny_tensors(config: dict[str, Any], *, seed: int = 0, std: float = 0.05) -> dict[str, Tensor]:
    """Random float32 weights for `config`, named as transformers names them (no `lm_head` when tied)."""
    hidden, inner, half = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (half, hidden),
            f"{at}self_attn.v_proj.weight": (half, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    generator = torch.Generator().manual_seed(seed)
    noise = {name: std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + t if "norm" in name else t for name, t in noise.items()}


def tiny_tokenizer(folder: str | Path, tokens: Sequence[str], *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Writes a word-level tokenizer whose token `i` is `tokens[i]`; special tokens are those of `SPECIAL` in it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = [t for t in SPECIAL if t in tokens]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": list(tokens).index(t), "content": t} | flags for t in present],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "<unk>"},
    }  # fmt: skip
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {k: v for k, v in roles.items() if v in tokens}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def save_checkpoint(
    folder: str | Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, *, sharded: bool | int = False
) -> Path:
    """Writes `tensors` with the safetensors library (not with ours), in `sharded` files (True: 3) with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = 3 if sharded is True else int(sharded)
    names = list(tensors)
    if count <= 1:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {
            n: f"model-{i * count // len(names) + 1:05}-of-{count:05}.safetensors" for i, n in enumerate(names)
        }
        for file in dict.fromkeys(weight_map.values()):
            part = {n: tensors[n].contiguous() for n in names if weight_map[n] == file}
            save_file(part, folder / file, {"format": "pt"})
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


def tiny_checkpoint(
    folder: str | Path,
    seed: int = 0,
    *,
    dtype: str = "float32",
    sharded: bool | int = False,
    tied: bool = False,
    near: str | Path | None = None,
    delta: float = 0.01,
    vocab: int = 40,
    tokens: Sequence[str] | None = None,
    **config: Any,
) -> Path:
    """A loadable Llama of about 10 KB with config, generation config, tokenizer and chat template; returns `folder`.

    `near` names another such folder: the weights are then its weights plus noise of size `delta`, a fine-tuning.
    """
    folder = Path(folder)
    tokens = words(vocab) if tokens is None else list(tokens)
    settings = tiny_config(vocab=len(tokens), tied=tied, dtype=dtype, **config)
    tensors = tiny_tensors(settings, seed=seed)
    if near is not None:
        noise = {n: delta / 0.05 * (t - 1 if "norm" in n else t) for n, t in tensors.items()}
        tensors = {n: t.float() + noise[n] for n, t in load_state(near).items()}
    save_checkpoint(
        folder, {n: t.to(torch_dtype(dtype_code(dtype))) for n, t in tensors.items()}, settings, sharded=sharded
    )
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3})
    tiny_tokenizer(folder, tokens)
    return folder


def tiny_family(
    folder: str | Path, tuned: int = 2, *, dtype: str = "float32", delta: float = 0.01, **more: Any
) -> tuple[Path, list[Path]]:
    """A base and `tuned` fine-tunings of it: `folder/base`, `folder/tuned0`, ..."""
    base = tiny_checkpoint(Path(folder) / "base", dtype=dtype, **more)
    members = range(tuned)
    return base, [
        tiny_checkpoint(Path(folder) / f"tuned{i}", seed=i + 1, dtype=dtype, near=base, delta=delta, **more)
        for i in members
    ]


def real_llama(folder: str | Path, seed: int = 0, *, dtype: str = "float32", tied: bool = False, **config: Any) -> Path:
    """The same model made and saved by transformers itself (about a second: it imports transformers)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = tiny_config(tied=tied, dtype=dtype, **config)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in settings.items() if k != "dtype"}))
    model.to(torch_dtype(dtype_code(dtype))).save_pretrained(folder)
    tiny_tokenizer(folder, words(settings["vocab_size"]))
    return Path(folder)


def load_state(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a folder or file, read with the safetensors library (not with ours)."""
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, types, shapes and bytes (NaN equals the same NaN)."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and a[n].contiguous().view(-1).view(torch.uint8).equal(b[n].contiguous().view(-1).view(torch.uint8))
        for n in a
    )


def raw_safetensors(
    path: str | Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> Path:
    """A safetensors file that says what it is told to: any `header`, any `length` claimed for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def write_json(path: str | Path, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))
