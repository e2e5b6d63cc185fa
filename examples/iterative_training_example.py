"""Iterative training and merging from Python: a run, custom weights, a custom schedule, a look at what came out.

    python examples/iterative_training_example.py [--model FOLDER] [--data FOLDER] [--output-dir FOLDER]

Without options it trains the sample collection's encoder on its intents, three locales, two epochs: some minutes on
two cores.
"""

import argparse
from pathlib import Path

import toolkit


@toolkit.weighting("root_of_rows")
def root_of_rows(inputs):
    """Every locale by the square root of its rows."""
    return {source: inputs.num_examples[source] ** 0.5 for source in inputs.sources}


def weights_by_hand() -> None:
    states = {"en-US": ..., "fr-FR": ..., "de-DE": ...}  # the names count, not the values
    custom_weights = {"en-US": 0.4, "fr-FR": 0.3, "de-DE": 0.3}
    calculator = toolkit.IterativeWeightCalculator(
        active_model_states=states, target_locales=["en-US", "fr-FR"], custom_weights=custom_weights
    )
    print("custom weights:", calculator.calculate())
    similar = toolkit.IterativeWeightCalculator(active_model_states=states, target_locales=["sq-AL"])
    print("weights by similarity to sq-AL:", {k: round(v, 3) for k, v in similar.calculate().items()})


def schedule_by_hand() -> None:
    scheduler = toolkit.AdaptiveMergeScheduler(
        base_merge_frequency=3, convergence_threshold=1e-4, min_merge_frequency=1, max_merge_frequency=10
    )
    decision = scheduler.evaluate_merge_necessity(current_epoch=3, active_locales=["en-US", "fr-FR"])
    if decision.should_merge:
        print(f"merge recommended: {decision.reason}")


def train(model: str | None, data: str | None, output_dir: Path) -> None:
    sources = {name: value for name, value in {"model": model, "data": data}.items() if value is not None}
    config = toolkit.create_default_config(
        ["en-US", "fr-FR", "de-DE"],
        merge=toolkit.IterativeMergeConfig(merge_frequency=1, merge_gate=True),
        weight_calculation="root_of_rows",
        max_epochs=2,
        learning_rate=2e-3,
        output_dir=output_dir,
        **sources,
    )
    run = toolkit.IterativeTrainingOrchestrator(config).train()
    for merge in run.merges():
        print(f"epoch {merge['epoch']}: weights {merge['weights']}, gate {merge['gate']}")
    for locale, verdict in run.final_statistics()["verdicts"].items():
        print(f"{locale}: merging while training {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder in place of the sample")
    parser.add_argument("--data", help="a data folder in place of the sample")
    parser.add_argument("--output-dir", type=Path, default=Path("iterative_example"))
    options = parser.parse_args()
    weights_by_hand()
    schedule_by_hand()
    train(options.model, options.data, options.output_dir)


if __name__ == "__main__":
    main()
