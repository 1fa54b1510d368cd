"""Whose maps a report shows."""

import pytest

from gradeclip_ft.commands.report import Comparison, map_settings


def test_an_explainer_can_be_chosen_by_its_name_in_conf() -> None:
    settings = map_settings(Comparison(runs=(), start=None, explainer="maskclip"))
    assert settings["_target_"] == "gradeclip_ft.explain.maskclip.MaskClip"


def test_an_unknown_explainer_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"explainer=maskclp: there is clip_surgery, game, grad_cam, grad_eclip"
    ):
        map_settings(Comparison(runs=(), start=None, explainer="maskclp"))
