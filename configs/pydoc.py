"""What the configs of decoders on Python's documentation share."""

import agp_jax as agp
from agp_jax.training.config import Config, Data, Model, Optimizer, Prune


def decoder(
    *, final_sparsity: float, rules: tuple[agp.Rule, ...], cut_step: int = 0
) -> Config:
    """A decoder of 0.8 million weights, pruned from 20 to 70 % of its training."""
    return Config(
        steps=2000,
        batch_size=16,
        log_every=100,
        checkpoint_every=500,
        data=Data(name="pydoc_chars", bptt=64, eval_rows=16),
        model=Model(name="gpt", width=128, depth=4, num_heads=4),
        optimizer=Optimizer(
            name="adamw",
            learning_rate=0.003,
            warmup_steps=100,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        prune=Prune(
            final_sparsity=final_sparsity,
            begin=0.2,
            end=0.7,
            frequency=20,
            rules=rules,
            coupled=cut_step > 0,
            cut_step=cut_step,
        ),
    )
