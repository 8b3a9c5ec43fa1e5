"""Does an exported folder say what its checkpoint says? `python scripts/check_export.py --help`.

Needs torch and transformers (the extra `test`); runs both models in float32 on random pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# The same products on both sides; XLA reads it once.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from deevisum_jax import runs, weights
from deevisum_jax.convert import hf_folder
from deevisum_jax.data import prompts
from deevisum_jax.data.tokenizer import BOS, PAD
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.inference import generation, scoring
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models import lora, paligemma2

TOLERANCE = 1e-4
_WORDS = ("dog", "runs", "after", "the", "red", "ball", "while", "people", "laugh", "and", "clap")
_EXAMPLES = """\
example:
  python scripts/check_export.py --checkpoint runs/quickstart --exported exported/quickstart

Exit status: 0 they agree, 1 they do not, 2 a mistake in what was given.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What a model says of the segments."""

    logits: np.ndarray  # float32[B, V] at the last prefix position
    tokens: np.ndarray  # int32[B, num_tokens], greedy
    class_logits: np.ndarray | None = None  # float32[B, 2] at the exit taken
    cosine: np.ndarray | None = None  # float32[B] there
    exit_layer: np.ndarray | None = None  # int[B]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/check_export.py",
        description="Runs a checkpoint and its Hugging Face export side by side in float32.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="what was exported")
    add("--exported", required=True, metavar="DIR", help="what scripts/export_hf.py wrote")
    add("--tokenizer", default="", metavar="FILE", help="as for scripts/export_hf.py")
    add("--segments", type=int, default=64, help="random ones to compare (64)")
    add("--tokens", type=int, default=32, help="to generate for the first four (32)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    absl.logging.set_verbosity(absl.logging.ERROR)
    transformers.utils.logging.set_verbosity_error()

    if args.segments < 1 or args.tokens < 1:
        parser.error("--segments and --tokens must be at least 1")
    config_file = pathlib.Path(args.exported) / "config.json"
    if not config_file.is_file():
        raise UserError(f"{args.exported} is no folder that scripts/export_hf.py wrote")
    exported = json.loads(config_file.read_text(encoding="utf-8"))
    source = weights.open_source(args.checkpoint, tokenizer_path=args.tokenizer)
    if source.config.exit_layers and "deevisum" not in exported:
        raise UserError(
            f"{args.exported} has no exit heads, but {source.path} has; it is another's export"
        )
    if source.tokens is None:
        raise UserError(f"{source.path} brings no tokenizer; give --tokenizer the one exported")
    frames, texts = random_segments(source, args.segments, args.seed)
    policy = None
    if source.config.exit_layers:
        hf_folder.check_deevisum(exported["deevisum"], config_file)
        policy = ExitPolicy.from_json(exported["deevisum"]["exit_policy"])
    if source.run is not None and policy != runs.exit_policy(source.start.folder, source.run)[0]:
        raise UserError(
            f"{args.exported} lets segments leave otherwise than {source.path} does now, which was "
            "calibrated since, or is no longer; export it again"
        )
    ours = say_ours(source, frames, texts, args.tokens, exported["torch_dtype"], policy)
    gc.collect()  # the parameters
    with torch.no_grad():
        theirs = say_theirs(args.exported, source, frames, texts, args.tokens)
    return report(ours, theirs)


def random_segments(
    source: weights.Source, count: int, seed: int
) -> tuple[np.ndarray, list[list[int]]]:
    r"""Frames uint8[B, I, H, W, 3], and `[BOS prompt]["\n"]` of each."""
    rng = np.random.default_rng(seed)
    size = source.config.img.image_size
    encode = source.tokens.encode
    num_frames, template = 1, prompts.PromptTemplate("caption {title}")
    if source.run is not None:
        num_frames = source.run.data.num_frames
        template = prompts.load_template(str(source.start.folder / runs.TEMPLATE_FILE))
    texts = []
    for _ in range(count):
        said = [" ".join(rng.choice(_WORDS, rng.integers(1, 8))) for _ in range(3)]
        text = template.fill(title=said[0], transcript=said[1], sound=said[2])
        texts.append([BOS, *encode(text), *source.tokens.separator])
    # Smooth pictures: a few colours, larger.
    small = rng.integers(0, 256, (count, num_frames, 4, 4, 3)).astype(np.uint8)
    index = np.arange(size) * 4 // size
    return small[:, :, index][:, :, :, index], texts


def say_ours(
    source: weights.Source,
    frames: np.ndarray,
    texts: list[list[int]],
    num_tokens: int,
    dtype: str,
    policy: ExitPolicy | None,
) -> Said:
    """In JAX, with the parameters rounded to the dtype that they were exported in.

    Segments leave by the exported `policy`; None of a model without exits. What was exported in
    float32 is held against the run's own adapters and codes.
    """
    config = dataclasses.replace(source.config, dtype="float32")
    params = source.load()
    if config.lora is None or dtype != "float32":
        params = lora.merge(params, config.lora, config.param_dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        config = paligemma2.without_lora(config)
    width = max(map(len, texts))
    tokens = np.full((len(texts), width), PAD, np.int32)
    mask = np.zeros((len(texts), width), bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, True

    @jax.jit
    def run(params: Any, frames: Any, tokens: Any, mask: Any) -> tuple[Any, Any]:
        model = paligemma2.bind(config, params)
        embedded = model.embed(frames, tokens, jnp.zeros_like(mask), mask)
        last, rows = model.run_layers(embedded, collect=embedded.last_prefix_row)
        logits = model.logits(model.llm.final_norm(last.last_prefix_row(last.x)))
        exits = None
        if config.exit_layers:
            exits = model.exits(jnp.stack([rows[layer - 1] for layer in config.exit_layers]))
        return logits, exits

    parts = [
        run(params, frames[i : i + 8], tokens[i : i + 8], mask[i : i + 8])
        for i in range(0, len(texts), 8)
    ]
    generated = generation.generate(
        config,
        params,
        frames[:4],
        tokens[:4],
        mask[:4],
        sampling=generation.Sampling(max_new_tokens=num_tokens, stop_tokens=()),
        key=jax.random.key(0),
    )
    said = Said(
        logits=np.concatenate([logits for logits, _ in parts]),
        tokens=np.asarray(generated.tokens),
    )
    if not config.exit_layers:
        return said
    exits = jax.tree.map(
        lambda *of_parts: np.concatenate(of_parts, axis=1), *(exits for _, exits in parts)
    )
    taken = policy.exit_index(scoring.read(exits))
    rows = np.arange(len(taken))
    return dataclasses.replace(
        said,
        class_logits=exits.class_logits[taken, rows],
        cosine=exits.cosine[taken, rows],
        exit_layer=np.asarray(config.exit_layers)[taken],
    )


def say_theirs(
    folder: str, source: weights.Source, frames: np.ndarray, texts: list[list[int]], num_tokens: int
) -> Said:
    """In PyTorch, segment by segment."""
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    pixels = torch.from_numpy(frames / np.float32(127.5) - 1).float().permute(0, 1, 4, 2, 3)
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, **kwargs).eval()
    model.generation_config.eos_token_id = None  # on behind the end, for the sake of comparing
    image = [model.config.image_token_id] * (source.config.img.num_patches * frames.shape[1])
    logits, generated = [], []
    for row, text in enumerate(texts):
        ids = torch.tensor([image + text])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "pixel_values": pixels[row],
        }
        found = model(**inputs, logits_to_keep=1).logits[0, 0].numpy()
        logits.append(found[: source.config.llm.vocab_size])
        if row < 4:
            out = model.generate(
                **inputs,
                max_new_tokens=num_tokens,
                do_sample=False,
            )
            generated.append(out[0, ids.shape[1] :].numpy())
    del model
    gc.collect()
    said = Said(logits=np.stack(logits), tokens=np.stack(generated))
    if not source.config.exit_layers:
        return said
    scorer = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()
    scores = [
        scorer.score(pixels[row : row + 1], torch.tensor([text])) for row, text in enumerate(texts)
    ]
    return dataclasses.replace(
        said,
        class_logits=np.concatenate([score.class_logits.numpy() for score in scores]),
        cosine=np.concatenate([score.cosine.numpy() for score in scores]),
        exit_layer=np.concatenate([score.exit_layer.numpy() for score in scores]),
    )


def report(ours: Said, theirs: Said) -> int:
    """Prints how far they are apart; 0 if they agree, else 1."""
    same_tokens = ours.tokens == theirs.tokens
    checks = {
        "logits, largest difference": np.abs(ours.logits - theirs.logits).max(),
        "logits, largest of them": np.abs(ours.logits).max(),
        "greedy tokens that are the same": f"{same_tokens.sum()} of {same_tokens.size}",
    }
    agree = checks["logits, largest difference"] <= TOLERANCE and same_tokens.all()
    if ours.exit_layer is not None:
        same = ours.exit_layer == theirs.exit_layer
        difference, cosine_difference = (
            np.abs(of_ours - of_theirs)[same].max(initial=0.0)
            for of_ours, of_theirs in (
                (ours.class_logits, theirs.class_logits),
                (ours.cosine, theirs.cosine),
            )
        )
        layers, counts = np.unique(ours.exit_layer, return_counts=True)
        checks |= {
            "class scores, largest difference": difference,
            "cosines to the prototype, largest difference": cosine_difference,
            "segments that leave at the same exit": f"{same.sum()} of {same.size}",
            "segments by exit": dict(zip(layers.tolist(), counts.tolist(), strict=True)),
        }
        agree &= max(difference, cosine_difference) <= TOLERANCE and same.all()
    for name, value in checks.items():
        print(
            f"{name}: {value:.2e}" if isinstance(value, float | np.floating) else f"{name}: {value}"
        )
    print("they agree" if agree else f"they do NOT agree to {TOLERANCE:g}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
