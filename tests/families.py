"""Decoders of transformers as tiny models, and what of each a LoRA is put on."""

import copy
from typing import NamedTuple

import pytest
import torch
import transformers as t

from tests.models import COMMON, GPT2, GROUPED, HEADED, WIDTH

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
COMPRESSED = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
OF_TEXT = r".*(language|text)_model.*\.([qkvo]|gate|up|down)_proj"

LATENT = {  # attention over compressed keys and values
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
EXPERTS = {  # of every family's names for it, as many as there are
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
LINEAR = {  # attention that keeps a state, in the first block
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONVOLVED = {**GROUPED, "layer_types": ["conv", "full_attention"]}
PER_LAYER = {**HEADED, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 32}
GPT = {**GPT2, "eos_token_id": 2}
ROTARY = {**GPT, "rotary_dim": 4}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IMAGES = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 16,
    "out_hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


class Family(NamedTuple):
    stem: str  # of its classes' names
    sizes: dict
    targets: list[str] | str = "all-linear"
    model: str = "ForCausalLM"
    config: str = "Config"

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Tiny, with weights so large that every part of a block counts."""
        names = self.stem + self.config, self.stem + self.model
        if not all(hasattr(t, name) for name in names):
            pytest.skip(f"transformers {t.__version__} has no {self.stem}")
        config, model = (getattr(t, name) for name in names)
        torch.manual_seed(seed)
        made = model(config(**copy.deepcopy(self.sizes)))
        with torch.no_grad():
            for p in made.parameters():
                if p.ndim > 1:
                    p.mul_(5)
        return made.eval()


def seeing(stem: str, text: str, images: str | None = None, targets=OF_TEXT, **sizes) -> Family:
    """With an encoder of images beside the decoder; `sizes` are the decoder's."""
    vision = IMAGES if images is None else {**IMAGES, "model_type": images}
    text = {**HEADED, "model_type": text, **sizes}
    whole = {"text_config": text, "vision_config": vision}
    return Family(stem, whole, targets, "ForConditionalGeneration")


DENSE = {
    "llama": Family("Llama", HEADED),
    "mistral": Family("Mistral", HEADED),
    "ministral": Family("Ministral", HEADED),
    "qwen2": Family("Qwen2", GROUPED),
    "qwen3": Family("Qwen3", HEADED),
    "gemma": Family("Gemma", HEADED),
    "gemma2": Family("Gemma2", HEADED),
    "gemma3_text": Family("Gemma3", HEADED, config="TextConfig"),
    "gemma3n_text": Family(
        "Gemma3n",
        {
            **PER_LAYER,
            "num_kv_shared_layers": 0,
            "laurel_rank": 24,
            "altup_num_inputs": 2,
            "altup_correct_scale": False,
        },
        [*ATTENTION, *MLP, "linear_left", "linear_right", "per_layer_model_projection"],
        config="TextConfig",
    ),
    "gemma4_text": Family("Gemma4", {**PER_LAYER, "global_head_dim": 8}, config="TextConfig"),
    "vaultgemma": Family("VaultGemma", HEADED),
    "phi": Family("Phi", GROUPED),
    "phi3": Family("Phi3", GROUPED),
    "olmo": Family("Olmo", GROUPED),
    "olmo2": Family("Olmo2", GROUPED),
    "olmo3": Family("Olmo3", GROUPED),
    "stablelm": Family("StableLm", GROUPED),
    "starcoder2": Family("Starcoder2", GROUPED),
    "cohere": Family("Cohere", GROUPED),
    "cohere2": Family("Cohere2", GROUPED),
    "granite": Family("Granite", GROUPED),
    "glm": Family("Glm", HEADED),
    "glm4": Family("Glm4", HEADED),
    "nemotron": Family("Nemotron", HEADED),
    "persimmon": Family("Persimmon", COMMON),
    "exaone4": Family("Exaone4", GROUPED),
    "smollm3": Family("SmolLM3", GROUPED),
    "helium": Family("Helium", HEADED),
    "ernie4_5": Family("Ernie4_5", HEADED),
    "hunyuan": Family("HunYuanDenseV1", HEADED),
    "seed_oss": Family("SeedOss", HEADED),
    "apertus": Family("Apertus", GROUPED),
    "arcee": Family("Arcee", HEADED),
    "bitnet": Family("BitNet", GROUPED),
    "cwm": Family("Cwm", HEADED),
    "nanochat": Family("NanoChat", GROUPED),
    "jais2": Family("Jais2", HEADED),
    "doge": Family("Doge", GROUPED, [*ATTENTION, *MLP]),
    "diffllama": Family("DiffLlama", GROUPED),
    "hrm_text": Family("HrmText", HEADED),
    "modernbert_decoder": Family("ModernBertDecoder", COMMON),
}
OLDER = {
    "gpt2": Family("GPT2", GPT, model="LMHeadModel"),
    "gpt_bigcode": Family("GPTBigCode", GPT),
    "gptj": Family("GPTJ", ROTARY),
    "codegen": Family("CodeGen", ROTARY),
    "gpt_neo": Family("GPTNeo", {**COMMON, "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": Family("GPTNeoX", COMMON),
    "gpt_neox_japanese": Family("GPTNeoXJapanese", COMMON),
    "opt": Family("OPT", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "bloom": Family("Bloom", COMMON),
    "falcon": Family("Falcon", COMMON),
    "mpt": Family("Mpt", COMMON),
    "xglm": Family("XGLM", {**COMMON, "ffn_dim": 48}),
    "biogpt": Family("BioGpt", COMMON),
    "ctrl": Family("CTRL", {**GPT, "dff": 48}, model="LMHeadModel"),
    "bert_generation": Family("BertGeneration", {**COMMON, "is_decoder": True}, model="Decoder"),
}
MIXTURES = {
    "mixtral": Family("Mixtral", {**HEADED, **EXPERTS}, ATTENTION),
    "qwen2_moe": Family("Qwen2Moe", {**GROUPED, **EXPERTS}, ATTENTION),
    "qwen3_moe": Family("Qwen3Moe", {**HEADED, **EXPERTS}, ATTENTION),
    "olmoe": Family("Olmoe", {**GROUPED, **EXPERTS}, ATTENTION),
    "flex_olmo": Family("FlexOlmo", {**GROUPED, **EXPERTS}, ATTENTION),
    "granitemoe": Family("GraniteMoe", {**GROUPED, **EXPERTS}, ATTENTION),
    "granitemoeshared": Family("GraniteMoeShared", {**GROUPED, **EXPERTS}, ATTENTION),
    "phimoe": Family("Phimoe", {**GROUPED, **EXPERTS}, ATTENTION),
    "minimax": Family(
        "MiniMax", {**HEADED, **EXPERTS, **LINEAR}, [*ATTENTION, "qkv_proj", "out_proj"]
    ),
    "minimax_m2": Family("MiniMaxM2", {**HEADED, **EXPERTS}, ATTENTION),
    "dbrx": Family(
        "Dbrx",
        {
            "vocab_size": 64,
            "d_model": WIDTH,
            "n_layers": 2,
            "n_heads": 4,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 16},
        },
        ["Wqkv", "out_proj"],
    ),
    "ernie4_5_moe": Family("Ernie4_5_Moe", {**GROUPED, **EXPERTS}, ATTENTION),
    "hunyuan_moe": Family("HunYuanMoEV1", {**HEADED, **EXPERTS}, ATTENTION),
    "dots1": Family("Dots1", {**HEADED, **EXPERTS}, ATTENTION),
    "glm4_moe": Family("Glm4Moe", {**HEADED, **EXPERTS}, ATTENTION),
    "gpt_oss": Family("GptOss", {**HEADED, **EXPERTS}, ATTENTION),
    "llama4_text": Family("Llama4", {**HEADED, **EXPERTS}, ATTENTION, config="TextConfig"),
    "jetmoe": Family("JetMoe", {**HEADED, **EXPERTS, "kv_channels": 8}, ["kv_proj"]),
    "aria_text": Family("AriaText", {**GROUPED, **EXPERTS}, ATTENTION),
    "afmoe": Family("Afmoe", {**HEADED, **EXPERTS}, ATTENTION),
    "exaone_moe": Family("ExaoneMoe", {**HEADED, **EXPERTS}, ATTENTION),
    "solar_open": Family("SolarOpen", {**HEADED, **EXPERTS}, ATTENTION),
}
COMPRESSING = {
    "minicpm3": Family("MiniCPM3", LATENT),
    "youtu": Family("Youtu", LATENT),
    "deepseek_v2": Family("DeepseekV2", {**LATENT, **EXPERTS}, COMPRESSED),
    "deepseek_v3": Family(
        "DeepseekV3", {**LATENT, **EXPERTS, "first_k_dense_replace": 1}, COMPRESSED
    ),
    "glm4_moe_lite": Family("Glm4MoeLite", {**LATENT, **EXPERTS}, COMPRESSED),
    "longcat_flash": Family(
        "LongcatFlash",
        {
            **{k: v for k, v in LATENT.items() if k != "num_hidden_layers"},
            **EXPERTS,
            "num_layers": 2,  # each of two attentions
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "zero_expert_num": 2,
        },
        COMPRESSED,
    ),
}
WITH_STATES = {
    "lfm2": Family("Lfm2", CONVOLVED),
    "lfm2_moe": Family(
        "Lfm2Moe", {**CONVOLVED, **EXPERTS}, [*ATTENTION[:3], "in_proj", "out_proj"]
    ),
    "bamba": Family("Bamba", {**GROUPED, **STATES, "attn_layer_indices": [1]}),
    "jamba": Family(
        "Jamba",
        {**GROUPED, **STATES, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
        [*ATTENTION, *MLP],
    ),
    "zamba": Family("Zamba", {**GROUPED, **STATES, "layers_block_type": ["hybrid", "hybrid"]}),
    "zamba2": Family(
        "Zamba2",
        {**GROUPED, **STATES, "layers_block_type": ["hybrid", "hybrid"], "num_mem_blocks": 2},
    ),
    "falcon_h1": Family(
        "FalconH1", {**GROUPED, **STATES, "mamba_d_ssm": 64}, [*ATTENTION, *MLP, "in_proj"]
    ),
    "granitemoehybrid": Family("GraniteMoeHybrid", {**GROUPED, **EXPERTS, **STATES, **LINEAR}),
    "nemotron_h": Family("NemotronH", {**HEADED, "layers_block_type": ["full_attention", "mlp"]}),
    "qwen3_next": Family(
        "Qwen3Next",
        {**HEADED, **EXPERTS, **LINEAR},
        [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"],
    ),
    "qwen3_5_text": Family("Qwen3_5", {**HEADED, **LINEAR}, config="TextConfig"),
    "olmo_hybrid": Family("OlmoHybrid", {**GROUPED, **LINEAR}),
    "kimi_linear": Family(
        "KimiLinear",
        {**LATENT, **EXPERTS, **LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
        ATTENTION,
    ),
}
SEEING = {
    "llava": seeing("Llava", "llama", "clip_vision_model"),
    "llava_next": seeing("LlavaNext", "mistral", "clip_vision_model"),
    "vipllava": seeing("VipLlava", "llama", "clip_vision_model"),
    "qwen2_vl": seeing("Qwen2VL", "qwen2_vl_text", rope_parameters=SECTIONS),
    "qwen2_5_vl": seeing("Qwen2_5_VL", "qwen2_5_vl_text", rope_parameters=SECTIONS),
    "qwen3_vl": seeing("Qwen3VL", "qwen3_vl_text"),
    "qwen3_5": seeing("Qwen3_5", "qwen3_5_text", **LINEAR),
    "gemma3": seeing("Gemma3", "gemma3_text", "siglip_vision_model"),
    "paligemma": seeing("PaliGemma", "gemma", "siglip_vision_model"),
    "idefics2": seeing("Idefics2", "mistral"),
    "idefics3": seeing("Idefics3", "llama"),
    "smolvlm": seeing("SmolVLM", "llama"),
    "mistral3": seeing("Mistral3", "mistral", "pixtral"),
    "internvl": seeing("InternVL", "qwen2"),
    "aya_vision": seeing("AyaVision", "cohere2", "siglip_vision_model"),
    "glm4v": seeing("Glm4v", "glm4v_text", rope_parameters=SECTIONS),
    "got_ocr2": seeing("GotOcr2", "qwen2"),
    "lfm2_vl": seeing("Lfm2Vl", "lfm2", "siglip2_vision_model", **CONVOLVED),
    "llama4": seeing("Llama4", "llama4_text", targets=r".*language_model.*[qkvo]_proj", **EXPERTS),
    "mllama": seeing(
        "Mllama",
        "mllama_text_model",
        targets=r".*language_model\.layers\.0\..*_proj",  # the second looks at images alone
        cross_attention_layers=[1],
    ),
    "chameleon": Family(
        "Chameleon",
        {**COMMON, "num_key_value_heads": 4, "vocabulary_map": {"<image>": 5}},
        model="ForConditionalGeneration",
    ),
    "fuyu": Family(
        "Fuyu",
        {"text_config": {**COMMON, "model_type": "persimmon"}},
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
}
FAMILIES = DENSE | OLDER | MIXTURES | COMPRESSING | WITH_STATES | SEEING
