"""A tiny Hugging Face SigLIP with random weights, and the same model in this package."""

import dataclasses
import functools

from deevisum_jax.convert import two_towers as convert
from deevisum_jax.convert.rows import fill
from deevisum_jax.models.paligemma2 import Params
from deevisum_jax.models.two_towers import TwoTowersConfig, abstract_params, get_config
from tests.hf_reference import hf_tensors


@dataclasses.dataclass(frozen=True)
class Reference:
    """Both sides; `theirs` is a `transformers.SiglipModel`."""

    config: TwoTowersConfig
    params: Params
    theirs: object


def hf_config(config: TwoTowersConfig):
    """What transformers calls the same sizes."""
    import transformers

    def sizes(tower):
        return {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_dim,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.num_heads,
        }

    img, txt = config.img, config.txt
    return transformers.SiglipConfig(
        vision_config={
            **sizes(img),
            "image_size": img.image_size,
            "patch_size": img.patch_size,
        },
        text_config={
            **sizes(txt),
            "vocab_size": txt.vocab_size,
            "max_position_embeddings": txt.text_len,
            "projection_size": img.width,
            # Their defaults lie outside of small vocabularies.
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        attn_implementation="eager",
    )


@functools.cache
def reference(image_size: int = 28) -> Reference:
    """The tiny variant, 2 x 2 patches on up to 41 pixels; the weights do not depend on them."""
    import torch
    import transformers

    torch.set_num_threads(1)
    config = get_config("siglip_tiny", img={"image_size": image_size, "crop_to_patches": True})
    theirs = transformers.SiglipModel(hf_config(config)).eval()
    # Their own initialisation leaves norms at one, biases at zero and logits near zero, which
    # would hide mistakes in all of these.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
        theirs.logit_scale.fill_(2.0)
        theirs.logit_bias.fill_(-3.0)
    params = fill(hf_tensors(theirs), convert.huggingface_rows(config), abstract_params(config))
    return Reference(config, params, theirs)
