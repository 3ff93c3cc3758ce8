"""Qwen2.5-VL against transformers: logits, generation, gradients and names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vl import IMAGE, ragged_batch

from geomjax.models import hf
from geomjax.models.load import export, load
from geomjax.models.renamed import published_name
from geomjax.models.vision_rules import RENAMED
from geomjax.rollout.sample import sample

pytest.importorskip("torch", reason="needs PyTorch: the parity extra")

from vl_peer import make_vl_peer, vl_inputs  # noqa: E402

pytestmark = pytest.mark.parity

PADS = [(0, 0), (3, 0), (1, 2), (0, 4)]
GRID = {
    "untied": {},
    "tied": {"tied": True},
    "four heads to a key": {
        "text": {
            "num_attention_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 1],
            },
        }
    },
}


def our_logits(model, params, batch):
    @jax.jit
    def logits(params, images, *inputs):
        prompted = model.with_images(images)
        hidden = prompted.apply(params, *inputs)
        return jnp.einsum("btd,vd->btv", hidden, prompted.unembedding(params))

    return np.asarray(logits(params, batch.images, *batch.inputs))


@pytest.mark.parametrize("fields", GRID.values(), ids=GRID.keys())
def test_logits_of_ragged_batches_with_images_agree(fields, tmp_path):
    import torch

    peer = make_vl_peer(7, **fields)
    peer.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    batch = ragged_batch(model.config, PADS)
    with torch.no_grad():
        expected = peer(**vl_inputs(batch, IMAGE)).logits.numpy()
    real = batch.segment_ids != 0
    assert np.abs(expected[real]).max() > 1
    ours = our_logits(model, params, batch)
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-4)


def test_greedy_rollouts_are_those_of_generate(tmp_path):
    import torch

    peer = make_vl_peer(8)
    peer.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    batch = ragged_batch(model.config, [(0, 0)] * 4)
    assert batch.segment_ids[:, -1].all()  # Padded on the left alone.

    def rollout(params, images, *inputs):
        return sample(
            model.with_images(images),
            params,
            *inputs,
            jax.random.key(0),
            max_new_tokens=12,
            stop_tokens=(39,),
            temperature=0.0,
        )

    ours = jax.jit(rollout)(params, batch.images, *batch.inputs)
    with torch.no_grad():
        theirs = peer.generate(
            **vl_inputs(batch, IMAGE),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()
    completion = np.asarray(ours.completion)
    np.testing.assert_array_equal(
        np.asarray(ours.tokens)[completion], theirs[completion]
    )
    assert completion.sum() > 24


def test_gradients_of_a_loss_agree(tmp_path):
    import torch

    peer = make_vl_peer(9)
    peer.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    batch = ragged_batch(model.config, PADS)
    real = batch.segment_ids != 0
    weights = np.random.default_rng(0).standard_normal((*real.shape, 40))
    weights = (weights * real[..., None]).astype(np.float32)

    def loss(params, images, *inputs):
        prompted = model.with_images(images)
        hidden = prompted.apply(params, *inputs)
        logits = jnp.einsum("btd,vd->btv", hidden, prompted.unembedding(params))
        return jnp.sum(jax.nn.log_softmax(logits) * weights)

    ours = jax.jit(jax.grad(loss))(params, batch.images, *batch.inputs)
    logits = peer(**vl_inputs(batch, IMAGE)).logits
    (torch.log_softmax(logits, -1) * torch.tensor(weights)).sum().backward()
    theirs = {
        published_name(name, RENAMED): p.grad.numpy()
        for name, p in peer.named_parameters()
    }
    for name, gradient in hf.to_hf(ours, model.config):
        scale = np.abs(theirs[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradient, theirs[name], atol=1e-4 * scale)


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_bitwise_and_loads_in_transformers(tied, tmp_path):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    source, target = tmp_path / "source", tmp_path / "target"
    peer = make_vl_peer(10, tied=tied).to(torch.bfloat16)
    peer.save_pretrained(source, max_shard_size="20KB")
    (source / "preprocessor_config.json").write_text('{"patch_size": 4}')
    assert len(list(source.glob("*.safetensors"))) > 1
    model, params = load(source)
    export(target, params, model, like=source)
    back, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        target, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    theirs = dict(back.named_parameters())
    for name, tensor in peer.named_parameters():
        assert torch.equal(tensor, theirs[name]), name
    assert (target / "preprocessor_config.json").read_text() == '{"patch_size": 4}'
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_names_of_modules_in_memory_are_read_too(tmp_path):
    from safetensors.torch import save_file

    peer = make_vl_peer(11)
    peer.save_pretrained(tmp_path / "published")
    expected = load(tmp_path / "published")
    (tmp_path / "memory").mkdir()
    config = (tmp_path / "published" / "config.json").read_text()
    (tmp_path / "memory" / "config.json").write_text(config)
    save_file(peer.state_dict(), tmp_path / "memory" / "model.safetensors")
    names = list(peer.state_dict())
    assert any(name.startswith("model.language_model.") for name in names)
    loaded = load(tmp_path / "memory")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
