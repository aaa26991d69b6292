"""Files that nobody trusts: formats, damage, hostile names, and a great many damaged files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from zoo import example

from lightning_spectral import ExactSVD, ResidualBlock, audit, measure
from lightning_spectral.checkpoints.files import open_checkpoint
from lightning_spectral.checkpoints.untrusted import printable
from lightning_spectral.errors import CheckpointError

HOSTILE = ("../../x", "<script>alert(1)</script>", "=cmd()", "\x1b[31mred\x07", "two\nlines", "x" * 10_000, "‮abc")


def refused(path: Path, blocks: tuple[ResidualBlock, ...] | None = None, **options: Any) -> str:
    """One clear line, which names the file."""
    with pytest.raises(CheckpointError, match=re.escape(path.name[:20])) as info:
        audit(path, blocks, **options)
    message = str(info.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def test_every_format_gives_the_same_numbers(state: Any, blocks: Any, tmp_path: Path):
    expected = measure(example("gpt2").build(), blocks, solver=ExactSVD())
    save_file(state, tmp_path / "one.safetensors")
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "script.pt")
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "any.safetensors")
    for name in ("one.safetensors", "new.pt", "old.pt", "script.pt", "folder"):
        found = audit(tmp_path / name, blocks, solver=ExactSVD())
        assert [layer.ratio for layer in found] == [layer.ratio for layer in expected], name


def test_shards_are_read_where_the_index_says(state: Any, blocks: Any, tmp_path: Path):
    names = sorted(state)
    half = len(names) // 2
    parts = {"a-1.safetensors": names[:half], "a-2.safetensors": names[half:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"

    def write(weight_map: Any) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    right = {key: file for file, keys in parts.items() for key in keys}
    write(right)
    expected = measure(example("gpt2").build(), blocks, solver=ExactSVD())
    assert audit(tmp_path, blocks, solver=ExactSVD()).layers == expected.layers
    write(right | {names[0]: "../a-1.safetensors"})
    assert "the shard '../a-1.safetensors' is not the name of a file beside it" in refused(index.parent, blocks)
    write(right | {names[0]: "a-2.safetensors"})
    assert "1 tensor(s) are not in the shard that the index names" in refused(index.parent, blocks)
    write(right | {names[0]: "a-3.safetensors"})
    with pytest.raises(CheckpointError, match=r"a-3\.safetensors: no such file"):
        audit(tmp_path, blocks)
    write([1])
    assert "expected an object 'weight_map'" in refused(index.parent, blocks)
    index.write_text("[]")
    assert "not readable as a JSON object: TypeError: a list" in refused(index.parent, blocks)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path):
    marker = tmp_path / "was_here"

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    torch.save(
        {"state_dict": {"weight": Trap()}, "hyper_parameters": {"_instantiator": "os.mkdir"}}, tmp_path / "t.ckpt"
    )
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    assert "plain values only: it names posix.mkdir, which is not run" in refused(tmp_path / "t.ckpt")
    assert "tensors and plain values only" in refused(tmp_path / "raw.pt")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Trap()))
    assert "not readable as the index of a distributed checkpoint: ValueError: the pickle names" in refused(
        tmp_path / "dcp"
    )
    assert not marker.exists()


def test_an_archive_that_is_larger_than_its_file_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 1_000_000)
    assert "the archive is compressed" in refused(tmp_path / "bomb.pt")


def test_damaged_files_give_one_clear_error(state: Any, blocks: Any, tmp_path: Path):
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    content = whole.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for name, damaged, message in (
        ("empty.safetensors", b"", "the file is empty, expected a checkpoint"),
        ("short.safetensors", content[: header + 100], "not readable as a safetensors file: SafetensorError"),
        ("header.safetensors", content[:8] + b"[" + content[9:], "not readable as a safetensors file"),
        ("huge.safetensors", b"\xff" * 7 + b"\x7f" + content[8:], "it announces a header of 9223372036854775807 bytes"),
        (
            "text.pt",
            b"hello, world",
            "tensors and plain values only: it begins with b'hello, world', as no known format",
        ),
    ):
        (tmp_path / name).write_bytes(damaged)
        assert message in refused(tmp_path / name, blocks), name
    assert "no such file, expected a checkpoint file or a model folder" in refused(tmp_path / "nothing.ckpt")
    (tmp_path / "folder").mkdir()
    assert "found no weights in this folder, expected one of" in refused(tmp_path / "folder")


def test_wrong_weights_give_one_clear_error(state: Any, blocks: Any, tmp_path: Path):
    path = tmp_path / "weights.pt"
    for change, message in (
        (lambda name, value: torch.full_like(value, torch.nan), "none of its 3 blocks has a norm"),
        (lambda name, value: value[:5], r"18 have another shape .* is \(5, 32\), expected \(32, 32\)$"),
        (lambda name, value: value.flatten(), r"12 have another shape .* is \(1024,\), expected \(32, 32\)$"),
        (lambda name, value: value.to(torch.int8), "none of its 3 blocks has a norm"),
        (lambda name, value: torch.zeros(1).expand(value.shape), "found no tensors"),
    ):
        torch.save({name: change(name, value) for name, value in state.items()}, path)
        with pytest.raises(CheckpointError, match=message) as info:
            audit(path, blocks)
        assert str(info.value).isprintable()
    torch.save({name: value.to(torch.float8_e4m3fn) for name, value in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"attn\.c_proj\.weight holds torch\.float8_e4m3fn, whose scales are not"):
        audit(path, blocks)
    torch.save([1, 2], path)
    assert "it holds a list, expected a state dict" in refused(path, blocks)
    torch.save({"a": 1}, path)
    assert "found no tensors, expected the weights of a model" in refused(path, blocks)
    torch.save(dict(list(state.items())[:5]), path)
    assert "weights are missing" in refused(path, blocks)
    message = refused(path)
    assert "found 5 tensors (1 x transformer.h.*.attn.c_attn.weight, 1 x transformer.h.*.attn.c_proj.weight)" in message
    assert "but nothing says where norms stand" in message


def test_a_config_and_a_file_that_disagree_give_one_clear_error(tmp_path: Path):
    model: Any = example("llama").build()
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())

    def says(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(entries | changes))
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))) as info:
            audit(tmp_path)
        assert str(info.value).isprintable()
        return str(info.value)

    assert "0 of 18 weights are missing (parametrized ones are stored in pieces) and 6 have another" in says(
        intermediate_size=40
    )
    assert "6 of 24 weights are missing" in says(num_hidden_layers=4)
    assert "a model with far more weights than the file has" in says(num_hidden_layers=50_000)
    assert "num_hidden_layers is 1000000000, expected 131072 at most" in says(num_hidden_layers=10**9)
    assert "model_type is '../../x', expected one that transformers" in says(model_type="../../x")
    assert "transformers cannot build this model" in says(num_attention_heads="<script>")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as a JSON object: JSONDecodeError"):
        audit(tmp_path)


def test_quantized_folders_are_refused_with_their_reason(tmp_path: Path):
    """8-bit floats with scales beside them, as DeepSeek-V3 is stored; two 4-bit numbers in a byte."""
    model: Any = example("llama").build()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    linear = [name for name in plain if "_proj" in name]
    scales = {name.replace("weight", "weight_scale_inv"): torch.ones(1, 1) for name in linear}
    floats = {name: plain[name].to(torch.float8_e4m3fn) for name in linear}
    packed = {name: torch.zeros(plain[name].numel() // 2, 1, dtype=torch.uint8) for name in linear}
    for changes, message in (
        (floats | scales, r"self_attn\.o_proj\.weight holds torch\.float8_e4m3fn, whose scales are not understood"),
        (
            packed,
            r"12 have another shape .*: .*\.o_proj\.weight is \(512, 1\), .* They are quantized, which is not read",
        ),
    ):
        model.save_pretrained(tmp_path)
        entries = json.loads((tmp_path / "config.json").read_text())
        entries["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / "config.json").write_text(json.dumps(entries))
        save_file(plain | changes, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            audit(tmp_path)


def test_a_config_names_no_code(tmp_path: Path):
    """Entries that choose a class of the user's, a kernel of somebody's or a download are not looked at."""
    model: Any = example("llama").build()
    model.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('was imported')")
    entries = json.loads((tmp_path / "config.json").read_text())
    entries |= {"auto_map": {"AutoModel": "evil.Evil"}, "architectures": ["__builtins__"]}
    entries |= {"_attn_implementation": "somebody/kernels", "attn_implementation": "somebody/kernels"}
    entries |= {"quantization_config": {"quant_method": "evil"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    found = audit(tmp_path, solver=ExactSVD())
    assert [layer.ratio for layer in found] == [layer.ratio for layer in measure(model, solver=ExactSVD())]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_do_no_harm(name: str, state: Any, blocks: Any, tmp_path: Path):
    before = sorted(tmp_path.parent.iterdir())
    more = {name: torch.ones(2), f"{name}.residual_scale.log_scale": torch.ones(1)}
    save_file(state | more, tmp_path / "f.safetensors")
    if len(name) < 500 and name.isprintable():
        assert "belongs to none of the branches" in refused(tmp_path / "f.safetensors", blocks)
    else:  # no module has such a name
        assert len(audit(tmp_path / "f.safetensors", blocks).layers) == 3
    renamed = {key.replace("mlp", name): value for key, value in state.items()}
    torch.save(renamed, tmp_path / "g.pt")
    assert "weights are missing" in refused(tmp_path / "g.pt", blocks)
    assert sorted(tmp_path.parent.iterdir()) == before
    assert open_checkpoint(tmp_path / "f.safetensors").shapes


def test_printable_is_one_short_line_of_ascii():
    for text in HOSTILE:
        shown = printable(text)
        assert shown.isascii()
        assert shown.isprintable()
        assert len(shown) <= 400
    assert printable("layers.0.mlp") == "layers.0.mlp"
    assert printable("a\tb\x7fc") == "a\\x09b\\x7fc"


def mutated(content: bytes, source: random.Random) -> bytes:
    """Damage a file: bits, cuts, insertions, extreme numbers, other digits; mostly near its beginning."""
    data = bytearray(content)
    reach = min(len(data), 4000) if source.random() < 0.7 else len(data)
    place = source.randrange(reach)
    how = source.randrange(6)
    if how == 0:
        for _ in range(source.randrange(1, 8)):
            data[source.randrange(reach)] ^= 1 << source.randrange(8)
    elif how == 1:
        del data[place:]
    elif how == 2:
        del data[place : place + source.randrange(1, 200)]
    elif how == 3:
        data[place:place] = source.randbytes(source.randrange(1, 60))
    elif how == 4:
        data[place : place + 8] = source.choice([b"\xff" * 8, b"\0" * 8, b"-1000000", b"99999999"])
    else:
        digits = [position for position in range(min(len(data), 6000)) if chr(data[position]).isdigit()]
        for position in source.sample(digits, 3):
            data[position] = ord(source.choice("0123456789-e."))
    return bytes(data)


def measured_or_refused(path: Path, blocks: Any = None) -> bool:
    try:
        audit(path, blocks)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    assert len(message) < 1200
    return False


@pytest.mark.parametrize("name", ["new.safetensors", "new.pt", "old.pt"])
def test_damaged_files_are_measured_or_refused(name: str, state: Any, blocks: Any, tmp_path: Path):
    """Three hundred of each format: no other exception, no warning, one printable line."""
    if name == "new.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "new.pt")
    content, source, outcomes = (tmp_path / name).read_bytes(), random.Random(0), {True: 0, False: 0}
    for _ in range(300):
        (tmp_path / f"x.{name}").write_bytes(mutated(content, source))
        outcomes[measured_or_refused(tmp_path / f"x.{name}", blocks)] += 1
    assert min(outcomes.values()) > 30  # both happen


def test_damaged_configs_are_measured_or_refused(tmp_path: Path):
    """Wrong types, absurd numbers and hostile texts in every entry."""
    values = [
        0,
        -1,
        7,
        10**4,
        10**6,
        10**9,
        10**30,
        1.5,
        float("inf"),
        None,
        True,
        "",
        *HOSTILE,
        [],
        [1, 2],
        {},
        {"a": 1},
    ]
    source, outcomes = random.Random(0), {True: 0, False: 0}
    for name in ("llama", "gpt2", "gemma3_text", "mixtral"):
        folder = tmp_path / name
        example(name).build().save_pretrained(folder)  # type: ignore[operator]
        entries = json.loads((folder / "config.json").read_text())
        for _ in range(50):
            changed = copy.deepcopy(entries)
            for key in source.sample([*entries, "layer_types", "rope_parameters", "num_labels"], source.choice((1, 2))):
                changed[key] = source.choice(values)
            (folder / "config.json").write_text(json.dumps(changed))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[measured_or_refused(folder)] += 1
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize(
    ("state", "step"),
    [
        ('{"global_step": 500, "log_history": []}', 500),
        (None, 0),
        ('{"global_step": "500"}', 0),
        ('{"global_step": true}', 0),
        ('{"global_step": -3}', 0),
        ("{}", 0),
        ("[500]", 0),
        ("broken", 0),
    ],
)
def test_the_step_is_what_the_trainer_of_transformers_writes_beside(tmp_path: Path, state: str | None, step: int):
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    save_file({"w": torch.zeros(2, 2)}, folder / "model.safetensors")
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    assert open_checkpoint(folder).step == open_checkpoint(folder / "model.safetensors").step == step
