"""What goes out is loaded again by those it is for, and says the same there."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch
import transformers
from etils import epath

from deevisum_jax import config as config_lib
from deevisum_jax import datasets, experiment, initialization, runs, weights
from deevisum_jax.config import MergeConfig
from deevisum_jax.convert import big_vision, rows
from deevisum_jax.convert.tensors import STORED_DTYPES, read
from deevisum_jax.data import pipeline, prompts, tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.inference import generation, scoring
from deevisum_jax.inference.calibration import Calibration, Point, Promise
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models import paligemma2
from tests import untrained
from tests.checkpoint_files import write_big_vision, write_hugging_face, write_run
from tests.hf_reference import hf_inputs

COMPOSITE = 1e-4
THRESHOLD = 0.75


@pytest.fixture(autouse=True)
def _quiet_and_exact(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "hf_modules"))
    transformers.utils.logging.set_verbosity_error()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory) -> pathlib.Path:
    """A run's folder with random parameters loud enough for exits to differ."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    overrides = (f"eval.exit_threshold={THRESHOLD}", "model.exit_layers=(1, 2, 4)")
    write_run(workdir, tiny_config(*overrides))
    (workdir / "report.json").write_text(json.dumps(REPORT))
    return workdir


REPORT = {
    "tau": 0.3, "rho": 0.4, "f1": 0.5, "tau_early_exit": 0.2, "f1_early_exit": 0.4, "steps": 1,
    "exit_policy": {"confidence": "max_probability", "thresholds": [THRESHOLD, THRESHOLD]},
    "avg_depth": 2.0, "compute_saved": 0.3, "wall_saved": None, "rows": {},
    "protocols": {"tau": "t", "rho": "r", "f1": "f"}, "row_protocols": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("exported") / "tiny"
    weights.export_hf(weights.open_source(str(run)), out)
    return out


@pytest.fixture(scope="module")
def ours(run):
    source = weights.open_source(str(run))
    return source.config, source.load(), source


@pytest.fixture(scope="module")
def segments(run, data_dir):
    """All segments of the test split, as scoring sees them."""
    source = weights.open_source(str(run))
    records = datasets.Dataset(
        config_lib.DataConfig(dataset="synthetic/tiny", data_dir=str(data_dir))
    ).split("test")
    template = prompts.load_template(str(run / runs.TEMPLATE_FILE))
    encoder = experiment.make_encoder(source.run, source.tokens, template, 28)
    [batch] = pipeline.in_order(experiment.make_source(source.run, records, encoder), batch_size=16)
    return {name: field[batch["valid"]] for name, field in batch.items()}


def test_transformers_loads_it_with_nothing_missing_or_left(exported, ours):
    config, params, _ = ours
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    table = theirs.get_input_embeddings().weight.numpy()
    np.testing.assert_array_equal(
        table[: config.llm.vocab_size], params["llm"]["embedder"]["input_embedding"]
    )


def test_logits_and_the_next_32_tokens_are_the_same(exported, ours, segments):
    config, params, _ = ours
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(exported).eval()
    V, image_token = config.llm.vocab_size, theirs.config.image_token_id
    batch = {name: field[:4] for name, field in segments.items()}
    prompt = batch["mask_input"] & ~batch["mask_ar"]
    inputs = hf_inputs(
        batch["frames"], batch["tokens"], batch["mask_ar"], prompt, image_token=image_token
    )
    model = paligemma2.bind(config, params)
    embedded = model.embed(batch["frames"], batch["tokens"], batch["mask_ar"], prompt)
    embedded, _ = model.run_layers(embedded)
    got = np.asarray(model.logits(model.llm.final_norm(embedded.x)))
    want = theirs(**inputs).logits.numpy()[:, :, :V]
    real = inputs["attention_mask"].numpy().astype(bool)
    np.testing.assert_allclose(got[real], want[real], atol=COMPOSITE)

    generated = generation.generate(
        config, params, batch["frames"], batch["tokens"], prompt,
        sampling=generation.Sampling(max_new_tokens=32, stop_tokens=()), key=jax.random.key(0),
    )  # fmt: skip
    theirs.generation_config.eos_token_id = None  # on behind the end, as ours here
    for row in range(4):
        # Generation there wants every row without pads behind.
        one = {
            name: field[row : row + 1] for name, field in inputs.items() if name != "pixel_values"
        }
        length = int(one["attention_mask"].sum())
        one = {name: field[:, :length] for name, field in one.items()}
        pixels = inputs["pixel_values"][row : row + 1]
        tokens = theirs.generate(
            **one, pixel_values=pixels, max_new_tokens=32, min_new_tokens=32, do_sample=False
        )[0, length:]
        np.testing.assert_array_equal(tokens, generated.tokens[row])


def test_the_same_exits_and_scores_in_pytorch(exported, ours, segments):
    config, params, source = ours
    theirs = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    prompt = segments["mask_input"] & ~segments["mask_ar"]
    pixels = torch.from_numpy(segments["frames"] / np.float32(127.5) - 1).permute(0, 1, 4, 2, 3)
    scores = theirs.score(
        pixels.float(), torch.from_numpy(segments["tokens"]), torch.from_numpy(prompt)
    )
    model = paligemma2.bind(config, params)
    embedded = model.embed(segments["frames"], segments["tokens"], segments["mask_ar"], prompt)
    _, all_rows = model.run_layers(embedded, collect=embedded.last_prefix_row)
    exits = model.exits(jnp.stack([all_rows[layer - 1] for layer in config.exit_layers]))
    policy, _ = runs.exit_policy(source.start.folder, source.run)
    index = policy.exit_index(scoring.read(exits))
    layers = np.asarray(config.exit_layers)[index]
    np.testing.assert_array_equal(scores.exit_layer, layers)
    assert set(layers.tolist()) == {1, 2, 4}, "the test wants all exits taken"
    rows_ = np.arange(len(index))
    np.testing.assert_allclose(
        scores.class_logits, np.asarray(exits.class_logits)[index, rows_], atol=COMPOSITE
    )
    np.testing.assert_allclose(
        scores.importance, jax.nn.sigmoid(exits.importance)[index, rows_], atol=COMPOSITE
    )
    np.testing.assert_allclose(
        scores.cosine, np.asarray(exits.cosine)[index, rows_], atol=COMPOSITE
    )
    assert scores.layers_run == layers.sum()


def test_the_processor_makes_the_prompts_that_it_was_trained_with(exported, ours):
    _, _, source = ours
    processor = transformers.AutoProcessor.from_pretrained(exported, backend="pil")
    model = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True)
    text = model.prompt(title="A dog", transcript="hello there", sound="loud")
    image = np.zeros((30, 40, 3), np.uint8)
    inputs = processor(images=[image], text=["<image>" + text])
    template = prompts.load_template(str(source.start.folder / runs.TEMPLATE_FILE))
    encoder = experiment.make_encoder(source.run, source.tokens, template, 28).prompts
    encoded = encoder.encode(title="A dog", transcript="hello there", sound="loud", label=0)
    prefix = encoded["tokens"][~encoded["mask_ar"]]
    patches = source.config.img.num_patches
    np.testing.assert_array_equal(inputs["input_ids"][0][patches:], prefix)


def test_what_lies_in_the_folder(exported):
    names = sorted(path.name for path in exported.iterdir())
    assert names == [
        "README.md",
        "config.json",
        "deevisum_heads.safetensors",
        "generation_config.json",
        "model.safetensors",
        "modeling_deevisum.py",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    section = json.loads((exported / "config.json").read_text())["deevisum"]
    assert section["exit_layers"] == [1, 2, 4]
    assert section["exit_policy"] == {
        "confidence": "max_probability",
        "thresholds": [THRESHOLD, THRESHOLD],
    }
    assert section["calibration"] is None
    card = (exported / "README.md").read_text()
    assert "# tiny" in card
    assert "trained from scratch on synthetic/tiny" in card
    assert "| Kendall tau | 0.300 | 0.200 | t |" in card


def test_a_calibration_goes_with_the_export_but_for_its_curve(ours, monkeypatch, tmp_path):
    policy = ExitPolicy(confidence="agreement", thresholds=(np.inf, 0.9))
    point = Point(
        policy=policy,
        metrics={"f1": 0.5, "tau": 0.3},
        losses={"f1": 0.0, "tau": 0.0},
        p_value=0.01,
        passed=True,
        avg_depth=2.0,
        flops_saved=0.4,
        exit_rate=(0.0, 1.0, 0.0),
    )
    promise = Promise(epsilons={"f1": 0.01}, delta=0.1)
    off = dataclasses.replace(point, policy=ExitPolicy.off(3))
    found = Calibration(promise=promise, num_search=10, num_test=30, curve=(off, point), chosen=1)
    monkeypatch.setattr(runs, "exit_policy", lambda *_: (policy, found))
    monkeypatch.setattr(weights.Source, "load", lambda _: ours[1])
    weights.export_hf(ours[2], tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["deevisum"]
    assert section["exit_policy"] == {"confidence": "agreement", "thresholds": [None, 0.9]}
    assert section["calibration"] == {
        "promise": {"epsilons": {"f1": 0.01}, "delta": 0.1, "bound": "exact"},
        "num_search": 10,
        "num_test": 30,
        "text": found.text,
    }
    assert found.text in (tmp_path / "out" / "README.md").read_text()
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model._policy("config", None) == ("agreement", (np.inf, 0.9))


def test_what_only_distillation_trained_stays_with_the_run(run, ours, tmp_path):
    """Projections to the hidden states of teachers."""
    projection = {"teacher": {"kernel": jnp.ones((2, 32, 48))}}
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    untrained.save_params(tmp_path / "run", ours[2].run, ours[1] | {"distill": projection})
    source = weights.open_source(str(tmp_path / "run"))
    assert set(source.load()) == {"img", "llm", "exits"}
    weights.export_hf(source, tmp_path / "out")
    for name in ("model.safetensors", "deevisum_heads.safetensors"):
        with safetensors.safe_open(tmp_path / "out" / name, "np") as found:
            assert not [key for key in found.keys() if "distill" in key]  # noqa: SIM118
    weights.export_big_vision(source, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert not [key for key in found if "distill" in key]


def test_weights_are_cut_into_files_of_the_size_asked_for(run, tmp_path):
    weights.export_hf(weights.open_source(str(run)), tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    for shard in shards:
        names = [name for name, file in index["weight_map"].items() if file == shard]
        assert (tmp_path / "out" / shard).stat().st_size < 100_000 + 20_000 or len(names) == 1
    _, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_big_vision_s_loader_takes_the_npz(run, ours, tmp_path, dtype):
    config, params, source = ours
    weights.export_big_vision(source, tmp_path / "tiny.npz", dtype=dtype)
    loaded = dict(np.load(tmp_path / "tiny.npz", allow_pickle=False))
    wanted = rows.spill(
        {name: params[name] for name in ("img", "llm")}, big_vision.paligemma2_rows(config)
    )
    assert sorted(loaded) == sorted(f"params/{name}" for name in wanted)
    for name, tensor in wanted.items():
        value = loaded[f"params/{name}"]
        if dtype:
            # numpy knows no bfloat16; big_vision's `recover_dtype` wants void of two bytes.
            assert value.dtype.type is np.void
            assert value.itemsize == 2
            value = value.view(STORED_DTYPES[dtype])
        np.testing.assert_array_equal(value, read(tensor).astype(value.dtype))


@pytest.fixture(scope="module")
def tokens(run) -> pathlib.Path:
    return run / runs.TOKENIZER_FILE


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def released(request, tokens, tmp_path_factory):
    """Released weights of both forms: `(npz, folder)`."""
    folder = tmp_path_factory.mktemp(f"released_{request.param}")
    size = paligemma2.table_rows(tokenizer.load_tokenizer(tokens).vocab_size)
    config = paligemma2.get_config("tiny", llm={"vocab_size": size}, param_dtype=request.param)
    params = paligemma2.init_params(config, jax.random.key(5))
    return (
        write_big_vision(folder / "pt_tiny.npz", params, config),
        write_hugging_face(folder / "hf", params, config, tokens),
    )


def test_an_npz_comes_back_as_it_went_in(released, tmp_path):
    weights.export_big_vision(weights.open_source(released[0]), tmp_path / "again.npz")
    assert_same_npz(released[0], tmp_path / "again.npz")


def test_a_hugging_face_folder_comes_back_as_it_went_in(released, tmp_path):
    weights.export_hf(weights.open_source(released[1]), tmp_path / "again")
    assert_same_folder(released[1], tmp_path / "again")


def test_converted_weights_give_back_what_they_were_made_of(released, tmp_path):
    for source in released:
        folder = tmp_path / pathlib.Path(source).stem
        weights.convert(weights.open_source(source), folder)
        again = weights.open_source(str(folder))
        if source.endswith(".npz"):
            weights.export_big_vision(again, tmp_path / "again.npz")
            assert_same_npz(source, tmp_path / "again.npz")
        else:
            weights.export_hf(again, tmp_path / "again")
            assert_same_folder(source, tmp_path / "again")


def test_either_form_becomes_the_other(released, tokens, tmp_path):
    npz, folder = released
    weights.export_big_vision(weights.open_source(folder), tmp_path / "made.npz")
    assert_same_npz(npz, tmp_path / "made.npz")
    weights.export_hf(weights.open_source(npz, tokenizer_path=str(tokens)), tmp_path / "made")
    before, after = load_folder(folder), load_folder(tmp_path / "made")
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        # The rows behind the vocabulary are Hugging Face's own.
        shared = min(len(tensor), len(after[name]))
        assert torch.equal(tensor[:shared], after[name][:shared]), name


def assert_same_npz(before, after):
    before, after = (dict(np.load(path, allow_pickle=False)) for path in (before, after))
    assert sorted(before) == sorted(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert value.tobytes() == after[name].tobytes()


def assert_same_folder(before, after):
    before, after = load_folder(before), load_folder(after)
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def load_folder(folder) -> dict[str, torch.Tensor]:
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype="auto"
    ).state_dict()


def test_released_weights_are_exported_without_exits_and_with_google_s_terms(released, tmp_path):
    weights.export_hf(weights.open_source(released[1]), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "deevisum_heads.safetensors" not in names
    assert "modeling_deevisum.py" not in names
    assert "NOTICE" in names
    assert "license: gemma" in (tmp_path / "out" / "README.md").read_text()


def test_mistakes_leave_nothing_behind(run, released, tokens, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"brings no tokenizer.*--tokenizer"):
        weights.export_hf(weights.open_source(released[0]), out)
    with pytest.raises(UserError, match="there is no such file or folder; correct the path"):
        weights.open_source(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="only chosen for released"):
        weights.open_source(str(run), dtype="bfloat16")
    with pytest.raises(UserError, match="is in our own form already"):
        weights.convert(weights.open_source(str(run)), out)
    with pytest.raises(UserError, match=r"out does not end in \.npz"):
        weights.export_big_vision(weights.open_source(str(run)), out)
    (tmp_path / "there.npz").touch()
    with pytest.raises(UserError, match="is there already"):
        weights.export_big_vision(weights.open_source(str(run)), tmp_path / "there.npz")
    other = tmp_path / "other.model"
    tokenizer.train_tokenizer(["yes", "no"], other, vocab_size=280)
    with pytest.raises(UserError, match=r"has \d+ pieces, the model \d+ rows"):
        weights.open_source(released[0], tokenizer_path=str(other))
    for source in (run, released[1]):
        weights.open_source(str(source), tokenizer_path=str(tokens))  # its own
        with pytest.raises(UserError, match=r"brings its own tokenizer.* has other pieces"):
            weights.open_source(str(source), tokenizer_path=str(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.model", "there.npz"]


def test_a_run_that_merges_frames_is_not_exported(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "merging")
    config = config_lib.load(epath.Path(folder / "config.json"))
    data = dataclasses.replace(config.data, num_frames=3)
    model = dataclasses.replace(config.model, merge=MergeConfig(num_keyframes=1))
    config_lib.save(
        dataclasses.replace(config, data=data, model=model), epath.Path(folder / "config.json")
    )
    source = weights.open_source(str(folder))
    for export, out in ((weights.export_hf, "hf"), (weights.export_big_vision, "it.npz")):
        with pytest.raises(
            UserError, match=r"merges frames .*num_keyframes=1.*summarize, or train"
        ):
            export(source, tmp_path / out)
        assert not (tmp_path / out).exists()


def test_a_source_that_is_damaged_midway_leaves_nothing_behind(released, tokens, tmp_path):
    damaged = tmp_path / "damaged.npz"
    content = bytearray(pathlib.Path(released[0]).read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    source = weights.open_source(str(damaged), tokenizer_path=str(tokens))
    for write, out in (
        (weights.export_hf, tmp_path / "hf"),
        (weights.convert, tmp_path / "weights"),
        (weights.export_big_vision, tmp_path / "again.npz"),
    ):
        with pytest.raises(UserError, match=r"damaged\.npz.*params/"):
            write(source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.npz"]


def test_exits_go_out_and_come_back(exported, ours, tmp_path):
    config, params, _ = ours
    again = weights.open_source(str(exported))
    assert again.config.exit_layers == config.exit_layers
    jax.tree.map(np.testing.assert_array_equal, again.load()["exits"], params["exits"])
    weights.export_hf(again, tmp_path / "again")
    for name in ("deevisum_heads.safetensors", "model.safetensors", "modeling_deevisum.py"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    sections = [
        json.loads((folder / "config.json").read_text())["deevisum"]
        for folder in (exported, tmp_path / "again")
    ]
    assert sections[0] == sections[1]
    with pytest.raises(UserError, match="with exit heads, which converted weights do not hold"):
        weights.convert(again, tmp_path / "weights")


def test_an_export_whose_heads_are_lost_or_damaged_is_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "in")
    (tmp_path / "in" / "deevisum_heads.safetensors").unlink()
    with pytest.raises(UserError, match=r"deevisum_heads\.safetensors does not exist"):
        weights.open_source(str(tmp_path / "in"))
    shutil.copy(exported / "deevisum_heads.safetensors", tmp_path / "in")
    content = json.loads((exported / "config.json").read_text())
    content["deevisum"]["exit_layers"] = "2, 4"
    (tmp_path / "in" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: its section deevisum is damaged"):
        weights.open_source(str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/paligemma2-3b-pt-224", "google/paligemma2-3b-pt-224"),
        ("gs://b/paligemma2-10b-mix-448.b16.npz", "google/paligemma2-10b-mix-448"),
        ("google/paligemma2-3b-ft-docci-448", "google/paligemma2-3b-ft-docci-448"),
        ("/c/models--google--paligemma2-28b-pt-896/snapshots/a1b", "google/paligemma2-28b-pt-896"),
        ("pt_3b_224.npz", None),
        # Of one's own, though named after them.
        ("/models/paligemma2-3b-tvsum-ours-224", None),
        ("/models/ours-paligemma2-3b-pt-224", None),
        ("/models/paligemma2-3b-pt-224-tuned", None),
        ("/models/paligemma2-3b-pt-224/tuned", None),
        ("/c/models--someone--paligemma2-3b-pt-224/snapshots/a1b", None),
        ("paligemma2-3b-mix-896", None),  # there is none
    ],
)
def test_the_card_names_a_base_model_that_the_path_still_tells(path, name):
    assert weights._base_model(path) == name


def test_a_run_knows_what_its_weights_descend_from(run, released, tiny_config, tmp_path):
    """From what it noted when it began; wherever its start has gone since."""
    weights.convert(weights.open_source(released[1]), tmp_path / "weights")
    starts = {
        "from_scratch": None,
        str(tmp_path / "weights"): released[1],
        released[0]: released[0],
        str(run): None,
    }
    for given, root in starts.items():
        folder = tmp_path / "run"
        shutil.copytree(run, folder, dirs_exist_ok=True)
        config = tiny_config(f"initialization={given}", "model.exit_layers=(1, 2, 4)")
        config_lib.save(config, folder / "config.json")
        start = initialization.find(config)
        initialization.keep(folder, start, weights.open_source(str(folder)).config)
        assert weights.open_source(str(folder)).start.origin == root
        if root is None:
            weights.export_hf(weights.open_source(str(folder)), tmp_path / "scratch")
            again = weights.open_source(str(tmp_path / "scratch"))
            assert again.start.origin is None  # an export tells it on
            shutil.rmtree(tmp_path / "scratch")


def test_a_run_of_before_its_origin_was_noted_is_under_suspicion(run, tiny_config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "origin.json").unlink(missing_ok=True)
    assert weights.open_source(str(folder)).start.origin is None  # from_scratch
    config = tiny_config(f"initialization={tmp_path / 'gone'}", "model.exit_layers=(1, 2, 4)")
    config_lib.save(config, folder / "config.json")
    assert weights.open_source(str(folder)).start.origin == str(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.json", r"report\.json is no JSON .*; evaluate the run again"),
        ("origin.json", r"origin\.json is no JSON .*; delete it"),
    ],
)
def test_a_damaged_note_of_a_run_is_named(run, tmp_path, name, message):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).write_text("{half")
    with pytest.raises(UserError, match=message):
        weights.export_hf(weights.open_source(str(folder)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
