"""The sigmas of the reference."""

from comfy_api.v0_0_2 import io

from ..blip3o_core.sampling.discrete_euler import leading_sigmas
from ..blip3o_core.sampling.dpm_solver import dpm_sigmas
from ..blip3o_core.sampling.flow_matching import flow_sigmas
from ..blip3o_core.sampling.solvers import DEFAULT_SOLVER, SOLVERS

EMBEDDING, PICTURE, SANA_PICTURE = "embedding", "picture", "picture (SANA)"
COSINE, LINEAR = "cosine", "linear"


class Blip3oScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oScheduler",
            display_name="BLIP3-o Scheduler",
            category="BLIP3-o/sampling",
            description="Noise levels for core's SamplerCustom: those of DPM-Solver++, or for euler exactly those of the reference.",
            search_aliases=["BLIP3o sigmas", "flow matching scheduler", "DPM-Solver++ sigmas"],
            inputs=[
                io.Combo.Input(
                    "stage",
                    options=[EMBEDDING, PICTURE, SANA_PICTURE],
                    tooltip="embedding: for the BLIP3-o diffusion model (12 steps with SamplerDPMPP_2M_SDE, midpoint, eta 0, and cosine; "
                    "the reference: 30 with euler, linear). picture: for the SDXL decoder, with euler (50 steps in the reference). picture "
                    "(SANA): for the SANA decoder (30 steps), with SamplerDPMPP_2M_SDE too.",
                ),
                io.Int.Input(
                    "steps", default=SOLVERS[DEFAULT_SOLVER].steps, min=1, max=999,
                    tooltip="Steps of the sampler; the samplers named under stage call the model once in each.",
                ),
                io.Float.Input(
                    "shift", default=1.0, min=0.1, max=20.0, step=0.05, advanced=True,
                    tooltip="Embedding only: above 1 spends more steps where there is much noise. The reference uses 1. Set the "
                    "same value with ModelSamplingSD3 if other schedulers should agree.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Below 1 starts part of the way: for a latent that already holds something.",
                ),
                io.Combo.Input(
                    "schedule", options=[COSINE, LINEAR],
                    tooltip="Embedding only. cosine: dense at both ends, for DPM-Solver++: 12 steps are closer to the exact result than 30 "
                    "of euler. linear: as the reference, for euler.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="steps + 1 noise levels, the last one 0.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, stage: str, steps: int, shift: float = 1.0, denoise: float = 1.0, schedule: str = COSINE) -> io.NodeOutput:
        if denoise <= 0:
            return io.NodeOutput(flow_sigmas(1)[:0])  # core's way to say: nothing to do
        if stage == EMBEDDING:
            return io.NodeOutput(flow_sigmas(steps, shift, denoise, schedule))
        if stage == SANA_PICTURE:
            return io.NodeOutput(dpm_sigmas(min(int(steps / denoise), 999))[-(steps + 1) :].float())
        return io.NodeOutput(leading_sigmas(min(int(steps / denoise), 999))[-(steps + 1) :])
