"""Every exception that meldkit raises on purpose.

MeldkitError                    exit status 1
├── InputError                  exit status 2: what the user gave is wrong; nothing was started
│   ├── ConfigError             options and configuration files (all problems at once)
│   ├── DataError               data files, formats, splits
│   ├── ModelError              model folders, tokenizers, chat templates, adapters
│   ├── LaunchError             devices, processes, DeepSpeed
│   ├── MissingDependencyError  an optional package is not installed
│   └── RunDirectoryError       the output folder belongs to another run, or cannot be written
├── RunError                    exit status 1: the run started and failed
│   ├── NonFiniteLossError      the loss became NaN or infinite
│   ├── CheckpointError         a checkpoint is damaged, foreign or missing
│   ├── MergeError              a merge cannot give a sound result, or its output is not what was written
│   ├── WorldSizeError          the processes or devices are not those that the plan asked for
│   └── BackendError            what trains is not what was asked for, and would not say so by itself
└── Interrupted                 exit status 75: SIGINT or SIGTERM; the run can be resumed

A message says what is wrong, where (file and line, tensor, round, participant) and what to do.
"""

from collections.abc import Sequence


class MeldkitError(Exception):
    """Base of all errors of meldkit.

    Args:
        message: what is wrong and where, one sentence or a few lines.
        hint: what the user can do about it; printed on a line of its own.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class InputError(MeldkitError):
    exit_status = 2


class ConfigError(InputError):
    """One or more wrong options, reported together.

    Args:
        problems: one message each, e.g. ``run.yaml:3: unknown option 'learnin_rate'; did you mean
            'learning_rate'?``
    """

    def __init__(self, problems: Sequence[str], *, hint: str | None = None) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem in the configuration" if count == 1 else f"{count} problems in the configuration"
        super().__init__("\n".join([f"{head}:", *(f"  - {p}" for p in self.problems)]), hint=hint)


class DataError(InputError):
    pass


class ModelError(InputError):
    pass


class LaunchError(InputError):
    pass


class MissingDependencyError(InputError):
    """An optional package is needed and not installed.

    Args:
        package: name on the package index.
        purpose: what asked for it, e.g. ``--load-in-4bit``.
        extra: the extra of meldkit that brings it, if there is one.
    """

    def __init__(self, package: str, *, purpose: str, extra: str | None = None) -> None:
        install = f'pip install "meldkit[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{purpose} needs the package {package}, which is not installed", hint=install)


class RunDirectoryError(InputError):
    pass


class RunError(MeldkitError):
    pass


class NonFiniteLossError(RunError):
    pass


class CheckpointError(RunError):
    pass


class MergeError(RunError):
    num_attempts: int = 1
    """How often the merge was tried."""


class WorldSizeError(RunError):
    pass


class BackendError(RunError):
    pass


class Interrupted(MeldkitError):
    exit_status = 75
