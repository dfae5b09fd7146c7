"""adapter_config.py: damaged or foreign adapters are named; a local base is found and recognised."""

import json
import math
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from chains import make_adapter, make_chain
from safetensors.numpy import load_file, save_file

from expander import model as models
from expander.adapter_config import ADAPTER_CONFIG, read_adapter_config
from expander.base_config import ModelError
from expander.model import read_chain


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project: models/qwen3 and a chain over it in outputs. Read only."""
    root = tmp_path_factory.mktemp("project")
    make_chain(root / "outputs", tiny.make_qwen3(root / "models" / "qwen3", layers=1))
    return root


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    """A copy whose adapters name their base relative to the project, which is the working folder."""
    root = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(root)
    for folder in ("outputs/sft", "outputs/grpo/sft"):
        record = json.loads((root / folder / ADAPTER_CONFIG).read_text())
        chain = read_chain(str(root / "models" / "qwen3"))
        chain = models.Chain("models/qwen3", "models/qwen3", chain.path)
        edit(root / folder, **record | chain.base_entries(root / folder))
    return root


def edit(folder: Path, *missing: str, **changes: object) -> Path:
    return tiny.configure(folder, *missing, file=ADAPTER_CONFIG, **changes)


def refused(folder: Path | str, match: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        models.load_chain(read_chain(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Where the base is


def test_the_record_of_a_local_base(project):
    record = json.loads((project / "outputs/grpo/sft" / ADAPTER_CONFIG).read_text())
    assert record["model"] == "models/qwen3" and record["revision"] is None
    base = record["base"]
    assert base["path"] == str(project / "models/qwen3")
    assert base["relative"] == "../../../models/qwen3"
    assert base["name"] == "models/qwen3"
    assert base["settings"]["model_type"] == "qwen3" and base["settings"]["rope_theta"] == 1e6
    assert base["tokenizer"] == models.digest(project / "models/qwen3/tokenizer.json")
    assert base["weights"] == read_chain("models/qwen3").base_hashes()


def test_the_base_is_found_from_any_folder(project, tmp_path, monkeypatch):
    base = project / "models" / "qwen3"
    tiny.make_qwen3(tmp_path / "elsewhere" / "models" / "qwen3", layers=1, seed=9)  # a stranger's
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in ("outputs/sft", "outputs/grpo"):
        assert read_chain(str(project / folder)).path == base
        assert read_chain(os.path.relpath(project / folder)).path == base
    assert read_chain(str(project / "outputs" / "grpo")).base == "models/qwen3"


def test_the_base_is_found_after_either_has_moved(project, tmp_path):
    shutil.copytree(project / "outputs" / "grpo", tmp_path / "deep" / "er" / "grpo")
    moved = read_chain(str(tmp_path / "deep" / "er" / "grpo"))
    assert moved.path == project / "models" / "qwen3"
    project.rename(tmp_path / "renamed")
    moved = read_chain(str(tmp_path / "renamed" / "outputs" / "sft"))
    assert moved.path == tmp_path / "renamed" / "models" / "qwen3"


@pytest.mark.parametrize("recorded", [True, False])
def test_a_local_base_is_never_looked_up_on_the_hub(project, monkeypatch, recorded):
    def download(*_, **__):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(models.huggingface_hub, "snapshot_download", download)
    if not recorded:  # an adapter of an earlier version
        edit(project / "outputs" / "sft", "base")
    (project / "models").rename(project / "old")
    message = refused("outputs/sft", "base models/qwen3 was a .*folder.*not found")
    assert ADAPTER_CONFIG in message and (str(project) in message or not recorded)
    edit(project / "outputs" / "sft", model="old/qwen3")
    assert read_chain("outputs/sft").path == Path("old/qwen3")


def test_an_adapter_without_the_record_still_loads(project):
    edit(project / "outputs" / "sft", "base")
    chain = read_chain("outputs/sft")
    assert chain.path == Path("models/qwen3") and chain.revision is None
    models.load_chain(chain)
    models.copy_adapters(chain, project / "copy")
    assert read_adapter_config(project / "copy")["base"]["relative"] == "../models/qwen3"


def test_a_base_from_the_hub_is_not_a_local_folder_of_that_name(project, monkeypatch):
    asked = []

    def download(name, revision, **_):
        asked.append((name, revision))
        return project / "cache" / "snapshots" / "abc"

    monkeypatch.setattr(models.huggingface_hub, "snapshot_download", download)
    edit(project / "outputs" / "sft", "base", revision="abc")
    chain = read_chain("outputs/sft")
    assert asked == [("models/qwen3", "abc")]
    assert chain.path.name == chain.revision == "abc" and chain.base_hashes() == {}


def test_an_adapter_of_mlx_lm_pins_the_commit_it_was_found_at(project, monkeypatch):
    """Its record has no revision."""
    snapshot = project / "cache" / "snapshots" / "abc"
    monkeypatch.setattr(models.huggingface_hub, "snapshot_download", lambda *_, **__: snapshot)
    edit(project / "outputs" / "sft", "base", "revision", model="owner/base")
    assert read_chain("outputs/sft").revision == "abc"


# Which base it is


def test_a_swapped_base_is_refused(project):
    path = project / "models" / "qwen3" / "model.safetensors"
    expected = models.digest(path)[:12]
    tiny.make_qwen3(project / "models" / "qwen3", layers=1, seed=1)
    for folder in ("outputs/sft", "outputs/grpo"):
        message = refused(folder, "is not the base model that")
        assert f"{models.digest(path)[:12]}, expected {expected}" in message
    assert "models/qwen3 is not the base" in message


def test_a_base_with_other_files_is_refused(project):
    path = project / "models" / "qwen3" / "model.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, path.with_name("model-2.safetensors"))
    refused("outputs/sft", "it also has model-2.safetensors")
    path.unlink()
    refused("outputs/sft", "it has no model.safetensors")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 10000}, "rope_theta in config.json is 10000, expected 1000000"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        (
            {"num_attention_heads": 2, "head_dim": 32, "num_key_value_heads": 1},
            "num_attention_heads",
        ),
    ],
)
def test_the_same_weights_with_other_settings_are_another_base(project, changes, named):
    base = tiny.configure(project / "models" / "qwen3", **changes)
    if "head_dim" in changes:  # or the head norms would show it
        weights = dict(mx.load(str(base / "model.safetensors")))
        for name in [name for name in weights if "self_attn" in name and "_norm" in name]:
            weights[name] = mx.concatenate([weights[name]] * 2)
        mx.save_safetensors(str(base / "model.safetensors"), weights)
        for folder in ("outputs/sft", "outputs/grpo/sft"):
            record = read_adapter_config(project / folder)["base"]
            edit(project / folder, base=record | {"weights": read_chain(str(base)).base_hashes()})
    refused("outputs/grpo", f"qwen3 is not the base model that .*: {named}")


def test_a_setting_that_has_only_moved_is_the_same(project):
    rope = {"rope_theta": 1000000.0, "rope_type": "default"}
    base = project / "models" / "qwen3"
    tiny.configure(base, "rope_theta", "rope_scaling", rope_parameters=rope)
    models.load_chain(read_chain("outputs/grpo"))


def test_another_tokenizer_is_another_base(project):
    tiny.configure(project / "models" / "qwen3", file="tokenizer.json", version="1.1")
    refused("outputs/sft", "tokenizer.json has SHA-256")
    (project / "models" / "qwen3" / "tokenizer.json").unlink()
    refused("outputs/sft", "it has no tokenizer.json")


def test_hidden_files_in_a_base_do_not_matter(project):
    for name in ("._model.safetensors", ".DS_Store", "._config.json"):
        (project / "models" / "qwen3" / name).write_bytes(b"\0\5\26\7")
        (project / "outputs" / "sft" / name).write_bytes(b"\0\5\26\7")
    models.load_chain(read_chain("outputs/sft"))


# Damaged and foreign adapters


@pytest.mark.parametrize("parent", [".", "../grpo", "sft/..", "loop", "sft/../../grpo/sft/.."])
def test_an_adapter_above_itself_is_refused(project, parent):
    (project / "outputs" / "grpo" / "loop").symlink_to(project / "outputs" / "grpo")
    edit(project / "outputs" / "grpo", parent=parent)
    refused("outputs/grpo", rf"grpo/{ADAPTER_CONFIG}: parent .* leads back to")


def test_two_adapters_above_each_other_are_refused(project):
    edit(project / "outputs" / "grpo" / "sft", parent="..")
    refused("outputs/grpo", "leads back to")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, "num_layers is missing"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_layers": "all"}, "num_layers is 'all'"),
        ({"lora_parameters": None}, "lora_parameters is missing"),
        ({"lora_parameters": []}, "lora_parameters is"),
        ({"model": 5}, "model is 5"),
        ({"model": ""}, "model is ''"),
        ({"revision": 5}, "revision is 5"),
        ({"quantize_bits": 7}, "quantize_bits is 7"),
        ({"quantize_bits": "4"}, "quantize_bits is '4'"),
        ({"quantize_bits": True}, "quantize_bits is True"),
        ({"parent": 5}, "parent is 5"),
        ({"parent": "nowhere"}, f"nowhere/{ADAPTER_CONFIG}: cannot be read"),
        ({"parent": "a\0b"}, "parent is"),
        ({"base": "models/qwen3"}, "base is"),
        ({"base": {}}, "base.weights is missing"),
        ({"base": {"weights": {"model.safetensors": 5}}}, "base.weights is"),
        ({"base": {"weights": {}, "relative": 5}}, "base.relative is 5"),
        ({"fine_tune_type": "dora"}, "fine_tune_type 'dora': a DoRA adapter"),
        ({"fine_tune_type": "full"}, "fine_tune_type 'full': full weights.*mlx_lm.fuse"),
        ({"fine_tune_type": 3}, "fine_tune_type 3"),
        ({"peft_type": "LORA"}, "PEFT's, but there is no adapter_model.safetensors"),
    ],
)
def test_a_damaged_record_is_named(project, changes, message):
    edit(project / "outputs" / "sft", **changes)
    assert ADAPTER_CONFIG in refused("outputs/sft", message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", -1),
        ("rank", 0),
        ("rank", 4.0),
        ("rank", 10**9),
        ("rank", None),
        ("scale", math.nan),
        ("scale", math.inf),
        ("scale", 0),
        ("scale", -2.0),
        ("scale", 10**9),
        ("scale", "2"),
        ("scale", None),
        ("dropout", 1),
        ("dropout", -0.5),
        ("dropout", math.nan),
        ("keys", "self_attn.q_proj"),
        ("keys", [1]),
    ],
)
def test_a_damaged_lora_parameter_is_named(project, key, value):
    parameters = read_adapter_config(project / "outputs" / "sft")["lora_parameters"]
    edit(project / "outputs" / "sft", lora_parameters=parameters | {key: value})
    name = (
        "is not a finite number" if isinstance(value, float) and not math.isfinite(value) else key
    )
    refused("outputs/sft", rf"{ADAPTER_CONFIG}: .*{name}")


@pytest.mark.parametrize("content", ["", "[]", "{", "5", '{"a": ' * 10**5, "\ufeff{}", "null"])
def test_a_record_that_is_not_an_object_is_named(project, content):
    (project / "outputs" / "sft" / ADAPTER_CONFIG).write_text(content)
    refused("outputs/sft", f"sft/{ADAPTER_CONFIG}")


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapters.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    save_file(dict(change(name, value) for name, value in tensors.items()), path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_with_a_number_that_is_not_finite_is_refused(project, value):
    def change(name, tensor):
        if name == "model.layers.0.self_attn.k_proj.lora_b":
            tensor[1, 2] = value
        return name, tensor

    change_tensors(project / "outputs" / "sft", change)
    refused(
        "outputs/sft", r"adapters\.safetensors: .*k_proj\.lora_b has values that are not finite"
    )
    refused_by_mlx_dtype = project / "outputs" / "grpo"
    change_tensors(refused_by_mlx_dtype, lambda name, tensor: (name, tensor.astype(np.int32)))
    refused("outputs/grpo", "not finite numbers")


def test_full_weights_and_dora_are_named_without_their_type(project):
    sft = project / "outputs" / "sft"
    change_tensors(sft, lambda name, tensor: (f"{name}.weight", tensor))
    refused("outputs/sft", "adapters.safetensors: full weights, not a LoRA adapter")
    edit(sft, "fine_tune_type")
    refused("outputs/sft", "adapters.safetensors: full weights, not a LoRA adapter")
    change_tensors(sft, lambda name, tensor: (name.removesuffix("lora_b.weight") + "m", tensor))
    refused("outputs/sft", "a DoRA adapter")


def test_another_rank_than_recorded_is_named(project):
    parameters = read_adapter_config(project / "outputs" / "sft")["lora_parameters"]
    edit(project / "outputs" / "sft", lora_parameters=parameters | {"rank": 8})
    refused("outputs/sft", f"rank in {ADAPTER_CONFIG} is 8, but .*lora_a in .* has rank 4")


def test_a_missing_or_unfetched_adapter_file(project):
    path = project / "outputs" / "sft" / "adapters.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused("outputs/sft", "Git LFS pointer")
    path.unlink()
    refused("outputs/sft", "adapters.safetensors: cannot be read")


# A base that is already quantised


def test_a_quantised_base_loads_trains_and_fuses(tmp_path):
    from mlx_lm.utils import load, quantize_model, save_model

    base = tiny.make_qwen3(tmp_path / "base", layers=1)
    model, _, config = load(str(base), return_config=True)
    model, config = quantize_model(model, config, group_size=64, bits=4)
    save_model(base, model)
    tiny.configure(base, quantization=config["quantization"])
    folder = make_adapter(tmp_path / "sft", base)
    tokens = mx.array([[5, 300, 17, 44]])
    adapted, _ = models.load_chain(read_chain(str(folder)))
    fused, _ = models.load_chain(read_chain(str(folder)), fuse_last=True)
    plain, _ = models.load_chain(read_chain(str(base)))
    assert mx.abs(adapted(tokens) - fused(tokens)).max().item() < 1e-3
    assert mx.abs(adapted(tokens) - plain(tokens)).max().item() > 0.1
