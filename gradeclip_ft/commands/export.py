"""`export`: a run's weights in the forms of other programs, each checked by loading it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands import runs

if TYPE_CHECKING:
    from gradeclip_ft.models.clip import LoadedClip


def export(cfg: DictConfig) -> None:
    """Write a run's weights for other programs, and check them by loading them again.

    python -m gradeclip_ft export run=NAME                      safetensors, into exports/NAME
    python -m gradeclip_ft export run=NAME out=DIR format=pt    a file as torch saves it
    python -m gradeclip_ft export run=NAME alpha=0.7            mixed with the start weights
    python -m gradeclip_ft export weights=FILE model=eva02_b16  weights without a run
    """
    _check(cfg)
    start, weights = _origin(cfg)
    from gradeclip_ft.commands.build import build_clip
    from gradeclip_ft.export.interpolate import mix

    tuned = build_clip(OmegaConf.create({**start, "init_from": str(weights)}))
    if cfg.alpha != 1.0:
        origin = build_clip(start).clip.model.state_dict()
        model = tuned.clip.model
        model.load_state_dict(mix(origin, model.state_dict(), cfg.alpha))
    for target in cfg.to:
        TARGETS[target](cfg, tuned, _folder(cfg))


def _check(cfg: DictConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    if (cfg.run is None) == (cfg.weights is None):
        raise ValueError("give either run=NAME or weights=FILE")
    unknown = [target for target in cfg.to if target not in TARGETS]
    if unknown or not cfg.to:
        raise ValueError(f"to={list(cfg.to)}: there is {', '.join(TARGETS)}; write to=[openclip]")


def _origin(cfg: DictConfig) -> tuple[DictConfig, Path]:
    """How the model was built before training, and the file of the weights to export."""
    if cfg.run is None:
        start = OmegaConf.create({"model": cfg.model, "runs_dir": cfg.runs_dir})
        return start, runs.resolve_weights(cfg.weights, cfg.runs_dir)
    weights = runs.resolve_weights(cfg.run, cfg.runs_dir)
    record = runs.read_config(weights.parent)
    keys = ("model", "init_from", "runs_dir")
    return OmegaConf.create({key: record.get(key) for key in keys}), weights


def _folder(cfg: DictConfig) -> Path:
    if cfg.out is not None:
        return Path(cfg.out)
    share = "" if cfg.alpha == 1.0 else f"-alpha{cfg.alpha:g}"
    return Path("exports") / f"{Path(cfg.run or cfg.weights).stem}{share}"


def _openclip(cfg: DictConfig, loaded: LoadedClip, folder: Path) -> None:
    from gradeclip_ft.export.openclip import write_openclip
    from gradeclip_ft.export.verify import verify_openclip
    from gradeclip_ft.models.openclip import is_registered

    file = write_openclip(loaded, folder, form=cfg.format)
    difference = verify_openclip(loaded, file)
    call = (
        f'"{loaded.name}", pretrained="{file}"'
        if is_registered(loaded)
        else f'"local-dir:{folder}"'
    )
    print(f"{file}: loads again, embeddings equal to {difference:.0e}")
    print(f"  open_clip.create_model({call})")


TARGETS: dict[str, Callable[[DictConfig, LoadedClip, Path], None]] = {"openclip": _openclip}
