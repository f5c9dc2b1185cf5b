"""The mathematics of diffusion: tensors only, no text and no network.

    x_t = alpha_t x0 + sigma_t eps                  schedules    t -> (alpha, sigma); t = 0 is data
    out = a x0 + b eps                              predictions  eps, x0, v, flow: a row (a, b) each
    x0_hat = (b x_t - sigma out) / (b alpha - a sigma)                        the only conversion
    x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) d   samplers: d

Shapes, everywhere in this folder: B batch, C latent channels, E extra channels, H W pixels, h w
latent grid (of a video, F frames of it: F h w), L text tokens, D their width, P pooled width,
N patches of a style image, F their width.
"""
