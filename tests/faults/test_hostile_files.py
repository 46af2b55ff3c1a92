"""Files of models that lie or want to run code: no code runs, nothing outside of the folder is touched, one sentence.

Each damage is done to a whole model folder, and every script that opens one must refuse it: exit status 1, and one line
that names the file. Where a path in a file leads out of the folder, a valid file lies at its end. So a script that
follows the path succeeds, and the test fails.
"""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_checkpoint
import generate
import hellaswag_utils
import train
from checkpoints import save_checkpoint
from config import config_as_dict
from files import atomic_write
from hellaswag_utils import load_examples
from layouts import meta_params, weight_shapes
from model import ModelConfig, Transformer
from model_folders import best_in, find_checkpoint, load_weights, read_model, read_model_config, write_model
from run_folders import read_json
from tokenizer import Tokenizer

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=32, max_seq_len=32)
ROW = {"ctx": "the cat sat", "endings": ["on a mat", "in a hat", "by a bat", "at a vat"], "label": 1}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_FILES = ("config.json", "checkpoint.json", INDEX, "training_state/state.json", "tokenizer.json")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def marker(tmp_path, monkeypatch, no_syncs):
    """The file that every hostile pickle would make. It must not be there at the end of any test."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "code ran"
    assert not (tmp_path / "code ran").exists()


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """A model of another program, `model`; and a run, `run`, with the checkpoint of step 1."""
    root = tmp_path_factory.mktemp("templates")
    torch.manual_seed(0)
    weights = dict(Transformer(CONFIG).named_parameters())
    (root / "model").mkdir()
    write_model(root / "model", weights, CONFIG)
    run = {"model": config_as_dict(CONFIG), "dtype": "float32", "total_batch_size": 64}
    checkpoint = {"step": 1, "model": weights, "config": run, "best_val_loss": 2.5, "run_id": "a"}
    checkpoint["moments"] = {f"{name}:exp_avg": torch.zeros(1) for name in weights}
    save_checkpoint(root / "run/checkpoints", checkpoint, keep=1, is_best=True)
    (root / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    return root


@pytest.fixture
def model(templates, tmp_path) -> Path:
    return shutil.copytree(templates / "model", tmp_path / "model")


@pytest.fixture
def run_dir(templates, tmp_path) -> Path:
    return shutil.copytree(templates / "run", tmp_path / "run")


@pytest.fixture
def call(templates, tmp_path, monkeypatch, capsys):
    """A function that calls main() of a script on a folder in this process. Returns the status and the error lines."""

    def call(script: str, folder: Path) -> tuple[int, list[str]]:
        flags = {
            "generate": (generate, ["--checkpoint", folder, "--prompt", "a", "--max_new_tokens", 1]),
            "hellaswag_utils": (hellaswag_utils, ["--checkpoint", folder, "--data", templates / "rows.jsonl"]),
            "to-hf": (convert_checkpoint, ["to-hf", "--checkpoint", folder, "--out", tmp_path / "out"]),
            "to-meta": (convert_checkpoint, ["to-meta", "--checkpoint", folder, "--out", tmp_path / "out"]),
            "from-meta": (convert_checkpoint, ["from-meta", "--meta", folder, "--out", tmp_path / "out"]),
            "train": (
                train,
                ["--config", "sample", "--init_from", folder, "--device", "cpu", "--model.max_seq_len", 16],
            ),
        }
        module, arguments = flags[script]
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = module.main()
        return status, capsys.readouterr().err.splitlines()

    return call


SCRIPTS = ("generate", "hellaswag_utils", "to-hf", "to-meta")  # `train` takes a third of a second to read its flags
STATE_READERS = ("generate", "hellaswag_utils", "to-hf")


def assert_refused(call, scripts, folder: Path, name: str) -> None:
    """Each script refuses the folder in one line that names the file. It writes nothing."""
    for script in scripts:
        status, lines = call(script, folder)
        lines = [line for line in lines if "tokens/s" not in line]
        assert status == 1, script
        assert len(lines) == 1 and name in lines[0] and len(lines[0]) < 1000, (script, lines)
        assert ".py: " in lines[0]
    assert not (folder.parent / "out").exists()


# ---------------------------------------------------------------- code


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path, how: str = "open"):
        self.path, self.how = path, how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch '{self.path}'",)
        return open, (str(self.path), "w")


def zipped(path: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"norm.weight": Trap(path)}, file)
    return file.getvalue()


def legacy(path: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"norm.weight": Trap(path)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


PICKLES = {
    **{f"protocol {n}": lambda path, n=n: pickle.dumps(Trap(path), protocol=n) for n in (0, 2, 5)},
    "os.system": lambda path: pickle.dumps({"a": Trap(path, "system")}),
    "torch.save": zipped,
    "torch.save, before zip": legacy,
}


@pytest.mark.parametrize("kind", PICKLES)
def test_the_trap_springs_where_a_pickle_is_loaded(tmp_path, kind):
    """Without this the other tests would show nothing."""
    content = PICKLES[kind](tmp_path / "sprung")
    if kind.startswith("torch"):
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", INDEX, "tokenizer.json"])
def test_a_pickle_in_the_place_of_a_models_file_is_refused(model, marker, call, kind, name):
    (model / name).write_bytes(PICKLES[kind](marker))
    where = "config.json" if name == "tokenizer.json" else name  # which says that the tokenizer cannot be compared
    assert_refused(call, SCRIPTS, model, where)


@pytest.mark.parametrize("kind", ["protocol 0", "torch.save"])
def test_train_refuses_a_pickle_as_weights(model, marker, call, kind):
    (model / WEIGHTS).write_bytes(PICKLES[kind](marker))
    assert_refused(call, ["train"], model, WEIGHTS)


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_in_the_place_of_a_mark_or_a_state_is_refused(run_dir, marker, call, kind):
    path = run_dir / "checkpoints/step_00000001"
    content = PICKLES[kind](marker)
    (path / "training_state/state.json").write_bytes(content)
    assert_refused(call, STATE_READERS, run_dir, "state.json")
    (path / "checkpoint.json").write_bytes(content)
    assert_refused(call, SCRIPTS, run_dir, "checkpoint.json")


@pytest.mark.parametrize("kind", PICKLES)
def test_code_in_metas_file_is_not_run(tmp_path, marker, call, kind):
    write_meta(tmp_path / "meta")
    (tmp_path / "meta/consolidated.00.pth").write_bytes(PICKLES[kind](marker))
    assert_refused(call, ["from-meta"], tmp_path / "meta", "consolidated.00.pth: not weights of Meta")


# ---------------------------------------------------------------- safetensors


def tensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_TENSORS = {
    "empty": b"",
    "seven bytes": b"\1" * 7,
    "a header of 2**63 bytes": tensors({}, length=2**63),
    "a header of 2**64 - 1 bytes": tensors({}, length=2**64 - 1),
    "a header beyond the file": tensors({}, length=10**6),
    "a header of 100 MB": tensors({}, length=100_000_000),
    "no tensor": tensors({}),
    "a list": tensors([]),
    "not UTF-8": tensors(b"\xff\xfe{}"),
    "nested objects": tensors(b'{"a":' * 100_000),
    "nested lists": tensors(b'{"a":' + b"[" * 200_000),
    "not a number": tensors(b'{"a":NaN}'),
    "offsets that overlap": tensors({"a": entry(), "b": entry()}, bytes(16)),
    "offsets beyond the file": tensors({"a": entry(offsets=(0, 10**9))}, bytes(16)),
    "offsets of 2**64": tensors({"a": entry(offsets=(0, 2**64))}, bytes(16)),
    "a negative offset": tensors({"a": entry(offsets=(-16, 0))}, bytes(16)),
    "offsets in reverse": tensors({"a": entry(offsets=(16, 0))}, bytes(16)),
    "a shape of 2**80 numbers": tensors({"a": entry(shape=(2**40, 2**40))}, bytes(16)),
    "a negative shape": tensors({"a": entry(shape=(-2, -2))}, bytes(16)),
    "an unknown type": tensors({"a": entry(dtype="Q99")}, bytes(16)),
    "bytes that no tensor has": tensors({"a": entry()}, bytes(17)),
    "metadata of numbers": tensors({"__metadata__": {"a": 3}}),
    "an unknown name": tensors({"a": entry()}, bytes(16)),
    "a name of a megabyte": tensors({"a\n" * 2**19: entry()}, bytes(16)),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_weights_are_refused(model, call, kind):
    (model / WEIGHTS).write_bytes(BAD_TENSORS[kind])
    assert_refused(call, SCRIPTS, model, str(model))


@pytest.mark.parametrize("kind", ["a header of 2**63 bytes", "offsets that overlap", "an unknown name", "empty"])
def test_train_refuses_bad_weights_before_it_builds_a_model(model, call, kind):
    (model / WEIGHTS).write_bytes(BAD_TENSORS[kind])
    assert_refused(call, ["train"], model, f"init_from={model}")


def change_weight(folder: Path, name: str, change) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


WRONG_WEIGHTS = {
    "whole numbers": lambda w: w.to(torch.int32),
    "bytes": lambda w: w.to(torch.uint8),
    "truth values": lambda w: w > 0,
    "float8, which needs a scale": lambda w: w.to(torch.float8_e4m3fn),
    "another shape": lambda w: w[:-1],
    "another number of dimensions": lambda w: w[None],
    "turned": lambda w: w.flatten(),
    "no numbers": lambda w: w[:0],
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_a_weight_of_another_type_or_shape_is_refused(model, call, kind):
    change_weight(model, "model.layers.1.self_attn.k_proj.weight", WRONG_WEIGHTS[kind])
    assert_refused(call, SCRIPTS, model, str(model))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        load_weights(model, Transformer(CONFIG))


def test_the_shapes_that_are_compared_are_those_of_the_model():
    for tied in (False, True):
        config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": tied})
        model = {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
        assert weight_shapes(config) == model


# ---------------------------------------------------------------- JSON

DEEP = "[" * 900 + "]" * 900  # as deep as the parser goes: whoever prints it must not fail
BAD_JSON = {
    "empty": b"",
    "cut": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "NUL bytes": b"\0" * 100,
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "null": b"null",
    "a list": b"[]",
    "a text": b'"config"',
    "a number": b"3",
    "nested lists": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "nested lists, closed": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a key twice": b'{"weight_map": {}, "files": {}, "step": 1, "model": {"vocab": {}}, "step": 2}',
    "a key twice, inside": b'{"weight_map": {"a": "b", "a": "c"}, "files": {"a": {}, "a": {}}, "model": {"b":1,"b":2}}',
    "NaN": b'{"hidden_size": NaN, "format_version": NaN, "step": NaN}',
    "Infinity": b'{"hidden_size": Infinity, "format_version": Infinity, "step": -Infinity}',
    "1e999": b'{"hidden_size": 1e999, "format_version": 1e999, "step": 1e999}',
    "a million digits": b'{"hidden_size": ' + b"9" * 10**6 + b"}",
}
# read_state, in checkpoints.py, reads state.json with json.loads alone


@pytest.mark.parametrize("kind", BAD_JSON)
@pytest.mark.parametrize("name", JSON_FILES)
def test_bad_json_is_refused(model, run_dir, call, name, kind):
    folder = model if name in ("config.json", INDEX, "tokenizer.json") else run_dir / "checkpoints/step_00000001"
    (folder / name).write_bytes(BAD_JSON[kind])
    where = "config.json" if name == "tokenizer.json" else Path(name).name
    assert_refused(call, STATE_READERS if name.endswith("state.json") else SCRIPTS, folder, where)


# Of each field of config.json, the values that are no Llama 3. A text is JSON.
NO_WHOLE = ["null", "true", '"32"', "32.0", "[32]", "{}", "-1", "0", "9" * 400, "1e300", DEEP]
NO_NUMBER = ["null", "true", '"1e-5"', "[]", "{}", "-1", "0", "9" * 400, "1e300", DEEP]
BAD_FIELDS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), NO_WHOLE),
    "vocab_size": [*NO_WHOLE, "511", "128257"],
    "num_key_value_heads": [*NO_WHOLE[1:], "3"],
    "head_dim": ["true", '"8"', "[8]", "{}", "-1", "0", "9" * 400, DEEP],
    "max_position_embeddings": [*NO_WHOLE, str(10**12)],
    "rms_norm_eps": NO_NUMBER,
    "rope_theta": NO_NUMBER,
    "tie_word_embeddings": ["null", "0", '"false"', "[]", DEEP],
    "model_type": ["null", "3", "[]", '"mistral"', '"' + "x\\n" * 10**5 + '"', DEEP],
    "attention_bias": ["null", "1", '"no"', "{}"],
    "rope_scaling": ["3", "true", '"llama3"', "[1]", DEEP],
    "rope_parameters": ['{"rope_theta": "x"}', '{"rope_theta": null}', '{"rope_theta": ' + DEEP + "}"],
}
LLAMA_3 = '{"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0'
LLAMA_3 += ', "original_max_position_embeddings": 8192, "factor": %s}'
BAD_FIELDS["rope_scaling"] += [f'{{"rope_type": {kind}}}' for kind in ("[]", "3", "null", '"llama3"', '"yarn"', DEEP)]
BAD_FIELDS["rope_scaling"] += [LLAMA_3 % value for value in ("null", '"8"', "0", "-8", "1e300", "[]")]


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_each_field_of_config_json_is_checked(model, call, field):
    settings = json.loads((model / "config.json").read_text())
    for value in BAD_FIELDS[field]:
        text = json.dumps(settings | {field: "HERE"}).replace('"HERE"', value)
        (model / "config.json").write_text(text)
        with pytest.raises(ValueError) as error:
            read_model_config(model)
        message = str(error.value)
        assert message.startswith(str(model)) and len(message) < 1000 and "\n" not in message, (value[:50], message)
    assert_refused(call, SCRIPTS, model, str(model))


def test_layers_without_end_and_sizes_without_end_are_refused_at_once(model, call):
    """A model of this size must not be built before its weights are looked at."""
    settings = json.loads((model / "config.json").read_text())
    for fields in (
        {"num_hidden_layers": 2**24},
        {"hidden_size": 2**24, "head_dim": 2**22},
        {"intermediate_size": 2**16},
    ):
        (model / "config.json").write_text(json.dumps(settings | fields))
        assert_refused(call, [*SCRIPTS, "train"], model, "do not fit its configuration")
    (model / "config.json").write_text(json.dumps(settings | {"vocab_size": 128_256}))
    assert_refused(call, [*SCRIPTS, "train"], model, "another tokenizer")


def test_a_checkpoints_version_and_descriptions_are_checked(run_dir, call):
    file = run_dir / "checkpoints/step_00000001/checkpoint.json"
    whole = json.loads(file.read_text())
    files = whole["files"]
    about = files["model.safetensors"]
    for mark in (
        *({**whole, "format_version": version} for version in (None, "2", 3, [], {}, -1, [[[[]]]])),
        *({**whole, "files": described} for described in (None, [], {}, 3, "x", [["config.json", {}]])),
        *({**whole, "files": {**files, "model.safetensors": one}} for one in (None, [], 3, {}, "x")),
        *({**whole, "files": {**files, "model.safetensors": {**about, "size": size}}} for size in (-1, "3", None, [])),
        {**whole, "files": {**files, "model.safetensors": {**about, "sha256": [about["sha256"]]}}},
        {**whole, "files": {name: one for name, one in files.items() if name != "config.json"}},
        {**whole, "files": {name: one for name, one in files.items() if name != "model.safetensors"}},
    ):
        file.write_text(json.dumps(mark))
        assert_refused(call, SCRIPTS, run_dir, "step_00000001")
    file.write_text(json.dumps(whole))
    assert call("generate", run_dir)[0] == 0


BAD_STATES = {
    "no configuration": {"config": None},
    "a list for the configuration": {"config": []},
    "no dtype": {"config": {}},
    "an empty object": None,
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_state_without_its_fields_is_refused_or_not_needed(run_dir, call, kind):
    file = run_dir / "checkpoints/step_00000001/training_state/state.json"
    changes = BAD_STATES[kind]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes if changes else {"step": 3}))
    for script in ("generate", "hellaswag_utils"):
        status, lines = call(script, run_dir)
        assert status == 0 or "state.json" in lines[0]


@pytest.mark.parametrize("changes", [{"config": None}, {"step": "x"}, {"step": None}, {"best_val_loss": []}])
def test_the_model_card_takes_only_numbers(run_dir, call, changes):
    file = run_dir / "checkpoints/step_00000001/training_state/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert_refused(call, ["to-hf"], run_dir, "state.json")


@pytest.mark.parametrize("dtype", ["int8", "float64", 3, ["float32"], {"a": 1}])
def test_metas_layout_takes_only_known_types(model, call, dtype):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"torch_dtype": dtype}))
    assert_refused(call, ["to-meta"], model, "config.json: dtype is ")


# ---------------------------------------------------------------- Meta's layout


def write_meta(folder: Path, **params) -> dict:
    folder.mkdir()
    weights = {name: weight.detach().clone() for name, weight in Transformer(CONFIG).named_parameters()}
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(CONFIG) | params))
    return weights


def without(weights: dict, name: str) -> dict:
    return {key: weight for key, weight in weights.items() if key != name}


BAD_WEIGHTS = {
    "a list": lambda weights: [*weights.values()],
    "a number": lambda weights: 3,
    "nothing": lambda weights: {},
    "nothing but frequencies": lambda weights: {"rope.freqs": torch.zeros(4)},
    "no embeddings": lambda weights: without(weights, "tok_embeddings.weight"),
    "no norm": lambda weights: without(weights, "norm.weight"),
    "another layer": lambda weights: weights | {"layers.2.ffn_norm.weight": torch.ones(32)},
    "a number as a name": lambda weights: weights | {3: torch.ones(32)},
    "a number as a weight": lambda weights: weights | {"norm.weight": 3},
    "whole numbers": lambda weights: weights | {"norm.weight": torch.ones(32, dtype=torch.int32)},
    "several types": lambda weights: weights | {"norm.weight": torch.ones(32, dtype=torch.bfloat16)},
    "a sparse matrix": lambda weights: weights | {"output.weight": torch.zeros(512, 32).to_sparse()},
    "one number that is shown as a matrix": lambda weights: weights | {"output.weight": torch.zeros(1).expand(512, 32)},
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_other_things_than_metas_weights_are_refused(tmp_path, call, kind):
    weights = write_meta(tmp_path / "meta")
    torch.save(BAD_WEIGHTS[kind](weights), tmp_path / "meta/consolidated.00.pth")
    assert_refused(call, ["from-meta"], tmp_path / "meta", "consolidated.00.pth: ")


PTH_BYTES = {"empty": b"", "zip": b"PK\3\4" + bytes(100), "text": b"weights", "NUL bytes": bytes(1000)}


@pytest.mark.parametrize("kind", PTH_BYTES)
def test_other_files_than_metas_are_refused(tmp_path, call, kind):
    write_meta(tmp_path / "meta")
    (tmp_path / "meta/consolidated.00.pth").write_bytes(PTH_BYTES[kind])
    assert_refused(call, ["from-meta"], tmp_path / "meta", "consolidated.00.pth: not weights of Meta")


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_as_params_is_refused(tmp_path, call, kind):
    write_meta(tmp_path / "meta")
    (tmp_path / "meta/params.json").write_bytes(BAD_JSON[kind])
    assert_refused(call, ["from-meta"], tmp_path / "meta", "params.json: ")


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"])
def test_each_whole_number_of_params_is_checked(tmp_path, call, field):
    write_meta(tmp_path / "meta")
    params = json.loads((tmp_path / "meta/params.json").read_text())
    for value in NO_WHOLE:
        text = json.dumps(params | {field: "HERE"}).replace('"HERE"', value)
        (tmp_path / "meta/params.json").write_text(text)
        assert_refused(call, ["from-meta"], tmp_path / "meta", "params.json: ")
    (tmp_path / "meta/params.json").write_text(json.dumps(params | {field: 2**31 - 1}))
    assert_refused(call, ["from-meta"], tmp_path / "meta", str(tmp_path / "meta"))


@pytest.mark.parametrize("field", ["ffn_dim_multiplier", "norm_eps", "rope_theta"])
def test_each_number_of_params_is_checked(tmp_path, call, field):
    write_meta(tmp_path / "meta")
    params = json.loads((tmp_path / "meta/params.json").read_text())
    for value in NO_NUMBER[field == "ffn_dim_multiplier" :]:  # that one may be null
        text = json.dumps(params | {field: "HERE"}).replace('"HERE"', value)
        (tmp_path / "meta/params.json").write_text(text)
        assert_refused(call, ["from-meta"], tmp_path / "meta", "params.json: ")


# ---------------------------------------------------------------- paths in files


def outside_names(tmp_path: Path) -> list[str]:
    """Names for a file in tmp_path/outside, from the folder tmp_path/model; and others that are no plain names."""
    return [
        "../outside/model.safetensors",
        "./../outside/model.safetensors",
        "sub/../../outside/model.safetensors",
        str(tmp_path / "outside/model.safetensors"),
        f"/{tmp_path}/outside/model.safetensors",
        "..\\outside\\model.safetensors",
        "C:\\outside\\model.safetensors",
        "C:model.safetensors",
        "\\\\server\\share\\model.safetensors",
        "sub/model.safetensors",
        "model.safetensors/",
        "model.safetensors\0",
        "model.safetensors\n",
        "\ud800.safetensors",
        "..",
        ".",
        "",
    ]


@pytest.fixture
def outside(tmp_path, templates):
    """A folder beside the model with a valid copy of everything. No test may change it."""
    folder = shutil.copytree(templates / "model", tmp_path / "outside")
    shutil.copytree(templates / "run/checkpoints", folder / "checkpoints")

    def tree():
        return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}

    before = tree()
    yield folder
    assert tree() == before


def test_an_index_names_only_files_of_its_folder(model, outside, call, tmp_path):
    (model / "sub").mkdir()
    (model / WEIGHTS).rename(model / "sub" / WEIGHTS)
    names = load_file(outside / WEIGHTS).keys()
    for name in [*outside_names(tmp_path), None, 3, [], {}, True]:
        (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
        assert_refused(call, ["generate", "to-hf"], model, INDEX)
    assert_refused(call, [*SCRIPTS, "train"], model, INDEX)
    for places in (None, [], 3, "x", [["a", "b"]]):
        (model / INDEX).write_text(json.dumps({"weight_map": places}))
        assert_refused(call, ["generate"], model, INDEX)
    # A plain name of a file that is not there, or that lacks the weight, is refused by its own name.
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "missing.safetensors")}))
    assert_refused(call, [*SCRIPTS, "train"], model, "missing.safetensors: no such file")
    (model / "sub" / WEIGHTS).rename(model / "part.safetensors")
    change_names = {**dict.fromkeys(names, "part.safetensors")}
    (model / INDEX).write_text(json.dumps({"weight_map": change_names}))
    assert call("generate", model)[0] == 0
    save_file({"other": torch.zeros(1)}, model / "part.safetensors")
    assert_refused(call, [*SCRIPTS, "train"], model, "part.safetensors: damaged")


def test_a_checkpoints_mark_names_only_files_of_its_folder(run_dir, outside, call, tmp_path):
    file = run_dir / "checkpoints/step_00000001/checkpoint.json"
    whole = json.loads(file.read_text())
    for name in outside_names(tmp_path):
        if name == "sub/model.safetensors":  # a path into a folder below is one of this folder
            continue
        described = {**whole["files"], name: whole["files"]["model.safetensors"]}
        file.write_text(json.dumps({**whole, "files": described}))
        assert_refused(call, ["generate", "to-hf"], run_dir, "checkpoint.json")
    assert_refused(call, SCRIPTS, run_dir, "checkpoint.json")


def test_the_file_best_names_only_a_checkpoint_beside_it(run_dir, outside, call, tmp_path):
    best = run_dir / "checkpoints/best"
    assert find_checkpoint(best) == run_dir / "checkpoints/step_00000001"
    for name in (
        "../../outside/checkpoints/step_00000001",
        "step_1/../../../outside/checkpoints/step_00000001",
        str(outside / "checkpoints/step_00000001"),
        "..\\step_00000001",
        "C:step_00000001",
        "step_00000001\nstep_00000002",
        "another",
        "",
        ".",
        "\0",
        "step_" * 10**6,
    ):
        best.write_text(name)
        with pytest.raises(ValueError, match="best: does not name a checkpoint beside it"):
            best_in(run_dir / "checkpoints")
        assert_refused(call, ["generate", "to-hf"], best, "best: does not name")
    best.write_bytes(b"\xff\xfe\x80")
    assert_refused(call, SCRIPTS, best, "best: does not name")
    best.write_text("step_00000009\n")  # plain, but not there
    assert_refused(call, ["generate", "to-hf"], best, "step_00000009")


# ---------------------------------------------------------------- links, pipes, folders


def as_snapshot(model: Path, root: Path) -> Path:
    """The folder as the cache of the Hugging Face hub has it: links to ../../blobs."""
    snapshot = root / "models--a--b/snapshots/0123abc"
    (root / "models--a--b/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(root / f"models--a--b/blobs/{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read(model, tmp_path, call):
    expected, _ = read_model(model)
    snapshot = as_snapshot(model, tmp_path / "cache")
    for script in ("generate", "hellaswag_utils", "to-hf"):
        assert call(script, snapshot)[0] == 0
    model_config, _ = read_model_config(find_checkpoint(snapshot))  # what --init_from does
    bare = Transformer(model_config)
    load_weights(find_checkpoint(snapshot), bare)
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


def test_train_begins_with_a_snapshot_of_the_hubs_cache(model, tmp_path, call, monkeypatch):
    """The loop itself is left out: reading the configuration already looks at every name and shape in the folder."""
    snapshot = as_snapshot(model, tmp_path / "cache")
    monkeypatch.setattr(train, "run", lambda cfg, process, notes: cfg.model.dim)
    monkeypatch.setitem(train.CONFIGS, "sample", train.replace(train.SAMPLE, total_batch_size=256, batch_size=16))
    assert call("train", snapshot)[0] == CONFIG.dim


def test_a_link_to_a_checkpoint_and_links_in_it_are_read(run_dir, outside, tmp_path, call):
    (tmp_path / "link").symlink_to(run_dir / "checkpoints/step_00000001")
    assert call("generate", tmp_path / "link")[0] == 0
    path = run_dir / "checkpoints/step_00000001/model.safetensors"
    path.unlink()
    path.symlink_to(outside / "checkpoints/step_00000001/model.safetensors")
    assert call("generate", run_dir)[0] == 0
    path.unlink()
    path.symlink_to(outside / "missing")
    assert_refused(call, SCRIPTS, run_dir, "model.safetensors: missing or changed")
    path.unlink()
    path.symlink_to(path)  # a link to itself
    assert_refused(call, SCRIPTS, run_dir, "model.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", INDEX, "part.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused(model, call, name, kind):
    """Whoever opened the pipe for reading would wait for ever."""
    if name == "part.safetensors":
        (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(model / WEIGHTS), name)}))
    elif name == INDEX:
        (model / WEIGHTS).unlink()
    path = model / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    assert_refused(call, SCRIPTS, model, str(model))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json"])
def test_a_pipe_in_the_place_of_metas_file_is_refused(tmp_path, call, name):
    write_meta(tmp_path / "meta")
    (tmp_path / "meta" / name).unlink()
    os.mkfifo(tmp_path / "meta" / name)
    assert_refused(call, ["from-meta"], tmp_path / "meta", str(tmp_path / "meta"))


def save_next(run_dir: Path, step: int = 2) -> Path:
    model = dict(Transformer(CONFIG).named_parameters())
    run = {"model": config_as_dict(CONFIG), "dtype": "float32", "total_batch_size": 64}
    checkpoint = {"step": step, "model": model, "config": run, "best_val_loss": 2.0}
    return save_checkpoint(run_dir / "checkpoints", checkpoint, keep=1, is_best=True)


LINKS = {
    "what a killed save left": ".step_00000001.123.tmp",
    "the temporary folder of this save": f".step_00000002.{os.getpid()}.tmp",
    "an old checkpoint": "step_00000000",
    "the checkpoint that is to be written": "step_00000002",
    "the file best": "best",
}


@pytest.mark.parametrize("kind", LINKS)
def test_a_save_never_writes_or_deletes_through_a_link(run_dir, outside, kind):
    """The fixture compares the folder that the link leads to."""
    target = outside / "checkpoints/step_00000001"
    link = run_dir / "checkpoints" / LINKS[kind]
    link.unlink(missing_ok=True)
    link.symlink_to(target / "config.json" if kind == "the file best" else target)
    try:
        path = save_next(run_dir)
    except (OSError, ValueError):  # refusing is as good here; whether it should save is the next test's question
        return
    assert read_model(path)[0].config == CONFIG and not path.is_symlink()


@pytest.mark.parametrize("kind", LINKS)
def test_a_save_takes_links_out_of_its_way(run_dir, outside, kind):
    target = outside / "checkpoints/step_00000001"
    link = run_dir / "checkpoints" / LINKS[kind]
    link.unlink(missing_ok=True)
    link.symlink_to(target / "config.json" if kind == "the file best" else target)
    assert save_next(run_dir).is_dir()
    assert not link.is_symlink()


def test_a_conversion_writes_through_no_link(model, outside, tmp_path, call):
    (tmp_path / "out").symlink_to(outside)
    status, lines = call("to-hf", model)
    assert status == 1 and "exists already" in lines[0]
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")  # a link to nothing
    status, lines = call("to-hf", model)
    assert status == 1 and len(lines) == 1 and not (tmp_path / "nowhere").exists()
    (tmp_path / "out").unlink()
    (tmp_path / f".out.{os.getpid()}.tmp").symlink_to(outside)
    status, lines = call("to-hf", model)
    assert status == 1 and len(lines) == 1 and not (tmp_path / "out").exists()


def test_a_file_that_is_written_whole_goes_through_no_link(tmp_path, outside):
    (tmp_path / f".a.{os.getpid()}.tmp").symlink_to(outside / "new")
    with atomic_write(tmp_path / "a", "w") as file:
        file.write("text")
    escaped = (outside / "new").exists()
    (outside / "new").unlink(missing_ok=True)
    assert not escaped and (tmp_path / "a").read_text() == "text"


def test_a_report_leaves_out_lines_that_are_no_rows():
    for kind in ("empty", "cut", "null", "a list", "a number", "nested lists", "nested objects"):
        assert read_json(BAD_JSON[kind].decode()) == {}


# ---------------------------------------------------------------- the scripts as a user starts them

COMMANDS = {
    "generate.py": ("--prompt", "a", "--checkpoint"),
    "hellaswag_utils.py": ("--data", str(ROOT / "README.md"), "--checkpoint"),
    "convert_checkpoint.py": ("to-hf", "--out", "out", "--checkpoint"),
    "train.py": ("--config", "sample", "--device", "cpu", "--init_from"),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_ends_with_status_1_and_no_traceback(model, tmp_path, script):
    (model / "config.json").write_bytes(BAD_JSON["nested objects"])
    command = [sys.executable, str(ROOT / script), *COMMANDS[script], str(model)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "config.json: nested too deep" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# ---------------------------------------------------------------- the tree


LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def loads_of_code(source: str) -> set[str]:
    """What in a file can run code that stands in another file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword):
            flag = f"{node.arg}={ast.unparse(node.value)}"
            found |= {flag} & {"weights_only=False", "allow_pickle=True", "trust_remote_code=True"}
        elif isinstance(node, ast.ImportFrom) and node.module in LOADERS:
            found.add(f"from {node.module}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            reads = name.split(".")[0] in LOADERS and name.split(".")[-1] in ("load", "loads", "Unpickler", "open")
            if reads or name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "torch.jit.load", "torch.hub.load"):
                found.add(name)
            elif name == "torch.load":
                safe = any(ast.unparse(keyword) == "weights_only=True" for keyword in node.keywords)
                found.add("torch.load with weights_only=True" if safe else "torch.load")
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.load(x)", {"torch.load"}),
        ("torch.load(x, weights_only=False)", {"torch.load", "weights_only=False"}),
        ("torch.load(x, weights_only=safe)", {"torch.load"}),
        ("np.load(x, allow_pickle=True)", {"allow_pickle=True"}),
        ("pickle.load(x); dill.loads(y)", {"pickle.load", "dill.loads"}),
        ("from pickle import loads", {"from pickle"}),
        ("pickle.Unpickler(x)", {"pickle.Unpickler"}),
        ("np.load(x); pickle.dumps(y); json.load(z)", set()),
    ],
)
def test_what_would_be_found(source, expected):
    assert loads_of_code(source) == expected


def test_no_file_of_the_tree_loads_code():
    """Tests may make hostile files. The programs may not read them."""
    found = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        if what := loads_of_code(path.read_text(encoding="utf-8")):
            found[path.name] = what
    assert found == {
        "workers.py": {"pickle.loads"},  # from a pipe that nobody else holds
        "convert_checkpoint.py": {"torch.load with weights_only=True"},
    }


def test_the_rows_of_this_file_are_read(templates):
    """So a status of 1 of hellaswag_utils.py is never that of its data."""
    assert len(load_examples(templates / "rows.jsonl", Tokenizer(vocab_size=512))) == 1
