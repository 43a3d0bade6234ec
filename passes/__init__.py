"""From stage to stage: raising, fusing and lowering, as ordered lists of named passes."""

from passes.lower import FUSED_PIPELINE, MODEL_PIPELINE, OPTIONAL, to_fused, to_model
from passes.pipeline import Pass, run_passes

__all__ = ["FUSED_PIPELINE", "MODEL_PIPELINE", "OPTIONAL", "Pass", "run_passes", "to_fused", "to_model"]
