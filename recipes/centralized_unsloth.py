"""Train one model on all the data with Unsloth.

Writes into the run directory (--output-dir): final_model/ (adapter or model, tokenizer, chat template),
training.log, training_history.json, training_metrics.json, report.html, checkpoints and TensorBoard logs.
The same options, data, masks and files as recipes/centralized_hf.py, and without arguments the same values
(recipes/configs/centralized_hf.yaml); --help lists the options.

    python recipes/centralized_unsloth.py --config run.yaml --max-epochs 1
    accelerate launch recipes/centralized_unsloth.py --config run.yaml
"""

import sys

from toolkit.cli.train import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe("centralized-unsloth", sys.argv[1:]))
