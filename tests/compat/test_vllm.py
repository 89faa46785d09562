"""vLLM has every name that the service uses: without an engine, without a model, in seconds."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prometheus_client
import pytest

from serving.config import Settings
from serving.engine.vllm.engine import _environment
from tests.compat.vllm_names import AREAS, Area, Name, rendered

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "serving" / "engine" / "vllm"
PAGE = ROOT / "deploy" / "upgrading.md"

_MEMBER = re.compile(r"(\w*)(\([^)]*\))?(?:, |$)")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that vLLM imports


def members(name: Name) -> Iterator[tuple[str, str | None]]:
    """Yield each member and its parameters, None for an attribute; an empty member is the object itself."""
    for member, parameters in _MEMBER.findall(name.members):
        if member or parameters:
            yield member, parameters[1:-1] if parameters else None


CASES = [
    pytest.param(area, name, member, parameters, id=f"{area.module}-{name.path.rpartition('.')[2]}.{member}")
    for area in AREAS
    for name in area.names
    for member, parameters in (list(members(name)) or [("", None)])
]


def resolve(path: str) -> Any:
    """Return the object at a dotted path. Raises `AttributeError` or `ImportError`."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(path)


@cache
def _stored_names(owner: Any) -> frozenset[str]:
    """Return the attributes that the source of a class or function sets on any object, parameters of modules too."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(owner)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"register_parameter", "register_buffer"}
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return frozenset(names)


def exists(owner: Any, member: str) -> bool:
    """Return whether an object, or an instance of a class, has the member."""
    if isinstance(owner, dict):
        return member in owner
    if hasattr(owner, member):
        return True
    classes = (
        [each for each in inspect.getmro(owner) if each.__module__ != "builtins"] if inspect.isclass(owner) else []
    )
    if any(member in vars(each).get("__annotations__", {}) for each in classes):
        return True
    vllms = [each for each in classes if each.__module__.startswith("vllm")] or [owner]
    return any(member in _stored_names(each) for each in vllms)


def parameters_of(owner: Any, member: str) -> dict[str, bool]:
    """Return each parameter of a callable member, and whether it is required; `self` and `*args` left out."""
    if type(owner).__module__.startswith("torch"):
        arguments = getattr(owner, member).default._schema.arguments
        return {each.name: not each.has_default_value() for each in arguments}
    function = owner if member in {"", "__init__"} else getattr(owner, member)
    found = [
        each
        for each in inspect.signature(function).parameters.values()
        if each.name not in {"self", "cls"} and each.kind not in {each.VAR_POSITIONAL, each.VAR_KEYWORD}
    ]
    return {each.name: each.default is each.empty for each in found}


def differences(expected: str, found: dict[str, bool]) -> list[str]:
    """Return the differences between the parameters of the table and vLLM's."""
    positional, _, keywords = (part.strip(" ,") for part in expected.partition("*"))
    first = [each.strip() for each in positional.split(",") if each.strip()]
    listed = [*first, *(each.strip() for each in keywords.split(",") if each.strip())]
    wrong = [f"{each} is missing" for each in listed if each not in found]
    if list(found)[: len(first)] != first:
        wrong.append(f"the first parameters are {list(found)[: len(first)]}")
    return wrong + [f"{each} is required" for each, required in found.items() if required and each not in listed]


@pytest.fixture(scope="module", autouse=True)
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import vLLM as the engine does, which later tests of this process start; load its compiled operators."""
    with warnings.catch_warnings(), _environment(Settings(), tmp_path_factory.mktemp("vllm")):
        warnings.simplefilter("ignore")
        importlib.import_module("vllm._custom_ops")


@pytest.mark.parametrize(("area", "name", "member", "parameters"), CASES)
def test_vllm_has_the_name(area: Area, name: Name, member: str, parameters: str | None) -> None:
    """Each name of the table exists in vLLM with the parameters that we use; vLLM requires no further parameter."""
    if name.path.startswith("torch.ops") and not resolve("vllm.platforms.current_platform").is_cpu():
        pytest.skip("only the CPU build has these kernels")
    owner = resolve(name.path)
    if member not in {"", "__init__"}:
        assert exists(owner, member), area.remedy
    if parameters is not None:
        assert not differences(parameters, parameters_of(owner, member)), area.remedy


@pytest.mark.parametrize(("area", "name", "member", "parameters"), CASES)
def test_our_module_uses_the_name(area: Area, name: Name, member: str, parameters: str | None) -> None:
    """The module of each row mentions the name, so the table has no row that nothing needs."""
    del parameters
    source = (PACKAGE / area.module).read_text()
    word = name.path.rpartition(".")[2] if member in {"", "__init__"} else member
    assert re.search(rf"\b{word}\b", source)


@pytest.mark.parametrize("wrong", ["no_such_member", "_no_such_member"])
def test_a_wrong_name_is_noticed(wrong: str) -> None:
    """A member, parameter or path that vLLM does not have is reported."""
    scheduler = resolve("vllm.v1.core.sched.scheduler.Scheduler")
    assert not exists(scheduler, wrong)
    found = parameters_of(scheduler, "_try_schedule_encoder_inputs")
    assert differences(f"request, num_computed_tokens, num_new_tokens, {wrong}, *, encoder_compute_budget", found)
    assert differences("request, num_new_tokens, num_computed_tokens, *, encoder_compute_budget", found)
    assert differences("request, num_computed_tokens, num_new_tokens", found) == ["encoder_compute_budget is required"]
    with pytest.raises((AttributeError, ImportError)):
        resolve(f"vllm.v1.core.sched.scheduler.{wrong}")


def test_every_import_is_in_the_table() -> None:
    """Each name that a module of the package imports from vLLM is in the table, in a row of that module."""
    listed = {(area.module, name.path) for area in AREAS for name in area.names}
    imported = {
        (path.name, f"{node.module}.{alias.name}")
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for alias in node.names
    }
    assert len(imported) > 30
    assert imported <= listed


def test_every_private_name_is_in_the_table() -> None:
    """Each private attribute of a foreign object that a module of the package uses is in the table."""
    listed = " ".join(f"{name.path} {name.members}" for area in AREAS for name in area.names)
    private = {
        node.attr
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and re.match("_(?!_)", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    }
    assert {"_C", "_init_executor", "_use_zentorch"} <= private
    assert not [each for each in private if not re.search(rf"\b{each}\b", listed)]


def test_only_the_package_imports_vllm() -> None:
    """No other module of the service imports vLLM."""
    importers = {
        path.relative_to(ROOT)
        for path in (ROOT / "serving").rglob("*.py")
        if re.search(r"^\s*(from|import) vllm\b|import_module\(\"vllm\b", path.read_text(), re.MULTILINE)
    }
    assert importers
    assert {path.parent for path in importers} == {PACKAGE.relative_to(ROOT)}


def test_the_page_lists_the_table() -> None:
    """The vLLM section of deploy/upgrading.md is the table: `python -m tests.compat.vllm_names` prints it."""
    _, _, rest = PAGE.read_text().partition("<!-- vllm: printed by tests.compat.vllm_names -->\n")
    section, end, _ = rest.partition("<!-- /vllm -->")
    assert end
    assert section.strip() == rendered().strip()


@pytest.mark.parametrize("vllm_metrics", [True, False])
def test_a_stat_logger_is_called_and_prometheus_stays_off(
    monkeypatch: pytest.MonkeyPatch,
    vllm_metrics: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """The counter gets each step's statistics from vLLM, whose Prometheus logger exists only with `vllm_metrics`."""
    counting = importlib.import_module("serving.engine.vllm.step_counter")
    loggers = importlib.import_module("vllm.v1.metrics.loggers")
    stats = importlib.import_module("vllm.v1.metrics.stats")
    made: list[object] = []
    monkeypatch.setattr(loggers.PrometheusStatLogger, "__init__", lambda logger, *_, **__: made.append(logger))
    for method in ("record", "record_admission_rejection", "record_sleep_state"):
        monkeypatch.setattr(loggers.PrometheusStatLogger, method, lambda *_, **__: None)
    before = set(prometheus_client.REGISTRY._collector_to_names)
    counter = counting.StepCounter()
    manager = loggers.StatLoggerManager(
        vllm_config=None,
        custom_stat_loggers=counting.stat_loggers(counter, vllm_metrics=vllm_metrics),
        enable_default_loggers=False,
    )
    manager.record(stats.SchedulerStats(step_counter=7), None, mm_cache_stats=None, engine_idx=0)
    manager.record(None, stats.IterationStats(), mm_cache_stats=None, engine_idx=0)
    manager.record_admission_rejection("reason")
    manager.record_sleep_state()
    assert counter.steps == 7
    assert len(made) == vllm_metrics
    assert set(prometheus_client.REGISTRY._collector_to_names) == before
