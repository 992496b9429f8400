"""Atoms: what goes together, against a closure worked out over Python sets."""

import copy

import numpy as np
import pytest

from agp_jax.programs.atoms import FROZEN, Atoms

MOST_FACTORS = 6  # of a product made here, so that random ones stay small


class Closure:
    """The same by the definitions: sets of atoms, gone over until nothing changes.

    An atom's parts are the sets whose removal removes it, in order; none if it stays.
    """

    def __init__(self):
        self.sets = []
        self.products = {}
        self.frozen = set()

    def set_of(self, atom):
        return next(s for s in self.sets if atom in s)

    def add(self, atom, factors=None):
        self.sets.append({atom})
        if factors is not None:
            self.products[atom] = tuple(factors)

    def parts(self, atom, inside=()):
        """The smallest atoms of the parts; None if the atom contains itself."""
        own = self.set_of(atom)
        if own & self.frozen:
            return []
        name = min(own)
        if name in inside:
            return None
        product = next((a for a in sorted(own) if a in self.products), None)
        if product is None:
            return [name]
        found = [self.parts(a, (*inside, name)) for a in self.products[product]]
        return None if None in found else [x for xs in found for x in xs]

    def freeze(self, atom):
        todo = [atom]
        while todo:
            own = self.set_of(todo.pop())
            if not own <= self.frozen:
                self.frozen |= own
                todo += [
                    x for a in own & self.products.keys() for x in self.products[a]
                ]

    def union(self, first, second):
        one, other = self.set_of(first), self.set_of(second)
        if one is other:
            return
        if (one | other) & self.frozen:
            self.freeze(first)
            self.freeze(second)
            return
        are_products = all(s & self.products.keys() for s in (one, other))
        before = self.parts(first), self.parts(second)
        self.sets = [s for s in self.sets if s is not one and s is not other]
        self.sets.append(one | other)
        if are_products and self.parts(first) is not None:
            if len(before[0]) == len(before[1]):
                for a, b in zip(*before, strict=True):
                    self.union(a, b)
            else:
                for atom in (first, *before[0], *before[1]):
                    self.freeze(atom)

    def is_endless(self):
        """Whether some atom contains itself."""
        return any(self.parts(min(own)) is None for own in self.sets)


def parts_of(atoms, numbers):
    """The removable factors of each atom, each by the first atom that goes with it."""
    first = {}
    for atom, found in zip(numbers, atoms.find(numbers).tolist(), strict=True):
        first.setdefault(found, int(atom))
    rows = atoms.factors(numbers).tolist()
    return [[first[x] for x in row if x != FROZEN] for row in rows]


def assert_equal(atoms, closure):
    numbers = np.array(sorted(a for own in closure.sets for a in own))
    expected = [closure.parts(a) for a in numbers.tolist()]
    assert parts_of(atoms, numbers) == expected


@pytest.mark.parametrize("seed", range(200))
def test_unions_products_and_freezing_are_those_of_the_closure(seed):
    rng = np.random.default_rng(seed)
    atoms, closure = Atoms(), Closure()
    known = atoms.fresh(8).tolist()
    for atom in known:
        closure.add(atom)
    for _ in range(16):
        kind = rng.choice(["product", "union", "freeze"], p=[0.35, 0.55, 0.1])
        one, *others = rng.choice(known, 3, replace=False).tolist()
        if kind == "product":
            factors = [one, *others[: rng.integers(1, 3)]]
            if sum(len(closure.parts(a)) for a in factors) <= MOST_FACTORS:
                (made,) = atoms.product([np.array([a]) for a in factors]).tolist()
                if made == FROZEN:
                    assert all(not closure.parts(a) for a in factors)
                elif not any(made in own for own in closure.sets):
                    closure.add(made, factors)
                    known.append(made)
        elif kind == "union":
            # Mostly of as many factors, or nearly all would soon be frozen.
            alike = [
                a for a in known if len(closure.parts(a)) == len(closure.parts(one))
            ]
            other = rng.choice(alike if rng.random() < 0.8 else known)
            after = copy.deepcopy(closure)
            after.union(one, int(other))
            if not after.is_endless():
                atoms.union(np.array([one]), np.array([other]), reason=1)
                closure = after
        else:
            atoms.freeze(np.array([one]), reason=1)
            closure.freeze(one)
        assert_equal(atoms, closure)


@pytest.mark.parametrize("seed", range(200))
def test_many_plain_atoms_are_tied_at_once(seed):
    """Also where one atom has several partners in one call, of which one is frozen."""
    rng = np.random.default_rng(seed)
    atoms, closure = Atoms(), Closure()
    for atom in atoms.fresh(20).tolist():
        closure.add(atom)
    for _ in range(3):
        pairs = rng.integers(1, 21, size=(2, rng.integers(1, 6)))
        atoms.union(*pairs, reason=1)
        for one, other in pairs.T.tolist():
            closure.union(one, other)
        frozen = rng.integers(1, 21, size=rng.integers(0, 2))
        atoms.freeze(frozen, reason=1)
        for atom in frozen.tolist():
            closure.freeze(atom)
        assert_equal(atoms, closure)


def test_what_is_tied_to_an_atom_that_freezes_in_the_same_call_freezes():
    atoms = Atoms()
    a, b, c = atoms.fresh(3)
    atoms.union(np.array([FROZEN, a, b]), np.array([a, b, c]), reason=1)
    assert atoms.find(np.array([a, b, c])).tolist() == [FROZEN] * 3


def grid(atoms, heads, features):
    """The atoms of (head, feature), flattened."""
    columns = np.meshgrid(heads, features, indexing="ij")
    return atoms.product([column.ravel() for column in columns])


def test_tied_grids_tie_heads_with_heads_and_features_with_features():
    atoms = Atoms()
    heads, features, others, more = (atoms.fresh(n) for n in (2, 3, 2, 3))
    atoms.union(grid(atoms, heads, features), grid(atoms, others, more), reason=1)
    np.testing.assert_array_equal(atoms.find(heads), atoms.find(others))
    np.testing.assert_array_equal(atoms.find(features), atoms.find(more))
    assert len(np.unique(atoms.find(np.concatenate([heads, features])))) == 5


def test_a_plain_axis_tied_to_a_grid_goes_by_head_or_feature():
    atoms = Atoms()
    plain, heads, features = (atoms.fresh(n) for n in (6, 2, 3))
    atoms.union(plain, grid(atoms, heads, features), reason=1)
    rows = [[h, f] for h in heads.tolist() for f in features.tolist()]
    assert atoms.factors(plain).tolist() == rows


def test_equal_rows_of_a_product_are_one_atom():
    atoms = Atoms()
    a, b, c = atoms.fresh(3)
    made = atoms.product([np.array([a, a, a]), np.array([b, c, b])])
    assert made[0] == made[2] != made[1]


def test_a_product_with_a_frozen_factor_is_its_other_factor():
    atoms = Atoms()
    a, b = atoms.fresh(2)
    atoms.freeze(np.array([a]), reason=1)
    assert atoms.product([np.array([a]), np.array([b])]).tolist() == [b]
    assert atoms.product([np.array([a]), np.array([a])]).tolist() == [FROZEN]


def test_a_frozen_product_freezes_its_factors_and_these_freeze_no_product():
    atoms = Atoms()
    a, b, c = atoms.fresh(3)
    one = atoms.product([np.array([a]), np.array([b])])
    other = atoms.product([np.array([b]), np.array([c])])
    atoms.freeze(one, reason=1)
    assert atoms.find(np.array([a, b])).tolist() == [FROZEN, FROZEN]
    assert parts_of(atoms, np.array([c, *other])) == [[c], [c]]


def test_products_of_other_numbers_of_factors_are_frozen():
    atoms = Atoms()
    a, b, c, d, e = (np.array([x]) for x in atoms.fresh(5))
    atoms.union(atoms.product([a, b]), atoms.product([c, d, e]), reason=1)
    assert not atoms.find(np.concatenate([a, b, c, d, e])).any()


def test_a_product_that_contains_itself_is_frozen():
    atoms = Atoms()
    a, b = (np.array([x]) for x in atoms.fresh(2))
    atoms.union(a, atoms.product([a, b]), reason=1)
    assert not atoms.factors(np.concatenate([a, b])).any()


def test_reasons_are_those_of_what_froze_first():
    atoms = Atoms()
    a, b, c, d = (np.array([x]) for x in atoms.fresh(4))
    product = atoms.product([a, b])
    atoms.freeze(a, reason=3)
    atoms.freeze(a, reason=4)
    atoms.union(a, c, reason=5)
    assert atoms.reasons(np.concatenate([a, c, product])).tolist() == [3, 3, 3]
    atoms.union(d, np.array([FROZEN]), reason=6)  # which has no reason of its own
    assert atoms.reasons(d).tolist() == [6]
    frozen = np.array([atoms.fresh_frozen(7)])
    atoms.union(b, frozen, reason=8)
    assert atoms.reasons(np.concatenate([frozen, b])).tolist() == [7, 7]
