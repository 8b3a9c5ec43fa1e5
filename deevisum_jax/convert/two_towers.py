"""SigLIP's names, Hugging Face's and big_vision's, to this package's parameters, and back.

From -> to in a Hugging Face `SiglipModel`, where all generations of transformers agree; `{i}` a
layer, d and D the widths of image and text tower:

    vision_model                                  img
      .embeddings.*, .encoder.*, .post_layernorm.*  as in a PaliGemma 2, `huggingface`
      .head.probe [1, 1, d]                         /map_head/probe [1, 1, d]
      .head.attention.in_proj_weight [3d, d]        /map_head/attn/{query,key,value}
      .head.attention.in_proj_bias [3d]               /kernel [d, N, H], /bias [N, H]
      .head.attention.out_proj.weight [d, d]        /map_head/attn/out/kernel [N, H, d]
      .head.attention.out_proj.bias [d]             /map_head/attn/out/bias [d]
      .head.layernorm.{weight,bias} [d]             /map_head/ln1/{scale,bias} [d]
      .head.mlp.fc{1,2}.weight [out, in]            /map_head/mlp/fc{1,2}/kernel [in, out]
      .head.mlp.fc{1,2}.bias [out]                  /map_head/mlp/fc{1,2}/bias [out]
    text_model                                    txt
      .embeddings.token_embedding.weight [V, D]     /embed/embedding [V, D]
      .embeddings.position_embedding.weight [T, D]  /pos_embedding [1, T, D]
      .encoder.layers.{i}.*                         /Transformer/encoderblock/*
      .final_layer_norm.{weight,bias} [D]           /Transformer/encoder_norm/{scale,bias} [D]
      .head.weight [d, D]                           /head/kernel [D, d]
      .head.bias [d]                                /head/bias [d]
    logit_scale [1], logit_bias [1]               t [1], b [1]

In big_vision only names differ:

    img/MAPHead_0                                 img/map_head
      /MultiHeadDotProductAttention_0/...           /attn/...
      /LayerNorm_0/{scale,bias}                     /ln1/{scale,bias}
      /MlpBlock_0/Dense_{0,1}/...                   /mlp/fc{1,2}/...
    txt/Embed_0/embedding                         txt/embed/embedding
    txt/Encoder_0/...                             txt/Transformer/...
    {img/Transformer,txt/Encoder_0}/encoderblock  as in `big_vision`, stacked or not
    img/{embedding,pos_embedding}, txt/{pos_embedding,head}, t, b: the same
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from deevisum_jax import sharding
from deevisum_jax.convert import big_vision
from deevisum_jax.convert.huggingface import encoder_rows, image_rows, transposed
from deevisum_jax.convert.npz import open_npz
from deevisum_jax.convert.rows import Converted, Row, fill, match
from deevisum_jax.convert.safetensors import open_safetensors
from deevisum_jax.convert.tensors import Tensor, read
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, locate, open_binary, read_json
from deevisum_jax.models.pytree import Params
from deevisum_jax.models.siglip import SiglipConfig
from deevisum_jax.models.two_towers import TextConfig, TwoTowersConfig, abstract_params

_BIG_VISION_NAMES = (
    ("img/map_head/", "img/MAPHead_0/"),
    ("txt/embed/", "txt/Embed_0/"),
    ("txt/Transformer/", "txt/Encoder_0/"),
)
_CONFIG_FILE = "config.json"
_SLAB = 2**24  # bytes
_PREPROCESSOR_FILE = "preprocessor_config.json"
_RESIZES = {2: "bilinear", 3: "bicubic"}  # PIL's codes, which transformers writes
# Fields of a tower in config.json, and what transformers takes where a file leaves them out.
_SIZES = {
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "num_heads": ("num_attention_heads", 12),
}
_IMG_SIZES = _SIZES | {"image_size": ("image_size", 224), "patch_size": ("patch_size", 16)}
_TXT_SIZES = _SIZES | {
    "vocab_size": ("vocab_size", 32_000),
    "text_len": ("max_position_embeddings", 64),
}


def load(
    path: str | os.PathLike, config: TwoTowersConfig, shardings: Any = None
) -> tuple[Params, list[Converted]]:
    """Parameters of a released SigLIP.

    Position embeddings of pictures are resampled where `config` has another image size.

    Args:
      path: big_vision's `.npz`; or Hugging Face's folder, or a `.safetensors` file of it. A
        `config.json` in the same folder is held against `config`.
      config: the model; its variant, vocabulary and text length must be the checkpoint's.
      shardings: where each parameter is to live, as `sharding.param_shardings` gives it; None =
        all on the first device.

    Returns:
      The parameters, and the report of where each tensor went.

    Raises:
      UserError: nothing of the kind is there, it is another kind of model, or its tensors are not
        the model's; all that do not fit are listed.
    """
    path = locate(path)
    abstract = abstract_params(config)
    if shardings is not None:
        abstract = sharding.abstract(abstract, shardings)
    lines = []
    if path.suffix == ".npz":
        tensors, _ = big_vision.without_prefix(open_npz(path))
        rows = big_vision_rows(config, tensors)
    elif path.suffix == ".safetensors" or exists(path / _CONFIG_FILE) or path.is_dir():
        _check_config(path, config)
        tensors, lines = _without_position_ids(open_safetensors(path))
        rows = huggingface_rows(config)
    else:
        raise UserError(
            f"{path} is no SigLIP checkpoint: give big_vision's .npz file, or Hugging Face's "
            "folder with config.json and model.safetensors"
        )
    report = match(tensors, rows, abstract, path=str(path)) + lines
    return fill(tensors, rows, abstract), report


def read_config(folder: str | os.PathLike, **overrides: Any) -> TwoTowersConfig:
    """The sizes that a Hugging Face folder tells of its SigLIP.

    Args:
      folder: of a `SiglipModel`, local or in a bucket.
      **overrides: fields of `TwoTowersConfig`, for instance `dtype="bfloat16"`.

    Raises:
      UserError: there is no config.json, it is damaged or of another kind of model.
    """
    path = locate(folder)
    file = path / _CONFIG_FILE
    theirs = _read_config_file(path)
    if theirs is None:
        raise UserError(
            f"{path} is no folder with a SigLIP: {_CONFIG_FILE} is missing; give a folder as "
            "google/siglip-base-patch16-224 is on Hugging Face"
        )
    img, txt = (
        {ours: _count(file, theirs, section, *field) for ours, field in fields.items()}
        for section, fields in (("vision_config", _IMG_SIZES), ("text_config", _TXT_SIZES))
    )
    crops = bool(img["image_size"] % img["patch_size"])
    config = TwoTowersConfig(
        img=SiglipConfig(**img, crop_to_patches=crops), txt=TextConfig(**txt), **overrides
    )
    _check_config(path, config)
    return config


def read_resize(folder: str | os.PathLike, image_size: int) -> str:
    """How a Hugging Face folder wants pictures resized, `bilinear` or `bicubic`.

    Args:
      folder: as in `read_config`.
      image_size: height and width of the model's pictures, pixels.

    Raises:
      UserError: preprocessor_config.json asks for what is not done here.
    """
    file = locate(folder) / _PREPROCESSOR_FILE
    if not exists(file):
        return "bicubic"  # SiglipImageProcessor's default
    theirs = read_json(file)
    offenders = [
        f"{field}: {theirs[field]!r}, wanted {wanted!r}"
        for field, wanted in (
            ("image_mean", [0.5] * 3),
            ("image_std", [0.5] * 3),
            ("size", {"height": image_size, "width": image_size}),
        )
        if theirs.get(field, wanted) != wanted
    ]
    code = theirs.get("resample", 3)
    if type(code) is not int or code not in _RESIZES:
        offenders.append(f"resample: {code!r}, wanted 2 (bilinear) or 3 (bicubic)")
    if offenders:
        raise UserError(
            f"{file} prepares pictures otherwise than SigLIP does; use the folder of a SigLIP:\n  "
            + "\n  ".join(offenders)
        )
    return _RESIZES[code]


def fingerprint(folder: str | os.PathLike, others: Iterable[str] = ()) -> str:
    """16 hexadecimal digits of all that results with a Hugging Face folder depend on.

    Its files are read whole.

    Args:
      folder: as in `read_config`.
      others: names of files of it beside the model's own, such as the tokenizer's.

    Raises:
      UserError: one of them is missing.
    """
    path = locate(folder)
    names = [_CONFIG_FILE, *others]
    if exists(path / _PREPROCESSOR_FILE):
        names.append(_PREPROCESSOR_FILE)
    weights = sorted({os.fspath(tensor.file) for tensor in open_safetensors(path).values()})
    digest = hashlib.sha256()
    for file in (*(path / name for name in sorted(names)), *map(locate, weights)):
        with open_binary(file) as stream:
            while slab := stream.read(_SLAB):
                digest.update(slab)
    return digest.hexdigest()[:16]


def _count(file: epath.Path, theirs: Mapping[str, Any], section: str, field: str, default: int):
    """A size that config.json tells.

    Raises:
      UserError: it is none.
    """
    sizes = theirs.get(section) or {}
    value = sizes.get(field, default) if isinstance(sizes, dict) else None
    if type(value) is not int or not 0 < value < 10**6:
        raise UserError(
            f"{file}: {section}.{field} is {value!r}, no size; use the folder of a SigLIP"
        )
    return value


def big_vision_rows(config: TwoTowersConfig, names: Iterable[str] = ()) -> list[Row]:
    """The table in big_vision's names.

    Args:
      config: the model.
      names: of the checkpoint's tensors, which tell the towers that are not stacked.
    """
    rows = big_vision.renamed_rows(
        abstract_params(config), resample=("img/pos_embedding",), renames=_BIG_VISION_NAMES
    )
    return big_vision.as_scanned(rows, names)


def huggingface_rows(config: TwoTowersConfig) -> list[Row]:
    """The table in Hugging Face's names."""
    img, txt = config.img, config.txt
    embeddings = "text_model.embeddings"
    return [
        *image_rows("img", "vision_model", img),
        *_map_head_rows(img.width, img.num_heads, img.mlp_dim),
        Row(
            target="txt/embed/embedding",
            sources=(f"{embeddings}.token_embedding.weight",),
            shape=(txt.vocab_size, txt.width),
        ),
        Row(
            target="txt/pos_embedding",
            sources=(f"{embeddings}.position_embedding.weight",),
            shape=(txt.text_len, txt.width),
            split=(1, txt.text_len, txt.width),
        ),
        *encoder_rows("txt/Transformer", "text_model", "final_layer_norm", txt),
        transposed("txt/head/kernel", "text_model.head.weight", (img.width, txt.width)),
        Row(target="txt/head/bias", sources=("text_model.head.bias",), shape=(img.width,)),
        Row(target="t", sources=("logit_scale",), shape=(1,)),
        Row(target="b", sources=("logit_bias",), shape=(1,)),
    ]


def _map_head_rows(D: int, N: int, F: int) -> list[Row]:
    ours, theirs = "img/map_head", "vision_model.head"
    H = D // N
    rows = [
        Row(target=f"{ours}/probe", sources=(f"{theirs}.probe",), shape=(1, 1, D)),
        Row(
            target=f"{ours}/attn/out/kernel",
            sources=(f"{theirs}.attention.out_proj.weight",),
            shape=(D, D),
            split=(D, N, H),
            order=(1, 2, 0),
        ),
        transposed(f"{ours}/mlp/fc1/kernel", f"{theirs}.mlp.fc1.weight", (F, D)),
        transposed(f"{ours}/mlp/fc2/kernel", f"{theirs}.mlp.fc2.weight", (D, F)),
    ]
    for target, source, width in (
        ("attn/out/bias", "attention.out_proj.bias", D),
        ("ln1/scale", "layernorm.weight", D),
        ("ln1/bias", "layernorm.bias", D),
        ("mlp/fc1/bias", "mlp.fc1.bias", F),
        ("mlp/fc2/bias", "mlp.fc2.bias", D),
    ):
        rows.append(Row(target=f"{ours}/{target}", sources=(f"{theirs}.{source}",), shape=(width,)))
    # torch.nn.MultiheadAttention has the three in one.
    for i, name in enumerate(("query", "key", "value")):
        cut = (i * D, (i + 1) * D)
        rows += [
            Row(
                target=f"{ours}/attn/{name}/kernel",
                sources=(f"{theirs}.attention.in_proj_weight",),
                shape=(3 * D, D),
                cut=cut,
                split=(N, H, D),
                order=(2, 0, 1),
            ),
            Row(
                target=f"{ours}/attn/{name}/bias",
                sources=(f"{theirs}.attention.in_proj_bias",),
                shape=(3 * D,),
                cut=cut,
                split=(N, H),
            ),
        ]
    return rows


def _without_position_ids(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[Converted]]:
    """Takes the buffers out that count positions; some files hold them, no model needs them.

    Raises:
      UserError: they do not count from 0, so positions would mean something else.
    """
    rest, lines = dict(tensors), []
    for tower, ours in (("vision_model", "img"), ("text_model", "txt")):
        name = f"{tower}.embeddings.position_ids"
        if name not in rest:
            continue
        tensor = rest.pop(name)
        if not np.array_equal(read(tensor).ravel(), np.arange(np.prod(tensor.shape))):
            raise UserError(
                f"{name} (in {tensor.file}) does not count 0, 1, 2, ...; the file is damaged or of "
                "another model"
            )
        lines.append(
            Converted(
                source=name,
                target=f"{ours}/pos_embedding",
                shape=tensor.shape,
                dtype=tensor.dtype.name,
                transform="counts from 0, not stored",
            )
        )
    return rest, lines


def _read_config_file(path: epath.Path) -> dict[str, Any] | None:
    """Of a folder, or of that of a file; None if there is none.

    Raises:
      UserError: it is damaged, or of another model.
    """
    file = (path if path.is_dir() else path.parent) / _CONFIG_FILE
    if not exists(file):
        return None
    theirs = read_json(file)
    model_type = theirs.get("model_type")
    if model_type != "siglip":
        hint = ""
        if model_type == "siglip2":
            hint = "; of SigLIP 2 the models of a fixed resolution, not NaFlex, are of that type"
        raise UserError(
            f"{file} says model_type {model_type!r}, wanted 'siglip' with both towers{hint}"
        )
    return theirs


def _check_config(path: epath.Path, config: TwoTowersConfig) -> None:
    """Refuses other models, and what the tensors' shapes do not tell.

    Raises:
      UserError: `config.json` is missing from a folder, damaged, or of another model.
    """
    file = (path if path.is_dir() else path.parent) / _CONFIG_FILE
    theirs = _read_config_file(path)
    if theirs is None:
        if path.is_dir():
            raise UserError(
                f"{file} is missing, which tells what model the folder holds; copy it from the "
                "model's page, or give the .safetensors file itself"
            )
        return
    offenders = []
    for section, tower in (("vision_config", config.img), ("text_config", config.txt)):
        given = theirs.get(section) or {}
        if not isinstance(given, dict):
            offenders.append(f"{section}: {given!r}, wanted a section")
            continue
        # A file leaves out what is transformers' default.
        for field, default, wanted in (
            ("num_attention_heads", 12, tower.num_heads),
            ("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh"),
            ("layer_norm_eps", 1e-6, 1e-6),
        ):
            if (value := given.get(field, default)) != wanted:
                offenders.append(f"{section}.{field}: {value!r}, wanted {wanted!r}")
    if offenders:
        raise UserError(
            f"{file} is not of this model; check that the variant is the checkpoint's:\n  "
            + "\n  ".join(offenders)
        )
