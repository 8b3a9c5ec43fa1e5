"""The PyTorch scorer of an exported folder against this package's own model, in float32."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax.traverse_util import flatten_dict

from deevisum_jax import convert
from deevisum_jax.convert import hf_folder
from deevisum_jax.inference import scoring
from deevisum_jax.inference.exit_policy import CONFIDENCES, ExitPolicy, confidence
from deevisum_jax.models import paligemma2
from deevisum_jax.typing import Batch, ExitScores
from tests.hf_reference import IMAGE_TOKEN, hf_inputs, reference

CODE = pathlib.Path(convert.__file__).parent / "torch" / "modeling_deevisum.py"
EXITS = (1, 2, 4)
WIDTH = 32
# Of 96 random segments at least a tenth leaves at each exit, by whichever confidence.
THRESHOLDS = {
    "max_probability": (0.8, 0.8),
    "entropy": (0.3, 0.2),
    "cosine": (0.2, 0.15),
    "agreement": (0.5, 0.8),
}
THRESHOLD = 0.8
SECTION = {
    "format": 2,
    "exit_layers": list(EXITS),
    "exit_policy": {"confidence": "max_probability", "thresholds": [THRESHOLD, THRESHOLD]},
    "calibration": None,
    "label_tokens": [3, 4],
    "prompt_template": "title: {title}\ntranscript: {transcript}\nsound: {sound}",
    "num_frames": 1,
    "segment_s": 2.0,
    "text_len": 48,
    "resize": "bilinear",
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A folder, and what was put into it."""

    folder: pathlib.Path
    config: paligemma2.PaliGemma2Config
    params: paligemma2.Params


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind(tmp_path_factory):
    """Code of models is copied into a cache, and imported from there."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    ref = reference()
    config = dataclasses.replace(ref.config, exit_layers=EXITS)
    rng = np.random.default_rng(0)
    normal = lambda scale, *shape: (scale * rng.normal(size=shape)).astype(np.float32)
    exits = {
        "norm": {"scale": normal(0.3, 3, WIDTH)},
        "classifier": {"kernel": normal(0.25, 3, WIDTH, 2), "bias": normal(0.5, 3, 2)},
        "importance": {"kernel": normal(0.25, 3, WIDTH, 1), "bias": normal(0.5, 3, 1)},
        "prototype": normal(0.2, 3, WIDTH),
    }
    folder = tmp_path_factory.mktemp("exported")
    ref.theirs.save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    # The image tower's names in Google's releases, and so in exported folders.
    tensors = {
        re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): tensor
        for name, tensor in tensors.items()
    }
    assert "language_model.model.embed_tokens.weight" in tensors
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    shutil.copy(CODE, folder)
    edit_config(
        folder,
        lambda c: c.update(
            auto_map={"AutoModel": "modeling_deevisum.DeevisumModel"}, deevisum=SECTION
        ),
    )
    save_heads(
        folder,
        {
            f"exits.{name}": torch.from_numpy(tensor)
            for name, tensor in flatten_dict(exits, sep=".").items()
        },
    )
    return Exported(folder, config, ref.params | {"exits": jax.tree.map(jnp.asarray, exits)})


@pytest.fixture(scope="module")
def model(exported):
    return load(exported.folder)


@pytest.fixture
def copy(exported, tmp_path):
    """The folder once more, to be spoilt."""
    return shutil.copytree(exported.folder, tmp_path / "copy")


def load(folder, **kwargs):
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs)


def edit_config(folder, edit):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def save_heads(folder, tensors):
    safetensors.torch.save_file(tensors, folder / "deevisum_heads.safetensors")


def policy(kind, *thresholds):
    return {"confidence": kind, "thresholds": list(thresholds)}


def load_heads(folder):
    return safetensors.torch.load_file(folder / "deevisum_heads.safetensors")


def segments(num, *, num_frames=1, T=9, padding="right"):
    """Random segments with prompts of 3 to T tokens, in this package's layout."""
    rng = np.random.default_rng(1)
    real = np.arange(T) < rng.integers(3, T + 1, (num, 1))
    real[0] = True
    return {
        "frames": rng.integers(0, 256, (num, num_frames, 28, 28, 3)).astype(np.uint8),
        "tokens": rng.integers(2, 512, (num, T)).astype(np.int32),
        "mask_input": real if padding == "right" else real[:, ::-1].copy(),
    }


def ours(exported, found):
    """Every exit's scores by this package."""
    unread = dict.fromkeys(("mask_loss", "label", "score", "video_id", "segment", "valid"))
    batch = Batch(**found, mask_ar=~found["mask_input"], **unread)
    return score_ours(exported.config)(exported.params, batch)


@functools.cache
def score_ours(config):
    return jax.jit(lambda params, batch: paligemma2.bind(config, params).score(batch))


def theirs(found):
    """The same segments as the model in the folder takes them."""
    pixels = (found["frames"] / 127.5 - 1).astype(np.float32)
    return {
        "pixel_values": torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).copy()),
        "input_ids": torch.from_numpy(found["tokens"]),
        "attention_mask": torch.from_numpy(found["mask_input"]),
    }


def close(got, want, atol=1e-4):
    np.testing.assert_allclose(got.float().numpy(), np.asarray(want, np.float32), atol=atol)


def same(a, b, atol=1e-5):
    for field in ("importance", "summary_prob", "class_logits", "cosine"):
        close(getattr(a, field), getattr(b, field), atol)
    assert a.exit_layer.tolist() == b.exit_layer.tolist()


def test_loads_every_tensor_and_no_other(exported):
    model, info = load(exported.folder, output_loading_info=True)
    assert type(model).__name__ == "DeevisumModel"
    assert not model.training
    assert not any(info.values())
    for name, tensor in load_heads(exported.folder).items():
        assert torch.equal(model.exits.tensors()[name], tensor)


def test_loads_from_a_repository_on_the_hub(exported, model, tmp_path, monkeypatch):
    # Else some of transformers asks the Hub all the same, and waits for long where there is none.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--scorer"
    shutil.copytree(exported.folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    again = load("someone/scorer", revision="v1", cache_dir=tmp_path, local_files_only=True)
    found = theirs(segments(2))
    same(again(**found), model(**found), 0)


def test_the_folder_still_generates(exported):
    _, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        exported.folder, output_loading_info=True
    )
    assert not any(info.values())


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("num_frames", [1, 2])
def test_every_exit_says_what_ours_says(exported, model, num_frames, padding):
    found = segments(5, num_frames=num_frames, padding=padding)
    want, got = ours(exported, found), model.score_all(**theirs(found))
    assert got.class_logits.shape == (3, 5, 2)
    assert got.importance.shape == got.cosine.shape == (3, 5)
    close(got.class_logits, want.class_logits)
    close(got.importance, want.importance)
    close(got.cosine, want.cosine)
    assert np.abs(want.cosine).max() > 0.1


def test_a_prototype_of_zeros_has_no_direction(copy):
    """As in ours: no division by zero."""
    heads = load_heads(copy)
    heads["exits.prototype"].zero_()
    save_heads(copy, heads)
    assert not load(copy).score_all(**theirs(segments(2))).cosine.any()


@pytest.fixture(scope="module")
def scored(exported):
    """96 segments, and their scores at every exit, ours."""
    found = segments(96)
    return found, ours(exported, found)


@pytest.fixture(scope="module")
def many(scored):
    """And the exit that each leaves at under the exported policy."""
    return *scored, taken(scored[1], "max_probability", (THRESHOLD, THRESHOLD))


def taken(scores, kind, thresholds):
    """The exit that each segment leaves at, ours; none is left to how numbers are rounded."""
    read = scoring.read(scores)
    for x, threshold in enumerate(thresholds):
        sure = confidence(kind, read.at(x), read.at(x - 1) if x else None)
        assert np.abs(np.asarray(sure) - threshold).min() > 1e-5
    return ExitPolicy(confidence=kind, thresholds=thresholds).exit_index(read)


def assert_left(got, want, exits):
    """`exits`: number of the exit of each segment."""
    each = np.arange(len(exits))
    depth = np.array(EXITS)[exits]
    assert got.exit_layer.tolist() == depth.tolist()
    assert got.layers_run == depth.sum()
    close(got.class_logits, want.class_logits[exits, each])
    close(got.importance, jax.nn.sigmoid(want.importance)[exits, each])
    close(got.summary_prob, jax.nn.softmax(want.class_logits)[exits, each, 1])
    close(got.cosine, want.cosine[exits, each])


def test_every_segment_leaves_where_ours_does(model, many):
    found, want, exits = many
    assert np.bincount(exits, minlength=3).min() >= 10
    assert_left(model(**theirs(found)), want, exits)


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_every_confidence_lets_leave_whom_ours_lets(model, scored, kind):
    found, want = scored
    exits = taken(want, kind, THRESHOLDS[kind])
    # Nobody leaves at the first exit by agreement.
    at_each = np.bincount(exits, minlength=3)
    assert (at_each >= 10).tolist() == [kind != "agreement", True, True]
    got = model(**theirs(found), threshold=THRESHOLDS[kind], confidence=kind)
    assert_left(got, want, exits)


def test_agreement_is_with_what_was_said_of_the_same_segment(copy):
    """Of four exits: who leaves at the second is gone when the third compares."""
    exits, thresholds = (1, 2, 3, 4), (0.0, 0.6, 0.5)
    changed = {"exit_layers": list(exits), "exit_policy": policy("agreement", *thresholds)}
    edit_config(copy, lambda c: c["deevisum"].update(changed))
    save_heads(copy, {name: t[[0, 1, 2, 2]].clone() for name, t in load_heads(copy).items()})
    model, inputs = load(copy), theirs(segments(48))
    said = model.score_all(**inputs)
    want = ExitScores(**{name: getattr(said, name).numpy() for name in vars(said)})
    index = taken(want, "agreement", thresholds)
    assert np.bincount(index, minlength=4).tolist()[0] == 0
    assert np.bincount(index, minlength=4)[1:].min() >= 4
    got = model(**inputs)
    assert got.exit_layer.tolist() == np.array(exits)[index].tolist()
    close(got.cosine, want.cosine[index, np.arange(48)], 1e-5)


def test_the_file_that_stands_alone_knows_what_this_package_knows(model):
    made = sys.modules[type(model).__module__]
    assert made.CONFIDENCES == CONFIDENCES
    assert made.FORMAT == hf_folder.DEEVISUM_FORMAT
    assert made.HEADS_FILE == hf_folder.HEADS_FILE


def test_thresholds_may_be_one_for_all_or_one_for_each_exit(model, scored):
    found, want = scored
    inputs = theirs(found)
    exits = taken(want, "max_probability", (0.7, 0.7))
    assert_left(model.score(**inputs, threshold=0.7), want, exits)
    exits = taken(want, "max_probability", (np.inf, 0.7))
    assert np.bincount(exits, minlength=3)[0] == 0
    assert_left(model.score(**inputs, threshold=[None, 0.7]), want, exits)
    assert_left(model.score(**inputs, threshold=(float("inf"), 0.7)), want, exits)


def test_a_segment_that_is_just_sure_enough_leaves(model):
    """The threshold that is the confidence itself."""
    found = theirs(segments(1))
    first = model.score_all(**found).class_logits[0].softmax(-1).max().item()
    assert model.score(**found, threshold=first).exit_layer.item() == 1
    above = np.nextafter(np.float32(first), np.float32(1))
    assert model.score(**found, threshold=above).exit_layer.item() > 1


def rows_per_layer(model, call):
    """How many rows each layer was run on during the call."""
    rows = [0] * 4
    layers = model.model.language_model.layers

    def count(i, x):
        rows[i] += len(x)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: count(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    result = call()
    for hook in hooks:
        hook.remove()
    return result, rows


def test_no_layer_runs_for_segments_that_have_left(model, many):
    found, _, exits = many
    got, rows = rows_per_layer(model, lambda: model(**theirs(found)))
    depth = np.array(EXITS)[exits]
    assert rows == [(depth > layer).sum() for layer in range(4)]
    assert got.layers_run == sum(rows) == depth.sum() < 4 * 96


def test_no_layer_runs_when_all_segments_have_left(model, many):
    found, _, exits = many
    found = {name: rows[exits == 0] for name, rows in found.items()}
    _, rows = rows_per_layer(model, lambda: model(**theirs(found)))
    assert rows == [(exits == 0).sum(), 0, 0, 0]


def test_without_a_threshold_all_segments_go_on_to_the_last_exit(exported, model):
    found = segments(3)
    got = model.score(**theirs(found), threshold=None)
    assert got.exit_layer.tolist() == [4, 4, 4]
    assert got.layers_run == 12
    close(got.class_logits, ours(exported, found).class_logits[-1])


def test_layers_behind_the_last_exit_are_not_run(copy):
    changed = {"exit_layers": [1, 2], "exit_policy": policy("cosine", None)}
    edit_config(copy, lambda c: c["deevisum"].update(changed))
    save_heads(copy, {name: t[:2].clone() for name, t in load_heads(copy).items()})
    model = load(copy)
    _, rows = rows_per_layer(model, lambda: model(**theirs(segments(3))))
    assert rows == [3, 3, 0, 0]


def test_a_segment_is_scored_alike_in_any_company(model, many):
    inputs = theirs(many[0])
    alone = [model(**{name: t[i : i + 1] for name, t in inputs.items()}) for i in range(12)]
    got = model(**inputs)
    for i, one in enumerate(alone):
        close(got.importance[i], one.importance[0], 1e-5)
        close(got.class_logits[i], one.class_logits[0], 1e-5)
        assert got.exit_layer[i] == one.exit_layer[0]


def test_pads_do_not_matter(model):
    found = theirs(segments(4, T=6))
    wider = dict(found)
    wider["input_ids"] = torch.nn.functional.pad(found["input_ids"], (2, 3), value=7)
    wider["attention_mask"] = torch.nn.functional.pad(found["attention_mask"], (2, 3))
    same(model(**wider), model(**found))


def test_takes_what_the_processor_makes(model):
    """Placeholders in the text, frames in one row, and a suffix, which is not seen."""
    found = segments(4, num_frames=2)
    want = model(**theirs(found))
    suffix = np.full((4, 2), 9)
    inputs = hf_inputs(
        found["frames"],
        tokens=np.concatenate([found["tokens"], suffix], axis=1),
        mask_ar=np.concatenate([np.zeros((4, 9)), np.ones((4, 2))], axis=1),
        mask_input=np.concatenate([found["mask_input"], np.ones((4, 2))], axis=1),
    )
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 4 * 8
    assert inputs["pixel_values"].shape == (8, 3, 28, 28)
    same(model(**inputs, labels=inputs["input_ids"]), want)
    # Pads in front of the placeholders.
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (3, 0))
    same(model(**inputs), want)


def test_a_sliding_window_does_not_reach_into_the_prefix(copy, model):
    edit_config(copy, lambda c: c["text_config"].update(sliding_window=3))
    found = theirs(segments(4))
    same(load(copy)(**found), model(**found))


def test_scores_in_bfloat16(exported, model):
    found = theirs(segments(16))
    half = load(exported.folder, dtype=torch.bfloat16)
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16}
    got, want = half.score_all(**found), model.score_all(**found)
    assert got.class_logits.dtype == got.importance.dtype == torch.float32
    # As far off as this package's own model in bfloat16: 0.02 on average.
    assert (got.class_logits - want.class_logits).abs().mean() < 0.04
    assert (got.importance - want.importance).abs().mean() < 0.04


def test_saved_again_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again, info = load(tmp_path / "again", output_loading_info=True)
    assert not any(info.values())
    assert again.config.deevisum == SECTION
    found = theirs(segments(3))
    same(again(**found), model(**found), 0)


def test_fills_the_prompt(model):
    assert model.prompt("Bees", sound="buzzing {loud}") == (
        "title: Bees\ntranscript: \nsound: buzzing {loud}"
    )


def test_refuses_a_folder_without_heads(copy):
    (copy / "deevisum_heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"deevisum_heads.safetensors of .* copy the file beside"):
        load(copy)


def test_refuses_a_damaged_heads_file(copy):
    (copy / "deevisum_heads.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"deevisum_heads.safetensors of .* cannot be read"):
        load(copy)


def test_refuses_heads_of_another_model(copy):
    tensors = load_heads(copy)
    tensors["exits.norm.scale"] = torch.zeros(3, 16)
    tensors["exits.else"] = tensors.pop("exits.importance.bias")
    save_heads(copy, tensors)
    with pytest.raises(ValueError, match=r"deevisum_heads.safetensors: the exit heads") as error:
        load(copy)
    assert "exits.norm.scale: shape (3, 16), wanted (3, 32)" in str(error.value)
    assert "exits.importance.bias: missing" in str(error.value)
    assert "exits.else: unknown" in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "no section `deevisum`"),
        (SECTION | {"format": 1}, "is of format 1, this modeling_deevisum.py reads format 2"),
        (SECTION | {"exit_layers": [2, 2]}, r"exit_layers \[2, 2\] .* must increase"),
        (SECTION | {"exit_layers": [5]}, "within 1 and the depth of the language model, 4"),
        (SECTION | {"exit_policy": 0.9}, "exit_policy .* is 0.9, without .* export"),
        (SECTION | {"exit_policy": policy("nerve", 0.9, 0.9)}, "of exit_policy .*'nerve' is unk"),
        (SECTION | {"exit_policy": policy("cosine", 0.9)}, "exit_policy .* wanted 2 .* got 1"),
        (SECTION | {"exit_policy": policy("cosine", 0.9, 90)}, r"which 90 is not within \[0, 1\]"),
    ],
)
def test_refuses_a_config_that_it_does_not_understand(copy, section, message):
    edit_config(copy, lambda c: c.update(deevisum=section))
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"threshold": 0.4}, r"threshold is 0.4, of which 0.4 is not within \[0.5, 1\]"),
        ({"threshold": [0.9, 1.1]}, r"of which 1.1 is not within \[0.5, 1\]"),
        ({"threshold": [0.9, "high"]}, "of which 'high' is not within"),
        ({"threshold": -0.1, "confidence": "entropy"}, r"-0.1 is not within \[0, 1\], .*'entropy'"),
        ({"threshold": float("nan"), "confidence": "cosine"}, "nan is not within"),
        ({"threshold": [0.9]}, r"wanted 2 thresholds, .* layers \[1, 2, 4\]\), got 1"),
        ({"threshold": [0.9] * 3}, "wanted 2 thresholds, .* got 3"),
        ({"threshold": "never"}, "threshold 'never' is none; give .config., a number"),
        ({"threshold": 0.9, "confidence": "nerve"}, "confidence 'nerve' is unknown; choose one"),
        ({"confidence": "cosine"}, "are of the confidence 'max_probability'; with .* give"),
    ],
)
def test_refuses_thresholds_that_it_cannot_use(model, asked, message):
    with pytest.raises(ValueError, match=message):
        model.score(**theirs(segments(2)), **asked)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 1, 3, 32, 32),
        torch.zeros(2, 1, 28, 28, 3),
        torch.zeros(2, 1, 3, 28, 28, dtype=torch.uint8),
    ],
)
def test_refuses_frames_of_another_size_or_kind(model, pixels):
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\] of shape \[B, I, 3, 28, 28\]"):
        model(**theirs(segments(2)) | {"pixel_values": pixels})


def test_refuses_frames_of_other_segments(model):
    with pytest.raises(ValueError, match="do not belong to 2 rows of input_ids"):
        model(**theirs(segments(2)) | {"pixel_values": torch.zeros(4, 3, 28, 28)})


def test_refuses_another_number_of_placeholders(model):
    found = theirs(segments(2))
    found["input_ids"][0, :3] = IMAGE_TOKEN
    with pytest.raises(ValueError, match=r"have \[3, 0\] <image> tokens, but 1 frames make 4"):
        model(**found)


def test_refuses_a_mask_of_another_shape(model):
    with pytest.raises(ValueError, match=r"attention_mask of shape \[2, 4\]"):
        model(**theirs(segments(2)) | {"attention_mask": torch.ones(2, 4)})


def test_refuses_attention_that_does_not_cap(exported):
    model = load(exported.folder, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="attention is 'flex_attention'"):
        model(**theirs(segments(2)))


def test_refuses_to_score_without_heads(exported):
    config = transformers.AutoConfig.from_pretrained(exported.folder)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    with pytest.raises(ValueError, match="no exit heads yet"):
        model(**theirs(segments(2)))
