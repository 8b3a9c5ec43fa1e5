"""The scripts that take weights in and out, from their flags on, above all with bad files."""

import errno
import json
import pathlib
import pickle
import shutil
import struct
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from deevisum_jax.convert import npz
from deevisum_jax.convert import safetensors as safetensors_files
from deevisum_jax.convert.tensors import ArrayTensor, read
from deevisum_jax.data import tokenizer
from deevisum_jax.models import paligemma2
from scripts import benchmark_weights, check_export, convert_weights, export_big_vision, export_hf
from tests.checkpoint_files import write_big_vision, write_hugging_face, write_run

NORM = "llm/final_norm/scale"  # a tensor of an npz, 32 numbers
HF_NORM = "language_model.model.norm.weight"  # the same in a Hugging Face folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> pathlib.Path:
    """A tokenizer that stands for paligemma_tokenizer.model."""
    path = tmp_path_factory.mktemp("tokenizer") / "paligemma_tokenizer.model"
    tokenizer.train_tokenizer(["a title", "yes", "no"], path, vocab_size=300)
    return path


@pytest.fixture(scope="module")
def config(pieces) -> paligemma2.PaliGemma2Config:
    """The tiny model with room for them."""
    rows = paligemma2.table_rows(tokenizer.load_tokenizer(pieces).vocab_size)
    return paligemma2.get_config("tiny", llm={"vocab_size": rows})


@pytest.fixture(scope="module")
def good(config, pieces, tmp_path_factory) -> pathlib.Path:
    """A folder with `pt.npz` and `hf/`, sound ones."""
    folder = tmp_path_factory.mktemp("good")
    params = paligemma2.init_params(config, jax.random.key(0))
    write_big_vision(folder / "pt.npz", params, config)
    write_hugging_face(folder / "hf", params, config, pieces)
    return folder


@pytest.fixture
def here(good, tmp_path) -> pathlib.Path:
    """A copy of them to damage."""
    shutil.copytree(good, tmp_path / "in")
    return tmp_path / "in"


def arrays(here: pathlib.Path) -> dict[str, np.ndarray]:
    return dict(np.load(here / "pt.npz"))


def change_npz(here: pathlib.Path, **changed) -> None:
    named = {f"params/{name.replace('__', '/')}": value for name, value in changed.items()}
    np.savez(here / "pt.npz", **{**arrays(here), **named})


def change_hf(here: pathlib.Path, **changed) -> None:
    file = here / "hf" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({**tensors, **changed}, file)


def change_json(file: pathlib.Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_header(here: pathlib.Path, change) -> None:
    """Of model.safetensors, its numbers as they are."""
    file = here / "hf" / "model.safetensors"
    content = file.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    head = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])


def cut(file: pathlib.Path, num_bytes: int = 1000) -> None:
    file.write_bytes(file.read_bytes()[:-num_bytes])


def flip_a_bit(file: pathlib.Path) -> None:
    """In the middle of the numbers of the largest tensor."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def pickled(here: pathlib.Path) -> None:
    class Trap:
        def __reduce__(self):
            return (pathlib.Path.touch, (here / "unpickled",))

    with zipfile.ZipFile(here / "pt.npz", "a") as archive:
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
        archive.writestr(
            "params/extra.npy",
            b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header + pickle.dumps([Trap()]),
        )


def as_first_paligemma(here: pathlib.Path) -> None:
    found = arrays(here)
    del found["params/llm/layers/post_attention_norm/scale"]
    del found["params/llm/layers/post_ffw_norm/scale"]
    np.savez(here / "pt.npz", **found)


def shard(here: pathlib.Path, shard_name: str) -> None:
    """Turns the single file into an index of one shard of that name."""
    single = here / "hf" / "model.safetensors"
    names = list(safetensors.numpy.load_file(single))
    single.rename(here / "hf" / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard_name)}
    (here / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = {
    # name: (source, what is done to it, what the message names)
    "a truncated npz": ("pt.npz", lambda here: cut(here / "pt.npz"), ["pt.npz"]),
    "a truncated safetensors": (
        "hf",
        lambda here: cut(here / "hf" / "model.safetensors"),
        ["model.safetensors", "the file ends at"],
    ),
    "a corrupted npz": (
        "pt.npz",
        lambda here: flip_a_bit(here / "pt.npz"),
        ["pt.npz", "params/llm/embedder/input_embedding"],
    ),
    "numbers that are none": (
        "hf",
        lambda here: change_hf(here, **{HF_NORM: np.full(32, np.nan, np.float32)}),
        ["model.safetensors", "norm.weight", "not finite"],
    ),
    "a tensor of another shape, npz": (
        "pt.npz",
        lambda here: change_npz(here, llm__final_norm__scale=np.zeros(31, np.float32)),
        ["pt.npz", f"params/{NORM}: shape (31,), wanted (32,)"],
    ),
    "a tensor of another shape, safetensors": (
        "hf",
        lambda here: change_hf(here, **{HF_NORM: np.zeros(31, np.float32)}),
        ["model.safetensors", f"{HF_NORM}: shape (31,), wanted (32,)"],
    ),
    "a wrong dtype, npz": (
        "pt.npz",
        lambda here: change_npz(here, llm__final_norm__scale=np.zeros(32, np.int64)),
        ["pt.npz", f"params/{NORM}: dtype int64, wanted one of float32, bfloat16, float16"],
    ),
    "a wrong dtype, safetensors": (
        "hf",
        lambda here: change_hf(here, **{HF_NORM: np.zeros(32, np.int8)}),
        ["model.safetensors", f"{HF_NORM}: dtype int8, wanted one of"],
    ),
    "pickled objects": ("pt.npz", pickled, ["pt.npz", "params/extra", "object"]),
    "a tensor too few": (
        "hf",
        lambda here: change_header(here, lambda header: header.pop(HF_NORM)),
        ["model.safetensors", "belong to none"],
    ),
    "a tensor that is missing": (
        "pt.npz",
        lambda here: np.savez(
            here / "pt.npz", **{k: v for k, v in arrays(here).items() if NORM not in k}
        ),
        ["pt.npz", f"params/{NORM}: missing, wanted for {NORM}"],
    ),
    "a tensor too many": (
        "pt.npz",
        lambda here: change_npz(here, lora=np.zeros(1, np.float32)),
        ["pt.npz", "params/lora: no parameter takes it"],
    ),
    "offsets that lie": (
        "hf",
        lambda here: change_header(
            here, lambda header: header[HF_NORM].update(data_offsets=[0, 10**9])
        ),
        ["model.safetensors", HF_NORM],
    ),
    "a header length that lies": (
        "hf",
        lambda here: (here / "hf" / "model.safetensors").write_bytes(
            struct.pack("<Q", 2**40) + (here / "hf" / "model.safetensors").read_bytes()[8:]
        ),
        ["model.safetensors", "header"],
    ),
    "an index that points outside": (
        "hf",
        lambda here: shard(here, "../part.safetensors"),
        ["model.safetensors.index.json", "../part.safetensors"],
    ),
    "an index of a shard that is not there": (
        "hf",
        lambda here: shard(here, "gone.safetensors"),
        ["gone.safetensors"],
    ),
    "the first PaliGemma, npz": ("pt.npz", as_first_paligemma, ["pt.npz", "the first PaliGemma"]),
    "the first PaliGemma, Hugging Face": (
        "hf",
        lambda here: change_json(
            here / "hf" / "config.json",
            lambda content: content["text_config"].update(model_type="gemma"),
        ),
        ["config.json", "text_config.model_type", "the first PaliGemma"],
    ),
    "Gemma 3": (
        "hf",
        lambda here: change_json(
            here / "hf" / "config.json", lambda content: content.update(model_type="gemma3")
        ),
        ["config.json", "model_type", "gemma3"],
    ),
    "a vocabulary of another size, npz": (
        "pt.npz",
        lambda here: change_npz(here, llm__embedder__input_embedding=np.zeros((99, 32), "f4")),
        ["paligemma_tokenizer.model has", "the model 99 rows"],
    ),
    "a vocabulary of another size, safetensors": (
        "hf",
        lambda here: change_hf(
            here, **{"language_model.model.embed_tokens.weight": np.zeros((99, 32), np.float32)}
        ),
        ["config.json", "vocab_size", "embed_tokens.weight", "99"],
    ),
    "sizes that no variant has": (
        "pt.npz",
        lambda here: change_npz(here, llm__layers__mlp__linear=np.zeros((4, 65, 32), np.float32)),
        ["pt.npz", "no variant has its sizes"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_leaves_nothing_behind(here, pieces, tmp_path, capfd, name):
    source, damage, named = BAD[name]
    damage(here)
    tokens = ["--tokenizer", str(pieces)] if source == "pt.npz" else []
    before = sorted(tmp_path.rglob("*"))
    for command, flags in (
        (convert_weights, ["--source", str(here / source), *tokens]),
        (export_hf, ["--checkpoint", str(here / source), *tokens]),
        (export_big_vision, ["--checkpoint", str(here / source)]),
    ):
        if command is export_big_vision and "vocabulary" in name and source == "pt.npz":
            continue  # nothing to compare the table with: a big_vision npz has no tokenizer
        out = tmp_path / ("out.npz" if command is export_big_vision else "out")
        assert command.main([*flags, "--out", str(out)]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        for part in named:
            assert part in error
        assert sorted(tmp_path.rglob("*")) == before


def test_the_report_lists_every_tensor_and_may_be_all(here, tmp_path, capfd):
    flags = ["--source", str(here / "hf")]
    assert convert_weights.main([*flags, "--dry_run"]) == 0
    dry = capfd.readouterr().out.splitlines()
    assert (
        "language_model.model.layers.3.mlp.up_proj.weight float32 [64, 32] -> "
        "llm/layers/mlp/gating_einsum[3, 1]: transpose (1, 0)"
    ) in dry
    assert dry[-1] == (
        "85 tensors; image_size 28, final_logits_softcap 30, sliding_window 4096, resize bicubic"
    )
    assert convert_weights.main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().out.splitlines()[:-1] == dry[:-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "params",
        "report.json",
        "tokenizer.model",
        "vocab_padding.safetensors",
        "weights.json",
    ]


def test_weights_go_round(here, pieces, tmp_path, capfd):
    """Npz -> converted -> Hugging Face -> npz, with every script."""
    converted, exported, again = (tmp_path / name for name in ("weights", "hf", "again.npz"))
    assert convert_weights.main(["--source", str(here / "pt.npz"), "--out", str(converted),
                                 "--tokenizer", str(pieces)]) == 0  # fmt: skip
    assert export_hf.main(["--checkpoint", str(converted), "--out", str(exported)]) == 0
    assert export_big_vision.main(["--checkpoint", str(exported), "--out", str(again)]) == 0
    before, after = arrays(here), dict(np.load(again))
    assert sorted(before) == sorted(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize("size", ["-14", "0", "13"])
def test_an_image_size_that_is_none_is_refused(here, tmp_path, capfd, size):
    flags = ["--source", str(here / "hf"), "--out", str(tmp_path / "out"), "--image_size", size]
    assert convert_weights.main(flags) == 2
    assert "img.image_size" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_buckets_are_not_written(here, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, flags in (
        (convert_weights, ["--source", str(here / "hf"), "--out", "gs://bucket/out"]),
        (export_hf, ["--checkpoint", str(here / "hf"), "--out", "gs://bucket/out"]),
        (export_big_vision, ["--checkpoint", str(here / "hf"), "--out", "s3://bucket/out.npz"]),
    ):
        assert command.main(flags) == 2
        assert "is in a bucket, and only local folders are written" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_is_named_and_leaves_nothing_behind(here, tmp_path, capfd, monkeypatch):
    def full(stream, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(npz, "write_slabs", full)
    monkeypatch.setattr(safetensors_files, "write_slabs", full)
    flags = ["--checkpoint", str(here / "hf"), "--out"]
    for command, name in ((export_hf, "out"), (export_big_vision, "out.npz")):
        assert command.main([*flags, str(tmp_path / name)]) == 2
        assert f"{name} cannot be written (No space left on device)" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_to_write_into_that_is_not_there_is_named(here, tmp_path, capfd):
    flags = ["--checkpoint", str(here / "hf"), "--out", str(tmp_path / "no" / "out.npz")]
    assert export_big_vision.main(flags) == 2
    assert "no is no folder; make it" in capfd.readouterr().err


def test_home_is_found_in_every_kind_of_source(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    for source in ("~/pt.npz", "~/hf"):
        assert convert_weights.main(["--source", source, "--dry_run"]) == 0


def test_an_optimizer_beside_the_parameters_is_left(here, capfd):
    found = arrays(here)
    np.savez(here / "pt.npz", **found, **{"opt/0/mu": np.zeros(3, np.float32)})
    assert convert_weights.main(["--source", str(here / "pt.npz"), "--dry_run"]) == 0
    assert "34 tensors" in capfd.readouterr().out


@pytest.mark.parametrize("command", [convert_weights, export_hf, export_big_vision, check_export])
def test_help_names_every_flag(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert "examples" in capsys.readouterr().out.replace("example:", "examples")


def test_flags_that_miss_something_are_refused(here, capsys):
    with pytest.raises(SystemExit):
        convert_weights.main(["--source", str(here / "hf")])
    assert "--out is wanted, or --dry_run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_hf.main(["--checkpoint", "a", "--out", "b", "--max_shard_gb", "0"])
    assert "--max_shard_gb 0.0 is no size of a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_hf.main(["--checkpoint", "a", "--out", "b", "--max_shard_gb", "inf"])
    assert "--max_shard_gb inf is no size of a file" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what transformers imports
def test_an_export_is_checked_in_float32_whatever_the_run_computes_in(
    tiny_config, pieces, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = tmp_path / "run"
    overrides = ("model.dtype=bfloat16", "data.text_len=300", f"data.tokenizer={pieces}")
    write_run(run, tiny_config(*overrides))
    exported = tmp_path / "exported"
    assert export_hf.main(["--checkpoint", str(run), "--out", str(exported)]) == 0
    flags = ["--checkpoint", str(run), "--exported", str(exported), "--segments", "8"]
    assert check_export.main(flags) == 0
    out = capsys.readouterr().out
    assert "greedy tokens that are the same: 128 of 128" in out
    assert "segments that leave at the same exit: 8 of 8" in out
    assert out.splitlines()[-1] == "they agree"

    # An export in another dtype is held against parameters rounded to it.
    rounded = tmp_path / "rounded"
    narrow = ["--checkpoint", str(run), "--out", str(rounded), "--dtype", "bfloat16"]
    assert export_hf.main(narrow) == 0
    assert check_export.main([*flags[:3], str(rounded), *flags[4:]]) == 0

    heads = safetensors.numpy.load_file(exported / "deevisum_heads.safetensors")
    heads["exits.classifier.bias"] += 1e-3
    safetensors.numpy.save_file(heads, exported / "deevisum_heads.safetensors")
    assert check_export.main(flags) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "they do NOT agree to 0.0001"
    (exported / "deevisum_heads.safetensors").unlink()
    config = json.loads((exported / "config.json").read_text())
    del config["deevisum"]
    (exported / "config.json").write_text(json.dumps(config))
    assert check_export.main(flags) == 2
    assert "has no exit heads, but" in capsys.readouterr().err


def test_an_export_that_is_not_there_is_named(here, capfd):
    flags = ["--checkpoint", str(here / "hf"), "--exported", str(here / "nothing")]
    assert check_export.main(flags) == 2
    assert "nothing is no folder that scripts/export_hf.py wrote" in capfd.readouterr().err


def test_the_benchmark_tells_checkpoints_apart():
    dtype = np.dtype(np.float32)
    drawn = benchmark_weights.RandomTensor((3, 4), dtype, seed=0)
    numbers = read(drawn)
    np.testing.assert_array_equal(numbers, read(drawn))
    # 2 ** -6 times 1 to 2.
    assert (np.abs(numbers) >= 2**-6).all()
    assert (np.abs(numbers) < 2**-5).all()
    same = {"x": ArrayTensor(numbers)}
    assert "equal to the bit" in benchmark_weights.compare({"x": drawn}, same)
    other = {"x": benchmark_weights.RandomTensor((3, 4), dtype, seed=1)}
    assert benchmark_weights.compare(same, other) == "DIFFERENT: ['x']"
    assert "DIFFERENT names" in benchmark_weights.compare(same, {"y": drawn})


def test_the_benchmark_s_tokenizer_has_as_many_pieces_as_asked_for(tmp_path):
    path = benchmark_weights.make_tokenizer(tmp_path / "t.model", 2560)
    assert tokenizer.load_tokenizer(path).vocab_size == 2560
