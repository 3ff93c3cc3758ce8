"""The forms of the loss at their smallest, and what their names may be."""

import json

import pytest

from configs.loss_forms import get_config
from experiments import loss_forms
from experiments.common.world import TINY_WORLD
from experiments.studies.forms import is_form, make_form
from geomjax.models.load import load

MODEL = load(TINY_WORLD / "anchor").model


@pytest.mark.parametrize("variant", ["tiny", "smoke"])
def test_every_form_of_the_configuration_is_one(variant):
    for name, arm in get_config(variant).arms.items():
        if name != "sampled_token":
            assert is_form(arm.kind)
            assert callable(make_form(arm.kind, MODEL, MODEL, 1.0))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("top_k:reverse_kl:3:student", "expected one of"),
        ("top_k:hinge:3:student:bucket", "expected one of"),
        ("top_k:reverse_kl:three:student:bucket", "expected one of"),
        ("top_k:reverse_kl:16:student:bucket", "k is 16"),
        ("top_k:reverse_kl:1:student:renormalise", "k is 1"),
        ("top_k:reverse_kl:3:both:bucket", "support 'both'"),
    ],
)
def test_bad_names_are_refused(kind, message):
    assert is_form(kind)
    with pytest.raises(ValueError, match=message):
        make_form(kind, MODEL, MODEL, 1.0)


@pytest.mark.slow
def test_smoke(tmp_path):
    workdir = tmp_path / "run"
    record = loss_forms.run(get_config("smoke"), workdir)
    assert json.loads((workdir / "results.json").read_text()) == record
    assert set(record["arms"]) == {"sampled_token", "reverse_kl", "top_reverse_bucket"}
    assert set(record["compilations"].values()) == {1}
    assert len(record["claims"]) == 2
    (whole,) = record["moments"]["reverse_kl"].values()
    (sampled,) = record["moments"]["sampled_token"].values()
    for ours, theirs in zip(sampled, whole, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert min(ours["noise_to_signal"], theirs["noise_to_signal"]) > 0
    assert "The sampled token's gradient" in (workdir / "report.md").read_text()
    # The finished runs once more, without second moments.
    config = get_config("smoke")
    config.moment_matrices = ()
    again = loss_forms.run(config, workdir)
    assert again["claims"] == record["claims"][1:]
    assert again["moments"] == {}
    assert "Noise of the gradients" not in (workdir / "report.md").read_text()


def test_arms_that_others_are_compared_with_must_be_there(tmp_path):
    config = get_config("smoke")
    del config.arms["reverse_kl"]
    with pytest.raises(ValueError, match=r"no arms \['reverse_kl'\]"):
        loss_forms.run(config, tmp_path / "run")
