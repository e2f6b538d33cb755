"""Networks for B-scans: three logits per pixel out, any height and width in."""

from __future__ import annotations

from pipeline.oct.networks.hybrid_attention import HybridAttentionUNet
from pipeline.oct.networks.small import SmallUNet

__all__ = ["HybridAttentionUNet", "SmallUNet"]
