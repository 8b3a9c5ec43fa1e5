"""Adapters in PEFT's form, against peft itself on a random transformers model."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft as peft_library
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from deevisum_jax.config import LoraConfig
from deevisum_jax.convert import huggingface, peft, rows, safetensors
from deevisum_jax.convert.tensors import read
from deevisum_jax.models import lora, paligemma2
from deevisum_jax.typing import Batch
from tests.hf_reference import hf_inputs, reference

RANK, ALPHA = 3, 6.0  # scaled by 2
BOTH = ("llm", "img")


# Between the two libraries: peft asks transformers for what it calls something else now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Our model with loud random adapters, and them as a folder in PEFT's form."""

    config: paligemma2.PaliGemma2Config
    params: paligemma2.Params
    adapters: dict[str, np.ndarray]  # by path
    base: str
    folder: str


@pytest.fixture(scope="module", params=[("llm",), BOTH], ids=["llm", "llm_img"])
def adapted(request, tmp_path_factory) -> Adapted:
    ref = reference()
    chosen = LoraConfig(rank=RANK, alpha=ALPHA, towers=request.param)
    config = dataclasses.replace(ref.config, lora=chosen)
    shapes = flatten_dict(paligemma2.abstract_params(config), sep="/")
    rng = np.random.default_rng(0)
    adapters = {
        path: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
        for path, leaf in shapes.items()
        if lora.is_adapter(path)
    }
    params = unflatten_dict(flatten_dict(ref.params, sep="/") | adapters, sep="/")
    # Peft looks whether the vocabulary has grown since.
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    ref.theirs.config.save_pretrained(base)
    tensors = rows.spill(unflatten_dict(adapters, sep="/"), peft.adapter_rows(config))
    safetensors.write_safetensors_file(folder / peft.ADAPTER_FILE, tensors)
    content = peft.adapter_config(config, str(base))
    (folder / peft.CONFIG_FILE).write_text(json.dumps(content))
    return Adapted(config, params, adapters, str(base), str(folder))


@pytest.fixture(scope="module")
def theirs(adapted):
    """Peft's model."""
    base = copy.deepcopy(reference().theirs)
    return peft_library.PeftModel.from_pretrained(base, adapted.folder).eval()


@pytest.fixture(scope="module")
def merged(theirs):
    """The weights that peft merges to, by name."""
    return copy.deepcopy(theirs).merge_and_unload().state_dict()


def batch(B=3, T=7):
    rng = np.random.default_rng(2)
    mask_ar = np.arange(T) >= np.array([[4], [5], [3]])
    mask_input = np.arange(T) < np.array([[7], [6], [5]])
    return {
        "frames": rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        "tokens": rng.integers(2, 512, (B, T)).astype(np.int32),
        "mask_ar": mask_ar,
        "mask_input": mask_input,
    }


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config, params, found):
    unread = dict.fromkeys(("mask_loss", "label", "score", "video_id", "segment", "valid"))
    model = paligemma2.bind(config, params)
    return model.logits(model(Batch(**found, **unread)).pre_logits)


def test_peft_s_model_has_our_logits(adapted, theirs):
    found = batch()
    want = np.asarray(our_logits(adapted.config, adapted.params, found))
    inputs = hf_inputs(**found)
    got = theirs(**inputs).logits.numpy()[..., : adapted.config.llm.vocab_size]
    real = inputs["attention_mask"].numpy().astype(bool)
    np.testing.assert_allclose(got[real], want[real], rtol=1e-5, atol=1e-5)
    # They do something.
    nothing = flatten_dict(adapted.params, sep="/") | {
        path: np.zeros_like(leaf) for path, leaf in adapted.adapters.items()
    }
    plain = our_logits(adapted.config, unflatten_dict(nothing, sep="/"), found)
    assert np.abs(plain[real] - want[real]).mean() > 0.1


def test_peft_merges_to_what_we_merge_to(adapted, merged):
    ours = lora.merge(jax.tree.map(jnp.asarray, adapted.params), adapted.config.lora, "float32")
    ours = rows.spill(ours, huggingface.paligemma2_rows(adapted.config))
    changed = 0
    for name, tensor in ours.items():
        found = read(tensor)
        np.testing.assert_allclose(found, merged[name][: len(found)], rtol=1e-5, atol=1e-6)
        changed += not np.array_equal(found, reference().theirs.state_dict()[name][: len(found)])
    # Seven matrices of four layers; three of two.
    assert changed == 7 * 4 + (3 * 2 if "img" in adapted.config.lora.towers else 0)


def test_one_weight_by_hand(adapted, merged):
    """The value matrix of layer 2: `W + (alpha / r) a b`, in torch's layout [out, in]."""
    path = "llm/layers/attn/kv_einsum/w"
    a = adapted.adapters[f"{path}_lora_a"][2, 1]  # [D, r]
    b = adapted.adapters[f"{path}_lora_b"][2, 1]  # [r, K, H]
    name = "model.language_model.layers.2.self_attn.v_proj.weight"
    weight = reference().theirs.state_dict()[name].numpy()
    want = weight + ALPHA / RANK * (a @ b.reshape(RANK, -1)).T
    np.testing.assert_allclose(merged[name], want, rtol=1e-5, atol=1e-6)


def test_names_and_settings_are_those_that_peft_writes(adapted, theirs, tmp_path):
    """It writes the modules that it has put adapters into, by our own `target_modules`.

    So none of ours is left unread, and it has none that our file lacks.
    """
    theirs.save_pretrained(tmp_path)
    written = safetensors.open_safetensors(tmp_path / peft.ADAPTER_FILE)
    ours = safetensors.open_safetensors(f"{adapted.folder}/{peft.ADAPTER_FILE}")
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in written.items()
    }
    for name in written:
        np.testing.assert_array_equal(read(ours[name]), read(written[name]))
    settings = json.loads((tmp_path / peft.CONFIG_FILE).read_text())
    for field, value in peft.adapter_config(adapted.config, adapted.base).items():
        assert settings[field] == value, field


def test_scale_may_be_no_whole_number():
    config = dataclasses.replace(reference().config, lora=LoraConfig(rank=8, alpha=4.5))
    assert peft.adapter_config(config, "b")["lora_alpha"] == 4.5
    assert peft.adapter_config(config, "b")["r"] == 8
