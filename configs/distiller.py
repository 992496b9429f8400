"""What the configs of Intel Distiller's AGP examples share.

Distiller counts in epochs, so these configs are written in epochs: of every field that
counts steps, and of every schedule. `in_steps` makes the config that runs. Distiller's
optimizer, batch size and augmentation are the same in all of them: SGD with momentum
0.9, weight decay 1e-4 on all parameters, batches of 256, cross entropy without label
smoothing. docs/published.md has all results.
"""

import dataclasses

import agp_jax as agp
from agp_jax.training.config import (
    Config,
    Data,
    GroupLasso,
    Model,
    Optimizer,
    Prune,
)
from agp_jax.training.published import Published

BATCH_SIZE = 256


def imagenet(
    model: str,
    *,
    weights: str,
    epochs: int,
    optimizer: Optimizer,
    rules: tuple[agp.Rule, ...],
    published: Published,
    hold_out: float = 0.0,
    cut_epoch: int = 0,
    lasso: GroupLasso | None = None,
) -> Config:
    """An example on ImageNet that starts from published weights."""
    return in_steps(
        Config(
            steps=epochs,
            batch_size=BATCH_SIZE,
            log_every=1,
            checkpoint_every=1,
            data=Data(
                name="imagenet2012", augment="resized_crop_flip", hold_out=hold_out
            ),
            model=Model(name=model, weights=weights),
            optimizer=optimizer,
            lasso=lasso or GroupLasso(),
            prune=Prune(rules=rules, coupled=cut_epoch > 0, cut_step=cut_epoch),
            published=published,
        )
    )


def resnet50_filters(
    *, rules: tuple[agp.Rule, ...], published: Published, decay_end: int = 80
) -> Config:
    """An example of ResNet-50 whose filters are cut out after epoch 31 of 100."""
    return imagenet(
        "resnet50",
        weights="resnet50.safetensors",
        epochs=100,
        optimizer=exponential(0.0005, 0.95, start=40, end=decay_end),
        rules=rules,
        cut_epoch=31,
        published=published,
    )


def cifar10(
    *,
    learning_rate: float,
    rules: tuple[agp.Rule, ...],
    cut_epoch: int,
    published: Published,
) -> Config:
    """An example of ResNet-20 on CIFAR-10 that starts from Distiller's baseline.

    180 epochs; the learning rate falls tenfold every 50.
    """
    return in_steps(
        Config(
            steps=180,
            batch_size=BATCH_SIZE,
            log_every=1,
            checkpoint_every=10,
            data=Data(name="cifar10", augment="crop_flip"),
            model=Model(
                name="resnet20_projection", weights="checkpoint_trained_dense.pth.tar"
            ),
            optimizer=Optimizer(
                learning_rate=learning_rate, decay="steps", decay_at=(50, 100, 150)
            ),
            prune=Prune(rules=rules, coupled=True, cut_step=cut_epoch),
            published=published,
        )
    )


def pruner(
    pattern: str,
    structure: agp.Structure,
    sparsities: tuple[float, float],
    epochs: tuple[int, int, int],
) -> agp.Rule:
    """A rule that follows a Distiller schedule, in epochs.

    Args:
      pattern: which parameters it prunes.
      structure: how.
      sparsities: the initial and the final one.
      epochs: Distiller's starting_epoch, ending_epoch, which is exclusive, and
        frequency.
    """
    initial, final = sparsities
    start, end, every = epochs
    schedule = agp.polynomial_schedule(
        final,
        initial_sparsity=initial,
        begin_step=start,
        end_step=end - 1,
        frequency=every,
    )
    return agp.Rule(pattern, structure, schedule)


def exponential(
    learning_rate: float, factor: float, *, start: int, end: int
) -> Optimizer:
    """The learning rate of an ExponentialLR between two epochs, as it really ran.

    Distiller took its policy's first step at the end of epoch `start`, and counted the
    powers of `factor` from epoch 0. So the rate jumps by factor^(start + 1) there, and
    after epoch `end` stays as it is. `--config.optimizer.decay_origin` with the steps
    before the jump takes it out.
    """
    return Optimizer(
        learning_rate=learning_rate,
        decay="exponential",
        decay_factor=factor,
        decay_begin=start + 1,
        decay_end=end,
    )


def in_steps(config: Config) -> Config:
    """A config whose numbers of steps were given in epochs."""
    epoch = config.steps_per_epoch

    def scale(part, *names):
        changes = {name: getattr(part, name) * epoch for name in names}
        return dataclasses.replace(part, **changes)

    def scale_rule(rule):
        if rule.schedule is None:
            return rule
        schedule = scale(rule.schedule, "begin_step", "end_step", "frequency")
        return dataclasses.replace(rule, schedule=schedule)

    optimizer = scale(
        config.optimizer, "decay_begin", "decay_end", "decay_every", "decay_origin"
    )
    optimizer.decay_at = tuple(at * epoch for at in optimizer.decay_at)
    prune = scale(config.prune, "cut_step")
    prune.rules = tuple(map(scale_rule, prune.rules))
    config = scale(config, "steps", "log_every", "checkpoint_every")
    return dataclasses.replace(
        config,
        optimizer=optimizer,
        lasso=scale(config.lasso, "end_step"),
        prune=prune,
    )
