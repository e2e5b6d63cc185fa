"""Train many locales at once, and merge them while they train.

Writes into the run directory (--output-dir): a folder for each locale with its checkpoints and logs, merged_models/,
merge_history.json, final_statistics.json, training_metrics.json, report.html and the other files of a run. Without
arguments it trains with the values of recipes/configs/iterative_merge.yaml; --help lists the options.

    python recipes/iterative_merge.py --locales en-US,fr-FR,de-DE --max-epochs 15 --merge-frequency 3
    accelerate launch recipes/iterative_merge.py --config run.yaml
"""

import sys

from toolkit.cli.train import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe("iterative-merge", sys.argv[1:]))
