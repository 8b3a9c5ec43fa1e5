"""What a run can start from, and what a config that leaves things open takes over from there."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from qwix import QArray

from deevisum_jax import (
    checkpoints,
    experiment,
    files,
    initialization,
    main,
    runs,
    sharding,
    weights,
)
from deevisum_jax import config as config_lib
from deevisum_jax.config import LoraConfig, MergeConfig
from deevisum_jax.convert import huggingface, released, rows
from deevisum_jax.convert.safetensors import write_safetensors_file
from deevisum_jax.data import tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.models import lora, paligemma2
from tests import process_work, processes, untrained
from tests.checkpoint_files import write_big_vision, write_hugging_face, write_run
from tests.conftest import TINY_CONFIG, TINY_MESH


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> pathlib.Path:
    """A tokenizer that stands for paligemma_tokenizer.model."""
    path = tmp_path_factory.mktemp("tokenizer") / "paligemma_tokenizer.model"
    texts = ["title a red ball", "talk two dogs", "sound loud applause", "yes silence", "no end"]
    tokenizer.train_tokenizer(texts, path, vocab_size=300)
    return path


@pytest.fixture(scope="module")
def config(tokens):
    """The tiny model with that many rows."""
    rows = paligemma2.table_rows(tokenizer.load_tokenizer(tokens).vocab_size)
    return paligemma2.get_config("tiny", llm={"vocab_size": rows})


@pytest.fixture(scope="module")
def trained(config):
    """Parameters of it, without exit heads."""
    return paligemma2.init_params(config, jax.random.key(7))


@pytest.fixture(scope="module")
def npz(config, trained, tmp_path_factory) -> str:
    """A checkpoint of big_vision."""
    return write_big_vision(tmp_path_factory.mktemp("npz") / "pt_tiny_28.npz", trained, config)


@pytest.fixture(scope="module")
def folder(config, trained, tokens, tmp_path_factory) -> str:
    """A checkpoint of Hugging Face, with its tokenizer."""
    return write_hugging_face(tmp_path_factory.mktemp("hf") / "tiny", trained, config, tokens)


@pytest.fixture
def start_config(tiny_config):
    """A config that starts from somewhere and leaves the rest open."""

    def make(initialization: str, *overrides: str) -> config_lib.Config:
        return tiny_config(f"initialization={initialization}", *overrides)

    return make


def load(config: config_lib.Config, model: paligemma2.PaliGemma2Config):
    """All parameters as training places them."""
    return initialization.find(config).load(model, on_the_mesh(model), jax.random.key(0))


def on_the_mesh(model: paligemma2.PaliGemma2Config):
    shapes = paligemma2.abstract_params(model)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    return sharding.abstract(shapes, sharding.param_shardings(shapes, mesh))


def assert_same(params, trained):
    jax.tree.map(
        np.testing.assert_array_equal, {name: params[name] for name in ("img", "llm")}, trained
    )


def test_weights_of_big_vision_land_on_the_mesh_with_fresh_exits(
    npz, config, trained, start_config
):
    model = dataclasses.replace(config, exit_layers=(2, 4))
    params = load(start_config(npz), model)
    assert_same(params, trained)
    linear = params["llm"]["layers"]["mlp"]["linear"]
    assert linear.sharding.spec == P(None, "tensor", sharding.FSDP_AXES)
    fresh = paligemma2.init_params(model, jax.random.key(0))["exits"]
    # Compiled alone, the last bit of a draw may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params["exits"], fresh)


def test_weights_of_hugging_face_are_the_same(folder, config, trained, start_config):
    assert_same(load(start_config(folder), config), trained)


def test_converted_weights_are_the_same(npz, tokens, config, trained, start_config, tmp_path):
    source = weights.open_source(npz, tokenizer_path=str(tokens))
    weights.convert(source, tmp_path / "weights")
    given = start_config(str(tmp_path / "weights"))
    assert_same(load(given, config), trained)
    start = initialization.find(given)
    assert start.tokenizer().vocab_size == tokenizer.load_tokenizer(tokens).vocab_size
    report = json.loads((tmp_path / "weights" / "report.json").read_text())
    assert len(report) == 34


@pytest.mark.parametrize(
    ("kind", "wanted"), [("npz", (28, 0.0, 0, "bilinear")), ("folder", (28, 30.0, 4096, "bicubic"))]
)
def test_what_the_config_leaves_open_follows_the_source(
    kind, wanted, start_config, tmp_path, request
):
    given = start_config(request.getfixturevalue(kind))
    settled, start = initialization.settle(given, tmp_path)
    assert start.settings == runs.settings_of(settled)
    model = settled.model
    found = (
        model.image_size,
        model.final_logits_softcap,
        model.sliding_window,
        settled.data.resize,
    )
    assert found == wanted
    # What is said stands.
    said = ("model.final_logits_softcap=5", "model.sliding_window=0", "data.resize=bilinear")
    settled, _ = initialization.settle(start_config(given.initialization, *said), tmp_path)
    assert settled.model.final_logits_softcap == 5
    assert settled.model.sliding_window == 0
    assert settled.data.resize == "bilinear"


def test_a_run_keeps_its_settings_when_its_source_is_gone(folder, start_config, tmp_path):
    workdir = tmp_path / "run"
    runs.claim(workdir, initialization.settle(start_config(folder), workdir)[0])
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    gone = start_config(str(tmp_path / "gone"))
    settled, start = initialization.settle(gone, workdir)
    assert settled.model.sliding_window == 4096
    assert start is None


def test_a_run_killed_in_its_first_save_to_a_bucket_begins_where_it_was_told(
    folder, start_config, bucket
):
    workdir = bucket / "run"
    runs.claim(workdir, initialization.settle(start_config(folder), workdir)[0])
    files.write_whole(workdir / "checkpoints" / "2" / "params" / "_METADATA", "{}")
    _, start = initialization.settle(start_config(folder), workdir)
    assert start.origin == folder


def test_from_scratch_the_variant_s_own_settings_stand(tiny_config, tmp_path):
    settled, start = initialization.settle(tiny_config(), tmp_path)
    assert start is None
    assert settled.model.image_size == 28
    assert (settled.model.final_logits_softcap, settled.model.sliding_window) == (0, 0)
    assert settled.data.resize == "bilinear"


def test_a_resumed_run_of_another_image_size_is_refused(tiny_config, tmp_path):
    runs.claim(tmp_path, initialization.settle(tiny_config(), tmp_path)[0])
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    larger, _ = initialization.settle(tiny_config("model.image_size=56"), tmp_path)
    with pytest.raises(UserError, match=r"set back model\.image_size: 28 -> 56"):
        runs.claim(tmp_path, larger)


def test_weights_serve_pictures_of_another_size(npz, config, trained, start_config):
    larger = paligemma2.get_config(
        "tiny", img={"image_size": 56}, llm={"vocab_size": config.llm.vocab_size}
    )
    params = load(start_config(npz, "model.image_size=56"), larger)
    assert params["img"]["pos_embedding"].shape == (1, 16, 16)
    del params["img"]["pos_embedding"]
    rest = {**trained, "img": {k: v for k, v in trained["img"].items() if k != "pos_embedding"}}
    assert_same(params, rest)


def check(config: config_lib.Config, vocab_size: int | None = None) -> None:
    initialization.find(config).check(config, vocab_size)


def test_another_variant_is_named(npz, folder, tokens, start_config, tmp_path):
    weights.convert(weights.open_source(npz), tmp_path / "weights")
    for source in (npz, folder):
        with pytest.raises(UserError, match=r"is a tiny, not the model .*set model\.variant=tiny"):
            check(start_config(source, "model.variant=quickstart_student"))
    with pytest.raises(UserError, match=r"is a tiny, not model\.variant=quickstart_student"):
        check(start_config(str(tmp_path / "weights"), "model.variant=quickstart_student"))


def test_a_tokenizer_is_demanded(npz, start_config, tmp_path):
    weights.convert(weights.open_source(npz), tmp_path / "weights")
    for source in (npz, tmp_path / "weights"):
        with pytest.raises(UserError, match=r"brings no tokenizer.*give data\.tokenizer"):
            check(start_config(str(source)))


def test_a_tokenizer_of_other_pieces_is_refused(npz, folder, config, start_config, tmp_path):
    weights.convert(weights.open_source(npz), tmp_path / "weights")
    rows = config.llm.vocab_size
    for source in (npz, folder):
        check(start_config(source), rows)
        with pytest.raises(UserError, match=rf"its token table has \d+ rows, .* {rows + 128}, so"):
            check(start_config(source), rows + 128)
    with pytest.raises(UserError, match=rf"has a vocabulary of {rows}, .* of {rows - 128};"):
        check(start_config(str(tmp_path / "weights")), rows - 128)


def test_another_tokenizer_than_the_weights_own_is_refused_whatever_its_size(
    npz, folder, tokens, config, start_config, tmp_path
):
    source = weights.open_source(npz, tokenizer_path=str(tokens))
    weights.convert(source, tmp_path / "weights")
    other = tmp_path / "other.model"
    texts = ["title a red bull", "talk two dots", "sound load applause", "yes silence", "no end"]
    made = tokenizer.train_tokenizer(texts, other, vocab_size=300)
    assert paligemma2.table_rows(made.vocab_size) == config.llm.vocab_size
    for start in (folder, str(tmp_path / "weights")):
        check(start_config(start, f"data.tokenizer={tokens}"), config.llm.vocab_size)
        with pytest.raises(UserError, match=r"other\.model is not the tokenizer of init"):
            check(start_config(start, f"data.tokenizer={other}"), config.llm.vocab_size)


MERGE = MergeConfig(num_keyframes=1, projections=True)


@pytest.mark.parametrize("form", ["npz", "folder", "converted"])
def test_projections_of_merging_are_drawn(
    form, request, config, tokens, trained, start_config, tmp_path
):
    if form == "converted":
        source = weights.open_source(request.getfixturevalue("npz"), tokenizer_path=str(tokens))
        weights.convert(source, tmp_path / "weights")
        given = str(tmp_path / "weights")
    else:
        given = request.getfixturevalue(form)
    model = dataclasses.replace(config, exit_layers=(2, 4), merge=MERGE)
    start = start_config(given)
    initialization.find(start).check(start, config.llm.vocab_size)
    params = load(start, model)
    assert_same(params, trained)
    fresh = paligemma2.init_params(model, jax.random.key(0))
    for part in ("exits", "merge"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params[part], fresh[part]
        )


def test_a_run_takes_projections_of_merging_along_or_gets_them(other_run, start_config):
    """From a run without to one with, from there to another number of keyframes, and not back."""
    shutil.rmtree(other_run / "checkpoints")
    model = paligemma2.get_config(
        "tiny", llm={"vocab_size": paligemma2.table_rows(280)}, exit_layers=(2, 4)
    )
    untrained.save_params(
        other_run, start_config("x"), paligemma2.init_params(model, jax.random.key(3))
    )
    lines = ("data.num_frames=3", "model.merge.num_keyframes=1", "model.merge.projections=True")
    start = start_config(str(other_run), *lines)
    check(start)
    learned = dataclasses.replace(model, merge=MERGE)
    params = jax.device_get(load(start, learned))
    assert params["merge"]["log_temperature"] == pytest.approx(np.log(0.01))

    shutil.rmtree(other_run / "checkpoints")
    config_lib.save(start_config("x", *lines), other_run / "config.json")
    changed = params | {"merge": jax.tree.map(lambda leaf: leaf + 1, params["merge"])}
    untrained.save_params(other_run, start_config("x"), changed)
    again = start_config(str(other_run), *lines, "model.merge.num_keyframes=2")
    check(again)
    found = load(
        again, dataclasses.replace(model, merge=dataclasses.replace(MERGE, num_keyframes=2))
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), changed)
    with pytest.raises(UserError, match=r"learned how to merge.*set it True.*its own is 1\)"):
        check(start_config(str(other_run), *lines[:2]))


def test_a_tensor_that_is_missing_is_known_before_any_data_is_built(
    folder, config, start_config, tmp_path
):
    shutil.copytree(folder, tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["language_model.model.norm.weight"]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(
        UserError, match=r"1 tensors of .*in do not .*\n  language_model\.model\.norm\.weight: miss"
    ):
        check(start_config(str(tmp_path / "in")), config.llm.vocab_size)


def test_a_separate_head_is_compared_when_numbers_are_read_and_not_before(
    folder, config, start_config, tmp_path
):
    shutil.copytree(folder, tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    table = tensors["language_model.model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors | {"language_model.lm_head.weight": table + 1}, file)
    given = start_config(str(tmp_path / "in"))
    check(given, config.llm.vocab_size)
    with pytest.raises(UserError, match=r"lm_head\.weight .*differs from"):
        load(given, config)
    safetensors.numpy.save_file(tensors | {"language_model.lm_head.weight": table}, file)
    load(given, config)


def test_converted_weights_that_were_cut_off_are_refused(npz, config, start_config, tmp_path):
    weights.convert(weights.open_source(npz), tmp_path / "weights")
    [largest] = sorted(
        (path for path in (tmp_path / "weights" / "params").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )[-1:]
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{largest.name} is missing, cut off or too much; copy"):
        load(start_config(str(tmp_path / "weights")), config)


def test_converted_weights_that_are_no_numbers_are_refused(trained, config, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, trained)
    broken["llm"]["final_norm"]["scale"] = broken["llm"]["final_norm"]["scale"].at[3].set(np.nan)
    checkpoints.save_params(tmp_path / "params", broken)
    with pytest.raises(UserError, match=r"llm/final_norm/scale holds numbers that are not finite"):
        checkpoints.restore_params(epath.Path(tmp_path / "params"), on_the_mesh(config))


def test_a_start_without_padding_leaves_none(tmp_path):
    initialization.write_padding(tmp_path, np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(initialization.read_padding(tmp_path), np.ones((2, 3)))
    initialization.write_padding(tmp_path, None)
    assert initialization.read_padding(tmp_path) is None


def test_an_export_of_ours_gives_its_exits_to_the_same_layers_only(
    config, trained, tokens, start_config, tmp_path
):
    model = dataclasses.replace(config, exit_layers=(2, 4))
    params = paligemma2.init_params(model, jax.random.key(11))
    folder = write_hugging_face(tmp_path / "hf", trained, config, tokens)
    heads = rows.spill({"exits": params["exits"]}, huggingface.exit_rows(model))
    write_safetensors_file(tmp_path / "hf" / "deevisum_heads.safetensors", heads)
    file = tmp_path / "hf" / "config.json"
    content = json.loads(file.read_text())
    policy = {"confidence": "max_probability", "thresholds": [0.9]}
    content["deevisum"] = {"format": 2, "exit_layers": [2, 4], "exit_policy": policy}
    file.write_text(json.dumps(content))
    given = start_config(folder)
    check(given, config.llm.vocab_size)
    loaded = load(given, model)
    jax.tree.map(np.testing.assert_array_equal, loaded["exits"], params["exits"])
    with pytest.raises(UserError, match=r"\(2, 4\), not after model\.exit_layers=\(3, 4\)"):
        check(start_config(folder, "model.exit_layers=(3, 4)"), config.llm.vocab_size)


def test_converted_weights_keep_their_image_size(npz, start_config, tmp_path):
    weights.convert(weights.open_source(npz, image_size=56), tmp_path / "weights")
    given = start_config(str(tmp_path / "weights"))
    assert initialization.settle(given, tmp_path)[0].model.image_size == 56
    with pytest.raises(UserError, match=r"converted for pictures of 56 .* --image_size 28"):
        check(start_config(str(tmp_path / "weights"), "model.image_size=28"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("from_scrach", "there is no such file or folder; .* did you mean 'from_scratch'"),
        ("google/paligemma2-3b", "hf download google/paligemma2-3b --local-dir paligemma2-3b"),
        ("nothing/at/all", "there is no such file or folder; correct the path"),
        ("gone.npz", r"gone\.npz does not exist"),
        ("https://host/pt.npz", r"neither a path nor in a bucket \(gs, s3\); download it"),
        ("one.safetensors", "one file of a checkpoint; give its folder"),
        ("model.gguf", "this file is no checkpoint; give an .npz"),
        ("adapter", "this is an adapter and no model; merge it"),
        ("bare", "has weights and no config.json with a model_type"),
        ("empty", r"no run of ours \(it lacks config\.json, tokenizer\.model"),
        ("pickle", r"pytorch_model\.bin is a pickle, which is not read"),
        ("unfetched", "a pointer of git-lfs and not the file itself; run git lfs pull"),
    ],
)
def test_what_nothing_can_start_from_is_named(
    folder, start_config, tmp_path, monkeypatch, given, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("one.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    for name in ("adapter", "bare", "empty", "pickle", "unfetched"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"")
    for name in ("pickle", "unfetched"):
        shutil.copy(pathlib.Path(folder) / "config.json", tmp_path / name)
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / "unfetched" / "model.safetensors").write_bytes(pointer)
    with pytest.raises(UserError, match=message):
        initialization.find(start_config(given))


def test_damaged_facts_of_converted_weights_are_refused(npz, start_config, tmp_path):
    weights.convert(weights.open_source(npz), tmp_path / "weights")
    (tmp_path / "weights" / "weights.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"weights\.json is damaged or not of this version; run"):
        initialization.settle(start_config(str(tmp_path / "weights")), tmp_path)


def test_a_run_cannot_start_from_another_with_other_pieces(tmp_path, start_config, other_run):
    given = tmp_path / "given.model"
    tokenizer.train_tokenizer(["yes", "no"], given, vocab_size=280)
    with pytest.raises(UserError, match=r"is not the tokenizer of .* leave data\.tokenizer empty"):
        check(start_config(str(other_run), f"data.tokenizer={given}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.exit_layers=(3, 4)", r"\(2, 4\), not after model\.exit_layers=\(3, 4\)"),
        ("model.variant=quickstart_student", r"is a tiny, not model\.variant=quickstart_student"),
        ("model.image_size=56", r"trained on pictures of 28 pixels, not of model\.image_size=56"),
    ],
)
def test_a_run_of_another_model_is_no_start(start_config, other_run, override, message):
    with pytest.raises(UserError, match=message):
        check(start_config(str(other_run), override))


def test_a_run_that_misses_a_part_is_no_start(start_config, other_run):
    (other_run / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"it lacks tokenizer\.model\)"):
        initialization.find(start_config(str(other_run)))


def test_the_3b_s_config_is_sound():
    config = config_lib.from_file(str(TINY_CONFIG.with_name("paligemma2_3b.py")))
    model = experiment.model_config(config)
    assert model.exit_layers == (8, 13, 18, 26)
    assert model.llm.vocab_size == 257_152


def test_training_starts_from_released_weights_and_keeps_what_export_needs(
    folder, tokens, trained, data_dir, tmp_path
):
    workdir = tmp_path / "run"
    overrides = (
        f"initialization={folder}",
        f"data.data_dir={data_dir}",
        *TINY_MESH,
        "data.text_len=300",  # so small a tokenizer spells most words out
        "total_steps=1",
        "optim.warmup_steps=0",
        "optim.learning_rate=1e-30",
        "eval.ablate_inputs=False",
    )
    flags = [f"--config.{override}" for override in overrides]
    assert main.main(["--config", str(TINY_CONFIG), "--workdir", str(workdir), *flags]) == 0
    kept = json.loads((workdir / "config.json").read_text())
    assert kept["model"]["final_logits_softcap"] == 30
    assert kept["model"]["sliding_window"] == 4096
    assert kept["data"]["resize"] == "bicubic"
    theirs = released.open_released(folder)
    model = experiment.model_config(
        config_lib.load(workdir / "config.json"), tokenizer.load_tokenizer(tokens)
    )
    np.testing.assert_array_equal(initialization.read_padding(workdir), theirs.vocab_padding(model))
    with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
        params = saved.restore_params(saved.best_step, on_the_mesh(model))
    # After one step of no length.
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6),
        {name: params[name] for name in ("img", "llm")},
        trained,
    )


def test_processes_together_read_what_one_reads(npz, folder, tokens, tiny_config, tmp_path):
    weights.convert(weights.open_source(npz), tmp_path / "converted")
    write_run(tmp_path / "run", tiny_config())
    starts = [npz, folder, str(tmp_path / "converted"), str(tmp_path / "run")]
    expected = process_work.load(starts, str(tokens))
    assert len(set(expected.values())) == 2  # three forms of one model, and another
    for process in processes.run_function(2, "load", starts, str(tokens), timeout_s=150):
        assert process.status == 0, process.err
        assert json.loads(process.out.splitlines()[-1]) == expected


# ---- Adapters ----

FLOAT = LoraConfig(rank=2, alpha=6.0)
NF4 = LoraConfig(rank=2, alpha=6.0, towers=("llm", "img"), base="nf4", tile=16)


def logits(model: paligemma2.PaliGemma2Config, params) -> np.ndarray:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 1, 28, 28, 3)).astype(np.uint8)
    tokens = rng.integers(2, 256, (2, 6)).astype(np.int32)
    mask = np.ones((2, 6), bool)

    @jax.jit
    def all_of(params):
        bound = paligemma2.bind(model, params)
        x, _ = bound.run_layers(bound.embed(frames, tokens, ~mask, mask))
        return bound.logits(bound.llm.final_norm(x.x))

    return np.asarray(all_of(jax.device_get(params)))


def parts(params) -> dict[str, np.ndarray]:
    return jax.device_get(dict(sharding._leaves(params)))


@pytest.mark.parametrize("kind", ["npz", "folder", "converted"])
def test_released_weights_get_adapters_that_change_nothing_yet(
    kind, npz, folder, tokens, config, trained, start_config, tmp_path
):
    given = {"npz": npz, "folder": folder}.get(kind)
    if given is None:
        given = str(tmp_path / "weights")
        weights.convert(weights.open_source(npz, tokenizer_path=str(tokens)), tmp_path / "weights")
    model = dataclasses.replace(config, exit_layers=(2, 4), lora=FLOAT)
    params = load(start_config(given), model)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(
        lambda leaf: leaf.sharding, on_the_mesh(model)
    )
    found, expected = parts(params), parts(trained)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)
    drawn = {path for path in found if path.endswith("_lora_a")}
    assert len(drawn) == 5
    assert all(np.any(found[path]) for path in drawn)
    assert not any(np.any(found[path]) for path in found if path.endswith("_lora_b"))
    plain = dataclasses.replace(model, lora=None)
    np.testing.assert_array_equal(
        logits(model, params), logits(plain, trained | {"exits": params["exits"]})
    )


def test_released_weights_are_quantised_where_they_land(npz, config, trained, start_config):
    model = dataclasses.replace(config, lora=NF4)
    params, wanted = load(start_config(npz), model), on_the_mesh(model)
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(
        lambda leaf: leaf.sharding, wanted
    )
    found = parts(params)
    for path, leaf in parts(lora.quantize(trained, NF4)).items():
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("kind", ["npz", "folder", "converted"])
def test_of_what_is_quantised_one_float_matrix_is_there_at_a_time(
    kind, npz, folder, tokens, config, trained, start_config, tmp_path, monkeypatch
):
    given = {"npz": npz, "folder": folder}.get(kind)
    if given is None:
        given = str(tmp_path / "weights")
        weights.convert(weights.open_source(npz, tokenizer_path=str(tokens)), tmp_path / "weights")
    model = dataclasses.replace(config, lora=NF4)
    matrices = {
        leaf.shape
        for leaf in jax.tree.leaves(on_the_mesh(model), is_leaf=lambda x: isinstance(x, QArray))
        if isinstance(leaf, QArray)
    }
    assert len(matrices) == 5
    before = {id(array): array for array in jax.live_arrays()}  # kept, as numbers are used again
    counts, quantize = {}, lora.quantize

    def counted(params, config):
        there = [
            array
            for array in jax.live_arrays()
            if array.shape in matrices and array.dtype == np.float32 and id(array) not in before
        ]
        flat = flatten_dict(params, sep="/")
        if len(flat) == 1:  # not a whole model's shapes
            counts[next(iter(flat))] = len(there)
        return quantize(params, config)

    monkeypatch.setattr(lora, "quantize", counted)
    monkeypatch.setattr(checkpoints, "_GROUP_BYTES", 1)  # as matrices larger than a group are read
    params = load(start_config(given), model)
    assert list(counts.values()) == [1] * 5
    found = parts(params)
    for path, leaf in parts(quantize(trained, NF4)).items():
        np.testing.assert_array_equal(found[path], leaf)


@pytest.fixture
def adapted_run(other_run, tiny_config):
    """Makes a run that has learned adapters; returns its folder, its model and parameters."""

    def make(learned: LoraConfig):
        group = dataclasses.asdict(learned).items()
        config = tiny_config(*(f"model.lora.{name}={value!r}" for name, value in group))
        shutil.rmtree(other_run / "checkpoints")
        config_lib.save(config, other_run / "config.json")
        vocab_size = paligemma2.table_rows(280)
        model = paligemma2.get_config(
            "tiny", llm={"vocab_size": vocab_size}, exit_layers=(2, 4), lora=learned
        )
        # Adapters that have learned something: b is not zeros.
        learn = lambda path, leaf: leaf + 0.05 if sharding._name(path).endswith("_b") else leaf
        drawn = paligemma2.init_params(model, jax.random.key(3))
        params = jax.tree.map_with_path(learn, drawn)
        assert np.abs(logits(model, params) - logits(model, drawn)).max() > 0.1
        untrained.save_params(other_run, config, params)
        with checkpoints.Checkpoints(other_run / "checkpoints") as saved:
            params = saved.restore_params(1, on_the_mesh(model))
        return other_run, model, params

    return make


@pytest.mark.parametrize("learned", [FLOAT, NF4], ids=["float", "nf4"])
def test_a_run_with_the_same_adapters_goes_on_with_them(learned, adapted_run, start_config):
    folder, model, params = adapted_run(learned)
    found = load(start_config(str(folder)), model)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(params))


def test_a_run_s_adapters_are_added_before_its_weights_are_quantised(adapted_run, start_config):
    folder, model, params = adapted_run(FLOAT)
    target = dataclasses.replace(model, lora=NF4)
    found = parts(load(start_config(str(folder)), target))
    merged = lora.merge(params, FLOAT, "float32")
    for path, leaf in parts(lora.quantize(merged, NF4)).items():
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize("learned", [FLOAT, NF4], ids=["float", "nf4"])
@pytest.mark.parametrize("wanted", [None, LoraConfig(rank=3)], ids=["none", "other"])
def test_a_run_s_other_adapters_are_added_to_its_weights(
    learned, wanted, adapted_run, start_config
):
    folder, model, params = adapted_run(learned)
    target = dataclasses.replace(model, lora=wanted)
    found = load(start_config(str(folder)), target)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(
        lambda leaf: leaf.sharding, on_the_mesh(target)
    )
    np.testing.assert_allclose(logits(target, found), logits(model, params), atol=1e-5)


def test_adapters_over_codes_are_not_added_to_be_rounded_again(adapted_run, start_config):
    folder, *_ = adapted_run(NF4)
    lines = ("model.lora.rank=4", "model.lora.base=nf4", "model.lora.tile=16")
    with pytest.raises(UserError, match=r"rank=2, alpha=6\.0, .*'nf4', tile=16\).*base=None"):
        check(start_config(str(folder), *lines))
    check(start_config(str(folder), "model.lora.rank=4"))  # rounded no second time
