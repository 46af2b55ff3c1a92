"""Llama 3 in the terms of other programs: names and order of weights, configuration, tokenizer.

Two layouts exist. Meta's is ours in memory. Hugging Face's is ours on the disk. They have other names for the weights,
and other orders for the rows of the query and key matrices. Meta rotates the pairs (0, 1), (2, 3), ... of a head.
Hugging Face rotates the pairs (0, K/2), (1, K/2 + 1), ... So the two rows of a pair stand side by side in Meta's
layout, and half a head apart in Hugging Face's. References: transformers' `convert_llama_weights_to_hf.py` and
`modeling_llama.py`, and llama-models' `model.py`.

Shape letters: D model width, H heads of the matrix (query or key/value heads), K width of a head, V vocabulary.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from json_files import parse_object, shown
from model import ModelConfig, model_errors
from tokenizer import NUM_SPECIAL_TOKENS, SPLIT_PATTERN, VOCAB_SIZES, Tokenizer

TOP_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ROTATED = ("attention.wq.weight", "attention.wk.weight")  # the rows of these are in another order
ROPE_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # Llama 3.1's

MOST = {"max_seq_len": 2**23}  # of a number in a file; the tables of the positions would fill the memory
MOST_WHOLE, MOST_NUMBER = 2**31 - 1, 1e30  # of any other: no arithmetic overflows below


# ---------------------------------------------------------------- weights


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our weights."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[part.removesuffix('.weight')]}.weight"


def to_hf(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """One of our weights with its rows in Hugging Face's order."""
    if not name.endswith(ROTATED):
        return weight
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (H, K/2, 2, D)
    return pairs.transpose(1, 2).reshape(weight.shape)


def from_hf(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_hf`. `name` is our name of the weight."""
    if not name.endswith(ROTATED):
        return weight
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))  # (H, 2, K/2, D)
    return halves.transpose(1, 2).reshape(weight.shape)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of a model, by our names. With tied embeddings there is no output layer."""
    dim, ffn_dim, kv_dim = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    block = dict.fromkeys(("attention.wq", "attention.wo"), (dim, dim))
    block |= dict.fromkeys(("attention.wk", "attention.wv"), (kv_dim, dim))
    block |= {"feed_forward.w1": (ffn_dim, dim), "feed_forward.w3": (ffn_dim, dim), "feed_forward.w2": (dim, ffn_dim)}
    block |= dict.fromkeys(("attention_norm", "ffn_norm"), (dim,))
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim), "norm.weight": (dim,)}
    if not config.tie_embeddings:
        shapes["output.weight"] = (config.vocab_size, dim)
    return shapes | {f"layers.{i}.{name}.weight": block[name] for i in range(config.n_layers) for name in BLOCK_NAMES}


def check_shapes(found: dict[str, tuple[int, ...]], config: ModelConfig, name_of: Callable[[str], str] = str) -> None:
    """Compare the shapes of weights with those that a configuration asks for. No model is built.

    Args:
        name_of: turns our name of a weight into the name that `found` has for it.

    Raises:
        ValueError: a weight is missing, unknown, or has another shape. The message names it.
    """
    if config.n_layers * len(BLOCK_NAMES) > len(found):  # before a configuration asks for billions of layers
        raise ValueError(f"it asks for {config.n_layers} layers, and there are {len(found)} weights")
    expected = {name_of(name): shape for name, shape in weight_shapes(config).items()}
    if wrong := sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"{shown(wrong[0])} is missing or unknown")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{name} has the shape {found[name]}, not {shape}")


# ---------------------------------------------------------------- configuration


def checked_config(values: dict[str, Any]) -> ModelConfig:
    """The model that values from a file describe.

    Raises:
        ValueError: a value has another type than the field of this name, or is out of range. The message names both.
    """
    fields, wrong = {}, []
    for field in dataclasses.fields(ModelConfig):
        value, default = values.get(field.name, field.default), field.default
        if isinstance(default, bool):
            right, kind = isinstance(value, bool), "True or False"
        elif isinstance(default, int):
            most = MOST.get(field.name, MOST_WHOLE)
            right, kind = type(value) is int and abs(value) <= most, f"a whole number of at most {most:,}"
        else:
            number = type(value) in (int, float) and abs(value) <= MOST_NUMBER  # False for NaN
            right, kind = number or value is default is None, "a number"
            value = float(value) if number else value
        if not right:
            wrong.append(f"{field.name}={shown(value)}: must be {kind}")
        fields[field.name] = value
    if not wrong:
        config = ModelConfig(**fields)
        wrong = model_errors(config)
    if not wrong and config.vocab_size not in VOCAB_SIZES:
        wrong.append(f"vocab_size={config.vocab_size}: must be {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return config


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of Hugging Face's LlamaForCausalLM."""
    bos_id = config.vocab_size - NUM_SPECIAL_TOKENS
    scaling = {"rope_type": "llama3", "factor": config.rope_scale, **ROPE_SCALING} if config.rope_scale > 1 else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id + 1,
        "torch_dtype": "float32",
    }


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The model that a `config.json` of Hugging Face describes. The inverse of `hf_config`.

    Raises:
        ValueError: it is not a Llama 3. The message names the field.
    """
    rope = {"rope_type": "default"}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"not a Llama 3 ({name} is {shown(config[name])}, not an object)")
        rope |= config.get(name) or {}
    rope_type = rope.get("type", rope["rope_type"]) if rope["rope_type"] == "default" else rope["rope_type"]
    heads, dim = config.get("num_attention_heads"), config.get("hidden_size")
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    wrong = [
        f"{name} is missing" if value is None else f"{name} is {shown(value)}, not a whole number from 1"
        for name, value in {name: config.get(name) for name in required}.items()
        if type(value) is not int or not 1 <= value <= MOST_WHOLE
    ]
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    wrong += [
        f"{name} is {shown(config[name])}, not {due!r}"
        for name, due in expected.items()
        if config.get(name, due) != due
    ]
    if rope_type not in ("default", "llama3"):
        wrong.append(f"rope_type is {shown(rope_type)}, not 'default' or 'llama3'")
    if rope_type == "llama3":
        wrong += [
            f"{name} is {shown(rope.get(name))}, not {due}"
            for name, due in ROPE_SCALING.items()
            if rope.get(name) != due
        ]
    if not wrong and config.get("head_dim") not in (None, dim // heads):
        wrong.append(f"head_dim is {shown(config['head_dim'])}, not hidden_size / num_attention_heads = {dim // heads}")
    if wrong:
        raise ValueError(f"not a Llama 3 ({'; '.join(wrong)})")
    kv_heads = config.get("num_key_value_heads")
    values = {
        "dim": dim,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "vocab_size": config["vocab_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "rope_scale": rope.get("factor") if rope_type == "llama3" else 1.0,
        "max_seq_len": config.get("max_position_embeddings", 2048),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    return checked_config(values | ffn_fields(dim, config["intermediate_size"]))


def ffn_fields(dim: int, ffn_dim: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that give this feed-forward width. Those of Meta's models come first."""
    for multiple_of in (256, 1024, 4096, 64, 32, 1):
        for multiplier in (None, 1.0, 1.3, 1.5):
            fields = {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
            if ModelConfig(dim=dim, **fields).ffn_dim == ffn_dim:
                return fields
    return {"multiple_of": 1, "ffn_dim_multiplier": (ffn_dim + 0.5) / int(8 * dim / 3)}


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """`params.json` of Meta's layout. It says only whether the positions are scaled, not by how much."""
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "ffn_dim_multiplier": config.ffn_dim_multiplier,
        "multiple_of": config.multiple_of,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scale > 1,
    }


# ---------------------------------------------------------------- tokenizer


@lru_cache(maxsize=2)
def tokenizer_files(vocab_size: int, max_seq_len: int) -> dict[str, bytes]:
    """`tokenizer.json` and its configuration for Hugging Face's tokenizers, with the ids of `Tokenizer`.

    Tiktoken's file has the tokens in the order of their merges, but not the merges. Every way to split a token into two
    tokens is a merge. `ignore_merges` takes a word that is a token as it stands: without it the ids would differ.
    """
    tokenizer = Tokenizer(vocab_size=vocab_size)
    tokens = [_visible(token) for token in tokenizer._text_tokens]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], f"{a} {b}") for a, b in splits if a in ranks and b in ranks]
        merges += [merge for _, _, merge in sorted(known)]
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    first = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": first, "pair": first + second}
    template["special_tokens"] = {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | flags for name, i in tokenizer.special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, template]},
        "decoder": byte_level,
        "model": model | {"vocab": ranks, "merges": merges},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_seq_len,
    }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }


@lru_cache(maxsize=1)
def _byte_characters() -> list[str]:
    """A visible character for each byte, as GPT-2's `bytes_to_unicode` has them: itself, or one above 255."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _visible(token: bytes) -> str:
    return "".join(map(_byte_characters().__getitem__, token))


def check_tokenizer(content: bytes, vocab_size: int) -> None:
    """Raises ValueError unless a `tokenizer.json` has the tokens of Llama 3's first `vocab_size` ids."""
    tokens = [_visible(token) for token in Tokenizer(vocab_size=vocab_size)._text_tokens]
    try:
        vocab = parse_object(content)["model"]["vocab"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError("not a tokenizer that can be compared with Llama 3's") from error
    if vocab != {token: rank for rank, token in enumerate(tokens)}:
        raise ValueError("another tokenizer than Llama 3's, so the ids mean other texts")


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
