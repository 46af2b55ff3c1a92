"""Our folders in the programs of others: transformers' model and tokenizer, with the same numbers, ids and texts."""

import json
import random
from dataclasses import replace

import pytest
import torch
from test_tokenizer import STRINGS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from layouts import ffn_fields, from_hf, hf_config, hf_name, model_config, to_hf, tokenizer_files
from model import ModelConfig, Transformer
from model_folders import write_model
from model_utils import load_model
from tokenizer import Tokenizer

SMALL = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 600,
    "multiple_of": 32,
    "max_seq_len": 64,
}
SHAPES = {
    "gqa 1": ModelConfig(**SMALL | {"n_kv_heads": 8}),
    "gqa 2": ModelConfig(**SMALL | {"n_kv_heads": 4}),
    "gqa 4, tied": ModelConfig(**SMALL, tie_embeddings=True),
    "gqa 8, scaled": ModelConfig(**SMALL | {"n_kv_heads": 1, "rope_scale": 8.0, "norm_eps": 1e-6}),
    "4,096 ids": ModelConfig(**SMALL | {"vocab_size": 4096, "rope_theta": 10_000.0, "ffn_dim_multiplier": 1.3}),
    "128,256 ids, tied, scaled": ModelConfig(
        **SMALL | {"vocab_size": 128_256, "rope_scale": 32.0}, tie_embeddings=True
    ),
}


def same(config, other):
    """Whether two configurations describe one model. Several pairs of fields give the same feed-forward width."""
    pair = {"multiple_of": 1, "ffn_dim_multiplier": None}
    return config.ffn_dim == other.ffn_dim and replace(config, **pair) == replace(other, **pair)


def model_of(config):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 would hide a wrong place
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def written(folder, config):
    model = model_of(config)
    folder.mkdir()
    write_model(folder, dict(model.named_parameters()), config)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits_from_our_folder(tmp_path, name):
    config = SHAPES[name]
    model = written(tmp_path / "model", config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert type(theirs) is LlamaForCausalLM
    tokens = torch.randint(config.vocab_size, (2, 60))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_that_transformers_saves_computes_the_same_here(tmp_path, name):
    written(tmp_path / "ours", SHAPES[name])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "theirs")  # in the form of this version of transformers
    model, known = load_model(tmp_path / "theirs", "cpu")
    assert same(model.config, SHAPES[name]) and known == {"step": None, "dtype": "float32"}
    tokens = torch.randint(model.config.vocab_size, (2, 60))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    again = tmp_path / "again"
    again.mkdir()
    write_model(again, dict(model.named_parameters()), model.config)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_precision_are_read(tmp_path, dtype):
    config = SHAPES["gqa 2"]
    model = model_of(config)
    (tmp_path / "half").mkdir()
    write_model(tmp_path / "half", dict(model.named_parameters()), config, dtype)
    loaded, known = load_model(tmp_path / "half", "cpu")
    assert known["dtype"] == str(dtype).removeprefix("torch.")
    for (name, weight), ours in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, ours.to(dtype).float()), name


def test_a_large_model_is_written_in_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("model_folders.MAX_FILE_BYTES", 100_000)
    model = written(tmp_path / "model", SHAPES["gqa 2"])
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ours, _ = load_model(tmp_path / "model", "cpu")
    tokens = torch.randint(600, (2, 60))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
        assert torch.equal(ours(tokens), model(tokens))


def test_transformers_writes_our_greedy_text(tmp_path):
    from generate import generate

    config = SHAPES["4,096 ids"]
    model = written(tmp_path / "model", config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    inputs = tokenizer("def read_", return_tensors="pt")
    text = theirs.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)[0]
    ours = Tokenizer(vocab_size=4096)
    prompt = ours.encode("def read_", bos=True)
    assert inputs["input_ids"][0].tolist() == prompt
    [row] = generate(model, [prompt], max_new_tokens=30, temperature=0)
    assert text[len(prompt) :].tolist() == row


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_order_of_rows_and_back(heads):
    weight = torch.randn(heads * 8, 5)
    turned = to_hf("layers.3.attention.wq.weight", weight, 8)
    assert torch.equal(from_hf("layers.3.attention.wq.weight", turned, 8), weight)
    # transformers' convert_llama_weights_to_hf.py, from its text
    assert torch.equal(turned, weight.view(heads, 4, 2, 5).transpose(1, 2).reshape(heads * 8, 5))
    assert to_hf("layers.3.attention.wv.weight", weight, 8) is weight


def test_the_names_are_transformers(tmp_path):
    config = SHAPES["gqa 2"]
    theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in hf_config(config).items() if k != "architectures"}))
    ours = {hf_name(name): to_hf(name, weight, 8).shape for name, weight in Transformer(config).named_parameters()}
    assert ours == {name: weight.shape for name, weight in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "model.safetensors: damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: "),
        (lambda folder: change(folder, intermediate_size=128), "has the shape (192, 64), not (128, 64)"),
        (lambda folder: change(folder, num_hidden_layers=3), "its weights do not fit its configuration"),
        (lambda folder: change(folder, num_hidden_layers=1), "its weights do not fit its configuration"),
        (lambda folder: change(folder, tie_word_embeddings=True), None),
        (lambda folder: change(folder, model_type="mistral"), "model_type is 'mistral', not 'llama'"),
        (lambda folder: change(folder, hidden_act="gelu"), "hidden_act is 'gelu', not 'silu'"),
        (lambda folder: change(folder, attention_bias=True), "attention_bias is True, not False"),
        (lambda folder: change(folder, head_dim=16), "head_dim is 16, not hidden_size / num_attention_heads = 8"),
        (lambda folder: change(folder, vocab_size=32_000, hidden_size=None), "hidden_size is missing"),
        (lambda folder: change(folder, vocab_size=151_936), "vocab_size=151936: must be 512 to 128256"),
        (lambda folder: change(folder, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type is 'yarn'"),
        (lambda folder: change(folder, rope_scaling={"type": "linear", "factor": 2.0}), "rope_type is 'linear'"),
        (lambda folder: change(folder, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor is None"),
        (lambda folder: other_tokenizer(folder), "another tokenizer than Llama 3's"),
    ],
)
def test_a_folder_that_holds_no_llama_3_is_refused_with_the_reason(tmp_path, damage, sentence):
    written(tmp_path / "model", SHAPES["gqa 2"])
    damage(tmp_path / "model")
    if sentence is None:
        load_model(tmp_path / "model", "cpu")
        return
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "model", "cpu")
    assert str(error.value).startswith(str(tmp_path / "model"))
    assert sentence in str(error.value)


def change(folder, **fields):
    settings = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(settings))


def other_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["another"] = content["model"]["vocab"].pop("th")
    (folder / "tokenizer.json").write_text(json.dumps(content))


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_survives_the_way_out_and_back(name):
    settings = json.loads(json.dumps(hf_config(SHAPES[name])))
    assert same(model_config(settings), SHAPES[name])
    # transformers 5 writes rope_parameters instead of rope_theta and rope_scaling
    theirs = LlamaConfig(**settings).to_dict()
    assert same(model_config(theirs), SHAPES[name])


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "multiple_of", "multiplier"),
    [
        (4096, 14_336, 1024, 1.3),  # Llama 3 8B
        (8192, 28_672, 4096, 1.3),  # 70B
        (2048, 8192, 256, 1.5),  # 3.2 1B
        (3072, 8192, 256, None),  # 3.2 3B
    ],
)
def test_the_feed_forward_width_of_metas_models_gives_metas_fields(dim, ffn_dim, multiple_of, multiplier):
    assert ModelConfig(dim=dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier).ffn_dim == ffn_dim
    assert ModelConfig(dim=dim, **ffn_fields(dim, ffn_dim)).ffn_dim == ffn_dim


@pytest.mark.parametrize("dim", [2, 64, 100, 4096])
@pytest.mark.parametrize("ffn_dim", [1, 7, 100, 11_008, 99_991])
def test_any_feed_forward_width_can_be_said(dim, ffn_dim):
    assert ModelConfig(dim=dim, **ffn_fields(dim, ffn_dim)).ffn_dim == ffn_dim


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module", params=[512, 600, 4096, 128_256])
def tokenizers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(request.param, 1024).items():
        (folder / name).write_bytes(content)
    return Tokenizer(vocab_size=request.param), AutoTokenizer.from_pretrained(folder)


def test_the_ids_are_ours(tokenizers):
    ours, theirs = tokenizers
    draw = random.Random(0)
    alphabets = [
        "abc ",
        "the and of in ",
        "0123456789",
        " \n\t\r",
        "äöüéñ",
        "東京한국어",
        "🦙👩‍👩‍👧",
        "!?'\"#%()",
        "עברית",
    ]
    texts = [text for text in STRINGS if "<|" not in text]  # theirs makes control ids of such text
    texts += ["", " ", "don't WE'LL", "a\r\n\r\n b", "x" * 500, " " * 500, "<|begin_of_text", "\x00\x01", "e\u0301"]
    texts += ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 30))) for _ in range(1000)]
    texts += ["".join(draw.choice(draw.choice(alphabets)) for _ in range(draw.randint(1, 40))) for _ in range(1000)]
    for text in texts:
        assert theirs.encode(text) == ours.encode(text, bos=True), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert len(theirs) == theirs.vocab_size == ours.vocab_size or theirs.vocab_size == ours.vocab_size - 256
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for name, i in ours.special_tokens.items():
        assert theirs.convert_tokens_to_ids(name) == i
