"""Trains and prunes a model: by default ResNet-20 on the digits.

    python train.py
    python train.py --config=configs/digits_mlp_global_95.py --workdir=/tmp/mlp
    python train.py --config.prune.final_sparsity=0.95 --config.seed=1
    python train.py --config=configs/resnet50_filters_1.py --plan

The same command again resumes a run that was stopped. On several hosts each
runs the same command with --distributed; docs/pods.md has the rest. --plan
trains nothing and needs no data: it shows what the run would end with, and
writes it to plan.json if a --workdir is given. --sample="The " has a trained
language model go on with that text. --help lists all configs and their fields.
"""

import ast
import contextlib
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags


@contextlib.contextmanager
def _telling(message: str) -> Iterator[None]:
    """Shows a message on a terminal until a block is done.

    It does not move: imports of tfds and a thread that imports get in each other's way.
    """
    if sys.stdout.isatty():
        print(message, end="", flush=True)
    yield
    if sys.stdout.isatty():
        print("\r\x1b[2K", end="", flush=True)


with _telling("starting"):  # these take seconds
    from agp_jax.data import DataError
    from agp_jax.models.torch_weights import WeightsError
    from agp_jax.training.config import ConfigError
    from agp_jax.training.fields import list_fields, nearest
    from agp_jax.training.loop import run, show_plan
    from agp_jax.training.processes import ProcessError, connect, leave
    from agp_jax.training.sampling import write_text
    from agp_jax.training.workdirs import WorkdirError

_CONFIGS = Path(__file__).parent / "configs"
_EMBEDDED = _CONFIGS / "digits_resnet20_element_90.py"
_HELP = ("--help", "-help", "-h", "-?")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file with get_config(); by default the digits."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; by default runs/, named by the experiment."
)
_PLAN = flags.DEFINE_boolean(
    "plan", False, "Show the events, every tensor and the totals; train nothing."
)
_SAMPLE = flags.DEFINE_string(
    "sample", None, "Train nothing: write a text that begins so, from the checkpoint."
)
_SAMPLE_LENGTH = flags.DEFINE_integer("sample_length", 400, "Its length in tokens.")
_SAMPLE_SEED = flags.DEFINE_integer("sample_seed", 0, "The seed of its draws.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "What logits are divided by; 0 takes the likeliest token."
)
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "Train together with the other processes of the TPU pod or Slurm job.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0; where --distributed cannot find the others by itself.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train, with --coordinator_address."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, counted from 0."
)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise ConfigError(f"unexpected argument {arguments[1]!r}; see --help")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    address = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(part is not None for part in address):
        connect(*address)
    if _PLAN.value:
        show_plan(_CONFIG.value, _WORKDIR.value)
        return
    workdir = _WORKDIR.value or _default_workdir()
    if _SAMPLE.value is None:
        run(_CONFIG.value, workdir)
        return
    text = write_text(
        _CONFIG.value,
        workdir,
        _SAMPLE.value,
        length=_SAMPLE_LENGTH.value,
        temperature=_TEMPERATURE.value,
        seed=_SAMPLE_SEED.value,
    )
    print(text)


def _default_workdir() -> Path:
    """A directory for this experiment: its config file and what was overridden."""
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    changes = [
        f"{key}={value}"
        for key, value in sorted(overrides.items())
        if key != "data.dir" and not key.startswith("devices.")
    ]
    return Path("runs") / ",".join([_config_file().stem, *changes])


def _config_file() -> Path:
    return Path(config_flags.get_config_filename(flags.FLAGS["config"]))


def _parse_flags(arguments: list[str]) -> list[str]:
    if set(_HELP) & set(arguments):
        print(_describe_usage(shutil.get_terminal_size().columns))
        sys.exit()
    if not any(re.match("--?config(=|$)", argument) for argument in arguments):
        arguments = [arguments[0], f"--config={_EMBEDDED}", *arguments[1:]]
    try:
        rest = flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        options = [f"--{name}" for name in flags.FLAGS]
        options += [f"--config.{field.name}" for field in list_fields()]
        raise ConfigError(
            f"there is no option --{error.flagname}; "
            f"nearest: {nearest(f'--{error.flagname}', options)}"
        ) from error
    except flags.Error as error:
        raise ConfigError(f"{_last_line(error)} (see --help)") from error
    except Exception as error:  # whatever a config file raises
        _check_fields(arguments)
        raise ConfigError(f"{type(error).__name__}: {_last_line(error)}") from error
    if not _config_file().is_file():
        names = [path.stem for path in _CONFIGS.glob("*.py")]
        raise ConfigError(
            f"there is no config file {_config_file()}; "
            f"nearest: {nearest(_config_file().stem, names)} in {_CONFIGS}"
        )
    return rest


def _check_fields(arguments: list[str]) -> None:
    """Whether all fields that are to be overridden are there."""
    names = [field.name for field in list_fields()]
    for argument in arguments:
        found = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if found and not any(f"{found[1]}.".startswith(f"{name}.") for name in names):
            raise ConfigError(
                f"a config has no field {found[1]!r}; "
                f"nearest: {nearest(found[1], names)} (all of them: --help)"
            )


def _describe_usage(width: int) -> str:
    """What `--help` prints: the options, the configs and the fields of a config."""

    def entry(name: str, about: str) -> str:
        indents = {"initial_indent": "      ", "subsequent_indent": "      "}
        return f"  {name}\n" + textwrap.fill(about, width, **indents)

    configs = []
    for path in sorted(_CONFIGS.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(getattr(node, "name", "") == "get_config" for node in tree.body):
            about = (ast.get_docstring(tree) or "").partition("\n\n")[0]
            configs.append(entry(path.stem, " ".join(about.split())))
    fields = [
        entry(f"{field.name}={field.default!r}", field.about)
        for field in list_fields()
        if field.default is not None  # else it is none that a command can set
    ]
    return "\n".join(
        [
            __doc__ or "",
            flags.FLAGS.main_module_help(),
            "\nconfigs, of --config=configs/NAME.py:\n",
            *configs,
            "\nfields of a config and their defaults, of --config.FIELD=VALUE:\n",
            *fields,
        ]
    )


def _last_line(error: Exception) -> str:
    """What `error` says; the last line where its text is a traceback."""
    return str(error).strip().splitlines()[-1]


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse_flags)
    except (
        ConfigError,
        DataError,
        ProcessError,
        WeightsError,
        WorkdirError,
    ) as error:
        leave(f"error: {error}")
    except KeyboardInterrupt:
        leave("interrupted; the same command resumes the run")
    except Exception:
        leave(traceback.format_exc())
