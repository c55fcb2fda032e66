"""Interception: who sees a replacement, when, and that nothing stays behind."""

import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from jax.lax import dot_general as early_dot_general

from qwix._src import interception
from qwix._src.interception import Interceptor, interception_manager, wrap_func_intercepted

DOT = "jax.lax.dot_general"
NUMBERS = (((1,), (0,)), ((), ()))
X, W = jnp.ones((2, 3)), jnp.ones((3, 4))


@pytest.fixture
def module(monkeypatch):
    """A module of functions to intercept, and `log`, what was called."""
    made = types.ModuleType("intercepted_module")
    made.log = []

    def plain(x, *, times=1, offset=2):
        """Documented."""
        return x * times + offset

    class Thing:
        def method(self, x):
            return x + 1

        @staticmethod
        def static(x):
            return x + 2

    free = 10
    made.plain, made.Thing = plain, Thing
    made.closure = lambda x: x + free
    made.jitted = jax.jit(lambda x: x + 3)
    monkeypatch.setitem(sys.modules, "intercepted_module", made)
    return made


def logging(module, name, value=None):
    def replacement(*args, **kwargs):
        module.log.append(name)
        return args[0] if value is None else value

    return replacement


def intercept(func, mapping, number=1, **kwargs):
    return wrap_func_intercepted(func, lambda: Interceptor(mapping, number), **kwargs)


def test_aliases_of_functions_are_caught_and_restored():
    calls = []

    def replacement(*args, **kwargs):
        calls.append(len(args))
        return early_dot_general(*args, **kwargs)  # the original, since the handler is running

    code = jax.lax.dot_general.__code__
    run = intercept(
        lambda: early_dot_general(X, W, NUMBERS) + jax.lax.dot_general(X, W, NUMBERS), {DOT: replacement}
    )
    assert (run() == 6.0).all() and calls == [3, 3]
    assert jax.lax.dot_general.__code__ is code
    early_dot_general(X, W, NUMBERS)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["plain", "closure", "jitted", "Thing.method", "Thing.static"])
def test_every_kind_of_target(module, name):
    def call():
        thing = module.Thing()
        targets = {"Thing.method": thing.method, "Thing.static": thing.static}
        return targets[name](5) if name in targets else getattr(module, name)(5)

    before = call()
    run = intercept(call, {f"intercepted_module.{name}": logging(module, name, "replaced")})
    assert run() == "replaced" and module.log == [name]
    assert call() == before and module.log == [name]
    assert module.plain(5, times=3) == 17 and module.plain.__doc__ == "Documented."


def test_static_methods_stay_static(module):
    intercept(lambda: None, {"intercepted_module.Thing.static": logging(module, "s")})()
    assert isinstance(vars(module.Thing)["static"], staticmethod)


def test_nested_interceptors_compose(module):
    def outer(x, **kwargs):
        return ("outer", module.plain(x, **kwargs))

    def inner(x, **kwargs):
        return ("inner", module.plain(x, **kwargs))

    target = "intercepted_module.plain"
    run = intercept(intercept(lambda: module.plain(1), {target: inner}, 2), {target: outer}, 1)
    assert run() == ("outer", ("inner", 3))
    assert module.plain(1) == 3


def test_same_id_is_entered_once(module):
    target = {"intercepted_module.plain": logging(module, "plain")}
    transforms = {"output_transform": lambda out: module.log.append("transform") or out}
    inner = intercept(lambda: module.plain(1), target, **transforms)
    intercept(inner, target, **transforms)()
    assert module.log == ["plain", "transform"]


def test_transforms_and_condition(module):
    run = intercept(
        lambda x: module.plain(x),
        {"intercepted_module.plain": lambda x: x + 1},
        input_transform=lambda args, kwargs: ((args[0] * 10,), kwargs),
        output_transform=lambda out: -out,
    )
    assert run(1) == -11
    never = intercept(
        lambda x: module.plain(x),
        {"intercepted_module.plain": lambda x: x + 1},
        output_transform=lambda out: -out,
        should_intercept=lambda: False,
    )
    assert never(1) == 3


def test_errors_restore(module):
    def fail(*args):
        raise KeyError("inside")

    run = intercept(lambda: module.plain(1), {"intercepted_module.plain": fail})
    with pytest.raises(KeyError, match="inside"):
        run()
    assert module.plain(1) == 3 and not interception_manager.is_active(1)


@pytest.mark.parametrize("bad", ["intercepted_module.nothing", "no_such_module.f"])
def test_failure_to_install_rolls_back(module, bad):
    code = module.plain.__code__
    interceptor = Interceptor({"intercepted_module.plain.__code__": lambda x: x, bad: lambda x: x}, 1)
    with pytest.raises(AttributeError):
        interception_manager.activate_interceptor(interceptor)
    assert module.plain.__code__ is code and not interception_manager.is_active(1)


def test_two_names_of_one_thing(module):
    module.alias = module.plain
    both = {f"intercepted_module.{name}": lambda x: x for name in ("plain", "alias")}
    with pytest.raises(ValueError, match="the same thing"):
        intercept(lambda: None, both)()
    assert module.plain(1) == 3


def test_activation_errors(module):
    interceptor = Interceptor({"intercepted_module.closure": lambda x: x}, 7)
    with pytest.raises(ValueError, match="not active"):
        interception_manager.deactivate_interceptor(interceptor)
    interception_manager.activate_interceptor(interceptor)
    with pytest.raises(ValueError, match="already active"):
        interception_manager.activate_interceptor(interceptor)
    ids = interception_manager.disable_interception()
    assert ids == {7} and module.closure(1) == 11
    with pytest.raises(ValueError, match="disabled"):
        interception_manager.deactivate_interceptor(interceptor)
    interception_manager.enable_interception(ids)
    interception_manager.deactivate_interceptor(interceptor)


def test_other_threads_see_the_originals(module):
    inside, seen = threading.Event(), threading.Event()
    results = []

    def other():
        inside.wait(10)
        results.append(module.plain(1))
        seen.set()

    def call():
        inside.set()
        assert seen.wait(10)
        return module.plain(1)

    thread = threading.Thread(target=other)
    thread.start()
    assert intercept(call, {"intercepted_module.plain": lambda x: "replaced"})() == "replaced"
    thread.join()
    assert results == [3]


def test_threads_at_the_same_time(module):
    """The patch stays until the last thread is done."""
    barrier, results = threading.Barrier(4, timeout=10), []

    def work(number):
        def call():
            barrier.wait()
            return [module.plain(1) for _ in range(100)]

        results.append(
            set(intercept(call, {"intercepted_module.plain": lambda x: number}, number)()) == {number}
        )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4 and module.plain(1) == 3


def test_disable_interceptions(module):
    module.free = interception.disable_interceptions(lambda: module.plain(1))
    run = intercept(
        lambda: (module.free(), module.plain(1)), {"intercepted_module.plain": lambda x: "replaced"}
    )
    assert run() == (3, "replaced")


@pytest.mark.parametrize("first", ["plain", "intercepted"])
def test_jit_caches_are_apart(first):
    """A jitted function is traced anew with and without the interceptor, whoever comes first."""
    helper = jax.jit(lambda x, w: jnp.dot(x, w))
    replacement = lambda *args, **kwargs: -early_dot_general(*args, **kwargs)
    run = intercept(lambda: helper(X, W), {DOT: replacement})
    calls = {"plain": lambda: helper(X, W), "intercepted": run}
    for name in sorted(calls, reverse=first == "plain"):
        assert (calls[name]() == (3.0 if name == "plain" else -3.0)).all()
    traced = jax.jit(lambda: (run(), helper(X, W)))()
    assert (traced[0] == -3.0).all() and (traced[1] == 3.0).all()


def test_what_a_handler_traces_is_apart_from_what_the_model_traces():
    helper = jax.jit(lambda x, w: jnp.dot(x, w))
    replacement = lambda *args, **kwargs: 10 + helper(args[0], args[1])
    # An id of its own: JAX's caches know interceptors by their ids.
    run = intercept(lambda: (helper(X, W), helper(X, W)), {DOT: replacement}, number=2)
    for out in run():
        assert (out == 13.0).all()


def test_disable_jit(module):
    names = []
    module.named = jax.jit(lambda x: module.closure(x))
    closure = lambda x: names.append(isinstance(x, jax.core.Tracer)) or x
    run = intercept(lambda: module.named(X), {"intercepted_module.closure": closure}, disable_jit=True)
    run()
    assert names == [False]


def test_names():
    assert interception.has_attribute(interception.PRIMITIVE_BIND_KEY)
    assert not interception.has_attribute("jax.lax.nothing") and not interception.has_attribute(
        "nothing.at.all"
    )
    with pytest.raises(AttributeError, match="isn't an imported module"):
        interception.get_attribute("nothing.at.all")
    interceptor = Interceptor({"a": len}, 3)
    assert dict(interceptor) == {"a": len} and hash(interceptor) == hash(3)
