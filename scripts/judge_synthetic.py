"""How far knowing the causes gets: `python scripts/judge_synthetic.py [--data_dir DIR]`.

Holds predictors that know what the generator knows against the annotators of the built
`synthetic/quickstart`: with every cause of importance, and with one of them replaced by its mean.
The best that a model could learn, and what each sense is worth.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from deevisum_jax import datasets, evaluation
from deevisum_jax.config import DataConfig
from deevisum_jax.data.segments import segment_bounds
from deevisum_jax.summary import protocols
from tfds_builders.synthetic import scenario
from tfds_builders.synthetic.synthetic import CONFIGS


def main() -> None:
    """Prints a table: tau, rho and F1 (in percent) on the test split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="~/tensorflow_datasets")
    records = datasets.Dataset(
        DataConfig(dataset="synthetic/quickstart", data_dir=parser.parse_args().data_dir)
    )
    [config] = [config for config in CONFIGS if config.name == "quickstart"]

    truths = evaluation.ground_truths(records.split("test"))
    causes = [
        scenario.causes(
            scenario.draw_scenario(seed=config.seed, split="test", index=i, rules=config.rules)
        )
        for i in range(len(truths))
    ]
    rows = {"every cause": [scenario.importance(known) for known in causes]}
    for name in (field.name for field in dataclasses.fields(scenario.Causes)):
        usual = np.concatenate([getattr(known, name) for known in causes]).mean()
        rows[f"not the {name}"] = [
            scenario.importance(
                dataclasses.replace(known, **{name: np.full_like(getattr(known, name), usual)})
            )
            for known in causes
        ]

    table = {
        name: protocols.summarize_results(
            [
                protocols.evaluate_video(
                    truth, segment_bounds(truth.duration_s, scenario.POINT_S), scores
                )
                for truth, scores in zip(truths, predictions, strict=True)
            ]
        )
        for name, predictions in rows.items()
    }
    train = evaluation.ground_truths(records.split("train"))
    table |= protocols.baseline_rows(train, truths, seed=0)
    for name, result in table.items():
        print(f"{name:<20}{result.tau:>8.3f}{result.rho:>8.3f}{100 * result.f1:>8.1f}")


if __name__ == "__main__":
    main()
