"""ImageNet's ResNets as torchvision has them, as plain functions of abstract arrays."""

import jax
import jax.numpy as jnp
from jax import lax, nn


def imagenet_resnet(blocks, bottleneck):
    """(fn, variables, image): logits of one image; norms only scale and shift."""
    variables = {}

    def declare(name, *shape):
        return variables.setdefault(name, jax.ShapeDtypeStruct(shape, jnp.float32))

    def fn(variables, x, made=None):
        def weights(name, *shape):
            return jnp.zeros(made(name, *shape).shape) if made else variables[name]

        def layer(name, x, width, size=1, stride=1):
            kernel = weights(f"{name}/kernel", size, size, x.shape[-1], width)
            pad = (size - 1) // 2
            x = lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                ((pad, pad), (pad, pad)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            scale, bias = (
                weights(f"{name}/scale", width),
                weights(f"{name}/bias", width),
            )
            return x * scale[None, None, None] + bias[None, None, None]

        x = nn.relu(layer("stem", x, 64, 7, 2))
        x = lax.reduce_window(
            x,
            -jnp.inf,
            lax.max,
            (1, 3, 3, 1),
            (1, 2, 2, 1),
            ((0, 0), (1, 1), (1, 1), (0, 0)),
        )
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            out = 4 * width if bottleneck else width
            for block in range(count):
                name = f"stage{stage + 1}/block{block}"
                stride = 2 if stage and not block else 1
                y = x
                if bottleneck:
                    y = nn.relu(layer(f"{name}/conv1", y, width))
                    y = nn.relu(layer(f"{name}/conv2", y, width, 3, stride))
                    y = layer(f"{name}/conv3", y, out)
                else:
                    y = nn.relu(layer(f"{name}/conv1", y, width, 3, stride))
                    y = layer(f"{name}/conv2", y, out, 3)
                if x.shape != y.shape:
                    x = layer(f"{name}/shortcut", x, out, 1, stride)
                x = nn.relu(x + y)
        logits = x.mean((1, 2)) @ weights("head/kernel", x.shape[-1], 1000)
        return logits + weights("head/bias", 1000)[None]

    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    jax.eval_shape(lambda x: fn(None, x, declare), image)
    return fn, variables, image
