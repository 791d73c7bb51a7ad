"""NeuroBLAST in JAX against the published vectors and the torch model: logits, gradients, cache, padding, packing."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_models import arrays_of, tensors_of, twin
from safetensors.numpy import load_file
from test_neuroblast import CASES, DATA, published_folder, random_model
from transformers import AutoModelForCausalLM

import neuroweave
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM
from neuroweave.neuroblast.jax_generation import Generator, Sampling
from neuroweave.neuroblast.jax_modeling import NeuroBlast
from neuroweave.neuroblast.jax_weights import describe_stored, initial_params, load_params, save_model
from neuroweave.neuroblast.tensor_table import blocks_of, tensor_table
from neuroweave.neuroblast.weight_map import tensor_shapes
from neuroweave.training.jax_step import Loss, loss_sums

STAGES = {"num_sensory_layers": 2, "num_associative_layers": 8, "num_motor_layers": 2}
CONFIGURATIONS = {
    "plain": STAGES,
    "odd stages": {"num_sensory_layers": 3, "num_associative_layers": 0, "num_motor_layers": 1, "kernel_size": 7},
    "gated": {"num_sensory_layers": 2, "num_associative_layers": 2, "num_motor_layers": 0, "scale": 2.0},
    "narrow": {"num_sensory_layers": 0, "num_associative_layers": 4, "num_motor_layers": 2, "scale": 0.5,
               "kernel_size": 1},
    "bare": STAGES | {"bridges": False, "alternating_rotary": False, "convolutions": False, "attention_bias": True},
    "sliding": STAGES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
    "yarn": {"num_sensory_layers": 1, "num_associative_layers": 1, "num_motor_layers": 1, "tie_word_embeddings": True,
             "pad_token_id": 3, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                    "original_max_position_embeddings": 16}},
}  # fmt: skip
CLOSE = {"rtol": 0, "atol": 1e-4}


def tokens(rows: int = 2, length: int = 19, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 53, (rows, length))


def logits_of(model: NeuroBlast):
    return jax.jit(lambda params, ids, **more: model.logits(params, model.hidden_states(params, ids, **more)[0]))


@pytest.mark.parametrize("case", CASES)
def test_published_vectors(case, tmp_path):
    """Straight from the published checkpoint: logits and loss within 1e-4, gradients within 1e-4 relative."""
    stored = load_file(DATA / f"{case}.safetensors")
    origin = describe_stored(published_folder(case, tmp_path / "published"))
    model = NeuroBlast(origin.config)
    params = load_params(origin, model.table)
    ids, mask = jnp.asarray(stored["input_ids"]), stored["attention_mask"].astype(bool)
    labels = np.where(mask, stored["labels"], -100)

    def mean_loss(params):
        h, _ = model.hidden_states(params, ids, attention_mask=jnp.asarray(mask))
        logits = model.logits(params, h)
        following = jnp.pad(jnp.asarray(labels)[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        real = following != -100
        losses = (
            jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, jnp.maximum(following, 0)[..., None], -1)[..., 0]
        )
        return jnp.where(real, losses, 0).sum() / real.sum(), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
    np.testing.assert_allclose(np.asarray(logits)[mask], stored["logits"][mask], **CLOSE)
    np.testing.assert_allclose(loss, stored["loss"].squeeze(), **CLOSE)
    compared = 0
    for name, array in tensors_of(model.table, gradient).items():
        expected = stored.get(f"grad.{name}")
        if expected is None:
            continue
        compared += 1
        expected = expected[:, :, expected.shape[2] // 2] if expected.ndim == 4 and "conv" in name else expected
        scale = np.abs(expected).max()
        np.testing.assert_allclose(array, expected.reshape(array.shape), rtol=0, atol=1e-4 * scale, err_msg=name)
    assert compared > 3


@pytest.mark.parametrize(
    ("name", "platform"), [(n, "cpu") for n in CONFIGURATIONS] + [("plain", "gpu"), ("narrow", "gpu")]
)
def test_equals_torch(name, platform):
    """Logits, packed logits, and the gradient of a packed row, of configurations that reach every branch; products and
    convolutions in the form for this platform and in the form for the others."""
    theirs = random_model(**CONFIGURATIONS[name])
    model, params = twin(theirs, platform=platform)
    ids = tokens()
    positions = np.stack([np.r_[np.arange(7), np.arange(12)], np.arange(19)])
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(logits_of(model)(params, jnp.asarray(ids)), expected, **CLOSE)
    labels = np.where(positions == 0, -100, ids)
    out = theirs(torch.tensor(ids), position_ids=torch.tensor(positions), labels=torch.tensor(labels))
    out.loss.backward()
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}

    def mean(params):
        total, count = loss_sums(model, params, {n: jnp.asarray(x) for n, x in batch.items()}, Loss())
        return total / count

    loss, gradient = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(loss, out.loss.item(), **CLOSE)
    expected = arrays_of(model.table, {n: p.grad for n, p in theirs.named_parameters()})
    for key, array in gradient.items():
        size = float(jnp.abs(expected[key]).max())
        np.testing.assert_allclose(array, expected[key], rtol=0, atol=1e-4 * size, err_msg=key)


def test_padding_equals_torch():
    """At either end: real tokens' logits."""
    theirs = random_model(**CONFIGURATIONS["plain"])
    model, params = twin(theirs)
    for mask in (np.r_[[1] * 13, [0] * 6], np.r_[[0] * 6, [1] * 13]):
        mask = np.stack([mask, np.ones(19, int)])
        expected = theirs(torch.tensor(tokens()), attention_mask=torch.tensor(mask)).logits.detach().numpy()
        got = logits_of(model)(params, jnp.asarray(tokens()), attention_mask=jnp.asarray(mask))
        np.testing.assert_allclose(np.asarray(got)[mask == 1], expected[mask == 1], **CLOSE)


@pytest.mark.parametrize("name", ["plain", "gated", "narrow", "sliding"])
def test_step_equals_whole(name):
    """Chunks of 8, 1, 1, 4 and 5 tokens onto the cache give the logits of one pass, and no token sees a later one."""
    model, params = twin(random_model(**CONFIGURATIONS[name]))
    ids, run = jnp.asarray(tokens()), logits_of(model)
    whole = run(params, ids)
    step = jax.jit(
        lambda params, ids, cache: (lambda h, cache: (model.logits(params, h), cache))(
            *model.hidden_states(params, ids, cache=cache)
        )
    )
    cache, parts = model.empty_cache(2, 32), []
    for first, last in ((0, 8), (8, 9), (9, 10), (10, 14), (14, 19)):
        logits, cache = step(params, ids[:, first:last], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **CLOSE)
    changed = ids.at[:, 11:].set((ids[:, 11:] + 1) % 53)
    np.testing.assert_array_equal(run(params, changed)[:, :11], whole[:, :11])


def test_scan_remat_and_pieces_change_nothing():
    """Loss and gradient of the scanned model, computed twice or in part, equal those of one layer after the other."""
    theirs = random_model(**CONFIGURATIONS["plain"] | {"num_sensory_layers": 1})
    assert [len(block.units) for block in blocks_of(theirs.config)] == [1, 1, 1, 2, 2]
    ids = tokens(length=21)
    batch = {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids)}
    found = {}
    for name, loss, computation in (
        ("unrolled", Loss(packed=False), {"unroll": True}),
        ("scanned", Loss(packed=False), {"remat": "full"}),
        ("in pieces", Loss(packed=False, pieces=4), {"remat": "dots"}),
        ("as on a GPU", Loss(packed=False), {"platform": "gpu"}),
    ):
        model, params = twin(theirs, **computation)
        found[name] = jax.jit(jax.value_and_grad(lambda p, m=model, c=loss: loss_sums(m, p, batch, c)[0]))(params)
    loss, gradient = found.pop("unrolled")
    for name, (other, others) in found.items():
        np.testing.assert_allclose(other, loss, rtol=1e-6, err_msg=name)
        for key, array in gradient.items():
            size = float(jnp.abs(array).max())
            np.testing.assert_allclose(others[key], array, rtol=0, atol=2e-5 * size, err_msg=f"{name} {key}")


def test_bfloat16_products_stay_close():
    theirs = random_model(**CONFIGURATIONS["plain"])
    (exact, params), (rough, _) = twin(theirs), twin(theirs, dtype=jnp.bfloat16)
    ids = jnp.asarray(tokens())
    whole, found = logits_of(exact)(params, ids), logits_of(rough)(params, ids)
    assert found.dtype == jnp.float32
    off = float(jnp.abs(found - whole).max() / whole.std())
    assert 1e-3 < off < 0.2, off
    batch = {"input_ids": ids, "labels": ids}
    gradients = [
        jax.jit(jax.grad(lambda p, m=model: loss_sums(m, p, batch, Loss(packed=False))[0]))(params)
        for model in (exact, rough)
    ]
    for key, array in gradients[0].items():
        other = gradients[1][key]
        assert other.dtype == array.dtype
        cosine = float(jnp.vdot(array, other) / jnp.linalg.norm(array.ravel()) / jnp.linalg.norm(other.ravel()))
        assert 0.98 < cosine < 1 - 1e-9, (key, cosine)


def test_splash_attention_equals_plain():
    """The TPU kernel, interpreted: packed documents, grouped heads, a sliding window; value and gradient."""
    theirs = random_model(**{**CONFIGURATIONS["sliding"], "num_associative_layers": 1, "num_motor_layers": 0})
    ids = tokens(length=140)
    positions = jnp.asarray(np.stack([np.r_[np.arange(7), np.arange(133)], np.arange(140)]))
    found = []
    for kind in ("plain", "splash"):
        model, params = twin(theirs, attention=kind)
        batch = {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids), "position_ids": positions}
        found.append(jax.jit(jax.value_and_grad(lambda p, m=model, b=batch: loss_sums(m, p, b, Loss())[0]))(params))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    for key, array in found[0][1].items():
        np.testing.assert_allclose(
            found[1][1][key], array, rtol=0, atol=1e-4 * float(jnp.abs(array).max()), err_msg=key
        )


# -------------------------------------------------------------------------------------------------------- patched


def test_patched_model_equals_torch(tmp_path):
    """Activations at every site of a layer, at the embedding and the head; segments and learned mixtures; reloaded."""
    theirs = random_model(**CONFIGURATIONS["plain"], hidden_act="gelu_pytorch_tanh")
    mixture = {"mixture": {"members": ["original", "relu", "swish_beta"]}}
    recipe = {
        "sites": [
            {"site": "mlp", "activation": mixture, "layers": [0, 6, 8]},
            {"site": "mlp", "activation": {"segments": ["relu", "original"]}, "layers": [2, 4]},
            {"site": "mlp", "activation": "phantom", "layers": [10]},
            {"site": ["attention.v", "mlp.up"], "activation": "silu_tanh"},
            {"site": "attention.o", "activation": {"mixture": {"members": ["original", "tanh"]}}, "layers": [10, 11]},
            {"site": "head", "activation": "tanh"},
            {"site": "embedding", "activation": "gelu"},
        ]
    }
    neuroweave.patch(theirs, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("gating_logits", "beta")):
                parameter.normal_(0, 1, generator=generator)
    theirs.save_pretrained(tmp_path / "patched")
    origin = describe_stored(tmp_path / "patched")
    model = NeuroBlast(origin.config, origin.plan)
    params = load_params(origin, model.table)
    assert sum(key.endswith("gating_logits") for key in params) == 4  # layers 6 and 8 are one block
    ids = tokens()
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(logits_of(model)(params, jnp.asarray(ids)), expected, **CLOSE)
    (tmp_path / "back").mkdir()
    save_model(tmp_path / "back", params, model.table, model=origin)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in theirs.state_dict().items()
    }


# -------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_both_ways_bit_for_bit(tied, tmp_path):
    theirs = random_model(**CONFIGURATIONS["narrow"] | {"kernel_size": 3, "tie_word_embeddings": tied})
    theirs.save_pretrained(tmp_path / "torch")
    origin = describe_stored(tmp_path / "torch")
    model = NeuroBlast(origin.config)
    (tmp_path / "jax").mkdir()
    save_model(tmp_path / "jax", load_params(origin, model.table), model.table, model=origin)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("torch", "jax"))
    assert set(before) == set(after)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "jax")
    assert type(again) is NeuroBlastForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(again(torch.tensor(tokens())).logits, theirs(torch.tensor(tokens())).logits)


def test_table_has_every_tensor_once():
    config = NeuroBlastConfig()  # the published size
    table = tensor_table(config)
    names = [name for row in table for name in row.names]
    assert sorted(names) == sorted(tensor_shapes(config))
    assert len(table) < len(names) / 5
    with torch.device("meta"):
        theirs = NeuroBlastForCausalLM(config)
    assert sum(int(np.prod(row.array_shape)) for row in table) == sum(p.numel() for p in theirs.parameters())


def test_fresh_weights_are_spread_as_torch_spreads_them():
    settings = {"num_sensory_layers": 2, "num_associative_layers": 0, "num_motor_layers": 2, "hidden_size": 128,
                "intermediate_size": 256, "scale": 0.5, "pad_token_id": 5, "vocab_size": 1000}  # fmt: skip
    config = NeuroBlastConfig(**settings)
    torch.manual_seed(0)
    theirs = {name: tensor.numpy() for name, tensor in NeuroBlastForCausalLM(config).state_dict().items()}
    table = tensor_table(config)
    first, again, other = (tensors_of(table, initial_params(table, seed=seed)) for seed in (7, 7, 8))
    for name, array in first.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(again[name], array)
        if array.std() > 0:
            assert not np.array_equal(other[name], array)
            np.testing.assert_allclose(array.std(), theirs[name].std(), rtol=0.1, err_msg=name)
            np.testing.assert_allclose(np.abs(array).max(), np.abs(theirs[name]).max(), rtol=0.4, err_msg=name)
        else:
            np.testing.assert_array_equal(array, theirs[name])
    assert not first["model.embed_tokens.weight"][5].any()


# ----------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_equals_transformers(penalty):
    """Two prompts of different lengths, padded at the left, 40 tokens: the same ones."""
    theirs = random_model(**CONFIGURATIONS["plain"])
    model, params = twin(theirs)
    ids, mask = tokens(length=9), np.ones((2, 9), int)
    mask[1, :4] = 0
    expected = theirs.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=40, do_sample=False,
        repetition_penalty=penalty, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    made = Generator(model, params).tokens(
        ids, new_tokens=40, attention_mask=mask, sampling=Sampling(repetition_penalty=penalty)
    )
    got = np.stack(list(made), axis=1)
    if penalty == 1.0:  # transformers counts the padding token as said, too
        np.testing.assert_array_equal(got, expected[:, 9:].numpy())
    else:
        np.testing.assert_array_equal(got[0], expected[0, 9:].numpy())


def test_draws_follow_the_distribution_that_transformers_draws_from():
    """Temperature, top-k, top-p and min-p: the share of each of 12 tokens in 20,000 draws."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from neuroweave.neuroblast.jax_generation import choose

    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2
    scores = torch.tensor(logits)[None]
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.95), MinPLogitsWarper(0.02)):
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    sampling = Sampling(draw=True, temperature=0.7, top_k=9, top_p=0.95, min_p=0.02)
    rows = jnp.broadcast_to(jnp.asarray(logits), (20_000, 12))
    drawn = choose(rows, jnp.zeros_like(rows, bool), sampling, jax.random.key(0))
    shares = np.bincount(np.asarray(drawn), minlength=12) / 20_000
    assert (shares[expected == 0] == 0).all()
    assert (expected == 0).sum() >= 3
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / 20_000))


# -------------------------------------------------------------------------------------------------------- refusals


def test_refuses_what_it_cannot_run(tmp_path):
    with pytest.raises(ValueError, match="rope_type 'dynamic' changes with the length of the text"):
        NeuroBlast(NeuroBlastConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    with pytest.raises(ValueError, match="hidden_act 'mish' is not known to the JAX model; it knows silu"):
        NeuroBlast(NeuroBlastConfig(hidden_act="mish"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="a llama model; the JAX backend runs NeuroBLAST models"):
        describe_stored(tmp_path)


def test_refuses_a_checkpoint_that_does_not_fit(tmp_path: Path):
    theirs = random_model(**CONFIGURATIONS["gated"])
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))
    origin = describe_stored(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit its configuration .*gate_proj.weight has shape \[40, 24\]"):
        load_params(origin, tensor_table(origin.config))
