"""The networks, and weights from elsewhere.

Shapes, everywhere in this folder: B batch, C channels (of latents, or features), E extra channels,
F frames, H W pixels, h w grid, N = h * w positions, L text tokens, D text width, P pooled width,
T time width. Others are in the module that has them.
"""
