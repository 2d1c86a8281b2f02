"""Defenses that stand in a relation to another: what a transfer attack is made on.

A relation names an oracle by what it is to the target, so that one word serves every defense:
noise-off: the same weights without randomness. undetected: without its detector. base: what it is
built on. member: its first member alone; members: each of them. twin: the same network, undefended.
adversarial: the same network, adversarially trained, for what is adversarially trained itself.
type-i and type-ii (paper 003, part I): another network, undefended or with the same defense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from robbench.defense import Defense, canonical, resolve, with_preset
from robbench.errors import InputError
from robbench.randomness import preserved_random_state
from robbench.registry import Spec


def siblings(text: str, dataset: str, relation: str) -> list[str]:
    """Canonical specs of the defenses in this relation to one; none where there is no such."""
    spec = Spec.parse(text)
    found = dict.fromkeys(str(canonical(each)) for each in RELATIONS[relation](spec, dataset))
    return [each for each in found if each != str(canonical(spec))]


def members_of(text: str, preset: str | None, dataset: str) -> list[str]:
    """The specs of the single members behind `A[*]`; anything else is itself."""
    spec = Spec.parse(text)
    if spec.member != "*":
        return [text]
    whole = spec.model_copy(update={"member": None})
    size = resolve(with_preset(whole, preset, dataset))[0].size
    return [str(spec.model_copy(update={"member": index})) for index in range(size)]


def _each(spec: Spec, change: Callable[[Defense], Spec]) -> Spec:
    """The spec with every part changed; a part stays the member that it is."""
    parts = [
        change(defense).model_copy(update={"member": part.member})
        for part, defense in zip(spec.parts or (spec,), resolve(spec), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    # what two parts have in common once they are changed is one part
    return Spec.parse(" & ".join(dict.fromkeys(map(str, parts))))


def _noise_off(spec: Spec, dataset: str) -> Iterator[Spec]:
    if any(part.random for part in resolve(spec)):
        still = {"known_seed": None}
        quiet = _each(spec, lambda part: part.spec.with_settings({**part.quiet, **still}))
        if not any(part.random for part in resolve(quiet)):
            yield quiet


def _undetected(spec: Spec, dataset: str) -> Iterator[Spec]:
    def open_to_all(part: Defense) -> Spec:
        return part.model_copy(update={"detector": None, "fpr": 0.05}).spec

    yield _each(spec, open_to_all)


def _base(spec: Spec, dataset: str) -> Iterator[Spec]:
    for part in resolve(spec):
        if base := part.base_spec():
            yield base


def _members(spec: Spec, dataset: str) -> Iterator[Spec]:
    sizes = [1 if one.member is not None else part.size for one, part in _pairs(spec)]
    if sum(sizes) == 1:
        return
    for (one, _), size in zip(_pairs(spec), sizes, strict=True):
        yield from (
            one if size == 1 else one.model_copy(update={"member": index}) for index in range(size)
        )


def _member(spec: Spec, dataset: str) -> Iterator[Spec]:
    yield from list(_members(spec, dataset))[:1]


def _twin(spec: Spec, dataset: str) -> Iterator[Spec]:
    for part in resolve(spec):
        yield with_preset(f"standard(network={network_of(part)})", "quick", dataset)


def _adversarial(spec: Spec, dataset: str) -> Iterator[Spec]:
    for part in resolve(spec):
        if part.adversarial or any(base.adversarial for base in part.bases()):
            yield with_preset(f"pgd-at(network={network_of(part)})", "quick", dataset)


def _type_i(spec: Spec, dataset: str) -> Iterator[Spec]:
    network = other_networks(network_of(resolve(spec)[0]))[0]
    yield with_preset(f"standard(network={network})", "quick", dataset)


def _type_ii(spec: Spec, dataset: str) -> Iterator[Spec]:
    here = network_of(resolve(spec)[0])
    for network in other_networks(here):
        there = _each(spec, lambda part, network=network: _on(part.spec, network))  # type: ignore[misc]
        if _fits(there):
            yield there
            return


def _on(spec: Spec, network: str) -> Spec:
    """A defense on another network; of what goes around another, that one's."""
    if spec.parts:
        parts = tuple(_on(part, network) for part in spec.parts)
        return spec.model_copy(update={"parts": parts})
    (part,) = resolve(spec)
    if not part.wraps:
        base = part.base_spec()
        changes = {"network": network, **({"base": str(_on(base, network))} if base else {})}
        return part.spec.with_settings(changes)
    base = part.base_spec()
    assert base is not None
    left = {key: value for key, value in part.spec.settings if key != "network"}
    return Spec(name=spec.name).with_settings({**left, "base": str(_on(base, network))})


def _fits(spec: Spec) -> bool:
    """Whether the defense can be put into the network: some want residual blocks."""
    try:
        with preserved_random_state():
            for part in resolve(spec):
                part.build((3, 32, 32), 10)
    except InputError:
        return False
    return True


def _pairs(spec: Spec) -> list[tuple[Spec, Defense]]:
    return list(zip(spec.parts or (spec,), resolve(spec), strict=True))


def network_of(defense: Defense) -> str:
    """The network under a defense: of what goes around another, that one's."""
    bases = defense.bases()
    return network_of(bases[0]) if defense.wraps and bases else defense.network


def other_networks(network: str) -> tuple[str, ...]:
    """Other networks that suit the same images, of another kind first."""
    name = Spec.parse(network).name
    if name in ("mlp", "lstm"):
        return ("quick",)
    if name == "quick":
        return "mlp", "resnet20(width=8)"
    return (
        ("resnet20",)
        if name == "vgg16"
        else ("vgg16", "resnet32" if name != "resnet32" else "resnet20")
    )


RELATIONS: dict[str, Callable[[Spec, str], Iterator[Spec]]] = {
    "noise-off": _noise_off,
    "undetected": _undetected,
    "base": _base,
    "member": _member,
    "members": _members,
    "twin": _twin,
    "adversarial": _adversarial,
    "type-i": _type_i,
    "type-ii": _type_ii,
}
