"""The arrangements of published networks: in full, and small ones of the same kind."""

# The arguments of diffusers' UNet2DConditionModel.
SD1 = {"cross_attention_dim": 768, "sample_size": 64}
SD2 = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 96,
    "upcast_attention": True,
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
PUBLISHED_UNETS = {
    "sd1": SD1,
    "sd2": SD2,
    "sdxl": SDXL,
    "sd1-inpainting": SD1 | {"in_channels": 9},
    "sd2-unclip": SD2
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
}
# The arguments of diffusers' AutoencoderKL.
SD1_AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
PUBLISHED_AUTOENCODERS = {
    "sd1": SD1_AUTOENCODER,
    "sdxl": SD1_AUTOENCODER | {"scaling_factor": 0.13025, "force_upcast": True},
    "sd3": SD1_AUTOENCODER
    | {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
}

SMALL = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
}
SMALL_SD2 = SMALL | {
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SMALL_UNETS = {
    "sd1": SMALL | {"attention_head_dim": 4},
    "sd1-inpainting": SMALL | {"attention_head_dim": 4, "in_channels": 9},
    "sd2": SMALL_SD2,
    "sd2-unclip": SMALL_SD2
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
    "sdxl": {
        **SMALL_SD2,
        "block_out_channels": [16, 32, 48],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "attention_head_dim": [2, 4, 6],
        "transformer_layers_per_block": [1, 2, 3],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 5 + 6 * 6,
    },
}
