"""A tiny Hugging Face PaliGemma 2 with random weights, and the same model in this package."""

import dataclasses
import functools

import numpy as np

from deevisum_jax.convert import huggingface, rows
from deevisum_jax.convert.tensors import ArrayTensor
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params, abstract_params, get_config

IMAGE_TOKEN = 512  # the first row behind the tiny vocabulary


@dataclasses.dataclass(frozen=True)
class Reference:
    """Both sides; `theirs` is a `transformers.PaliGemmaForConditionalGeneration`."""

    config: PaliGemma2Config
    params: Params
    theirs: object


@functools.cache
def reference(sliding_window: int = 4096) -> Reference:
    """The tiny variant with Hugging Face's switches: final logits capped at 30, even layers local.

    The weights do not depend on the window.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    config = get_config(
        "tiny", llm={"final_logits_softcap": 30.0, "sliding_window": sliding_window}
    )
    theirs = transformers.PaliGemmaForConditionalGeneration(
        hf_config(config, padded_vocab=config.llm.vocab_size + 64)
    ).eval()
    # Their own initialisation leaves norms at one, biases at zero and logits near zero, which
    # would hide mistakes in all of these.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # A loud token table, being tied, would make every token predict itself.
            scale = 0.05 if "embed_tokens" in name else 0.25
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    tensors, _ = huggingface.tie(hf_tensors(theirs))
    params = rows.fill(tensors, huggingface.paligemma2_rows(config), abstract_params(config))
    return Reference(config, params, theirs)


def hf_config(config: PaliGemma2Config, *, padded_vocab: int):
    """The `transformers.PaliGemmaConfig` of a model; `<image>` is the first row behind ours."""
    import transformers

    img, llm = config.img, config.llm
    return transformers.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": img.width,
            "intermediate_size": img.mlp_dim,
            "num_hidden_layers": img.depth,
            "num_attention_heads": img.num_heads,
            "image_size": img.image_size,
            "patch_size": img.patch_size,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma2",
            "vocab_size": padded_vocab,
            "hidden_size": llm.width,
            "intermediate_size": llm.mlp_dim,
            "num_hidden_layers": llm.depth,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_kv_heads,
            "head_dim": llm.head_dim,
            "query_pre_attn_scalar": int(llm.query_pre_attn_scalar),
            "sliding_window": llm.sliding_window or 4096,
        },
        image_token_index=llm.vocab_size,
        vocab_size=padded_vocab,
        projection_dim=llm.width,
        attn_implementation="eager",
    )


def hf_tensors(model) -> dict[str, ArrayTensor]:
    """A torch model's weights as a checkpoint."""
    return {name: ArrayTensor(tensor.numpy()) for name, tensor in model.state_dict().items()}


def hf_inputs(
    frames: np.ndarray,
    tokens: np.ndarray,
    mask_ar: np.ndarray,
    mask_input: np.ndarray,
    *,
    image_token: int = IMAGE_TOKEN,
):
    """Our layout as keyword arguments of theirs: image placeholders in front, type 1 = suffix."""
    import torch

    B, num_frames = frames.shape[:2]
    pixels = (frames.reshape(-1, *frames.shape[2:]) / 127.5 - 1).astype(np.float32)
    num_patches = 4
    image = np.full((B, num_frames * num_patches), image_token)
    return {
        "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2)),
        "input_ids": torch.from_numpy(np.concatenate([image, tokens], axis=1)),
        "attention_mask": torch.from_numpy(
            np.concatenate([np.ones_like(image), mask_input], axis=1)
        ),
        # Without them 5.x makes even the image causal.
        "token_type_ids": torch.from_numpy(np.concatenate([np.zeros_like(image), mask_ar], axis=1)),
    }
