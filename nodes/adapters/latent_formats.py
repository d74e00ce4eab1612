"""What the host must know of a CLIP embedding as a LATENT."""

from comfy import latent_formats

from ...blip3o_core.preview import principal_component_map


class ClipEmbedding(latent_formats.LatentFormat):
    """(C, 8, 8) CLIP features, used raw. An embedding has no pixels; its preview shows three principal components."""

    latent_channels = 1792
    spacial_downscale_ratio = 128  # 1024 pixels are 8 cells
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    latent_rgb_factors_reshape = staticmethod(principal_component_map)  # the host's hook before the linear map above
