"""The vision tower against transformers' own, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vision import random_rows

from geomjax.models.hf import insert, leaf
from geomjax.models.vision import VisionTower
from geomjax.models.vision_config import vision_config
from geomjax.models.vision_layout import arrange
from geomjax.models.vision_rules import VISION as RULES

pytest.importorskip("torch", reason="needs PyTorch: the parity extra")

from vl_peer import VISION, make_vl_peer, vision_features  # noqa: E402

pytestmark = pytest.mark.parity

# Sizes that divide windows and sizes that do not, several images to a row, and none.
GRIDS = [[(1, 4, 4)], [(1, 6, 10), (1, 2, 2)], [], [(1, 8, 2), (1, 2, 14), (1, 4, 8)]]
GRID = {
    "both kinds of block": {},
    "windows alone": {"fullatt_block_indexes": []},
    "whole images alone": {"fullatt_block_indexes": [0, 1, 2, 3]},
    "windows of three cells": {"window_size": 24, "depth": 2},
    "a window is a cell": {"window_size": 8, "depth": 2},
    "four heads, another width": {"num_heads": 4, "out_hidden_size": 12},
    "cells of three patches": {"spatial_merge_size": 3, "window_size": 24},
    "one patch is one token": {"spatial_merge_size": 1, "window_size": 8},
}


def vision_params(peer, config):
    """The peer's vision tower as ours; a checkpoint without its decoder."""
    shapes = VisionTower(config).shapes
    tensors = dict(peer.model.visual.named_parameters())
    params = {}
    for rule in RULES:
        pattern = rule.hf_pattern.removeprefix("visual.")
        if rule.role.stack_depth:
            names = [pattern.format(block=i) for i in range(config.depth)]
            array = np.stack([tensors[name].detach() for name in names])
        else:
            array = tensors[pattern].detach().numpy()
        assert array.shape == leaf(shapes, rule.path[1:]).shape
        insert(params, rule.path[1:], jnp.asarray(array))
    return params


@pytest.mark.parametrize("fields", GRID.values(), ids=GRID.keys())
def test_features_of_images_of_several_sizes_agree(fields):
    text = {"hidden_size": fields.get("out_hidden_size", 24)}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    peer = make_vl_peer(3, vision=fields, text=text)
    config = vision_config(VISION | fields)
    scale = config.merge_size
    grids = [[(1, h // 2 * scale, w // 2 * scale) for _, h, w in row] for row in GRIDS]
    rows = random_rows(5, grids, config.patch_values)
    tower = VisionTower(config)
    batch, places = arrange(rows, config.window, config.patch_values)
    params = vision_params(peer, config)
    features = np.asarray(jax.jit(tower.apply)(params, *batch))
    expected = vision_features(peer, [image for row in rows for image in row])
    ours = [features[b][at] for b, row in enumerate(places) for at in row]
    for got, want in zip(ours, expected, strict=True):
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(got, want, atol=1e-4)
