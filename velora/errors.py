"""The errors of the program and the exit status that each one ends it with."""


class ConfigError(ValueError):
    """The configuration or the data is wrong. The text names the key, its value and the remedy; exit status 2."""


class RunError(RuntimeError):
    """A run ended badly after it had started; its record has been written. Exit status 1."""


class Diverged(RunError):
    """The loss, the gradient norm or a score is not finite."""


class Interrupted(RunError):
    """The run was told to stop (Ctrl-C or SIGTERM); a checkpoint was saved where one was possible."""
