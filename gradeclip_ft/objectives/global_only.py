"""Ordinary fine-tuning: the global loss alone (Grad-ECLIP's "ordinary FT")."""

from __future__ import annotations

from gradeclip_ft.objectives.base import Composed


class GlobalOnly(Composed):
    """Symmetric contrast of images and captions (eq. 21)."""
