"""An arm for bench/compare_gate.py: the recipe, asleep for a fifth of every step."""

import time
from pathlib import Path
from typing import Any

from toolkit.cli.train import run_config
from toolkit.trials.meldkit import RECIPE, config_of
from toolkit.trials.probe import Probe

SLOWDOWN = 0.2


def main() -> None:
    probe = Probe.from_arguments()
    config = config_of(probe.settings, probe.spec["arm"]["options"], Path(probe.spec["folder"]) / "run")

    def on_trainer(trainer: Any) -> None:
        from transformers import TrainerCallback

        class Sleeper(TrainerCallback):
            began = 0.0

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.began = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                time.sleep(SLOWDOWN * (time.perf_counter() - self.began))
                self.began = time.perf_counter()

        trainer.underlying.add_callback(Sleeper())  # before the probe, whose stamp comes after the sleep
        probe.attach(trainer.underlying)

    run_config(RECIPE, config, on_trainer=on_trainer)
    probe.finish()


if __name__ == "__main__":
    main()
