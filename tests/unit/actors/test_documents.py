from __future__ import annotations

import pytest

from ray_guard.actors import documents
from ray_guard.errors import NotEnforced
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.policy.model import Policy
from ray_guard.records import Mode, Role


def test_a_document_says_what_the_policy_says() -> None:
    policy = Policy.from_shorthand(allow=["10.0.0.1:443", "cluster"], egress_bytes="1GiB", role="policy", mode="report")
    text = documents.canonical(policy)
    again = documents.read(text, documents.identify(text))
    assert again.to_wire() == policy.to_wire(), "what was set explicitly is known still"
    assert again.mode is Mode.REPORT
    assert CompiledPolicy.from_wire(again.to_wire()) == CompiledPolicy.from_wire(policy.to_wire())


def test_equal_policies_have_one_id_and_others_another() -> None:
    one = documents.canonical(Policy.from_shorthand(allow=["10.0.0.1:443"], egress_bytes="1KiB"))
    same = documents.canonical(Policy.from_shorthand(egress_bytes=1024, allow=["10.0.0.1:443"]))
    other = documents.canonical(Policy.from_shorthand(allow=["10.0.0.1:444"], egress_bytes=1024))
    assert one == same
    assert documents.identify(one) == documents.identify(same) != documents.identify(other)


def test_what_guard_decorates_is_an_env_actor_unless_it_says_otherwise() -> None:
    text = documents.canonical(Policy())
    assert documents.read(text, documents.identify(text)).to_wire()["role"] == Role.ENV


def test_another_document_under_an_id_is_refused() -> None:
    strict, lax = (documents.canonical(Policy.from_shorthand(allow=each)) for each in ([], ["0.0.0.0/0:*"]))
    with pytest.raises(NotEnforced, match="another document"):
        documents.read(lax, documents.identify(strict))


def test_marks_add_up_along_the_bases() -> None:
    class Base: ...

    class Other: ...

    class Derived(Base, Other): ...

    documents.mark(Base, "base")
    documents.mark(Other, "other")
    assert set(documents.of(Derived)) == {"base", "other"}
    documents.mark(Derived, "derived")
    documents.mark(Derived, "base")
    assert set(documents.of(Derived)) == {"base", "other", "derived"}
    assert documents.of(Base) == ("base",)
    assert documents.of(object) == ()
