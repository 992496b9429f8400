"""Atoms: what can be removed, as a union-find whose atoms may be products.

Every index along an axis of a value carries an atom. Indices with one atom are removed
together or not at all. A product atom stands for an index of a flattened axis, such as
entry (head, feature) of a projection: it is removed if either of its factors is.

All operations take and give whole integer arrays of atoms. They may freeze more than is
needed, which loses an opportunity, but never less, which would break a cut.
"""

import numpy as np

# The atom of what can never be removed. `find` gives it for every frozen atom.
FROZEN = 0

# A product of more factors than this is frozen; nothing real comes near.
_MAX_FACTORS = 32


class Atoms:
    """A growing set of atoms.

    Attributes:
      size: how many there are.
    """

    def __init__(self):
        self.size = 1
        self._parent = np.zeros(1, np.int32)
        self._factors = np.full((1, 2), -1, np.int32)  # -1: not a product
        self._frozen = np.ones(1, bool)
        self._reason = np.zeros(1, np.int32)

    def fresh(self, count: int) -> np.ndarray:
        """`count` new atoms, each by itself."""
        end = self.size + count
        if end > len(self._parent):
            extra = max(end - len(self._parent), len(self._parent))
            new = np.arange(len(self._parent), len(self._parent) + extra)
            self._parent = np.concatenate([self._parent, new.astype(np.int32)])
            empty = np.full((extra, 2), -1, np.int32)
            self._factors = np.concatenate([self._factors, empty])
            self._frozen = np.concatenate([self._frozen, np.zeros(extra, bool)])
            self._reason = np.concatenate([self._reason, np.zeros(extra, np.int32)])
        atoms = np.arange(self.size, end, dtype=np.int32)
        self.size = end
        return atoms

    def fresh_frozen(self, reason: int) -> int:
        """One new atom that can never be removed, for a reason to remember."""
        atom = self.fresh(1)
        self._frozen[atom] = True
        self._reason[atom] = reason
        return int(atom[0])

    def find(self, atoms: np.ndarray) -> np.ndarray:
        """The one atom that stands for each: equal if they go together."""
        roots = self._root(atoms)
        return np.where(self._frozen[roots], FROZEN, roots)

    def reasons(self, atoms: np.ndarray) -> np.ndarray:
        """Why each atom, or else its first factor, is frozen: `freeze`'s number."""
        roots = self._root(atoms)
        reasons = self._reason[roots]
        left = self._factors[roots, 0]
        inner = (reasons == 0) & (left >= 0)
        if inner.any():
            reasons[inner] = self.reasons(left[inner])
        return reasons

    def factors(self, atoms: np.ndarray) -> np.ndarray:
        """The removable factors of each atom, in columns; FROZEN where there is none.

        An atom is removed if any of its factors is. One that is no product is its own
        only factor.
        """
        columns = [self.find(np.ravel(atoms))]
        i = 0
        while i < len(columns):
            pair = self._factors[columns[i]]
            is_product = pair[:, 0] >= 0
            if not is_product.any():
                i += 1
            elif len(columns) > _MAX_FACTORS:  # some product may contain itself
                return self._freeze_products(columns)
            else:
                # In place, left before right: factors keep the order in which axes
                # were merged, by which two products are compared later.
                left = np.where(is_product, pair[:, 0], columns[i])
                right = np.where(is_product, pair[:, 1], FROZEN)
                columns[i : i + 1] = [self.find(left), self.find(right)]
        columns = [column for column in columns if column.any()]
        if not columns:
            return np.zeros((np.size(atoms), 0), np.int32)
        return np.stack(columns, axis=1)

    def product(self, columns: list[np.ndarray]) -> np.ndarray:
        """One atom per row of `columns`, removed if any atom of the row is."""
        result = np.zeros_like(columns[0])
        # From the right, in pairs: a * (b * c).
        for column in reversed(columns):
            column = self.find(column)
            # What is frozen never goes, so the other factor alone decides.
            both = (column != FROZEN) & (result != FROZEN)
            combined = np.where(column != FROZEN, column, result)
            if both.any():
                pairs = np.stack([column[both], result[both]], axis=1)
                # Equal rows get one atom: they are removed by the same.
                unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
                atoms = self.fresh(len(unique))
                self._factors[atoms] = unique
                combined[both] = atoms[inverse.reshape(-1)]
            result = combined
        return result

    def freeze(self, atoms: np.ndarray, reason: int) -> None:
        """Makes atoms irremovable, with all their factors."""
        roots = self._root(np.ravel(atoms))
        roots = roots[~self._frozen[roots]]
        while roots.size:
            # A product that stays keeps both its factors. Not the other way round: a
            # product with one frozen factor can still go by the other.
            self._frozen[roots] = True
            self._reason[roots] = reason
            pairs = np.unique(self._factors[roots])
            self._factors[roots] = -1
            roots = self._root(pairs[pairs >= 0])
            roots = roots[~self._frozen[roots]]

    def union(self, first: np.ndarray, second: np.ndarray, reason: int) -> None:
        """Ties atoms pairwise: from now on they go together.

        What is tied to something frozen freezes, for its reason or else for `reason`.
        """
        a, b = (np.ravel(x) for x in np.broadcast_arrays(first, second))
        while True:
            a, b = self._root(a), self._root(b)
            # Pairs of which one is frozen come again: it may have frozen in this round.
            differ = (a != b) & ~(self._frozen[a] & self._frozen[b])
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            frozen_a, frozen_b = self._frozen[a], self._frozen[b]
            self._freeze_like(b[frozen_a], a[frozen_a], reason)
            self._freeze_like(a[frozen_b], b[frozen_b], reason)
            free = ~self._frozen[a] & ~self._frozen[b]
            # The older atom stands for both, so that links never make a circle.
            low, high = np.minimum(a, b)[free], np.maximum(a, b)[free]
            # Where a root has several partners, the others' turn is the next round.
            high, place = np.unique(high, return_index=True)
            low = low[place]
            products = high[self._factors[high, 0] >= 0]
            if products.size:
                self._union_products(products, high, low, reason)
            else:
                self._parent[high] = low

    def _union_products(
        self, products: np.ndarray, high: np.ndarray, low: np.ndarray, reason: int
    ) -> None:
        """Links `high` to `low`, where some of `high` are products.

        A product tied to a plain atom makes that one a product; two products go
        together if their factors do, one by one.
        """
        factors = self.factors(products)  # now, as linking hides them behind `low`
        self._parent[high] = low
        roots = self._root(products)
        # Looking for factors may have frozen some of these: it finds endless ones.
        free = ~self._frozen[roots] & ~self._frozen[products]
        self.freeze(factors[~free], reason)
        self.freeze(roots[~free], reason)
        products, roots, factors = products[free], roots[free], factors[free]
        plain = self._factors[roots, 0] < 0
        self._factors[roots[plain]] = self._factors[products[plain]]
        self._factors[products] = -1
        others = self.factors(roots)
        # Where numbers of factors differ it is not known which of them correspond. One
        # such row freezes all: axes that are tied mostly have one pattern.
        same = factors.shape == others.shape
        if same and ((factors == FROZEN) == (others == FROZEN)).all():
            self.union(factors, others, reason)
        else:
            self.freeze(factors, reason)
            self.freeze(others, reason)
            self.freeze(roots, reason)

    def _freeze_like(self, atoms: np.ndarray, models: np.ndarray, reason: int) -> None:
        if not atoms.size:
            return
        known = self._reason[models]
        for why in np.unique(known):
            self.freeze(atoms[known == why], int(why) or reason)

    def _freeze_products(self, columns: list[np.ndarray]) -> np.ndarray:
        """Gives up on rows whose expansion does not end: freezes all their atoms."""
        rows = np.stack(columns, axis=1)
        endless = (self._factors[rows, 0] >= 0).any(axis=1)
        self.freeze(rows[endless], 0)
        return np.where(endless[:, None], FROZEN, self.find(rows))

    def _root(self, atoms: np.ndarray) -> np.ndarray:
        roots = self._parent[atoms]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[atoms] = roots  # a shorter way for the next time
        return roots
