"""Reading straight into the devices: what is read, how often, and what it takes."""

import json
import tracemalloc
from collections import Counter
from types import MappingProxyType

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_decoder import variant

from geomjax.checkpoints.sources import DictSource
from geomjax.checkpoints.writer import write_safetensors
from geomjax.meshes import Placement, mesh_from_string
from geomjax.models import hf
from geomjax.models.decoder import Decoder
from geomjax.models.load import load, new_config_json
from geomjax.models.read import read_params

CONFIG = variant(num_layers=3, hidden_size=32, intermediate_size=48)
WIDE = variant(num_layers=8, hidden_size=64, intermediate_size=256, vocab_size=2048)


class RecordingSource:
    """Tensors that are made when they are read, so that only their user holds them."""

    left_out = MappingProxyType({})
    tie_word_embeddings = None

    def __init__(self, config, *, wide=False):
        shapes = Decoder(config, config.vocab_size).shapes
        self.shapes = {
            name: hf.leaf(shapes, rule.path).shape[rule.role.stack_depth :]
            for rule in hf.rules(config)
            for name in rule.names(config)
        }
        self.reads = Counter()
        self.wide = wide

    def keys(self):
        return iter(self.shapes)

    def spec(self, key):
        return DictSource({key: self._make(key)}).spec(key)

    def read(self, key):
        self.reads[key] += 1
        return self._make(key)

    def _make(self, key):
        shape, seed = self.shapes[key], sorted(self.shapes).index(key)
        draw = np.random.default_rng(seed).random(shape, np.float32)
        return draw if self.wide else draw.astype(ml_dtypes.bfloat16)

    def prefetch(self, key):
        assert key in self.shapes

    def release(self, key):
        assert self.reads[key]


def read(source, config, mesh=None):
    shapes = Decoder(config, config.vocab_size).shapes
    return read_params(source, config, shapes, np.float32, Placement(mesh))


@pytest.mark.parametrize("mesh", [None, "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_every_tensor_is_read_once_and_lies_where_the_table_says(mesh):
    source = RecordingSource(CONFIG)
    mesh = None if mesh is None else mesh_from_string(mesh)
    params = read(source, CONFIG, mesh)
    assert set(source.reads.values()) == {1}
    assert source.reads.keys() == source.shapes.keys()
    for name, tensor in hf.to_hf(params, CONFIG):
        expected = source.read(name).astype(np.float32)
        np.testing.assert_array_equal(tensor, expected, err_msg=name)
    up = params["layers"]["mlp"]["up_proj"]["weight"]
    if mesh is None:
        assert up.sharding.device_set == {jax.devices()[0]}
        assert not up.committed
        return
    tensor = "tensor" if "tensor" in mesh.axis_names else None
    assert up.sharding.spec == PartitionSpec(None, tensor, "fsdp")
    assert params["norm"]["weight"].sharding.spec == PartitionSpec("fsdp")
    split = mesh.shape["fsdp"] * (mesh.shape["tensor"] if tensor else 1)
    assert {shard.data.size for shard in up.addressable_shards} == {up.size // split}


@pytest.mark.parametrize("mesh", [None, "fsdp=8"])
def test_the_host_holds_one_leaf_and_one_tensor_at_a_time(mesh):
    mesh = None if mesh is None else mesh_from_string(mesh)
    read(RecordingSource(WIDE, wide=True), WIDE, mesh)  # So that all is imported.
    tracemalloc.start()
    try:
        params = read(RecordingSource(WIDE, wide=True), WIDE, mesh)
        # A CPU's arrays may be the host's own buffers, which are held to the end.
        devices, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    leaf = 4 * WIDE.vocab_size * WIDE.hidden_size  # The largest; a tensor as well.
    assert peak < devices + 2 * leaf + leaf // 2
    assert total > 5 * leaf  # What a reader of everything at once would add.


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_read():
    source = RecordingSource(variant(hidden_size=20))
    with pytest.raises(ValueError, match=r"norm\.weight: 20 embed over fsdp=8"):
        read(source, variant(hidden_size=20), mesh_from_string("fsdp=8"))
    assert not source.reads
    source = RecordingSource(CONFIG)
    with pytest.raises(
        ValueError, match=r"kv_heads: 2 kv_heads over tensor=4"
    ) as error:
        read(source, CONFIG, mesh_from_string("tensor=4,data=2"))
    assert "where 1 or 2 divides" in str(error.value)
    assert not source.reads


def test_a_sharded_checkpoint_loads_onto_a_mesh(tmp_path):
    source = RecordingSource(CONFIG)
    tensors = {name: source.read(name) for name in source.keys()}
    paths = write_safetensors(tmp_path, tensors, max_shard_bytes=8000)
    assert len(paths) > 1
    text = json.dumps(new_config_json(Decoder(CONFIG, CONFIG.vocab_size)))
    (tmp_path / "config.json").write_text(text)
    _, params = load(tmp_path, placement=Placement(mesh_from_string("fsdp=4,tensor=2")))
    for name, tensor in hf.to_hf(params, CONFIG):
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


def test_tensors_that_follow_from_the_config_are_passed_over():
    source = RecordingSource(CONFIG)
    tensors = {name: source.read(name) for name in source.keys()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    params = read(DictSource(tensors), CONFIG)
    assert params.keys() == {"embed_tokens", "layers", "norm", "lm_head"}


def test_a_tensor_that_cannot_be_read_says_why():
    source = RecordingSource(CONFIG)
    tensors = {name: source.read(name) for name in source.keys()}
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    with pytest.raises(
        ValueError, match=r"missing model\.norm\.weight \(32,\): .*int8"
    ):
        read(DictSource(tensors), CONFIG)
