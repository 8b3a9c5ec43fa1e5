"""Runs that were trained with adapters, as they go out: merged, or as PEFT takes them."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import sys
import types

import jax
import ml_dtypes
import numpy as np
import peft as peft_library
import PIL.Image
import pytest
import safetensors.numpy
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from deevisum_jax import config as config_lib
from deevisum_jax import weights
from deevisum_jax.convert import big_vision, rows
from deevisum_jax.convert.tensors import read
from deevisum_jax.errors import UserError
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models import lora, paligemma2
from deevisum_jax.typing import Batch
from scripts import check_export, export_hf
from tests import untrained
from tests.checkpoint_files import hugging_face_model, write_hugging_face, write_run
from tests.hf_reference import hf_inputs

EXITS = "model.exit_layers=(1, 2, 4)"
LORA = ("model.lora.rank=2", "model.lora.alpha=6.0")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

# Between the two libraries: peft asks transformers for what it calls something else now.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_exact(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("modules"))
    transformers.utils.logging.set_verbosity_error()
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.default_matmul_precision("highest"),
        torch.no_grad(),
    ):
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        # A run's parameters are read once.
        load, params = weights.Source.load, {}

        def load_once(source):
            if source.path not in params:
                params[source.path] = load(source)
            return params[source.path]

        patch.setattr(weights.Source, "load", load_once)
        yield


def with_adapters(params, number):
    """With every adapter made by `number(shape)`; a fresh one's second matrix is zero."""
    flat = flatten_dict(params, sep="/")
    changed = {
        path: number(leaf.shape).astype(np.float32)
        for path, leaf in flat.items()
        if lora.is_adapter(path)
    }
    return unflatten_dict(flat | changed, sep="/")


def louder(params):
    rng = np.random.default_rng(0)
    return with_adapters(params, lambda shape: 0.1 * rng.normal(size=shape))


@pytest.fixture(scope="module")
def plain(tiny_config, tmp_path_factory) -> pathlib.Path:
    """A run without adapters."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    write_run(folder, tiny_config(EXITS))
    return folder


@pytest.fixture(scope="module")
def start(plain, tmp_path_factory) -> pathlib.Path:
    """What runs start from: a folder of transformers."""
    folder = tmp_path_factory.mktemp("start") / "base"
    source = weights.open_source(str(plain))
    config = paligemma2.without_exits(source.config)
    params = {name: leaf for name, leaf in source.load().items() if name != "exits"}
    write_hugging_face(folder, params, config, plain / "tokenizer.model")
    return folder


# Of a run that starts from Hugging Face's form, or from the same weights in big_vision's.
CAPPED = ("model.final_logits_softcap=30.0", "model.sliding_window=4096")
KINDS = {
    "llm": (),
    "llm and img, nf4": (
        *CAPPED,
        "model.lora.towers=('llm', 'img')",
        "model.lora.base=nf4",
        "model.lora.tile=8",
    ),
}


@pytest.fixture(scope="module")
def runs(start, tiny_config, tmp_path_factory):
    """Makes a run that started there, with adapters, and with a projection of distillation."""
    home = tmp_path_factory.mktemp("runs")

    @functools.cache
    def make(kind: str) -> pathlib.Path:
        config = tiny_config(EXITS, *LORA, *KINDS[kind], f"initialization={start}")
        projection = {"teacher": {"kernel": np.ones((3, 32, 48), np.float32)}}
        write_run(home / kind, config, lambda params: louder(params) | {"distill": projection})
        return home / kind

    return make


@pytest.fixture(scope="module", params=KINDS)
def run(request, runs) -> pathlib.Path:
    return runs(request.param)


@pytest.fixture(scope="module")
def any_run(runs) -> pathlib.Path:
    return runs("llm")


@pytest.fixture(scope="module")
def any_source(any_run):
    return weights.open_source(str(any_run))


@pytest.fixture(scope="module")
def source(run):
    return weights.open_source(str(run))


@pytest.fixture(scope="module")
def segments(source):
    rng = np.random.default_rng(4)
    B, T = 3, 9
    real = np.arange(T) < np.array([[9], [7], [5]])
    return {
        "frames": rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        "tokens": rng.integers(4, 200, (B, T)).astype(np.int32),
        "mask_ar": ~real,
        "mask_input": real,
    }


@pytest.fixture(scope="module")
def ours(source, segments):
    """The run's own logits float[B, S, V] and scores at every exit."""
    unread = dict.fromkeys(("mask_loss", "label", "score", "video_id", "segment", "valid"))

    @jax.jit
    def answer(params):
        model = paligemma2.bind(source.config, params)
        output = model(Batch(**segments, **unread))
        return model.logits(output.pre_logits), output.exits

    return answer(source.load())


def same_logits(model, source, segments, ours, softcap=0.0):
    """`softcap`: what the base does to logits and the run does not."""
    V, image_token = source.config.llm.vocab_size, model.config.image_token_id
    inputs = hf_inputs(**segments, image_token=image_token)
    real = inputs["attention_mask"].numpy().astype(bool)
    got = model(**inputs).logits.numpy()[..., :V]
    want = np.asarray(ours[0])[real]
    if softcap:
        want = softcap * np.tanh(want / softcap)
    np.testing.assert_allclose(got[real], want, **TOLERANCE)


def same_scores(scorer, segments, ours):
    pixels = torch.from_numpy(segments["frames"] / np.float32(127.5) - 1).permute(0, 1, 4, 2, 3)
    text = [torch.from_numpy(segments[name]) for name in ("tokens", "mask_input")]
    got = scorer.score_all(pixels.float(), *text)
    np.testing.assert_allclose(got.class_logits, ours[1].class_logits, **TOLERANCE)
    np.testing.assert_allclose(got.importance, ours[1].importance, **TOLERANCE)
    np.testing.assert_allclose(got.cosine, ours[1].cosine, **TOLERANCE)


@pytest.fixture(scope="module")
def merged_export(runs, tmp_path_factory):
    """Makes the folder of a run with its adapters merged."""
    home = tmp_path_factory.mktemp("merged")

    @functools.cache
    def make(run: pathlib.Path) -> pathlib.Path:
        assert export_hf.main(["--checkpoint", str(run), "--out", str(home / run.name)]) == 0
        return home / run.name

    return make


def test_a_merged_export_says_what_the_run_says(run, source, segments, ours, merged_export):
    folder = merged_export(run)
    model, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    same_logits(model.eval(), source, segments, ours)
    same_scores(
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=True), segments, ours
    )
    names = set(safetensors.numpy.load_file(folder / "deevisum_heads.safetensors"))
    names |= set(safetensors.numpy.load_file(folder / "model.safetensors"))
    assert not [name for name in names if "lora" in name or "distill" in name]
    # The run's numbers, but for adapted weights; started from again it is a model without adapters.
    again = weights.open_source(str(folder))
    assert again.config.lora is None
    np.testing.assert_array_equal(
        again.load()["llm"]["embedder"]["input_embedding"],
        source.load()["llm"]["embedder"]["input_embedding"],
    )


def test_a_checked_export_is_held_against_the_run_as_it_was_written(
    runs, merged_export, monkeypatch
):
    """In float32 against adapters and codes themselves, else against the rounded sums of them."""
    said = types.SimpleNamespace(tokens=np.zeros((2, 1), np.int32))
    monkeypatch.setattr(check_export.generation, "generate", lambda *_, **__: said)
    run = runs("llm and img, nf4")
    source, merged = (weights.open_source(str(path)) for path in (run, merged_export(run)))
    given, policy = check_export.random_segments(source, 2, seed=0), ExitPolicy.off(3)
    exact, rounded = (
        check_export.say_ours(source, *given, 1, dtype, policy).logits
        for dtype in ("float32", "bfloat16")
    )
    want = check_export.say_ours(merged, *given, 1, "bfloat16", policy).logits
    np.testing.assert_allclose(rounded, want, **TOLERANCE)
    assert 1e-3 < np.abs(exact - rounded).max() < 0.3


def test_a_merged_npz_holds_what_merging_gives(source, tmp_path):
    weights.export_big_vision(source, tmp_path / "out.npz")
    plain = paligemma2.without_lora(source.config)
    merged = lora.merge(source.load(), source.config.lora, "float32")
    towers = {name: merged[name] for name in ("img", "llm")}
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        for name, tensor in rows.spill(towers, big_vision.paligemma2_rows(plain)).items():
            np.testing.assert_allclose(found[f"params/{name}"], read(tensor), rtol=1e-6, atol=1e-7)


def test_merged_weights_are_rounded_once(any_run, any_source, merged_export, tmp_path):
    weights.export_hf(any_source, tmp_path / "half", dtype="bfloat16")
    half, whole = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tmp_path / "half", merged_export(any_run))
    )
    for name, tensor in whole.items():
        np.testing.assert_array_equal(half[name], tensor.astype(ml_dtypes.bfloat16), name)


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory):
    """Makes the folder of a run's adapters."""
    home = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def make(run: pathlib.Path) -> pathlib.Path:
        folder = home / run.name
        assert export_hf.main(["--checkpoint", str(run), "--adapter", "--out", str(folder)]) == 0
        return folder

    return make


@pytest.fixture(scope="module")
def adapter(run, adapter_of) -> pathlib.Path:
    return adapter_of(run)


def test_what_lies_in_an_adapter_s_folder(adapter, start):
    assert sorted(path.name for path in adapter.iterdir()) == [
        "NOTICE",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "deevisum.json",
        "exits.safetensors",
        "modeling_deevisum.py",
    ]
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(start)
    card = (adapter / "README.md").read_text()
    assert "base_model:" not in card  # the Hub knows no path of this machine
    assert "A LoRA adapter (rank 2, alpha 6)" in card
    uncapped = "capped at 30, those in training were not capped"
    assert (uncapped in card) == ("nf4" not in adapter.name)


def test_peft_and_the_exit_heads_say_what_the_run_says(source, adapter, start, segments, ours):
    if source.config.lora.base:
        # What they were trained with: the base that is rounded to 4 bits.
        base = rounded_base(source)
    else:
        base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(start)
    model = peft_library.PeftModel.from_pretrained(base, adapter).eval()
    same_logits(model, source, segments, ours, 0 if source.config.llm.final_logits_softcap else 30)
    made = scorer_class(adapter)
    scorer = made.over(model.get_base_model(), str(adapter))
    same_scores(scorer, segments, ours)
    assert scorer.config.deevisum["exit_layers"] == [1, 2, 4]
    # Merged there, it stays so.
    same_scores(made.over(model.merge_and_unload(), str(adapter)), segments, ours)


def scorer_class(folder):
    return transformers.dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_deevisum.DeevisumModel", str(folder)
    )


def test_a_scorer_that_would_be_none_is_refused(any_run, adapter_of, start, tmp_path):
    folder = adapter_of(any_run)
    base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(start)
    model = peft_library.PeftModel.from_pretrained(base, folder).eval()
    made = scorer_class(folder)
    with pytest.raises(ValueError, match=r"not a PeftModel.*give model\.get_base_model\(\)"):
        made.over(model, str(folder))
    with pytest.raises(ValueError, match=r"make it of what merge_and_unload\(\) returns"):
        made.over(model.get_base_model(), str(folder)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = shutil.copytree(folder, tmp_path / "other")
    heads = safetensors.numpy.load_file(other / "exits.safetensors")
    del heads["exits.importance.bias"]
    safetensors.numpy.save_file(heads, other / "exits.safetensors")
    with pytest.raises(ValueError, match=r"exits\.safetensors: the exit heads do not fit a model"):
        made.over(model.get_base_model(), str(other))


def rounded_base(source):
    """A transformers model of the base as the run holds it, in 4 bits."""
    merged = lora.merge(with_adapters(source.load(), np.zeros), source.config.lora, "float32")
    config = paligemma2.without_exits(paligemma2.without_lora(source.config))
    return hugging_face_model({name: merged[name] for name in ("img", "llm")}, config)


# PaliGemma's processor lets numpy copy a tensor in a way that numpy 2 does not like.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning")
def test_the_card_s_snippets_run_as_they_stand(
    any_run, adapter_of, merged_export, tmp_path, monkeypatch, capsys
):
    adapter, base = adapter_of(any_run), merged_export(any_run)  # has a processor, as Google's has
    monkeypatch.chdir(tmp_path)
    for name in adapter.iterdir():
        shutil.copy(name, tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    PIL.Image.fromarray(picture).save("frame_1.jpg")
    card = pathlib.Path("README.md").read_text()
    names = {"__name__": "snippet"}
    first, second, third = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(re.sub(r"BASE = .*", f"BASE = {str(base)!r}", first), names)
    exec(second, names)
    assert names["scores"].importance.shape == (1,)
    assert "importance tensor([0." in capsys.readouterr().out
    exec(third, names)
    assert names["scores"].exit_layer.tolist() == [4]


def test_a_base_may_be_named(any_source, start, tmp_path):
    weights.export_adapter(any_source, tmp_path / "a", base="someone/tiny")
    content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "someone/tiny"
    assert 'base_model: "someone/tiny"' in (tmp_path / "a" / "README.md").read_text()
    assert weights.export_adapter(any_source, tmp_path / "b", base=str(start)) == str(start)


@pytest.fixture(scope="module")
def mistaken(plain, start, tiny_config, tmp_path_factory):
    """Runs that an adapter's export refuses, by what is wrong with them."""
    home = tmp_path_factory.mktemp("mistaken")
    shutil.copytree(plain, home / "plain")
    write_run(home / "scratch", tiny_config(EXITS, *LORA))
    for name, given in (("again", home / "plain"), ("moved", home / "gone"), ("npz", "a/b.npz")):
        shutil.copytree(home / "scratch", home / name)
        config_lib.save(
            tiny_config(EXITS, *LORA, f"initialization={given}"), home / name / "config.json"
        )
        (home / name / "origin.json").write_text(
            json.dumps({"released_weights": "a/b.npz" if name == "npz" else str(start)})
        )
    return home


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", r"has no adapters: it was not trained with model\.lora\.rank above 0"),
        ("scratch", r"was trained from scratch, so there is no base model.*give --base what"),
        ("again", r"started from the run .*export that run with scripts/export_hf\.py"),
        ("moved", r"started from .*gone, which is there no more; give --base"),
        ("npz", r"started from a/b\.npz, which transformers cannot load.*give --base"),
    ],
)
def test_an_adapter_of_an_unknown_base_says_what_to_do(mistaken, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        weights.export_adapter(weights.open_source(str(mistaken / name)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("no/such/folder", r"--base no/such/folder is no folder and no name on the Hub"),
        ("google/paligemma2-3b-pt-224", r"is a paligemma2_3b, which the run is not"),
        ("gs://bucket/base", r"is in a bucket, from which peft cannot load; copy it"),
    ],
)
def test_a_base_that_is_none_is_refused(mistaken, base, message, tmp_path):
    source = weights.open_source(str(mistaken / "scratch"))
    with pytest.raises(UserError, match=message):
        weights.export_adapter(source, tmp_path / "out", base=base)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def other_base(start, tmp_path_factory):
    """Makes a copy of the base with its config or one tensor changed."""

    def make(edit_config=None, edit=None, name=r"\.norm\.weight") -> pathlib.Path:
        folder = shutil.copytree(start, tmp_path_factory.mktemp("other") / "base")
        if edit_config:
            content = json.loads((folder / "config.json").read_text())
            edit_config(content)
            (folder / "config.json").write_text(json.dumps(content))
        if edit:
            tensors = safetensors.numpy.load_file(folder / "model.safetensors")
            for found in tensors:
                if re.fullmatch(f"(language_model|vision_tower).*{name}", found):
                    tensors[found] = edit(tensors[found])
            safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def test_a_base_for_other_pictures_is_refused(any_source, other_base, tmp_path):
    base = other_base(lambda content: content["vision_config"].update(image_size=56))
    (base / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="sees pictures of 56 pixels, the run 28"):
        weights.export_adapter(any_source, tmp_path / "out", base=str(base))


def test_a_base_whose_window_would_matter_is_refused(any_source, other_base, tmp_path):
    """A segment has 4 image tokens and 48 of text; the run no window."""
    window = lambda size: lambda content: content["text_config"].update(sliding_window=size)
    with pytest.raises(UserError, match=r"a window of 51 .* the run no window.*up to 52 tokens"):
        weights.export_adapter(any_source, tmp_path / "out", base=str(other_base(window(51))))
    weights.export_adapter(any_source, tmp_path / "out", base=str(other_base(window(52))))


def test_a_base_that_is_rounded_to_bfloat16_is_the_same(source, other_base, tmp_path):
    rounded = other_base(
        edit=lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), name="weight"
    )
    weights.export_adapter(source, tmp_path / "out", base=str(rounded))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (r"\.norm\.weight", "llm/final_norm/scale"),
        (r"layers\.0\.self_attn\.q_proj\.weight", "llm/layers/attn/q_einsum/w"),
    ],
)
def test_a_base_of_other_weights_is_refused(source, other_base, name, path, tmp_path):
    other = other_base(edit=lambda x: 1.01 * x + 0.05, name=name)
    with pytest.raises(UserError, match=rf"has other weights than the run's \({path} differs\)"):
        weights.export_adapter(source, tmp_path / "out", base=str(other))
    assert not list(tmp_path.iterdir())


def test_adapters_over_merged_ones_belong_to_the_export_of_the_run_before(
    any_run, any_source, merged_export, start, tiny_config, tmp_path
):
    """The second run's scale is another, so that what the first learned is part of its base."""
    config = tiny_config(EXITS, *LORA, "model.lora.alpha=2.0", f"initialization={any_run}")
    learned = flatten_dict(any_source.load(), sep="/")
    merged = weights.open_source(str(merged_export(any_run))).load()
    params = learned | flatten_dict(merged, sep="/")
    shutil.copytree(any_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config_lib.save(config, tmp_path / "run" / "config.json")
    untrained.save_params(tmp_path / "run", config, unflatten_dict(params, sep="/"))
    source = weights.open_source(str(tmp_path / "run"))
    out = tmp_path / "out"
    advice = r"export that run with scripts/export_hf\.py and give --base that folder$"
    with pytest.raises(UserError, match=rf"started from the run .*/llm, which is no.*{advice}"):
        weights.export_adapter(source, out)
    with pytest.raises(UserError, match=rf"--base someone/tiny is a name on the Hub.*{advice}"):
        weights.export_adapter(source, out, base="someone/tiny")
    with pytest.raises(UserError, match=r"\(llm/layers/attn/q_einsum/w differs\)"):
        weights.export_adapter(source, out, base=str(start))
    weights.export_adapter(source, out, base=str(merged_export(any_run)))


def own_base(run: pathlib.Path) -> str:
    source = weights.open_source(str(run))
    return weights._own_base(source, *weights._beginning(source))


def test_the_base_of_a_run_that_started_from_an_export_is_the_export(
    mistaken, tiny_config, tmp_path
):
    """Not what the export descends from, whose name it still knows."""
    weights.export_hf(weights.open_source(str(mistaken / "plain")), tmp_path / "export")
    content = json.loads((tmp_path / "export" / "config.json").read_text())
    content["deevisum"]["origin"] = "google/paligemma2-3b-pt-224"
    (tmp_path / "export" / "config.json").write_text(json.dumps(content))
    folder = shutil.copytree(mistaken / "scratch", tmp_path / "run")
    config = tiny_config(EXITS, *LORA, f"initialization={tmp_path / 'export'}")
    config_lib.save(config, folder / "config.json")
    assert own_base(folder) == str(tmp_path / "export")


def test_the_base_of_a_run_that_went_on_with_another_s_adapters_is_the_other_s(
    any_run, start, tmp_path
):
    folder = shutil.copytree(any_run, tmp_path / "run")
    config = config_lib.load(folder / "config.json")
    config_lib.save(
        dataclasses.replace(config, initialization=str(any_run)), folder / "config.json"
    )
    assert own_base(folder) == str(start)


def test_a_base_in_big_vision_s_form_is_refused(any_source, tmp_path):
    weights.export_big_vision(any_source, tmp_path / "base.npz")
    with pytest.raises(UserError, match=r"in big_vision's form.*scripts/export_hf\.py"):
        weights.export_adapter(any_source, tmp_path / "out", base=str(tmp_path / "base.npz"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "a/b"], "--base goes with --adapter"),
        (["--adapter", "--max_shard_gb", "1"], "--adapter writes one small file"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        export_hf.main(["--checkpoint", "a", "--out", "b", *flags])
    assert message in capsys.readouterr().err
