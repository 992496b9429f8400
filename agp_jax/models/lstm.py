"""LSTM language models (arXiv:1409.2329), as PyTorch's word_language_model has them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from agp_jax.models.layers import Embedding, stored_or_new


class LstmLanguageModel(nn.Module):
    """Tells what token follows each token of texts that go on from batch to batch.

    What a layer has seen so far is in the collection "carry" beside "params": its
    `hidden_state` and `cell_state`, (rows, width). A call starts from what is there, or
    from zeros where nothing is or where it is of other rows than the tokens, as that of
    training is in evaluation, and leaves its last state if "carry" is mutable.
    Training needs a key for "dropout".

    A cut may take units of a layer. Where the embedding is tied, those of the last
    layer are the embedding's features.

    Attributes:
      vocabulary: how many tokens there are.
      width: of the embedding and of each layer.
      depth: how many layers there are.
      dropout: the fraction of what the layers and the decoder read that training drops.
      tied: whether the decoder's kernel is the embedding.
    """

    vocabulary: int
    width: int = 200
    depth: int = 2
    dropout: float = 0.2
    tied: bool = True

    @nn.compact
    def __call__(
        self, tokens: jax.Array, starts: jax.Array, *, train: bool
    ) -> jax.Array:
        """Logits (rows, length, vocabulary) of what follows each of the tokens.

        Args:
          tokens: int32 (rows, length), which follow those of the call before.
          starts: bool (rows,), where a text starts and what was carried is forgotten.
          train: whether to drop.
        """
        drop = nn.Dropout(self.dropout, deterministic=not train)
        embedding = Embedding(
            self.vocabulary, self.width, _uniform(0.1), name="embedding"
        )
        x = embedding(tokens.T)  # (length, rows, width), as the layers step through it
        for i in range(self.depth):
            x = _Layer(self.width, name=f"layer{i}")(drop(x), starts)
        x = jnp.swapaxes(drop(x), 0, 1)
        attend = embedding.attend if self.tied else None
        return _Decoder(self.vocabulary, name="decoder")(x, attend)


def small_lstm(vocabulary: int, tied: bool = True) -> LstmLanguageModel:
    """The published model of width 200."""
    return LstmLanguageModel(vocabulary, 200, dropout=0.2, tied=tied)


def medium_lstm(vocabulary: int, tied: bool = True) -> LstmLanguageModel:
    """The published model of width 650."""
    return LstmLanguageModel(vocabulary, 650, dropout=0.5, tied=tied)


def large_lstm(vocabulary: int, tied: bool = True) -> LstmLanguageModel:
    """The published model of width 1500."""
    return LstmLanguageModel(vocabulary, 1500, dropout=0.65, tied=tied)


class _Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, starts: jax.Array) -> jax.Array:
        kernel, bias = _Gates(self.width, name="input")(x.shape[-1])
        recurrent, other_bias = _Gates(self.width, name="hidden")(self.width)
        # What does not depend on the state is one product for all steps.
        gates = x @ kernel + jnp.expand_dims(bias + other_bias, (0, 1))
        shape = (*gates.shape[1:-1], len(recurrent))
        before = [
            self._carried(name, starts, jnp.zeros(shape, gates.dtype))
            for name in ("hidden_state", "cell_state")
        ]
        outputs, *after = recur(gates, recurrent, *before)
        if self.is_mutable_collection("carry"):
            hidden, cell = before if self.is_initializing() else after
            self.put_variable("carry", "hidden_state", hidden)
            self.put_variable("carry", "cell_state", cell)
        return outputs

    def _carried(self, name: str, starts: jax.Array, zeros: jax.Array) -> jax.Array:
        if not self.has_variable("carry", name):
            return zeros
        state = self.get_variable("carry", name)
        if len(state) != len(zeros):
            return zeros
        return jnp.where(starts[:, None], zeros, state)


class _Gates(nn.Module):
    """A kernel (inputs, 4 * width) and a bias that make the four gates of a layer."""

    width: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        init = _uniform(self.width**-0.5)
        kernel = stored_or_new(self, "kernel", init, (inputs, 4 * self.width))
        return kernel, stored_or_new(self, "bias", init, (4 * self.width,))


class _Decoder(nn.Module):
    vocabulary: int

    @nn.compact
    def __call__(
        self, x: jax.Array, attend: Callable[[jax.Array], jax.Array] | None
    ) -> jax.Array:
        if attend is not None:
            y = attend(x)
        else:
            shape = (x.shape[-1], self.vocabulary)
            y = x @ stored_or_new(self, "kernel", _uniform(0.1), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        return y + jnp.expand_dims(bias, (0, 1))


@jax.custom_vjp
def recur(
    gates: jax.Array, kernel: jax.Array, hidden: jax.Array, cell: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Steps an LSTM through a sequence.

    The gates are those of PyTorch, in its order: input, forget, cell, output. Its
    reverse derivative gets the kernel's gradient from one product for all steps, where
    that of a scan adds up one per step; it has no forward derivative.

    Args:
      gates: (length, rows, 4 * width), what inputs and biases add to the gates.
      kernel: (width, 4 * width), which makes gates from the hidden state.
      hidden: the hidden state before the sequence, (rows, width).
      cell: the cell state before the sequence, (rows, width).

    Returns:
      The hidden states after each step, (length, rows, width), and both last states.
    """

    def step(state: tuple[jax.Array, jax.Array], gates: jax.Array):
        hidden, cell = _step(gates + state[0] @ kernel, state[1])
        return (hidden, cell), hidden

    (hidden, cell), outputs = lax.scan(step, (hidden, cell), gates)
    return outputs, hidden, cell


def _step(gates: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * nn.tanh(g)
    return nn.sigmoid(o) * nn.tanh(cell), cell


def _recur_forward(gates, kernel, hidden, cell):
    def step(state, gates):
        hidden, cell = state
        gates = gates + hidden @ kernel
        after = _step(gates, cell)
        return after, (after[0], (gates, hidden, cell))

    last, (outputs, steps) = lax.scan(step, (hidden, cell), gates)
    return (outputs, *last), (kernel, steps)


def _recur_backward(residuals, cotangents):
    kernel, steps = residuals
    of_outputs, of_hidden, of_cell = cotangents

    def step(of_state, inputs):
        of_output, (gates, _, cell) = inputs
        _, pull_back = jax.vjp(_step, gates, cell)
        of_gates, of_cell = pull_back((of_state[0] + of_output, of_state[1]))
        return (of_gates @ kernel.T, of_cell), of_gates

    (of_hidden, of_cell), of_gates = lax.scan(
        step, (of_hidden, of_cell), (of_outputs, steps), reverse=True
    )
    of_kernel = jnp.einsum("trh,trg->hg", steps[1], of_gates)
    return of_gates, of_kernel, of_hidden, of_cell


recur.defvjp(_recur_forward, _recur_backward)


def _uniform(bound: float) -> Callable[..., jax.Array]:
    """Numbers between -`bound` and `bound`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
