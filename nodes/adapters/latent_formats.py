"""What the host must know of our latents: CLIP embeddings, and those of the SANA decoder's autoencoder."""

from comfy import latent_formats

from ...blip3o_core.preview import principal_component_map


class ClipEmbedding(latent_formats.LatentFormat):
    """(C, 8, 8) CLIP features, used raw. An embedding has no pixels; its preview shows three principal components."""

    latent_channels = 1792
    spacial_downscale_ratio = 128  # 1024 pixels are 8 cells
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    latent_rgb_factors_reshape = staticmethod(principal_component_map)  # the host's hook before the linear map above


class DcaeLatent(latent_formats.LatentFormat):
    """(32, h, w) of the DC-AE f32c32, times its scaling factor while they are sampled. The preview shows three principal components."""

    latent_channels = 32
    spacial_downscale_ratio = 32
    scale_factor = 0.41407
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    latent_rgb_factors_reshape = staticmethod(principal_component_map)
