"""Against transformers on the CPU in float32 and float64, and the conversion both ways, bit for bit."""

import contextlib
import importlib
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from common.errors import CheckpointError, ConfigError
from model.hf import config_from_hf, foreign_adapters, from_hf, hf_config, hf_shape, hf_tensors, to_hf
from model.kernels.gated_norm import gated_norm
from model.kernels.rms_norm import rms_norm
from model.placement import placements
from model.zamba import Zamba
from tests.model import tiny

STRUCTURES = {
    "zamba-7b": tiny.zamba(),
    "zamba2-1.2b": tiny.zamba2(num_shared_blocks=1, mamba={"ngroups": 1}),
    "zamba2-2.7b": tiny.zamba2(rope=False, adapters=["mlp"], mamba={"ngroups": 1}),
    "zamba2-7b": tiny.zamba2(adapters=["mlp"]),
    "three-blocks": tiny.zamba2(
        num_shared_blocks=3,
        hybrid_layers=[0, 1, 3, 4],
        rope_theta=100.0,
        norm_eps=1e-3,
        max_position_embeddings=512,
        mamba={"dt_min": 0.05, "d_conv": 3, "expand": 1},
    ),
}


def theirs(config):
    """The transformers model of `config`."""
    import transformers

    kind = "Zamba" if config.family == "zamba" else "Zamba2"
    hf = getattr(transformers, f"{kind}Config")(**hf_config(config, "float32"))
    return getattr(transformers, f"{kind}ForCausalLM")(hf)


class _Wide:
    """torch, whose float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def wide_transformers(config):
    """transformers' modelling code widens to float32 in many places; in here to float64."""
    name = config.family
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    with (
        mock.patch.object(modeling, "torch", _Wide()),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double, create=True),
    ):
        yield


def compare(config, time, dtype=torch.float32):
    """Logits and every gradient in transformers' form: ours and theirs."""
    ours = tiny.randomize(Zamba(config, dtype=dtype))
    parameters = dict(ours.named_parameters())
    state = dict(to_hf(config, lambda name: parameters[name].detach()))
    inputs, targets = tiny.tokens(2, time)
    with wide_transformers(config) if dtype == torch.float64 else contextlib.nullcontext():
        hf = theirs(config).to(dtype)
        assert not hf.load_state_dict(state, strict=False).unexpected_keys
        hf.tie_weights()
        logits = hf(inputs).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = {name: parameter.grad for name, parameter in hf.named_parameters() if name != "lm_head.weight"}
    expected["logits"] = logits.detach()
    return our_side(ours, config, inputs, targets), expected


def our_side(model, config, inputs, targets):
    model.zero_grad()
    model(inputs, targets).mean().backward()
    parameters = dict(model.named_parameters())
    grads = dict(to_hf(config, lambda name: parameters[name].grad.clone()))
    return {**grads, "logits": model.logits(inputs)}


def check(config, time):
    """To rounding in float64: the same function. In float32 within 1e-4; but where the judge itself is further than
    that from its float64 (a gradient of few values that cancel), at most twice as far from it."""
    found, exact = compare(config, time, torch.float64)
    assert all(value.dtype == torch.float64 for value in exact.values())
    error, name = tiny.worst(found, exact)
    assert error < 1e-11, name
    found, expected = compare(config, time, torch.float32)
    assert all(value.dtype == torch.float32 for value in expected.values())
    doubtful = {name for name, value in expected.items() if not tiny.relative(value, exact[name]) <= 1e-4}
    for name in doubtful:
        assert tiny.relative(found[name], exact[name]) <= 2 * tiny.relative(expected[name], exact[name]), name
    error, name = tiny.worst(*({n: v for n, v in side.items() if n not in doubtful} for side in (found, expected)))
    assert error < 1e-4, name


@pytest.mark.parametrize("name", STRUCTURES)
def test_equals_transformers(name):
    check(STRUCTURES[name], 41)


def test_norms_round_as_in_transformers():
    """In bfloat16 too, bit for bit: the normed value is rounded before it is multiplied."""
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNorm, Zamba2RMSNormGated

    x, gate, weight = (torch.randn(*shape).bfloat16() for shape in ((50, 32), (50, 32), (32,)))
    plain, gated = Zamba2RMSNorm(32, 1e-3).bfloat16(), Zamba2RMSNormGated(32, 16, 1e-3).bfloat16()
    for norm in (plain, gated):
        norm.weight.data.copy_(weight)
    assert torch.equal(rms_norm(x, weight, 1e-3), plain(x))
    assert torch.equal(gated_norm(x, gate, weight, 1e-3, groups=2), gated(x, gate))


def drawn(seed):
    """A small model of any structure that both sides have, and a sequence length beyond one chunk."""
    pick = random.Random(seed).choice
    hidden, sites = pick([16, 32, 48]), pick([[0], [2], [1, 2, 5], [0, 1, 2, 3, 4, 5], [0, 3, 4]])
    common = {
        "hidden_size": hidden,
        "num_layers": 6,
        "hybrid_layers": sites,
        "num_attention_heads": pick([1, 2, 4]),
        "intermediate_size": pick([24, 40]),
        "norm_eps": pick([1e-5, 1e-3]),
    }
    conv = {"d_conv": pick([2, 3, 4]), "d_state": pick([4, 8]), "expand": pick([1, 2])}
    if pick([True, False, False]) and len(sites) > 1:  # transformers cannot construct a Zamba with one call
        heads = pick([1, 2, 4])
        return tiny.zamba(**common, mamba={**conv, "num_heads": heads, "dt_rank": pick([1, 3])}), pick([5, 33])
    mamba = {
        **conv,
        # At least two heads a group: with one, the norm takes D's scale away and its gradient is almost nothing.
        "num_heads": pick([4, 8]),
        "ngroups": pick([1, 2]),
        "chunk_size": pick([4, 16, 32]),
        "dt_min": pick([0.0, 0.0, 1e-3, 0.02]),
    }
    structure = {
        "num_shared_blocks": min(pick([1, 2, 3]), len(sites)),
        "rope": pick([True, False]),
        "rope_theta": pick([10000.0, 100.0]),
        "adapters": pick([["mlp"], ["mlp", "attention"]]),
        "adapter_rank": pick([1, 4]),
    }
    return tiny.zamba2(**common, **structure, mamba=mamba), pick([33, 41, 64])


@pytest.mark.parametrize("seed", range(6))
def test_drawn_structures(seed):
    check(*drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 106))
def test_drawn_structures_sweep(seed):
    check(*drawn(seed))


def state_of(config, dtype=torch.bfloat16):
    return {name: tiny.weights(placement).to(dtype) for name, placement in placements(config).items()}


@pytest.mark.parametrize("name", STRUCTURES)
def test_round_trip_is_bit_exact(name, tmp_path):
    """Ours -> files that transformers saves -> ours, and the names and shapes are exactly those of transformers."""
    from safetensors.torch import load_file

    config, state = STRUCTURES[name], state_of(STRUCTURES[name])
    there = dict(to_hf(config, state.__getitem__))
    assert {t.name: hf_shape(config, t) for t in hf_tensors(config)} == {n: tuple(v.shape) for n, v in there.items()}
    hf = theirs(config).to(torch.bfloat16)
    hf.load_state_dict(there, strict=False)
    hf.tie_weights()
    hf.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == there.keys() and all(torch.equal(saved[n], there[n]) for n in there)
    back = dict(from_hf(config, saved, saved.__getitem__))
    assert back.keys() == state.keys()
    assert all(back[n].dtype == state[n].dtype and torch.equal(back[n], state[n]) for n in state)


def test_each_tensor_keeps_its_type():
    config = tiny.zamba2()
    state = state_of(config)
    kept = {n: v.float() if "norm" in n or "A_log" in n else v for n, v in state.items()}
    back = dict(from_hf(config, *_files(dict(to_hf(config, kept.__getitem__)))))
    assert {n: v.dtype for n, v in back.items()} == {n: v.dtype for n, v in kept.items()}


def _files(tensors):
    return tensors.keys(), tensors.__getitem__


@pytest.mark.parametrize("name", STRUCTURES)
def test_config_round_trip(name):
    assert config_from_hf(hf_config(STRUCTURES[name])) == STRUCTURES[name]


def test_config_of_published_files():
    hf = hf_config(tiny.zamba2())
    legacy = {**hf, "time_step_min": 0.001, "rope_theta": 10000}
    assert config_from_hf(legacy).mamba.dt_min == 0.001
    modern = {k: v for k, v in hf.items() if k != "rope_theta"}
    modern["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    modern["layers_block_type"] = [k.replace("mamba", "linear_attention") for k in hf["layers_block_type"]]
    assert config_from_hf(modern).rope_theta == 5000.0


@pytest.mark.parametrize(("family", "hidden"), [("zamba", 72), ("zamba2", 128)])
def test_absent_keys_have_the_defaults_of_transformers(family, hidden):
    import transformers

    kind = getattr(transformers, f"{family.capitalize()}Config")
    whole = kind(hidden_size=hidden).to_dict()
    few = {"model_type": family, "hidden_size": hidden, "layers_block_type": whole["layers_block_type"]}
    if family == "zamba":  # the pattern of its layers is a default too
        del few["layers_block_type"]
    assert config_from_hf(few) == config_from_hf(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "hf.model_type: llama"),
        ({"use_long_context": True}, "hf.use_long_context: True"),
        ({"num_key_value_heads": 1}, "hf.num_key_value_heads: 1: must be 4"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "hf.rope_parameters"),
        ({"layers_block_type": ["mamba"]}, "hf.layers_block_type"),
        ({"hidden_act": "silu"}, "hf.hidden_act: silu: only gelu"),
    ],
)
def test_configs_that_are_another_model(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**hf_config(tiny.zamba2()), **changes})


def test_no_hugging_face_form_without_mlp_adapters():
    with pytest.raises(ConfigError, match=r"model\.adapters"):
        hf_config(tiny.zamba2(adapters=[]))


def test_no_hugging_face_form_of_zamba_with_one_call():
    with pytest.raises(ConfigError, match=r"model\.hybrid_layers"):
        hf_config(tiny.zamba(hybrid_layers=[1]))


def test_foreign_adapters_are_dropped_by_name():
    config = tiny.zamba2()
    tensors = dict(to_hf(config, state_of(config).__getitem__))
    prefix = "model.layers.1.shared_transformer"  # block 0, whose calls are 0 and 2
    extra = {
        f"{prefix}.feed_forward.gate_up_proj_adapter_list.1.0.weight": torch.zeros(4, 32),
        f"{prefix}.self_attn.linear_q_adapter_list.1.1.weight": torch.zeros(64, 4),
    }
    assert foreign_adapters(config, [*tensors, *extra]) == sorted(extra)
    assert dict(from_hf(config, *_files({**tensors, **extra}))).keys() == placements(config).keys()


def test_tied_copies_must_be_equal():
    config = tiny.zamba2()
    tensors = dict(to_hf(config, state_of(config).__getitem__))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = "model.layers.1.shared_transformer.self_attn.q_proj.weight"
    copy = "model.layers.4.shared_transformer.self_attn.q_proj.weight"
    tensors[copy] = tensors[source].clone()
    dict(from_hf(config, *_files(tensors)))
    tensors[copy][0, 0] += 1
    with pytest.raises(CheckpointError, match=f"{copy}: .*tied to {source}"):
        dict(from_hf(config, *_files(tensors)))


def _broken(kind, tensors):
    name = "model.layers.0.mamba.D"
    match kind:
        case "missing":
            del tensors[name]
        case "extra":
            name = "model.layers.0.mamba.E"
            tensors[name] = torch.zeros(1)
        case "adapter of no call":
            name = "model.layers.1.shared_transformer.feed_forward.gate_up_proj_adapter_list.7.0.weight"
            tensors[name] = torch.zeros(4, 32)
        case "misshaped":
            tensors[name] = torch.zeros(9)
        case "NaN":
            tensors[name][3] = torch.nan
        case "integer":
            tensors[name] = torch.zeros(8, dtype=torch.int8)
    return name


@pytest.mark.parametrize("kind", ["missing", "extra", "adapter of no call", "misshaped", "NaN", "integer"])
def test_broken_weights(kind):
    config = tiny.zamba2()
    tensors = dict(to_hf(config, state_of(config).__getitem__))
    name = _broken(kind, tensors)
    with pytest.raises(CheckpointError, match=name):
        dict(from_hf(config, *_files(tensors)))
