"""Transformers builds our model, images and prompts of the folder; and what we read of others."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import PIL.Image
import pytest

from deevisum_jax import weights
from deevisum_jax.convert import hf_folder, tokenizer_json
from deevisum_jax.data.prompts import PromptEncoder, load_template
from deevisum_jax.data.tokenizer import train_tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.models.paligemma2 import bind, get_config, init_params
from tests.checkpoint_files import hugging_face_model, write_run
from tests.hf_reference import IMAGE_TOKEN, hf_inputs, reference

PADDED = 576
DEEVISUM = {
    "format": 2,
    "exit_layers": [2, 4],
    "exit_policy": {"confidence": "cosine", "thresholds": [0.85]},
    "calibration": {
        "promise": {"f1": 0.01},
        "text": "With a confidence of 90 %, F1 falls by 0.01.",
    },
    "label_tokens": [300, 301],
    "prompt_template": load_template().text,
    "num_frames": 2,
    "segment_s": 2.0,
    "text_len": 48,
    "resize": "bilinear",
}
OFF = {"confidence": "max_probability", "thresholds": [None]}
REPORT = {
    **{"tau": 0.2134, "rho": 0.3017, "f1": 0.5521, "tau_early_exit": 0.2, "f1_early_exit": 0.54},
    "exit_policy": {"confidence": "cosine", "thresholds": [None, 0.85]},
    **{"avg_depth": 2.44, "compute_saved": 0.387, "wall_saved": 0.352, "steps": 200},
    "exit_rate": {"2": 0.78, "4": 0.22},
    "protocols": {"tau": "Kendall tau-b ...", "rho": "Spearman ...", "f1": "F1 of the knapsack"},
    "rows": {
        "exit_2": {"tau": 0.19, "rho": 0.28, "f1": 0.53},
        "random": {"tau": 0.0, "rho": 0.0, "f1": 0.5},
    },
    "row_protocols": {"random": "uniform random score"},
}
# As Google wrote it for the 3B at 224 pixels, with transformers 4.47: most is left out.
SPARSE = {
    "_vocab_size": 257152,
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "num_hidden_layers": 26,
    "pad_token_id": 0,
    "projection_dim": 2304,
    "text_config": {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_image_tokens": 256,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 257216,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "num_positions": 256,
        "patch_size": 14,
        "projection_dim": 2304,
        "torch_dtype": "bfloat16",
        "vision_use_head": False,
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    lines = ["title: the red ball", "transcript: no, yes", "sound: loud (music)", "a blue ball"]
    return train_tokenizer(lines, path, vocab_size=400)


@pytest.fixture(scope="module")
def config(tokenizer):
    vocab_size = -(-tokenizer.vocab_size // 128) * 128
    return get_config("tiny", llm={"vocab_size": vocab_size}, exit_layers=(2, 4))


@pytest.fixture(scope="module")
def card(config):
    return hf_folder.model_card(
        config,
        title="A student: tiny",
        deevisum=DEEVISUM,
        report=REPORT,
        dataset="tvsum",
        base_model="google/paligemma2-3b-pt-224",
        gemma_terms=True,
    )


@pytest.fixture(scope="module")
def folder(config, tokenizer, card, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    hf_folder.write_folder(
        folder,
        config=config,
        tokenizer=tokenizer,
        table_rows=hf_folder.padded_vocab(config, tokenizer),
        dtype="bfloat16",
        resize="bilinear",
        deevisum=DEEVISUM,
        card=card,
        gemma_terms=True,
    )
    return folder


def made_config(llm=None, **kwargs):
    kwargs = {"image_token": IMAGE_TOKEN, "padded_vocab": PADDED, "dtype": "float32"} | kwargs
    return hf_folder.hf_config(get_config("tiny", llm=llm or {}), deevisum=None, **kwargs)


def with_field(content: dict, path: str, value) -> dict:
    """A copy of `content` with the field at a dotted path replaced."""
    first, _, rest = path.partition(".")
    return {**content, first: with_field(content.get(first, {}), rest, value) if rest else value}


def random_batch(T: int, prefix: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "frames": rng.integers(0, 256, (2, 2, 28, 28, 3), np.uint8),
        "tokens": rng.integers(4, 512, (2, T), np.int32),
        "mask_ar": np.broadcast_to(np.arange(T) >= prefix, (2, T)),
        "mask_input": np.ones((2, T), bool),
    }


@pytest.mark.parametrize(
    "llm",
    [
        {"final_logits_softcap": 30.0, "sliding_window": 4096},
        {"final_logits_softcap": 30.0, "sliding_window": 3},
        {"final_logits_softcap": 0.0, "sliding_window": None},
    ],
    ids=["as Hugging Face", "a window of 3", "as big_vision"],
)
def test_transformers_builds_a_model_with_our_logits(llm, tmp_path):
    import torch
    import transformers

    ref = reference()
    config = get_config("tiny", llm=llm)
    content = made_config(llm)
    if llm["sliding_window"] is None:
        # A window that would be felt, to see that no layer uses it.
        content["text_config"]["sliding_window"] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = transformers.PaliGemmaForConditionalGeneration._from_config(
        transformers.PaliGemmaConfig.from_pretrained(tmp_path), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(ref.theirs.state_dict())
    text = random_batch(T=12, prefix=5)
    with torch.no_grad():
        want = theirs(**hf_inputs(**text)).logits.numpy()[:, :, :512]
    with jax.default_matmul_precision("highest"):
        model = bind(config, ref.params)
        embedded, _ = model.run_layers(model.embed(**text))
        got = model.logits(model.llm.final_norm(embedded.x))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("variant", ["paligemma2_3b", "paligemma2_10b", "paligemma2_28b"])
def test_real_sizes_survive_transformers(variant, tmp_path):
    import transformers

    config = get_config(variant)
    made = hf_folder.hf_config(
        config, image_token=257152, padded_vocab=257216, dtype="bfloat16", deevisum=DEEVISUM
    )
    assert made["auto_map"] == {"AutoModel": "modeling_deevisum.DeevisumModel"}
    (tmp_path / "config.json").write_text(json.dumps(made))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.PaliGemmaConfig
    assert theirs.deevisum == DEEVISUM
    assert str(theirs.dtype) == "torch.bfloat16"
    # What transformers writes itself is understood as what it has read.
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    facts = hf_folder.config_facts(again, None)
    assert facts == hf_folder.config_facts(made, None)
    assert facts.sizes == hf_folder.sizes_of(config)
    assert (facts.image_size, facts.padded_vocab, facts.image_token) == (224, 257216, 257152)


@pytest.mark.parametrize("llm", [{"sliding_window": 3}, {"final_logits_softcap": 30.0}, {}])
def test_switches_are_read_back(llm):
    facts = hf_folder.config_facts(made_config(llm), None)
    config = get_config("tiny", llm=llm)
    assert facts.final_logits_softcap == config.llm.final_logits_softcap
    assert facts.sliding_window == config.llm.sliding_window
    assert facts.sizes == hf_folder.sizes_of(config)
    assert facts.image_token == IMAGE_TOKEN


def test_googles_sparse_config_has_the_defaults_of_transformers():
    facts = hf_folder.config_facts(SPARSE, None)
    assert facts == hf_folder.Facts(
        sizes=hf_folder.sizes_of(get_config("paligemma2_3b")),
        image_size=224,
        final_logits_softcap=30.0,
        sliding_window=4096,
        resize="bicubic",
        padded_vocab=257216,
        image_token=257152,
    )


def test_defaults_are_those_of_transformers():
    import transformers

    empty = {
        "model_type": "paligemma",
        "text_config": {"model_type": "gemma2"},
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    # PaliGemmaConfig fills sections that are missing with another's sizes, ours are there.
    filled = {
        **transformers.PaliGemmaConfig().to_dict(),
        "text_config": transformers.Gemma2Config().to_dict(),
        "vision_config": transformers.SiglipVisionConfig().to_dict(),
    }
    assert hf_folder.config_facts(empty, {}) == hf_folder.config_facts(filled, None)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("model_type", "gemma3", 'model_type is "gemma3", but only "paligemma" is'),
        (
            "text_config.model_type",
            "gemma",
            "text_config.model_type is gemma, so this is the first",
        ),
        ("text_config.model_type", "llama", 'text_config.model_type is "llama", but only "gemma2"'),
        ("vision_config.model_type", "clip", 'vision_config.model_type is "clip"'),
        ("text_config.hidden_activation", "gelu", 'text_config.hidden_activation is "gelu"'),
        ("vision_config.hidden_act", "gelu", 'vision_config.hidden_act is "gelu"'),
        ("text_config.rms_norm_eps", 1e-5, "text_config.rms_norm_eps is 1e-05, but only 1e-06"),
        ("vision_config.layer_norm_eps", 1e-5, "vision_config.layer_norm_eps is 1e-05"),
        ("text_config.rope_theta", 1e6, "text_config.rope_theta is 1000000.0"),
        ("text_config.rope_parameters.rope_theta", 1e6, "rope_parameters.rope_theta is 1000000.0"),
        ("text_config.rope_parameters.rope_type", "yarn", 'rope_type is "yarn"'),
        ("text_config.rope_scaling", {"factor": 2}, "text_config.rope_scaling is"),
        ("text_config.attn_logit_softcapping", None, "attn_logit_softcapping is null"),
        ("text_config.attention_bias", True, "text_config.attention_bias is true"),
        ("text_config.use_bidirectional_attention", False, "bidirectional_attention is false"),
        ("text_config.layer_types", ["full_attention"] * 25, "layer_types is neither"),
        ("text_config.head_dim", "wide", "text_config.head_dim is 'wide', no number above 0"),
        ("text_config", None, "has no text_config"),
        ("vision_config", [], r"vision_config is \[\], no section"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(path, value, fault):
    with pytest.raises(UserError, match=rf"DIR/config\.json.*{fault}"):
        hf_folder.config_facts(with_field(SPARSE, path, value), None, "DIR")


@pytest.mark.parametrize(("code", "resize"), [(2, "bilinear"), (3, "bicubic"), (None, "bicubic")])
def test_how_images_are_resized_is_read(code, resize):
    preprocessor = {"resample": code} if code else {}
    assert hf_folder.config_facts(SPARSE, preprocessor).resize == resize


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("resample", 1, "resample is 1; images are resized here by 2"),
        ("do_resize", False, "do_resize is false"),
        ("image_mean", [0.48, 0.46, 0.41], r"image_mean is \[0.48, 0.46, 0.41\]"),
        ("rescale_factor", 1.0, "rescale_factor is 1.0"),
        ("size", {"height": 448, "width": 448}, "size is .* but only .*224"),
    ],
)
def test_other_preparation_of_images_is_refused(field, value, fault):
    with pytest.raises(UserError, match=rf"DIR/preprocessor_config\.json: {fault}"):
        hf_folder.config_facts(SPARSE, {field: value}, "DIR")
    with pytest.raises(UserError, match=rf"DIR/processor_config\.json: image_processor\.{fault}"):
        hf_folder.config_facts(SPARSE, {"image_processor": {field: value}}, "DIR")


def test_the_folder_is_all_but_the_weights_and_the_exit_heads(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "NOTICE",
        "README.md",
        "config.json",
        "generation_config.json",
        "modeling_deevisum.py",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_image_gets_a_row_of_the_token_table(tokenizer, config):
    assert hf_folder.padded_vocab(config, tokenizer) % 64 == 0
    assert hf_folder.padded_vocab(config, tokenizer) > tokenizer.vocab_size
    # Even where the pieces fill the table to the last row.
    exact = tokenizer.vocab_size
    full = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=exact))
    assert hf_folder.padded_vocab(full, tokenizer) > exact


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_the_processor_makes_our_prompt_and_our_pixels(folder, config, tokenizer, resize, tmp_path):
    import transformers

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / hf_folder.PREPROCESSOR_CONFIG).write_text(
        json.dumps(hf_folder.preprocessor_config(config, resize=resize))
    )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor) is transformers.PaliGemmaProcessor
    images = [
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 70, 3), np.uint8))
        for i in range(2)
    ]
    words = {"title": "the red ball", "transcript": "yes", "sound": "loud 🎬"}
    template = load_template()
    made = processor(
        images=[images], text=["<image><image>" + template.fill(**words)], return_tensors="np"
    )
    ours = PromptEncoder(tokenizer=tokenizer, template=template, text_len=100).encode(
        **words, label=1
    )
    prefix = ours["tokens"][~ours["mask_ar"]]
    assert made["input_ids"][0].tolist() == [tokenizer.vocab_size] * 8 + prefix.tolist()
    assert not made["token_type_ids"].any()
    resized = [
        image.resize((28, 28), getattr(PIL.Image.Resampling, resize.upper())) for image in images
    ]
    pixels = np.stack(resized).astype(np.float32) / 127.5 - 1
    # The processor divides by 255 first, which rounds otherwise.
    np.testing.assert_allclose(
        made["pixel_values"].transpose(0, 2, 3, 1), pixels, atol=2e-7, rtol=0
    )
    # What the processor writes itself is understood.
    processor.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / hf_folder.PROCESSOR_CONFIG).read_text())
    content = json.loads((tmp_path / hf_folder.CONFIG).read_text())
    assert hf_folder.config_facts(content, again).resize == resize


def test_rows_behind_our_vocabulary_are_never_generated(config, tokenizer, tmp_path):
    import torch
    import transformers

    config = dataclasses.replace(config, exit_layers=())
    first = config.llm.vocab_size
    theirs = hugging_face_model(init_params(config, jax.random.key(0)), config)
    with torch.no_grad():
        # Whatever the hidden state, one of two opposite rows has the greatest logit by far.
        table = theirs.get_input_embeddings().weight
        table[first] *= 1000
        table[first + 1] = -table[first]
    theirs.save_pretrained(tmp_path)
    hf_folder.write_folder(
        tmp_path,
        config=config,
        tokenizer=tokenizer,
        table_rows=first + 64,
        dtype="float32",
        resize="bicubic",
        deevisum=None,
        card="",
        gemma_terms=False,
    )
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    text = random_batch(T=8, prefix=8)
    text["tokens"] = np.minimum(text["tokens"], tokenizer.vocab_size - 1)
    inputs = hf_inputs(**text, image_token=tokenizer.vocab_size)
    new = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    kept = theirs.generate(**inputs, **new)[:, -4:]
    assert kept.max() < first
    theirs.generation_config.suppress_tokens = None
    assert theirs.generate(**inputs, **new)[:, -4:].min() >= first


def test_without_padding_nothing_is_suppressed():
    assert "suppress_tokens" not in hf_folder.generation_config(512, 512)
    assert hf_folder.generation_config(512, 515)["suppress_tokens"] == [512, 513, 514]


def test_a_mask_token_is_named_only_where_there_is_one(tokenizer):
    assert hf_folder.tokenizer_config(tokenizer)["mask_token"] is None
    content = tokenizer_json.to_tokenizer_json(tokenizer)
    newline = content["added_tokens"][4]
    assert newline["content"] == "\n"
    newline["content"] = "<mask>"
    content["model"]["vocab"]["<mask>"] = content["model"]["vocab"].pop("\n")
    masked = tokenizer_json.from_tokenizer_json(content)
    assert hf_folder.tokenizer_config(masked)["mask_token"] == "<mask>"


def test_the_card_says_what_the_hub_asks_for(card):
    import yaml

    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "gemma",
        "base_model": "google/paligemma2-3b-pt-224",
        "tags": ["paligemma2", "video-summarization", "early-exit", "deevisum"],
    }
    assert body.startswith("\n# A student: tiny\n")
    assert "model = AutoModel.from_pretrained(" in body
    assert "model = PaliGemmaForConditionalGeneration.from_pretrained(" in body
    # Without it transformers 4 computes another model: it drops the cap of the attention logits.
    assert body.count('attn_implementation="eager"\n).eval()') == 2
    assert "    transcript: {transcript}\n" in body
    assert "| exits after layer | 2, 4 |" in body


def test_the_card_has_every_number_with_its_protocol(card):
    assert "| Kendall tau | 0.213 | 0.200 | Kendall tau-b ... |" in card
    assert "| F1, % | 55.2 | 54.0 | F1 of the knapsack |" in card
    assert "was evaluated by `cosine` with the thresholds none, 0.85. It takes\n2.44 layers" in card
    assert "saves 39 % of the FLOPs, and 35 % of the time that scoring took" in card
    assert "| random | 0.000 | 0.000 | 50.0 |" in card
    assert "- random: uniform random score" in card


def test_the_card_says_when_segments_leave(card):
    assert (
        "(`cosine`): the cosine to the prototype of the summary class, without its sign.\n" in card
    )
    assert "| 2 | 0.85 |\n| 4 | any |\n" in card
    assert "\nWith a confidence of 90 %, F1 falls by 0.01.\n" in card
    assert "scores = model(**inputs, threshold=[0.9])" in card


def test_an_exit_that_nobody_leaves_at_is_told_from_one_that_anybody_does(config):
    # By agreement nobody leaves at the first, whatever its threshold.
    agreement = {"confidence": "agreement", "thresholds": [0.8, None, 0.9]}
    card = hf_folder.model_card(
        dataclasses.replace(config, exit_layers=(1, 2, 3, 4)),
        title="Four exits",
        deevisum=DEEVISUM | {"exit_layers": [1, 2, 3, 4], "exit_policy": agreement},
        report=None,
        dataset=None,
        base_model=None,
        gemma_terms=False,
    )
    rows = "| 1 | none is enough |\n| 2 | none is enough |\n| 3 | 0.9 |\n| 4 | any |\n"
    assert rows in card
    assert "threshold=[0.9, None, None])" in card


@pytest.mark.parametrize(
    "damaged",
    [
        {"format": 1},
        {"exit_layers": "2, 4"},
        {"exit_policy": 0.9},
        {"exit_policy": {"confidence": "cosine", "thresholds": [0.9, 0.9]}},
        {"exit_policy": {"confidence": "cosine", "thresholds": ["0.9"]}},
        {"exit_policy": {"confidence": "nerve", "thresholds": [0.9]}},
    ],
    ids=str,
)
def test_a_section_that_exports_do_not_write_is_refused(damaged):
    hf_folder.check_deevisum(DEEVISUM, "DIR/config.json")
    with pytest.raises(UserError, match=r"DIR/config\.json: its section deevisum is damaged or of"):
        hf_folder.check_deevisum(DEEVISUM | damaged, "DIR/config.json")


def test_googles_terms_are_passed_on(card, folder):
    assert "ai.google.dev/gemma/terms" in card
    assert "use restrictions" in card
    assert (folder / "NOTICE").read_text() == hf_folder.GEMMA_NOTICE + "\n"


def test_weights_that_only_changed_their_form_are_not_called_trained(config):
    card = hf_folder.model_card(
        config,
        title="PT",
        deevisum=None,
        report=None,
        dataset=None,
        base_model="google/paligemma2-3b-pt-224",
        gemma_terms=True,
    )
    assert "These are the weights of `google/paligemma2-3b-pt-224`, put into this form" in card
    assert "These are Google's weights in another form, and by those terms this form is a" in card
    for word in ("It was trained", "modified", "distillation", "## Limits"):
        assert word not in card


def test_a_lost_name_of_released_weights_is_said_to_be_lost(config):
    card = hf_folder.model_card(
        config,
        title="Student",
        deevisum=DEEVISUM,
        report=None,
        dataset="tvsum",
        base_model=None,
        gemma_terms=True,
    )
    assert "from released PaliGemma 2 weights (their name was not kept) on tvsum with" in card
    assert "have been modified" in card
    assert "base_model" not in card


def test_the_card_says_what_the_scores_are_not_for(card):
    _, limits = card.split("## Limits\n")
    limits, _ = limits.split("## Evaluation")
    assert "segments of 2 s with 2 frames, and for prompts of at most 48\n" in limits
    assert "relative within a video" in limits


@pytest.fixture(scope="module")
def example_folder(tiny_config, tmp_path_factory):
    """What a run with several frames leaves, exported, with pictures where its card looks."""
    workdir = tmp_path_factory.mktemp("run") / "student"
    write_run(workdir, tiny_config("data.num_frames=2", "data.text_len=64"))
    folder = tmp_path_factory.mktemp("exported") / "student"
    weights.export_hf(weights.open_source(str(workdir)), folder)
    rng = np.random.default_rng(0)
    for i in (1, 2):
        picture = PIL.Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
        picture.save(folder / f"frame_{i}.jpg")
    return folder


def run_snippet(card: str, number: int, before: dict | None = None) -> dict:
    """Runs a block of Python of a card as it stands, behind another; returns its variables."""
    names = dict(before or {"__name__": "snippet"})
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[number], names)
    return names


# PaliGemma's processor lets numpy copy a tensor in a way that numpy 2 does not like.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning")
def test_the_cards_snippets_run_as_they_stand(example_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(example_folder)
    card = (example_folder / "README.md").read_text()
    scored = run_snippet(card, 0)
    assert type(scored["model"]).__name__ == "DeevisumModel"
    assert len(scored["frames"]) == 2
    assert scored["scores"].importance.shape == (1,)
    assert "importance tensor([0." in capsys.readouterr().out
    with_thresholds = run_snippet(card, 1, scored)
    assert with_thresholds["scores"].exit_layer.tolist() == [4]
    told = run_snippet(card, 2)
    assert told["PROMPT"] == scored["text"].removeprefix("<image>" * 2)
    assert told["tokens"].max() < told["model"].config.text_config.vocab_size
    assert capsys.readouterr().out
    # What is said of AutoModel.
    import transformers

    assert type(transformers.AutoModel.from_pretrained(".")) is transformers.PaliGemmaModel


def test_a_model_from_scratch_has_no_gemma_terms_and_may_be_unevaluated(
    config, tokenizer, tmp_path
):
    card = hf_folder.model_card(
        config,
        title="Scratch",
        deevisum=DEEVISUM | {"exit_policy": OFF, "calibration": None},
        report=None,
        dataset=None,
        base_model=None,
        gemma_terms=False,
    )
    assert "license" not in card
    assert "base_model" not in card
    assert "Not evaluated." in card
    assert "Every segment runs all layers, unless thresholds are given." in card
    assert "least confidence" not in card
    hf_folder.write_folder(
        tmp_path,
        config=config,
        tokenizer=tokenizer,
        table_rows=hf_folder.padded_vocab(config, tokenizer),
        dtype="float32",
        resize="bicubic",
        deevisum=None,
        card=card,
        gemma_terms=False,
    )
    assert not (tmp_path / "NOTICE").exists()
    written = json.loads((tmp_path / hf_folder.CONFIG).read_text())
    assert "auto_map" not in written
    assert "deevisum" not in written
