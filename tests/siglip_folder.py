"""A tiny SigLIP with random weights, in a folder as Hugging Face has it; no torch is needed."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import jax
import sentencepiece

from deevisum_jax.convert import safetensors
from deevisum_jax.convert import two_towers as convert
from deevisum_jax.convert.rows import spill
from deevisum_jax.models.two_towers import TwoTowersConfig, get_config, init_params

_LINES = ["a dog in the park", "two cats on the sofa", "the quick brown fox", "a red door opens"]


def write_folder(
    folder: pathlib.Path, *, seed: int = 0, image_size: int = 28, **txt: Any
) -> TwoTowersConfig:
    """Fills a folder; the text tower's vocabulary is the tokenizer's, and it takes 16 tokens.

    Args:
      folder: it need not be there.
      seed: of the weights.
      image_size: height and width of its pictures, pixels.
      **txt: fields of the text tower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = write_tokenizer(folder / "spiece.model")
    config = get_config(
        "siglip_tiny",
        img={"image_size": image_size, "crop_to_patches": True},
        txt={"vocab_size": pieces, "text_len": 16} | txt,
    )
    towers = {"vision_config": config.img, "text_config": config.txt}
    sections: dict[str, dict[str, Any]] = {
        name: {
            "hidden_size": tower.width,
            "num_hidden_layers": tower.depth,
            "intermediate_size": tower.mlp_dim,
            "num_attention_heads": tower.num_heads,
        }
        for name, tower in towers.items()
    }
    sections["vision_config"] |= {"image_size": image_size, "patch_size": config.img.patch_size}
    sections["text_config"] |= {
        "vocab_size": config.txt.vocab_size,
        "max_position_embeddings": config.txt.text_len,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", **sections}))
    params = init_params(config, jax.random.key(seed))
    tensors = spill(params, convert.huggingface_rows(config))
    safetensors.write_safetensors_file(folder / "model.safetensors", tensors)
    return config


def write_tokenizer(path: pathlib.Path, *more: str, **ids: int) -> int:
    """A SentencePiece model laid out as SigLIP's; the number of its pieces.

    Args:
      path: the file.
      *more: text that it learns from beside its own.
      **ids: of special pieces, in place of SigLIP's.
    """
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_LINES, *more]),
        model_writer=written,
        vocab_size=50,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | ids,
    )
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).vocab_size()
