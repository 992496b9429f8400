"""What an experiment is: plain values, checked before anything runs.

A file in `configs/` returns a `Config` from `get_config()`, and the command line
overrides its fields: `--config.prune.final_sparsity=0.95`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from agp_jax.data import DATASETS
from agp_jax.data.augmentations import AUGMENTATIONS
from agp_jax.data.corpora import CORPORA, corpus_facts
from agp_jax.data.text import steps_per_epoch
from agp_jax.models import LANGUAGE_MODELS, MODELS
from agp_jax.rules import Rule, dense
from agp_jax.schedules import Schedule, polynomial_schedule, schedule_within
from agp_jax.training.published import Published
from agp_jax.training.tasks import Task


class ConfigError(ValueError):
    """A config that cannot run: what was expected, what came, what to do."""


@dataclasses.dataclass
class Data:
    """The images, or the text.

    Attributes:
      name: a dataset of `agp_jax.data.DATASETS`, or a text of
        `agp_jax.data.corpora.CORPORA`.
      dir: where TFDS keeps datasets, empty for its usual place; of a text, where its
        files are.
      augment: a way of varying training images, of
        `agp_jax.data.augmentations.AUGMENTATIONS`.
      image_size: height and width of the crops that are trained on, where the images
        themselves are of many sizes; 0 for the dataset's own.
      hold_out: the fraction of the training images that are kept from training, and
        which the best checkpoint is then chosen by; 0 for none.
      bptt: of a text, how many tokens a row of a batch has: how far back in time
        gradients reach.
      eval_rows: of a text, how many rows it is divided into when a model is evaluated;
        1 is the text as one long sequence.
    """

    name: str = "digits"
    dir: str = ""
    augment: str = "none"
    image_size: int = 0
    hold_out: float = 0.0
    bptt: int = 35
    eval_rows: int = 1


@dataclasses.dataclass
class Model:
    """The network.

    Attributes:
      name: a model of `agp_jax.models.MODELS`; for a text, of `LANGUAGE_MODELS` there.
      width: channels of its first stage, or of a model of text all over; 0 for the
        published width.
      weights: a file of published weights to start from, see
        `agp_jax.models.torch_weights`; empty to start from random ones.
      depth: how many layers a model of text has; 0 for its own default.
      dropout: the fraction that a model of text drops in training.
      tied: whether an "lstm" decodes with its embedding; "gpt" always does.
      num_heads: of queries in each layer of a "gpt".
      num_kv_heads: of keys and values; 0 for as many as of queries.
      num_experts: MLPs in each layer of a "gpt", of which a router chooses
        `experts_per_token` for each token; 0 for a single one without a router.
      experts_per_token: how many it chooses.
      dtype: what the layers of a "gpt" compute in, "float32" or "bfloat16".
      remat: whether a "gpt" computes its layers again for the gradient.
    """

    name: str = "resnet20"
    width: int = 0
    weights: str = ""
    depth: int = 0
    dropout: float = 0.0
    tied: bool = True
    num_heads: int = 8
    num_kv_heads: int = 0
    num_experts: int = 0
    experts_per_token: int = 2
    dtype: str = "float32"
    remat: bool = False


@dataclasses.dataclass
class Optimizer:
    """The optimizer that pruning wraps.

    Attributes:
      name: "sgd" (with momentum) or "adamw".
      learning_rate: the highest learning rate.
      warmup_steps: steps over which it rises linearly from zero.
      decay: "cosine" to zero at the last step; "steps"; "exponential"; "plateau"; or
        "none".
      restart_at: with "cosine", the steps at which warm-up and decay begin anew, as
        after a cut at once; each decay then ends at the next of them.
      decay_factor: what each decay but "cosine" multiplies the rate by.
      decay_at: with "steps", at which steps.
      decay_every: with "exponential", after how many steps each, counted from
        `decay_origin`. It applies from `decay_begin` on, so the rate jumps there if it
        counts from earlier. After `decay_end` the rate stays.
      decay_begin, decay_end, decay_origin: see `decay_every`; a `decay_end` of 0 is the
        last step. With "plateau", evaluations count from `decay_begin` on.
      patience: with "plateau", how many evaluations in a row may bring no lower loss
        before the rate is lowered.
      cooldown: with "plateau", how many evaluations after that do not count.
      momentum: of "sgd".
      nesterov: of "sgd".
      weight_decay: times the weights; added to the gradient ("sgd") or decoupled
        ("adamw").
      clip_norm: gradients whose norm over all parameters is larger are scaled to it; 0
        for none.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    warmup_steps: int = 0
    decay: str = "cosine"
    restart_at: tuple[int, ...] = ()
    decay_factor: float = 0.1
    decay_at: tuple[int, ...] = ()
    decay_every: int = 1
    decay_begin: int = 0
    decay_end: int = 0
    decay_origin: int = 0
    patience: int = 0
    cooldown: int = 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    clip_norm: float = 0.0


@dataclasses.dataclass
class GroupLasso:
    """A penalty that drives whole kernels to zero: the sum of their L2 norms.

    A kernel is what a filter applies to one channel (arXiv:1608.03665 has the idea).

    Attributes:
      strength: what the sum is multiplied by and added to the loss; 0 for no penalty.
      pattern: a regular expression for the whole path of the parameters.
      end_step: the penalty ends with this step.
    """

    strength: float = 0.0
    pattern: str = ".*/kernel"
    end_step: int = 0


@dataclasses.dataclass
class Prune:
    """What is pruned: rules, and the schedule of the rules that bring none.

    Attributes:
      enabled: False trains the dense baseline.
      final_sparsity: the fraction of cells to remove.
      initial_sparsity: the fraction removed at the first event.
      begin_step: the first event.
      end_step: no event lies after it.
      frequency: steps between events.
      begin, end: instead of these steps, the first event and the latest end as
        fractions of the run; an `end` of 0 leaves it at steps.
      power: exponent of the curve, 3 in arXiv:1710.01878.
      rules: see `agp.Rule`; the first that matches a parameter wins.
      fold_norms: whether convolution kernels are ranked as they are once the
        normalisation that follows is folded into them.
      coupled: whether rules with filters, channels or heads prune whole units: every
        slice that the model couples to theirs. Layers and experts need it.
      cut_step: the step after which these units are cut out and a smaller model trains
        on, a multiple of `log_every` and not before the last event of these rules; 0
        for never. What they named then falls to the next rules that match it. If not
        `coupled`, what follows from the masks alone is cut, and the model's function
        changes as what it added to the masked filters goes, too.
      round_to: a cut leaves multiples of this many units.
      twin: trains, instead of the pruned model, a dense one of equal size, the same
        but narrower: "final" of as many weights as the pruned one has left in the end,
        "average" as it has on average over training; empty for the pruned one.
    """

    enabled: bool = True
    final_sparsity: float = 0.9
    initial_sparsity: float = 0.0
    begin_step: int = 0
    end_step: int = 0
    frequency: int = 1
    begin: float = 0.0
    end: float = 0.0
    power: float = 3.0
    rules: tuple[Rule, ...] = ()
    fold_norms: bool = False
    coupled: bool = False
    cut_step: int = 0
    round_to: int = 1
    twin: str = ""


@dataclasses.dataclass
class Distill:
    """A term of the loss by which the pruned model learns from its own dense past.

    The teacher is the model as it is when the first event prunes it, with its running
    statistics. It predicts each training batch beside the model, and takes as much
    memory as its parameters until the run ends.

    The loss is `(1 - weight) * loss + weight * T**2 * KL(teacher || model)` of the
    outputs divided by a temperature T (arXiv:1503.02531, section 2).

    Attributes:
      weight: of the term, from 0 for none to 1 for nothing else.
      temperature: T, positive; higher ones show more of what the teacher thinks
        unlikely.
    """

    weight: float = 0.0
    temperature: float = 2.0


@dataclasses.dataclass
class Devices:
    """How devices share the work; no part of the experiment, so a run may change it.

    Attributes:
      fsdp: over how many devices each large array of the state (parameters, optimizer
        state and masks) is divided; 1 for a copy on each. It divides the number of
        devices. The examples of a batch are divided over all of them.
    """

    fsdp: int = 1


@dataclasses.dataclass
class Config:
    """An experiment.

    Attributes:
      seed: of the initial weights, the order of the data and its augmentation.
      steps: optimizer steps of the whole run.
      batch_size: rows of a batch, images or rows of text, over all devices.
      log_every: steps between evaluations, each a line in `metrics.jsonl`.
      checkpoint_every: steps between checkpoints, a multiple of `log_every`.
      data, model, optimizer, lasso, prune, distill, devices: see their classes.
      published: what is known of the same experiment elsewhere, or None.
      task: makes a task of your own of the config: any data, any linen model; `data`
        and `model` are then its to read. By default the dataset decides.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 128
    log_every: int = 100
    checkpoint_every: int = 500
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    lasso: GroupLasso = dataclasses.field(default_factory=GroupLasso)
    prune: Prune = dataclasses.field(default_factory=Prune)
    distill: Distill = dataclasses.field(default_factory=Distill)
    devices: Devices = dataclasses.field(default_factory=Devices)
    published: Published | None = None
    task: Callable[["Config"], Task] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """How many batches the training data makes; of images the last may be smaller.

        Raises:
          ConfigError: with a task of your own, whose data is not known here.
        """
        if self.task is not None:
            raise ConfigError("config.steps_per_epoch is not known with config.task")
        if self.data.name in CORPORA:
            size = corpus_facts(self.data.name).sizes.train
            return steps_per_epoch(size, self.batch_size, self.data.bptt)
        size = DATASETS[self.data.name].train_size
        size -= math.floor(self.data.hold_out * size)
        return -(-size // self.batch_size)


def validate(config: Config) -> tuple[Rule, ...]:
    """Checks every value that can be checked without data or model.

    Returns:
      The rules of the run, as `make_rules` makes them.

    Raises:
      ConfigError: naming the field, its value and what it may be.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() must return a Config, got {config!r}")
    _check_types(config, "")
    for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
        _require(config, name, lambda x: x > 0, "at least 1")
    _require(config, "seed", lambda x: 0 <= x < 2**32, "in [0, 2**32)")
    _require(
        config,
        "checkpoint_every",
        lambda x: x % config.log_every == 0,
        f"a multiple of log_every, which is {config.log_every}",
    )
    _require(config, "devices.fsdp", lambda x: x > 0, "at least 1")
    if config.task is None:
        _check_data_and_model(config)
    elif config.model.weights:
        raise ConfigError(
            f"config.model.weights must be empty with config.task, as weights are read "
            f"for the bundled models alone, got {config.model.weights!r}"
        )
    _require(config, "model.width", lambda x: x >= 0, "0 (published) or positive")
    _require_one_of(config, "optimizer.name", ("sgd", "adamw"))
    _require_one_of(
        config,
        "optimizer.decay",
        ("cosine", "steps", "exponential", "plateau", "none"),
    )
    _require(config, "optimizer.learning_rate", lambda x: 0 < x < math.inf, "positive")
    _require(config, "optimizer.momentum", lambda x: 0 <= x < 1, "in [0, 1)")
    _require(
        config, "optimizer.weight_decay", lambda x: 0 <= x < math.inf, "at least 0"
    )
    _require(
        config,
        "optimizer.warmup_steps",
        lambda x: 0 <= x < config.steps,
        f"in [0, steps), and steps is {config.steps}",
    )
    _check_restarts(config)
    _require(config, "optimizer.decay_factor", lambda x: 0 < x < 1, "between 0 and 1")
    _require(config, "optimizer.decay_every", lambda x: x > 0, "at least 1")
    _require(config, "optimizer.clip_norm", lambda x: 0 <= x < math.inf, "at least 0")
    for name in ("decay_begin", "decay_end", "decay_origin", "patience", "cooldown"):
        _require(config, f"optimizer.{name}", lambda x: x >= 0, "at least 0")
    _require(config, "data.image_size", lambda x: x >= 0, "at least 0")
    _require(config, "data.hold_out", lambda x: 0 <= x < 1, "in [0, 1)")
    _require(config, "lasso.strength", lambda x: 0 <= x < math.inf, "at least 0")
    _require_one_of(config, "prune.twin", ("", "final", "average"))
    _require(config, "prune.round_to", lambda x: x > 0, "at least 1")
    _require(config, "distill.weight", lambda x: 0 <= x <= 1, "in [0, 1]")
    _require(
        config, "distill.temperature", lambda x: 0 < x < math.inf, "positive and finite"
    )
    rules = make_rules(config)
    _check_cut_step(config, rules)
    _check_teacher(config, rules)
    return rules


def _check_restarts(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.decay != "cosine":
        expected = f"empty with decay {optimizer.decay!r}"
        _require(config, "optimizer.restart_at", lambda x: not x, expected)
    least = optimizer.warmup_steps + 1

    def has_room(starts: Sequence[int]) -> bool:
        stops = (*starts[1:], config.steps)
        return all(b - a >= least for a, b in zip(starts, stops, strict=True))

    _require(
        config,
        "optimizer.restart_at",
        lambda x: has_room((0, *x)),
        f"increasing steps, at least {least} apart with 0 and {config.steps}, so that "
        f"each warm-up ends",
    )


def _check_data_and_model(config: Config) -> None:
    _require_one_of(config, "data.name", [*DATASETS, *CORPORA])
    if config.data.name in DATASETS:
        _require_one_of(config, "data.augment", AUGMENTATIONS)
        _require_one_of(config, "model.name", MODELS)
        return
    for name, usual in (("augment", "none"), ("image_size", 0), ("hold_out", 0.0)):
        what = f"{usual!r} with a text, which has parts of its own"
        _require(config, f"data.{name}", lambda x, usual=usual: x == usual, what)
    for name in ("data.bptt", "data.eval_rows", "model.num_heads"):
        _require(config, name, lambda x: x > 0, "at least 1")
    for name in ("model.depth", "model.num_kv_heads", "model.num_experts"):
        _require(config, name, lambda x: x >= 0, "at least 0")
    if most := config.model.num_experts:
        what = f"from 1 to the {most} of model.num_experts"
        _require(config, "model.experts_per_token", lambda x: 1 <= x <= most, what)
    _require_one_of(config, "model.name", LANGUAGE_MODELS)
    _require_one_of(config, "model.dtype", ("float32", "bfloat16"))
    _require(config, "model.dropout", lambda x: 0 <= x < 1, "in [0, 1)")
    _require(config, "model.weights", lambda x: not x, "empty with a text")
    _require(config, "prune.fold_norms", lambda x: not x, "False with a text")
    try:
        _ = config.steps_per_epoch
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error


def _check_cut_step(config: Config, rules: Sequence[Rule]) -> None:
    if not config.prune.cut_step or not rules:
        return
    cut_by = [rule for rule in rules if rule.prunes_units]
    last = last_event(cut_by)
    if not cut_by:
        raise ConfigError(
            "config.prune.cut_step cuts out filters, channels, heads or experts, but "
            "no rule of config.prune.rules prunes any; set it to 0"
        )
    _require(
        config,
        "prune.cut_step",
        lambda x: last <= x <= config.steps and x % config.log_every == 0,
        f"0, or a multiple of log_every ({config.log_every}) from the last event (step "
        f"{last}) to the last step ({config.steps})",
    )


def _check_teacher(config: Config, rules: Sequence[Rule]) -> None:
    if not config.distill.weight:
        return
    if not rules:
        raise ConfigError(
            "config.distill learns from the model before it is pruned, but nothing is "
            "pruned; set config.distill.weight to 0"
        )
    first, least = first_event(rules), 1 if config.model.weights else 2
    if first < least:
        raise ConfigError(
            f"config.distill learns from the model before its first event, which must "
            f"be at step {least} or later, not at step {first}: begin to prune when it "
            f"has learned something, or set config.distill.weight to 0"
        )


def first_event(rules: Iterable[Rule]) -> int:
    """The step at which the first rule prunes; 0 without any."""
    schedules = {rule.schedule for rule in rules if rule.schedule}
    return min((int(s.events()[0][0]) for s in schedules), default=0)


def last_event(rules: Iterable[Rule]) -> int:
    """The step from which on all rules are at their final sparsity."""
    schedules = {rule.schedule for rule in rules if rule.schedule}
    return max((int(s.events()[0][-1]) for s in schedules), default=0)


def list_events(rules: Iterable[Rule]) -> list[int]:
    """The steps at which any of the rules removes more than before."""
    steps = set()
    for schedule in {rule.schedule for rule in rules if rule.schedule}:
        events, levels = schedule.events()
        steps.update(events[np.diff(levels, prepend=0.0) > 0].tolist())
    return sorted(steps)


def teacher_step(config: Config) -> int | None:
    """After how many updates the model becomes its own teacher; None for never."""
    return first_event(make_rules(config)) - 1 if config.distill.weight else None


def make_rules(config: Config) -> tuple[Rule, ...]:
    """The rules of the run, each with its schedule; none where pruning is off.

    Raises:
      ConfigError: if a schedule cannot be followed, does not end within the run, or
        no rule prunes.
    """
    prune = config.prune
    if not prune.enabled:
        return ()
    for rule in prune.rules:
        if not isinstance(rule, Rule):
            raise ConfigError(f"config.prune.rules must be agp.Rules, got {rule!r}")
    try:
        shared = _shared_schedule(prune, config.steps)
        rules = tuple(
            dataclasses.replace(rule, schedule=shared)
            if rule.structure and not rule.schedule
            else rule
            for rule in prune.rules
        )
    except ValueError as error:
        raise ConfigError(f"config.prune: {error}") from None
    if not any(rule.structure for rule in rules):
        raise ConfigError(
            "config.prune.rules prune nothing; set config.prune.enabled=False to train "
            "a dense model"
        )
    for rule in rules:
        if rule.needs_couplings and not prune.coupled:
            raise ConfigError(
                f"{rule} prunes {rule.structure}, whose place only couplings tell: "
                f"set config.prune.coupled=True"
            )
        if rule.schedule and rule.schedule.end_step > config.steps:
            raise ConfigError(
                f"{rule} ends at step {rule.schedule.end_step}, after the run's last "
                f"step {config.steps}: raise config.steps or lower "
                f"config.prune.end_step"
            )
    return rules


def _shared_schedule(prune: Prune, steps: int) -> Schedule:
    curve: dict[str, Any] = {
        "frequency": prune.frequency,
        "initial_sparsity": prune.initial_sparsity,
        "power": prune.power,
    }
    if prune.begin or prune.end:
        if prune.begin_step or prune.end_step:
            raise ValueError("give begin and end, or begin_step and end_step, not both")
        return schedule_within(
            steps, prune.final_sparsity, begin=prune.begin, end=prune.end, **curve
        )
    return polynomial_schedule(
        prune.final_sparsity,
        begin_step=prune.begin_step,
        end_step=prune.end_step,
        **curve,
    )


def to_dict(value: Any) -> Any:
    """A config, or a part of one, as JSON values: what is saved and compared.

    Where files lie, on which devices it runs and what others have published are no part
    of an experiment.
    """
    match value:
        case Rule():
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            score = fields.pop("score")
            return to_dict(fields) | {"score": getattr(score, "__name__", str(score))}
        case Schedule():
            return to_dict(dataclasses.asdict(value))
        case dict():
            return {str(key): to_dict(item) for key, item in value.items()}
        case list() | tuple():
            return [to_dict(item) for item in value]
        case bool() | int() | float() | str() | None:
            return value
    if type(value).__module__ == __name__:
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name not in ("dir", "devices", "published")
        }
        if isinstance(value, Config) and value.task is not None:
            fields["task"] = getattr(value.task, "__qualname__", "a function")
        if isinstance(value, Model):
            fields["weights"] = os.path.basename(value.weights)
        return to_dict(fields)
    return str(value)


def default_dict() -> Any:
    """`to_dict` of fields that nobody has set, those of a rule among them."""
    return to_dict(Config(prune=Prune(rules=(dense(".*"),))))


def _check_types(config: Any, prefix: str) -> None:
    """Every field must hold a value of its default's type; an int may be a float."""
    default = type(config)()
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), getattr(default, field.name)
        kind = type(expected)
        if field.name == "published" and isinstance(value, Published | None):
            continue
        if field.name == "task" and (value is None or callable(value)):
            continue
        if kind is float and type(value) is int:
            continue
        if kind is tuple and isinstance(value, list):
            continue
        if type(value) is not kind:
            raise ConfigError(
                f"config.{prefix}{field.name} must be of type {kind.__name__}, got "
                f"{value!r}"
            )
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{prefix}{field.name}.")


def _get(config: Config, name: str) -> Any:
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _require(config: Config, name: str, holds: Any, expected: str) -> None:
    value = _get(config, name)
    if not holds(value):
        raise ConfigError(f"config.{name} must be {expected}, got {value!r}")


def _require_one_of(config: Config, name: str, options: Sequence[str] | Any) -> None:
    value = _get(config, name)
    if value not in options:
        raise ConfigError(
            f"config.{name} must be one of {', '.join(options)}, got {value!r}"
        )
