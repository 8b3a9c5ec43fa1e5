"""Weights from one form into another: released ones into ours, ours into released ones.

What is read is a trained run, converted weights, or a released checkpoint. The scripts
`convert_weights.py`, `export_hf.py` and `export_big_vision.py` are this module's flags.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from deevisum_jax import experiment, initialization, quantized, runs, sharding
from deevisum_jax.config import FROM_SCRATCH, Config, LoraConfig
from deevisum_jax.convert import (
    big_vision,
    hf_folder,
    huggingface,
    npz,
    peft,
    released,
    safetensors,
)
from deevisum_jax.convert.released import Released
from deevisum_jax.convert.rows import Converted, Layered, spill
from deevisum_jax.convert.tensors import Tensor, cast, named_dtype
from deevisum_jax.data import prompts, tokenizer
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import (
    check_local,
    check_room,
    exists,
    in_bucket,
    locate,
    read_json,
    whole_folder,
    write_whole,
    writing,
)
from deevisum_jax.initialization import FromReleased, FromRun, FromWeights
from deevisum_jax.models import lora, paligemma2
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What is converted or exported, its parameters not read yet."""

    path: str
    config: PaliGemma2Config
    resize: str  # of `typing.RESIZES`
    tokens: Tokenizer | None
    start: FromRun | FromReleased | FromWeights
    run: Config | None  # None: weights that nothing of ours was trained on

    def num_bytes(self, dtype: str = "") -> int:
        """What the parameters take in a file, adapters merged."""
        width = named_dtype(dtype or self.config.param_dtype).itemsize
        return paligemma2.num_params(paligemma2.without_lora(self.config)) * width

    def load(self) -> Params:
        """All parameters, over all devices of this process; adapters beside what they adapt."""
        shapes = paligemma2.abstract_params(self.config)
        shardings = sharding.param_shardings(shapes, sharding.fitting_mesh(shapes))
        abstract = sharding.abstract(shapes, shardings)
        return self.start.load(self.config, abstract, jax.random.key(0))


def open_source(
    checkpoint: str,
    *,
    tokenizer_path: str = "",
    image_size: int | None = None,
    dtype: str = "",
) -> Source:
    """Opens a run, converted weights, or a released checkpoint.

    Args:
      checkpoint: a folder of the first two kinds, an .npz of big_vision or a Hugging Face folder.
      tokenizer_path: of weights that bring none.
      image_size: of a released checkpoint, whose position embeddings are resampled to it.
      dtype: of a released checkpoint's parameters; "" = the one that holds all of them.

    Raises:
      UserError: there is no such checkpoint, or it does not fit what is asked of it.
    """
    try:
        start = initialization.open_start(checkpoint)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    run, tokens, resize = None, start.tokenizer(), start.settings.resize
    if isinstance(start, FromRun):
        run = start.config
        config = experiment.model_config(run, tokens)
    elif isinstance(start, FromWeights):
        config = start.model_config()
    else:
        config = start.checkpoint.config(image_size=image_size, dtype=dtype)
    if not isinstance(start, FromReleased) and (image_size is not None or dtype):
        raise UserError(
            f"{checkpoint} is as it was made; image size and dtype are only chosen for released "
            "checkpoints"
        )
    if tokenizer_path:
        given = tokenizer.load_tokenizer(tokenizer_path)
        if tokens is not None and given.pieces != tokens.pieces:
            raise UserError(
                f"{checkpoint} brings its own tokenizer, and {tokenizer_path} has other pieces; "
                "leave --tokenizer out"
            )
        if paligemma2.table_rows(given.vocab_size) != config.llm.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer_path} has {given.vocab_size} pieces, the model "
                f"{config.llm.vocab_size} rows; give the tokenizer of these weights"
            )
        tokens = given
    return Source(
        path=checkpoint, config=config, resize=resize, tokens=tokens, start=start, run=run
    )


def convert(source: Source, out: pathlib.Path) -> list[Converted]:
    """Writes a released checkpoint as converted weights; returns the report of every tensor.

    Raises:
      UserError: it is not released, does not fit, is damaged, or `out` cannot be written.
    """
    found = _demand_released(source)
    if found.exit_layers:
        raise UserError(
            f"{source.path} is an export of ours with exit heads, which converted weights do not "
            f"hold; train with initialization={source.path}"
        )
    report = found.match(source.config)
    check_room(out, source.num_bytes())
    with whole_folder(out) as folder:
        params = source.load()
        initialization.save_weights(
            folder,
            params,
            source.config,
            variant=found.variant,
            resize=source.resize,
            source=found.path,
            report=report,
            tokens=source.tokens,
            padding=source.start.vocab_padding(source.config),
        )
    return report


def report_of(source: Source) -> list[Converted]:
    """The report that `convert` would give; reads headers only and writes nothing."""
    return _demand_released(source).match(source.config)


def export_big_vision(source: Source, out: pathlib.Path, *, dtype: str = "") -> None:
    """Writes an npz that big_vision's loader takes; exit heads have no place there.

    Adapters are merged.

    Args:
      source: what goes out.
      out: a new file that ends in .npz.
      dtype: of the file; "" = as the parameters are.

    Raises:
      UserError: frames are merged, `out` is there or cannot be written; or what reading the
        parameters raises.
    """
    _refuse_merging(source)
    if out.suffix != ".npz":
        raise UserError(f"{out} does not end in .npz, by which big_vision knows its checkpoints")
    check_local(out)
    if out.exists():
        raise UserError(f"{out} is there already; give --out a new name")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent} is no folder; make it, or give --out a file in another")
    check_room(out, source.num_bytes(dtype))
    towers = _towers(_merged(source, source.load(), dtype))
    plain = paligemma2.without_lora(source.config)
    tensors = spill(towers, big_vision.paligemma2_rows(plain))
    with writing(out):
        npz.write_npz(out, big_vision.with_prefix(_in_dtype(tensors, dtype)))


def export_hf(
    source: Source,
    out: pathlib.Path,
    *,
    dtype: str = "",
    max_shard_bytes: int = 5 * 10**9,
    title: str = "",
) -> None:
    """Writes a folder that transformers loads, exit heads and their PyTorch model included.

    Adapters are merged.

    Args:
      source: what goes out.
      out: a folder, new or empty.
      dtype: of the weights; "" = as the parameters are.
      max_shard_bytes: of a file of weights.
      title: of the model card; "" = the name of `out`.

    Raises:
      UserError: frames are merged; there is no tokenizer; `out` cannot be written; or what reading
        the parameters raises.
    """
    config, tokens = source.config, source.tokens
    _refuse_merging(source)
    if tokens is None:
        raise UserError(
            f"{source.path} brings no tokenizer, without which transformers cannot use it; give "
            "--tokenizer the path of paligemma_tokenizer.model (docs/WEIGHTS.md says where it is)"
        )
    check_room(out, source.num_bytes(dtype))
    with whole_folder(out) as folder:
        params = _merged(source, source.load(), dtype)
        padding = source.start.vocab_padding(config)
        table_rows = hf_folder.padded_vocab(config, tokens)
        if padding is None:
            padding = huggingface.mean_rows(params, table_rows - config.llm.vocab_size)
        tensors = spill(_towers(params), huggingface.paligemma2_rows(config))
        tensors = huggingface.padded(tensors, padding)
        tensors = {huggingface.released_name(name): tensor for name, tensor in tensors.items()}
        section = _deevisum_section(source) if config.exit_layers else None
        card = hf_folder.model_card(
            config,
            title=title or out.resolve().name,
            deevisum=section,
            report=_read_report(source),
            dataset=source.run.data.dataset if source.run else None,
            base_model=_base_model(source.start.origin),
            gemma_terms=source.start.origin is not None,
        )
        with writing(out):
            safetensors.write_safetensors(
                folder, _in_dtype(tensors, dtype), max_shard_bytes=max_shard_bytes
            )
            if section is not None:
                heads = spill({"exits": params["exits"]}, huggingface.exit_rows(config))
                safetensors.write_safetensors_file(
                    folder / hf_folder.HEADS_FILE, _in_dtype(heads, dtype)
                )
            hf_folder.write_folder(
                folder,
                config=config,
                tokenizer=tokens,
                table_rows=config.llm.vocab_size + len(padding),
                dtype=dtype or config.param_dtype,
                resize=source.resize,
                deevisum=section,
                card=card,
                gemma_terms=source.start.origin is not None,
            )


def export_adapter(
    source: Source, out: pathlib.Path, *, base: str = "", dtype: str = "", title: str = ""
) -> str:
    """Writes the low-rank adapters of a run as a folder that PEFT loads, and its exit heads.

    Args:
      source: a run that was trained with adapters.
      out: a folder, new or empty.
      base: the model that they belong to, a local folder of transformers or a name on the Hub;
        "" = what the run started from.
      dtype: of the adapters; "" = as the parameters are.
      title: of the model card; "" = the name of `out`.

    Returns:
      The base's path or name, as it is written.

    Raises:
      UserError: the run has no adapters or merges frames; the base is not known, is another
        model's, or its window would matter; `out` cannot be written; or what reading the parameters
        raises.
    """
    config = source.config
    if source.run is None or config.lora is None:
        raise UserError(
            f"{source.path} has no adapters: it was not trained with model.lora.rank above 0; "
            "leave --adapter out, which exports the model whole"
        )
    _refuse_merging(source)
    given, start = _beginning(source)
    base = base or _own_base(source, given, start)
    opened = _open_base(base, source)
    if opened is None and isinstance(start, FromRun):
        raise UserError(
            f"--base {base} is a name on the Hub, and {source.path} started from the run "
            f"{start.folder}, which may have other weights; {_EXPORT_FIRST}"
        )
    # A name stands for what the run started from, which may be at hand.
    found = opened or (start.checkpoint if isinstance(start, FromReleased) else None)
    softcap = _HUB_SOFTCAP
    if found is not None and found.form == released.HUGGING_FACE:
        softcap = found.facts.final_logits_softcap
    with whole_folder(out) as folder:
        params = source.load()
        if found is not None:
            _check_same_base(found, config, params)
        section = _deevisum_section(source)
        leaves = flatten_dict({name: params[name] for name in ("img", "llm")}, sep="/")
        adapters = {path: leaf for path, leaf in leaves.items() if lora.is_adapter(path)}
        tensors = spill(unflatten_dict(adapters, sep="/"), peft.adapter_rows(config))
        heads = spill({"exits": params["exits"]}, huggingface.exit_rows(config))
        gemma_terms = source.start.origin is not None
        texts = {
            peft.CONFIG_FILE: json.dumps(peft.adapter_config(config, base), indent=2) + "\n",
            peft.SECTION_FILE: json.dumps(section, indent=2) + "\n",
            hf_folder.MODELING_FILE: hf_folder.modeling_code(),
            hf_folder.MODEL_CARD: hf_folder.adapter_card(
                config,
                title=title or out.resolve().name,
                deevisum=section,
                report=_read_report(source),
                dataset=source.run.data.dataset,
                base=base,
                is_on_hub=opened is None,
                base_softcap=softcap,
                gemma_terms=gemma_terms,
            ),
        }
        if gemma_terms:
            texts[hf_folder.NOTICE] = hf_folder.GEMMA_NOTICE + "\n"
        with writing(out):
            for name, found_tensors in ((peft.ADAPTER_FILE, tensors), (peft.HEADS_FILE, heads)):
                safetensors.write_safetensors_file(folder / name, _in_dtype(found_tensors, dtype))
            for name, text in texts.items():
                write_whole(folder / name, text)
    return base


def _refuse_merging(source: Source) -> None:
    if source.config.merge is not None:
        raise UserError(
            f"{source.path} merges frames (model.merge.num_keyframes="
            f"{source.config.merge.num_keyframes}), which big_vision, transformers and the PyTorch "
            "model of an export cannot do: they would give the language model other tokens than it "
            "was trained with. Use the run itself with deevisum_jax.summarize, or train one with "
            "model.merge.num_keyframes=0 and export that"
        )


def _demand_released(source: Source) -> Released:
    if not isinstance(source.start, FromReleased):
        raise UserError(
            f"{source.path} is in our own form already; train with initialization={source.path}, "
            "or export it with scripts/export_hf.py or scripts/export_big_vision.py"
        )
    return source.start.checkpoint


def _merged(source: Source, params: Params, dtype: str) -> Params:
    """The parameters without adapters, and with every matrix as numbers.

    What an adapter or a code changes is made layer by layer when it is written: a model that was
    held in 4 bits need not fit as numbers.
    """
    config = source.config
    if config.lora is None:
        return params
    flat = flatten_dict(params, sep="/")
    merged = {}
    for path in flat:
        if lora.is_adapter(path):
            continue
        own = {name: flat[name] for name in (path, *lora.beside(path)) if name in flat}
        is_coded = isinstance(flat[path], QArray)
        if len(own) == 1 and not is_coded:
            merged[path] = flat[path]
            continue
        stored = config.param_dtype if is_coded else str(flat[path].dtype)
        merged[path] = Layered(
            shape=flat[path].shape,
            dtype=named_dtype(dtype or stored),
            layer=functools.lru_cache(maxsize=1)(
                functools.partial(_merged_layer, own, path, config.lora, dtype or stored)
            ),
        )
    return unflatten_dict(merged, sep="/")


def _merged_layer(
    own: Mapping[str, Any], path: str, config: LoraConfig, dtype: str, i: int
) -> np.ndarray:
    # Rounded once, at the end.
    exact = lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    layer = jax.tree.map(lambda x: exact(x[i : i + 1]), dict(own))
    merged = lora.merge(unflatten_dict(layer, sep="/"), config, "float32")
    return np.asarray(flatten_dict(merged, sep="/")[path][0]).astype(named_dtype(dtype))


_EXPORT_FIRST = "export that run with scripts/export_hf.py and give --base that folder"


def _beginning(source: Source) -> tuple[str, initialization.Start | None]:
    """What the adapters of a run were added to first: its path, and it; None if it has moved.

    Behind runs that only went on with one another's adapters. It is a run where adapters were added
    to weights of ours, and nothing, `FROM_SCRATCH`, where they were to random ones.
    """
    own = lora.meaning(source.run.model.lora)
    given, start = source.path, source.start
    while isinstance(start, FromRun) and lora.meaning(start.config.model.lora) == own:
        given = start.config.initialization
        if given == FROM_SCRATCH:
            return given, None
        try:
            start = initialization.open_start(given)
        except UserError:
            start = None
    return given, start


def _own_base(source: Source, given: str, start: initialization.Start | None) -> str:
    """What the adapters of a run belong to, as transformers finds it.

    Args:
      source: the run.
      given: from `_beginning`.
      start: from there, too.

    Raises:
      UserError: the run does not tell.
    """
    advice = (
        "give --base what the run started from, a folder of transformers or a name on the Hub such "
        "as google/paligemma2-3b-pt-224; or leave --adapter out, which merges"
    )
    if isinstance(start, FromRun):
        raise UserError(
            f"{source.path} started from the run {start.folder}, which is no model that "
            f"transformers loads; {_EXPORT_FIRST}"
        )
    if given == FROM_SCRATCH:
        raise UserError(
            f"{source.path} was trained from scratch, so there is no base model to add its "
            f"adapters to; {advice}"
        )
    origin = source.start.origin
    if start is None and given != origin:
        raise UserError(f"{source.path} started from {given}, which is there no more; {advice}")
    here = given if in_bucket(given) else os.path.abspath(given)
    if isinstance(start, FromReleased) and start.checkpoint.deevisum is not None:
        return here  # an export of ours, whose own origin is another model
    if name := _base_model(origin):
        return name
    if isinstance(start, FromReleased) and start.checkpoint.form == released.HUGGING_FACE:
        return here
    raise UserError(
        f"{source.path} started from {origin}, which transformers cannot load and whose name on "
        f"the Hub its path does not tell; {advice}"
    )


# Of Google's PaliGemma 2 on the Hub.
_HUB_SOFTCAP, _HUB_WINDOW = 30.0, 4096


def _open_base(base: str, source: Source) -> Released | None:
    """The base if it is at hand; None for a name on the Hub, of which its own words are checked.

    Raises:
      UserError: there is no such base, it is another model than the run's, or peft cannot load it.
    """
    config = source.config
    size = config.img.image_size
    if in_bucket(base):
        raise UserError(
            f"the base {base} is in a bucket, from which peft cannot load; copy it, and give "
            "--base the copy, or a name on the Hub"
        )
    if not exists(locate(base)):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            raise UserError(
                f"--base {base} is no folder and no name on the Hub (owner/name); correct it"
            )
        if told := re.fullmatch(r"google/paligemma2-(3b|10b|28b)-.*-(\d+)", base):
            variant, pixels = f"paligemma2_{told[1]}", int(told[2])
            if hf_folder.sizes_of(paligemma2.get_config(variant)) != hf_folder.sizes_of(config):
                raise UserError(f"{base} is a {variant}, which the run is not; give its own base")
            _check_image_size(base, pixels, size)
            _check_window(base, _HUB_WINDOW, source)
        return None
    found = released.open_released(base)
    if found.form != released.HUGGING_FACE:
        raise UserError(
            f"{base} is in big_vision's form, which transformers cannot load; export it with "
            "scripts/export_hf.py and give --base its folder"
        )
    found.check(config)
    found.check_vocabulary(config.llm.vocab_size)
    _check_image_size(base, found.facts.image_size, size)
    _check_window(base, found.facts.sliding_window, source)
    return found


def _check_image_size(base: str, pixels: int, wanted: int) -> None:
    if pixels != wanted:
        raise UserError(
            f"the base {base} sees pictures of {pixels} pixels, the run {wanted}; give --base one "
            "of that size, or leave --adapter out, which merges"
        )


def _check_window(base: str, theirs: int | None, source: Source) -> None:
    """Refuses another window of local layers, where a segment is longer than one of the two."""
    ours, data = source.config.llm.sliding_window, source.run.data
    length = source.config.image_tokens(data.num_frames) + data.text_len + data.caption_len
    shortest = min(theirs or length, ours or length)
    if theirs != ours and shortest < length:
        named = lambda window: f"a window of {window}" if window else "no window"
        raise UserError(
            f"the base {base} has {named(theirs)} in its local layers and the run {named(ours)}, "
            f"and a segment has up to {length} tokens, so that it would say something else; leave "
            "--adapter out, which merges and writes the run's own"
        )


def _check_same_base(found: Released, config: PaliGemma2Config, params: Params) -> None:
    """Compares a norm, and of each tower a matrix of the first layer, without its adapter.

    Raises:
      UserError: one differs by more than rounding does, to bfloat16 or to codes.
    """
    flat = flatten_dict(params, sep="/")
    for path, stop in (
        ("llm/final_norm/scale", None),
        ("llm/layers/attn/q_einsum/w", 1),
        ("img/Transformer/encoderblock/attn/query/kernel", 1),
    ):
        theirs, reach = found.rows(config, path, stop), 0.0
        ours = jax.tree.map(lambda array, stop=stop: np.asarray(array[:stop]), flat[path])
        if isinstance(ours, QArray):
            ours, reach = quantized.decode(ours, np.float32), quantized.reach(ours)
        allowed = np.asarray(reach) * 1.001 + 2**-8 * np.abs(theirs) + 1e-6
        if np.any(np.abs(theirs - np.asarray(ours, np.float32)) > allowed):
            raise UserError(
                f"the base {found.path} has other weights than the run's ({path} differs), so the "
                "adapters would be added to another model; give --base what the run started from"
            )


def _towers(params: Params) -> Params:
    return {name: params[name] for name in ("img", "llm")}


def _in_dtype(tensors: Mapping[str, Tensor], dtype: str) -> Mapping[str, Tensor]:
    if not dtype:
        return tensors
    return {name: cast(tensor, named_dtype(dtype)) for name, tensor in tensors.items()}


def _deevisum_section(source: Source) -> dict[str, Any]:
    """What modeling_deevisum.py needs to know besides sizes."""
    run = source.run
    if run is None:
        return dict(source.start.checkpoint.deevisum)  # of an export of ours, as it came
    template = prompts.load_template(str(source.start.folder / runs.TEMPLATE_FILE))
    encoder = experiment.make_encoder(run, source.tokens, template, source.config.img.image_size)
    policy, calibration = runs.exit_policy(source.start.folder, run)
    if calibration is not None:
        kept = ("promise", "num_search", "num_test", "text")  # the curve is the report's
        told = calibration.to_json()
        calibration = {name: told[name] for name in kept}
    return {
        "format": hf_folder.DEEVISUM_FORMAT,
        "exit_layers": list(source.config.exit_layers),
        "exit_policy": policy.to_json(),
        "calibration": calibration,
        "label_tokens": list(encoder.prompts.label_tokens),
        "prompt_template": template.text,
        "num_frames": run.data.num_frames,
        "segment_s": run.data.segment_s,
        "text_len": run.data.text_len,
        "resize": source.resize,
        # null: no weights of Google's are in it.
        "origin": _base_model(source.start.origin)
        or (source.start.origin and "released weights of PaliGemma 2"),
    }


def _read_report(source: Source) -> dict[str, Any] | None:
    if source.run is None:
        return None
    file = source.start.folder / "report.json"
    return read_json(file, "evaluate the run again") if exists(file) else None


# Google's, at the end of a path: a folder of that name, a file of big_vision, or what the Hub's own
# cache makes of it.
_PUBLISHED = (
    r"(?:^|/|models--google--)"
    r"(paligemma2-(?:(?:3b|10b|28b)-(?:pt-(?:224|448|896)|mix-(?:224|448))|(?:3b|10b)-ft-docci-448))"
    r"(?:\.(?:[\w-]+\.)*npz|/snapshots/\w+)?/?$"
)


def _base_model(origin: str | None) -> str | None:
    """The name that released weights of Google have on the Hub, if their path still says it."""
    found = re.search(_PUBLISHED, origin or "")
    return f"google/{found[1]}" if found else None
