"""`export`: a run's weights in the forms of other programs, each checked by loading it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands import runs

if TYPE_CHECKING:
    from gradeclip_ft.export.card import Origin
    from gradeclip_ft.models.clip import LoadedClip


def export(cfg: DictConfig) -> None:
    """Write a run's weights for other programs, and check them by loading them again.

    python -m gradeclip_ft export run=NAME                      for open_clip, into exports/NAME
    python -m gradeclip_ft export run=NAME to=[evaclip]         for F-ViT, with its class vectors
    python -m gradeclip_ft export run=NAME to=[huggingface]     a folder for the hub, with a card
    python -m gradeclip_ft export run=NAME to=[class_embed]     COCO class vectors alone
    python -m gradeclip_ft export run=NAME out=DIR format=pt    a file as torch saves it
    python -m gradeclip_ft export run=NAME alpha=0.7            mixed with the start weights
    python -m gradeclip_ft export run=NAME half=true            rounded to fp16
    python -m gradeclip_ft export run=NAME pixels=FOLDER        compared on your photos
    python -m gradeclip_ft export weights=FILE model=eva02_b16  weights without a run
    """
    if (cfg.run is None) == (cfg.weights is None):
        raise ValueError("give either run=NAME or weights=FILE")
    from gradeclip_ft.export.export import TARGETS, write_export

    unknown = [target for target in cfg.to if target not in TARGETS]
    if unknown or not cfg.to:
        raise ValueError(f"to={list(cfg.to)}: there is {', '.join(TARGETS)}; write to=[openclip]")
    weights = runs.resolve_weights(cfg.run or cfg.weights, cfg.runs_dir)
    start = cfg if cfg.run is None else runs.read_config(weights.parent)
    keys = ("model", "init_from", "runs_dir")  # how the model was built before training
    start = OmegaConf.create({key: start.get(key) for key in keys})
    loaded = _load(start, weights, cfg.alpha)
    origin = _facts(cfg, start, weights)
    for target in cfg.to:
        folder = _folder(cfg, target)
        written = write_export(
            loaded,
            target,
            folder,
            origin,
            form=cfg.format,
            half=cfg.half,
            pixels=None if cfg.pixels is None else Path(cfg.pixels),
        )
        print(folder, *written.checks, sep="\n  ")
        print(f"\n{written.usage}\n")


def _load(start: DictConfig, weights: Path, alpha: float) -> LoadedClip:
    """The model with the weights to export, mixed with those before training."""
    from gradeclip_ft.commands.build import build_clip
    from gradeclip_ft.export.export import mix

    tuned = build_clip(OmegaConf.create({**start, "init_from": str(weights)}))
    tuned.require_clip("exported")
    if alpha == 1.0:
        return tuned
    if start.get("init_from") is None and start.model.get("weights") == "random":
        raise ValueError(
            f"alpha={alpha} mixes with the weights before training, which were drawn at random; "
            "export with alpha=1"
        )
    origin = build_clip(start).clip.model.state_dict()
    model = tuned.clip.model
    model.load_state_dict(mix(origin, model.state_dict(), alpha))
    return tuned


def _facts(cfg: DictConfig, start: DictConfig, weights: Path) -> Origin:
    from gradeclip_ft.export.card import Origin, scores_of
    from gradeclip_ft.results.record import hash_json
    from gradeclip_ft.training.run_files import step_of

    before = _start_weights(start)
    if cfg.run is None:
        return Origin(start=before, alpha=cfg.alpha)
    home = weights.parent
    settings: Any = OmegaConf.to_container(runs.read_config(home))  # names of variables, not values
    return Origin(
        start=before,
        alpha=cfg.alpha,
        run=home.absolute().name,
        step=step_of(weights),
        config_hash=hash_json(settings),
        scores=scores_of(home, cfg.alpha),
    )


def _start_weights(start: DictConfig) -> str:
    """Weights that the first of a chain of runs began with."""
    passed: set[Path] = set()
    while (earlier := start.get("init_from")) is not None:
        file = runs.resolve_weights(earlier, start.runs_dir)
        home = file.parent.resolve()
        # A chain that comes back to a run (one was made again) says nothing about its first start.
        if file.name != runs.WEIGHTS or not (home / runs.CONFIG).exists() or home in passed:
            return str(file)
        passed.add(home)
        start = runs.read_config(home)
    return str(start.model.get("weights") or "packaged")


def _folder(cfg: DictConfig, target: str) -> Path:
    """A folder per format, so that none replaces another: NAME for open_clip, else NAME-FORMAT."""
    kind = "" if target == "openclip" else f"-{target}"
    if cfg.out is not None:
        base = Path(cfg.out)
        return base if len(cfg.to) == 1 else base.with_name(f"{base.name}{kind}")
    share = "" if cfg.alpha == 1.0 else f"-alpha{cfg.alpha:g}"
    half = "-half" if cfg.half else ""
    source = Path(cfg.run or cfg.weights).name.removesuffix(".safetensors").removesuffix(".pt")
    return Path("exports") / f"{source}{share}{half}{kind}"
