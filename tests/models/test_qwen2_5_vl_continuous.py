"""Continuous sampling of prompts with images, against the plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_vl import CONFIG, MODEL, prompts_and_images, random_params

from geomjax.data.batches import pad_prompts
from geomjax.models.qwen2_5_vl import place_images
from geomjax.rollout.chunks import Drawing
from geomjax.rollout.continuous import ContinuousSampler
from geomjax.rollout.sample import sample

NEW, PAD, STOPS = 6, 0, (3, 4, 5)


def test_rows_that_come_and_go_keep_their_images():
    prompts, patches = prompts_and_images(CONFIG)
    params, key = random_params(MODEL), jax.random.key(2)
    longest = max(map(len, prompts))
    keys = jax.random.split(key, len(prompts))
    drawing = Drawing(NEW, STOPS, 1.0, pad_token=PAD)
    images = place_images(CONFIG, prompts, patches, longest)
    # Images shift the positions of what follows, each row's by its own amount.
    assert len(set(images.deltas.tolist())) > 2

    def images_of(rows):
        return jax.tree.map(lambda x: x[np.array(rows)], images)

    sampler = ContinuousSampler(MODEL, params, drawing, rows=2, chunk_steps=2)
    ours = {c.index: c for c in sampler.run(prompts, keys, images_of)}

    @jax.jit
    def plain(params, images, tokens, positions, segment_ids):
        model = MODEL.with_images(images)
        settings = dict(max_new_tokens=NEW, stop_tokens=STOPS, temperature=1.0)
        return sample(model, params, tokens, positions, segment_ids, key, **settings)

    batch = pad_prompts(prompts, longest, PAD)
    drawn = plain(params, images, *map(jnp.asarray, batch[:3]))
    for i in range(len(prompts)):
        own = np.asarray(drawn.completion[i])
        np.testing.assert_array_equal(ours[i].tokens, np.asarray(drawn.tokens[i])[own])
        np.testing.assert_allclose(
            ours[i].log_probs, np.asarray(drawn.log_probs[i])[own], atol=1e-5
        )
    blind = {c.index: c for c in sampler.run(prompts, keys)}
    assert any(
        not np.array_equal(blind[i].tokens, c.tokens)
        or not np.allclose(blind[i].log_probs, c.log_probs, atol=1e-3)
        for i, c in ours.items()
    )
