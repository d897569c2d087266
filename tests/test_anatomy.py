"""Tensor names of many families: layer, stack, kind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import anatomy
from surgery.errors import SurgeryError

TABLE = {
    "llama, qwen, mistral, gemma": [
        ("model.embed_tokens.weight", None, "embedding"),
        ("model.layers.3.self_attn.q_proj.weight", 3, "q"),
        ("model.layers.3.self_attn.q_proj.bias", 3, "q"),
        ("model.layers.3.self_attn.k_proj.weight", 3, "k"),
        ("model.layers.3.self_attn.v_proj.weight", 3, "v"),
        ("model.layers.31.self_attn.o_proj.weight", 31, "o"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "norm"),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", 3, "other"),
        ("model.layers.3.mlp.gate_proj.weight", 3, "gate"),
        ("model.layers.3.mlp.up_proj.weight", 3, "up"),
        ("model.layers.3.mlp.down_proj.weight", 3, "down"),
        ("model.layers.3.input_layernorm.weight", 3, "norm"),
        ("model.layers.3.pre_feedforward_layernorm.weight", 3, "norm"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "head"),
        ("score.weight", None, "head"),
    ],
    "original llama, internlm": [
        ("tok_embeddings.weight", None, "embedding"),
        ("layers.5.attention.wq.weight", 5, "q"),
        ("layers.5.attention.wo.weight", 5, "o"),
        ("model.layers.5.attention.wqkv.weight", 5, "qkv"),
        ("layers.5.feed_forward.w1.weight", 5, "gate"),
        ("layers.5.feed_forward.w2.weight", 5, "down"),
        ("layers.5.feed_forward.w3.weight", 5, "up"),
        ("layers.5.ffn_norm.weight", 5, "norm"),
        ("output.weight", None, "head"),
    ],
    "phi": [
        ("model.layers.0.self_attn.dense.weight", 0, "o"),
        ("model.layers.0.mlp.fc1.weight", 0, "up"),
        ("model.layers.0.mlp.fc2.bias", 0, "down"),
        ("model.layers.0.self_attn.qkv_proj.weight", 0, "qkv"),
        ("model.layers.0.mlp.gate_up_proj.weight", 0, "gate_up"),
        ("model.final_layernorm.weight", None, "norm"),
        ("transformer.embd.wte.weight", None, "embedding"),
        ("transformer.h.0.ln.weight", 0, "norm"),
    ],
    "gpt2": [
        ("wte.weight", None, "embedding"),
        ("transformer.wpe.weight", None, "embedding"),
        ("h.3.attn.c_attn.weight", 3, "qkv"),
        ("h.3.attn.bias", 3, "other"),
        ("h.3.attn.masked_bias", 3, "other"),
        ("transformer.h.11.attn.c_proj.weight", 11, "o"),
        ("h.3.mlp.c_fc.weight", 3, "up"),
        ("h.3.mlp.c_proj.weight", 3, "down"),
        ("h.3.ln_1.weight", 3, "norm"),
        ("ln_f.bias", None, "norm"),
    ],
    "gpt-j, mpt": [
        ("transformer.h.3.attn.out_proj.weight", 3, "o"),
        ("transformer.h.3.mlp.fc_in.weight", 3, "up"),
        ("transformer.h.3.mlp.fc_out.weight", 3, "down"),
        ("transformer.blocks.3.attn.Wqkv.weight", 3, "qkv"),
        ("transformer.blocks.3.norm_1.weight", 3, "norm"),
        ("transformer.blocks.3.ffn.down_proj.weight", 3, "down"),
    ],
    "gpt-neox": [
        ("gpt_neox.embed_in.weight", None, "embedding"),
        ("gpt_neox.layers.7.attention.query_key_value.weight", 7, "qkv"),
        ("gpt_neox.layers.7.attention.dense.bias", 7, "o"),
        ("gpt_neox.layers.7.attention.bias", 7, "other"),
        ("gpt_neox.layers.7.mlp.dense_h_to_4h.weight", 7, "up"),
        ("gpt_neox.layers.7.mlp.dense_4h_to_h.weight", 7, "down"),
        ("gpt_neox.layers.7.post_attention_layernorm.bias", 7, "norm"),
        ("gpt_neox.final_layer_norm.weight", None, "norm"),
        ("embed_out.weight", None, "head"),
    ],
    "opt": [
        ("model.decoder.embed_tokens.weight", None, "embedding"),
        ("model.decoder.embed_positions.weight", None, "embedding"),
        ("model.decoder.layers.2.self_attn.out_proj.weight", 2, "o"),
        ("model.decoder.layers.2.self_attn_layer_norm.weight", 2, "norm"),
        ("model.decoder.layers.2.fc1.weight", 2, "up"),
        ("model.decoder.layers.2.fc2.weight", 2, "down"),
        ("model.decoder.final_layer_norm.bias", None, "norm"),
    ],
    "falcon": [
        ("transformer.word_embeddings.weight", None, "embedding"),
        ("transformer.h.4.self_attention.query_key_value.weight", 4, "qkv"),
        ("transformer.h.4.self_attention.dense.weight", 4, "o"),
        ("transformer.h.4.mlp.dense_4h_to_h.weight", 4, "down"),
        ("transformer.h.4.ln_attn.weight", 4, "norm"),
    ],
    "mixtures": [
        ("model.layers.6.block_sparse_moe.gate.weight", 6, "router"),
        ("model.layers.6.block_sparse_moe.experts.5.w1.weight", 6, "gate"),
        ("model.layers.6.block_sparse_moe.experts.5.w2.weight", 6, "down"),
        ("model.layers.6.block_sparse_moe.experts.5.w3.weight", 6, "up"),
        ("model.layers.6.mlp.gate.e_score_correction_bias", 6, "router"),
        ("model.layers.6.mlp.shared_expert_gate.weight", 6, "router"),
        ("model.layers.6.mlp.experts.63.gate_proj.weight", 6, "gate"),
        ("model.layers.6.mlp.experts.gate_up_proj_bias", 6, "gate_up"),
        ("model.layers.6.mlp.router.weight", 6, "router"),
        ("model.layers.6.self_attn.kv_a_proj_with_mqa.weight", 6, "qkv"),
        ("model.layers.6.self_attn.q_b_proj.weight", 6, "q"),
    ],
    "t5": [
        ("shared.weight", None, "embedding"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", 2, "q"),
        ("encoder.block.2.layer.0.SelfAttention.o.weight", 2, "o"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0, "other"),
        ("decoder.block.2.layer.1.EncDecAttention.k.weight", 2, "k"),
        ("decoder.block.2.layer.2.DenseReluDense.wi_0.weight", 2, "gate"),
        ("decoder.block.2.layer.2.DenseReluDense.wi_1.weight", 2, "up"),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", 2, "up"),
        ("encoder.block.2.layer.1.DenseReluDense.wo.weight", 2, "down"),
        ("encoder.block.2.layer.1.layer_norm.weight", 2, "norm"),
        ("encoder.final_layer_norm.weight", None, "norm"),
    ],
    "bert": [
        ("bert.embeddings.word_embeddings.weight", None, "embedding"),
        ("bert.embeddings.LayerNorm.gamma", None, "norm"),
        ("bert.encoder.layer.9.attention.self.query.weight", 9, "q"),
        ("bert.encoder.layer.9.attention.self.value.bias", 9, "v"),
        ("bert.encoder.layer.9.attention.output.dense.weight", 9, "o"),
        ("bert.encoder.layer.9.attention.output.LayerNorm.weight", 9, "norm"),
        ("bert.encoder.layer.9.intermediate.dense.weight", 9, "up"),
        ("bert.encoder.layer.9.output.dense.weight", 9, "down"),
        ("bert.pooler.dense.weight", None, "other"),
        ("cls.predictions.transform.dense.weight", None, "head"),
        ("cls.predictions.bias", None, "head"),
        ("classifier.weight", None, "head"),
        ("distilbert.transformer.layer.1.attention.q_lin.weight", 1, "q"),
        ("distilbert.transformer.layer.1.ffn.lin2.weight", 1, "down"),
        ("model.layers.1.mlp.Wi.weight", 1, "gate_up"),
        ("model.layers.1.attn.Wo.weight", 1, "o"),
        ("model.layers.1.mlp.Wo.weight", 1, "down"),
    ],
    "vit and vision towers": [
        ("vit.embeddings.cls_token", None, "embedding"),
        ("vit.embeddings.patch_embeddings.projection.weight", None, "embedding"),
        ("vit.encoder.layer.8.attention.attention.key.weight", 8, "k"),
        ("vit.encoder.layer.8.attention.output.dense.weight", 8, "o"),
        ("vit.encoder.layer.8.layernorm_before.weight", 8, "norm"),
        ("blocks.8.attn.qkv.weight", 8, "qkv"),
        ("blocks.8.attn.proj.weight", 8, "o"),
        ("patch_embed.proj.weight", None, "embedding"),
        ("head.weight", None, "head"),
        ("vision_tower.vision_model.encoder.layers.8.self_attn.out_proj.weight", 8, "o"),
        ("visual.merger.mlp.0.weight", None, "other"),
        ("visual.transformer.resblocks.8.attn.in_proj_weight", 8, "qkv"),
        ("vision_model.pre_layrnorm.weight", None, "norm"),
    ],
    "state spaces": [
        ("backbone.layers.1.mixer.in_proj.weight", 1, "other"),
        ("backbone.layers.1.mixer.A_log", 1, "other"),
        ("backbone.norm_f.weight", None, "norm"),
    ],
}
ROWS = [pytest.param(*row, id=f"{family}: {row[0]}") for family, rows in TABLE.items() for row in rows]


@pytest.mark.parametrize(("name", "layer", "kind"), ROWS)
def test_every_family(name, layer, kind):
    assert anatomy.layer_of(name) == layer
    assert anatomy.kind_of(name) == kind
    assert (anatomy.stack_of(name) is None) == (layer is None)


def test_stacks_and_the_main_one():
    names = [f"vision_tower.encoder.layers.{i}.mlp.fc1.weight" for i in range(27)]
    names += [f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in range(18)] + ["lm_head.weight"]
    assert anatomy.stacks(names) == {"vision_tower.encoder.layers": 27, "language_model.model.layers": 18}
    assert anatomy.main_stack(names) == "language_model.model.layers"
    assert anatomy.num_layers(names) == 18
    t5 = [f"{side}.block.{i}.layer.0.SelfAttention.q.weight" for side in ("encoder", "decoder") for i in range(6)]
    assert anatomy.main_stack(t5) == "decoder.block"
    assert anatomy.num_layers(["lm_head.weight", "mlp.0.weight"]) == 0


def test_embedding_and_head():
    llama = ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
    assert anatomy.input_embedding(llama) == "model.embed_tokens.weight"
    assert anatomy.output_head(llama) == "lm_head.weight"
    assert anatomy.output_head(["wte.weight"]) is None
    t5 = ["encoder.embed_tokens.weight", "shared.weight"]
    assert anatomy.input_embedding(t5) == "shared.weight"


@given(
    st.sampled_from([row[0] for rows in TABLE.values() for row in rows if row[1] is not None]), st.integers(0, 10**6)
)
def test_with_layer_moves_only_the_layer(name, layer):
    moved = anatomy.with_layer(name, layer)
    assert anatomy.layer_of(moved) == layer
    assert anatomy.kind_of(moved) == anatomy.kind_of(name)
    assert anatomy.with_layer(moved, anatomy.layer_of(name)) == name


def test_with_layer_outside_layers_says_so():
    with pytest.raises(SurgeryError, match=r"'lm_head.weight' is in no layer"):
        anatomy.with_layer("lm_head.weight", 2)


@given(st.text(alphabet="abc._0123456789layersh", max_size=40))
def test_any_name_has_a_kind(name):
    assert anatomy.kind_of(name) in anatomy.KINDS
    assert anatomy.group_of(name) in anatomy.GROUPS.values()
