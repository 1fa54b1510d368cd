"""Checks for authors of explainers, evaluators and objectives, for use in their own tests.

Each takes an object, tries it on the small CLIP of the package, and raises an AssertionError that
says what is wrong. Our own classes pass the same checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.evaluators.base import Evaluator, evaluating, prepare, untracked
from gradeclip_ft.explain.base import (
    Explainer,
    InputExplainer,
    RecordExplainer,
    TraceExplainer,
    explain_image,
    heat_from_trace,
    settings_of,
)
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.objectives.base import Composed, LossTerms, Objective
from gradeclip_ft.results.record import UNITS, Measured, unit_of

TEXTS = ("a red circle", "a blue star", "green")


def check_explainer(explainer: Explainer, loaded: LoadedClip | None = None) -> None:
    """An explainer gives maps that its picture, its text and nothing else decide.

    Finite numbers, one per patch and phrase; the same twice, alone and beside others, and for
    longer text vectors; the model and the random state as they were; options that a result
    can record.

    Args:
        explainer: With `from_trace`, `from_record` or `from_input`.
        loaded: The model; by default the small CLIP of the package.

    Raises:
        AssertionError: Naming what is not so.
    """
    name, loaded = type(explainer).__name__, loaded or load_clip("shapes_tiny")
    assert isinstance(explainer, TraceExplainer | RecordExplainer | InputExplainer), (
        f"{name} is not an explainer: it needs from_trace and create_graph, from_record, depth and "
        "heads, or from_input and images_only"
    )
    json.dumps(dict(settings_of(explainer)))  # TypeError: an option that no result can hold
    prepared = explainer.prepare(loaded) if hasattr(explainer, "prepare") else explainer
    images, target, owner = _pictures(loaded), loaded.encode_texts(TEXTS), torch.tensor([0, 1, 1])
    grid = tuple(side // loaded.patch for side in loaded.image_size)

    def maps(rows: slice, scale: float = 1.0) -> Tensor:
        with _unchanged(loaded, name):
            return explain_image(prepared, loaded.clip, images, scale * target[rows], owner[rows])

    whole = maps(slice(0, 3))
    assert whole.shape == (3, *grid), f"{name} gives maps {tuple(whole.shape)}, not {(3, *grid)}"
    assert whole.isfinite().all(), f"{name} gives maps that are not finite"
    assert not whole.requires_grad, f"{name} gives maps with a graph"
    for what, again in (
        ("a second time", maps(slice(0, 3))),
        ("for text vectors of another length", maps(slice(0, 3), 7.0)),
        ("without the other phrases", torch.cat([maps(slice(k, k + 1)) for k in range(3)])),
    ):
        far = (again - whole).abs().max() > 1e-3 * whole.abs().max()
        assert not far, f"{name} gives other maps {what}"
    if isinstance(explainer, TraceExplainer):  # may weigh a training step
        trace = loaded.clip.image.trace(images)
        heat = heat_from_trace(explainer, trace, target, owner)
        assert heat.requires_grad <= explainer.create_graph, f"{name} has a graph, unasked"
        nothing = heat_from_trace(explainer, trace, target[:0], owner[:0])
        assert nothing.shape == (0, *grid), f"{name} fails on a batch without phrases"


def check_evaluator(evaluator: Evaluator, loaded: LoadedClip | None = None) -> None:
    """An evaluator gives numbers that repeat, with a protocol that says what they depend on.

    Finite metrics, in [0, 1] unless the last part of the name is a unit; a protocol known before
    the model and kept in the result; the model and the random state as they were.

    Args:
        evaluator: Whose data are there, or are made by `prepare`.
        loaded: The model; by default the small CLIP of the package.

    Raises:
        AssertionError: Naming what is not so.
    """
    kind, loaded = type(evaluator).__name__, loaded or load_clip("shapes_tiny")
    assert isinstance(evaluator, Evaluator), (
        f"{kind} is not an evaluator: it needs name, protocol and a call with a model"
    )
    name = evaluator.name
    assert "/" not in (name or "/"), f"{kind}.name is {name!r}; results are files of that name"
    stated = json.loads(json.dumps(evaluator.protocol))
    prepare(evaluator)
    found: list[Measured] = []
    for _ in range(2):
        with _unchanged(loaded, name), evaluating(loaded.clip):
            found.append(evaluator(loaded, track=untracked))
    first, second = found
    assert first.metrics, f"{name} has no metrics"
    for metric, value in first.metrics.items():
        fraction = unit_of(metric) == "%"
        assert math.isfinite(value), f"{name}: {metric} is {value}"
        assert not fraction or 0 <= value <= 1, (
            f"{name}: {metric} is {value}, which is not a fraction; end its name with one of "
            f"/{', /'.join(UNITS)}"
        )
        assert not fraction or math.isclose(value, second.metrics[metric], abs_tol=1e-6), (
            f"{name}: {metric} is {value}, then {second.metrics[metric]}"
        )
    told = json.loads(json.dumps([dict(first.protocol), dict(first.data), dict(first.details)]))[0]
    lost = [key for key, value in stated.items() if told.get(key, value) != value]
    assert not lost, f"{name}: the result's protocol has another {', '.join(lost)}"


def check_objective(objective: Objective, loaded: LoadedClip | None = None) -> None:
    """An objective gives a loss that trains: finite, the same for one seed, with gradients.

    Also for pictures without phrases, of which batches with short captions consist. It may draw
    from torch's random numbers, as a run seeds them.

    Args:
        objective: The objective.
        loaded: The model; by default the small CLIP of the package.

    Raises:
        AssertionError: Naming what is not so.
    """
    name, loaded = type(objective).__name__, loaded or load_clip("shapes_tiny")
    assert isinstance(objective, Objective), (
        f"{name} is not an objective: it needs check() and a call"
    )
    clip = loaded.require_clip("trained")
    objective.check(clip)
    if isinstance(objective, Composed):
        objective.begin(clip)
    parameters = [one for one in clip.model.parameters() if one is not clip.model.logit_scale]
    for batch in (_batch(loaded, TEXTS), _batch(loaded, ())):
        what = f"{name} on a batch with {len(batch.phrase)} phrases"
        found = []
        for _ in range(2):
            with torch.random.fork_rng(), _unchanged(loaded, name, random=False):
                torch.manual_seed(0)
                found.append(objective(clip, batch))
        terms, again = found
        assert isinstance(terms, LossTerms), f"{name} gives a {type(terms).__name__}, not LossTerms"
        assert terms.total.shape == (), f"{what}: the total is not a scalar"
        values = {"total": terms.total, **terms.parts}
        bad = [key for key, value in values.items() if not value.isfinite().all()]
        assert not bad, f"{what}: {', '.join(bad)} is not finite"
        graph = [key for key, value in terms.parts.items() if value.requires_grad]
        assert not graph, f"{what}: {', '.join(graph)} is logged with its graph; detach it"
        assert terms.total.isclose(again.total), f"{what}: another loss the second time"
        gradients = torch.autograd.grad(terms.total, parameters, allow_unused=True)
        reached = any(one is not None and one.abs().max() > 0 for one in gradients)
        assert reached, f"{what}: no gradient reaches a tower"


def _pictures(loaded: LoadedClip, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *loaded.image_size, generator=generator).to(loaded.clip.device)


def _batch(loaded: LoadedClip, phrases: tuple[str, ...]) -> CaptionBatch:
    """Two pictures; the second has all phrases but the first."""
    distinct = loaded.tokenizer(phrases)
    captions = loaded.tokenizer(["a red circle", "a blue star on green"])
    count = len(phrases)
    return CaptionBatch(
        images=_pictures(loaded),
        captions=captions,
        distinct=distinct,
        identity=torch.arange(count),
        phrase=torch.arange(count),
        owner=torch.arange(count).clamp(max=1),
        keys=("a", "b"),
    ).to(loaded.clip.device)


@contextmanager
def _unchanged(loaded: LoadedClip, name: str, *, random: bool = True) -> Iterator[None]:
    """Fails where weights, modes, gradients, hooks or the random state differ afterwards."""

    def state() -> dict[str, object]:
        model = loaded.clip.model
        modules = list(model.modules())
        return {
            "weights": loaded.weights_hash,
            "the mode of a layer": [part.training for part in modules],
            "hooks": [len(part._forward_hooks) + len(part._backward_hooks) for part in modules],
            "gradients": [
                (one.requires_grad, None if one.grad is None else float(one.grad.sum()))
                for one in model.parameters()
            ],
            "torch's random state": torch.get_rng_state().tolist() if random else [],
        }

    before = state()
    yield
    after = state()
    changed = [what for what in before if before[what] != after[what]]
    assert not changed, f"{name} changes {', '.join(changed)}"
