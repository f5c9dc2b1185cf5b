"""What a config.json of diffusers says, completed by diffusers' defaults, without diffusers."""

from collections.abc import Mapping
from itertools import groupby
from math import isfinite

# The arguments of UNet2DConditionModel and AutoencoderKL with their defaults, diffusers 0.42.
UNET_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
AUTOENCODER_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Keys that change no result here: notes, the size of the training images, and where diffusers
# computes in float32 instead of half precision.
HARMLESS_KEYS = frozenset(
    (
        *("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"),
        *("sample_size", "upcast_attention"),
    )
)
HARMLESS_AUTOENCODER_KEYS = HARMLESS_KEYS - {"upcast_attention"} | {"force_upcast"}
# Of our networks: settings that decide how one is trained, and not what it computes.
TRAINING_SETTINGS = ("checkpointing", "dropout", "linear_projections")
# A damaged or hostile file with larger numbers would fill the memory before its weights are read.
MOST_FEATURES, MOST_LAYERS = 2**15, 100
REASONS = {
    "num_class_embeds": "an embedding of noise levels or classes, as in the x4 upscaler",
    "time_cond_proj_dim": "the guidance scale as an input, as in latent consistency models",
}


class ForeignConfig:
    """A file of settings of diffusers: the keys that are read, and values that ours cannot have.

    defaults: of every key that diffusers knows. harmless: keys that may have any value. file: its
    name, without .json.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        defaults: Mapping[str, object],
        *,
        kind: str,
        harmless: frozenset[str],
        file: str = "config",
    ) -> None:
        self.kind, self.defaults, self.file = kind, defaults, file
        given = {key: value for key, value in config.items() if key not in harmless}
        self.values = {**defaults, **given}
        self.unread = set(self.values)
        self.refused: list[str] = []
        if config.get("_class_name", kind) != kind:
            self.refused.append(f"_class_name={config['_class_name']}")

    def read(self, key: str) -> object:
        """The value of a key; a list of equal values is that value."""
        self.unread.discard(key)
        return _simplify(self.values[key])

    def read_list(self, key: str) -> list:
        """As `read`, of a list."""
        self.unread.discard(key)
        value = self.values[key]
        if isinstance(value, list | tuple):
            return list(value)
        self.refuse(key)
        return []

    def read_numbers(
        self, key: str, count: int, *, least: int = 1, most: int = MOST_FEATURES
    ) -> list[int]:
        """As `read`, of one whole number of this range, or of one for each of `count` levels."""
        value = self.read(key)
        numbers = value if isinstance(value, list) else [value] * count
        if len(numbers) == count and all(_is_number(each, least, most) for each in numbers):
            return numbers
        self.refuse(key)
        return [least] * count

    def read_number(self, key: str, *, optional: bool = False, most: int = MOST_FEATURES) -> int:
        """As `read`, of one whole number up to `most`; optional: or none, which is 0."""
        value = self.read(key)
        if optional and value in (None, 0):
            return 0
        if _is_number(value, 1, most):
            return value
        self.refuse(key)
        return 1

    def read_share(self, key: str) -> float:
        """As `read`, of a number from 0 to below 1."""
        value = self.read(key)
        if type(value) in (int, float) and 0 <= value < 1:
            return float(value)
        self.refuse(key)
        return 0.0

    def check_scale(self, key: str, channels: int, *, positive: bool = False) -> None:
        """As `read`, of a number, of one for each channel, or of none where that is the default."""
        self.unread.discard(key)
        value = self.values[key]
        numbers = value if isinstance(value, list) else [value] * channels
        fits = len(numbers) == channels and all(
            type(each) in (int, float) and isfinite(each) and (each > 0 or not positive)
            for each in numbers
        )
        if not fits and (value is not None or self.defaults[key] is not None):
            self.refuse(key)

    def read_choice(self, key: str, *choices: object) -> object:
        """As `read`, of one of these values; the default where it is refused."""
        value = self.read(key)
        if value in choices:
            return value
        self.refuse(key)
        return self.defaults[key]

    def ignore(self, *keys: str) -> None:
        """Lets keys have any value."""
        self.unread.difference_update(keys)

    def refuse(self, key: str) -> None:
        """Records a key whose value ours cannot have."""
        self.unread.discard(key)
        reason = f" ({REASONS[key]})" if key in REASONS else ""
        self.refused.append(f"{key}={_simplify(self.values[key])}{reason}")

    def finish(self) -> None:
        """Raises ValueError that names what was refused, and what was not read and matters."""
        for key in sorted(self.unread):
            default = self.defaults.get(key, self)
            if _simplify(self.values[key]) != _simplify(default):
                self.refuse(key)
        if self.refused:
            raise ValueError(
                f"this {self.file}.json is of no {self.kind} that ldm can hold: "
                f"{', '.join(self.refused)}"
            )


def _is_number(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _simplify(value: object) -> object:
    """A tuple as a list, and equal values as one."""
    if not isinstance(value, list | tuple):
        return value
    equal = len(list(groupby(value))) == 1 and not isinstance(value[0], list | tuple)
    return value[0] if equal else list(value)
