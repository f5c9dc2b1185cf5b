"""Files in the original layout of Stable Diffusion, of small pipelines of diffusers.

The names go the other way than in `ldm.models.original_names`, level by level, as the authors'
networks count them.
"""

import copy

import diffusers
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.models.clip import train_tokenizer

CAPTIONS = ["a red circle above a blue square!"] * 3
TOKENIZER = train_tokenizer(CAPTIONS, vocab_size=540)
TOKENIZER.model_max_length = 16
OPEN_CLIP_TOKENIZER = copy.deepcopy(TOKENIZER)
OPEN_CLIP_TOKENIZER.pad_token = "!"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "sd1": diffusers.PNDMScheduler,
    "sd2": diffusers.DDIMScheduler,
    "sdxl": diffusers.EulerDiscreteScheduler,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def make_text_encoder(*, width=64, layers=2, activation="quick_gelu", projection=None):
    """A CLIP text encoder of transformers for the tokens of `TOKENIZER`."""
    config = CLIPTextConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=16,
        hidden_act=activation,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def make_unet(kind, *, channels=4):
    sizes = {"in_channels": channels, "layers_per_block": 1, "sample_size": 16}
    if kind == "sd1":
        sizes |= {"block_out_channels": (32, 64), "attention_head_dim": 8}
    else:
        sizes |= {"block_out_channels": (64, 128), "attention_head_dim": (1, 2)}
        sizes |= {"use_linear_projection": True}
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    sizes["cross_attention_dim"] = 64
    if kind == "sdxl":
        down, up = down[::-1], up[::-1]
        sizes |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        sizes |= {"projection_class_embeddings_input_dim": 6 * 8 + 48, "cross_attention_dim": 192}
        sizes |= {"transformer_layers_per_block": (1, 2)}
    return diffusers.UNet2DConditionModel(down_block_types=down, up_block_types=up, **sizes)


def make_pipeline(kind, *, channels=4, prediction="epsilon", layers=23):
    """A small pipeline of sd1, sd2 or sdxl with random weights."""
    unet = make_unet(kind, channels=channels)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
    )
    more = {} if kind == "sdxl" else {"set_alpha_to_one": False}
    more |= {"skip_prk_steps": True} if kind == "sd1" else {}
    more |= {"clip_sample": False} if kind == "sd2" else {}
    scheduler = SCHEDULERS[kind](
        **BETAS, steps_offset=1, timestep_spacing="leading", prediction_type=prediction, **more
    )
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler, "tokenizer": TOKENIZER}
    if kind == "sdxl":
        second = make_text_encoder(width=128, layers=3, activation="gelu", projection=48)
        more = {"text_encoder_2": second, "tokenizer_2": OPEN_CLIP_TOKENIZER}
        return diffusers.StableDiffusionXLPipeline(
            text_encoder=make_text_encoder(), add_watermarker=False, **more, **parts
        )
    if kind == "sd2":
        text = make_text_encoder(layers=layers, activation="gelu")
        parts["tokenizer"] = OPEN_CLIP_TOKENIZER
    else:
        text = make_text_encoder()
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(text_encoder=text, **parts)


def to_original_unet(unet):
    """The weights of a UNet2DConditionModel as the authors' UNetModel names them."""
    levels, blocks = len(unet.config.block_out_channels), unet.config.layers_per_block
    old = {f"{theirs}.": f"{ours}." for theirs, ours in OUTER.items()}
    resnets = {"mid_block.resnets.0.": "middle_block.0.", "mid_block.resnets.1.": "middle_block.2."}
    old["mid_block.attentions.0."] = "middle_block.1."
    for level in range(levels):
        for k in range(blocks):
            number = (blocks + 1) * level + k + 1
            resnets[f"down_blocks.{level}.resnets.{k}."] = f"input_blocks.{number}.0."
            old[f"down_blocks.{level}.attentions.{k}."] = f"input_blocks.{number}.1."
        number = (blocks + 1) * (level + 1)
        old[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{number}.0.op."
        for k in range(blocks + 1):
            number = (blocks + 1) * level + k
            resnets[f"up_blocks.{level}.resnets.{k}."] = f"output_blocks.{number}.0."
            old[f"up_blocks.{level}.attentions.{k}."] = f"output_blocks.{number}.1."
        attends = unet.config.up_block_types[level] == "CrossAttnUpBlock2D"
        number = (blocks + 1) * level + blocks
        last = f"output_blocks.{number}.{2 if attends else 1}.conv."
        old[f"up_blocks.{level}.upsamplers.0.conv."] = last
    for theirs, ours in resnets.items():
        old |= {f"{theirs}{name}.": f"{ours}{other}." for name, other in RESNET.items()}
    return {rename(name, old): value for name, value in unet.state_dict().items()}


def to_original_autoencoder(vae, *, convolutions=True):
    """The weights of an AutoencoderKL; convolutions: its attention in 1x1 convolutions."""
    levels, blocks = len(vae.config.block_out_channels), vae.config.layers_per_block
    old = {}
    for half in ("encoder.", "decoder."):
        for k in range(2):
            old[f"{half}mid_block.resnets.{k}."] = f"{half}mid.block_{k + 1}."
        attention = f"{half}mid_block.attentions.0."
        old[f"{attention}group_norm."] = f"{half}mid.attn_1.norm."
        old[f"{attention}to_out.0."] = f"{half}mid.attn_1.proj_out."
        old |= {f"{attention}to_{each}.": f"{half}mid.attn_1.{each}." for each in "qkv"}
        old[f"{half}conv_norm_out."] = f"{half}norm_out."
    for level in range(levels):
        for k in range(blocks):
            name = f"encoder.down_blocks.{level}.resnets.{k}."
            old[name] = f"encoder.down.{level}.block.{k}."
        down = f"encoder.down_blocks.{level}.downsamplers.0."
        old[down] = f"encoder.down.{level}.downsample."
        finest = levels - 1 - level
        for k in range(blocks + 1):
            name = f"decoder.up_blocks.{level}.resnets.{k}."
            old[name] = f"decoder.up.{finest}.block.{k}."
        old[f"decoder.up_blocks.{level}.upsamplers.0."] = f"decoder.up.{finest}.upsample."
    found = {}
    for name, value in vae.state_dict().items():
        ours = rename(name, old).replace("conv_shortcut", "nin_shortcut")
        is_attention = ".attn_1." in ours and value.ndim == 2
        found[ours] = value[:, :, None, None] if is_attention and convolutions else value
    return found


def rename(name, old):
    start = next((each for each in old if name.startswith(each)), None)
    return name if start is None else old[start] + name.removeprefix(start)


def to_clip(text):
    """The weights of OpenAI's CLIP in the files of the authors, with the buffer of positions."""
    state = {add_tower(name): value for name, value in text.state_dict().items()}
    positions = torch.arange(text.config.max_position_embeddings)[None]
    return state | {"text_model.embeddings.position_ids": positions}


def add_tower(name):
    """transformers since 5.6 leaves out the name of the tower."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def to_open_clip(text, *, more_layers=0):
    """The weights of OpenCLIP; more_layers: further ones at its end, that diffusers leaves out."""
    state = {add_tower(name): value for name, value in text.state_dict().items()}
    found = {
        "positional_embedding": state.pop("text_model.embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("text_model.embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("text_model.final_layer_norm.weight"),
        "ln_final.bias": state.pop("text_model.final_layer_norm.bias"),
        "logit_scale": torch.tensor(4.6),
    }
    width = text.config.hidden_size
    projection = state.pop("text_projection.weight", torch.randn(width, width))
    found["text_projection"] = projection.T.contiguous()
    count = text.config.num_hidden_layers
    for i in range(count + more_layers):
        theirs = f"text_model.encoder.layers.{min(i, count - 1)}."
        layer = {n: state[theirs + n].clone() for n in names_of(state, theirs)}
        ours = f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [layer.pop(f"self_attn.{each}_proj.{kind}") for each in "qkv"]
            found[f"{ours}attn.in_proj_{kind}"] = torch.cat(qkv)
        for name, value in layer.items():
            found[ours + rename(name, OPEN_CLIP)] = value
    return found


def names_of(state, prefix):
    return [name.removeprefix(prefix) for name in state if name.startswith(prefix)]


def collect_original_state(pipeline, *, averaged=False):
    """All weights of a pipeline in the original layout, in one dict; averaged: EMA ones as well."""
    unet, vae = to_original_unet(pipeline.unet), to_original_autoencoder(pipeline.vae)
    state = add_prefix("model.diffusion_model.", unet) | add_prefix("first_stage_model.", vae)
    if averaged:
        ema = {f"diffusion_model{name.replace('.', '')}": t + 1 for name, t in unet.items()}
        state |= add_prefix("model_ema.", ema)
    if hasattr(pipeline, "text_encoder_2"):
        first, second = to_clip(pipeline.text_encoder), to_open_clip(pipeline.text_encoder_2)
        state |= add_prefix("conditioner.embedders.0.transformer.", first)
        return state | add_prefix("conditioner.embedders.1.model.", second)
    if pipeline.text_encoder.config.hidden_act == "gelu":
        more = 24 - pipeline.text_encoder.config.num_hidden_layers
        text = to_open_clip(pipeline.text_encoder, more_layers=more)
        return state | add_prefix("cond_stage_model.model.", text)
    return state | add_prefix("cond_stage_model.transformer.", to_clip(pipeline.text_encoder))


def add_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def write_original_file(state, path, **metadata):
    """Writes a file, with a tokenizer next to it."""
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=metadata or None)
    else:
        torch.save({"state_dict": state, **metadata}, path)
    if not (path.parent / "tokenizer").exists():  # a use of it changes what it would write
        TOKENIZER.save_pretrained(path.parent / "tokenizer")
    return path
