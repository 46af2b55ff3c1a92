"""Meta's layout in and out, bit for bit; and the slim copy that other programs open."""

import json
import sys

import pytest
import torch
from test_layouts import SHAPES, model_of, same
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert_checkpoint
from checkpoints import save_checkpoint
from config import config_as_dict
from layouts import meta_params
from model_utils import load_model


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, args)])
    return convert_checkpoint.main()


def write_meta(folder, config, dtype):
    """Weights as Meta publishes them."""
    folder.mkdir()
    weights = {name: weight.to(dtype) for name, weight in model_of(config).state_dict().items()}
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(config)))
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_metas_weights_go_in_and_out_bit_for_bit(tmp_path, monkeypatch, capsys, name, dtype):
    config = SHAPES[name]
    weights = write_meta(tmp_path / "meta", config, dtype)
    flags = ["--rope_scale", config.rope_scale] if config.rope_scale > 1 else []
    flags += ["--max_seq_len", config.max_seq_len]
    assert main(monkeypatch, "from-meta", "--meta", tmp_path / "meta", "--out", tmp_path / "hf", *flags) == 0
    model, known = load_model(tmp_path / "hf", "cpu")
    assert same(model.config, config) and known["dtype"] == str(dtype).removeprefix("torch.")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(config.vocab_size, (2, 60))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    assert main(monkeypatch, "to-meta", "--checkpoint", tmp_path / "hf", "--out", tmp_path / "again") == 0
    again = torch.load(tmp_path / "again/consolidated.00.pth", weights_only=True)
    assert again.keys() == weights.keys()
    for key, weight in weights.items():
        assert again[key].dtype == dtype and torch.equal(again[key], weight), key
    params = json.loads((tmp_path / "again/params.json").read_text())
    assert params["use_scaled_rope"] == (config.rope_scale > 1)
    assert {k: params[k] for k in ("dim", "n_layers", "vocab_size")} == {
        k: getattr(config, k) for k in ("dim", "n_layers", "vocab_size")
    }


def test_the_slim_copy_is_the_model_without_the_run(tmp_path, monkeypatch, capsys):
    config = SHAPES["4,096 ids"]
    model = model_of(config)
    run = {"model": config_as_dict(config), "dtype": "float32", "total_batch_size": 512}
    checkpoint = {"step": 3, "model": model.state_dict(), "config": run, "best_val_loss": 2.5}
    checkpoint["moments"] = {"norm.weight:exp_avg": torch.ones(64)}
    save_checkpoint(tmp_path / "run/checkpoints", checkpoint, keep=1, is_best=True)
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        assert main(monkeypatch, "to-hf", "--checkpoint", tmp_path / "run", "--out", out, "--dtype", dtype) == 0
        assert not (out / "training_state").exists() and not (out / "checkpoint.json").exists()
        card = (out / "README.md").read_text()
        assert "Trained for 3 steps of 512 tokens: 1,536 tokens." in card and "loss: 2.5000 nats" in card
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert str(theirs.dtype) == f"torch.{dtype}"
        for ours, weight in zip(load_model(out, "cpu")[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, weight.to(getattr(torch, dtype)).float())
        assert AutoTokenizer.from_pretrained(out)("Hi")["input_ids"][0] == 4096 - 256


def two_files(folder):
    torch.save({}, folder / "consolidated.01.pth")


def no_files(folder):
    (folder / "consolidated.00.pth").unlink()


def garbage(folder):
    (folder / "consolidated.00.pth").write_bytes(b"PK" + b"x" * 100)


def another_width(folder):
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"dim": 128}))


def no_params(folder):
    (folder / "params.json").unlink()


def wrong_vocabulary(folder):
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (two_files, "2 files consolidated.*.pth; a model that Meta has divided"),
        (no_files, "no consolidated.00.pth"),
        (garbage, "consolidated.00.pth: not weights of Meta"),
        (another_width, "does not fit params.json: "),
        (no_params, "params.json: cannot be read"),
        (wrong_vocabulary, "vocab_size=-1: must be 1 to "),
        (lambda folder: None, "pass --rope_scale 8 for Llama 3.1, or 32 for Llama 3.2"),
    ],
)
def test_what_is_not_metas_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, damage, sentence):
    write_meta(tmp_path / "meta", SHAPES["gqa 8, scaled"], torch.float32)
    damage(tmp_path / "meta")
    flags = [] if "rope_scale" in sentence else ["--rope_scale", 8]
    assert main(monkeypatch, "from-meta", "--meta", tmp_path / "meta", "--out", tmp_path / "out", *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert_checkpoint.py: ") and sentence in line
    assert not (tmp_path / "out").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_metas_file_is_not_run(tmp_path, monkeypatch, capsys):
    write_meta(tmp_path / "meta", SHAPES["gqa 2"], torch.float32)
    torch.save({"norm.weight": Trap(tmp_path / "sprung")}, tmp_path / "meta/consolidated.00.pth")
    assert main(monkeypatch, "from-meta", "--meta", tmp_path / "meta", "--out", tmp_path / "out") == 1
    assert "not weights of Meta" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    assert main(monkeypatch, "to-hf", "--checkpoint", tmp_path, "--out", tmp_path / "out") == 1
    assert "exists already; choose another" in capsys.readouterr().err
